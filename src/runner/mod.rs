//! Inside the sandbox: the one program that starts, limits and kills user code.
//!
//! `wire` and `client` are shared with the server; the rest runs only in `gantry-runner`.

pub mod agent;
pub mod app;
mod attach;
mod build;
mod callers;
pub mod client;
pub mod confine;
mod fetch;
mod job;
mod line;
mod listening;
mod network;
mod page;
mod pod;
mod process;
mod report;
pub mod sandbox;
mod shown;
pub mod slot;
mod sockets;
mod unclaimed;
mod warm;
pub mod wire;
pub mod workspace;

use std::process::ExitCode;

/// The runner's name, by which the server's own program is told to be it.
pub const PROGRAM: &str = "gantry-runner";

/// `gantry-runner COMMAND`.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    process::heed_signals();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{PROGRAM}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut arguments: impl Iterator<Item = String>) -> anyhow::Result<ExitCode> {
    let done = |()| ExitCode::SUCCESS;
    match arguments.next().as_deref() {
        Some("agent") => pod::agent().map(done),
        Some("attach") => attach::main().map(done),
        Some("app") => pod::app(),
        Some("fetch") => Ok(fetch::main(arguments.next(), arguments.next())),
        Some("sandbox") => sandbox::main().map(done),
        other => anyhow::bail!(
            "{} is not a command. In images there are `agent`, `attach`, `app` and `fetch [FOLDER]`; \
             `sandbox` is started by the server",
            other.unwrap_or("nothing")
        ),
    }
}
