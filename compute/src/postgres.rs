//! Finding stock Postgres, making the template cluster, and the configuration a branch's Postgres runs with.

use std::path::{Path, PathBuf};

use crate::Result;

/// The bootstrap superuser of every cluster; never reachable through the proxy.
pub const SUPERUSER: &str = "postgres";
/// The role a project's owner logs in as.
pub const OWNER: &str = "app";
/// The database a project starts with.
pub const DATABASE: &str = "app";

/// One installed Postgres server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    /// 14 to 18.
    pub major: u32,
    /// The whole version, as `15.18`.
    pub version: String,
    /// Directory of `postgres`, `initdb` ….
    pub bin: PathBuf,
}

/// The server installations on this machine, newest major last; `EBB_PG_BIN` names one more directory, or several with `:`.
pub fn installations() -> Vec<Installation> {
    todo!("helper D")
}

/// Makes the template cluster in `dest` (which must not exist) and shuts it down cleanly: checksums on, locale C.UTF-8,
/// role [`OWNER`], database [`DATABASE`] owned by it.
pub async fn make_template(_installation: &Installation, _dest: &Path) -> Result<()> {
    todo!("helper D")
}
