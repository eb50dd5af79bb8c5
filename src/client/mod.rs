//! The command line's side of the protocol: `gantry submit`, `logs`, `ps`, `repl`, `rollback`, `module` and
//! `service`.
//!
//! Data goes to standard output, everything else to standard error, so that output can be piped.
//! Every failure becomes a [`Failure`] and is printed in one place, here.

mod collect;
mod failure;
mod follow;
mod frame;
mod http;
mod logs;
mod message;
mod module;
mod progress;
mod ps;
mod render;
mod repl;
mod rollback;
mod screen;
mod server;
mod service;
mod sse;
mod stdout;
mod submit;
mod units;

use std::process::ExitCode;

use clap::Subcommand;

use failure::{Exit, Failure};

/// What the command line can ask of a running server.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Send code, watch it being tested and deployed
    #[command(after_help = submit::AFTER_HELP)]
    Submit(Box<submit::SubmitArgs>),
    /// Show what happened: search the logs, or follow them with -f
    Logs(logs::LogsArgs),
    /// List the repls: what is deployed, and how it is
    Ps(ps::PsArgs),
    /// Make an earlier release of a repl serve again
    Rollback(rollback::RollbackArgs),
    /// What a repl runs with: its replicas, variables and domains
    #[command(subcommand)]
    Repl(repl::ReplCommand),
    /// Python modules: any function of them is called over gRPC, each in a pod of its own
    #[command(subcommand)]
    Module(module::ModuleCommand),
    /// Services: images run with N replicas, kept at N when nodes die
    #[command(subcommand)]
    Service(service::ServiceCommand),
}

/// Does what was asked. The exit code says how it went; what went wrong is already on standard
/// error.
pub async fn run(command: Command) -> anyhow::Result<ExitCode> {
    let ended = match command {
        Command::Submit(args) => submit::run(*args).await,
        Command::Logs(args) => logs::run(args).await,
        Command::Ps(args) => ps::run(args).await,
        Command::Rollback(args) => rollback::run(args).await,
        Command::Repl(command) => repl::run(command).await,
        Command::Module(command) => module::run(command).await,
        Command::Service(command) => service::run(command).await,
    };
    let exit = ended.unwrap_or_else(|failure: Failure| {
        eprint!(
            "{}",
            render::problem(&failure.problem, render::Style::stderr())
        );
        failure.exit
    });
    Ok(exit.into())
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}
