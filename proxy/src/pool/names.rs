//! Prepared statements that belong to no one backend: what clients call them, what backends call them, which backend has
//! which.
//!
//! A client's names mean texts. Clients of one pool that prepare the same text share a [`Prepared`], and with it the
//! statement on each backend, `__ebb_` and a number. A backend holds the ones used last, up to a limit.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::words::Words;
use crate::hibernate;

/// What all statements of the proxy's own are called; a client's that begins so is sent under another name.
pub const RESERVED: &[u8] = hibernate::RESERVED.as_bytes();
/// The statement that lasts no longer than the answer to its `Parse`.
pub const SCRATCH: &[u8] = b"__ebb_scratch";
/// LIMIT: statements prepared on one backend by the protocol; a plan is some ten to a hundred KiB of the backend's memory.
pub const PER_BACKEND_MAX: usize = 200;
/// LIMIT: texts one client may keep prepared; no driver's cache comes near.
pub const PER_CLIENT_BYTES_MAX: usize = 4 << 20;
/// Below this many texts it is not looked for those that nobody uses any more.
const SWEEP_MIN: usize = 256;

/// A statement as clients prepared it.
#[derive(Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Its number in its pool.
    pub id: u64,
    /// What backends call it.
    pub name: Box<[u8]>,
    /// What follows the name in its `Parse`: the text and the types of parameters.
    pub body: Box<[u8]>,
    /// What its execution may leave behind.
    pub words: Words,
}

/// The statements that clients of one pool have prepared.
#[derive(Debug, Default)]
pub struct Texts {
    known: Mutex<Known>,
    next: AtomicU64,
}

/// The settings a statement was prepared under (it means other tables under another `search_path`), and its `Parse`.
type Meaning = (u64, Box<[u8]>);

#[derive(Debug, Default)]
struct Known {
    by_meaning: HashMap<Meaning, Weak<Prepared>>,
    sweep_at: usize,
}

impl Texts {
    /// The statement with this `Parse`, shared with whoever prepared the same under the same settings.
    pub fn intern(&self, dress: u64, body: &[u8], words: impl FnOnce() -> Words) -> Arc<Prepared> {
        let mut known = self.known.lock();
        let meaning = (dress, body.into());
        if let Some(prepared) = known.by_meaning.get(&meaning).and_then(Weak::upgrade) {
            return prepared;
        }
        if known.by_meaning.len() >= known.sweep_at.max(SWEEP_MIN) {
            known.by_meaning.retain(|_, prepared| prepared.strong_count() > 0);
            known.sweep_at = known.by_meaning.len() * 2;
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("__ebb_{id:x}").into_bytes().into();
        let prepared = Arc::new(Prepared { id, name, body: body.into(), words: words() });
        known.by_meaning.insert(meaning, Arc::downgrade(&prepared));
        prepared
    }
}

/// What one client has prepared.
#[derive(Debug, Default)]
pub struct Names {
    by_name: HashMap<Box<[u8]>, Arc<Prepared>>,
    bytes: usize,
}

impl Names {
    /// The statement of that name.
    pub fn find(&self, name: &[u8]) -> Option<&Arc<Prepared>> {
        self.by_name.get(name)
    }

    /// Whether another of that size would be too much.
    pub fn is_full(&self, more: usize) -> bool {
        self.bytes + more > PER_CLIENT_BYTES_MAX
    }

    /// Names a statement.
    pub fn insert(&mut self, name: Box<[u8]>, prepared: Arc<Prepared>) {
        self.bytes += name.len() + prepared.body.len();
        if let Some(old) = self.by_name.insert(name.clone(), prepared) {
            self.bytes -= name.len() + old.body.len();
        }
    }

    /// Forgets a name.
    pub fn remove(&mut self, name: &[u8]) -> Option<Arc<Prepared>> {
        let removed = self.by_name.remove(name)?;
        self.bytes -= name.len() + removed.body.len();
        Some(removed)
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// What is prepared on one backend.
#[derive(Debug, Default)]
pub struct Held {
    by_id: HashMap<u64, (Arc<Prepared>, u64)>,
    /// Counts uses.
    now: u64,
}

impl Held {
    /// Whether it is there; then it counts as used.
    pub fn touch(&mut self, id: u64) -> bool {
        self.now += 1;
        let now = self.now;
        self.by_id.get_mut(&id).map(|(_, used)| *used = now).is_some()
    }

    /// Takes one in.
    pub fn insert(&mut self, prepared: Arc<Prepared>) {
        self.now += 1;
        self.by_id.insert(prepared.id, (prepared, self.now));
    }

    /// The one to give up before another is taken in, if there are too many; it is no longer held.
    pub fn make_room(&mut self) -> Option<Arc<Prepared>> {
        if self.by_id.len() < PER_BACKEND_MAX {
            return None;
        }
        let id = *self.by_id.iter().min_by_key(|(_, (_, used))| *used)?.0;
        self.remove(id)
    }

    /// Forgets one.
    pub fn remove(&mut self, id: u64) -> Option<Arc<Prepared>> {
        self.by_id.remove(&id).map(|(prepared, _)| prepared)
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.by_id.clear();
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_shared_while_anyone_has_it() {
        let texts = Texts::default();
        let words = Words::default;
        let first = texts.intern(0, b"SELECT 1\0\0\0", words);
        assert!(Arc::ptr_eq(&first, &texts.intern(0, b"SELECT 1\0\0\0", words)));
        assert_ne!(first.id, texts.intern(7, b"SELECT 1\0\0\0", words).id, "under other settings it is another");
        drop(first);
        for i in 0..10 * SWEEP_MIN {
            drop(texts.intern(0, format!("SELECT {i}").as_bytes(), words));
        }
        assert!(texts.known.lock().by_meaning.len() <= SWEEP_MIN);
    }

    #[test]
    fn a_backend_gives_up_what_was_used_longest_ago() {
        let texts = Texts::default();
        let mut held = Held::default();
        for i in 0..PER_BACKEND_MAX as u64 {
            assert_eq!(held.make_room(), None);
            held.insert(texts.intern(i, b"", Words::default));
        }
        assert!(held.touch(0) && !held.touch(1 << 40));
        assert_eq!(held.make_room().unwrap().id, 1);
        assert_eq!(held.len(), PER_BACKEND_MAX - 1);
    }

    #[test]
    fn what_a_client_keeps_is_counted() {
        let texts = Texts::default();
        let mut names = Names::default();
        let long = texts.intern(0, &vec![b'x'; PER_CLIENT_BYTES_MAX - 1], Words::default);
        names.insert(b"a"[..].into(), long.clone());
        names.insert(b"a"[..].into(), long.clone());
        assert!(names.is_full(1) && !names.is_full(0));
        assert_eq!(names.remove(b"a"), Some(long));
        assert!(!names.is_full(PER_CLIENT_BYTES_MAX));
    }
}
