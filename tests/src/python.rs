//! Runs Python programs with psycopg 3: the second driver, from another language.

use std::process::{Command, Stdio};

/// Runs a program, which must succeed, with `args` as `sys.argv[1:]`; answers its standard output.
///
/// The interpreter is `EBB_TEST_PYTHON`, or Debian's, for which `scripts/setup` installs psycopg.
///
/// # Panics
/// When it fails, with what it said.
pub fn python(program: &str, args: &[&str]) -> String {
    let interpreter = std::env::var_os("EBB_TEST_PYTHON").unwrap_or_else(|| "/usr/bin/python3".into());
    let out = Command::new(&interpreter).arg("-c").arg(program).args(args).stdin(Stdio::null()).output();
    let out = out.unwrap_or_else(|error| panic!("cannot run {interpreter:?} (scripts/setup installs it): {error}"));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "the Python program failed:\n{stdout}{stderr}");
    stdout.into_owned()
}
