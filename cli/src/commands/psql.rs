//! `ebb psql`: becomes psql.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use ebb_types::PointRef;

use super::Session;
use super::url::urls;
use crate::failure::Failure;

/// Replaces this process by psql, connected to the branch, or to a moment of it. Returns only if that cannot be done.
pub fn run(to: &Session, place: &PointRef, args: &[OsString]) -> Result<(), Failure> {
    let urls = urls(to, place)?;
    // A command line is readable to every user of the machine, an environment is not.
    let (url, password) = without_password(&urls.url);
    let mut psql = Command::new("psql");
    psql.arg(url).args(args);
    if let Some(password) = password {
        psql.env("PGPASSWORD", password);
    }
    let error = psql.exec();
    let failure = Failure::internal("cannot run psql", &error);
    Err(match error.kind() {
        io::ErrorKind::NotFound => failure.hint(
            "Install it (`apt-get install postgresql-client-15`), or paste what `ebb url` prints into another client.",
        ),
        _ => failure,
    })
}

/// Takes the password out of `postgres://role:password@host…`.
fn without_password(url: &str) -> (String, Option<String>) {
    let parts = url.split_once("://").and_then(|(scheme, rest)| {
        let (login, place) = rest.split_once('@')?;
        let (role, password) = login.split_once(':')?;
        Some((format!("{scheme}://{role}@{place}"), percent_decoded(password)))
    });
    match parts {
        Some((url, password)) => (url, Some(password)),
        None => (url.to_owned(), None),
    }
}

fn percent_decoded(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let byte = match (first, tail) {
            (b'%', [high, low, ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    rest = &tail[2..];
                    out.push(high << 4 | low);
                    continue;
                }
                _ => *first,
            },
            _ => *first,
        };
        out.push(byte);
        rest = tail;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|n| n as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_password_is_not_on_the_command_line() {
        let (url, password) =
            without_password("postgres://app:a%40b%c@127.0.0.1:6432/app?options=endpoint%3Dprod--shop");
        assert_eq!(url, "postgres://app@127.0.0.1:6432/app?options=endpoint%3Dprod--shop");
        assert_eq!(password.as_deref(), Some("a@b%c"));
        assert_eq!(without_password("postgres://app@h/app"), ("postgres://app@h/app".to_owned(), None));
    }
}
