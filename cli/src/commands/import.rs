//! `ebb import`: begins one and shows how far it is, or says something to one that is under way.

use std::io::IsTerminal as _;
use std::thread;
use std::time::{Duration, Instant};

use ebb_compute::import::{Counted, Phase};
use ebb_timeline::api::types::{Import, ImportList, ImportOrigin, ImportState, StartImport};
use ebb_types::{BranchName, ErrorKind, ProjectName};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;

use super::{Session, absolute};
use crate::args::{ImportArgs, ImportTarget};
use crate::failure::Failure;
use crate::output::{bytes, facts};

/// How often it is asked how far an import is.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// How often that is told where there is no terminal.
const TELL_EVERY: Duration = Duration::from_secs(5);

/// LIMIT: `ebb serve` may be restarted under an import's eyes; it is back, or is not, within this.
const AWAY_MAX: Duration = Duration::from_secs(30);

pub(super) fn run(to: &Session, args: ImportArgs) -> Result<(), Failure> {
    let at = &args.to;
    if args.status {
        let answer = serde_json::to_value(running(to, at)?).expect("a view is plain data");
        return to.show(&answer, |import: Import| line_about(&import) + "\n");
    }
    if args.cut_over || args.cancel {
        let id = running(to, at)?.id;
        if args.cut_over {
            return watch(to, to.client.post(&format!("imports/{id}/cut-over"), &serde_json::json!({}), None)?);
        }
        let (answer, import) = until_over(to, to.client.delete(&format!("imports/{id}"))?)?;
        // It may have come to its end before it heard.
        return match import.state {
            ImportState::Done => Err(Failure::new(ErrorKind::Conflict, "the import was done before it was cancelled")
                .hint(format!("The branch can be deleted: ebb branch delete {}/{}.", import.project, import.branch))),
            _ => {
                to.done(&answer, || format!("cancelled the import of {}/{}", import.project, import.branch));
                Ok(())
            }
        };
    }
    let from = match (args.from, args.from_dir, args.from_dump) {
        (Some(url), _, _) => ImportOrigin::Server { url: with_password(url) },
        (_, Some(path), _) => ImportOrigin::Directory { path: absolute(&path)? },
        (_, _, Some(path)) => ImportOrigin::Dump { path: absolute(&path)? },
        (None, None, None) => unreachable!("clap wants one of them"),
    };
    let ImportTarget { project, branch } = args.to;
    let body = StartImport { project, branch, from, follow: args.follow, database: args.database };
    watch(to, to.client.post("imports", &body, args.key.as_deref())?)
}

/// The password of `PGPASSWORD` goes into a URL that has none, so that it need not be typed where others see it.
fn with_password(url: String) -> String {
    let Ok(password) = std::env::var("PGPASSWORD") else { return url };
    let Some((scheme, rest)) = url.split_once("://") else { return url };
    match rest.split_once('@') {
        Some((user, host)) if !user.contains(':') && !user.contains('/') => {
            format!("{scheme}://{user}:{}@{host}", encoded(&password))
        }
        _ => url,
    }
}

fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    text.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}

/// The import that is under way for a branch, or was last.
fn running(to: &Session, at: &ImportTarget) -> Result<Import, Failure> {
    let list = read::<ImportList>(&to.client.get("imports")?)?;
    let branch: BranchName = at.branch.clone().unwrap_or_else(|| "prod".parse().expect("it is a name"));
    let found = list.imports.into_iter().rev().find(|one| one.project == at.project && one.branch == branch);
    found.ok_or_else(|| {
        Failure::new(ErrorKind::NotFound, format!("no import of {}/{branch} is under way", at.project))
            .hint(format!("One that was interrupted is undone. What became of it: ebb ledger list {}.", at.project))
    })
}

fn read<T: serde::de::DeserializeOwned>(answer: &Value) -> Result<T, Failure> {
    T::deserialize(answer).map_err(|error| {
        Failure::internal("the API's answer is not what this `ebb` expects", &error)
            .hint("Are this `ebb` and the `ebb serve` it talks to of the same version?")
    })
}

/// Shows how far an import is until it is over, then what came of it.
fn watch(to: &Session, answer: Value) -> Result<(), Failure> {
    let (answer, import) = until_over(to, answer)?;
    for note in &import.notes {
        eprintln!("note: {note}");
    }
    if let Some(fault) = import.fault {
        let failure = Failure::new(ErrorKind::Invalid, format!("the import failed: {fault}"));
        return Err(Failure { hint: import.hint, ..failure });
    }
    to.show(&answer, |import: Import| {
        let at = format!("{}/{}", import.project, import.branch);
        facts([("imported", at.clone()), ("from", import.from), ("connect", format!("psql \"$(ebb url {at})\""))])
    })
}

/// Shows how far an import is until it is over.
fn until_over(to: &Session, answer: Value) -> Result<(Value, Import), Failure> {
    let mut answer = answer;
    let mut import = read::<Import>(&answer)?;
    let mut shown = Shown::new();
    let mut heard = Instant::now();
    while import.state == ImportState::Running {
        shown.update(&import);
        thread::sleep(ASK_EVERY);
        match to.client.get(&format!("imports/{}", import.id)) {
            Ok(fresh) => {
                (answer, heard) = (fresh, Instant::now());
                import = read(&answer)?;
            }
            Err(failure) if failure.kind == ErrorKind::NotFound => {
                shown.end();
                return Err(Failure::new(ErrorKind::Unavailable, "the import was interrupted: ebb serve has ended")
                    .hint("Nothing of it is left. Import again; it begins anew."));
            }
            Err(failure) if heard.elapsed() > AWAY_MAX => {
                shown.end();
                return Err(failure);
            }
            Err(_) => {}
        }
    }
    shown.end();
    Ok((answer, import))
}

/// What a phase is called.
fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Copying => "copying",
        Phase::Restoring => "restoring",
        Phase::Following => "following the source; cut over with: ebb import … --cut-over",
        Phase::CatchingUp => "catching up",
        Phase::Recovering => "recovering",
        Phase::CheckingPages => "checking pages",
        Phase::Settling => "seeing to roles",
        Phase::CheckingTables => "checking tables and indexes",
        Phase::Sealing => "making a layer",
        Phase::Done => "done",
    }
}

/// One line about an import, with rate and time left.
fn line_about(import: &Import) -> String {
    match (&import.fault, import.state) {
        (Some(fault), _) => return format!("failed: {fault}"),
        (None, ImportState::Done) => return "done".to_owned(),
        _ => {}
    }
    let mut parts = vec![phase(import.phase).to_owned()];
    let amount = |n: u64| match import.counted {
        Counted::Bytes => bytes(n),
        Counted::Objects => n.to_string(),
    };
    match import.total {
        Some(total) => parts.push(format!("{} of {}", amount(import.done), amount(total))),
        None if import.done > 0 => parts.push(amount(import.done)),
        None => {}
    }
    if let Some(rate) = import.per_second {
        parts.push(format!("{}/s", amount(rate as u64)));
    }
    if let Some(left) = import.seconds_left {
        parts.push(format!("{} left", time(left)));
    }
    if let Some(behind) = import.behind_bytes {
        parts.push(format!("{} behind", bytes(behind)));
    }
    parts.join(", ")
}

fn time(seconds: f64) -> String {
    match seconds as u64 {
        seconds @ 0..60 => format!("{seconds}s"),
        seconds @ 60..3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        seconds => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// A bar on a terminal; elsewhere a line now and then. Both on standard error.
struct Shown {
    bar: Option<ProgressBar>,
    told: Option<(Phase, Instant)>,
}

impl Shown {
    fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(1));
        Self { bar, told: None }
    }

    fn update(&mut self, import: &Import) {
        let line = line_about(import);
        match &self.bar {
            Some(bar) => {
                let template = if import.total.is_some() { "{bar:30} {percent:>3}%  {msg}" } else { "{spinner} {msg}" };
                bar.set_style(ProgressStyle::with_template(template).expect("the template is one"));
                bar.set_length(import.total.unwrap_or(1).max(1));
                bar.set_position(import.done);
                bar.set_message(line);
                bar.tick();
            }
            None if self.told.is_none_or(|(phase, at)| phase != import.phase || at.elapsed() >= TELL_EVERY) => {
                eprintln!("{line}");
                self.told = Some((import.phase, Instant::now()));
            }
            None => {}
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Reads PROJECT or PROJECT/BRANCH.
pub fn parse_target(text: &str) -> Result<ImportTarget, String> {
    let (project, branch) = match text.split_once('/') {
        Some((project, branch)) => (project, Some(branch)),
        None => (text, None),
    };
    let project: ProjectName = project.parse().map_err(|error: ebb_types::InvalidName| error.to_string())?;
    let branch = branch.map(str::parse).transpose().map_err(|error: ebb_types::InvalidName| error.to_string())?;
    Ok(ImportTarget { project, branch })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn import(more: Value) -> Import {
        let mut value = serde_json::json!({
            "id": "op_00000000000000000000000000000001", "project": "shop", "branch": "prod", "from": "/x",
            "begun_at": "2026-11-21T06:00:00Z", "state": "running", "phase": "copying", "counted": "bytes",
            "done": 5 << 20, "can_cut_over": false, "notes": [],
        });
        value.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_line_tells_how_far_how_fast_and_how_long() {
        let copying = serde_json::json!({"total": 1 << 30, "per_second": 1048576.0, "seconds_left": 1019.0});
        insta::assert_snapshot!(line_about(&import(copying)), @"copying, 5.0 MiB of 1.0 GiB, 1.0 MiB/s, 16m 59s left");
        let checking = serde_json::json!({"phase": "checking_tables", "counted": "objects", "done": 3, "total": 400});
        insta::assert_snapshot!(line_about(&import(checking)), @"checking tables and indexes, 3 of 400");
        let following = serde_json::json!({"phase": "following", "done": 100, "behind_bytes": 2048});
        insta::assert_snapshot!(line_about(&import(following)), @"following the source; cut over with: ebb import … --cut-over, 100 B, 2.0 KiB behind");
    }

    #[test]
    fn targets() {
        let target = parse_target("shop/legacy").unwrap();
        assert_eq!((target.project.as_str(), target.branch.unwrap().as_str()), ("shop", "legacy"));
        assert!(parse_target("shop").unwrap().branch.is_none());
        assert!(parse_target("Shop/").is_err());
    }
}
