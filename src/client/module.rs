//! `gantry module`: a pod for a Python module, and calls of its functions.

use clap::{Args, Subcommand, ValueEnum};
use comfy_table::{ContentArrangement, Table, presets};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::failure::{Exit, Failure};
use super::http::Api;
use super::render;
use super::server::ServerArgs;
use super::stdout;
use crate::model::{ModuleName, ModuleState, ModuleStatus};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum ModuleCommand {
    /// Start a pod that serves a module; again: the same pod
    Create(CreateArgs),
    /// List the modules that have pods, and how they are; or the functions of one
    Ls(ListArgs),
    /// Call a function, such as `numpy.array 16 20 24` or `math.sqrt 2`
    Call(CallArgs),
    /// Have a module served by more or fewer pods
    Scale(ScaleArgs),
    /// Remove a module's pods
    Rm(NamedArgs),
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    /// The module, such as numpy
    module: ModuleName,
    /// A package to install for it, name==version; may be given several times
    #[arg(long = "package", value_name = "NAME==VERSION")]
    packages: Vec<String>,
    /// How many pods
    #[arg(long)]
    replicas: Option<u32>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    /// Its functions; without it: all modules
    module: Option<ModuleName>,
    /// A part of the module, such as linalg
    #[arg(long, default_value = "", requires = "module")]
    namespace: String,
    /// How to print them
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct CallArgs {
    /// The module and the function, such as numpy.linalg.norm. A module with a dot in its name: --module
    function: String,
    /// Arguments, each of which is JSON; what is no JSON is text
    #[arg(allow_negative_numbers = true)]
    arguments: Vec<String>,
    /// A named argument, NAME=JSON; may be given several times
    #[arg(long = "kwarg", short = 'k', value_name = "NAME=VALUE")]
    named: Vec<String>,
    /// The module, when its name has a dot; the function is what is below it then
    #[arg(long)]
    module: Option<ModuleName>,
    /// Longest time it may run, in milliseconds [default: 10000]
    #[arg(long, value_name = "MILLISECONDS")]
    timeout: Option<u64>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// The module
    module: ModuleName,
    /// How many pods
    replicas: u32,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub struct NamedArgs {
    /// The module
    module: ModuleName,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(command: ModuleCommand) -> Result<Exit, Failure> {
    match command {
        ModuleCommand::Create(args) => create(args).await,
        ModuleCommand::Ls(args) => match &args.module {
            Some(module) => functions(&args, module).await,
            None => list(&args).await,
        },
        ModuleCommand::Call(args) => call(args).await,
        ModuleCommand::Scale(args) => scale(args).await,
        ModuleCommand::Rm(args) => remove(args).await,
    }
}

/// A path with the user in its query, when one was named.
fn with_user(path: String, server: &ServerArgs) -> Result<String, Failure> {
    Ok(match server.user()? {
        Some(user) => {
            let joint = if path.contains('?') { '&' } else { '?' };
            format!("{path}{joint}userId={user}")
        }
        None => path,
    })
}

async fn create(args: CreateArgs) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct Created {
        #[serde(rename = "podCreated")]
        created: bool,
        #[serde(flatten)]
        status: ModuleStatus,
    }
    let api = args.server.api()?;
    let mut body = Map::new();
    if !args.packages.is_empty() {
        body.insert("packages".to_owned(), json!(args.packages));
    }
    if let Some(replicas) = args.replicas {
        body.insert("replicas".to_owned(), replicas.into());
    }
    let path = with_user(format!("/create_pod/{}", args.module), &args.server)?;
    let Created { created, status } = api.post(&path, &Value::Object(body)).await?;
    let word = if created { "created" } else { "unchanged" };
    let line = format!(
        "{} {word} {}/{}\n",
        status.module, status.ready, status.replicas
    );
    stdout::write(line.as_bytes())?;
    Ok(Exit::Done)
}

async fn list(args: &ListArgs) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct List {
        modules: Vec<ModuleStatus>,
    }
    let api = args.server.api()?;
    let named = args.server.user()?;
    let List { mut modules } = api.get("/modules", &[]).await?;
    if let Some(user) = named {
        modules.retain(|module| module.user_id == user);
    }
    let text = match args.output {
        Format::Json => json!(modules).to_string(),
        Format::Table if modules.is_empty() => {
            eprintln!("there are no modules; `gantry module create NAME` makes one");
            return Ok(Exit::Done);
        }
        Format::Table => module_table(&modules),
    };
    stdout::write(format!("{text}\n").as_bytes())?;
    Ok(Exit::Done)
}

async fn functions(args: &ListArgs, module: &ModuleName) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = with_user(format!("/modules/{module}"), &args.server)?;
    let query = [("namespace", args.namespace.clone())];
    let described: Value = api.get(&path, &query).await?;
    let text = match args.output {
        Format::Json => described.to_string(),
        Format::Table => function_table(&described),
    };
    stdout::write(format!("{text}\n").as_bytes())?;
    Ok(Exit::Done)
}

async fn call(args: CallArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let (module, method) = target(args.module.as_ref(), &args.function)?;
    let path = with_user(
        format!("/run_module?module_name={module}&method_name={method}"),
        &args.server,
    )?;
    let mut body = json!({
        "args": args.arguments.iter().map(|text| value(text)).collect::<Vec<Value>>(),
        "kwargs": named(&args.named)?,
    });
    if let Some(timeout) = args.timeout {
        body["timeout_ms"] = timeout.into();
    }
    called(&api, &path, &body).await
}

async fn called(api: &Api, path: &str, body: &Value) -> Result<Exit, Failure> {
    #[derive(Deserialize)]
    struct Returned {
        result: Value,
        called_with: Option<String>,
    }
    let Returned {
        result,
        called_with,
    } = api.post(path, body).await?;
    if called_with.is_some() {
        eprintln!("the arguments were passed as one list");
    }
    stdout::write(format!("{result}\n").as_bytes())?;
    Ok(Exit::Done)
}

async fn scale(args: ScaleArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = with_user(format!("/modules/{}/scale", args.module), &args.server)?;
    let body = json!({ "replicas": args.replicas });
    let status: ModuleStatus = api.post(&path, &body).await?;
    let line = format!("{} {}/{}\n", status.module, status.ready, status.replicas);
    stdout::write(line.as_bytes())?;
    Ok(Exit::Done)
}

async fn remove(args: NamedArgs) -> Result<Exit, Failure> {
    let api = args.server.api()?;
    let path = with_user(format!("/pod/{}", args.module), &args.server)?;
    let _: Value = api.delete(&path, &[]).await?;
    eprintln!("{} is removed", args.module);
    Ok(Exit::Done)
}

/// The module and what is called in it.
fn target(module: Option<&ModuleName>, function: &str) -> Result<(ModuleName, String), Failure> {
    let wrong = |cause: String| {
        Failure::usage(
            format!("{function:?} is not a function of a module"),
            cause,
            "Name it as MODULE.FUNCTION, such as math.sqrt; a module with a dot in its name with --module.",
        )
    };
    let plain = |text: &str| {
        let known = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        !text.is_empty() && text.chars().all(known)
    };
    let (module, method) = match module {
        Some(module) => (module.clone(), function),
        None => {
            let split = function.split_once('.');
            let (module, method) = split.ok_or_else(|| wrong("it has no dot".to_owned()))?;
            let module = module
                .parse()
                .map_err(|error: crate::model::ModuleNameError| wrong(error.to_string()))?;
            (module, method)
        }
    };
    if !plain(method) {
        return Err(wrong(
            "a function's name is letters, digits, '_' and '.'".to_owned(),
        ));
    }
    Ok((module, method.to_owned()))
}

/// JSON, or text: `2`, `[1,2]` and `"2"` are JSON, `two` is not.
fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}

fn named(pairs: &[String]) -> Result<Map<String, Value>, Failure> {
    let pair = |text: &String| {
        let (name, text) = text.split_once('=').ok_or_else(|| {
            Failure::usage(
                format!("{text:?} is not a named argument"),
                "it has no '='",
                "Write it as --kwarg NAME=VALUE.",
            )
        })?;
        Ok((name.to_owned(), value(text)))
    };
    pairs.iter().map(pair).collect()
}

fn table(head: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(head);
    table
}

fn module_table(modules: &[ModuleStatus]) -> String {
    let mut table = table(&["MODULE", "USER", "STATE", "READY", "PACKAGES", "CAUSE"]);
    for module in modules {
        let state = match module.state {
            ModuleState::Starting => "starting",
            ModuleState::Running => "running",
            ModuleState::Failed => "failed",
            ModuleState::Stopped => "stopped",
        };
        let packages: Vec<&str> = module.packages.iter().map(|one| one.as_str()).collect();
        table.add_row([
            module.module.to_string(),
            module.user_id.to_string(),
            state.to_owned(),
            format!("{}/{}", module.ready, module.replicas),
            packages.join(" "),
            render::printable(module.cause.as_deref().unwrap_or_default()),
        ]);
    }
    table.trim_fmt()
}

fn function_table(described: &Value) -> String {
    let mut table = table(&["FUNCTION", "WHAT IT DOES"]);
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for one in described["functions"].as_array().into_iter().flatten() {
        let doc = text(&one["doc"]);
        let first = doc.lines().next().unwrap_or_default();
        let name = format!("{}{}", text(&one["name"]), text(&one["signature"]));
        table.add_row([render::printable(&name), render::printable(first)]);
    }
    for name in described["namespaces"].as_array().into_iter().flatten() {
        let name = format!("{}.*", text(name));
        let hint = "its functions: --namespace".to_owned();
        table.add_row([render::printable(&name), hint]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_function_is_named_with_its_module() {
        let of = |text| target(None, text).map(|(module, method)| (String::from(module), method));
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        assert_eq!(of("math.sqrt").unwrap(), pair("math", "sqrt"));
        assert_eq!(
            of("numpy.linalg.norm").unwrap(),
            pair("numpy", "linalg.norm")
        );
        let xml = "xml.etree".parse().unwrap();
        let (module, method) = target(Some(&xml), "ElementTree.fromstring").unwrap();
        assert_eq!(
            (module.as_str(), &*method),
            ("xml.etree", "ElementTree.fromstring")
        );
        for bad in ["sqrt", "math.", "_x.y", "math.a&b", "math.a b"] {
            assert_eq!(of(bad).unwrap_err().exit, Exit::Usage, "{bad}");
        }
    }

    #[test]
    fn arguments_are_json_or_text() {
        let args: Vec<Value> = ["2", "-1.5", "[1,2]", "two", "\"2\"", "true"]
            .map(value)
            .to_vec();
        assert_eq!(json!(args), json!([2, -1.5, [1, 2], "two", "2", true]));
        let pairs = ["axis=0".to_owned(), "name=a=b".to_owned()];
        assert_eq!(
            json!(named(&pairs).unwrap()),
            json!({ "axis": 0, "name": "a=b" })
        );
        assert!(named(&["axis".to_owned()]).is_err());
    }
}
