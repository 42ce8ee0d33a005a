//! Which files two images have in common, told by their page maps alone: no page is read.

use std::collections::{BTreeMap, HashMap, HashSet};

use ebb_types::LayerId;

use super::{Ino, InodeKind, Manifest, ROOT_INO, pages_of};

/// A file of one of two images, or of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilePages {
    /// Its pages, in the image that has more of them.
    pub pages: u64,
    /// Both images have it, every page of it comes from the same layer in both, and from one of those asked for.
    pub same: bool,
}

/// Compares the files below a directory by their paths, where every page that is the same must come from `among`.
///
/// Pages that were copied without being changed count as changed.
pub fn same_files(
    from: &Manifest,
    to: &Manifest,
    directory: &str,
    among: &HashSet<LayerId>,
) -> BTreeMap<String, FilePages> {
    let (mut ours, theirs) = (files(from, directory), files(to, directory));
    let mut compared = BTreeMap::new();
    for (path, (size, runs)) in theirs {
        let pages = pages_of(size);
        let file = match ours.remove(&path) {
            None => FilePages { pages, same: false },
            Some((our_size, our_runs)) => {
                let among = runs.iter().all(|(_, _, layer)| among.contains(layer));
                FilePages { pages: pages.max(pages_of(our_size)), same: our_size == size && our_runs == runs && among }
            }
        };
        compared.insert(path, file);
    }
    compared.extend(ours.into_iter().map(|(path, (size, _))| (path, FilePages { pages: pages_of(size), same: false })));
    compared
}

type Runs = Vec<(u32, u32, LayerId)>;

/// Size and page map of every file below a directory, neighbouring runs of one layer joined.
fn files(manifest: &Manifest, directory: &str) -> HashMap<String, (u64, Runs)> {
    let inodes: HashMap<Ino, _> = manifest.inodes.iter().map(|inode| (inode.ino, inode)).collect();
    let mut found = HashMap::new();
    for inode in &manifest.inodes {
        let InodeKind::File { size, runs } = &inode.kind else { continue };
        let mut path = String::from_utf8_lossy(&inode.name).into_owned();
        let mut parent = inode.parent;
        while parent != ROOT_INO
            && let Some(above) = inodes.get(&parent)
        {
            path = format!("{}/{path}", String::from_utf8_lossy(&above.name));
            parent = above.parent;
        }
        if !path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/')) {
            continue;
        }
        let mut joined: Runs = Vec::with_capacity(runs.len());
        for run in runs {
            let layer = manifest.chain[run.slot as usize];
            match joined.last_mut() {
                Some((start, len, last)) if *last == layer && *start + *len == run.start => *len += run.len,
                _ => joined.push((run.start, run.len, layer)),
            }
        }
        found.insert(path, (*size, joined));
    }
    found
}

#[cfg(test)]
mod tests {
    use ebb_types::Lsn;

    use super::*;
    use crate::layer::{BLOCK_BYTES, ImageInfo, Inode, Run};

    const OLD: LayerId = LayerId::for_test(1);
    const YOUNG: LayerId = LayerId::for_test(2);

    /// Pages, and runs of (start, length, slot).
    type Pages<'a> = (u64, &'a [(u32, u32, u32)]);

    /// An image with files `base/5/<name>`.
    fn image(chain: &[LayerId], named: &[(&str, Pages<'_>)]) -> Manifest {
        let inode = |ino, parent, name: &str, kind| Inode {
            ino,
            parent,
            name: name.as_bytes().to_vec(),
            mode: 0o600,
            mtime_ns: 0,
            kind,
        };
        let mut inodes = vec![
            inode(ROOT_INO, ROOT_INO, "", InodeKind::Directory),
            inode(2, ROOT_INO, "base", InodeKind::Directory),
            inode(3, 2, "5", InodeKind::Directory),
            inode(4, ROOT_INO, "elsewhere", InodeKind::File { size: 0, runs: Vec::new() }),
        ];
        for (ino, (name, (pages, runs))) in (5..).zip(named) {
            let runs = runs.iter().map(|&(start, len, slot)| Run { start, len, slot }).collect();
            inodes.push(inode(ino, 3, name, InodeKind::File { size: pages * BLOCK_BYTES, runs }));
        }
        let image = ImageInfo {
            pg_major: 15,
            system_identifier: 1,
            redo: Lsn(1),
            pg_timeline: 1,
            wal_segment_bytes: 16 << 20,
            clean: true,
        };
        Manifest { id: *chain.last().unwrap(), chain: chain.to_vec(), next_ino: 100, inodes, image }
    }

    fn check(from: Pages<'_>, to: Pages<'_>, expect: (u64, bool)) {
        let (from, to) = (image(&[OLD, YOUNG], &[("7", from)]), image(&[OLD, YOUNG], &[("7", to)]));
        let found = same_files(&from, &to, "base", &HashSet::from([OLD]));
        let (pages, same) = expect;
        assert_eq!(found, BTreeMap::from([("base/5/7".to_owned(), FilePages { pages, same })]));
    }

    #[test]
    fn a_file_is_the_same_if_every_page_comes_from_the_same_settled_layer() {
        check((4, &[(0, 4, 0)]), (4, &[(0, 4, 0)]), (4, true));
        check((4, &[(0, 2, 0), (2, 2, 0)]), (4, &[(0, 4, 0)]), (4, true));
        check((4, &[]), (4, &[]), (4, true));
        check((4, &[(0, 4, 0)]), (4, &[(0, 3, 0), (3, 1, 1)]), (4, false));
        check((4, &[(0, 4, 1)]), (4, &[(0, 4, 1)]), (4, false));
        check((4, &[(0, 4, 0)]), (5, &[(0, 4, 0)]), (5, false));
        check((4, &[(0, 4, 0)]), (4, &[(0, 3, 0)]), (4, false));
    }

    #[test]
    fn a_file_that_one_image_lacks_is_not_the_same() {
        let (from, to) = (image(&[OLD], &[("7", (1, &[]))]), image(&[OLD], &[("8", (2, &[]))]));
        let found = same_files(&from, &to, "base", &HashSet::from([OLD]));
        let lacking = |pages| FilePages { pages, same: false };
        assert_eq!(found, BTreeMap::from([("base/5/7".to_owned(), lacking(1)), ("base/5/8".to_owned(), lacking(2))]));
    }
}
