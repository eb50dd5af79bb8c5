//! A released program: started, watched, started again when it fails, and shown to whoever calls.
//!
//! The program listens on port 3000 of its own network namespace. Until it does, and after it has
//! ended, this side answers callers itself: with what is happening, or with the output and the exit
//! code of a program that simply ended.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, OnceCell, broadcast, mpsc};
use tokio::time::{Instant, sleep, timeout};

use super::agent::{AgentConfig, Exits, collect_children};
use super::build::unpack;
use super::confine::{Confinement, Identity};
use super::job::KILL_PATIENCE;
use super::line::{Lines, Proxy};
use super::process::signal as signal_process;
use super::slot::{Ground, Slot, bind};
use super::warm::pipes;
use super::wire::{AppPort, FromApp, frames};
use super::workspace::{self, Files, Terminal, Workspace};
use crate::beneath::{Folder, Kind};
use crate::model::{
    BUILD_ARCHIVE, Ending, Limits, OutputStream, PACKAGE_PROXY, Packages, RelativePath,
};

/// The port a released program listens on (design.md §5).
pub const PROGRAM_PORT: u16 = 3_000;

/// A program that neither listens nor ends within this time is a worker, and serves by running.
const WORKER_AFTER: Duration = Duration::from_secs(5);

/// Pause before a failed program is started again: doubled each time up to the longest, as the
/// kubelet does it (10 s to 300 s there; shorter here, where someone is usually watching).
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The server's first connection comes within milliseconds of the sandbox.
const FIRST_CONTACT: Duration = Duration::from_secs(30);

/// How often the port is tried while the program comes up.
const TRY_EVERY: Duration = Duration::from_millis(2);

/// Output kept for the page that stands in for a program.
const KEPT_OUTPUT: usize = 64 << 10;

/// Most bytes of output that are passed on at once.
const PIECE: usize = 8 << 10;

/// How long the rest of a line is waited for: a program that does not buffer writes a line in pieces,
/// each of which would be a record of its own.
const LINE_PATIENCE: Duration = Duration::from_millis(20);

/// Most bytes and files of a release or of a repl's current files, as `gantry-runner fetch` has it: what
/// somebody else put into the code store may be more.
const MOST_BYTES: u64 = 256 << 20;
const MOST_FILES: usize = 10_000;

/// Time a program gets between SIGTERM and SIGKILL when its user stops it, and how often it is looked at.
const END_PATIENCE: Duration = Duration::from_secs(3);
const END_PAUSE: Duration = Duration::from_millis(10);

/// Why a release is not stopped and started by its runner's port.
const NOT_A_WORKSPACE: &str =
    "this is a release, which is what was tested: deploy another one, or stop it with POST /stop";

/// Longest wait for the rest of what a program wrote, once it and all that it started are gone: it is in
/// the pipes and is read at once. Only what cannot be killed holds one open for longer.
const REST_PATIENCE: Duration = Duration::from_secs(5);

/// Longest that a command takes which is run beside the program: as long as a server waits for an answer.
const WRITTEN_PATIENCE: Duration = Duration::from_secs(25);

/// How often a released program's memory is looked at.
const MEASURE_EVERY: Duration = Duration::from_millis(500);

/// What is released on this machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AppConfig {
    /// The program.
    pub program: ProgramConfig,
    /// The immutable release; its files are copied into the workspace.
    pub release: PathBuf,
    /// A folder that outlives releases, shown at the same place to the program.
    pub data: Option<PathBuf>,
    /// Whose runner it is.
    pub identity: workspace::Identity,
}

/// A program and its surroundings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProgramConfig {
    /// Command and arguments.
    pub argv: Vec<String>,
    /// It is a workspace: however its program ends, it stays for its user to look at, and the program is
    /// not started again by itself.
    pub stays: bool,
    /// The program's own variables.
    pub env: Vec<(String, String)>,
    /// Bytes of memory it may use; `None`: something else bounds it.
    pub memory_bytes: Option<u64>,
    /// Processes it may have; `None`: something else bounds them.
    pub processes: Option<u64>,
    /// The sandbox it lives in, with one slot.
    pub sandbox: AgentConfig,
}

#[derive(Debug, Clone)]
pub(super) enum State {
    Starting,
    Serving,
    Ended(Ending),
}

/// A program that is kept running.
pub(super) struct App {
    config: ProgramConfig,
    slot: Slot,
    confinement: Confinement,
    exits: Exits,
    state: RefCell<State>,
    output: RefCell<VecDeque<u8>>,
    events: broadcast::Sender<FromApp>,
    watched: Cell<bool>,
    /// Its process, while there is one.
    process: Cell<Option<i32>>,
    /// Sessions of terminals: they outlive the program.
    spared: RefCell<BTreeSet<i32>>,
    /// Told when it is to run once more, and whether it was.
    wanted: Notify,
    is_wanted: Cell<bool>,
    /// What its installer reaches the indexes by.
    lines: Rc<Lines>,
    proxy: OnceCell<Proxy>,
    /// Takes what it writes, beside whoever watches: stdout, stderr.
    echo: Option<[File; 2]>,
    /// When somebody used it last: asked its program for something, or had a terminal. Whatever the program
    /// comes to is there to be looked at for as long.
    used: Cell<Instant>,
}

/// Runs the program until the server lets go of it.
pub async fn run(config: AppConfig, listener: UnixListener) -> anyhow::Result<()> {
    let AppConfig {
        program,
        release,
        data,
        identity,
    } = config;
    let slot = Slot::create(&program.sandbox, 0)?;
    copy_release(&release, &slot, program.stays)?;
    if let (Some(data), Ground::Roots { slots, .. }) = (&data, &program.sandbox.ground) {
        let inside = slots.join("0");
        bind(
            data,
            &inside.join(data.strip_prefix("/").unwrap_or(data)),
            false,
        )?;
    }
    let app = App::new(program, slot, None)?;
    let workspace = Workspace::new(Rc::clone(&app), Some(identity), true)?;
    loop {
        match timeout(FIRST_CONTACT, listener.accept()).await {
            Ok(accepted) => {
                let (stream, _) = accepted?;
                tokio::task::spawn_local(Rc::clone(&app).accept(stream, Rc::clone(&workspace)));
            }
            // The server died between making this sandbox and watching it; nobody ever will.
            Err(_) if !app.watched.get() => return Ok(()),
            Err(_) => {}
        }
    }
}

fn copy_release(release: &Path, slot: &Slot, stays: bool) -> anyhow::Result<()> {
    let (mut files, mut bytes) = (Vec::new(), 0);
    let mut build = None;
    let mut folders = vec![(Folder::open(release)?, String::new())];
    while let Some((folder, above)) = folders.pop() {
        folder.each(|name, kind| {
            let name = name
                .to_str()
                .with_context(|| format!("the name {name:?} is not UTF-8"))?;
            let path = format!("{above}{name}");
            if kind == Kind::Folder {
                folders.push((folder.folder(name)?, format!("{path}/")));
                return Ok(());
            }
            // Somebody else may have put it there: what a link leads to may be anywhere.
            anyhow::ensure!(kind == Kind::File, "{path} is no regular file");
            let mut file = folder.read(name)?;
            if path == BUILD_ARCHIVE {
                build = Some(file);
                return Ok(());
            }
            bytes += file.metadata()?.len();
            anyhow::ensure!(
                bytes <= MOST_BYTES && files.len() < MOST_FILES,
                "it is more than {MOST_FILES} files or {MOST_BYTES} bytes in all"
            );
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            files.push((path, content));
            anyhow::Ok(())
        })?;
    }
    slot.write_files(&files)?;
    if let Some(build) = build {
        unpack_build(build, slot, stays)?;
    }
    Ok(())
}

/// Puts what was compiled beside a release's files, or what was installed beside a workspace's: that is
/// installed again when it cannot be used.
pub(super) fn unpack_build(archive: File, slot: &Slot, stays: bool) -> anyhow::Result<()> {
    let unpacked = unpack(archive, slot.folder(), slot.uid)
        .with_context(|| format!("{BUILD_ARCHIVE} cannot be unpacked"));
    let Err(error) = unpacked else {
        return Ok(());
    };
    anyhow::ensure!(stays, error);
    tracing::warn!(error = format!("{error:#}"), "packages are installed again");
    use io::ErrorKind::{NotADirectory, NotFound};
    // Half of them would pass for all.
    let files = Files::open(slot.folder(), slot.uid)?;
    for folder in Packages::installs().flat_map(|install| install.own) {
        let folder = RelativePath::try_from((*folder).to_owned()).map_err(anyhow::Error::msg)?;
        match files.delete(&folder) {
            Ok(()) => {}
            // Something else stands in its place, or above it.
            Err(error) if [NotFound, NotADirectory].contains(&error.kind()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl App {
    /// A program in this slot. `echo` takes what it writes, beside whoever watches.
    pub(super) fn new(
        config: ProgramConfig,
        slot: Slot,
        echo: Option<[File; 2]>,
    ) -> anyhow::Result<Rc<App>> {
        let exits = Exits::default();
        tokio::task::spawn_local(collect_children(exits.clone())?);
        Ok(Rc::new(App {
            confinement: Confinement::new(&config.sandbox.reach, config.sandbox.calls(false))?
                .on_shared_disk()?,
            slot,
            exits,
            state: RefCell::new(State::Starting),
            output: RefCell::default(),
            events: broadcast::channel(1_024).0,
            watched: Cell::new(false),
            process: Cell::new(None),
            spared: RefCell::default(),
            wanted: Notify::new(),
            is_wanted: Cell::new(false),
            lines: Rc::default(),
            proxy: OnceCell::new(),
            echo,
            used: Cell::new(Instant::now()),
            config,
        }))
    }

    async fn accept(self: Rc<Self>, mut stream: UnixStream, workspace: Rc<Workspace>) {
        let Ok(byte) = stream.read_u8().await else {
            return;
        };
        match AppPort::from_byte(byte) {
            Some(AppPort::Program) => self.show(stream).await,
            Some(AppPort::Runner) => workspace.serve(stream, |_| None).await,
            Some(AppPort::Control) => {
                let first = !self.watched.replace(true);
                let events = self.events.subscribe();
                if first {
                    tokio::task::spawn_local(Rc::clone(&self).keep_running());
                }
                watch(stream, events).await;
                // The server is gone, and with it everybody who could call. As the first process
                // of its namespace this one takes the program along.
                let _ = self.slot.tree(Vec::new()).kill(KILL_PATIENCE).await;
                std::process::exit(0)
            }
            None => {}
        }
    }

    /// One caller: joined to the program when it listens, answered in its place otherwise.
    pub(super) async fn show(self: Rc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let mut stream = Noticed { stream, app: &self };
        if self.config.sandbox.network
            && let Ok(mut program) = TcpStream::connect(("127.0.0.1", PROGRAM_PORT)).await
        {
            let _ = program.set_nodelay(true);
            let _ = tokio::io::copy_bidirectional(&mut stream, &mut program).await;
            return;
        }
        self.stand_in(stream).await;
    }

    /// Answers one caller in the program's place.
    pub(super) async fn stand_in(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let service = hyper::service::service_fn(|_: Request<Incoming>| {
            std::future::ready(Ok::<_, Infallible>(self.page()))
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    fn page(&self) -> Response<Full<Bytes>> {
        let output: Vec<u8> = self.output.borrow().iter().copied().collect();
        let output = escape(&String::from_utf8_lossy(&output));
        let (status, title, refresh) = match &*self.state.borrow() {
            State::Ended(Ending::Exited(0)) => (
                StatusCode::OK,
                "The program ended with exit code 0".to_owned(),
                false,
            ),
            State::Ended(ending) => (
                StatusCode::BAD_GATEWAY,
                format!("The program {}", describe(ending)),
                false,
            ),
            State::Starting => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The program is starting".to_owned(),
                true,
            ),
            State::Serving => (
                StatusCode::SERVICE_UNAVAILABLE,
                format!("The program is running and does not listen on port {PROGRAM_PORT}"),
                true,
            ),
        };
        let refresh = if refresh {
            "<meta http-equiv=refresh content=1>"
        } else {
            ""
        };
        let html = format!(
            "<!doctype html><html lang=en><meta charset=utf-8>{refresh}\
             <meta name=viewport content='width=device-width'><meta name=color-scheme content='light dark'>\
             <title>{title}</title><style>body{{font:16px system-ui;margin:3rem auto;max-width:60rem;padding:0 1rem}}\
             pre{{font:14px/1.5 ui-monospace,monospace;padding:1rem;border:1px solid #8884;border-radius:8px;\
             white-space:pre-wrap;overflow-wrap:anywhere}}</style><h1>{title}</h1><pre>{output}</pre>"
        );
        let mut response = Response::new(Full::new(Bytes::from(html)));
        *response.status_mut() = status;
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            header::HeaderValue::from_static("text/html; charset=utf-8"),
        );
        if !refresh.is_empty() {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response.headers_mut().insert(
            header::CACHE_CONTROL,
            header::HeaderValue::from_static("no-store"),
        );
        response
    }

    /// Somebody uses it now.
    pub(super) fn notice(&self) {
        self.used.set(Instant::now());
    }

    /// For how long nobody has used it.
    pub(super) fn unused(&self) -> Duration {
        self.used.get().elapsed()
    }

    /// Whether it stays when its program has ended.
    pub(super) fn stays(&self) -> bool {
        self.config.stays
    }

    /// What it is doing.
    pub(super) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Whether it runs.
    pub(super) fn is_running(&self) -> bool {
        self.process.get().is_some()
    }

    /// The end of what it wrote, at most this many bytes.
    pub(super) fn last_output(&self, bytes: usize) -> Vec<u8> {
        let output = self.output.borrow();
        let before = output.len().saturating_sub(bytes);
        output.iter().skip(before).copied().collect()
    }

    /// Sends its first process a signal.
    pub(super) fn signal(&self, number: i32) {
        if let Some(pid) = self.process.get() {
            signal_process(pid, number);
        }
    }

    /// Asks its first process to end, and then makes it.
    pub(super) async fn end(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.config.stays, "{}", NOT_A_WORKSPACE);
        self.is_wanted.set(false);
        self.signal(libc::SIGTERM);
        let asked = Instant::now();
        while self.is_running() {
            if asked.elapsed() > END_PATIENCE {
                self.kill().await;
            }
            sleep(END_PAUSE).await;
        }
        Ok(())
    }

    /// Has it run once more.
    pub(super) fn run_again(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.config.stays, "{}", NOT_A_WORKSPACE);
        anyhow::ensure!(!self.is_running(), "the program runs already");
        self.is_wanted.set(true);
        self.wanted.notify_one();
        Ok(())
    }

    /// Resolves when it is to run once more.
    pub(super) async fn again(&self) {
        while !self.is_wanted.replace(false) {
            self.wanted.notified().await;
        }
    }

    /// What happens to it from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<FromApp> {
        self.events.subscribe()
    }

    /// Its place.
    pub(super) fn slot(&self) -> &Slot {
        &self.slot
    }

    /// Starts a shell beside it, under the same limits.
    pub(super) fn start_terminal(
        &self,
        name: &str,
        size: (u16, u16),
    ) -> anyhow::Result<Rc<Terminal>> {
        const SHELL: &str = "command -v bash >/dev/null && exec bash -i; exec sh -i";
        let mut command = self.command(&["sh", "-c", SHELL].map(str::to_owned))?;
        command.env("PS1", "\\w \\$ ");
        let multiplexer = match &self.config.sandbox.ground {
            Ground::Roots { base, .. } => base.join("dev/pts/ptmx"),
            Ground::Folder(_) | Ground::Container { .. } => PathBuf::from("/dev/ptmx"),
        };
        Terminal::start(
            name,
            command,
            &multiplexer,
            self.slot.uid,
            &self.exits,
            size,
        )
    }

    /// Where the server lends its installer lines; `None`: a release has installed what it needs.
    pub(super) fn lines(&self) -> Option<&Lines> {
        self.config.stays.then_some(&*self.lines)
    }

    /// Lets its installer use what is lent.
    async fn open_proxy(&self) -> io::Result<()> {
        let own = rustix::process::getuid().as_raw();
        let uid = self.slot.uid.unwrap_or(own);
        let proxy = || Proxy::start(Rc::clone(&self.lines), uid, None);
        self.proxy.get_or_try_init(proxy).await.map(drop)
    }

    /// What a command writes that is run beside the program, under the same limits; `None` when that is more
    /// than `most` bytes. It goes when the program ends.
    pub(super) async fn written_by(
        &self,
        argv: &[String],
        most: usize,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        let mut command = self.command(argv)?;
        let (parent, child) = pipes()?;
        child.attach(&mut command);
        let pid = i32::try_from(command.spawn()?.id())?;
        let exited = self.exits.wait_for(pid);
        drop((command, parent.stdin));
        let mut written = Vec::new();
        let mut bounded = parent.stdout.take(most as u64 + 1);
        let ended = async {
            bounded.read_to_end(&mut written).await?;
            // What is too long waits for somebody who reads on.
            match bounded.limit() {
                0 => Ok(None),
                _ => anyhow::Ok(Some(exited.await?)),
            }
        };
        let exit = match timeout(WRITTEN_PATIENCE, ended).await {
            Ok(Ok(Some(exit))) => exit,
            unfinished => {
                signal_process(pid, libc::SIGKILL);
                return unfinished.context("it takes too long")?.map(|_| None);
            }
        };
        anyhow::ensure!(exit.status == 0, "it failed");
        Ok(Some(written))
    }

    /// Whether a session outlives the program.
    pub(super) fn spare(&self, session: i32, spare: bool) {
        let mut spared = self.spared.borrow_mut();
        match spare {
            true => spared.insert(session),
            false => spared.remove(&session),
        };
    }

    /// Ends all of its processes.
    pub(super) async fn kill(&self) {
        let tree = self.slot.tree(Vec::new());
        let spared: Vec<i32> = self.spared.borrow().iter().copied().collect();
        let killed = match spared.is_empty() {
            true => tree.kill(KILL_PATIENCE).await,
            false => tree.kill_but(&spared, KILL_PATIENCE).await,
        };
        if let Err(error) = killed {
            tracing::warn!(%error, "a program's processes are still there");
        }
    }

    async fn keep_running(self: Rc<Self>) {
        let mut pauses = Pauses::default();
        let mut restarts = 0;
        loop {
            let started = Instant::now();
            let (ending, served) = self.live_once(restarts).await;
            // What served and then failed is started again; what never served failed for good.
            let again = served && ending != Ending::Exited(0) && !self.config.stays;
            self.ended(ending, again);
            if self.config.stays {
                self.again().await;
                continue;
            }
            if !again {
                return;
            }
            sleep(pauses.after(started.elapsed())).await;
            restarts += 1;
        }
    }

    /// Tells that it ended.
    pub(super) fn ended(&self, ending: Ending, again: bool) {
        let _ = self.events.send(FromApp::Ended { ending, again });
    }

    /// One life of the program and all that it started: how it ended, and whether it served before.
    pub(super) async fn live_once(&self, restarts: u32) -> (Ending, bool) {
        let _ = self.events.send(FromApp::Started { restarts });
        *self.state.borrow_mut() = State::Starting;
        self.output.borrow_mut().clear();
        let (ending, served) = match self.run_once().await {
            Ok(result) => result,
            Err(error) => {
                self.process.set(None);
                self.kill().await;
                (Ending::NotStarted(format!("{error:#}")), false)
            }
        };
        *self.state.borrow_mut() = State::Ended(ending.clone());
        self.notice();
        (ending, served)
    }

    /// One life of the program: how it ended, and whether it served before. Then nothing of it is left.
    async fn run_once(&self) -> anyhow::Result<(Ending, bool)> {
        if self.config.stays {
            self.open_proxy().await?;
        }
        let (pid, stdout, stderr) = self.start()?;
        self.process.set(Some(pid));
        let exited = self.exits.wait_for(pid);
        tokio::pin!(exited);
        let (tell, mut told) = mpsc::channel::<(OutputStream, Vec<u8>)>(16);
        let [out, err] = match &self.echo {
            Some([out, err]) => [Some(out.try_clone()?), Some(err.try_clone()?)],
            None => [None, None],
        };
        let read = |stream, pipe, echo| {
            tokio::task::spawn_local(read_all(stream, pipe, tell.clone(), echo));
        };
        read(OutputStream::Stdout, stdout, out);
        read(OutputStream::Stderr, stderr, err);
        drop(tell);
        let serving = serves(self.config.sandbox.network);
        tokio::pin!(serving);
        let mut served = false;
        let mut out_of_memory = false;
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        let exit = loop {
            tokio::select! {
                exit = &mut exited => break exit?,
                Some((stream, data)) = told.recv() => self.wrote(stream, data),
                () = &mut serving, if !served => {
                    served = true;
                    self.notice();
                    *self.state.borrow_mut() = State::Serving;
                    let _ = self.events.send(FromApp::Serving);
                }
                _ = measure.tick() => {
                    let tree = self.slot.tree(Vec::new());
                    if let Some(bytes) = self.config.memory_bytes
                        && tree.usage().resident > bytes
                        && tree.proportional_memory() > bytes
                    {
                        out_of_memory = true;
                        let _ = tree.kill(KILL_PATIENCE).await;
                    }
                }
            }
        };
        self.process.set(None);
        // Its pipes end with the last process that has them. Until then there may be something in them,
        // however long a busy machine takes to bring it here.
        let rest = async {
            while let Some((stream, data)) = told.recv().await {
                self.wrote(stream, data);
            }
        };
        let (_, rest) = tokio::join!(self.kill(), timeout(REST_PATIENCE, rest));
        if rest.is_err() {
            tracing::warn!(
                "something of the program holds its output open; the rest is not waited for"
            );
        }
        let ending = if out_of_memory {
            Ending::Limit(crate::model::Reason::Memory)
        } else if libc::WIFSIGNALED(exit.status) {
            Ending::Signalled(libc::WTERMSIG(exit.status))
        } else {
            Ending::Exited(libc::WEXITSTATUS(exit.status))
        };
        Ok((ending, served))
    }

    fn start(&self) -> anyhow::Result<(i32, pipe::Receiver, pipe::Receiver)> {
        let (parent, child) = pipes()?;
        let mut command = self.command(&self.config.argv)?;
        child.attach(&mut command);
        let name = command.get_program().to_string_lossy().into_owned();
        let started = command
            .spawn()
            .map_err(|error| anyhow::anyhow!("{name} could not be started: {error}"))?;
        Ok((i32::try_from(started.id())?, parent.stdout, parent.stderr))
    }

    /// A command in its place, with its limits and its variables.
    fn command(&self, argv: &[String]) -> anyhow::Result<Command> {
        let Some((name, arguments)) = argv.split_first() else {
            anyhow::bail!("there is no command to run");
        };
        let mut command = Command::new(name);
        command
            .args(arguments)
            .env_clear()
            .envs(self.config.sandbox.environment(&self.slot))
            .env("PORT", PROGRAM_PORT.to_string())
            // A released program's log is followed live; block buffering would hide it.
            .env("PYTHONUNBUFFERED", "1")
            .envs(self.proxy.get().map(|proxy| (PACKAGE_PROXY, proxy.url())))
            .envs(self.config.env.iter().cloned());
        let limits = Limits {
            wall_ms: u64::MAX,
            // Released programs run for as long as they like.
            cpu_ms: u64::from(u32::MAX) * 1_000,
            memory_bytes: self.config.memory_bytes.unwrap_or(u64::MAX),
            processes: self.config.processes.unwrap_or(u64::MAX),
            file_bytes: u64::MAX,
            output_bytes: u64::MAX,
        };
        let identity = self.slot.uid.map_or(Identity::Own, Identity::User);
        self.confinement.apply(
            &mut command,
            identity,
            self.slot.root(),
            self.slot.workspace(),
            &limits,
        )?;
        Ok(command)
    }

    fn wrote(&self, stream: OutputStream, data: Vec<u8>) {
        let mut output = self.output.borrow_mut();
        output.extend(&data);
        let excess = output.len().saturating_sub(KEPT_OUTPUT);
        output.drain(..excess);
        drop(output);
        let _ = self.events.send(FromApp::Output { stream, data });
    }
}

/// A caller's connection: what comes and goes on it is use. That it is open is not, since proxies keep
/// connections.
struct Noticed<'a, S> {
    stream: S,
    app: &'a App,
}

impl<S: AsyncRead + Unpin> AsyncRead for Noticed<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.app.notice();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Noticed<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.app.notice();
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Resolves when the program listens, or has run long enough to count as a worker. One that may not
/// make internet sockets cannot listen: what answers on its port is somebody else.
async fn serves(network: bool) {
    if !network {
        return sleep(WORKER_AFTER).await;
    }
    let started = Instant::now();
    let mut pause = TRY_EVERY;
    while started.elapsed() < WORKER_AFTER {
        if TcpStream::connect(("127.0.0.1", PROGRAM_PORT))
            .await
            .is_ok()
        {
            return;
        }
        sleep(pause).await;
        pause = (pause * 5 / 4).min(Duration::from_millis(50));
    }
}

/// Pauses before a failed program is started again.
#[derive(Debug)]
pub(super) struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(FIRST_PAUSE)
    }
}

impl Pauses {
    /// The pause after a life this long.
    pub(super) fn after(&mut self, lived: Duration) -> Duration {
        if lived > LONGEST_PAUSE {
            self.0 = FIRST_PAUSE;
        }
        let pause = self.0;
        self.0 = (pause * 2).min(LONGEST_PAUSE);
        pause
    }
}

async fn read_all(
    stream: OutputStream,
    mut pipe: pipe::Receiver,
    tell: mpsc::Sender<(OutputStream, Vec<u8>)>,
    echo: Option<File>,
) {
    let mut echo = echo.map(tokio::fs::File::from_std);
    let mut buffer = vec![0; PIECE];
    let mut line = Vec::new();
    let mut open = true;
    while open {
        let patience = if line.is_empty() {
            Duration::MAX
        } else {
            LINE_PATIENCE
        };
        // Dropping a read that waits loses nothing.
        let waited = timeout(patience, pipe.read(&mut buffer)).await;
        let late = waited.is_err();
        let length = waited.unwrap_or(Ok(0)).unwrap_or(0);
        open = late || length > 0;
        let data = &buffer[..length];
        if let Some(file) = &mut echo
            && (file.write_all(data).await.is_err() || file.flush().await.is_err())
        {
            // Whoever collected it is gone; the program need not be.
            echo = None;
        }
        line.extend_from_slice(data);
        let whole = late || !open || line.ends_with(b"\n") || line.len() >= PIECE;
        if whole
            && !line.is_empty()
            && tell
                .send((stream, std::mem::take(&mut line)))
                .await
                .is_err()
        {
            return;
        }
    }
}

/// Passes on what happens until the server lets go.
async fn watch(stream: UnixStream, mut events: broadcast::Receiver<FromApp>) {
    let (mut reader, mut writer) = frames(stream);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Ok(event) => {
                    if writer.send(&event).await.is_err() {
                        return;
                    }
                }
                // A server that cannot keep up loses some of the output, not the program.
                Err(broadcast::error::RecvError::Lagged(lost)) => {
                    tracing::warn!(lost, "the server did not keep up with the program's output");
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
            // The server never says anything here; this only ends with the connection.
            _ = reader.next::<()>() => return,
        }
    }
}

/// How a program ended, in words that follow "The program".
pub fn describe(ending: &Ending) -> String {
    match ending {
        Ending::Exited(code) => format!("ended with exit code {code}"),
        Ending::Signalled(signal) => format!("was ended by signal {signal}"),
        Ending::Limit(reason) => format!("was stopped at its {} limit", reason.as_str()),
        Ending::Cancelled => "was stopped".to_owned(),
        Ending::NotStarted(why) => format!("could not be started: {why}"),
        Ending::Starved { .. } => "was stopped, since the machine was too busy for it".to_owned(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_line_that_is_written_in_pieces_is_passed_on_whole() {
        let (mut program, output) = pipe::pipe().unwrap();
        let (tell, mut told) = mpsc::channel(16);
        let reading = tokio::spawn(read_all(OutputStream::Stdout, output, tell, None));
        let mut next = async || told.recv().await.map(|(_, data)| data);
        for piece in [&b"GET"[..], b" ", b"/x", b"\n"] {
            program.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(next().await.as_deref(), Some(&b"GET /x\n"[..]));
        // A prompt is not kept back for ever, and the end of what it wrote is not lost.
        program.write_all(b"name? ").await.unwrap();
        assert_eq!(next().await.as_deref(), Some(&b"name? "[..]));
        program.write_all(b"last").await.unwrap();
        drop(program);
        assert_eq!(next().await.as_deref(), Some(&b"last"[..]));
        assert_eq!(next().await, None);
        reading.await.unwrap();
    }
}
