//! Looks at a directory as a release would, without a server and without a database.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{FILE_NAME, Fault, Question, ReleaseFile};
use crate::artifact::{read_migrations, read_release_file};
use crate::migrate::{self, Manner};
use crate::{Error, Refusal, Result};

/// What a directory that is to be released looks like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Whether it describes itself.
    pub described: bool,
    /// Its migrations, in order.
    pub migrations: Vec<Looked>,
    /// How many probes it has.
    pub probes: usize,
    /// What is wrong with its `ebb.toml`.
    pub faults: Vec<Fault>,
    /// What is wrong besides.
    pub findings: Vec<Finding>,
}

/// A migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Looked {
    /// Its file name.
    pub file: String,
    /// Whether it runs outside a transaction.
    pub outside: bool,
}

/// Something that is wrong with a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// With which file of it.
    pub file: String,
    /// What.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Checks a directory that is to be released.
///
/// # Errors
/// If it cannot be read; what is wrong with it is no error.
pub fn check(dir: &Path) -> Result<Checked> {
    let (file, faults) = match read_release_file(dir) {
        Ok(file) => (file, Vec::new()),
        Err(Error::Refused(Refusal::ReleaseFile(faults))) => (None, faults),
        Err(error) => return Err(error),
    };
    let described = file.is_some() || !faults.is_empty();
    let file = file.unwrap_or_default();
    let (mut migrations, mut findings) = (Vec::new(), missing(dir, &file));
    for migration in read_migrations(&dir.join(&file.migrations))? {
        match migrate::fit(&migration) {
            Ok(manner) => {
                let outside = matches!(manner, Manner::Outside(_));
                migrations.push(Looked { file: migration.name, outside });
            }
            Err(Error::Migration { file, message, advice }) => {
                findings.push(Finding { file, message, hint: Some(advice) });
            }
            Err(error) => return Err(error),
        }
    }
    let ok = faults.is_empty() && findings.is_empty();
    Ok(Checked { ok, described, migrations, probes: file.probes.len(), faults, findings })
}

/// What the file names and the directory does not have.
fn missing(dir: &Path, file: &ReleaseFile) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |message: String| findings.push(Finding { file: FILE_NAME.to_owned(), message, hint: None });
    if file.migrations != ReleaseFile::default().migrations && !dir.join(&file.migrations).is_dir() {
        note(format!("there is no directory {:?} for migrations", file.migrations));
    }
    for probe in &file.probes {
        if let Question::Command { command, .. } = &probe.question
            && let Some(program) = command.first().filter(|program| program.contains('/'))
            && !dir.join(program).is_file()
        {
            note(format!("probe {:?} runs {program:?}, which is not there", probe.name));
        }
    }
    findings
}
