//! `gantry rollback`: an earlier release serves again.

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::failure::{Exit, Failure};
use super::server::ServerArgs;
use super::stdout;
use crate::model::ReplId;

#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The repl
    repl: ReplId,

    /// The release's number; default: the last one before the current that served
    release: Option<u64>,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Deserialize)]
struct Running {
    release: u64,
    url: String,
}

pub(super) async fn run(args: RollbackArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let body = match args.release {
        Some(release) => json!({ "release": release }),
        None => json!({}),
    };
    let running: Running = api
        .post(&format!("/repls/{}/rollback", args.repl), &body)
        .await?;
    eprintln!("release {} of {} serves again", running.release, args.repl);
    stdout::write(format!("{}\n", running.url).as_bytes())?;
    Ok(Exit::Done)
}
