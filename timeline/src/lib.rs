//! The timeline service: what projects, branches, checkpoints and releases there are, who did what, and what happens next.

pub mod clients;
