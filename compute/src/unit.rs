//! The unit process: `ebb compute --branch-dir DIR`.

use std::path::Path;
use std::process::ExitCode;

/// Runs a unit until it is stopped: call it first thing in `main`, before any thread exists.
pub fn main(_branch_dir: &Path) -> ExitCode {
    todo!("helper D")
}
