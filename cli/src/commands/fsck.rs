//! `ebb fsck`: the checker, run in this process.

use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ebb_timeline::fsck::{self, Check, Report};
use ebb_types::Hint as _;

use crate::args::FsckArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::serve::lock::DataLock;

/// Exit codes, as the command's help promises them.
const FOUND: u8 = 1;
const NOT_CHECKED: u8 = 2;

/// How often a long check tells what it is at.
const TELL_EVERY: Duration = Duration::from_secs(1);

pub fn run(args: &FsckArgs, output: Output) -> ExitCode {
    match check(args) {
        Ok(report) => {
            output.show(&report, || text(&report));
            if report.is_clean() { ExitCode::SUCCESS } else { ExitCode::from(FOUND) }
        }
        Err(failure) => {
            failure.report(output.json);
            ExitCode::from(NOT_CHECKED)
        }
    }
}

fn check(args: &FsckArgs) -> Result<Report, Failure> {
    // A node that was never served has no lock, and nobody who could hold it.
    let lock = args.data.as_deref().filter(|data| data.join("lock").exists());
    let _lock = lock.map(DataLock::take).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::internal("cannot start worker threads", &error))?;
    let told = Mutex::new(Instant::now());
    let progress = |what: &str| {
        let Ok(mut told) = told.lock() else { return };
        if told.elapsed() >= TELL_EVERY {
            *told = Instant::now();
            eprintln!("checking {what}");
        }
    };
    let check = Check { bucket: args.bucket.as_deref(), data: args.data.as_deref(), progress: &progress };
    runtime.block_on(async {
        let mut report = fsck::check(&check).await.map_err(cannot_check)?;
        if args.repair {
            fsck::repair(&check, &mut report).await.map_err(cannot_check)?;
        }
        Ok(report)
    })
}

fn cannot_check(error: ebb_timeline::Error) -> Failure {
    let failure = Failure::new(error.kind(), "this cannot be checked").because(&error);
    Failure { hint: error.hint(), ..failure }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let kind = serde_json::to_value(finding.kind).ok();
        let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or_default().to_owned();
        let repaired = if finding.repaired { " (repaired)" } else { "" };
        text.push_str(&format!("{kind}: {}{repaired}\n  {}\n", finding.object, finding.what));
        for keeper in &finding.kept_by {
            text.push_str(&format!("  needed by {keeper}\n"));
        }
        if !finding.repaired {
            text.push_str(&format!("  {}\n", finding.advice));
        }
    }
    let checked = &report.checked;
    text.push_str(&format!(
        "checked {} ledgers ({} entries), {} layers, {} artifacts and {} objects of the bucket ({} wait to be collected); \
         {} layers and {} volumes of the node\n",
        checked.ledgers,
        checked.entries,
        checked.layers,
        checked.artifacts,
        checked.objects,
        checked.waiting_objects,
        checked.local_layers,
        checked.volumes,
    ));
    let damage = report.findings.iter().filter(|finding| finding.kind.is_damage() && !finding.repaired).count();
    let repaired = report.findings.iter().filter(|finding| finding.repaired).count();
    let rest = report.findings.len() - repaired;
    text.push_str(&match (rest, repaired) {
        (0, 0) => "clean\n".to_owned(),
        (0, _) => format!("clean, after {repaired} repairs\n"),
        _ => format!("{rest} findings, {damage} of them damage; {repaired} repaired\n"),
    });
    text
}
