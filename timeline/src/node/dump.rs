//! Writing a point as pg_dump does: a compute on a copy of its image, which nobody else knows of and which goes after.
//!
//! **Crash**: the operation is undone, which removes the compute and what is under the dump's other name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ebb_compute::import::{self, At};
use ebb_compute::manager::Unit;

use super::{LocalNode, Node as _, Start};
use crate::error::LocalContext as _;
use crate::event::Dump;
use crate::{Refusal, Result};

impl LocalNode {
    pub(super) async fn dump_beside(&self, dump: &Dump, like: &Start, to: &Path) -> Result<()> {
        if to.symlink_metadata().is_ok() {
            return Err(Refusal::Invalid(format!("{to:?} exists already")).into());
        }
        let installation = self.installation(like.pg_major)?;
        self.discard(dump.scratch).await?;
        self.remove_branch(dump.scratch).await?;
        remove_unfinished_dump(to)?;
        self.make_openable(like.data.head).await?;
        let dir = self.branch_dir(dump.scratch);
        fs::create_dir_all(&dir).on("create", &dir)?;
        self.make_volume(&like.data, like.data.head, like.fork).await?;
        let mut spec = self.spec(like, installation.clone());
        spec.archive = None;
        spec.hydrate = false;
        spec.settings = vec![("autovacuum".to_owned(), "off".to_owned())];
        let unit = Unit::start(&self.exe, &spec).await?;
        let socket = unit.socket();
        let from = At { installation: &installation, socket_dir: socket.parent().unwrap_or(&socket) };
        let unfinished = unfinished(to);
        let dumped = import::dump(from, dump.format, &dump.database, &unfinished).await;
        // Nothing of it is wanted, whatever came of it.
        self.discard(dump.scratch).await?;
        dumped?;
        fs::rename(&unfinished, to).on("rename", &unfinished)
    }
}

/// The name of a dump that is being written.
fn unfinished(dump: &Path) -> PathBuf {
    let mut name = dump.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    dump.with_file_name(name)
}

/// Removes what an interrupted dump has left.
pub(crate) fn remove_unfinished_dump(dump: &Path) -> Result<()> {
    let path = unfinished(dump);
    let removed = match path.symlink_metadata() {
        Ok(found) if found.is_dir() => fs::remove_dir_all(&path),
        Ok(_) => fs::remove_file(&path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).on("remove", &path),
        _ => Ok(()),
    }
}
