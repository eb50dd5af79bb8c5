//! The server's own log: JSON lines in the data folder, readable lines on the terminal.
//!
//! A failure is logged once, where it is handled, with its ids as fields.
//!
//! # What is never logged
//!
//! - keys, session cookies, tickets, sign-in tokens: only a key's public id
//! - request bodies, query strings and headers other than `Host` and `Origin`
//! - code, files, standard input and program output: they are in the journal, under their owner
//! - values of environment variables, a submission's or the server's

use std::io::IsTerminal;
use std::path::Path;

use anyhow::Context;
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// Days of log kept: two weeks answer "since when", and the folder stays bounded.
const MAX_FILES: usize = 14;

/// Lines waiting for the disk; more are dropped and counted rather than slowing a submission.
const BUFFERED_LINES: usize = 8_192;

/// Starts logging into `folder`. Lines are written until the guard is dropped.
pub fn start(folder: &Path, filter: &str) -> anyhow::Result<WorkerGuard> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make the log folder {}", folder.display()))?;
    let file = RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix("gantry")
        .filename_suffix("jsonl")
        .max_log_files(MAX_FILES)
        .build(folder)
        .with_context(|| format!("cannot write logs into {}", folder.display()))?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(BUFFERED_LINES)
        .finish(file);
    let json = tracing_subscriber::fmt::layer()
        .json()
        .flatten_event(true)
        .with_writer(writer)
        .with_filter(parse_filter(filter)?);
    let terminal = tracing_subscriber::fmt::layer()
        .compact()
        .with_target(false)
        .with_ansi(wants_colour())
        .with_writer(std::io::stderr)
        .with_filter(parse_filter(filter)?);
    tracing_subscriber::registry()
        .with(json)
        .with(terminal)
        .try_init()
        .context("logging was started twice")?;
    Ok(guard)
}

/// The filter of `GANTRY_LOG`, or what is wrong with it.
pub fn parse_filter(filter: &str) -> anyhow::Result<EnvFilter> {
    EnvFilter::builder()
        .parse(filter)
        .with_context(|| format!("{filter:?} is not a log filter"))
}

fn wants_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused && std::io::stderr().is_terminal()
}
