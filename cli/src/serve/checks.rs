//! What this machine must offer, looked at before anything is begun.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;

use ebb_types::ErrorKind;

use super::config::Settings;
use crate::failure::Failure;

/// Looks at everything a start needs and lists all that is missing.
pub fn run(settings: &Settings) -> Result<(), Failure> {
    let (faults, advice): (Vec<_>, Vec<_>) =
        [data_dir(&settings.data), fuse(), postgres()].into_iter().flatten().unzip();
    if faults.is_empty() {
        return Ok(());
    }
    let failure = Failure::new(ErrorKind::Internal, "this machine is not ready for `ebb serve`");
    Err(Failure { causes: faults, hint: Some(advice.join(" ")), ..failure })
}

/// What is wrong, and what to do about it.
type Fault = (String, String);

/// The data directory can be made, written and entered.
fn data_dir(data: &Path) -> Option<Fault> {
    let probe = data.join(format!("probe.{}", std::process::id()));
    let tried =
        fs::create_dir_all(data).and_then(|()| fs::write(&probe, b"ebb")).and_then(|()| fs::remove_file(&probe));
    let error = tried.err()?;
    let _ = fs::remove_file(&probe);
    let advice = match error.kind() {
        io::ErrorKind::StorageFull => "Free disk space, or name another directory with --data.",
        _ => "Name a directory this user may write with --data.",
    };
    Some((format!("the data directory {data:?} cannot be written: {error}"), advice.to_owned()))
}

fn fuse() -> Option<Fault> {
    let error = OpenOptions::new().read(true).write(true).open("/dev/fuse").err()?;
    let advice = match error.kind() {
        io::ErrorKind::NotFound => {
            "Install FUSE (Debian: apt-get install fuse3; then modprobe fuse), or give the container the device \
             (docker run --device /dev/fuse --cap-add SYS_ADMIN)."
        }
        _ => "Run `ebb serve` as root (sudo), which may mount volumes.",
    };
    Some((format!("/dev/fuse cannot be opened: {error}"), advice.to_owned()))
}

fn postgres() -> Option<Fault> {
    if !ebb_compute::postgres::installations().is_empty() {
        return None;
    }
    Some((
        "no Postgres server (14 to 18) was found in /usr/lib/postgresql/*/bin, $EBB_PG_BIN and the other usual places"
            .to_owned(),
        "Install one (Debian: apt-get install postgresql-15), or name the directory of its programs in $EBB_PG_BIN."
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_that_is_a_file_is_a_fault() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(data_dir(&dir.path().join("new")), None);
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let (fault, advice) = data_dir(&file).unwrap();
        assert!(fault.contains("cannot be written"), "{fault}");
        assert!(advice.contains("--data"), "{advice}");
    }
}
