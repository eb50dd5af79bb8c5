//! The command line's side of the protocol: `gantry submit`, `logs`, `ps`, `start`, `stop`, `restart`, `shell`,
//! `repl`, `rollback`, `service` and `module`.
//!
//! Data goes to standard output, everything else to standard error, so that output can be piped.
//! Every failure becomes a [`Failure`] and is printed in one place, here.

mod collect;
mod connection;
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
mod shell;
mod sse;
mod start;
mod stdout;
mod submit;
mod typed;
mod unacknowledged;
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
    /// Start a repl from its current files
    Start(start::StartArgs),
    /// Stop a repl; its files stay in the code store
    Stop(start::ReplArgs),
    /// End the program of a repl and start it again
    Restart(start::ReplArgs),
    /// Open a terminal in a repl
    #[command(after_help = shell::AFTER_HELP)]
    Shell(shell::ShellArgs),
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
        Command::Start(args) => start::start(args).await,
        Command::Stop(args) => start::stop(args).await,
        Command::Restart(args) => start::restart(args).await,
        // A shell's exit code is its own.
        Command::Shell(args) => return Ok(shell::run(args).await.unwrap_or_else(said)),
        Command::Rollback(args) => rollback::run(args).await,
        Command::Repl(command) => repl::run(command).await,
        Command::Module(command) => module::run(command).await,
        Command::Service(command) => service::run(command).await,
    };
    Ok(ended.map_or_else(said, ExitCode::from))
}

/// Says why it was not done.
fn said(failure: Failure) -> ExitCode {
    let style = render::Style::stderr();
    eprint!("{}", render::problem(&failure.problem, style));
    failure.exit.into()
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}
