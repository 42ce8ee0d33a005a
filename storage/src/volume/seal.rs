//! Turning an upper into a layer, while Postgres goes on writing into the next one.
//!
//! ```text
//! 1  hold the WAL there is, and roles.json                       nothing has happened yet
//! 2  make uppers/<n+1>; its journal names the new layer
//! 3  append WalEnd and Seal to the journal of uppers/<n>, switch writers wait for this: a few small reads and writes
//! 4  hold the WAL again; sync the journal of uppers/<n>          whoever asked for the seal is answered
//! 5  sync uppers/<n+1>, then uppers/<n>; write wal/ and manifest into it, synced
//! 6  rename uppers/<n> to layers/<layer id>                      the layer exists, whole
//! 7  volume.json names the layer and uppers/<n+1>
//! ```
//!
//! Steps 5 to 7 are done in the background, for one seal after the other; there may be more of them waiting.
//!
//! **Crash**: before 3 is on disk, the seal did not happen: `uppers/<n>` is the upper, `uppers/<n+1>` is deleted. After
//! it, `uppers/<n+1>` is made again if it is not there, and [`finish`] does 5 to 7 (again) when the volume is opened. Each of them can be done any number of times. What the
//! layer holds was settled by 3: the WAL is cut where it ended then, whenever it is copied.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use ebb_types::LayerId;
use serde::{Deserialize, Serialize};

use super::VolumeDirs;
use super::image::Image;
use super::journal::{Contents, Record};
use super::slots::{Slots, open_dir};
use super::upper::{dir_of, remove_dir, sync_dir};
use super::wal;
use crate::error::{Error, LocalContext, Result};
use crate::layer::{ImageInfo, Manifest};

/// The format of `volume.json`, of `uppers/` and of the journals in it.
const FORMAT: u32 = 1;

/// The roles of a branch's Postgres, beside its volume and in its layers.
pub(super) const ROLES: &str = "roles.json";

/// `volume.json`: what a volume is made of. At most a few seals behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    format: u32,
    /// The newest sealed layer.
    pub base: LayerId,
    /// The number of the upper on it.
    pub upper: u64,
}

impl State {
    pub(super) fn new(base: LayerId, upper: u64) -> Self {
        Self { format: FORMAT, base, upper }
    }

    pub(super) fn read(branch: &Path) -> Result<Self> {
        let path = branch.join("volume.json");
        let bytes = fs::read(&path).on("read", &path)?;
        let corrupt = |why: String| Error::Corrupt { what: format!("{path:?}"), why };
        let state: Self = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        if state.format != FORMAT {
            return Err(corrupt(format!("it has format {}; only {FORMAT} is known", state.format)));
        }
        Ok(state)
    }

    /// Replaces the file, whole or not at all.
    pub(super) fn write(&self, branch: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self).expect("three plain fields become JSON");
        text.push(b'\n');
        write_whole(&branch.join("volume.json"), &text)
    }
}

/// Writes a file under another name, syncs it and gives it its own.
pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let unfinished = path.with_extension("new");
    let mut file = File::create(&unfinished).on("create", &unfinished)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).on("write", &unfinished)?;
    fs::rename(&unfinished, path).on("rename", &unfinished)?;
    path.parent().map_or(Ok(()), sync_dir)
}

/// Reads the manifest of a layer on this node.
pub(super) fn read_manifest(layers: &Path, layer: LayerId) -> Result<Manifest> {
    let path = layers.join(layer.to_string()).join("manifest");
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Error::NoSuchLayer(layer)),
        bytes => bytes.on("read", &path)?,
    };
    let manifest = Manifest::decode(&format!("manifest {path:?}"), &bytes)?;
    if manifest.id != layer {
        let why = format!("it is that of layer {}", manifest.id);
        return Err(Error::Corrupt { what: format!("manifest {path:?}"), why });
    }
    Ok(manifest)
}

/// Whether a layer is whole on this node.
pub(super) fn is_layer(layers: &Path, layer: LayerId) -> bool {
    layers.join(layer.to_string()).join("manifest").exists()
}

/// Holds the WAL that the image needs which is being sealed, or was just sealed. The redo point only ever moves
/// forward, so the one of the layer below is early enough.
pub(super) fn hold_wal(dirs: &VolumeDirs, upper: u64, base: &ImageInfo) -> Result<()> {
    let wal = dirs.wal();
    if !wal.exists() {
        return Ok(());
    }
    wal::hold(&wal, &dir_of(&dirs.branch, upper).join("hold"), base)
}

/// Holds the roles that go with the image which is being sealed.
pub(super) fn hold_roles(dirs: &VolumeDirs, upper: u64) -> Result<()> {
    let (roles, hold) = (dirs.branch.join(ROLES), dir_of(&dirs.branch, upper).join("hold"));
    fs::create_dir_all(&hold).on("create", &hold)?;
    // It is only ever replaced, never written to.
    match fs::hard_link(&roles, hold.join(ROLES)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        linked => linked.on("link", &roles),
    }
}

/// Makes an upper whose journal ends with its seal, and which is synced, into a layer. See the steps above.
pub(super) fn finish(dirs: &VolumeDirs, upper: u64, base: LayerId, layer: LayerId) -> Result<()> {
    let dir = dir_of(&dirs.branch, upper);
    if dir.exists() || !is_layer(&dirs.layers, layer) {
        complete(dirs, &dir, base, layer)?;
        let target = dirs.layers.join(layer.to_string());
        fs::rename(&dir, &target).on("rename", &dir)?;
    }
    sync_dir(&dirs.layers)?;
    sync_dir(&dirs.branch.join("uppers"))?;
    State::new(layer, upper + 1).write(&dirs.branch)
}

/// Adds to an upper what a layer has besides.
fn complete(dirs: &VolumeDirs, dir: &Path, base: LayerId, layer: LayerId) -> Result<()> {
    if dir.join("manifest").exists() && !dir.join("hold").exists() {
        return Ok(());
    }
    let contents = super::journal::read(&dir.join("journal"))?;
    let (image, slots) = load(dirs, dir, base, &contents)?;
    let info = image.info(&slots)?;
    let (wal_dir, hold, of_branch) = (dir.join("wal"), dir.join("hold"), dirs.branch.join(ROLES));
    if image.has_control() {
        // What a crash kept from being held.
        hold_wal(dirs, contents.header.upper, &info)?;
        let end = match contents.records.as_slice() {
            [.., Record::WalEnd(end), Record::Seal { .. }] => Some(end),
            _ => None,
        };
        wal::capture(&hold, &wal_dir, &info, end)?;
    } else {
        fs::create_dir_all(&wal_dir).on("create", &wal_dir)?;
    }
    let held = hold.join(ROLES);
    copy_if_there(if held.exists() { &held } else { &of_branch }, &dir.join(ROLES))?;
    write_whole(&dir.join("manifest"), &image.manifest(layer, info).encode())?;
    // Not before all is made of it: a crash in between must find it again.
    remove_dir(&hold)
}

/// The image that an upper and the layer below it come to. Slots end with the upper's.
pub(super) fn load(dirs: &VolumeDirs, dir: &Path, base: LayerId, contents: &Contents) -> Result<(Image, Slots)> {
    let manifest = read_manifest(&dirs.layers, base)?;
    let data = dir.join("data");
    let data_dir = open_dir(&data).on("open", &data)?;
    let mut image = Image::of(&manifest);
    let slots = Slots::of_layers(dirs, &manifest.chain);
    slots.push(&data, data_dir.try_clone().on("open", &data)?);
    image.replay(&dir.join("journal"), &contents.records)?;
    image.scan(&data, &data_dir, &slots)?;
    Ok((image, slots))
}

/// Copies a file, synced, if there is one.
pub(super) fn copy_if_there(from: &Path, to: &Path) -> Result<()> {
    match fs::read(from) {
        Ok(bytes) => write_whole(to, &bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).on("read", from),
    }
}
