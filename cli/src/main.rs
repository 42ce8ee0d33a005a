//! The binary `ebb`: the server, the unit process it starts per awake branch, and the commands people type.

mod args;
mod client;
mod commands;
mod failure;
mod output;
mod serve;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::output::Output;

fn main() -> ExitCode {
    let args = Args::parse();
    // INVARIANT: a unit unshares namespaces, which the kernel refuses to a process with threads; so it is entered
    // before any thread or runtime exists.
    if let Command::Compute(args::ComputeCommand { branch_dir: Some(dir), .. }) = &args.command {
        serve::start_logging();
        return ebb_compute::unit::main(dir);
    }
    let output = Output { json: args.json };
    let done = match args.command {
        Command::Serve(serve) => serve::run(&serve),
        Command::Config(config) => serve::print_config(config, output),
        Command::Fsck(args) => return commands::fsck::run(&args, output),
        command => commands::run(command, &args.api, output),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(output.json),
    }
}
