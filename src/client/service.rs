//! `gantry service`: images run with N replicas, kept at N when nodes die.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use super::failure::{Exit, Failure};
use super::http::Api;
use super::render;
use super::server::ServerArgs;
use super::stdout;
use crate::model::{
    ServiceEvent, ServiceName, ServiceOutcome, ServiceState, ServiceStatus, UserId,
};

/// Largest file of services: as much as the server takes.
const MAX_FILE_BYTES: u64 = 64 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum ServiceCommand {
    /// Make the services of a file be as it says: {services: [{serviceName, replicas, container: {name, image}}]}
    Apply(ApplyArgs),
    /// List the services: how many of each run, and why not all
    Ls(ListArgs),
    /// Run more or fewer replicas of a service
    Scale(ScaleArgs),
    /// End a service and everything of it
    Rm(NamedArgs),
    /// Show what happened to a service: placed, started, node lost, rescheduled, recovered
    Events(EventsArgs),
}

#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The file, JSON or YAML; - is standard input
    #[arg(long, short, value_name = "FILE")]
    file: PathBuf,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// How to print them
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// The service
    name: ServiceName,
    /// How many replicas
    #[arg(allow_negative_numbers = true)]
    replicas: i64,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct NamedArgs {
    /// The service
    name: ServiceName,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The service
    name: ServiceName,
    /// How to print them
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(command: ServiceCommand) -> Result<Exit, Failure> {
    match command {
        ServiceCommand::Apply(args) => apply(args).await,
        ServiceCommand::Ls(args) => list(args).await,
        ServiceCommand::Scale(args) => scale(args).await,
        ServiceCommand::Rm(args) => remove(args).await,
        ServiceCommand::Events(args) => events(args).await,
    }
}

async fn apply(args: ApplyArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let mut body = read(&args.file)?;
    if let (Some(user), Some(map)) = (args.server.user()?, body.as_object_mut()) {
        map.insert("userId".to_owned(), user.as_str().into());
    }
    post(&api, &body).await
}

async fn scale(args: ScaleArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let owner = match args.server.user()? {
        Some(user) => user,
        None => owner(&api, &args.name).await?,
    };
    let service = json!({ "serviceName": args.name, "replicas": args.replicas });
    post(&api, &json!({ "services": [service], "userId": owner })).await
}

/// Whose service this is: an admin's key sees everybody's.
async fn owner(api: &Api, name: &ServiceName) -> Result<UserId, Failure> {
    #[derive(Deserialize)]
    struct Events {
        #[serde(rename = "userId")]
        user_id: UserId,
    }
    let Events { user_id } = api.get(&format!("/service/{name}/events"), &[]).await?;
    Ok(user_id)
}

async fn post(api: &Api, body: &Value) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct Applied {
        services: Vec<ServiceOutcome>,
    }
    let Applied { services } = api.post("/service", body).await?;
    let lines: String = services
        .iter()
        .map(|one| {
            format!(
                "{} {} replicas={}\n",
                one.service_name, one.outcome, one.replicas
            )
        })
        .collect();
    stdout::write(lines.as_bytes())?;
    Ok(Exit::Done)
}

async fn list(args: ListArgs) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct States {
        services: Vec<ServiceStatus>,
    }
    let api = args.server.api()?;
    let named = args.server.user()?;
    let States { mut services } = api.get("/service_state", &[]).await?;
    if let Some(user) = named {
        services.retain(|service| service.user_id == user);
    }
    let text = match args.output {
        Format::Json => json!(services).to_string(),
        Format::Table if services.is_empty() => {
            eprintln!("there are no services; `gantry service apply -f FILE` makes them");
            return Ok(Exit::Done);
        }
        Format::Table => service_table(&services),
    };
    stdout::write(format!("{text}\n").as_bytes())?;
    Ok(Exit::Done)
}

async fn remove(args: NamedArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let _: Value = api
        .delete(&format!("/service/{}", args.name), &query(&args.server)?)
        .await?;
    eprintln!("{} is being removed", args.name);
    Ok(Exit::Done)
}

async fn events(args: EventsArgs) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct Events {
        events: Vec<ServiceEvent>,
    }
    let api = args.server.api()?;
    let path = format!("/service/{}/events", args.name);
    let Events { events } = api.get(&path, &query(&args.server)?).await?;
    let text = match args.output {
        Format::Json => json!(events).to_string(),
        Format::Table => event_table(&events),
    };
    stdout::write(format!("{text}\n").as_bytes())?;
    Ok(Exit::Done)
}

fn query(server: &ServerArgs) -> Result<Vec<(&'static str, String)>, Failure> {
    let user = server.user()?;
    Ok(user
        .map(|user| ("userId", user.into()))
        .into_iter()
        .collect())
}

fn read(path: &Path) -> Result<Value, Failure> {
    let wrong = |cause: String| {
        Failure::usage(
            format!("{} cannot be used", path.display()),
            cause,
            "Name a JSON or YAML file such as {services: [{serviceName: shop, replicas: 3, container: {name: shop, image: 'nginxinc/nginx-unprivileged:1.27'}}]}.",
        )
    };
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text))
    };
    let bytes = read.map_err(|error| wrong(error.to_string()))?;
    if bytes as u64 > MAX_FILE_BYTES {
        return Err(wrong(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    // JSON is YAML, too.
    let body: Value = serde_saphyr::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if body.is_object() {
        Ok(body)
    } else {
        Err(wrong("it holds no object".to_owned()))
    }
}

fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(head);
    table
}

fn service_table(services: &[ServiceStatus]) -> String {
    let mut table = table(&["SERVICE", "USER", "STATE", "RUNNING", "IMAGE", "REASON"]);
    for service in services {
        let state = match service.state {
            ServiceState::InQueue => "in_queue",
            ServiceState::Running => "running",
            ServiceState::Completed => "completed",
            ServiceState::Failed => "failed",
        };
        table.add_row([
            service.service_name.to_string(),
            service.user_id.to_string(),
            state.to_owned(),
            format!("{}/{}", service.current_state, service.replicas),
            render::printable(&service.image),
            render::printable(service.reason.as_deref().unwrap_or_default()),
        ]);
    }
    table.trim_fmt()
}

fn event_table(events: &[ServiceEvent]) -> String {
    let mut table = table(&["TIME", "EVENT", "TOOK", "CONTAINER", "NODE", "WHAT"]);
    for event in events {
        // The word that the API has for it.
        let word = json!(event.event);
        table.add_row([
            time(event.time),
            word.as_str().unwrap_or_default().to_owned(),
            event.duration_ms.map(seconds).unwrap_or_default(),
            render::printable(event.container.as_deref().unwrap_or_default()),
            render::printable(event.node.as_deref().unwrap_or_default()),
            render::printable(&event.message),
        ]);
    }
    table.trim_fmt()
}

fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S%.3fZ").to_string()
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{} s", milliseconds / 1_000, milliseconds % 1_000 / 100)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_service_is_one_line_with_its_reason() {
        let services: Vec<ServiceStatus> = serde_json::from_str(
            r#"[{"serviceName":"shop","userId":"ada","replicas":12,"current_state":8,"state":"failed",
                "reason":"4 of its containers failed: its node node-2 is lost \u001b[2J","image":"shop:1"}]"#,
        )
        .unwrap();
        let text = service_table(&services);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        for part in [
            "shop",
            "ada",
            "failed",
            "8/12",
            "shop:1",
            "node-2 is lost \\u{1b}[2J",
        ] {
            assert!(lines[1].contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn the_timeline_tells_how_long_it_took() {
        let events: Vec<ServiceEvent> = serde_json::from_str(
            r#"[{"time":"2026-01-31T12:00:00.25Z","event":"node_lost","node":"node-2","message":"lost","duration_ms":7049}]"#,
        )
        .unwrap();
        let text = event_table(&events);
        for part in ["2026-01-31 12:00:00.250Z", "node_lost", "7.0 s", "node-2"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_file_is_json_or_yaml() {
        let dir = tempfile::tempdir().unwrap();
        let file = |text: &str| {
            let path = dir.path().join("services");
            std::fs::write(&path, text).unwrap();
            read(&path)
        };
        let wanted = json!({ "services": [{ "serviceName": "shop", "replicas": 3 }] });
        assert_eq!(file(&wanted.to_string()).unwrap(), wanted);
        assert_eq!(
            file("services:\n  - serviceName: shop\n    replicas: 3\n").unwrap(),
            wanted
        );
        for bad in ["", "[]", "{", &"x".repeat(70 << 10)] {
            assert_eq!(file(bad).unwrap_err().exit, Exit::Usage);
        }
    }
}
