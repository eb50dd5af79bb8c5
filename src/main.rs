//! `gantry`: the server, its keys, and the command line that talks to it.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use comfy_table::{Table, presets};
use gantry::auth::{Keys, Role};
use gantry::client;
use gantry::config::{Config, DataArgs, PlatformConfig, Secrets, ServeArgs};
use gantry::model::UserId;
use secrecy::ExposeSecret;

/// Threads for work that waits on the disk; the rest of the server never blocks.
const MAX_BLOCKING_THREADS: usize = 32;

#[derive(Debug, Parser)]
#[command(
    name = "gantry",
    version,
    about,
    after_help = "Without a command: serve. `gantry serve --help` shows what can be configured."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (what happens without a command)
    Serve(Box<ServeArgs>),
    /// Make, list and revoke keys
    #[command(subcommand)]
    Key(KeyCommand),
    #[command(flatten)]
    Client(client::Command),
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key and print it; it cannot be shown again
    Create(CreateArgs),
    /// List keys by their public ids
    List(ListArgs),
    /// Revoke a key; what it opened closes within seconds
    Revoke(RevokeArgs),
}

#[derive(Debug, Args)]
struct CreateArgs {
    #[command(flatten)]
    whose: Whose,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data: DataArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Whose {
    /// A key for this user only
    #[arg(long, value_name = "NAME")]
    user: Option<UserId>,
    /// A key for everything, every user
    #[arg(long)]
    admin: bool,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    data: DataArgs,
}

#[derive(Debug, Args)]
struct RevokeArgs {
    /// The key's id, as `gantry key list` shows it
    id: String,
    #[command(flatten)]
    data: DataArgs,
}

#[derive(Debug, Args)]
struct Output {
    /// How to print it
    #[arg(long, short, value_enum, default_value = "table")]
    output: Format,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

fn main() -> ExitCode {
    // The server starts itself as `gantry-runner` inside sandboxes; that must come before anything
    // that starts a thread.
    if std::env::args_os()
        .next()
        .is_some_and(|name| name == gantry::runner::PROGRAM)
    {
        return gantry::runner::main(std::env::args().skip(1));
    }
    // One provider for every TLS connection, chosen before the first: with two in one program the
    // first use panics. A second call would only say that it is chosen already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let cli = Cli::parse_from(with_default_command(std::env::args_os().collect()));
    let done = match cli.command {
        Command::Serve(args) => serve(*args),
        Command::Key(command) => key(command),
        Command::Client(command) => run_client(command),
    };
    done.unwrap_or_else(|error| {
        eprintln!("gantry: {error:#}");
        ExitCode::FAILURE
    })
}

/// `gantry` and `gantry --port 9000` are `gantry serve …`.
fn with_default_command(mut args: Vec<OsString>) -> Vec<OsString> {
    const TOP_LEVEL: [&str; 4] = ["-h", "--help", "-V", "--version"];
    let first = args.get(1).map(|arg| arg.to_string_lossy());
    let implied = first.is_none_or(|arg| arg.starts_with('-') && !TOP_LEVEL.contains(&&*arg));
    if implied {
        args.insert(1.min(args.len()), "serve".into());
    }
    args
}

/// Has large pieces of memory go back to the system as soon as they are free. glibc keeps pieces of up to 32 MiB
/// once the first was freed, for each of its arenas: after a few large replies those were most of the server.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    {
        const LARGE: libc::c_int = 256 << 10;
        // SAFETY: integer arguments only. Where it is refused, memory is kept as before.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
    }
}

fn serve(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let config = Config::new(args, Secrets::from_environment())?;
    if matches!(config.platform, PlatformConfig::Local) {
        // Before the first thread: each takes it over from the one that starts it.
        gantry::platform::local::prefer_server();
    }
    give_memory_back();
    let _log = gantry::telemetry::start(&config.data_dir.join("log"), &config.log)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .max_blocking_threads(MAX_BLOCKING_THREADS)
        .enable_all()
        .build()?;
    runtime.block_on(gantry::app::serve(config))?;
    // Threads that still wait for a disk must not keep the program from ending.
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

fn run_client(command: client::Command) -> anyhow::Result<ExitCode> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(client::run(command))
}

fn key(command: KeyCommand) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    match command {
        KeyCommand::Create(args) => {
            let keys = Keys::open(&args.data.folder()?, None)?;
            let role = args.whose.user.map_or(Role::Admin, Role::User);
            let key = keys.create(role)?;
            let text = key.text.expose_secret();
            match args.output.output {
                Format::Json => {
                    writeln!(out, "{}", serde_json::json!({ "id": key.id, "key": text }))?;
                }
                Format::Table => {
                    writeln!(out, "{text}")?;
                    eprintln!(
                        "This is key {}. It is not stored and cannot be shown again.",
                        key.id
                    );
                }
            }
        }
        KeyCommand::List(args) => {
            let keys = Keys::open(&args.data.folder()?, None)?.list();
            match args.output.output {
                Format::Json => writeln!(out, "{}", serde_json::to_string(&keys)?)?,
                Format::Table => {
                    let mut table = Table::new();
                    table.load_preset(presets::NOTHING);
                    table.set_header(["ID", "ROLE", "USER", "CREATED", "REVOKED"]);
                    for key in keys {
                        let time =
                            |t: jiff::Timestamp| t.strftime("%Y-%m-%d %H:%M:%SZ").to_string();
                        table.add_row([
                            key.id,
                            key.role.to_owned(),
                            key.user_id.map(String::from).unwrap_or_default(),
                            time(key.created),
                            key.revoked.map(time).unwrap_or_default(),
                        ]);
                    }
                    writeln!(out, "{table}")?;
                }
            }
        }
        KeyCommand::Revoke(args) => {
            Keys::open(&args.data.folder()?, None)?.revoke(&args.id)?;
            eprintln!(
                "Key {} is revoked; a running server closes what it opened.",
                args.id
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_fit_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serving_is_what_happens_without_a_command() {
        let implied = |args: &[&str]| {
            let args = args.iter().map(OsString::from).collect();
            with_default_command(args).get(1).cloned()
        };
        assert_eq!(implied(&["gantry"]), Some("serve".into()));
        assert_eq!(implied(&["gantry", "--port", "1"]), Some("serve".into()));
        assert_eq!(implied(&["gantry", "--help"]), Some("--help".into()));
        assert_eq!(implied(&["gantry", "submit"]), Some("submit".into()));
    }
}
