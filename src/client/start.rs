//! `gantry start`, `stop` and `restart`: a repl's workspace, and the program in it.

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::failure::{Exit, Failure};
use super::http::Api;
use super::server::ServerArgs;
use super::shell;
use super::stdout;
use crate::model::{ReplId, UserId};

#[derive(Debug, Args)]
pub struct StartArgs {
    /// The repl
    repl: ReplId,

    /// What it is written in; default: the language whose entrypoint is among its files
    #[arg(long, short)]
    language: Option<String>,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ReplArgs {
    /// The repl
    repl: ReplId,

    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn start(args: StartArgs) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Started {
        pod_created: bool,
        url: String,
    }
    let api = args.server.api()?;
    let user = match args.server.user()? {
        Some(user) => user,
        None => match owner(&api, &args.repl).await? {
            Some(owner) => owner,
            None => args.server.acting_user(&api).await?,
        },
    };
    let mut body = json!({ "replId": args.repl, "userId": user });
    if let Some(language) = args.language {
        body["language"] = language.into();
    }
    let started: Started = api.post("/start", &body).await?;
    let how = if started.pod_created {
        "is started"
    } else {
        "was running"
    };
    eprintln!("{} {how}", args.repl);
    stdout::write(format!("{}\n", started.url).as_bytes())?;
    Ok(Exit::Done)
}

/// Whose repl this is, when it is there: an admin's key starts everybody's.
async fn owner(api: &Api, repl: &ReplId) -> Result<Option<UserId>, Failure> {
    #[derive(Deserialize)]
    struct Owned {
        #[serde(rename = "userId")]
        user_id: UserId,
    }
    match api.get::<Owned>(&format!("/repls/{repl}"), &[]).await {
        Ok(Owned { user_id }) => Ok(Some(user_id)),
        Err(failure) if failure.problem.code == "not_found" => Ok(None),
        Err(failure) => Err(failure),
    }
}

pub(super) async fn stop(args: ReplArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let _: Value = api.post("/stop", &json!({ "replId": args.repl })).await?;
    eprintln!("{} is stopped", args.repl);
    Ok(Exit::Done)
}

pub(super) async fn restart(args: ReplArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    shell::ask(&api, &args.repl, json!({ "op": "program.restart" })).await?;
    eprintln!("the program of {} is started again", args.repl);
    Ok(Exit::Done)
}
