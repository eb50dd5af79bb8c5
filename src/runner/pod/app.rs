//! `gantry-runner app`: the first process of a released pod's container, without any privilege.
//!
//! | port | who answers |
//! |---|---|
//! | 3000 | the program, when it listens; after its end this side, with its exit code and output |
//! | 3002 | the program, when it listens; this side before that, with what is happening |
//! | 3001 | this side: `/ready`, `/live`, `/state`; terminals and files for whoever has a ticket |
//!
//! A program that listens on loopback only is reached all the same: this side then listens on the
//! pod's own address and passes on. A program that fails before it ever served ends the container
//! with its exit code, so that the cluster sees it, and starts it again; so does one that is to listen
//! (`GANTRY_SERVES`) and does not. In a workspace
//! (`GANTRY_WORKSPACE` is set) it does not: its user is there to look at what happened.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context;
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::{Response, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::{DEFAULT_PATH, Termination, hide, log_refused, parsed, variable};
use crate::beneath::Folder;
use crate::model::{BUILD_ARCHIVE, Ending, WORKSPACE_EXTRAS};
use crate::runner::agent::AgentConfig;
use crate::runner::app::{
    App, FRONT_PORT, PROGRAM_PORT, Pauses, ProgramConfig, RUNNER_PORT, State, restore, unpack_build,
};
use crate::runner::confine::Reach;
use crate::runner::listening::LOCAL;
use crate::runner::sandbox::close_inherited;
use crate::runner::slot::{Ground, Slot};
use crate::runner::workspace::{self, Workspace};

/// How long a program has to answer the requests that it has, and again to end after SIGTERM, when the server
/// did not say (GANTRY_DRAIN_SECONDS). The template gives the pod 10 s, of which proxies take 2 to learn that
/// it goes.
const END_PATIENCE: Duration = Duration::from_secs(6);

/// The exit code for a program that did not come to serve in time, as timeout(1) has it.
const NOT_SERVING: u8 = 124;

/// How often a program that runs is looked at for whether it listens on loopback only.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const LOOK_SELDOM: Duration = Duration::from_secs(1);

/// After this long it is looked at seldom.
const EAGER: Duration = Duration::from_secs(10);

/// Pause before a port is tried again that the program still has: its processes are just dying.
const PORT_AGAIN: Duration = Duration::from_millis(50);

/// Where the kubelet reads why a container ended, and how much of it.
const TERMINATION_LOG: &str = "/dev/termination-log";
const TERMINATION_BYTES: usize = 4_000;

/// The exit code for a program that could not be started, as shells have it.
const CANNOT_START: u8 = 127;

/// `gantry-runner app`.
pub fn main() -> anyhow::Result<ExitCode> {
    close_inherited().context("closing what was left open")?;
    let config = config()?;
    hide().context("hiding from the program")?;
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut end = Termination::listen()?;
        let own = |stream: io::Result<_>| stream.map(File::from);
        let echo = [
            own(io::stdout().as_fd().try_clone_to_owned())?,
            own(io::stderr().as_fd().try_clone_to_owned())?,
        ];
        let slot = Slot::as_it_is(&config.sandbox, 0)?;
        // The container may be started again, where its workspace stays with what the program left there.
        let workspace = Folder::open(slot.folder())?;
        if let Ok(extras) = workspace.read(WORKSPACE_EXTRAS) {
            if config.stays {
                restore(extras, &slot)?;
            }
            // Once: what its user removes stays removed.
            let removed = workspace.remove(WORKSPACE_EXTRAS);
            removed.with_context(|| format!("removing {WORKSPACE_EXTRAS}"))?;
        }
        let build = workspace.read(BUILD_ARCHIVE).ok();
        let brought = build.is_some();
        if let Some(build) = build {
            unpack_build(build, &slot, config.stays)?;
            // It is twice the room.
            let removed = workspace.remove(BUILD_ARCHIVE);
            removed.with_context(|| format!("removing {BUILD_ARCHIVE}"))?;
        }
        let pod = Rc::new(Pod {
            app: App::new(config, slot, Some(echo))?,
            restarts: Cell::new(0),
            patience: parsed("GANTRY_DRAIN_SECONDS", "a number of seconds")?
                .map_or(END_PATIENCE, Duration::from_secs),
        });
        let listener = listen(RUNNER_PORT)
            .await
            .with_context(|| format!("port {RUNNER_PORT} is the runner's, and taken"))?;
        let workspace = Workspace::new(Rc::clone(&pod.app), identity()?, brought)?;
        tokio::task::spawn_local(Rc::clone(&pod).answer(listener, workspace));
        let front = listen(FRONT_PORT)
            .await
            .with_context(|| format!("port {FRONT_PORT} is the runner's, and taken"))?;
        tokio::task::spawn_local(Rc::clone(&pod).front(front));
        // It goes on while the program is asked to end, and so sees its end.
        let mut keep = tokio::task::spawn_local(Rc::clone(&pod).keep());
        tokio::select! {
            code = &mut keep => Ok(code?),
            () = end.wait() => Ok(pod.end().await),
        }
    })
}

/// The program in the environment, and the container as it is.
fn config() -> anyhow::Result<ProgramConfig> {
    const EXPECTED: &str = "a JSON list of texts, such as [\"python3\",\"main.py\"]";
    let text = variable("GANTRY_APP_ARGV")
        .with_context(|| format!("GANTRY_APP_ARGV is not set; it has to be {EXPECTED}"))?;
    let argv: Vec<String> = serde_json::from_str(&text)
        .ok()
        .filter(|argv: &Vec<String>| !argv.is_empty())
        .with_context(|| format!("GANTRY_APP_ARGV is {text:?}; it has to be {EXPECTED}"))?;
    let everything = Reach {
        // The container is the bound; what else is mounted is meant for the program.
        path: "/".into(),
        writable: true,
    };
    let stays = variable("GANTRY_WORKSPACE").is_some();
    Ok(ProgramConfig {
        argv,
        stays,
        // A release of an earlier version says nothing of it, and was deployed by other rules.
        serves: parsed("GANTRY_SERVES", "yes, no or unknown")?,
        served: false,
        env: environment(std::env::vars_os(), stays),
        memory_bytes: None,
        processes: None,
        sandbox: AgentConfig {
            slots: 1,
            first_uid: None,
            ground: Ground::Container {
                bytes: u64::MAX,
                files: u64::MAX,
                hook: Default::default(),
            },
            reach: vec![everything],
            network: true,
            networks: false,
            secluded: true,
            log_refused: log_refused()?,
            python: None,
            path: variable("PATH").unwrap_or(DEFAULT_PATH.to_owned()),
            peer: None,
            idle_seconds: None,
        },
    })
}

/// Whose runner this is, as the server told it; `None`: its port lets nobody in.
fn identity() -> anyhow::Result<Option<workspace::Identity>> {
    let (Some(repl), Some(key)) = (variable("GANTRY_REPL"), variable("GANTRY_RUNNER_KEY")) else {
        return Ok(None);
    };
    let repl = repl.parse().context("GANTRY_REPL")?;
    Ok(Some(workspace::Identity { repl, key }))
}

/// The container's variables without Gantry's own and the store's. The home gives way to the workspace: of
/// a release, as in its tests, where packages were installed below it; of a workspace that stays, when it
/// cannot be written to, as most are in a read-only container.
fn environment(
    all: impl Iterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    stays: bool,
) -> Vec<(String, String)> {
    let of_ours = |name: &str| {
        ["GANTRY_", "AWS_", "S3_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    };
    let writable = |home: &str| rustix::fs::access(home, rustix::fs::Access::WRITE_OK).is_ok();
    all.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| !of_ours(name))
        .filter(|(name, value)| name != "HOME" || (stays && writable(value)))
        .collect()
}

struct Pod {
    app: Rc<App>,
    restarts: Cell<u32>,
    /// How long it has to end.
    patience: Duration,
}

impl Pod {
    /// Keeps the program running for as long as the pod lives; ends with an exit code when the
    /// program never served.
    async fn keep(self: Rc<Self>) -> ExitCode {
        let mut pauses = Pauses::default();
        loop {
            let started = Instant::now();
            let bridge =
                Ends(tokio::task::spawn_local(bridge(Rc::clone(&self.app))).abort_handle());
            let life = self.app.live_once(self.restarts.get()).await;
            drop(bridge);
            self.app.set_bridged(false);
            if self.app.stays() {
                self.app.ended(life, false);
                tokio::select! {
                    () = self.stand_in() => {}
                    () = self.app.again() => {}
                }
                continue;
            }
            let code = match &life.ending {
                _ if life.unready.is_some() => NOT_SERVING,
                Ending::Exited(0) => {
                    self.stand_in().await;
                    return ExitCode::SUCCESS;
                }
                Ending::Exited(code) => u8::try_from(*code).unwrap_or(1),
                Ending::Signalled(signal) => u8::try_from(128 + signal).unwrap_or(1),
                _ => CANNOT_START,
            };
            let words = format!("the program {}", life.words());
            tracing::warn!("{words}");
            self.say_why(&words);
            if !life.served {
                return ExitCode::from(code);
            }
            let pause = pauses.after(started.elapsed());
            let _ = timeout(pause, self.stand_in()).await;
            self.restarts.set(self.restarts.get() + 1);
        }
    }

    /// Answers on the program's port in its place.
    async fn stand_in(&self) {
        let listener = loop {
            match listen(PROGRAM_PORT).await {
                Ok(listener) => break listener,
                Err(_) => sleep(PORT_AGAIN).await,
            }
        };
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(PORT_AGAIN).await;
                continue;
            };
            let app = Rc::clone(&self.app);
            tokio::task::spawn_local(async move { app.stand_in(stream).await });
        }
    }

    /// Leaves word for `kubectl describe` and for whoever asks why a release did not come up.
    fn say_why(&self, words: &str) {
        let room = TERMINATION_BYTES.saturating_sub(words.len() + 1);
        let output = self.app.last_output(room);
        let output = String::from_utf8_lossy(&output);
        if let Err(error) = fs::write(TERMINATION_LOG, format!("{words}\n{output}")) {
            tracing::debug!(%error, "no word is left about the end");
        }
    }

    /// The pod is ended: the program is asked to, and made to after a while.
    async fn end(&self) -> ExitCode {
        self.app.leave(self.patience, true).await;
        ExitCode::SUCCESS
    }

    /// Answers on the port that callers come to.
    async fn front(self: Rc<Self>, listener: TcpListener) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(PORT_AGAIN).await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            tokio::task::spawn_local(Rc::clone(&self.app).show(stream));
        }
    }

    /// Answers on the runner's port.
    async fn answer(self: Rc<Self>, listener: TcpListener, workspace: Rc<Workspace>) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                sleep(PORT_AGAIN).await;
                continue;
            };
            // A key that was pressed is not held back for the next one.
            let _ = stream.set_nodelay(true);
            let (this, workspace) = (Rc::clone(&self), Rc::clone(&workspace));
            tokio::task::spawn_local(async move {
                workspace.serve(stream, |path| this.probed(path)).await;
            });
        }
    }

    /// The answer to a probe, which needs no ticket.
    fn probed(&self, path: &str) -> Option<Response<Full<Bytes>>> {
        let state = self.app.state();
        let good = matches!(state, State::Serving | State::Ended(Ending::Exited(0)));
        let ready = good || self.app.stays();
        let status = match path {
            "/live" | "/state" => StatusCode::OK,
            "/ready" if ready => StatusCode::OK,
            "/ready" => StatusCode::SERVICE_UNAVAILABLE,
            _ => return None,
        };
        let (word, code) = match state {
            State::Starting => ("starting", None),
            State::Serving => ("serving", None),
            State::Ended(Ending::Exited(code)) => ("ended", Some(code)),
            State::Ended(Ending::Signalled(signal)) => ("ended", Some(128 + signal)),
            State::Ended(_) => ("ended", Some(i32::from(CANNOT_START))),
        };
        let mut response = workspace::json(&serde_json::json!({
            "state": word,
            "exit_code": code,
            "restarts": self.restarts.get(),
        }));
        *response.status_mut() = status;
        Some(response)
    }
}

/// A task that ends with this value.
struct Ends(AbortHandle);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// On every address, of both kinds where there are both.
async fn listen(port: u16) -> io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
        listener => listener,
    }
}

/// While the program runs: waits until it listens, and where that is on loopback only passes on what
/// comes to the pod's own address.
async fn bridge(app: Rc<App>) {
    let started = Instant::now();
    let port_of = |address: IpAddr| SocketAddr::new(address, PROGRAM_PORT);
    let loopback = LOCAL.map(port_of);
    loop {
        let pause = if started.elapsed() < EAGER {
            LOOK_EVERY
        } else {
            LOOK_SELDOM
        };
        sleep(pause).await;
        // Only what serves is looked at: each look is a connection.
        if !matches!(app.state(), State::Serving) {
            continue;
        }
        let Some(own) = own_address().map(port_of) else {
            continue;
        };
        if TcpStream::connect(own).await.is_ok() {
            return;
        }
        let mut to = None;
        for address in loopback {
            if to.is_none() && TcpStream::connect(address).await.is_ok() {
                to = Some(address);
            }
        }
        let Some(to) = to else {
            continue;
        };
        // Taken: the program has just come to listen there itself.
        if let Ok(listener) = TcpListener::bind(own).await {
            app.set_bridged(true);
            pass_on(listener, to).await;
        }
    }
}

async fn pass_on(listener: TcpListener, to: SocketAddr) {
    loop {
        let Ok((mut caller, _)) = listener.accept().await else {
            sleep(PORT_AGAIN).await;
            continue;
        };
        tokio::task::spawn_local(async move {
            let Ok(mut program) = TcpStream::connect(to).await else {
                return;
            };
            let _ = (caller.set_nodelay(true), program.set_nodelay(true));
            let _ = tokio::io::copy_bidirectional(&mut caller, &mut program).await;
        });
    }
}

/// The address that others reach this pod at: the one it would speak from. Nothing is sent.
fn own_address() -> Option<IpAddr> {
    // Addresses for documentation (RFC 5737, RFC 3849): somewhere else, whatever the network.
    let elsewhere = [
        (IpAddr::from(Ipv4Addr::UNSPECIFIED), "192.0.2.1:9"),
        (IpAddr::from(Ipv6Addr::UNSPECIFIED), "[2001:db8::1]:9"),
    ];
    elsewhere.into_iter().find_map(|(any, there)| {
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(there).ok()?;
        let own = socket.local_addr().ok()?.ip();
        (!own.is_loopback() && !own.is_unspecified()).then_some(own)
    })
}
