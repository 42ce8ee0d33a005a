//! Runs Python programs with psycopg 3: the second driver, from another language.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Runs a program, which must succeed, with `args` as `sys.argv[1:]`; answers its standard output.
///
/// The interpreter is `EBB_TEST_PYTHON`, or the one `scripts/setup` made in `.cache/venv`.
///
/// # Panics
/// When it fails, with what it said.
pub fn python(program: &str, args: &[&str]) -> String {
    let made = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.cache/venv/bin/python"));
    let interpreter = std::env::var_os("EBB_TEST_PYTHON").map_or_else(made, PathBuf::from);
    let out = Command::new(&interpreter).arg("-c").arg(program).args(args).stdin(Stdio::null()).output();
    let out = out.unwrap_or_else(|error| panic!("cannot run {interpreter:?} (scripts/setup makes it): {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "the Python program failed:\n{stdout}{stderr}");
    stdout.into_owned()
}
