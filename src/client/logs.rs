//! `gantry logs`: what happened, searched or followed.

use std::collections::VecDeque;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use clap::{Args, ValueEnum};
use futures_util::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep, timeout};

use super::failure::{Exit, Failure, chain};
use super::http::{self, Api};
use super::render;
use super::server::ServerArgs;
use super::sse::SseReader;
use super::stdout::{self, Reader};
use super::units::parse_moment;
use crate::model::{ReplId, SubmissionId};

/// Most records in one answer; the server's own bound.
const MAX_PAGE: usize = 1_000;
/// Nothing received for this long is a dead stream: several of the server's keep-alive comments are
/// missing.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a lost server is waited for while following.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);
/// A connection that lived this long was a good one: the next loss is waited for anew.
const STABLE_AFTER: Duration = Duration::from_secs(3);
/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what happens from now on, until Ctrl+C
    #[arg(long, short)]
    follow: bool,

    /// Of this submission only
    #[arg(long, value_name = "ID")]
    submission: Option<SubmissionId>,

    /// Of this repl only
    #[arg(long, value_name = "NAME")]
    repl: Option<ReplId>,

    /// Of this step only: receive, sandbox, install, compile, test, publish, deploy, ready
    #[arg(long)]
    step: Option<String>,

    /// Of this level only: info, error, …
    #[arg(long)]
    level: Option<String>,

    /// Not older than this: 10m, 2h, 7d or 2026-01-31T12:00:00Z
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,

    /// Not newer than this
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,

    /// With these words in the message
    #[arg(long, short, value_name = "TEXT")]
    query: Option<String>,

    /// At most this many records
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 100,
          value_parser = clap::value_parser!(u16).range(1..=1_000))]
    limit: u16,

    /// How to print them
    #[arg(long, short, value_enum, default_value = "text")]
    output: Format,

    #[command(flatten)]
    server: ServerArgs,
}

/// One record: Elastic Common Schema with literal dotted names.
type LogRecord = Map<String, Value>;

#[derive(Deserialize)]
struct Page {
    records: Vec<LogRecord>,
    next: Option<String>,
}

fn moment(text: &str) -> Result<Timestamp, String> {
    parse_moment(text, Timestamp::now())
}

pub(super) async fn run(args: LogsArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let (records, next) = latest(&api, &args).await?;
    for record in &records {
        if print(record, args.output)? == Reader::Gone {
            return Ok(Exit::Done);
        }
    }
    if !args.follow {
        if records.is_empty() {
            eprintln!("nothing matches");
        }
        return Ok(Exit::Done);
    }
    tokio::select! {
        ended = follow(&api, &args, next) => ended,
        // Following has no end of its own: Ctrl+C is how it is meant to end.
        _ = tokio::signal::ctrl_c() => Ok(Exit::Interrupted),
    }
}

/// The last records that match, oldest first, and where what follows them begins.
async fn latest(
    api: &Api,
    args: &LogsArgs,
) -> Result<(VecDeque<LogRecord>, Option<String>), Failure> {
    let wanted = usize::from(args.limit);
    let mut records = VecDeque::new();
    let mut after: Option<String> = None;
    loop {
        let limit = if after.is_none() { wanted } else { MAX_PAGE };
        let mut query = filters(args)?;
        query.push(("limit", limit.to_string()));
        query.extend(after.clone().map(|cursor| ("after", cursor)));
        let page: Page = api.get("/logs", &query).await?;
        let full = page.records.len() >= limit;
        records.extend(page.records);
        records.drain(..records.len().saturating_sub(wanted));
        let moved = page.next.is_some() && page.next != after;
        after = page.next.or(after);
        if !full || !moved {
            return Ok((records, after));
        }
    }
}

fn filters(args: &LogsArgs) -> Result<Vec<(&'static str, String)>, Failure> {
    let fields = [
        ("user_id", args.server.user()?.map(String::from)),
        ("repl_id", args.repl.as_ref().map(ToString::to_string)),
        ("submission_id", args.submission.map(|id| id.to_string())),
        ("step", args.step.clone()),
        ("level", args.level.clone()),
        ("q", args.query.clone()),
        ("since", args.since.map(|time| time.to_string())),
        ("until", args.until.map(|time| time.to_string())),
    ];
    Ok(fields
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
        .collect())
}

/// Prints what happens, over as many connections as it takes; ends when nobody reads any more.
async fn follow(api: &Api, args: &LogsArgs, mut last: Option<String>) -> Result<Exit, Failure> {
    let backoff = ExponentialBuilder::default()
        .with_min_delay(PAUSES.0)
        .with_max_delay(PAUSES.1)
        .with_jitter()
        .without_max_times();
    let mut pauses = backoff.build();
    let mut give_up_at: Option<Instant> = None;
    loop {
        let (before, begun) = (last.clone(), Instant::now());
        let failure = match follow_once(api, args, &mut last).await {
            Ok(Reader::Gone) => return Ok(Exit::Done),
            Ok(Reader::Listening) => lost(api),
            Err(failure) if failure.passes => failure,
            Err(failure) => return Err(failure),
        };
        if last != before || begun.elapsed() > STABLE_AFTER {
            give_up_at = None;
            pauses = backoff.build();
        }
        let until = *give_up_at.get_or_insert_with(|| {
            eprintln!("connection lost; trying again");
            Instant::now() + GIVE_UP_AFTER
        });
        let pause = pauses.next().unwrap_or(PAUSES.1);
        if Instant::now() + pause > until {
            return Err(failure);
        }
        sleep(pause).await;
    }
}

fn lost(api: &Api) -> Failure {
    http::unreachable(
        api.address(),
        "the stream of records ends again and again".to_owned(),
    )
}

/// One connection; `Listening` when it was lost.
async fn follow_once(
    api: &Api,
    args: &LogsArgs,
    last: &mut Option<String>,
) -> Result<Reader, Failure> {
    let mut query = filters(args)?;
    query.extend(last.clone().map(|cursor| ("after", cursor)));
    let response = api.event_stream("/logs", &query, last.as_deref()).await?;
    let mut pieces = response.bytes_stream();
    let mut reader = SseReader::default();
    while let Ok(Some(Ok(piece))) = timeout(QUIET_TIMEOUT, pieces.next()).await {
        let events = reader
            .push(&piece)
            .map_err(|error| not_records(&chain(&error)))?;
        for event in events {
            if event.id.is_some() {
                last.clone_from(&event.id);
            }
            if event.name == "problem" {
                let problem = serde_json::from_str(&event.data)
                    .map_err(|error| not_records(&error.to_string()))?;
                let failure = Failure::new(Exit::Unavailable, problem);
                return Err(Failure {
                    passes: true,
                    ..failure
                });
            }
            if !event.name.is_empty() && event.name != "message" {
                continue;
            }
            let record: LogRecord = serde_json::from_str(&event.data)
                .map_err(|error| not_records(&error.to_string()))?;
            if print(&record, args.output)? == Reader::Gone {
                return Ok(Reader::Gone);
            }
        }
    }
    Ok(Reader::Listening)
}

fn not_records(cause: &str) -> Failure {
    Failure::new(
        Exit::Failed,
        crate::model::Problem::new(
            "not_understood",
            "the stream of records is not understood",
            cause,
            "Check that the server is Gantry, of the same version as this program.",
        ),
    )
}

fn print(record: &LogRecord, format: Format) -> Result<Reader, Failure> {
    let line = match format {
        Format::Json => serde_json::json!(record).to_string(),
        Format::Text => text(record),
    };
    stdout::write(format!("{line}\n").as_bytes())
}

/// `2026-01-31T12:00:00.000Z INFO  ada/shop 019… output.stdout  Hello`
fn text(record: &LogRecord) -> String {
    let field = |name: &str| record.get(name).and_then(Value::as_str).unwrap_or_default();
    let level = field("log.level").to_uppercase();
    let mut line = format!("{} {level:5} {}", field("@timestamp"), field("user.id"));
    if !field("gantry.repl_id").is_empty() {
        line.push('/');
        line.push_str(field("gantry.repl_id"));
    }
    for name in ["gantry.submission_id", "event.action"] {
        if !field(name).is_empty() {
            line.push(' ');
            line.push_str(field(name));
        }
    }
    let message = field("message").trim_end_matches('\n');
    let mut line = render::printable(&format!("{line}  "));
    for (index, part) in message.split('\n').enumerate() {
        if index > 0 {
            line.push_str("\n    ");
        }
        line.push_str(&render::printable(part.trim_end_matches('\r')));
    }
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_record_is_one_line_and_more_only_for_more_lines_of_output() {
        let record: LogRecord = serde_json::from_str(
            r#"{"@timestamp":"2026-01-31T12:00:00.123Z","log.level":"info","event.action":"output.stdout",
                "user.id":"ada","gantry.repl_id":"shop","message":"a\u001b[2J\nb\r\n"}"#,
        )
        .unwrap();
        assert_eq!(
            text(&record),
            "2026-01-31T12:00:00.123Z INFO  ada/shop output.stdout  a\\u{1b}[2J\n    b"
        );
        assert_eq!(text(&Map::new()), "");
    }
}
