//! Ledgers as people ask about them: searched, read without a server, and checked without one.
//!
//! Offline, a bucket is only opened for reading, and nothing is taken on trust: the chain is checked from its first entry
//! on, and then that every entry can follow the state that those before it make.

use ebb_storage::fsck::open_read_only;
use ebb_storage::object_store::Bucket;
use ebb_types::{ProjectId, Timestamp};

use crate::api::types as api;
use crate::catalog::{CATALOG, Catalog, CatalogEvent, ledger_name};
use crate::event::Event;
use crate::ledger::{Chained, Fold, Verdict, read_chain};
use crate::service::Reader;
use crate::state::ProjectState;
use crate::{Refusal, Result};

/// LIMIT: entries of one answer; the rest is asked for by where it goes on.
pub const PAGE_MAX: usize = 10_000;

/// LIMIT: entries of one answer where nobody says.
pub const PAGE: usize = 1_000;

/// What is looked for in a ledger. What is absent matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Search {
    /// A part of who asked.
    pub actor: Option<String>,
    /// A branch, checkpoint, release or project, as receipts name it: `dev`, `dev@before-import`, `v2`.
    pub on: Option<String>,
    /// The act: `create branch`, `release` …; or an operation's identifier.
    pub operation: Option<String>,
    /// Written at this time or later.
    pub since: Option<Timestamp>,
    /// Written before this time.
    pub until: Option<Timestamp>,
}

impl Search {
    /// Whether a receipt is what is looked for.
    pub fn matches(&self, entry: &api::Entry) -> bool {
        let is = |wanted: &Option<String>, fits: &dyn Fn(&str) -> bool| wanted.as_deref().is_none_or(fits);
        is(&self.actor, &|actor| entry.actor.contains(actor))
            && is(&self.on, &|on| names(&entry.on, on))
            && is(&self.operation, &|operation| {
                entry.act == operation || entry.operation.is_some_and(|id| id.to_string() == operation)
            })
            && self.since.is_none_or(|since| entry.time >= since)
            && self.until.is_none_or(|until| entry.time < until)
    }
}

/// Whether what an act was on names a thing: `dev@one` names `dev`, `one` and `dev@one`.
fn names(on: &str, wanted: &str) -> bool {
    let wanted = wanted.rsplit_once('/').map_or(wanted, |(_, branch)| branch);
    on.split_whitespace().any(|word| {
        let parts = word.split_once('@').is_some_and(|(branch, point)| branch == wanted || point == wanted);
        word == wanted || parts
    })
}

/// A part of what matches: after an entry, at most so many, and where it goes on.
pub fn page(entries: Vec<api::Entry>, search: &Search, after: Option<u64>, limit: usize) -> api::LedgerEntries {
    let later = entries.into_iter().filter(|entry| after.is_none_or(|after| entry.seq > after));
    let mut found: Vec<_> = later.filter(|entry| search.matches(entry)).take(limit + 1).collect();
    let more = found.len() > limit;
    found.truncate(limit);
    let next = if more { found.last().map(|entry| entry.seq) } else { None };
    api::LedgerEntries { entries: found, next }
}

/// The good entries of a chain as receipts.
pub fn receipts(entries: &[Chained<Event>]) -> Vec<api::Entry> {
    let mut reader = Reader::default();
    entries.iter().map(|entry| reader.receipt(entry)).collect()
}

/// A project's ledger in a bucket that no server has to serve.
#[derive(Debug)]
pub struct Offline {
    bucket: Bucket,
    name: String,
}

impl Offline {
    /// Finds a project's ledger: by its name, or, also if it was deleted or the catalog is damaged, by its identifier.
    ///
    /// # Errors
    /// If the bucket cannot be read, or has no such project.
    pub async fn find(bucket: &str, project: &str) -> Result<Self> {
        let bucket = open_read_only(bucket).await?;
        if let Ok(id) = project.parse::<ProjectId>() {
            return Ok(Self { bucket, name: ledger_name(id) });
        }
        let chain = read_chain::<CatalogEvent>(&bucket, CATALOG).await?;
        let mut catalog = Catalog::default();
        let folded = chain.entries.iter().try_for_each(|chained| catalog.apply(&chained.entry));
        let fault = chain.fault.or(folded.err().map(|why| (0, why)));
        match (catalog.find(project), fault) {
            (Ok(id), _) => Ok(Self { bucket, name: ledger_name(id) }),
            (Err(_), Some((seq, why))) => Err(crate::Error::Ledger { ledger: CATALOG.to_owned(), seq, why }),
            (Err(refusal), None) => Err(refusal.into()),
        }
    }

    async fn read(&self) -> Result<Verdict<Event>> {
        let verdict = read_chain::<Event>(&self.bucket, &self.name).await?;
        if verdict.entries.is_empty() && verdict.fault.is_none() {
            let name = self.name.clone();
            return Err(Refusal::NoProject { name, near: Vec::new() }.into());
        }
        Ok(verdict)
    }

    /// Checks the chain, that each entry can follow, and, if that is given, that one of them has a hash that was noted
    /// elsewhere: cutting off the newest entries leaves a chain that is shorter, and whole.
    ///
    /// # Errors
    /// If the bucket cannot be read; a broken chain is an answer.
    pub async fn verify(&self, noted: Option<&str>) -> Result<api::LedgerVerdict> {
        let verdict = self.read().await?;
        let mut state = ProjectState::default();
        let unfit = verdict.entries.iter().find_map(|chained| {
            let why = state.apply(&chained.entry).err()?;
            Some((chained.entry.seq, format!("the entry cannot follow: {why}")))
        });
        let has = |noted: &str| verdict.entries.iter().any(|entry| entry.hash.to_hex().as_str() == noted);
        let missing = noted.filter(|noted| !has(noted));
        let first = unfit.into_iter().chain(verdict.fault).min_by_key(|(seq, _)| *seq);
        let fault = first.map(|(seq, why)| format!("entry {seq}: {why}"));
        let fault = fault.or_else(|| {
            Some(format!("no entry has the hash {}: the end was cut off, or this is another ledger", missing?))
        });
        Ok(api::LedgerVerdict {
            ok: fault.is_none(),
            entries: verdict.entries.len() as u64,
            head_hash: verdict.head.to_hex().to_string(),
            fault,
        })
    }

    /// The receipts that are looked for, as far as the chain is whole.
    ///
    /// # Errors
    /// If the bucket cannot be read.
    pub async fn receipts(&self, search: &Search) -> Result<(Vec<api::Entry>, Option<(u64, String)>)> {
        let verdict = self.read().await?;
        let found = receipts(&verdict.entries).into_iter().filter(|entry| search.matches(entry)).collect();
        Ok((found, verdict.fault))
    }
}

#[cfg(test)]
mod tests;
