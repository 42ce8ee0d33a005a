//! The REST interface: HTTP and JSON under `/v1`.

use std::sync::Arc;

use crate::Service;

pub mod types;

/// All routes over one service.
pub fn router(_service: Arc<Service>) -> axum::Router {
    todo!("routes")
}
