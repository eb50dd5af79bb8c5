//! A released program: started, watched, started again when it fails, and shown to whoever calls.
//!
//! The program listens on port 3000 of its own network namespace. Until it does, and after it has
//! ended, this side answers callers itself: with what is happening, or with the output and the exit
//! code of a program that simply ended.
//!
//! A release serves when it listens there or has ended with exit code 0. One that is a worker, because its
//! submission said so or since nothing is known and it ran for long enough, serves by running. What does
//! not come to serve is stopped, with the reason.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Context as _;
use hyper::Request;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::net::{TcpStream, UnixListener, UnixStream};
use tokio::sync::{Notify, OnceCell, broadcast, mpsc};
use tokio::time::{Instant, sleep, timeout};

use super::agent::{AgentConfig, Exits, collect_children};
use super::build::unpack;
use super::callers::Callers;
use super::confine::{ALL_OPEN_FILES, Confinement, Identity};
use super::job::{KILL_PATIENCE, too_many_files};
use super::line::{Lines, Proxy};
use super::listening::{LOCAL, listening};
use super::page::page;
use super::process::signal as signal_process;
use super::slot::{Ground, Slot, bind};
use super::warm::pipes;
use super::wire::{AppPort, FrameWriter, FromApp, ToApp, WireError, frames};
use super::workspace::{self, Files, Terminal, Tickets, Workspace};
use crate::beneath::{Folder, Kind};
use crate::model::{
    BUILD_ARCHIVE, Ending, Extras, Limits, MAX_EXTRAS_BYTES, OutputStream, PACKAGE_PROXY, Packages,
    RelativePath, Serves, WORKSPACE_EXTRAS, begin_with_a_letter, whole_letters,
};

/// The port a released program listens on (design.md §5).
pub const PROGRAM_PORT: u16 = 3_000;

/// The runner's own ports in a released pod (design.md §5): its own, and the one that callers come to.
pub(super) const RUNNER_PORT: u16 = 3_001;
pub(super) const FRONT_PORT: u16 = 3_002;

/// Events that wait for whoever watches. One who cannot keep up loses what comes before the last so many.
const MAX_WAITING_EVENTS: usize = 1_024;

/// A worker serves by running: one that was declared to be one, or that is tested by nobody, such as a
/// workspace, when it has neither ended nor failed for so long.
const WORKER_AFTER: Duration = Duration::from_secs(5);

/// The same for a release of which nothing is known: a server that is slow to start listens by then.
const UNKNOWN_AFTER: Duration = Duration::from_secs(30);

/// Longest wait for a release that has to listen.
const LISTEN_PATIENCE: Duration = Duration::from_secs(50);

/// How long a release may listen elsewhere only. Some have a second port, which they open first.
const ELSEWHERE_PATIENCE: Duration = Duration::from_secs(20);

/// How often it is looked at where a release listens, and how many addresses are told.
const LOOK_ELSEWHERE: Duration = Duration::from_millis(500);
const MOST_ADDRESSES: usize = 3;

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

/// Time a program gets between SIGTERM and SIGKILL when its user restarts it, or when its server is gone, and
/// how often it is looked at.
const END_PATIENCE: Duration = Duration::from_secs(3);
const END_PAUSE: Duration = Duration::from_millis(10);

/// Longest wait until the callers of a program that ended have what was on its way to them.
const LAST_BYTES: Duration = Duration::from_millis(500);

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

/// What its sockets may hold in the kernel where something else bounds its memory, and these do not count for
/// that: an eighth of the memory that programs have in a pod.
const MOST_IN_SOCKETS: u64 = 64 << 20;

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
    /// Whether it is to listen; `None`: nobody waits for it.
    pub serves: Option<Serves>,
    /// It has served before, elsewhere or earlier, and comes back: it is not stopped for coming up slowly.
    pub served: bool,
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
    events: broadcast::Sender<Told>,
    /// Bytes of output before the next event.
    written: Cell<u64>,
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
    /// Who asks its program for something, and when somebody did last, or had a terminal. Whatever the
    /// program comes to is there to be looked at for as long.
    callers: Callers,
    /// It has served.
    served: Cell<bool>,
    /// It is asked to end, and is not started any more.
    leaves: Cell<bool>,
    /// A life of it is not over.
    lives: Cell<bool>,
    /// This side listens on the program's port, at another address than the program.
    bridged: Cell<bool>,
    /// What its owner shows to see what it wrote.
    tickets: OnceCell<Tickets>,
}

/// How one life of a program ended.
#[derive(Debug)]
pub(super) struct Life {
    /// How.
    pub(super) ending: Ending,
    /// Whether it served before.
    pub(super) served: bool,
    /// Why it was stopped, when it did not come to serve.
    pub(super) unready: Option<String>,
}

impl Life {
    fn failed(error: &anyhow::Error) -> Self {
        Self {
            ending: Ending::NotStarted(format!("{error:#}")),
            served: false,
            unready: None,
        }
    }

    /// In words that follow "the program".
    pub(super) fn words(&self) -> String {
        match &self.unready {
            Some(why) => format!("was stopped: {why}"),
            None => describe(&self.ending),
        }
    }
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
    let (mut build, mut extras) = (None, None);
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
            if path == WORKSPACE_EXTRAS {
                extras = Some(file);
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
    if let Some(extras) = extras.filter(|_| stays) {
        restore(extras, slot)?;
    }
    if let Some(build) = build {
        unpack_build(build, slot, stays)?;
    }
    Ok(())
}

/// Puts back what a workspace had beside the content of its files. It starts without what cannot be put back.
pub(super) fn restore(extras: File, slot: &Slot) -> anyhow::Result<()> {
    let mut text = Vec::new();
    extras
        .take(MAX_EXTRAS_BYTES as u64)
        .read_to_end(&mut text)?;
    let extras: Extras = match serde_json::from_slice(&text) {
        Ok(extras) => extras,
        Err(error) => {
            tracing::warn!(%error, "{WORKSPACE_EXTRAS} cannot be read: the workspace starts without its links, empty folders and execute bits");
            return Ok(());
        }
    };
    let left = Files::open(slot.folder(), slot.uid)?.restore(&extras);
    if let Some(first) = left.first() {
        tracing::warn!(count = left.len(), %first, "some links, folders or execute bits of the workspace are not there any more");
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
            events: broadcast::channel(MAX_WAITING_EVENTS).0,
            written: Cell::new(0),
            watched: Cell::new(false),
            process: Cell::new(None),
            spared: RefCell::default(),
            wanted: Notify::new(),
            is_wanted: Cell::new(false),
            lines: Rc::default(),
            proxy: OnceCell::new(),
            echo,
            callers: Callers::new(),
            served: Cell::new(config.served),
            leaves: Cell::new(false),
            lives: Cell::new(false),
            bridged: Cell::new(false),
            tickets: OnceCell::new(),
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
                self.watch(stream, events).await;
                // As the first process of its namespace this one takes along what is left.
                let _ = self.slot.tree(Vec::new()).kill(KILL_PATIENCE).await;
                std::process::exit(0)
            }
            None => {}
        }
    }

    /// One caller: joined to the program when it listens, answered in its place otherwise.
    pub(super) async fn show(self: Rc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let mut stream = self.callers.connect(stream);
        let Some(mut program) = self.connect().await else {
            return self.stand_in(stream).await;
        };
        let _ = program.set_nodelay(true);
        if tokio::io::copy_bidirectional(&mut stream, &mut program)
            .await
            .is_err()
        {
            // A program that was killed closes nothing properly; its caller is told all the same.
            let _ = timeout(LAST_BYTES, stream.shutdown()).await;
        }
    }

    /// A connection to the program, wherever in here it listens on its port.
    async fn connect(&self) -> Option<TcpStream> {
        // One that may not make internet sockets cannot listen: what answers is somebody else.
        if !self.config.sandbox.network {
            return None;
        }
        for host in LOCAL {
            if let Ok(program) = TcpStream::connect((host, PROGRAM_PORT)).await {
                return Some(program);
            }
        }
        if self.bridged.get() || !self.is_running() {
            return None;
        }
        let own = |address: &SocketAddr| {
            let host = address.ip();
            address.port() == PROGRAM_PORT && !host.is_unspecified() && !LOCAL.contains(&host)
        };
        for address in self.listens().into_iter().filter(own).take(MOST_ADDRESSES) {
            if let Ok(program) = TcpStream::connect(address).await {
                return Some(program);
            }
        }
        None
    }

    /// Whether anything answers on the program's port.
    pub(super) async fn answers(&self) -> bool {
        self.connect().await.is_some()
    }

    /// Where the program listens.
    fn listens(&self) -> Vec<SocketAddr> {
        let own = || rustix::process::getuid().as_raw();
        listening(None, self.slot.uid.unwrap_or_else(own))
    }

    /// Says that this side listens on the program's port for it.
    pub(super) fn set_bridged(&self, bridged: bool) {
        self.bridged.set(bridged);
    }

    /// What its owner's requests are known by.
    pub(super) fn let_in(&self, tickets: Tickets) {
        // Set before: a program has one owner.
        let _ = self.tickets.set(tickets);
    }

    /// Answers one caller in the program's place.
    pub(super) async fn stand_in(&self, stream: impl AsyncRead + AsyncWrite + Unpin) {
        let service = hyper::service::service_fn(|request: Request<Incoming>| {
            let tickets = self.tickets.get();
            let for_owner = tickets.is_some_and(|tickets| tickets.admit(&request));
            let output: Vec<u8> = self.output.borrow().iter().copied().collect();
            let page = page(&self.state.borrow(), &output, for_owner);
            std::future::ready(Ok::<_, Infallible>(page))
        });
        let _ = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    /// Somebody uses it now.
    pub(super) fn notice(&self) {
        self.callers.notice();
    }

    /// For how long nobody has used it.
    pub(super) fn unused(&self) -> Duration {
        self.callers.unused()
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
        let mut last: VecDeque<u8> = output.iter().skip(before).copied().collect();
        begin_with_a_letter(&mut last);
        last.into()
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

    /// Ends it for good: it may answer whom it answers now for so long, if that is wanted, and has as long
    /// after SIGTERM to end by itself.
    pub(super) async fn leave(&self, patience: Duration, drain: bool) {
        self.leaves.set(true);
        let asked = Instant::now();
        while drain && self.callers.wait_for_answers() && asked.elapsed() < patience {
            sleep(END_PAUSE).await;
        }
        self.signal(libc::SIGTERM);
        let asked = Instant::now();
        while self.is_running() && asked.elapsed() < patience {
            sleep(END_PAUSE).await;
        }
        self.kill().await;
        let ended = Instant::now();
        while self.lives.get() && ended.elapsed() < REST_PATIENCE {
            sleep(END_PAUSE).await;
        }
        while self.callers.are_connected() && ended.elapsed() < LAST_BYTES {
            sleep(END_PAUSE).await;
        }
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
    pub(super) fn events(&self) -> broadcast::Receiver<Told> {
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
        child.give(self.slot.uid)?;
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
        while !self.leaves.get() {
            let started = Instant::now();
            let life = self.live_once(restarts).await;
            // What served and then failed is started again; what never served failed for good.
            let again = self.served.get()
                && life.ending != Ending::Exited(0)
                && !self.config.stays
                && !self.leaves.get();
            self.ended(life, again);
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
    pub(super) fn ended(&self, life: Life, again: bool) {
        let Life {
            ending, unready, ..
        } = life;
        self.tell(FromApp::Ended {
            ending,
            again,
            unready,
        });
    }

    /// One life of the program and all that it started.
    pub(super) async fn live_once(&self, restarts: u32) -> Life {
        self.tell(FromApp::Started { restarts });
        *self.state.borrow_mut() = State::Starting;
        self.output.borrow_mut().clear();
        self.lives.set(true);
        let life = match self.run_once().await {
            Ok(life) => life,
            Err(error) => {
                self.process.set(None);
                self.kill().await;
                Life::failed(&error)
            }
        };
        *self.state.borrow_mut() = State::Ended(life.ending.clone());
        self.lives.set(false);
        self.notice();
        life
    }

    /// One life of the program. Then nothing of it is left.
    async fn run_once(&self) -> anyhow::Result<Life> {
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
        let coming = self.comes_up();
        tokio::pin!(coming);
        let (mut came, mut served, mut unready) = (false, false, None);
        let mut out_of_memory = false;
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        let exit = loop {
            tokio::select! {
                exit = &mut exited => break exit?,
                Some((stream, data)) = told.recv() => self.wrote(stream, data),
                up = &mut coming, if !came => {
                    came = true;
                    match up {
                        Ok(()) => {
                            served = true;
                            self.serves();
                        }
                        Err(why) => {
                            unready = Some(why);
                            self.kill().await;
                        }
                    }
                }
                _ = measure.tick() => {
                    if self.uses_too_much() {
                        out_of_memory = true;
                        let _ = self.slot.tree(Vec::new()).kill(KILL_PATIENCE).await;
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
        Ok(Life {
            ending,
            served,
            unready,
        })
    }

    /// Whether it has met its bound on memory, or on what the kernel keeps for it beside that.
    fn uses_too_much(&self) -> bool {
        let tree = self.slot.tree(Vec::new());
        let usage = tree.usage();
        if usage.files > ALL_OPEN_FILES {
            let words = too_many_files(usage.files).into_bytes();
            self.wrote(OutputStream::Stderr, words);
            return true;
        }
        let in_sockets = self.slot.held_by_sockets(usage.one);
        let Some(bytes) = self.config.memory_bytes else {
            return in_sockets > MOST_IN_SOCKETS;
        };
        usage.resident + in_sockets > bytes && tree.proportional_memory() + in_sockets > bytes
    }

    fn serves(&self) {
        self.served.set(true);
        self.notice();
        *self.state.borrow_mut() = State::Serving;
        self.tell(FromApp::Serving);
    }

    /// Resolves when the program serves: it listens, or is a worker and has run for long enough. The error
    /// says why it does not.
    async fn comes_up(&self) -> Result<(), String> {
        let serves = self.config.serves;
        if !self.config.sandbox.network {
            sleep(WORKER_AFTER).await;
            return Ok(());
        }
        let worker_after = match serves {
            None | Some(Serves::No) => WORKER_AFTER,
            Some(Serves::Unknown) => UNKNOWN_AFTER,
            Some(Serves::Yes) => Duration::MAX,
        };
        let judged = matches!(serves, Some(Serves::Yes | Serves::Unknown)) && !self.served.get();
        let started = Instant::now();
        let (mut looked, mut elsewhere) = (started, None);
        let mut pause = TRY_EVERY;
        loop {
            if self.answers().await {
                return Ok(());
            }
            if judged && looked.elapsed() >= LOOK_ELSEWHERE {
                looked = Instant::now();
                let found = self.listens_elsewhere();
                let since = elsewhere.map_or(looked, |(since, _)| since);
                elsewhere = found.map(|found| (since, found));
            }
            let lived = started.elapsed();
            match &elsewhere {
                Some((since, found)) if since.elapsed() >= ELSEWHERE_PATIENCE => {
                    return Err(format!(
                        "it listens on {found} and not on port {PROGRAM_PORT}"
                    ));
                }
                None if lived >= worker_after => return Ok(()),
                _ => {}
            }
            if judged && lived >= LISTEN_PATIENCE {
                let seconds = LISTEN_PATIENCE.as_secs();
                let but = elsewhere
                    .map_or_else(String::new, |(_, found)| format!("; it listens on {found}"));
                return Err(format!(
                    "it did not listen on port {PROGRAM_PORT} within {seconds} s{but}"
                ));
            }
            sleep(pause).await;
            pause = (pause * 5 / 4).min(Duration::from_millis(50));
        }
    }

    /// Where the program listens, when it is nowhere that its callers come to.
    fn listens_elsewhere(&self) -> Option<String> {
        let in_pod = matches!(self.config.sandbox.ground, Ground::Container { .. });
        let ours = |port| in_pod && [RUNNER_PORT, FRONT_PORT].contains(&port);
        let mut found = self.listens();
        found.retain(|address| address.port() != PROGRAM_PORT && !ours(address.port()));
        let told: Vec<String> = found.iter().map(SocketAddr::to_string).collect();
        let told = &told[..told.len().min(MOST_ADDRESSES)];
        (!told.is_empty()).then(|| told.join(", "))
    }

    fn start(&self) -> anyhow::Result<(i32, pipe::Receiver, pipe::Receiver)> {
        let (parent, child) = pipes()?;
        child.give(self.slot.uid)?;
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

    /// Passes on what happens until the server has it ended, or is gone, and with it everybody who could call.
    async fn watch(&self, stream: UnixStream, mut events: broadcast::Receiver<Told>) {
        let (mut reader, mut writer) = frames(stream);
        let mut gaps = Gaps {
            sent: self.written.get(),
        };
        let asked = loop {
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => {
                        if gaps.send(&mut writer, event).await.is_err() {
                            break None;
                        }
                    }
                    // Counted, and told with what comes next.
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => break None,
                },
                asked = reader.next::<ToApp>() => break asked.ok(),
            }
        };
        let Some(ToApp::End { patience_ms, drain }) = asked else {
            return self.leave(END_PATIENCE, false).await;
        };
        let mut ends = std::pin::pin!(self.leave(Duration::from_millis(patience_ms), drain));
        let mut left = false;
        loop {
            let event = tokio::select! {
                biased;
                event = events.recv() => event,
                () = &mut ends, if !left => {
                    left = true;
                    continue;
                }
                // All of it was passed on.
                () = std::future::ready(()), if left => return,
            };
            match event {
                Ok(event) => {
                    if gaps.send(&mut writer, event).await.is_err() {
                        break;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break,
            }
        }
        if !left {
            ends.await;
        }
    }

    fn wrote(&self, stream: OutputStream, data: Vec<u8>) {
        let mut output = self.output.borrow_mut();
        output.extend(&data);
        let excess = output.len().saturating_sub(KEPT_OUTPUT);
        output.drain(..excess);
        begin_with_a_letter(&mut output);
        drop(output);
        self.tell(FromApp::Output { stream, data });
    }

    fn tell(&self, event: FromApp) {
        let before = self.written.get();
        if let FromApp::Output { data, .. } = &event {
            self.written.set(before + data.len() as u64);
        }
        // Nobody may watch.
        let _ = self.events.send(Told { before, event });
    }
}

/// Something that happened to a program.
#[derive(Debug, Clone)]
pub(super) struct Told {
    /// Bytes that it wrote before: who gets less has missed the rest.
    before: u64,
    pub(super) event: FromApp,
}

/// What of a program's output whoever watches it did not get. A watcher that cannot keep up loses some of the output,
/// not the program.
#[derive(Debug)]
struct Gaps {
    /// Bytes up to what was sent last, or up to when the watcher came.
    sent: u64,
}

impl Gaps {
    /// What to say before this: that something is missing.
    fn before(&mut self, told: &Told) -> Option<FromApp> {
        let bytes = told.before.saturating_sub(self.sent);
        let own = match &told.event {
            FromApp::Output { data, .. } => data.len() as u64,
            _ => 0,
        };
        self.sent = told.before + own;
        (bytes > 0).then_some(FromApp::Lost { bytes })
    }

    async fn send<W: AsyncRead + AsyncWrite>(
        &mut self,
        writer: &mut FrameWriter<W>,
        told: Told,
    ) -> Result<(), WireError> {
        if let Some(lost) = self.before(&told) {
            writer.send(&lost).await?;
        }
        writer.send(&told.event).await
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
        // What is left of a letter need not be waited for in vain again and again.
        let patience = if whole_letters(&line) == 0 {
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
        if !whole {
            continue;
        }
        // A letter that has not come whole waits for the rest of it.
        let letters = if open {
            whole_letters(&line)
        } else {
            line.len()
        };
        let rest = line.split_off(letters);
        let piece = std::mem::replace(&mut line, rest);
        if !piece.is_empty() && tell.send((stream, piece)).await.is_err() {
            return;
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn no_letter_is_broken_in_two() {
        // Three bytes each: no piece of a power of two ends with one.
        let line = format!("a{}\n", "語".repeat(24_000));
        let (mut program, output) = pipe::pipe().unwrap();
        let (tell, mut told) = mpsc::channel(16);
        tokio::spawn(read_all(OutputStream::Stdout, output, tell, None));
        let text = line.clone();
        let writing = tokio::spawn(async move {
            program.write_all(text.as_bytes()).await.unwrap();
            // The rest of a letter that never comes, and what is no text, are passed on too.
            program.write_all(b"\xe8\xaa").await.unwrap();
        });
        let (mut whole, mut cut) = (String::new(), 0);
        while let Some((_, piece)) = told.recv().await {
            assert!(piece.len() <= PIECE + 3);
            // Only the last one may end so.
            let text = piece.strip_suffix(b"\xe8\xaa");
            cut += usize::from(text.is_some());
            let text = text.unwrap_or(&piece).to_vec();
            whole.push_str(&String::from_utf8(text).unwrap());
        }
        assert_eq!((whole, cut), (line, 1));
        writing.await.unwrap();
    }

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

    #[tokio::test]
    async fn whoever_does_not_keep_up_is_told_how_much_is_missing() {
        let (events, mut watched) = broadcast::channel(4);
        let piece = |number: u64| Told {
            before: number * 3,
            event: FromApp::Output {
                stream: OutputStream::Stdout,
                data: b"abc".to_vec(),
            },
        };
        // Nobody reads meanwhile.
        for number in 0..10 {
            events.send(piece(number)).unwrap();
        }
        events
            .send(Told {
                before: 30,
                event: FromApp::Serving,
            })
            .unwrap();
        drop(events);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (_, mut writer) = frames(ours);
        let (mut reader, _keep) = frames(theirs);
        let mut gaps = Gaps { sent: 0 };
        loop {
            match watched.recv().await {
                Ok(told) => gaps.send(&mut writer, told).await.unwrap(),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => break,
            }
        }
        drop(writer);
        let (mut lost, mut got, mut gaps) = (0, 0, 0);
        while let Ok(event) = timeout(Duration::from_secs(5), reader.next::<FromApp>())
            .await
            .unwrap()
        {
            match event {
                FromApp::Lost { bytes } => (lost, gaps) = (lost + bytes, gaps + 1),
                FromApp::Output { data, .. } => got += data.len() as u64,
                _ => {}
            }
        }
        assert_eq!((lost, got, gaps), (21, 9, 1));
    }
}
