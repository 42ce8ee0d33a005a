//! The SQLSTATE codes Ebb itself sends, as Postgres defines them (PostgreSQL 15, Appendix A).

use std::fmt;

/// A five-character SQLSTATE.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SqlState(&'static str);

impl SqlState {
    /// `08006`: the compute was lost in the middle of a session.
    pub const CONNECTION_FAILURE: Self = Self("08006");
    /// `08P01`: a malformed or unexpected message.
    pub const PROTOCOL_VIOLATION: Self = Self("08P01");
    /// `0A000`: a protocol feature that is not offered.
    pub const FEATURE_NOT_SUPPORTED: Self = Self("0A000");
    /// `22023`: a value that cannot be, or a moment that cannot be reached.
    pub const INVALID_PARAMETER_VALUE: Self = Self("22023");
    /// `25006`: a write to something immutable.
    pub const READ_ONLY: Self = Self("25006");
    /// `28000`: not allowed, for a reason that may be told.
    pub const INVALID_AUTHORIZATION: Self = Self("28000");
    /// `28P01`: authentication failed, for a reason that may not be told.
    pub const INVALID_PASSWORD: Self = Self("28P01");
    /// `3D000`: no such branch or database.
    pub const INVALID_CATALOG_NAME: Self = Self("3D000");
    /// `53100`: the node's disk is too full to take on work.
    pub const DISK_FULL: Self = Self("53100");
    /// `53200`: the node has not enough memory for a compute.
    pub const OUT_OF_MEMORY: Self = Self("53200");
    /// `53300`: a queue or pool is full.
    pub const TOO_MANY_CONNECTIONS: Self = Self("53300");
    /// `53400`: a quota is used up.
    pub const CONFIGURATION_LIMIT_EXCEEDED: Self = Self("53400");
    /// `55006`: the branch is busy with an operation.
    pub const OBJECT_IN_USE: Self = Self("55006");
    /// `57014`: what a client waited for was cancelled by its own wish.
    pub const QUERY_CANCELED: Self = Self("57014");
    /// `57P01`: the proxy is shutting down, or ends a session on purpose.
    pub const ADMIN_SHUTDOWN: Self = Self("57P01");
    /// `57P03`: the compute is not yet awake.
    pub const CANNOT_CONNECT_NOW: Self = Self("57P03");
    /// `57P05`: the session was idle beyond its limit.
    pub const IDLE_SESSION_TIMEOUT: Self = Self("57P05");
    /// `XX000`: a fault of Ebb's own.
    pub const INTERNAL_ERROR: Self = Self("XX000");
    /// `XX001`: stored bytes did not pass their checksum.
    pub const DATA_CORRUPTED: Self = Self("XX001");

    /// All of them.
    const ALL: [Self; 18] = [
        Self::CONNECTION_FAILURE,
        Self::PROTOCOL_VIOLATION,
        Self::FEATURE_NOT_SUPPORTED,
        Self::READ_ONLY,
        Self::INVALID_AUTHORIZATION,
        Self::INVALID_PASSWORD,
        Self::INVALID_CATALOG_NAME,
        Self::DISK_FULL,
        Self::OUT_OF_MEMORY,
        Self::TOO_MANY_CONNECTIONS,
        Self::CONFIGURATION_LIMIT_EXCEEDED,
        Self::OBJECT_IN_USE,
        Self::QUERY_CANCELED,
        Self::ADMIN_SHUTDOWN,
        Self::CANNOT_CONNECT_NOW,
        Self::IDLE_SESSION_TIMEOUT,
        Self::INTERNAL_ERROR,
        Self::DATA_CORRUPTED,
    ];

    /// The one with these five characters, if it is among those that Ebb sends.
    pub fn of(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.0 == text)
    }

    /// The five characters.
    pub const fn as_str(self) -> &'static str {
        self.0
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}
