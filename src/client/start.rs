//! `gantry start`, `stop` and `restart`: a repl's workspace, and the program in it.

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::failure::{Exit, Failure};
use super::http::Api;
use super::render;
use super::server::ServerArgs;
use super::shell;
use super::stdout;
use crate::model::{Problem, ReplId, Unsaved, UserId};

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
    let stopped: Stopped = api.post("/stop", &json!({ "replId": args.repl })).await?;
    eprint!("{} is stopped\n{}", args.repl, stopped.told());
    Ok(Exit::Done)
}

/// The files of a workspace that could not be saved.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Stopped {
    #[serde(default)]
    unsaved: Vec<Unsaved>,
    #[serde(default)]
    unsaved_more: usize,
    #[serde(default, rename = "saveError")]
    problem: Option<Problem>,
}

impl Stopped {
    /// The same in lines.
    pub(super) fn told(&self) -> String {
        let unsaved = self.unsaved.iter();
        let mut told: String = unsaved
            .map(|one| {
                let path = render::printable(&one.path);
                format!("not kept: {path}: {}\n", render::printable(&one.reason))
            })
            .collect();
        if self.unsaved_more > 0 {
            told += &format!("not kept: {} more\n", self.unsaved_more);
        }
        if let Some(problem) = &self.problem {
            let problem = render::printable(&problem.to_string()).to_string();
            told += &format!("the last changes were not saved: {problem}\n");
        }
        told
    }
}

pub(super) async fn restart(args: ReplArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    shell::ask(&api, &args.repl, json!({ "op": "program.restart" })).await?;
    eprintln!("the program of {} is started again", args.repl);
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_kept_is_told_in_lines_and_printable() {
        assert_eq!(Stopped::default().told(), "");
        let stopped: Stopped = serde_json::from_value(json!({
            "success": true, "unsaved_more": 2,
            "unsaved": [{ "path": "a\u{1b}", "reason": "it is large" }],
            "saveError": { "code": "c", "message": "m", "cause": "why", "remediation": "r" },
        }))
        .unwrap_or_default();
        let expected = "not kept: a\\u{1b}: it is large\nnot kept: 2 more\n\
                        the last changes were not saved: m: why\n";
        assert_eq!(stopped.told(), expected);
    }
}
