//! Asks the probes of a release: within a time, again if the answer is not right, and never more than that.
//!
//! Answers are cut before they are recorded, and what a program writes is not looked at: it could hold a secret.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use axum::body::{Body, to_bytes};
use axum::http::{Request, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::Result;
use crate::deploy::Probed;
use crate::release_file::{Probe, Question};

/// LIMIT: of an answer that is not the right one, so many characters are recorded.
const SHOWN_MAX: usize = 200;

/// LIMIT: a page that tells how a service is; more is not read.
const BODY_MAX: usize = 1 << 20;

/// Where programs are run.
#[derive(Debug, Clone)]
pub struct Place {
    /// The directory: the release's code.
    pub dir: PathBuf,
    /// What they are told, besides where programs are.
    pub env: Vec<(&'static str, String)>,
}

/// Asks until the answer is right, or the tries are used up.
pub async fn until_right<F>(probe: &Probe, ask: impl Fn() -> F) -> Probed
where
    F: Future<Output = Result<(), String>>,
{
    let began = Instant::now();
    let limit = Duration::from_millis(probe.timeout_ms);
    let mut tries = 0;
    loop {
        tries += 1;
        let fault = match tokio::time::timeout(limit, ask()).await {
            Ok(Ok(())) => None,
            Ok(Err(fault)) => Some(fault),
            Err(_) => Some(format!("did not answer within {} ms", probe.timeout_ms)),
        };
        if fault.is_none() || tries > probe.retries {
            return Probed { name: probe.name.clone(), tries, ms: ms_since(began), fault };
        }
        tokio::time::sleep(Duration::from_millis(probe.wait_ms)).await;
    }
}

/// Whether an answer to SQL is the right one.
pub fn compare(found: &Result<String>, expect: &str) -> Result<(), String> {
    match found {
        Ok(found) if found == expect => Ok(()),
        Ok(found) => Err(format!("answers {}, not {}", shown(found), shown(expect))),
        Err(error) => Err(format!("has no answer: {}", error.chain())),
    }
}

/// Asks what needs no database.
///
/// # Errors
/// What is wrong with the answer.
pub async fn ask(question: &Question, place: &Place) -> Result<(), String> {
    match question {
        Question::Sql { .. } => Err("is asked of a database".to_owned()),
        Question::Http { url, status, json, expect } => {
            let (found, body) = get(url).await.map_err(|error| format!("has no answer: {error}"))?;
            if found != *status {
                return Err(format!("answers with status {found}, not {status}"));
            }
            match (json, expect) {
                (Some(pointer), Some(expect)) => at(&body, pointer, expect),
                _ => Ok(()),
            }
        }
        Question::Command { command, exit } => run(command, *exit, place).await,
    }
}

async fn get(url: &str) -> Result<(u16, Vec<u8>), Box<dyn std::error::Error + Send + Sync>> {
    let uri: Uri = url.parse()?;
    let host = uri.host().unwrap_or_default();
    let name = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((name, uri.port_u16().unwrap_or(80))).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(header::HOST, uri.authority().map_or(host, |authority| authority.as_str()))
        .header(header::USER_AGENT, concat!("ebb/", env!("CARGO_PKG_VERSION")))
        .header(header::CONNECTION, "close")
        .body(Body::empty())?;
    let answer = sender.send_request(request).await?;
    let status = answer.status().as_u16();
    let body = to_bytes(Body::new(answer.into_body()), BODY_MAX).await?;
    driver.abort();
    Ok((status, body.to_vec()))
}

/// Whether what is at a place of a JSON document is the right thing.
fn at(body: &[u8], pointer: &str, expect: &str) -> Result<(), String> {
    let document: serde_json::Value =
        serde_json::from_slice(body).map_err(|error| format!("answers what is no JSON: {error}"))?;
    let found = match document.pointer(pointer) {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => return Err(format!("answers JSON that has nothing at {pointer:?}")),
    };
    match found == expect {
        true => Ok(()),
        false => Err(format!("answers {} at {pointer:?}, not {}", shown(&found), shown(expect))),
    }
}

async fn run(command: &[String], exit: i32, place: &Place) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else {
        return Err("names no program".to_owned());
    };
    // A path with a slash is one within the release, wherever this process is.
    let program = if program.contains('/') { place.dir.join(program) } else { PathBuf::from(program) };
    let mut command = Command::new(program);
    command.args(arguments).current_dir(&place.dir).env_clear();
    command.env("PATH", std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()));
    command.envs(place.env.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.process_group(0).spawn().map_err(|error| format!("cannot be run: {error}"))?;
    let _group = child.id().and_then(|id| i32::try_from(id).ok()).map(Group);
    let ended = child.wait().await.map_err(|error| format!("cannot be waited for: {error}"))?;
    match ended.code() {
        Some(code) if code == exit => Ok(()),
        Some(code) => Err(format!("exits with {code}, not {exit}")),
        None => Err("was ended by a signal".to_owned()),
    }
}

/// A program and what it has started: ended when dropped.
struct Group(i32);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.0) {
            // It has usually ended by itself: then there is no such group.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

fn shown(text: &str) -> String {
    let cut: String = text.chars().take(SHOWN_MAX).collect();
    if cut.len() < text.len() { format!("{cut:?} …") } else { format!("{cut:?}") }
}

/// Milliseconds since a moment.
pub fn ms_since(began: Instant) -> u64 {
    u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
