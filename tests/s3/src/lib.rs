//! S3 for tests: a real server, a network that fails before it, and stand-ins for stores that must be refused.
//!
//! - [`Seaweed`] is the real server, SeaweedFS: one per test, on free ports of the loopback address, in a directory of its
//!   own, gone when the test is, also when that is killed.
//! - [`free_port`] is where a server can listen that will be killed and started again.
//! - [`Network`] passes requests on to a server, and does to them what networks do.
//! - [`StandIn`] is no S3 server: it answers the few requests a probe makes, and is dishonest in one chosen way.

mod network;
mod ports;
mod seaweed;
mod stand_in;
mod wire;

pub use network::{Mishap, Network};
pub use ports::free_port;
pub use seaweed::Seaweed;
pub use stand_in::{Flaw, StandIn};

/// The bucket that [`Seaweed`] makes.
pub const BUCKET: &str = "ebb-test";

/// Who may use it.
pub const ACCESS_KEY: &str = "ebb-test-key";

/// Their secret: of a form that no other text has, so that a test can look for it in logs.
pub const SECRET_KEY: &str = "S3cr3tOfTheTestsNeverToBeSeen";
