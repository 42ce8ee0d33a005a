//! The HTTP side of the commands: one blocking request each.

use std::time::Duration;

use ebb_timeline::api::types::Problem;
use ebb_types::ErrorKind;
use serde::Serialize;
use serde_json::Value;

use crate::failure::Failure;

/// LIMIT: the longest act a single request waits for (an export or a deploy of a large database).
const ANSWER_WITHIN: Duration = Duration::from_secs(3600);

/// LIMIT: the API is on this machine; if it does not accept by then it is not there.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// LIMIT: a ledger of a hundred thousand entries; more is not for a terminal.
const ANSWER_BYTES_MAX: u64 = 256 << 20;

/// The API of one `ebb serve`.
#[derive(Debug)]
pub struct Client {
    agent: ureq::Agent,
    base: String,
}

impl Client {
    /// Names the API; touches nothing.
    pub fn new(base: &str) -> Self {
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(ANSWER_WITHIN))
            .timeout_connect(Some(CONNECT_WITHIN))
            // The API is on loopback; a proxy from the environment would only send a password's way elsewhere.
            .proxy(None)
            .user_agent(concat!("ebb/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), base: base.trim_end_matches('/').to_owned() }
    }

    /// GET.
    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        self.answer(self.agent.get(self.url(path)).call())
    }

    /// DELETE.
    pub fn delete(&self, path: &str) -> Result<Value, Failure> {
        self.answer(self.agent.delete(self.url(path)).call())
    }

    /// PATCH with a JSON body.
    pub fn patch(&self, path: &str, body: &impl Serialize) -> Result<Value, Failure> {
        self.answer(self.agent.patch(self.url(path)).send_json(body))
    }

    /// POST with a JSON body, under an idempotency key if there is one.
    pub fn post(&self, path: &str, body: &impl Serialize, key: Option<&str>) -> Result<Value, Failure> {
        let mut request = self.agent.post(self.url(path));
        if let Some(key) = key {
            request = request.header("Idempotency-Key", key);
        }
        self.answer(request.send_json(body))
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v1/{path}", self.base)
    }

    fn answer(&self, sent: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value, Failure> {
        let mut response = sent.map_err(|error| self.unreachable(&error))?;
        let status = response.status();
        let body = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|error| self.unreachable(&error))?;
        if !status.is_success() {
            return Err(refusal(status.as_u16(), &body));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&body).map_err(|error| {
            Failure::internal(format!("{} did not answer in JSON", self.base), &error)
                .hint("Is that the API of an `ebb serve`? `--api` or $EBB_API names another one.")
        })
    }

    fn unreachable(&self, error: &ureq::Error) -> Failure {
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Failure::new(ErrorKind::Invalid, format!("{:?} is not the URL of an API", self.base))
                    .because(error)
                    .hint("It looks like http://127.0.0.1:7432.")
            }
            _ => Failure::new(ErrorKind::Unavailable, format!("no answer from the API at {}", self.base))
                .because(error)
                .hint("Start it with `make run` or `ebb serve`; `--api` or $EBB_API names another one."),
        }
    }
}

/// Makes a failure of an answer that is no success.
fn refusal(status: u16, body: &str) -> Failure {
    let by_status = match status {
        404 => ErrorKind::NotFound,
        409 => ErrorKind::Conflict,
        400..=499 => ErrorKind::Invalid,
        502..=504 => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    match serde_json::from_str::<Problem>(body) {
        Ok(problem) => Failure { hint: problem.hint, ..Failure::new(problem.kind, problem.detail) },
        Err(_) => {
            let mut failure = Failure::new(by_status, format!("the API answered {status}"));
            failure.causes.extend(body.lines().next().filter(|line| !line.is_empty()).map(str::to_owned));
            failure
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_keeps_its_words_kind_and_hint() {
        let body = r#"{"type":"urn:ebb:problem:not-found","title":"There is no such thing","status":404,
                       "detail":"there is no project \"shpo\"","hint":"Did you mean shop?","kind":"not_found"}"#;
        let failure = refusal(404, body);
        assert_eq!(failure.kind, ErrorKind::NotFound);
        assert_eq!(failure.message, "there is no project \"shpo\"");
        assert_eq!(failure.hint.as_deref(), Some("Did you mean shop?"));
    }

    #[test]
    fn an_answer_of_something_else_is_sorted_by_its_status() {
        let failure = refusal(503, "<html>busy</html>");
        assert_eq!(failure.kind, ErrorKind::Unavailable);
        assert_eq!(failure.causes, ["<html>busy</html>"]);
    }
}
