//! `gantry submit`: send code, watch it, say how it ended.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::failure::{Exit, Failure};
use super::follow::{End, Follower, View};
use super::message;
use super::render;
use super::screen::{Json, Screen};
use super::server::ServerArgs;
use super::typed;
use super::units::{parse_duration, parse_size};
use crate::model::{Language, Limits, LimitsRequest, ReplId, Status};

/// Shown below the options.
pub(super) const AFTER_HELP: &str = "\
Exit codes: 0 deployed or tests passed; 1 tests failed, deploy failed, cancelled or invalid; 2 wrong usage;
3 unavailable or the server cannot be reached; 130 after Ctrl+C, which cancels the submission.

The program's output goes to standard output and standard error, everything else to standard error.";

#[derive(Debug, Args)]
pub struct SubmitArgs {
    /// A source file, a folder, or - for standard input
    #[arg(value_name = "FILE|FOLDER|-")]
    pub(super) source: PathBuf,

    /// The language; default: by the file's extension
    #[arg(long, short, value_parser = parse_language)]
    pub(super) language: Option<&'static Language>,

    /// The file that is run; default: the file itself, or main.py, main.js, main.sh of a folder
    #[arg(long, value_name = "PATH")]
    pub(super) entrypoint: Option<String>,

    /// A JSON file of test cases, or a test file for the language's own runner; may be repeated
    #[arg(long, value_name = "FILE")]
    pub(super) tests: Vec<PathBuf>,

    /// The repl to deploy to; default: {user}-prod
    #[arg(long, value_name = "NAME")]
    pub(super) repl: Option<ReplId>,

    /// Test only
    #[arg(long)]
    pub(super) no_deploy: bool,

    /// Give the release no database
    #[arg(long)]
    pub(super) no_database: bool,

    /// The program is a worker: its release serves by running, and need not listen
    #[arg(long)]
    pub(super) worker: bool,

    /// What the program reads from standard input; - for this command's own
    #[arg(long, value_name = "FILE")]
    pub(super) stdin: Option<PathBuf>,

    /// Hand on what comes in on this command's own standard input while the program runs
    #[arg(long, short, conflicts_with = "tests")]
    pub(super) interactive: bool,

    /// An argument of the program; may be repeated
    #[arg(long = "arg", value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) args: Vec<String>,

    /// A variable of the program; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(super) env: Vec<(String, String)>,

    /// Print event frames and the reply as JSON lines, and nothing else, on standard output
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) limits: LimitArgs,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// What a run may use; what is left out is the server's default.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Limits of each run")]
pub struct LimitArgs {
    /// Wall-clock time, such as 30s
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    wall: Option<Duration>,

    /// Processor time of all its processes, such as 10s
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    cpu: Option<Duration>,

    /// Memory of all its processes, such as 256M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,

    /// Processes and threads at one time
    #[arg(long, value_name = "COUNT")]
    processes: Option<u64>,

    /// Size of one file it writes, such as 32M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    file_size: Option<u64>,

    /// Size of its output, such as 4M
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    output_size: Option<u64>,
}

impl LimitArgs {
    /// As the message carries them.
    pub(super) fn request(&self) -> LimitsRequest {
        let ms = |time: Option<Duration>| {
            time.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
        };
        LimitsRequest {
            wall_ms: ms(self.wall),
            cpu_ms: ms(self.cpu),
            memory_bytes: self.memory,
            processes: self.processes,
            file_bytes: self.file_size,
            output_bytes: self.output_size,
        }
    }

    /// What they come to; for words about a limit that was met.
    fn resolved(&self) -> Limits {
        self.request()
            .resolve(&Limits::MAXIMUM)
            .unwrap_or(Limits::DEFAULT)
    }
}

fn parse_language(name: &str) -> Result<&'static Language, String> {
    Language::named(name).ok_or_else(|| format!("known are {}", Language::names()))
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

pub(super) async fn run(args: SubmitArgs) -> Result<Exit, Failure> {
    let program = message::gather(&args)?;
    for left_out in &program.left_out {
        eprintln!("left out {}", render::printable(left_out));
    }
    let api = args.server.api()?;
    let user = args.server.acting_user(&api).await?;
    let message = message::compose(&args, program, &user)?;
    let typed = args.interactive.then(typed::read);
    if args.json {
        follow(Follower::new(&api, message, Json::new())?.with_input(typed)).await
    } else {
        let screen = Screen::new(args.limits.resolved());
        follow(Follower::new(&api, message, screen)?.with_input(typed)).await
    }
}

async fn follow<V: View>(follower: Follower<'_, V>) -> Result<Exit, Failure> {
    Ok(match follower.run().await? {
        End::Interrupted => Exit::Interrupted,
        End::Replied(status) => exit_of(status),
    })
}

fn exit_of(status: Status) -> Exit {
    match status {
        Status::Deployed | Status::TestsPassed => Exit::Done,
        Status::TestsFailed
        | Status::DeployFailed
        | Status::Superseded
        | Status::Invalid
        | Status::Cancelled => Exit::Failed,
        Status::Unavailable => Exit::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pass_exits_with_0() {
        use Status::*;
        let all = [
            Deployed,
            TestsPassed,
            TestsFailed,
            DeployFailed,
            Superseded,
            Cancelled,
            Invalid,
            Unavailable,
        ];
        assert_eq!(
            all.map(|status| exit_of(status) as u8),
            [0, 0, 1, 1, 1, 1, 1, 3]
        );
    }

    #[test]
    fn variables_may_hold_an_equals_sign() {
        assert_eq!(
            parse_variable("A=b=c"),
            Ok(("A".to_owned(), "b=c".to_owned()))
        );
        assert!(parse_variable("=x").is_err() && parse_variable("A").is_err());
    }
}
