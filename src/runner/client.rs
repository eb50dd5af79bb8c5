//! The server's side of a session: one long-lived connection to one runner.
//!
//! The session outlives its connection. When the stream is cut or falls silent it is made anew and
//! every run is re-attached by its job id; a run is lost only when the runner no longer has it.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, sleep, sleep_until, timeout};

use super::wire::{
    FrameReader, FrameWriter, FromRunner, Job, JobEvent, JobId, MAX_BUILD_BYTES, ToRunner, VERSION,
    WireError, frames,
};

/// A heartbeat each way this often (design.md §7).
const HEARTBEAT: Duration = Duration::from_secs(5);

/// Two missed heartbeats: this connection leads nowhere any more, and another one is made. A runner that
/// does not greet on that either is dead: 15 s in all (design.md §7).
const SILENCE: Duration = Duration::from_secs(10);

/// Longest wait for the runner's greeting: it has nothing to do before it.
const GREETING: Duration = Duration::from_secs(5);

/// How long an acknowledgement waits for a frame to go with. The way to the runner may lead through five
/// processes, and what is sent right after a run's end takes processor time from the run's reply.
const ACK_PAUSE: Duration = Duration::from_millis(50);

/// How long a broken connection is tried again before its runs are given up. A sandbox that died is
/// made anew well within it.
const RECONNECT_PATIENCE: Duration = Duration::from_secs(45);

/// How long it is tried when whoever makes connections does not answer: a cluster's API server that is
/// away for ten minutes. The runs go on meanwhile, and are re-attached.
const AWAY_PATIENCE: Duration = Duration::from_secs(12 * 60);

/// A connection on which nothing has run for this long is let go: a runner without one ends itself
/// after a while, and with it the sandbox of a user who has left. Long enough for somebody who thinks
/// between two tries.
const IDLE: Duration = Duration::from_secs(20 * 60);

/// A run whose runner died before it wrote anything is started once more, and no more.
const MAX_STARTS: u32 = 2;

/// Tries to fetch what a job built; each gets over one lost connection.
const MAX_FETCHES: u32 = 3;

/// A duplex stream of bytes.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// Makes connections to one runner.
#[async_trait]
pub trait Connect: Send + Sync + 'static {
    /// A new connection.
    async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError>;
}

/// Why there is no connection, in words, and what that means for the next try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectError {
    /// It may pass within a minute.
    Passing(String),
    /// It will not pass by itself.
    Lasting(String),
    /// Nobody can be asked for a connection now; the runner may be well.
    Away(String),
}

impl ConnectError {
    fn patience(&self) -> Duration {
        match self {
            ConnectError::Passing(_) => RECONNECT_PATIENCE,
            ConnectError::Lasting(_) => Duration::ZERO,
            ConnectError::Away(_) => AWAY_PATIENCE,
        }
    }

    fn into_words(self) -> String {
        match self {
            ConnectError::Passing(why) | ConnectError::Lasting(why) | ConnectError::Away(why) => {
                why
            }
        }
    }
}

/// What a run's owner is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunEvent {
    /// Something happened.
    Event {
        /// The runner's number for it, from 1 without gaps.
        seq: u64,
        /// What.
        event: JobEvent,
    },
    /// The outcome cannot be known any more, and why.
    Lost(String),
}

enum Command {
    Start(Box<Job>, mpsc::UnboundedSender<RunEvent>),
    Attach(JobId, u64, mpsc::UnboundedSender<RunEvent>),
    Send(ToRunner),
    Input(JobId, Piece),
    Cancel(JobId),
    Fetch(JobId, oneshot::Sender<Result<Vec<u8>, String>>),
    Connect(oneshot::Sender<Result<(), String>>),
}

/// A piece of a program's input. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Bytes that came before it.
    pub offset: u64,
    /// The bytes.
    pub data: Bytes,
    /// Nothing follows.
    pub eof: bool,
}

impl Piece {
    fn frame(&self, job: JobId) -> ToRunner {
        ToRunner::Stdin {
            job,
            offset: self.offset,
            data: self.data.to_vec(),
            eof: self.eof,
        }
    }
}

/// A session. Cheap to clone; ends when the last clone is dropped.
#[derive(Debug, Clone)]
pub struct Session {
    commands: mpsc::UnboundedSender<Command>,
    connected: watch::Receiver<bool>,
}

/// One run, as its owner sees it.
#[derive(Debug)]
pub struct Run {
    id: JobId,
    // Unbounded: a run's output limit bounds it.
    events: mpsc::UnboundedReceiver<RunEvent>,
    handle: RunHandle,
}

/// Speaks to a run; may be cloned and sent elsewhere.
#[derive(Debug, Clone)]
pub struct RunHandle {
    id: JobId,
    session: Session,
}

impl Session {
    /// A session over connections from `connect`; the first is made when the first run comes.
    pub fn open(connect: impl Connect) -> Session {
        Self::open_for(connect, IDLE)
    }

    fn open_for(connect: impl Connect, idle: Duration) -> Session {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (connection, connected) = watch::channel(false);
        tokio::spawn(keep(connect, idle, receiver, connection));
        Session {
            commands,
            connected,
        }
    }

    /// Resolves when there is a connection to a living runner, or with the reason why there is none.
    pub async fn ready(&self) -> Result<(), String> {
        if *self.connected.borrow() {
            return Ok(());
        }
        let (tell, told) = oneshot::channel();
        self.command(Command::Connect(tell));
        told.await
            .unwrap_or_else(|_| Err("the session has ended".to_owned()))
    }

    /// Whether there is a connection now. While there is none it is being made, or the runs are told
    /// that they are lost.
    pub fn is_connected(&self) -> bool {
        *self.connected.borrow()
    }

    /// Starts a job; the same id again is the same run.
    pub fn start(&self, job: Job) -> Run {
        let (tell, events) = mpsc::unbounded_channel();
        let id = job.id;
        self.command(Command::Start(Box::new(job), tell));
        self.run(id, events)
    }

    /// Finds a run again, with the events after `after`.
    pub fn attach(&self, id: JobId, after: u64) -> Run {
        let (tell, events) = mpsc::unbounded_channel();
        self.command(Command::Attach(id, after, tell));
        self.run(id, events)
    }

    /// The archive of what this job built, or why it cannot be had any more.
    pub async fn build(&self, job: JobId) -> Result<Vec<u8>, String> {
        for _ in 0..MAX_FETCHES {
            self.ready().await?;
            let (tell, told) = oneshot::channel();
            self.command(Command::Fetch(job, tell));
            // Without an answer the connection broke.
            if let Ok(answer) = told.await {
                return answer;
            }
        }
        Err(format!("its connection broke {MAX_FETCHES} times"))
    }

    /// What this job built is not needed any more.
    pub fn forget(&self, job: JobId) {
        self.command(Command::Send(ToRunner::Forget { job }));
    }

    /// Ends this job, if it runs.
    pub fn cancel(&self, job: JobId) {
        self.command(Command::Cancel(job));
    }

    /// Ends the runner and everything in its sandbox.
    pub fn shutdown(&self) {
        self.command(Command::Send(ToRunner::Shutdown));
    }

    fn run(&self, id: JobId, events: mpsc::UnboundedReceiver<RunEvent>) -> Run {
        let handle = RunHandle {
            id,
            session: self.clone(),
        };
        Run { id, events, handle }
    }

    fn command(&self, command: Command) {
        // The task ends only when every handle is gone; then there is nobody to be told.
        let _ = self.commands.send(command);
    }
}

impl Run {
    /// Which.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// What happens next.
    pub async fn next(&mut self) -> RunEvent {
        match self.events.recv().await {
            Some(event) => event,
            None => RunEvent::Lost("the session has ended".to_owned()),
        }
    }

    /// Speaks to the run.
    pub fn handle(&self) -> RunHandle {
        self.handle.clone()
    }

    /// Everything up to `seq` is stored; the runner may forget it.
    pub fn stored(&self, seq: u64) {
        let job = self.id;
        self.handle
            .session
            .command(Command::Send(ToRunner::Ack { job, seq }));
    }
}

impl RunHandle {
    /// More input. It is sent again when the connection breaks.
    pub fn stdin(&self, piece: Piece) {
        self.session.command(Command::Input(self.id, piece));
    }

    /// Kills the run's whole process tree.
    pub fn cancel(&self) {
        self.session.cancel(self.id);
    }
}

/// A run that has not ended.
struct Active {
    job: Option<Box<Job>>,
    starts: u32,
    last: u64,
    tell: mpsc::UnboundedSender<RunEvent>,
    /// All that it was given: its runner passes over what it has already. The server bounds it.
    input: Vec<Piece>,
    cancelled: bool,
}

impl Active {
    fn new(job: Option<Box<Job>>, last: u64, tell: mpsc::UnboundedSender<RunEvent>) -> Self {
        Self {
            job,
            starts: 0,
            last,
            tell,
            input: Vec::new(),
            cancelled: false,
        }
    }

    /// What follows the opening on a new connection.
    fn told(&self, id: JobId) -> impl Iterator<Item = ToRunner> {
        let input = self.input.iter().map(move |piece| piece.frame(id));
        let cancel = self.cancelled.then_some(ToRunner::Cancel { job: id });
        input.chain(cancel)
    }

    /// What to send on a new connection: a start, while nothing was heard of it; else re-attach.
    fn opening(&mut self, id: JobId) -> ToRunner {
        match &self.job {
            Some(job) if self.last == 0 && self.starts < MAX_STARTS => {
                self.starts += 1;
                ToRunner::Start(job.clone())
            }
            _ => ToRunner::Attach {
                job: id,
                after: self.last,
            },
        }
    }
}

/// What a job built, on its way.
struct Arriving {
    archive: Vec<u8>,
    tell: oneshot::Sender<Result<Vec<u8>, String>>,
}

type Runs = HashMap<JobId, Active>;
type Builds = HashMap<JobId, Arriving>;
type Reader = FrameReader<Box<dyn ByteStream>>;
type Writer = FrameWriter<Box<dyn ByteStream>>;

/// Owns the connection for as long as anybody holds the session.
async fn keep(
    connect: impl Connect,
    idle: Duration,
    mut commands: mpsc::UnboundedReceiver<Command>,
    connection: watch::Sender<bool>,
) {
    let mut runs = Runs::new();
    let mut builds = Builds::new();
    let mut unsent = Vec::new();
    let mut waiting: Vec<oneshot::Sender<Result<(), String>>> = Vec::new();
    loop {
        if runs.is_empty() {
            match commands.recv().await {
                Some(Command::Connect(tell)) => waiting.push(tell),
                Some(command) => unsent.extend(admit(command, &mut runs, &mut builds)),
                None => return,
            }
        }
        let (reader, writer) = match reconnect(&connect).await {
            Ok(streams) => {
                connection.send_replace(true);
                for waiting in waiting.drain(..) {
                    let _ = waiting.send(Ok(()));
                }
                streams
            }
            Err(why) => {
                unsent.clear();
                builds.clear();
                for waiting in waiting.drain(..) {
                    let _ = waiting.send(Err(why.clone()));
                }
                for (_, run) in runs.drain() {
                    let _ = run.tell.send(RunEvent::Lost(why.clone()));
                }
                continue;
            }
        };
        let streams = (reader, writer);
        let ended = converse(
            streams,
            &mut unsent,
            idle,
            &mut commands,
            &mut runs,
            &mut builds,
        )
        .await;
        connection.send_replace(false);
        // What is not known to have arrived is told again where twice is as good as once.
        unsent.retain(|frame| {
            matches!(
                frame,
                ToRunner::Ack { .. } | ToRunner::Cancel { .. } | ToRunner::Forget { .. }
            )
        });
        // Whoever waits for one asks again.
        builds.clear();
        match ended {
            Ok(Over::Dropped) => return,
            Ok(Over::Idle) => tracing::debug!("an idle runner's connection was let go"),
            Err(error) if runs.is_empty() => {
                tracing::debug!(%error, "an idle runner's connection ended");
            }
            Err(error) => tracing::warn!(%error, runs = runs.len(), "a runner's connection ended"),
        }
    }
}

/// Notes a command; `Some` is a frame to send as it is.
fn admit(command: Command, runs: &mut Runs, builds: &mut Builds) -> Option<ToRunner> {
    let (id, active) = match command {
        Command::Send(frame) => return Some(frame),
        Command::Fetch(job, tell) => {
            let archive = Vec::new();
            builds.insert(job, Arriving { archive, tell });
            return Some(ToRunner::Fetch { job });
        }
        Command::Connect(tell) => {
            let _ = tell.send(Ok(()));
            return None;
        }
        Command::Input(job, piece) => {
            let run = runs.get_mut(&job)?;
            let frame = piece.frame(job);
            run.input.push(piece);
            return Some(frame);
        }
        Command::Cancel(job) => {
            if let Some(run) = runs.get_mut(&job) {
                run.cancelled = true;
            }
            return Some(ToRunner::Cancel { job });
        }
        Command::Start(job, tell) => (job.id, Active::new(Some(job), 0, tell)),
        Command::Attach(id, last, tell) => (id, Active::new(None, last, tell)),
    };
    runs.insert(id, active);
    None
}

async fn reconnect(connect: &impl Connect) -> Result<(Reader, Writer), String> {
    let started = Instant::now();
    let mut pauses = ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
        .build();
    loop {
        let why = match connect.connect().await {
            Ok(stream) => match greet(stream).await {
                Ok(connection) => return Ok(connection),
                // It will speak the same the next time.
                Err(error @ WireError::Version { .. }) => ConnectError::Lasting(error.to_string()),
                Err(error) => ConnectError::Passing(error.to_string()),
            },
            Err(error) => error,
        };
        let pause = pauses.next().unwrap_or(HEARTBEAT);
        if started.elapsed() + pause > why.patience() {
            return Err(why.into_words());
        }
        let why = why.into_words();
        tracing::warn!(%why, "a runner cannot be reached; trying again");
        sleep(pause).await;
    }
}

async fn greet(stream: Box<dyn ByteStream>) -> Result<(Reader, Writer), WireError> {
    let (mut reader, mut writer) = frames(stream);
    writer.send(&ToRunner::Hello { version: VERSION }).await?;
    let hello = timeout(GREETING, reader.next::<FromRunner>())
        .await
        .map_err(|_| silent())??;
    match hello {
        FromRunner::Hello { version: VERSION } => Ok((reader, writer)),
        FromRunner::Hello { version } => Err(WireError::Version { theirs: version }),
        _ => Err(WireError::Version { theirs: 0 }),
    }
}

/// Sends frames together; a runner that does not read is as dead as one that does not speak.
async fn say(writer: &mut Writer, frames: &[ToRunner]) -> Result<(), WireError> {
    timeout(SILENCE, writer.send_all(frames))
        .await
        .map_err(|_| silent())?
}

fn silent() -> WireError {
    WireError::Lost(std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "the runner fell silent",
    ))
}

/// Why a connection that works is no longer needed.
enum Over {
    /// Nobody holds the session any more.
    Dropped,
    /// Nothing has run for long.
    Idle,
}

/// Speaks over one connection until it breaks (`Err`) or is no longer needed.
async fn converse(
    (mut reader, mut writer): (Reader, Writer),
    unsent: &mut Vec<ToRunner>,
    idle: Duration,
    commands: &mut mpsc::UnboundedReceiver<Command>,
    runs: &mut Runs,
    builds: &mut Builds,
) -> Result<Over, WireError> {
    for (id, run) in runs.iter_mut() {
        say(&mut writer, &[run.opening(*id)]).await?;
        for frame in run.told(*id) {
            say(&mut writer, &[frame]).await?;
        }
    }
    say(&mut writer, unsent).await?;
    unsent.clear();
    let mut acks_due = Instant::now();
    let mut heartbeat = tokio::time::interval(HEARTBEAT);
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    let mut used = Instant::now();
    loop {
        tokio::select! {
            command = commands.recv() => match command {
                None => {
                    say(&mut writer, unsent).await?;
                    return Ok(Over::Dropped);
                }
                Some(command) => {
                    used = Instant::now();
                    let id = match &command {
                        Command::Start(job, _) => Some(job.id),
                        Command::Attach(id, ..) => Some(*id),
                        Command::Send(_)
                        | Command::Input(..)
                        | Command::Cancel(_)
                        | Command::Fetch(..)
                        | Command::Connect(_) => None,
                    };
                    let frame = admit(command, runs, builds);
                    let opening = id.and_then(|id| Some(runs.get_mut(&id)?.opening(id)));
                    let is_ack = matches!(frame, Some(ToRunner::Ack { .. }));
                    if is_ack && unsent.is_empty() {
                        acks_due = Instant::now() + ACK_PAUSE;
                    }
                    unsent.extend(frame.into_iter().chain(opening));
                    if !is_ack && !unsent.is_empty() {
                        say(&mut writer, unsent).await?;
                        unsent.clear();
                    }
                }
            },
            () = sleep_until(acks_due), if !unsent.is_empty() => {
                say(&mut writer, unsent).await?;
                unsent.clear();
            }
            frame = reader.next::<FromRunner>() => {
                heard = Instant::now();
                if !runs.is_empty() {
                    used = heard;
                }
                receive(frame?, runs, builds);
            }
            () = sleep_until(used + idle), if runs.is_empty() => {
                return Ok(Over::Idle);
            }
            _ = heartbeat.tick() => say(&mut writer, &[ToRunner::Ping]).await?,
            () = sleep_until(heard + SILENCE) => return Err(silent()),
        }
    }
}

fn receive(frame: FromRunner, runs: &mut Runs, builds: &mut Builds) {
    match frame {
        // Lines are lent on connections of their own.
        FromRunner::Hello { .. } | FromRunner::Pong | FromRunner::Taken => {}
        FromRunner::Build { job, data, last } => {
            let Some(mut build) = builds.remove(&job) else {
                return;
            };
            build.archive.extend_from_slice(&data);
            if build.archive.len() > MAX_BUILD_BYTES {
                let why = "it is larger than a runner may send";
                let _ = build.tell.send(Err(why.to_owned()));
            } else if last {
                let _ = build.tell.send(Ok(build.archive));
            } else {
                builds.insert(job, build);
            }
        }
        FromRunner::NoBuild { job } => {
            if let Some(build) = builds.remove(&job) {
                let why = "the sandbox that compiled it is gone, and what it compiled with it";
                let _ = build.tell.send(Err(why.to_owned()));
            }
        }
        FromRunner::Unknown { job } => {
            if let Some(run) = runs.remove(&job) {
                let why = "the sandbox that ran it is gone, and its outcome with it";
                let _ = run.tell.send(RunEvent::Lost(why.to_owned()));
            }
        }
        FromRunner::Event { job, seq, event } => {
            let Some(run) = runs.get_mut(&job) else {
                return;
            };
            if seq <= run.last {
                return;
            }
            run.last = seq;
            let ended = matches!(event, JobEvent::Ended(_));
            let _ = run.tell.send(RunEvent::Event { seq, event });
            if ended {
                runs.remove(&job);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Runners that answer and run nothing.
    struct Runners(mpsc::UnboundedSender<Seen>);

    /// What a runner sees of a session.
    #[derive(Debug, PartialEq)]
    enum Seen {
        Connected,
        Frame(ToRunner),
        LetGo,
    }

    #[async_trait]
    impl Connect for Runners {
        async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError> {
            let (ours, theirs) = tokio::io::duplex(4_096);
            tokio::spawn(answer(theirs, self.0.clone()));
            Ok(Box::new(ours))
        }
    }

    async fn answer(stream: tokio::io::DuplexStream, tell: mpsc::UnboundedSender<Seen>) {
        tell.send(Seen::Connected).unwrap();
        let (mut reader, mut writer) = frames(stream);
        while let Ok(frame) = reader.next::<ToRunner>().await {
            let answer = match frame {
                ToRunner::Hello { version } => FromRunner::Hello { version },
                ToRunner::Ping => FromRunner::Pong,
                frame => {
                    tell.send(Seen::Frame(frame)).unwrap();
                    continue;
                }
            };
            writer.send(&answer).await.unwrap();
        }
        tell.send(Seen::LetGo).unwrap();
    }

    #[tokio::test]
    async fn an_idle_connection_is_let_go_and_made_anew_when_it_is_needed() {
        let (tell, mut told) = mpsc::unbounded_channel();
        let idle = Duration::from_millis(50);
        let session = Session::open_for(Runners(tell), idle);
        for _ in 0..2 {
            let since = Instant::now();
            session.ready().await.unwrap();
            assert_eq!(told.recv().await, Some(Seen::Connected));
            assert_eq!(told.recv().await, Some(Seen::LetGo));
            assert!(since.elapsed() >= idle);
        }
    }

    #[tokio::test]
    async fn an_acknowledgement_goes_with_the_next_frame_or_after_a_pause() {
        let (tell, mut told) = mpsc::unbounded_channel();
        let session = Session::open(Runners(tell));
        session.ready().await.unwrap();
        assert_eq!(told.recv().await, Some(Seen::Connected));
        let job = JobId {
            submission: crate::model::SubmissionId::new(),
            run: 0,
        };
        let run = session.attach(job, 7);
        assert_eq!(
            told.recv().await,
            Some(Seen::Frame(ToRunner::Attach { job, after: 7 }))
        );
        let since = Instant::now();
        let ack = |seq| Some(Seen::Frame(ToRunner::Ack { job, seq }));
        run.stored(8);
        assert_eq!(told.recv().await, ack(8));
        assert!(since.elapsed() >= ACK_PAUSE);
        run.stored(9);
        run.stored(10);
        run.handle().cancel();
        assert_eq!(told.recv().await, ack(9));
        assert_eq!(told.recv().await, ack(10));
        assert_eq!(
            told.recv().await,
            Some(Seen::Frame(ToRunner::Cancel { job }))
        );
    }

    /// A runner whose first connection breaks at the first word of input.
    struct Breaks(mpsc::UnboundedSender<Seen>, std::sync::atomic::AtomicBool);

    #[async_trait]
    impl Connect for Breaks {
        async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError> {
            let breaks = !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
            let (ours, theirs) = tokio::io::duplex(4_096);
            let tell = self.0.clone();
            tokio::spawn(async move {
                tell.send(Seen::Connected).unwrap();
                let (mut reader, mut writer) = frames(theirs);
                while let Ok(frame) = reader.next::<ToRunner>().await {
                    match frame {
                        ToRunner::Hello { version } => {
                            writer.send(&FromRunner::Hello { version }).await.unwrap();
                        }
                        ToRunner::Ping => {}
                        // It is lost with the connection.
                        ToRunner::Stdin { .. } if breaks => return,
                        frame => tell.send(Seen::Frame(frame)).unwrap(),
                    }
                }
            });
            Ok(Box::new(ours))
        }
    }

    #[tokio::test]
    async fn input_and_a_cancellation_survive_a_broken_connection() {
        let (tell, mut told) = mpsc::unbounded_channel();
        let session = Session::open(Breaks(tell, Default::default()));
        let job = JobId {
            submission: crate::model::SubmissionId::new(),
            run: 0,
        };
        let run = session.attach(job, 3);
        let attach = || Some(Seen::Frame(ToRunner::Attach { job, after: 3 }));
        assert_eq!(told.recv().await, Some(Seen::Connected));
        assert_eq!(told.recv().await, attach());
        let piece = |offset, text: &'static str, eof| Piece {
            offset,
            data: Bytes::from_static(text.as_bytes()),
            eof,
        };
        run.handle().stdin(piece(0, "one", false));
        run.handle().stdin(piece(3, "two", true));
        run.handle().cancel();
        assert_eq!(told.recv().await, Some(Seen::Connected));
        assert_eq!(told.recv().await, attach());
        let mut seen = Vec::new();
        let mut cancelled = false;
        while seen.len() < 2 || !cancelled {
            match told.recv().await.unwrap() {
                Seen::Frame(ToRunner::Stdin { offset, data, .. }) => seen.push((offset, data)),
                Seen::Frame(ToRunner::Cancel { .. }) => cancelled = true,
                other => panic!("{other:?}"),
            }
        }
        seen.dedup();
        assert_eq!(seen, [(0, b"one".to_vec()), (3, b"two".to_vec())]);
    }
}
