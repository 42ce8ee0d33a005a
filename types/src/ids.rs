//! Identifiers that never change and never mean anything else: a prefix naming the kind, then a UUIDv7 in hex.
//!
//! ```text
//! br_0193e5b2c7a17d3f9d0c3a54e0b1c2d3
//! ── ────────────────────────────────
//! kind   UUIDv7: sorts by time of making
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

/// A text that is not an identifier of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {kind} id (want {prefix}_ and 32 hex digits)")]
pub struct ParseIdError {
    text: String,
    kind: &'static str,
    prefix: &'static str,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes a fresh identifier from the clock and the system's randomness.
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }

            /// Wraps a given UUID: for tests and for identifiers derived from other data.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// Makes a small, readable identifier for tests.
            pub const fn for_test(n: u128) -> Self {
                Self(Uuid::from_u128(n))
            }

            /// The 16 bytes of the identifier, as binary formats store it.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// Rebuilds an identifier from the 16 bytes a binary format stored.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.simple())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let wrong = || ParseIdError { text: text.to_owned(), kind: $kind, prefix: $prefix };
                let hex = text.strip_prefix(concat!($prefix, "_")).ok_or_else(wrong)?;
                if hex.len() != 32 {
                    return Err(wrong());
                }
                Uuid::try_parse(hex).map(Self).map_err(|_| wrong())
            }
        }

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
    };
}

id!(
    /// One app: its branches, releases, roles and ledger.
    ProjectId, "prj", "a project"
);
id!(
    /// A line of data history; stays the same whatever the branch is restored to or renamed.
    BranchId, "br", "a branch"
);
id!(
    /// An immutable set of pages and the file tree at one moment.
    LayerId, "ly", "a layer"
);
id!(
    /// One multi-step act, resumable and recorded step by step.
    OperationId, "op", "an operation"
);
id!(
    /// A code artifact, its migrations, and the checkpoint taken before them.
    ReleaseId, "rel", "a release"
);
id!(
    /// One data directory that `ebb serve` runs on, however often it is started.
    NodeId, "nd", "a node"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips_and_other_kinds_are_refused() {
        let id = BranchId::generate();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().parse::<LayerId>().is_err());
        assert!("br_".parse::<BranchId>().is_err());
        assert!("br_0193e5b2-c7a1-7d3f-9d0c-3a54e0b1c2".parse::<BranchId>().is_err());
    }

    #[test]
    fn later_identifiers_sort_after_earlier_ones() {
        let ids: Vec<_> = (0..100).map(|_| LayerId::generate()).collect();
        assert!(ids.is_sorted());
    }
}
