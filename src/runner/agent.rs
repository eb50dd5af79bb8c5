//! The runner's long-lived half: takes jobs from the server, gives each a slot, keeps what happened
//! until the server has stored it.
//!
//! One thread does all of this. The server going away stops nothing: jobs run on, and their events
//! wait for it to come back.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command as Process;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout};

use super::build::{Builds, pack, unpack};
use super::confine::{Calls, Confinement, Identity, Reach, SIGNALS_VERSION, landlock_version};
use super::job::{Command, Input, JobLog, KILL_PATIENCE, Supervisor};
use super::line::{Lines, Proxy};
use super::network::Network;
use super::process::{Exit, MemoryGroup, PeakBefore, ProcessorGroup, die_first, reap};
use super::report::{Report, with_folder};
use super::slot::{Ground, Slot};
use super::unclaimed::Unclaimed;
use super::warm::{HOOK_FOLDER, Interpreter, Parked, Program, needs_cold_start, pipes};
use super::wire::{DISK_SAID, FromRunner, Job, JobEvent, JobId, ToRunner, VERSION, frames, raw};
use crate::model::{Ending, OutputStream, Reason, RunReport, Usage};

/// The server pings every 5 s; three missed ones mean that it is gone (design.md §7).
const SERVER_SILENCE: Duration = Duration::from_secs(15);

/// Jobs that may wait for a slot. The server queues fairly and sends no more than there are slots,
/// except when several of its connections overlap after a restart.
const MAX_WAITING_JOBS: usize = 64;

/// Frames that may wait for the stream to the server.
const MAX_WAITING_FRAMES: usize = 64;

/// How long the first output after a silence waits for more. The way to the server may lead through five
/// processes, each of which takes processor time from the program: what a short run writes and how it
/// ended go together. People see no difference.
const GATHER: Duration = Duration::from_millis(4);

/// Ended jobs whose events the server has not stored yet. Beyond it the oldest is forgotten, and the
/// server answers `unavailable` for it.
const MAX_UNTOLD_JOBS: usize = 256;

/// Between two looks whether an agent is idle that waited for a job to end.
const LEAST_PATIENCE: Duration = Duration::from_secs(1);

/// Longest wait for an emptied slot. On a machine full of work killed processes die late, and a slot
/// that is given up is lost for good.
const SLOT_PATIENCE: Duration = Duration::from_secs(30);

/// Job ids remembered after everything about them is stored, so that a repeated start is not a
/// second run.
const MAX_REMEMBERED_JOBS: usize = 16_384;

/// How an agent is set up. The platform works it out; the agent does not look around.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AgentConfig {
    /// Jobs at one time.
    pub slots: usize,
    /// The first slot's user id, the others follow; `None`: the sandbox has one user id.
    pub first_uid: Option<u32>,
    /// Where slots stand.
    pub ground: Ground,
    /// What user code may reach.
    pub reach: Vec<Reach>,
    /// Whether internet sockets may be made.
    pub network: bool,
    /// Whether each slot has a network of its own.
    pub networks: bool,
    /// Whether nobody else is in the network of what runs here.
    pub secluded: bool,
    /// Whether the kernel logs the system calls that user code is refused.
    pub log_refused: bool,
    /// The Python to start ahead of time.
    pub python: Option<PathBuf>,
    /// `PATH` of user code.
    pub path: String,
    /// Whose connections are taken; `None`: anybody's who can reach the socket.
    pub peer: Option<u32>,
    /// Seconds without server and jobs after which the agent ends itself; `None`: never.
    pub idle_seconds: Option<u64>,
}

impl AgentConfig {
    /// The variables that every job has.
    pub fn environment(&self, slot: &Slot) -> Vec<(String, String)> {
        let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
        vec![
            ("PATH".to_owned(), self.path.clone()),
            ("HOME".to_owned(), text(slot.workspace())),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            ("TMPDIR".to_owned(), text(slot.temporary())),
        ]
    }

    /// How system calls are filtered.
    pub fn calls(&self, shared_user: bool) -> Calls {
        Calls {
            network: self.network,
            shared_user,
            logged: self.log_refused,
        }
    }

    /// The Python to start ahead of time. Where it has no user id of its own, a run could stop it for all
    /// that follow, unless the kernel keeps a run's signals to itself.
    pub fn waiting_python(&self) -> Option<&PathBuf> {
        let kept_apart = || landlock_version().is_some_and(|version| version >= SIGNALS_VERSION);
        let python = self.python.as_ref()?;
        (self.first_uid.is_some() || kept_apart()).then_some(python)
    }

    /// The folder with the waiting interpreter's hook, as user code's world sees it.
    pub fn hook_folder(&self) -> PathBuf {
        match &self.ground {
            Ground::Roots { .. } => PathBuf::from("/").join(HOOK_FOLDER),
            Ground::Folder(folder) => folder.join(HOOK_FOLDER),
            Ground::Container { hook, .. } => hook.clone(),
        }
    }

    /// The root of user code's world, opened; `None`: it is the runner's own.
    pub fn open_base(&self) -> io::Result<Option<OwnedFd>> {
        let Ground::Roots { base, .. } = &self.ground else {
            return Ok(None);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Some(rustix::fs::open(base, flags, Mode::empty())?))
    }
}

/// Who waits for the end of which process.
#[derive(Debug, Clone, Default)]
pub struct Exits(Rc<RefCell<Waiting>>);

#[derive(Debug, Default)]
struct Waiting {
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    /// Ends that came before anybody asked: a fork's end can overtake the news of the fork.
    early: VecDeque<(i32, Exit)>,
    /// Processor time of ended orphans, by user id: one entry for each slot.
    orphans: HashMap<u32, Duration>,
}

/// A fork has at most a few siblings whose news can overtake it.
const MAX_EARLY_EXITS: usize = 32;

impl Exits {
    /// Resolves when this process has ended.
    pub fn wait_for(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (tell, told) = oneshot::channel();
        let mut state = self.0.borrow_mut();
        match state.early.iter().position(|(early, _)| *early == pid) {
            Some(index) => {
                if let Some((_, exit)) = state.early.remove(index) {
                    let _ = tell.send(exit);
                }
            }
            None => {
                state.waiting.insert(pid, tell);
            }
        }
        told
    }

    /// This process has ended.
    pub fn tell(&self, pid: i32, exit: Exit) {
        let mut state = self.0.borrow_mut();
        match state.waiting.remove(&pid) {
            Some(waiting) => {
                let _ = waiting.send(exit);
            }
            None => {
                if state.early.len() == MAX_EARLY_EXITS {
                    state.early.pop_front();
                }
                state.early.push_back((pid, exit));
            }
        }
    }

    /// Collects the runner's own children that have ended by now.
    pub fn collect(&self) {
        while let Some((pid, uid, exit)) = reap() {
            self.collected(pid, uid, exit);
        }
    }

    /// A child of the runner's own has ended: one that is waited for, or an orphan of a job.
    fn collected(&self, pid: i32, uid: u32, exit: Exit) {
        if self.0.borrow().waiting.contains_key(&pid) {
            self.tell(pid, exit);
        } else {
            *self.0.borrow_mut().orphans.entry(uid).or_default() += exit.cpu;
        }
    }

    /// The orphans of a job that is about to start under this user id.
    fn orphans(&self, uid: u32) -> Orphans {
        let mut orphans = Orphans {
            exits: self.clone(),
            uid,
            before: Duration::ZERO,
        };
        orphans.before = orphans.cpu();
        orphans
    }
}

/// What the orphans of one job have used: nobody in the job waits for them, so their processor time
/// is in nobody's sum, and a chain of them could use any amount.
#[derive(Debug)]
pub struct Orphans {
    exits: Exits,
    uid: u32,
    before: Duration,
}

impl Orphans {
    /// Processor time of those that have ended.
    pub fn cpu(&self) -> Duration {
        let all = self
            .exits
            .0
            .borrow()
            .orphans
            .get(&self.uid)
            .copied()
            .unwrap_or_default();
        all.saturating_sub(self.before)
    }
}

/// A slot in which nothing runs.
#[derive(Debug)]
struct FreeSlot {
    slot: Arc<Slot>,
    parked: Option<Parked>,
}

/// Whether an interpreter may be started for a run that is to be parked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// When there is none, or the one there is worn: the slot is empty, and nothing runs in it.
    IfNeeded,
    /// Never: it would read, with the runner's rights, what the run in the slot has put into its home.
    Never,
}

/// An interpreter on its way for the next run.
type Ahead = JoinHandle<Option<Parked>>;

struct Agent {
    memory: MemoryGroup,
    unclaimed: Rc<Unclaimed>,
    config: AgentConfig,
    confinement: Confinement,
    exits: Exits,
    interpreter: tokio::sync::Mutex<Option<Interpreter>>,
    interpreter_pid: Cell<i32>,
    free: RefCell<VecDeque<FreeSlot>>,
    slots_made: Cell<usize>,
    slot_freed: Notify,
    jobs: RefCell<HashMap<JobId, Rc<JobLog>>>,
    ended: RefCell<VecDeque<JobId>>,
    remembered: RefCell<Remembered>,
    builds: Builds,
    /// Of jobs that may speak to somebody.
    lines: RefCell<HashMap<JobId, Rc<Lines>>>,
    connections: Cell<usize>,
    active: Cell<Instant>,
}

/// A job whose program has begun.
struct Launched {
    program: Program,
    /// Bytes of the largest file that an earlier job built for it.
    given: u64,
    /// Its way out, for as long as it runs.
    proxy: Option<Proxy>,
    /// Its report, while that is read.
    report: Option<JoinHandle<String>>,
}

#[derive(Debug, Default)]
struct Remembered {
    order: VecDeque<JobId>,
    ids: HashSet<JobId>,
}

/// Serves until told to shut down, or idle for longer than configured.
pub async fn run(
    config: AgentConfig,
    listener: UnixListener,
    (memory, processor): (MemoryGroup, ProcessorGroup),
) -> anyhow::Result<()> {
    let confinement = Confinement::new(&config.reach, config.calls(config.first_uid.is_none()))?;
    let agent = Rc::new(Agent {
        memory,
        unclaimed: Unclaimed::of(processor),
        confinement,
        exits: Exits::default(),
        interpreter: tokio::sync::Mutex::new(None),
        interpreter_pid: Cell::new(0),
        free: RefCell::default(),
        slots_made: Cell::new(0),
        slot_freed: Notify::new(),
        jobs: RefCell::default(),
        ended: RefCell::default(),
        remembered: RefCell::default(),
        builds: Builds::default(),
        lines: RefCell::default(),
        connections: Cell::new(0),
        active: Cell::new(Instant::now()),
        config,
    });
    tokio::task::spawn_local(collect_children(agent.exits.clone())?);
    agent.prepare_slots();
    let idle = agent.config.idle_seconds.map(Duration::from_secs);
    loop {
        // From when something last happened: what is left of its time, and not all of it again.
        let patience = idle.map_or(Duration::MAX, |idle| {
            let left = idle.saturating_sub(agent.active.get().elapsed());
            left.max(LEAST_PATIENCE)
        });
        match timeout(patience, listener.accept()).await {
            Ok(accepted) => {
                let (stream, _) = accepted?;
                if agent.takes(&stream) {
                    tokio::task::spawn_local(Rc::clone(&agent).serve(stream));
                }
            }
            Err(_) if idle.is_some_and(|idle| agent.is_idle(idle)) => return Ok(()),
            Err(_) => {}
        }
    }
}

/// Collects every child that ends: jobs started cold, orphans of jobs, helpers.
pub fn collect_children(exits: Exits) -> io::Result<impl Future<Output = ()>> {
    let mut ended = signal(SignalKind::child())?;
    Ok(async move {
        loop {
            exits.collect();
            if ended.recv().await.is_none() {
                return;
            }
        }
    })
}

impl Agent {
    /// Whether whoever connected may say what runs here.
    fn takes(&self, stream: &UnixStream) -> bool {
        let Some(wanted) = self.config.peer else {
            return true;
        };
        match stream.peer_cred() {
            Ok(peer) if peer.uid() == wanted => true,
            Ok(peer) => {
                tracing::warn!(uid = peer.uid(), "a connection by another user is refused");
                false
            }
            Err(error) => {
                tracing::warn!(%error, "a connection by somebody unknown is refused");
                false
            }
        }
    }

    fn is_idle(&self, idle: Duration) -> bool {
        self.connections.get() == 0 && self.running() == 0 && self.active.get().elapsed() >= idle
    }

    /// Two slots to begin with: one runs while the other is made ready again.
    fn prepare_slots(self: &Rc<Self>) {
        for _ in 0..self.config.slots.min(2) {
            if let Err(error) = self.make_slot() {
                tracing::error!(%error, "a slot could not be made");
            }
        }
    }

    /// Makes another slot, which is free soon, while there may be more.
    fn make_slot(self: &Rc<Self>) -> io::Result<()> {
        let index = self.slots_made.get();
        if index >= self.config.slots {
            return Ok(());
        }
        let mut slot = Slot::create(&self.config, index)?;
        if self.config.networks {
            slot = slot.with_network(Network::new()?);
        }
        self.slots_made.set(index + 1);
        // By itself: who waits for it may be cancelled, and then the slot would be lost, and the next fork
        // would be taken for the one that was under way.
        let (this, slot) = (Rc::clone(self), Arc::new(slot));
        tokio::task::spawn_local(async move { this.make_ready(slot, None).await });
        Ok(())
    }

    /// Puts an empty slot back among the free ones, with a warm interpreter waiting in it.
    async fn make_ready(&self, slot: Arc<Slot>, parked: Option<Parked>) {
        let parked = match parked {
            Some(parked) => Some(parked),
            None => self.park_or_not(&slot, Start::IfNeeded).await,
        };
        self.free.borrow_mut().push_back(FreeSlot { slot, parked });
        self.slot_freed.notify_one();
    }

    /// Jobs that have not ended.
    fn running(&self) -> usize {
        let jobs = self.jobs.borrow();
        jobs.values().filter(|log| !log.has_ended()).count()
    }

    /// With one slot the next run would wait for its interpreter: it comes while this one runs. It is
    /// the runner's own until it gets a run; where all share one user id it would be this run's.
    fn park_ahead(self: &Rc<Self>, slot: &Arc<Slot>) -> Option<Ahead> {
        let waits = self.config.slots == 1 && slot.uid.is_some();
        let (this, slot) = (Rc::clone(self), Arc::clone(slot));
        waits.then(|| {
            tokio::task::spawn_local(async move { this.park_or_not(&slot, Start::Never).await })
        })
    }

    async fn park_or_not(&self, slot: &Slot, start: Start) -> Option<Parked> {
        self.park(slot, start).await.unwrap_or_else(|error| {
            tracing::warn!(%error, "no warm interpreter; the next run starts cold");
            None
        })
    }

    async fn park(&self, slot: &Slot, start: Start) -> anyhow::Result<Option<Parked>> {
        let Some(python) = self.config.waiting_python() else {
            return Ok(None);
        };
        let mut interpreter = self.interpreter.lock().await;
        if interpreter.as_ref().is_none_or(Interpreter::is_worn) {
            if start == Start::Never {
                return Ok(None);
            }
            let exits = self.exits.clone();
            let new = Interpreter::start(python, &self.config, &self.confinement, slot, exits)?;
            self.interpreter_pid.set(new.pid());
            *interpreter = Some(new);
        }
        let Some(ready) = interpreter.as_mut() else {
            return Ok(None);
        };
        // Where jobs wait for each other, all of them wait for what one does ahead.
        let ahead = self.running() <= 1;
        let parked = ready.park(slot, ahead).await;
        if parked.is_err()
            && let Some(broken) = interpreter.take()
        {
            broken.kill();
        }
        parked.map(Some)
    }

    /// Waits for a free slot; makes another while there may be more.
    async fn take_slot(self: &Rc<Self>) -> io::Result<FreeSlot> {
        loop {
            let freed = self.slot_freed.notified();
            let free = {
                let mut free = self.free.borrow_mut();
                let warm = free.iter().position(|free| free.parked.is_some());
                free.remove(warm.unwrap_or(0))
            };
            if let Some(free) = free {
                return Ok(free);
            }
            match self.make_slot() {
                Ok(()) => {}
                // There is none to wait for.
                Err(error) if self.slots_made.get() == 0 => return Err(error),
                Err(error) => tracing::error!(%error, "a slot could not be made"),
            }
            freed.await;
        }
    }

    async fn serve(self: Rc<Self>, stream: UnixStream) {
        self.connections.set(self.connections.get() + 1);
        if let Err(error) = self.converse(stream).await {
            tracing::debug!(%error, "a connection to the server ended");
        }
        self.connections.set(self.connections.get() - 1);
        self.active.set(Instant::now());
    }

    async fn converse(self: &Rc<Self>, stream: UnixStream) -> anyhow::Result<()> {
        let (mut reader, mut writer) = frames(stream);
        writer.send(&FromRunner::Hello { version: VERSION }).await?;
        let hello = timeout(SERVER_SILENCE, reader.next::<ToRunner>()).await??;
        anyhow::ensure!(
            hello == ToRunner::Hello { version: VERSION },
            "the server speaks another version: {hello:?}"
        );
        let first = timeout(SERVER_SILENCE, reader.next::<ToRunner>()).await??;
        if let ToRunner::Lend { job } = first {
            // The job has ended meanwhile, where it is not found.
            if let Some(lines) = self.lines.borrow().get(&job) {
                // Nothing follows before the line is taken.
                lines.lend(Box::new(raw(reader, writer).0));
            }
            return Ok(());
        }
        let mut first = Some(first);
        let (tell, mut to_tell) = mpsc::channel::<FromRunner>(MAX_WAITING_FRAMES);
        let mut tasks = JoinSet::new();
        tasks.spawn_local(async move {
            let mut frames = Vec::with_capacity(MAX_WAITING_FRAMES);
            while to_tell.recv_many(&mut frames, MAX_WAITING_FRAMES).await > 0 {
                if writer.send_all(&frames).await.is_err() {
                    return;
                }
                frames.clear();
            }
        });
        loop {
            let frame = match first.take() {
                Some(frame) => frame,
                None => timeout(SERVER_SILENCE, reader.next::<ToRunner>()).await??,
            };
            match frame {
                ToRunner::Hello { .. } => anyhow::bail!("a second greeting"),
                ToRunner::Lend { .. } => anyhow::bail!("a line is lent on a connection in use"),
                ToRunner::Ping => tell.send(FromRunner::Pong).await?,
                ToRunner::Start(job) => match self.start(*job) {
                    Ok(log) => {
                        tasks.spawn_local(forward(log, 0, tell.clone()));
                    }
                    Err(job) => tell.send(FromRunner::Unknown { job }).await?,
                },
                ToRunner::Attach { job, after } => {
                    let log = self.jobs.borrow().get(&job).cloned();
                    match log {
                        Some(log) => {
                            tasks.spawn_local(forward(log, after, tell.clone()));
                        }
                        None => tell.send(FromRunner::Unknown { job }).await?,
                    }
                }
                ToRunner::Stdin {
                    job,
                    offset,
                    data,
                    eof,
                } => self.command(job, Command::Stdin(Input { offset, data, eof })),
                ToRunner::Cancel { job } => self.command(job, Command::Cancel),
                ToRunner::Ack { job, seq } => self.stored(job, seq),
                ToRunner::Fetch { job } => match self.builds.of(job) {
                    Some(archive) => {
                        tasks.spawn_local(send_build(job, archive, tell.clone()));
                    }
                    None => tell.send(FromRunner::NoBuild { job }).await?,
                },
                ToRunner::Forget { job } => self.builds.forget(job),
                ToRunner::Shutdown => std::process::exit(0),
            }
        }
    }

    fn command(&self, job: JobId, command: Command) {
        if let Some(log) = self.jobs.borrow().get(&job) {
            // A job that takes no more commands has ended.
            let _ = log.commands.send(command);
        }
    }

    fn stored(&self, job: JobId, seq: u64) {
        let mut jobs = self.jobs.borrow_mut();
        if jobs.get(&job).is_some_and(|log| log.stored(seq)) {
            jobs.remove(&job);
        }
    }

    /// Starts a job, or finds it when it was started before. `Err` when it ran and is forgotten.
    fn start(self: &Rc<Self>, job: Job) -> Result<Rc<JobLog>, JobId> {
        let id = job.id;
        if let Some(log) = self.jobs.borrow().get(&id) {
            return Ok(Rc::clone(log));
        }
        if !self.remember(id) {
            return Err(id);
        }
        // The server bounds the input of one job, and with it this channel.
        let (commands, receiver) = mpsc::unbounded_channel();
        let log = Rc::new(JobLog::new(id, commands));
        let waiting = self.running();
        self.jobs.borrow_mut().insert(id, Rc::clone(&log));
        if waiting >= self.config.slots + MAX_WAITING_JOBS {
            log.push(JobEvent::Ended(not_started(
                "the sandbox has too many jobs waiting",
            )));
        } else {
            let this = Rc::clone(self);
            let log = Rc::clone(&log);
            tokio::task::spawn_local(async move { this.run_job(job, log, receiver).await });
        }
        Ok(log)
    }

    fn remember(&self, id: JobId) -> bool {
        let mut remembered = self.remembered.borrow_mut();
        if !remembered.ids.insert(id) {
            return false;
        }
        remembered.order.push_back(id);
        if remembered.order.len() > MAX_REMEMBERED_JOBS
            && let Some(oldest) = remembered.order.pop_front()
        {
            remembered.ids.remove(&oldest);
        }
        true
    }

    async fn run_job(
        self: Rc<Self>,
        job: Job,
        log: Rc<JobLog>,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) {
        if let Some(archive) = job.cache.as_deref().and_then(|key| self.builds.cached(key)) {
            self.builds.keep(job.id, archive);
            let mut report = not_started("");
            report.ending = Ending::Exited(0);
            return self.end(&log, report);
        }
        let lines = job.online.then(|| {
            let lines = Rc::new(Lines::default());
            self.lines.borrow_mut().insert(job.id, Rc::clone(&lines));
            lines
        });
        self.run_in_slot(&job, &log, &mut commands, lines).await;
        self.lines.borrow_mut().remove(&job.id);
    }

    async fn run_in_slot(
        self: &Rc<Self>,
        job: &Job,
        log: &Rc<JobLog>,
        commands: &mut mpsc::UnboundedReceiver<Command>,
        lines: Option<Rc<Lines>>,
    ) {
        let mut early = Vec::new();
        let FreeSlot { slot, parked } = tokio::select! {
            free = self.take_slot() => match free {
                Ok(free) => free,
                Err(error) => {
                    let why = format!("no place to run it could be made: {error}");
                    return self.end(log, not_started(&why));
                }
            },
            // Cancelled before it began.
            () = cancelled(commands, &mut early) => {
                let mut report = not_started("");
                report.ending = Ending::Cancelled;
                return self.end(log, report);
            }
        };
        let known = |pid: i32| vec![self.interpreter_pid.get(), pid];
        let kills = self.memory.kills();
        let orphans = self.exits.orphans(slot.uid.unwrap_or(0));
        let launched = self.launch(job, &slot, parked, lines).await;
        let next = self.park_ahead(&slot);
        let report = match launched {
            Ok(Launched {
                program,
                given,
                proxy: _proxy,
                report: reported,
            }) => {
                // Where all share one user id, only the job's own process tree is its own.
                let tree = slot.tree(known(0));
                let exits = (orphans, self.exits.clone(), Rc::clone(&self.unclaimed));
                let supervisor = Supervisor::new(job, &slot, tree, exits, log, given);
                let mut report = supervisor.watch(program, early, commands).await;
                // Nobody in a sandbox can make the kernel do this but by using up its memory.
                if report.ending == Ending::Signalled(libc::SIGKILL) && self.memory.kills() > kills
                {
                    report.ending = Ending::Limit(Reason::Memory);
                }
                if let Some(reported) = reported {
                    // It ends with the last process that could write to it.
                    let _ = slot.tree(known(0)).kill(KILL_PATIENCE).await;
                    let read = timeout(KILL_PATIENCE, reported).await;
                    report.test_report = read.ok().and_then(Result::ok);
                }
                if job.builds && report.ending == Ending::Limit(Reason::Disk) {
                    log.output(OutputStream::Stderr, why_full(job, &slot).as_bytes());
                }
                if !job.output.is_empty() && report.ending == Ending::Exited(0) {
                    // Nor to what it built.
                    let still = slot.tree(known(0)).kill(KILL_PATIENCE).await;
                    if let Err(why) = self.keep_build(&slot, job, still).await {
                        let words = format!("{DISK_SAID}what was built cannot be kept: {why}\n");
                        log.output(OutputStream::Stderr, words.as_bytes());
                        report.ending = Ending::Limit(Reason::Disk);
                    }
                }
                report
            }
            Err(error) => not_started(&format!("{error:#}")),
        };
        self.end(log, report);
        // The news goes first.
        tokio::task::yield_now().await;
        self.recycle(slot, known(0), next).await;
    }

    /// Packs what the job built, for those that follow. `still`: whether all of its processes are gone.
    async fn keep_build(
        &self,
        slot: &Arc<Slot>,
        job: &Job,
        still: io::Result<()>,
    ) -> io::Result<()> {
        still?;
        let (slot, folders) = (Arc::clone(slot), job.output.clone());
        // Packing takes as long as it takes, in which other jobs go on.
        let packed = tokio::task::spawn_blocking(move || pack(slot.folder(), &folders));
        let archive = Arc::new(packed.await.map_err(io::Error::other).flatten()?);
        if let Some(key) = &job.cache {
            self.builds.cache(key, Arc::clone(&archive));
        }
        self.builds.keep(job.id, archive);
        Ok(())
    }

    /// Makes the slot's workspace what the job is to find. Says how large the largest file is that an
    /// earlier job built.
    async fn furnish(&self, job: &Job, slot: &Arc<Slot>) -> anyhow::Result<u64> {
        if job.builds {
            slot.make_room_to_build()?;
        }
        slot.write_files(&job.files)?;
        let mut given = 0;
        if let Some(build) = job.build {
            let archive = self.builds.of(build).ok_or_else(|| {
                anyhow::anyhow!("what was built is gone: the sandbox was made anew meanwhile")
            })?;
            let slot = Arc::clone(slot);
            let unpacked = move || {
                unpack(&archive[..], slot.folder(), slot.uid)?;
                slot.make_room_beside()?;
                Ok(slot.footprint().largest_file)
            };
            given = tokio::task::spawn_blocking(unpacked)
                .await
                .map_err(io::Error::other)
                .flatten()
                .map_err(|error| anyhow::anyhow!("what was built cannot be unpacked: {error}"))?;
        }
        for folder in &job.output {
            slot.make_folder(folder)?;
        }
        Ok(given)
    }

    fn end(&self, log: &Rc<JobLog>, report: RunReport) {
        log.push(JobEvent::Ended(report));
        self.active.set(Instant::now());
        let mut ended = self.ended.borrow_mut();
        ended.push_back(log.id);
        while ended.len() > MAX_UNTOLD_JOBS {
            if let Some(oldest) = ended.pop_front() {
                self.jobs.borrow_mut().remove(&oldest);
            }
        }
    }

    async fn launch(
        &self,
        job: &Job,
        slot: &Arc<Slot>,
        parked: Option<Parked>,
        lines: Option<Rc<Lines>>,
    ) -> anyhow::Result<Launched> {
        let given = self.furnish(job, slot).await?;
        let warm = job.argv.len() >= 2
            && job.argv[0] == "python3"
            && job.argv[1] == "main.py"
            && !needs_cold_start(job);
        let mut env = self.config.environment(slot);
        env.extend(job.env.iter().cloned());
        if let Some(parked) = parked {
            if warm {
                match parked.run(&job.argv, &env, &job.limits).await {
                    Ok(program) => {
                        return Ok(Launched {
                            program,
                            given,
                            proxy: None,
                            report: None,
                        });
                    }
                    // Nothing of the run has begun: it starts cold.
                    Err(error) => tracing::warn!(%error, "a waiting interpreter had died"),
                }
            } else {
                drop(parked);
            }
            slot.tree(vec![self.interpreter_pid.get()])
                .kill(KILL_PATIENCE)
                .await?;
        }
        let own = rustix::process::getuid().as_raw();
        let proxy = match lines {
            Some(lines) => {
                Some(Proxy::start(lines, slot.uid.unwrap_or(own), slot.network()).await?)
            }
            None => None,
        };
        env.extend(proxy.iter().flat_map(Proxy::environment));
        let port = proxy.as_ref().map(|proxy| proxy.port);
        // With a network of its own it may reach what is there, which is this.
        let confinement = match port.filter(|_| !self.config.network) {
            Some(port) => {
                Confinement::with_line(&self.config.reach, self.config.calls(false), port)?
            }
            None => self.confinement.clone(),
        };
        let (program, report) = self.spawn(job, slot, env, &confinement)?;
        Ok(Launched {
            program,
            given,
            proxy,
            report: report.map(|report| tokio::task::spawn_local(report.read())),
        })
    }

    fn spawn(
        &self,
        job: &Job,
        slot: &Slot,
        env: Vec<(String, String)>,
        confinement: &Confinement,
    ) -> anyhow::Result<(Program, Option<Report>)> {
        let argv = match job.report {
            true => with_folder(&job.argv, &self.config.hook_folder()),
            false => job.argv.clone(),
        };
        let Some((name, arguments)) = argv.split_first() else {
            anyhow::bail!("there is no command to run");
        };
        let (parent, child) = pipes()?;
        child.give(slot.uid)?;
        let mut command = Process::new(name);
        command.args(arguments).env_clear().envs(env);
        child.attach(&mut command);
        if let Some(network) = slot.network() {
            network.apply(&mut command);
        }
        let identity = slot.uid.map_or(Identity::Own, Identity::User);
        confinement.apply(
            &mut command,
            identity,
            slot.root(),
            slot.workspace(),
            &job.limits,
        )?;
        let peak_before = PeakBefore::of(&mut command)?;
        // Last: what is done before needs descriptors, and one of them may have the report's number.
        let report = match job.report {
            true => Some(Report::of(&mut command)?),
            false => None,
        };
        let started = command
            .spawn()
            .map_err(|error| anyhow::anyhow!("{name} could not be started: {error}"))?;
        let peak_before = peak_before.read()?;
        let pid = i32::try_from(started.id())?;
        die_first(pid);
        let program = Program {
            stdin: parent.stdin,
            stdout: parent.stdout,
            stderr: parent.stderr,
            pid,
            exit: self.exits.wait_for(pid),
            peak_before,
            cpu_before: Duration::ZERO,
        };
        Ok((program, report))
    }

    /// Ends what is left of a job and makes its slot ready for the next.
    async fn recycle(&self, slot: Arc<Slot>, known: Vec<i32>, next: Option<Ahead>) {
        if let Err(error) = slot.tree(known).kill(SLOT_PATIENCE).await {
            // A slot with a living process in it is lost; the others go on.
            tracing::error!(slot = slot.index, %error, "the slot is given up");
            return;
        }
        // Emptying a full scratch space takes tens of milliseconds, in which heartbeats and other
        // jobs' output must go on.
        let emptied = Arc::clone(&slot);
        let wiped = tokio::task::spawn_blocking(move || emptied.wipe()).await;
        match wiped.map_err(io::Error::other).flatten() {
            Ok(()) => {
                let parked = match next {
                    Some(next) => next.await.ok().flatten(),
                    None => None,
                };
                self.make_ready(slot, parked).await;
            }
            Err(error) => {
                tracing::error!(slot = slot.index, %error, "the slot could not be emptied and is given up");
            }
        }
    }
}

/// Which bound on its files a build met.
fn why_full(job: &Job, slot: &Slot) -> String {
    let (room, largest) = (slot.room(), slot.footprint().largest_file);
    let most = job.limits.file_bytes;
    match largest > most {
        true => format!("{DISK_SAID}a file has {largest} bytes, and {most} are allowed\n"),
        false => format!(
            "{DISK_SAID}its scratch space is full, which has {} MiB and {} files\n",
            room.bytes >> 20,
            room.files
        ),
    }
}

/// Resolves when the job is cancelled. Input that comes before the job has a slot is kept for it.
async fn cancelled(commands: &mut mpsc::UnboundedReceiver<Command>, early: &mut Vec<Input>) {
    loop {
        match commands.recv().await {
            Some(Command::Cancel) => return,
            Some(Command::Stdin(input)) => early.push(input),
            None => std::future::pending().await,
        }
    }
}

async fn forward(log: Rc<JobLog>, mut after: u64, tell: mpsc::Sender<FromRunner>) {
    let mut gathered = after;
    while log.is_more(after).await {
        let job = log.id;
        if after >= gathered {
            // Sooner or later it goes; whether the job has ended by then shows in what follows.
            let _ = timeout(GATHER, log.ended()).await;
            gathered = log.last();
        }
        let Some((seq, event)) = log.after(after) else {
            return;
        };
        if tell
            .send(FromRunner::Event { job, seq, event })
            .await
            .is_err()
        {
            return;
        }
        after = seq;
    }
}

/// Bytes of an archive in one frame: others' frames go in between.
const BUILD_PIECE: usize = 1 << 20;

async fn send_build(job: JobId, archive: Arc<Vec<u8>>, tell: mpsc::Sender<FromRunner>) {
    let pieces = archive.chunks(BUILD_PIECE);
    let count = pieces.len();
    for (number, piece) in (1..).zip(pieces) {
        let (data, last) = (piece.to_vec(), number == count);
        let frame = FromRunner::Build { job, data, last };
        if tell.send(frame).await.is_err() {
            return;
        }
    }
}

fn not_started(why: &str) -> RunReport {
    RunReport {
        ending: Ending::NotStarted(why.to_owned()),
        duration_ms: 0,
        usage: Usage::default(),
        truncated: false,
        test_report: None,
        listened: false,
    }
}
