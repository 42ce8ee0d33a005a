//! `ebb ledger …`: through the API, or out of a bucket that nobody serves.

use std::io::Write as _;

use ebb_timeline::api::types::{Entry, LedgerEntries, LedgerVerdict};
use ebb_timeline::audit::{Offline, PAGE_MAX, Search};
use ebb_types::{ErrorKind, Hint as _};
use serde_json::{Value, json};

use super::Session;
use super::project::seconds;
use super::url::encoded;
use crate::args::{LedgerCommand, LedgerSearch};
use crate::failure::Failure;
use crate::output::{facts, table};

pub fn run(to: &Session, command: LedgerCommand) -> Result<(), Failure> {
    match command {
        LedgerCommand::List { project, search } => {
            let mut entries = Vec::new();
            ask(to, project.as_str(), &search, |page| {
                entries.extend(page);
                Ok(())
            })?;
            to.show(&json!({"entries": entries}), |view: LedgerEntries| entry_table(view.entries))
        }
        LedgerCommand::Export { project, bucket: None, search } => ask(to, &project, &search, |page| write(&page)),
        LedgerCommand::Export { project, bucket: Some(bucket), search } => export_offline(&bucket, &project, &search),
        LedgerCommand::Verify { project, bucket: None, .. } => {
            let answer = to.client.get(&format!("projects/{}/ledger/verify", encoded(&project)))?;
            verdict(to, &project, &answer)
        }
        LedgerCommand::Verify { project, bucket: Some(bucket), noted } => {
            let found = offline(async {
                let ledger = Offline::find(&bucket, &project).await?;
                ledger.verify(noted.as_deref()).await
            })?;
            let answer = serde_json::to_value(found).expect("a verdict is plain data");
            verdict(to, &project, &answer)
        }
    }
}

/// Asks page by page.
fn ask(
    to: &Session,
    project: &str,
    search: &LedgerSearch,
    mut take: impl FnMut(Vec<Value>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let (mut after, mut left) = (None::<u64>, search.limit.unwrap_or(usize::MAX));
    while left > 0 {
        let path = format!("projects/{}/ledger?{}", encoded(project), query(search, after, left.min(PAGE_MAX)));
        let mut answer = to.client.get(&path)?;
        let next = answer["next"].as_u64();
        let Value::Array(page) = answer["entries"].take() else {
            return Err(Failure::new(ErrorKind::Internal, "the API's answer is not what this `ebb` expects"));
        };
        left -= page.len().min(left);
        take(page)?;
        match next {
            Some(next) => after = Some(next),
            None => break,
        }
    }
    Ok(())
}

fn query(search: &LedgerSearch, after: Option<u64>, limit: usize) -> String {
    let words = [
        ("actor", search.actor.clone()),
        ("on", search.on.clone()),
        ("operation", search.operation.clone()),
        ("since", search.since.map(|time| time.to_string())),
        ("until", search.until.map(|time| time.to_string())),
        ("after", after.map(|after| after.to_string())),
        ("limit", Some(limit.to_string())),
    ];
    let words = words.into_iter().filter_map(|(name, value)| Some(format!("{name}={}", encoded(&value?))));
    words.collect::<Vec<_>>().join("&")
}

/// One line of JSON for each.
fn write(entries: &[Value]) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    for entry in entries {
        writeln!(out, "{entry}").map_err(|error| Failure::internal("cannot write to standard output", &error))?;
    }
    Ok(())
}

fn export_offline(bucket: &str, project: &str, search: &LedgerSearch) -> Result<(), Failure> {
    let LedgerSearch { actor, on, operation, since, until, limit } = search.clone();
    let wanted = Search { actor, on, operation, since, until };
    let (found, fault) = offline(async {
        let ledger = Offline::find(bucket, project).await?;
        ledger.receipts(&wanted).await
    })?;
    let entries = found.iter().take(limit.unwrap_or(usize::MAX));
    let entries: Vec<_> = entries.map(|entry| serde_json::to_value(entry).expect("a receipt is plain data")).collect();
    write(&entries)?;
    match fault {
        None => Ok(()),
        Some((seq, why)) => Err(broken(project, &format!("entry {seq}: {why}"))),
    }
}

/// Reads a bucket in this process.
fn offline<T>(work: impl Future<Output = ebb_timeline::Result<T>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::internal("cannot start worker threads", &error))?;
    runtime.block_on(work).map_err(|error| {
        let failure = Failure::new(error.kind(), "the ledger cannot be read").because(&error);
        Failure { hint: error.hint(), ..failure }
    })
}

fn entry_table(entries: Vec<Entry>) -> String {
    table(
        ["SEQ", "TIME", "ACTOR", "ACT", "ON", "RESULT"],
        entries
            .into_iter()
            .map(|entry| [entry.seq.to_string(), seconds(entry.time), entry.actor, entry.act, entry.on, entry.result]),
    )
}

fn verdict(to: &Session, project: &str, answer: &Value) -> Result<(), Failure> {
    let fault = match answer["ok"].as_bool() {
        Some(true) => None,
        _ => Some(answer["fault"].as_str().unwrap_or("nobody said what is wrong").to_owned()),
    };
    to.show(answer, |view: LedgerVerdict| {
        facts([
            ("ledger", if view.ok { "ok".to_owned() } else { "BROKEN".to_owned() }),
            ("entries", view.entries.to_string()),
            ("head", view.head_hash),
            ("fault", view.fault.unwrap_or_default()),
        ])
    })?;
    fault.map_or(Ok(()), |fault| Err(broken(project, &fault)))
}

fn broken(project: &str, fault: &str) -> Failure {
    Failure::new(ErrorKind::Corrupt, format!("the ledger of {project} is broken: {fault}"))
        .hint("Keep the bucket as it is and restore the damaged objects under projects/ from a copy.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_looked_for_is_asked_page_by_page() {
        let search = LedgerSearch {
            actor: None,
            on: Some("dev@a b".to_owned()),
            operation: Some("create branch".to_owned()),
            since: Some("2026-11-21T06:00:00Z".parse().unwrap()),
            until: None,
            limit: None,
        };
        let expect = "on=dev%40a%20b&operation=create%20branch&since=2026-11-21T06%3A00%3A00Z&after=7&limit=100";
        assert_eq!(query(&search, Some(7), 100), expect);
    }
}
