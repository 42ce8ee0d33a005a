//! Names people choose. What a name may hold is decided here and nowhere else.
//!
//! Project and branch names are parts of a DNS label (`branch--project`), so each has at most
//! [`LABEL_PART_MAX`] characters of `a-z`, `0-9` and single `-`, and begins and ends with a letter or digit.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// LIMIT: a DNS label has 63 bytes (RFC 1035, 2.3.4); two names and `--` between them must fit.
const LABEL_PART_MAX: usize = 30;

/// LIMIT: long enough for a date, a ticket and a word; short enough for one line of a table.
const CHECKPOINT_MAX: usize = 80;

/// A text that cannot be a name of the wanted kind, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} cannot be the name of a {kind}: {why}")]
pub struct InvalidName {
    text: String,
    kind: &'static str,
    why: &'static str,
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $check:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;

            fn from_str(text: &str) -> Result<Self, InvalidName> {
                match $check(text) {
                    None => Ok(Self(text.to_owned())),
                    Some(why) => Err(InvalidName { text: text.to_owned(), kind: $kind, why }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

name!(
    /// The name of a project, unique in its bucket.
    ProjectName, "project", label_part_fault
);
name!(
    /// The name of a branch, unique in its project.
    BranchName, "branch", label_part_fault
);
name!(
    /// The name of a checkpoint, unique on its branch.
    CheckpointName, "checkpoint", checkpoint_fault
);

fn label_part_fault(text: &str) -> Option<&'static str> {
    let outer = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    match bytes {
        [] => Some("it is empty"),
        _ if bytes.len() > LABEL_PART_MAX => Some("it is longer than 30 characters"),
        _ if !bytes.iter().all(|&b| outer(b) || b == b'-') => {
            Some("only lower-case letters, digits and hyphens are allowed")
        }
        [first, .., last] if !outer(*first) || !outer(*last) => Some("it must begin and end with a letter or digit"),
        [b'-'] => Some("it must begin and end with a letter or digit"),
        _ if text.contains("--") => Some("two hyphens in a row separate branch and project"),
        _ => None,
    }
}

fn checkpoint_fault(text: &str) -> Option<&'static str> {
    let bytes = text.as_bytes();
    match bytes {
        [] => Some("it is empty"),
        _ if bytes.len() > CHECKPOINT_MAX => Some("it is longer than 80 characters"),
        [first, ..] if !first.is_ascii_alphanumeric() => Some("it must begin with a letter or digit"),
        _ if !bytes.iter().all(|&b| b.is_ascii_alphanumeric() || b"._-".contains(&b)) => {
            Some("only letters, digits, dots, underscores and hyphens are allowed")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_parts() {
        for good in ["a", "shop", "pr-42", "0", "a-b-c", &"x".repeat(30)] {
            assert!(good.parse::<BranchName>().is_ok(), "{good:?} was refused");
        }
        for bad in ["", "-", "-a", "a-", "a--b", "Shop", "a.b", "a/b", "ä", &"x".repeat(31)] {
            assert!(bad.parse::<ProjectName>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn checkpoints() {
        for good in ["before-release.7", "2026-11-21T06", "A_b"] {
            assert!(good.parse::<CheckpointName>().is_ok(), "{good:?} was refused");
        }
        for bad in ["", ".a", "a b", "a/b", "a@b", &"x".repeat(81)] {
            assert!(bad.parse::<CheckpointName>().is_err(), "{bad:?} was taken");
        }
    }
}
