//! The user Postgres runs as: it refuses to run as root, and should own nothing else on the machine.

use nix::unistd::{User, getegid, geteuid};

use crate::{Error, Result};

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
