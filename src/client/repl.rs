//! `gantry repl`: what a repl runs with.

use std::collections::BTreeMap;
use std::io::{BufRead, Read};

use clap::{Args, Subcommand};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::failure::{Exit, Failure};
use super::http::Api;
use super::render;
use super::server::ServerArgs;
use super::stdout;
use crate::model::{ReplData, ReplId};

/// Largest file with a secret: as much as all variables of a repl together may have.
const MAX_SECRET_BYTES: u64 = 64 << 10;

#[derive(Debug, Subcommand)]
pub enum ReplCommand {
    /// Run more or fewer replicas, or let their processor time decide (in a cluster)
    Scale(ScaleArgs),
    /// Show a repl's own domains, or change them; a new one has to be proved by a TXT record
    Domains(DomainsArgs),
    /// Delete a repl for good: it is stopped, its files, releases, variables and data are removed, and its name is free
    #[command(alias = "release")]
    Delete(DeleteArgs),
    /// Show the variables, or change some of them; what runs is started anew with them
    Env(EnvArgs),
    /// Show how much a repl keeps beside its code, such as its database, or delete it for good
    Data(DataArgs),
}

#[derive(Debug, Args)]
pub struct DataArgs {
    /// The repl
    repl: ReplId,
    /// Deletes it, for good; the repl has to be stopped
    #[arg(long)]
    delete: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// The repl
    repl: ReplId,
    /// How many replicas
    #[arg(required_unless_present = "max", conflicts_with = "max")]
    replicas: Option<i64>,
    /// At least so many [default: 1]
    #[arg(long, value_name = "NUMBER", requires = "max")]
    min: Option<i64>,
    /// At most so many
    #[arg(long, value_name = "NUMBER", requires = "cpu_percent")]
    max: Option<i64>,
    /// Percent of the processor time a replica requests that they come near on average
    #[arg(long, value_name = "NUMBER", requires = "max")]
    cpu_percent: Option<i64>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct EnvArgs {
    /// The repl
    repl: ReplId,
    /// Sets a variable that is shown
    #[arg(long = "set", value_name = "NAME=VALUE")]
    set: Vec<String>,
    /// Sets a variable that is never shown again, from a file; - is standard input
    #[arg(long = "secret", value_name = "NAME=FILE")]
    secret: Vec<String>,
    /// Removes a variable of either kind
    #[arg(long = "unset", value_name = "NAME")]
    unset: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The repl
    repl: ReplId,
    /// Do not ask. Without it, the command says what it would delete, and asks for the repl's name
    #[arg(long)]
    yes: bool,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct DomainsArgs {
    /// The repl
    repl: ReplId,
    /// Adds a domain
    #[arg(long = "add", value_name = "NAME")]
    add: Vec<String>,
    /// Removes a domain
    #[arg(long = "remove", value_name = "NAME")]
    remove: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Deserialize)]
struct Domains {
    domains: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Variables {
    env: BTreeMap<String, String>,
    secrets: Vec<String>,
}

pub(super) async fn run(command: ReplCommand) -> Result<Exit, Failure> {
    match command {
        ReplCommand::Scale(args) => scale(args).await,
        ReplCommand::Env(args) => env(args).await,
        ReplCommand::Domains(args) => domains(args).await,
        ReplCommand::Data(args) => data(args).await,
        ReplCommand::Delete(args) => delete(args).await,
    }
}

async fn data(args: DataArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = format!("/repls/{}/data", args.repl);
    if args.delete {
        let _: ReplData = api.delete(&path, &[]).await?;
        eprintln!("the data of {} are deleted", args.repl);
        return Ok(Exit::Done);
    }
    let data: ReplData = api.get(&path, &[]).await?;
    stdout::write(told(&data).as_bytes())?;
    Ok(Exit::Done)
}

fn told(data: &ReplData) -> String {
    let line = |whose: &str, bytes: Option<u64>, most: Option<u64>| {
        let bytes = bytes.map_or("unknown".to_owned(), |bytes| format!("{bytes} bytes"));
        let most = most.map_or(String::new(), |most| format!(" of at most {most}"));
        format!("{whose}: {bytes}{most}\n")
    };
    let own = line("data", data.bytes, data.limit_bytes);
    match data.user_bytes {
        None => own,
        of_user => {
            own + &line(
                "all of its user's data and code",
                of_user,
                data.user_limit_bytes,
            )
        }
    }
}

async fn scale(args: ScaleArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let fields = [
        ("replicas", args.replicas),
        ("min", args.min),
        ("max", args.max),
        ("cpu_percent", args.cpu_percent),
    ];
    let fields = fields.into_iter();
    let body: Map<String, Value> = fields
        .filter_map(|(name, value)| Some((name.to_owned(), value?.into())))
        .collect();
    let path = format!("/repls/{}/scale", args.repl);
    let _: Value = api.post(&path, &Value::Object(body)).await?;
    match args.replicas {
        Some(replicas) => eprintln!("{} has {replicas} replicas", args.repl),
        None => eprintln!("{} has as many replicas as it needs", args.repl),
    }
    Ok(Exit::Done)
}

async fn delete(args: DeleteArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = format!("/repls/{}", args.repl);
    if !args.yes {
        // Without a confirmation the server only says what would be deleted.
        let told: Result<Value, Failure> = api.delete(&path, &[]).await;
        match told {
            Err(failure) if failure.problem.code == "not_confirmed" => {
                let cause = render::printable(&failure.problem.cause);
                eprint!("{cause}\nType {} to delete it: ", args.repl);
            }
            Err(failure) => return Err(failure),
            Ok(_) => {
                eprintln!("{} is deleted", args.repl);
                return Ok(Exit::Done);
            }
        }
        let mut typed = String::new();
        let read = std::io::stdin().lock().take(1 << 10).read_line(&mut typed);
        if read.is_err() || typed.trim() != args.repl.as_str() {
            return Err(Failure::usage(
                format!("{} is not deleted", args.repl),
                "its name was not typed",
                "Type the name, or give --yes.",
            ));
        }
    }
    let confirmed = [("confirm", args.repl.to_string())];
    let _: Value = api.delete(&path, &confirmed).await?;
    eprintln!("{} is deleted; its name is free", args.repl);
    Ok(Exit::Done)
}

async fn domains(args: DomainsArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = format!("/repls/{}/domains", args.repl);
    let mut now: Domains = api.get(&path, &[]).await?;
    if !(args.add.is_empty() && args.remove.is_empty()) {
        now.domains.retain(|name| !args.remove.contains(name));
        now.domains.extend(args.add);
        now = api.put(&path, &json!({ "domains": now.domains })).await?;
    }
    let lines: String = now.domains.iter().map(|name| format!("{name}\n")).collect();
    stdout::write(lines.as_bytes())?;
    Ok(Exit::Done)
}

async fn env(args: EnvArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = format!("/repls/{}/env", args.repl);
    let before: Variables = api.get(&path, &[]).await?;
    let changes = !(args.set.is_empty() && args.secret.is_empty() && args.unset.is_empty());
    let now = match changes {
        true => change(&api, &path, before, &args).await?,
        false => before,
    };
    stdout::write(shown(&now).as_bytes())?;
    Ok(Exit::Done)
}

async fn change(
    api: &Api,
    path: &str,
    before: Variables,
    args: &EnvArgs,
) -> Result<Variables, Failure> {
    let set = args.set.iter().map(|text| pair(text, "--set"));
    let set = set.collect::<Result<Vec<_>, Failure>>()?;
    let secret = args.secret.iter().map(|text| {
        let (name, file) = pair(text, "--secret")?;
        Ok((name, read(&file)?))
    });
    let secret = secret.collect::<Result<Vec<_>, Failure>>()?;
    api.put(path, &changed(before, set, secret, &args.unset))
        .await
}

/// The whole of what is to be: secrets that stay are null, because their values are not known here.
fn changed(
    before: Variables,
    set: Vec<(String, String)>,
    secret: Vec<(String, String)>,
    unset: &[String],
) -> Value {
    let mut env = before.env;
    let mut secrets: BTreeMap<String, Option<String>> = before
        .secrets
        .into_iter()
        .map(|name| (name, None))
        .collect();
    for name in unset {
        env.remove(name);
        secrets.remove(name);
    }
    for (name, value) in set {
        secrets.remove(&name);
        env.insert(name, value);
    }
    for (name, value) in secret {
        env.remove(&name);
        secrets.insert(name, Some(value));
    }
    json!({ "env": env, "secrets": secrets })
}

fn pair(text: &str, option: &str) -> Result<(String, String), Failure> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    let pair = pair.map(|(name, value)| (name.to_owned(), value.to_owned()));
    pair.ok_or_else(|| {
        Failure::usage(
            format!("{option} cannot be used"),
            "it has no name before a =",
            "Write it as NAME=VALUE, or NAME=FILE for a secret.",
        )
    })
}

/// A secret's value. One line's end at its end is the editor's.
fn read(file: &str) -> Result<String, Failure> {
    let wrong = |cause: String| {
        Failure::usage(
            format!("the secret in {file} cannot be used"),
            cause,
            "Name a file with the value alone, or - for standard input.",
        )
    };
    let mut text = String::new();
    let read = match file {
        "-" => std::io::stdin()
            .lock()
            .take(MAX_SECRET_BYTES + 1)
            .read_to_string(&mut text),
        _ => std::fs::File::open(file)
            .and_then(|file| file.take(MAX_SECRET_BYTES + 1).read_to_string(&mut text)),
    };
    let bytes = read.map_err(|error| wrong(error.to_string()))?;
    if bytes as u64 > MAX_SECRET_BYTES {
        return Err(wrong(format!("it is longer than {MAX_SECRET_BYTES} bytes")));
    }
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

fn shown(variables: &Variables) -> String {
    let env = variables.env.iter();
    let env = env.map(|(name, value)| format!("{name}={}\n", render::printable(value)));
    let secrets = variables.secrets.iter();
    env.chain(secrets.map(|name| format!("{name} (secret)\n")))
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_change_keeps_what_it_does_not_name() {
        let before = Variables {
            env: BTreeMap::from([
                ("A".to_owned(), "1".to_owned()),
                ("B".to_owned(), "2".to_owned()),
            ]),
            secrets: vec!["S".to_owned(), "T".to_owned()],
        };
        let named = |name: &str, value: &str| vec![(name.to_owned(), value.to_owned())];
        let body = changed(
            before,
            named("T", "plain"),
            named("B", "hush"),
            &["A".to_owned()],
        );
        let expected = json!({ "env": { "T": "plain" }, "secrets": { "B": "hush", "S": null } });
        assert_eq!(body, expected);
    }

    #[test]
    fn what_is_not_known_of_data_is_not_made_up() {
        let mut data = ReplData {
            limit_bytes: Some(9),
            ..ReplData::default()
        };
        assert_eq!(told(&data), "data: unknown of at most 9\n");
        (data.bytes, data.user_bytes) = (Some(1), Some(2));
        let expected = "data: 1 bytes of at most 9\nall of its user's data and code: 2 bytes\n";
        assert_eq!(told(&data), expected);
    }

    #[test]
    fn a_secret_comes_from_a_file_and_what_is_shown_is_printable() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        std::fs::write(&file, "hush\n").unwrap();
        assert_eq!(read(file.to_str().unwrap()).unwrap(), "hush");
        std::fs::write(&file, vec![b'x'; 70 << 10]).unwrap();
        for bad in [file.to_str().unwrap(), "/nowhere"] {
            assert_eq!(read(bad).unwrap_err().exit, Exit::Usage);
        }
        assert_eq!(pair("=x", "--set").unwrap_err().exit, Exit::Usage);
        let variables = Variables {
            env: BTreeMap::from([("A".to_owned(), "\u{1b}[2J".to_owned())]),
            secrets: vec!["S".to_owned()],
        };
        assert_eq!(shown(&variables), "A=\\u{1b}[2J\nS (secret)\n");
    }
}
