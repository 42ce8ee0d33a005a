//! How a command fails: what is printed, and with which exit code.

use std::process::ExitCode;

use ebb_types::ErrorKind;

/// A command that did not do what it was asked: one line, its causes, and advice.
#[derive(Debug)]
pub struct Failure {
    /// Sorts the failure; decides the exit code.
    pub kind: ErrorKind,
    /// One line, lower case, no period.
    pub message: String,
    /// What lies behind it, outermost first.
    pub causes: Vec<String>,
    /// What to do about it: full sentences.
    pub hint: Option<String>,
}

impl Failure {
    /// A failure without causes and advice.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), causes: Vec::new(), hint: None }
    }

    /// A failure of this machine: a file, a process.
    pub fn internal(message: impl Into<String>, cause: &dyn std::error::Error) -> Self {
        Self::new(ErrorKind::Internal, message).because(cause)
    }

    /// Adds a cause, and its own causes.
    pub fn because(mut self, cause: &dyn std::error::Error) -> Self {
        let mut next = Some(cause);
        while let Some(error) = next {
            self.causes.push(error.to_string());
            next = error.source();
        }
        self
    }

    /// Adds advice.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Prints the failure to stderr and gives the exit code that goes with it.
    pub fn report(&self, json: bool) -> ExitCode {
        if json {
            let body = serde_json::json!({
                "error": self.message, "kind": self.kind, "causes": self.causes, "hint": self.hint,
            });
            eprintln!("{body}");
        } else {
            eprintln!("error: {}", self.message);
            for cause in &self.causes {
                eprintln!("  because: {cause}");
            }
            if let Some(hint) = &self.hint {
                eprintln!("hint: {hint}");
            }
        }
        ExitCode::from(exit_code(self.kind))
    }
}

/// The exit codes that `ebb --help` promises.
fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Invalid => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::Conflict | ErrorKind::Fenced => 4,
        ErrorKind::Unavailable => 5,
        ErrorKind::Corrupt | ErrorKind::Internal => 1,
    }
}
