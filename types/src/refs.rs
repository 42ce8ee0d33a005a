//! How people point at branches and moments: `project/branch`, `project/branch@point`, `branch--project`.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::lsn::Lsn;
use crate::names::{BranchName, CheckpointName, InvalidName, ProjectName};

/// A text that is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseRefError {
    /// No slash, or more than one.
    #[error("{0:?} is not a branch reference (want PROJECT/BRANCH)")]
    Branch(String),
    /// No `--` between two names.
    #[error("{0:?} is not an endpoint name (want BRANCH--PROJECT)")]
    Endpoint(String),
    /// A part is not a name.
    #[error(transparent)]
    Name(#[from] InvalidName),
}

/// One branch of one project: `shop/prod`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BranchRef {
    /// The project's name.
    pub project: ProjectName,
    /// The branch's name in it.
    pub branch: BranchName,
}

/// A moment on a branch.
///
/// As text a checkpoint is its name; an LSN has a slash, a time has the form of RFC 3339; neither can be a
/// checkpoint's name (`/` and `:` are not allowed there). The head is `head`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Point {
    /// Where the branch is now.
    #[default]
    Head,
    /// A named, immutable point.
    Checkpoint(CheckpointName),
    /// A position in the branch's write-ahead log.
    Lsn(Lsn),
    /// A moment in time.
    Time(Timestamp),
}

/// A branch and a moment on it: `shop/prod@before-release`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PointRef {
    /// Which branch.
    pub at: BranchRef,
    /// Which moment on it.
    pub point: Point,
}

/// The stable address of a branch: `branch--project`, the first label of its host name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EndpointName(BranchRef);

impl EndpointName {
    /// The branch this address stands for.
    pub fn branch_ref(&self) -> &BranchRef {
        &self.0
    }
}

impl From<BranchRef> for EndpointName {
    fn from(at: BranchRef) -> Self {
        Self(at)
    }
}

impl FromStr for BranchRef {
    type Err = ParseRefError;

    fn from_str(text: &str) -> Result<Self, ParseRefError> {
        let (project, branch) = text.split_once('/').ok_or_else(|| ParseRefError::Branch(text.to_owned()))?;
        if branch.contains('/') {
            return Err(ParseRefError::Branch(text.to_owned()));
        }
        Ok(Self { project: project.parse()?, branch: branch.parse()? })
    }
}

impl FromStr for Point {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if text == "head" {
            return Ok(Point::Head);
        }
        if let Ok(lsn) = text.parse() {
            return Ok(Point::Lsn(lsn));
        }
        if let Ok(time) = text.parse() {
            return Ok(Point::Time(time));
        }
        text.parse().map(Point::Checkpoint)
    }
}

impl FromStr for PointRef {
    type Err = ParseRefError;

    fn from_str(text: &str) -> Result<Self, ParseRefError> {
        match text.split_once('@') {
            None => Ok(Self { at: text.parse()?, point: Point::Head }),
            Some((at, point)) => Ok(Self { at: at.parse()?, point: point.parse()? }),
        }
    }
}

impl FromStr for EndpointName {
    type Err = ParseRefError;

    fn from_str(text: &str) -> Result<Self, ParseRefError> {
        let (branch, project) = text.split_once("--").ok_or_else(|| ParseRefError::Endpoint(text.to_owned()))?;
        Ok(Self(BranchRef { project: project.parse()?, branch: branch.parse()? }))
    }
}

impl fmt::Display for BranchRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.branch)
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Point::Head => f.write_str("head"),
            Point::Checkpoint(name) => name.fmt(f),
            Point::Lsn(lsn) => lsn.fmt(f),
            Point::Time(time) => time.fmt(f),
        }
    }
}

impl fmt::Display for PointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.point {
            Point::Head => self.at.fmt(f),
            point => write!(f, "{}@{point}", self.at),
        }
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}--{}", self.0.branch, self.0.project)
    }
}

macro_rules! serde_as_text {
    ($($name:ident),*) => {$(
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

serde_as_text!(BranchRef, Point, PointRef, EndpointName);

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let got = match text.parse::<PointRef>() {
            Ok(point_ref) => format!("{:?} {point_ref}", point_ref.point),
            Err(error) => error.to_string(),
        };
        assert_eq!(got, expect, "for {text:?}");
    }

    #[test]
    fn points() {
        check("shop/prod", "Head shop/prod");
        check("shop/prod@head", "Head shop/prod");
        check("shop/prod@v1", "Checkpoint(\"v1\") shop/prod@v1");
        check("shop/prod@0/16B3748", "Lsn(0/16B3748) shop/prod@0/16B3748");
        check("shop/prod@2026-11-21T06:00:00Z", "Time(2026-11-21T06:00:00Z) shop/prod@2026-11-21T06:00:00Z");
        check("shop", "\"shop\" is not a branch reference (want PROJECT/BRANCH)");
        check("shop/a/b", "\"shop/a/b\" is not a branch reference (want PROJECT/BRANCH)");
        check("shop/prod@", "\"\" cannot be the name of a checkpoint: it is empty");
    }

    #[test]
    fn endpoints_round_trip() {
        let name: EndpointName = "pr-42--shop".parse().unwrap();
        assert_eq!(name.branch_ref().to_string(), "shop/pr-42");
        assert_eq!(name.to_string(), "pr-42--shop");
        assert!("shop".parse::<EndpointName>().is_err());
        assert!("a--b--c".parse::<EndpointName>().is_err());
    }
}
