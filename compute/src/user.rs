//! The user Postgres runs as: it refuses to run as root, and should own nothing else on the machine.

use std::fs;

use ebb_types::BranchId;
use nix::unistd::{User, getegid, geteuid};

use crate::{Error, Result};

/// The first of the users and groups that belong to branches, by number only: systemd's table of user numbers gives
/// 0x7000_0000 and on to nobody, nor do distributions' ranges for containers reach there.
const OF_BRANCHES: u32 = 0x7000_0000;

/// LIMIT: so many bits of a branch's random ones choose its user. Two of a thousand awake branches share one in a node of
/// 270; they still have namespaces of their own.
const OF_BRANCHES_BITS: u32 = 27;

/// Users that Postgres may run as where Ebb itself is root, best first. `nobody` always exists; it is last because
/// other services may run as it, too.
const USERS: [&str; 3] = ["postgres", "ebb", "nobody"];

/// A user and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RunAs {
    /// User number.
    pub uid: u32,
    /// Group number.
    pub gid: u32,
}

impl RunAs {
    /// The user of a branch's Postgres: one that no other branch's has, where this process is root and may take it. In a
    /// container that has no such numbers, and for a server that is not root, the one of [`RunAs::find`].
    pub fn of_branch(branch: BranchId) -> Result<Self> {
        if geteuid().is_root() {
            let own = of_branch(branch);
            if ["uid_map", "gid_map"].iter().all(|map| is_mapped(map, own.uid)) {
                return Ok(own);
            }
            tracing::warn!("this container has too few user numbers: all branches' servers run as one user");
        }
        Self::find()
    }

    /// Whether the number is one that [`RunAs::of_branch`] gives to a branch alone.
    pub fn is_of_one_branch(self) -> bool {
        self.uid >> OF_BRANCHES_BITS == OF_BRANCHES >> OF_BRANCHES_BITS
    }

    /// This process' own user, or the first of [`USERS`] where that is root.
    pub fn find() -> Result<Self> {
        if !geteuid().is_root() {
            return Ok(Self { uid: geteuid().as_raw(), gid: getegid().as_raw() });
        }
        let mut known = USERS.iter().filter_map(|name| User::from_name(name).ok().flatten());
        let user = known.find(|user| !user.uid.is_root()).ok_or_else(|| Error::NoUser(USERS.join(", ")))?;
        Ok(Self { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
    }
}

fn of_branch(branch: BranchId) -> RunAs {
    let bytes = branch.as_bytes();
    // The end of a UUIDv7 is random.
    let random = u32::from_be_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
    let number = OF_BRANCHES | (random & ((1 << OF_BRANCHES_BITS) - 1));
    RunAs { uid: number, gid: number }
}

/// Whether this process' user namespace has a number (user_namespaces(7)): lines of first, first outside, and how many.
fn is_mapped(map: &str, number: u32) -> bool {
    let Ok(map) = fs::read_to_string(format!("/proc/self/{map}")) else { return false };
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(first)), Some(_), Some(Ok(count))) = (numbers.next(), numbers.next(), numbers.next()) else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&u64::from(number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_has_a_user_of_its_own_that_stays() {
        let (one, other) = (of_branch(BranchId::for_test(7)), of_branch(BranchId::for_test(8)));
        assert_eq!(one, RunAs { uid: 0x7000_0007, gid: 0x7000_0007 });
        assert_ne!(one.uid, other.uid);
        assert!(of_branch(BranchId::for_test(u128::MAX)).is_of_one_branch());
        assert!(!RunAs { uid: 999, gid: 999 }.is_of_one_branch());
    }
}
