//! The words of Ebb as types: identifiers, names, references, positions, and what an error means to its receiver.
//!
//! Every other crate speaks in these. Nothing here does I/O or is async; the only ambient things touched are the
//! random bits and the clock behind [`ids`]' `generate`, which callers at the rim use and pure cores never do.

mod allow;
mod clock;
mod error;
mod ids;
mod lsn;
mod names;
mod refs;
mod sqlstate;
mod suggest;

pub use allow::{AllowList, parse_network};
pub use clock::{Clock, SystemClock, TestClock};
pub use error::{ErrorKind, Hint};
pub use ids::{BranchId, LayerId, NodeId, OperationId, ProjectId, ReleaseId};
pub use jiff::Timestamp;
pub use lsn::{Lsn, ParseLsnError};
pub use names::{BranchName, CheckpointName, InvalidName, ProjectName};
pub use refs::{BranchRef, EndpointName, ParseRefError, Point, PointRef};
pub use sqlstate::SqlState;
pub use suggest::nearest;
