//! `ebb serve`.
use crate::args::{ConfigCommand, ServeArgs};
use crate::failure::Failure;
use crate::output::Output;
pub fn run(_args: Box<ServeArgs>) -> Result<(), Failure> { todo!("helper F") }
pub fn print_config(_c: ConfigCommand, _o: Output) -> Result<(), Failure> { todo!("helper F") }
