//! Looking at a volume that is not open, without changing it: what it lies on, and whether it could be opened.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ebb_types::LayerId;

use super::image::Image;
use super::journal::{self, Contents, Header, Record};
use super::seal::{self, State};
use super::upper::dir_of;
use super::{VolumeDirs, lock};
use crate::error::{Error, LocalContext, Result};
use crate::layer::{BLOCK_BYTES, ImageInfo, Ino, InodeKind, Manifest};
use crate::pg_files::{self, PG_CONTROL, WalSegment};

/// LIMIT: so often a seal may be met in the middle before somebody seals faster than files can be read.
const LOOKS_MAX: usize = 16;

/// What was found out about a volume.
#[derive(Debug, Default)]
pub(crate) struct Looked {
    /// The layers it lies on: the newest sealed one, and any that a seal was just making.
    pub bases: BTreeSet<LayerId>,
    /// Those of them that a seal was just making: opening the volume finishes them.
    pub pending: BTreeSet<LayerId>,
    /// What is wrong.
    pub faults: Vec<Fault>,
}

/// Something wrong with a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A process has it open.
    Open,
    /// A file cannot be used as it is.
    Corrupt { path: PathBuf, why: String },
    /// A file is not there.
    Missing { path: PathBuf, why: String },
    /// Something belongs to nothing; opening the volume deletes it.
    Stale { path: PathBuf, why: &'static str },
    /// The layer below is not on this node.
    NoBase { layer: LayerId },
}

/// The layers a volume lies on, open or not; nothing if there is none. A seal at the same time is seen before it or
/// after it: whichever layers were on this node before the call and are not answered are not the volume's.
pub(crate) fn bases(branch: &Path) -> Result<BTreeSet<LayerId>> {
    for _ in 0..LOOKS_MAX {
        match try_bases(branch) {
            Err(Error::Local { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                // Removed, or an upper has become a layer since it was listed.
                if !branch.join("volume.json").exists() {
                    return Ok(BTreeSet::new());
                }
            }
            looked => return looked,
        }
    }
    Err(Error::Invalid(format!("the volume in {branch:?} is sealed faster than it can be looked at")))
}

fn try_bases(branch: &Path) -> Result<BTreeSet<LayerId>> {
    let mut bases = BTreeSet::from([State::read(branch)?.base]);
    let uppers = branch.join("uppers");
    for entry in fs::read_dir(&uppers).on("list", &uppers)? {
        // The next upper names the new layer before that layer has its name.
        let upper = entry.on("list", &uppers)?.path();
        let journal = upper.join("journal");
        if journal::is_begun(&journal)? {
            bases.insert(journal::read_header(&journal)?.base);
        } else {
            // What a kill left of one being made names nothing. One that is not there has become a layer since it was
            // listed, and what it named must be found at another look.
            fs::metadata(&upper).on("read", &upper)?;
        }
    }
    Ok(bases)
}

/// Checks a volume that ought not to be open.
pub(crate) fn look(dirs: &VolumeDirs) -> Result<Looked> {
    let mut looked = Looked::default();
    let path = dirs.branch.join("volume.json");
    let state = match State::read(&dirs.branch) {
        Ok(state) => state,
        Err(Error::Corrupt { why, .. }) => {
            looked.faults.push(Fault::Corrupt { path, why });
            return Ok(looked);
        }
        Err(error) => return Err(error),
    };
    looked.bases.insert(state.base);
    let uppers = dirs.branch.join("uppers");
    if !uppers.exists() {
        looked.faults.push(Fault::Missing { path: uppers, why: "the volume has no uppers".to_owned() });
        return Ok(looked);
    }
    let Ok(_lock) = lock(&uppers) else {
        looked.faults.push(Fault::Open);
        return Ok(looked);
    };
    let (live, contents) = match follow(dirs, state, &mut looked) {
        Ok(found) => found,
        Err(fault) => {
            looked.faults.push(fault);
            return Ok(looked);
        }
    };
    leftovers(dirs, live.upper, state.upper, &mut looked.faults)?;
    if looked.pending.contains(&live.base) {
        // A seal will be finished when the volume is opened; only then there is an image to check.
        return Ok(looked);
    }
    let manifest = match seal::read_manifest(&dirs.layers, live.base) {
        Ok(manifest) => manifest,
        Err(Error::NoSuchLayer(layer)) => {
            looked.faults.push(Fault::NoBase { layer });
            return Ok(looked);
        }
        // The layer's own check tells.
        Err(Error::Corrupt { .. }) => return Ok(looked),
        Err(error) => return Err(error),
    };
    image(dirs, live.upper, &manifest, &contents, &mut looked.faults)?;
    Ok(looked)
}

/// Follows seals that were begun to the upper that is not sealed, as opening does.
fn follow(dirs: &VolumeDirs, recorded: State, looked: &mut Looked) -> Result<(State, Contents), Fault> {
    let mut state = recorded;
    loop {
        let path = |number| dir_of(&dirs.branch, number).join("journal");
        let fault = |path: PathBuf, error: Error| match error {
            Error::Corrupt { why, .. } => Fault::Corrupt { path, why },
            Error::Local { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Fault::Missing { path, why: "the upper has no journal".to_owned() }
            }
            other => Fault::Corrupt { path, why: other.to_string() },
        };
        if !path(state.upper).exists() {
            let next = path(state.upper + 1);
            let header = journal::read_header(&next).map_err(|error| fault(path(state.upper), error))?;
            state = State::new(header.base, header.upper);
            looked.bases.insert(state.base);
        }
        let contents = journal::read(&path(state.upper)).map_err(|error| fault(path(state.upper), error))?;
        if (Header { upper: state.upper, base: state.base }) != contents.header {
            let why = format!("it is of upper {} on layer {}", contents.header.upper, contents.header.base);
            return Err(Fault::Corrupt { path: path(state.upper), why });
        }
        let Some(&Record::Seal { layer }) = contents.records.last() else {
            return Ok((state, contents));
        };
        looked.bases.insert(layer);
        if !seal::is_layer(&dirs.layers, layer) {
            looked.pending.insert(layer);
        }
        state = State::new(layer, state.upper + 1);
        let next = Header { upper: state.upper, base: layer };
        if !journal::is_begun(&path(next.upper)).map_err(|error| fault(path(next.upper), error))? {
            // Opening makes it again: nothing was promised in it.
            return Ok((state, Contents { header: next, records: Vec::new(), end: 0 }));
        }
    }
}

/// What opening would delete.
fn leftovers(dirs: &VolumeDirs, live: u64, recorded: u64, faults: &mut Vec<Fault>) -> Result<()> {
    let uppers = dirs.branch.join("uppers");
    let belongs = |name: &str| name.parse::<u64>().is_ok_and(|number| (recorded..=live).contains(&number));
    for entry in fs::read_dir(&uppers).on("list", &uppers)? {
        let entry = entry.on("list", &uppers)?;
        if !entry.file_name().to_str().is_some_and(belongs) {
            faults.push(Fault::Stale { path: entry.path(), why: "it is left of a seal that did not happen" });
        }
    }
    let hold = dir_of(&dirs.branch, live).join("hold");
    if hold.exists() {
        faults.push(Fault::Stale { path: hold, why: "it is left of a seal that did not happen" });
    }
    for name in ["volume.new", "roles.new", "holes.new"] {
        let path = dirs.branch.join(name);
        if path.exists() {
            faults.push(Fault::Stale { path, why: "it was never finished" });
        }
    }
    Ok(())
}

/// The tree that the journal comes to, the data files beside it, and the WAL that goes with it.
fn image(
    dirs: &VolumeDirs,
    upper: u64,
    manifest: &Manifest,
    contents: &Contents,
    faults: &mut Vec<Fault>,
) -> Result<()> {
    let dir = dir_of(&dirs.branch, upper);
    let mut image = Image::of(manifest);
    if let Err(error) = image.replay(&dir.join("journal"), &contents.records) {
        faults.push(Fault::Corrupt { path: dir.join("journal"), why: error.to_string() });
        return Ok(());
    }
    let data = dir.join("data");
    if !data.exists() {
        faults.push(Fault::Missing { path: data, why: "the upper has no data".to_owned() });
        return Ok(());
    }
    for entry in fs::read_dir(&data).on("list", &data)? {
        let entry = entry.on("list", &data)?;
        let ino = entry.file_name().to_str().and_then(|name| name.parse::<Ino>().ok());
        if !ino.is_some_and(|ino| image.files.contains_key(&ino)) {
            faults.push(Fault::Stale { path: entry.path(), why: "it is data of a file that is gone" });
        }
    }
    match control(manifest, &image, &data) {
        Ok(info) => wal(&dirs.wal(), &info, faults),
        Err(fault) => faults.push(fault),
    }
    Ok(())
}

/// What the control file says that a start would read: the upper's, or else the one in the layer below.
fn control(manifest: &Manifest, image: &Image, data: &Path) -> Result<ImageInfo, Fault> {
    let Some(ino) = image.tree.find(PG_CONTROL) else { return Ok(manifest.image) };
    let path = data.join(ino.to_string());
    let in_base = manifest.inodes.iter().any(|inode| inode.ino == ino && matches!(inode.kind, InodeKind::File { .. }));
    let mut bytes = vec![0; BLOCK_BYTES as usize];
    let whole = File::open(&path).and_then(|file| {
        let size = file.metadata()?.len();
        let filled = super::image::next_data(&file, 0, size)?.is_some_and(|(start, _)| start == 0);
        let wanted = usize::try_from(size).unwrap_or(bytes.len()).min(bytes.len());
        bytes.truncate(wanted);
        file.read_exact_at(&mut bytes, 0)?;
        Ok(filled)
    });
    match whole {
        Ok(true) => pg_files::image_info(manifest.image.pg_major.to_string().as_bytes(), &bytes)
            .map_err(|error| Fault::Corrupt { path, why: error.to_string() }),
        // Its only page is found below, where the manifest was made from it.
        Ok(false) if in_base => Ok(manifest.image),
        Err(error) if error.kind() == io::ErrorKind::NotFound && in_base => Ok(manifest.image),
        Ok(false) => Err(Fault::Corrupt { path, why: "pg_control is empty".to_owned() }),
        Err(error) => Err(Fault::Corrupt { path, why: error.to_string() }),
    }
}

/// The segment in which recovery begins must be there.
fn wal(wal: &Path, info: &ImageInfo, faults: &mut Vec<Fault>) {
    if info.redo.0 == 0 {
        // An image that Postgres never started has no redo position.
        return;
    }
    let segment = WalSegment::holding(info.redo, info.pg_timeline, info.wal_segment_bytes);
    let path = wal.join(segment.file_name());
    match fs::metadata(&path) {
        Ok(found) if found.len() == u64::from(info.wal_segment_bytes) => {}
        Ok(found) => {
            let why = format!("it has {} bytes; a segment has {}", found.len(), info.wal_segment_bytes);
            faults.push(Fault::Corrupt { path, why });
        }
        Err(_) => {
            faults.push(Fault::Missing { path, why: format!("recovery begins in it, at {}", info.redo) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::upper::Upper;

    #[test]
    fn an_upper_that_was_never_finished_names_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let branch = dir.path();
        assert_eq!(bases(branch).unwrap(), BTreeSet::new());
        let (base, next) = (LayerId::for_test(1), LayerId::for_test(2));
        State::new(base, 3).write(branch).unwrap();
        Upper::create(branch, Header { upper: 3, base }, 0).unwrap();
        assert_eq!(bases(branch).unwrap(), BTreeSet::from([base]));
        // A seal in the middle.
        Upper::create(branch, Header { upper: 4, base: next }, 0).unwrap();
        assert_eq!(bases(branch).unwrap(), BTreeSet::from([base, next]));
        // What kills leave of making one.
        fs::create_dir(dir_of(branch, 5)).unwrap();
        fs::create_dir(dir_of(branch, 6)).unwrap();
        fs::write(dir_of(branch, 6).join("journal"), [0; 20]).unwrap();
        assert_eq!(bases(branch).unwrap(), BTreeSet::from([base, next]));
        // A journal that was damaged may have named something.
        fs::write(dir_of(branch, 4).join("journal"), [7; 48]).unwrap();
        assert!(bases(branch).is_err());
    }
}
