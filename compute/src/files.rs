//! Names in a branch's directory that the unit and the manager agree on.

/// What the unit must know: [`crate::manager::UnitSpec`].
pub(crate) const SPEC: &str = "unit.json";
/// Locked as long as any process of the unit lives.
pub(crate) const LOCK: &str = "unit.lock";
/// The unit's process number, as the host sees it.
pub(crate) const PID: &str = "unit.pid";
/// Why the last unit gave up, in one line.
pub(crate) const REASON: &str = "unit.err";
/// What the unit itself has to say.
pub(crate) const UNIT_LOG: &str = "unit.log";
/// What Postgres wrote.
pub(crate) const LOG: &str = "postgres.log";
/// Where the unit takes requests.
pub(crate) const CONTROL: &str = "control.sock";
/// SCRAM verifiers by role.
pub(crate) const ROLES: &str = "roles.json";
/// The name of Postgres' socket.
pub(crate) const SOCKET_NAME: &str = ".s.PGSQL.5432";
/// Where it is …
pub(crate) const SOCKET: &str = "run/.s.PGSQL.5432";
/// … and its lock file.
pub(crate) const SOCKET_LOCK: &str = "run/.s.PGSQL.5432.lock";
