//! `gantry ps`: what is deployed, and how it is.

use clap::{Args, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use serde::Deserialize;

use super::failure::{Exit, Failure};
use super::render;
use super::server::ServerArgs;
use super::stdout;
use crate::model::ReplStatus;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct PsArgs {
    /// How to print them
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Deserialize)]
struct Repls {
    repls: Vec<ReplStatus>,
}

pub(super) async fn run(args: PsArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let named = args.server.user()?;
    let Repls { mut repls } = api.get("/repls", &[]).await?;
    if let Some(user) = named {
        repls.retain(|repl| repl.user_id == user);
    }
    let text = match args.output {
        Format::Json => serde_json::json!(repls).to_string(),
        Format::Table if repls.is_empty() => {
            eprintln!("nothing is deployed; `gantry submit FILE` deploys");
            return Ok(Exit::Done);
        }
        Format::Table => table(&repls, Timestamp::now()),
    };
    stdout::write(format!("{text}\n").as_bytes())?;
    Ok(Exit::Done)
}

fn table(repls: &[ReplStatus], now: Timestamp) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header([
        "REPL", "USER", "STATE", "READY", "RELEASE", "RESTARTS", "AGE", "URL", "CAUSE",
    ]);
    for repl in repls {
        let why = repl.last_error.as_deref().or(repl.cause.as_deref());
        let why = why.unwrap_or_default();
        table.add_row([
            repl.repl_id.to_string(),
            repl.user_id.to_string(),
            String::from(repl.state),
            format!("{}/{}", repl.ready, repl.replicas),
            repl.release
                .map(|release| release.to_string())
                .unwrap_or_default(),
            repl.restarts.to_string(),
            age(now, repl.since),
            render::printable(&repl.url),
            render::printable(why.lines().last().unwrap_or_default()),
        ]);
    }
    table.trim_fmt()
}

/// Since when it is in its state, in the largest unit: `4 s`, `12 m`, `3 h`, `9 d`.
fn age(now: Timestamp, since: Timestamp) -> String {
    let seconds = now.duration_since(since).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} m", seconds / 60),
        3_600..86_400 => format!("{} h", seconds / 3_600),
        _ => format!("{} d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_table_shows_one_line_a_repl() {
        let repls: Vec<ReplStatus> = serde_json::from_str(
            r#"[{"replId":"shop","userId":"ada","state":"crashed","ready":0,"replicas":1,"restarts":4,
                "url":"http://shop.apps.localhost:8000/","release":7,"last_error":"Traceback\nValueError: \u001b[2J",
                "since":"2026-01-31T11:00:00Z"},
               {"replId":"test-prod","userId":"test","state":"exited(0)","ready":1,"replicas":1,"restarts":0,
                "url":"http://test-prod.apps.localhost:8000/","since":"2026-01-31T11:59:30Z"},
               {"replId":"quiet","userId":"ada","state":"idle","ready":0,"replicas":0,"restarts":0,
                "cause":"stopped: idle since then","url":"http://quiet.apps.localhost:8000/","since":"2026-01-31T11:59:30Z"}]"#,
        )
        .unwrap();
        let text = table(&repls, "2026-01-31T12:00:00Z".parse().unwrap());
        let lines: Vec<Vec<&str>> = text
            .lines()
            .map(|line| {
                line.split("  ")
                    .map(str::trim)
                    .filter(|cell| !cell.is_empty())
                    .collect()
            })
            .collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert_eq!(lines[3].first(), Some(&"quiet"));
        assert_eq!(lines[3].get(2), Some(&"idle"));
        assert_eq!(lines[3].last(), Some(&"stopped: idle since then"));
        assert_eq!(
            lines[1],
            [
                "shop",
                "ada",
                "crashed",
                "0/1",
                "7",
                "4",
                "1 h",
                "http://shop.apps.localhost:8000/",
                "ValueError: \\u{1b}[2J"
            ]
        );
        assert_eq!(lines[2][..3], ["test-prod", "test", "exited(0)"]);
    }
}
