//! Inside the sandbox: the one program that starts, limits and kills user code.
//!
//! `wire` and `client` are shared with the server; the rest runs only in `gantry-runner`.

pub mod agent;
pub mod app;
pub mod client;
pub mod confine;
mod job;
mod process;
pub mod sandbox;
pub mod slot;
mod warm;
pub mod wire;

use std::process::ExitCode;

/// The runner's name, by which the server's own program is told to be it.
pub const PROGRAM: &str = "gantry-runner";

/// `gantry-runner COMMAND`.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{PROGRAM}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<()> {
    match arguments.next().as_deref() {
        Some("sandbox") => sandbox::main(),
        other => anyhow::bail!(
            "{} is not a command; there is `sandbox`, which the server starts",
            other.unwrap_or("nothing")
        ),
    }
}
