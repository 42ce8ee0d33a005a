//! How sessions end.

use ebb_types::SqlState;

use crate::errors::Said;
use crate::wire::error_field;

/// How a session ends.
#[derive(Debug)]
pub enum End {
    /// With words of the proxy's own.
    Say(Said),
    /// With words of the backend's.
    Pass(Vec<u8>),
    /// Without a word: the client is gone, or has been told.
    Silent,
}

impl End {
    /// How the connection of a client that never had a backend is counted.
    pub fn as_connect(&self) -> (&'static str, &'static str) {
        match self {
            End::Silent => ("left", ""),
            End::Say(said) => ("refused", said.sqlstate()),
            // Whatever Postgres may say; what Ebb never says itself is one label.
            End::Pass(error) => {
                let code = error.get(5..).and_then(|body| std::str::from_utf8(error_field(body, b'C')?).ok());
                ("refused", code.and_then(SqlState::of).map_or("other", SqlState::as_str))
            }
        }
    }
}

/// Counts what became of a connection; `sqlstate` is empty where the client was told none.
pub fn note_connect(outcome: &'static str, sqlstate: &'static str) {
    metrics::counter!("ebb_proxy_connects_total", "outcome" => outcome, "sqlstate" => sqlstate).increment(1);
}
