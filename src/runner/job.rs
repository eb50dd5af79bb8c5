//! One job, from its first instruction to the report of how it ended.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::agent::Orphans;
use super::listening::listening;
use super::process::{Exit, Pressure, Tree};
use super::slot::Slot;
use super::warm::Program;
use super::wire::{Job, JobEvent, JobId, MAX_FRAME_BYTES};
use crate::model::{Ending, Limits, OutputStream, Reason, RunReport, Usage};

/// How often a running job is measured. Memory can grow by some 40 MB in this time, which the
/// sandbox's own bound has room for; a run that ends sooner is not measured at all.
const MEASURE_EVERY: Duration = Duration::from_millis(20);

/// Every so many measurements it is looked at how long the run has waited for a processor: it takes a file
/// for each thread.
const MEASURES_OF_PRESSURE: u32 = 5;

/// The most time that a run gets beyond its wall-clock limit on a machine that keeps it from running. One
/// that has lost more is not judged. The server waits for a minute longer than the limit.
fn most_more(wall: Duration) -> Duration {
    const MOST: Duration = Duration::from_secs(30);
    (2 * wall).min(MOST)
}

/// Bytes taken from a pipe at once: what a pipe holds.
const READ_BYTES: usize = 64 << 10;

/// What may be told to a running job.
#[derive(Debug)]
pub enum Command {
    /// More input.
    Stdin(Input),
    /// End it.
    Cancel,
}

/// A piece of a program's standard input.
#[derive(Debug)]
pub struct Input {
    /// Bytes that came before it.
    pub offset: u64,
    /// The bytes.
    pub data: Vec<u8>,
    /// Nothing follows.
    pub eof: bool,
}

/// What the runner keeps of a job: its events until the server has stored them.
#[derive(Debug)]
pub struct JobLog {
    /// Which.
    pub id: JobId,
    /// Tells it something while it runs.
    pub commands: mpsc::UnboundedSender<Command>,
    events: RefCell<Events>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Events {
    kept: VecDeque<(u64, JobEvent)>,
    last: u64,
    ended: bool,
}

impl JobLog {
    /// An empty log.
    pub fn new(id: JobId, commands: mpsc::UnboundedSender<Command>) -> Self {
        Self {
            id,
            commands,
            events: RefCell::default(),
            changed: Notify::new(),
        }
    }

    /// Adds what happened.
    pub fn push(&self, event: JobEvent) {
        let mut events = self.events.borrow_mut();
        events.last += 1;
        events.ended |= matches!(event, JobEvent::Ended(_));
        let seq = events.last;
        events.kept.push_back((seq, event));
        drop(events);
        self.changed.notify_waiters();
    }

    /// The first event after `seq`, waiting for it if need be; `None` after the last.
    pub async fn after(&self, seq: u64) -> Option<(u64, JobEvent)> {
        loop {
            let changed = self.changed.notified();
            {
                let events = self.events.borrow();
                // Their numbers have no gaps: a program that writes byte by byte makes many.
                let first = events.kept.front().map_or(0, |(number, _)| *number);
                let at = usize::try_from((seq + 1).saturating_sub(first)).ok();
                let next = at.and_then(|at| events.kept.get(at));
                if next.is_some() || events.ended {
                    return next.cloned();
                }
            }
            changed.await;
        }
    }

    /// Forgets what the server has stored. `true` when nothing is left to tell.
    pub fn stored(&self, seq: u64) -> bool {
        let mut events = self.events.borrow_mut();
        while events
            .kept
            .front()
            .is_some_and(|(number, _)| *number <= seq)
        {
            events.kept.pop_front();
        }
        events.ended && events.kept.is_empty()
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        self.events.borrow().ended
    }

    /// Resolves when it has ended.
    pub async fn ended(&self) {
        loop {
            let changed = self.changed.notified();
            if self.has_ended() {
                return;
            }
            changed.await;
        }
    }

    /// The number of the last event.
    pub fn last(&self) -> u64 {
        self.events.borrow().last
    }
}

/// Watches over one running program.
pub struct Supervisor<'a> {
    job: &'a Job,
    slot: &'a Slot,
    tree: Tree,
    orphans: Orphans,
    log: &'a Rc<JobLog>,
    /// Bytes of the largest file that was there before it started, built by an earlier job.
    given: u64,
    started: Instant,
    output_bytes: u64,
    truncated: bool,
    peak: u64,
    /// Something of it listened on a TCP port.
    listened: bool,
    /// What the machine kept from it.
    pressure: Pressure,
    measured: u32,
    /// It has used as much of the processors as one of them has in its time: whatever it waited for,
    /// it has had its chance.
    had_its_time: bool,
    /// A look at the memory that its processes share, under way.
    closer_look: Option<JoinHandle<u64>>,
    stopped: Option<Ending>,
    /// Since when none of its processes was seen.
    gone_since: Option<Instant>,
}

enum Happening {
    Output(OutputStream),
    Exited(Option<Exit>),
    Measure,
    Looked(u64),
    OutOfTime,
    Told(Option<Command>),
}

impl<'a> Supervisor<'a> {
    /// For a job that is about to be started in `slot`.
    pub fn new(
        job: &'a Job,
        slot: &'a Slot,
        tree: Tree,
        orphans: Orphans,
        log: &'a Rc<JobLog>,
        given: u64,
    ) -> Self {
        Self {
            job,
            slot,
            tree,
            orphans,
            log,
            given,
            started: Instant::now(),
            pressure: Pressure::since(std::time::Instant::now()),
            measured: 0,
            had_its_time: false,
            output_bytes: 0,
            truncated: false,
            peak: 0,
            listened: false,
            closer_look: None,
            stopped: None,
            gone_since: None,
        }
    }

    /// Runs until the program has ended, by itself or at a limit. `early` came before it was started.
    pub async fn watch(
        mut self,
        mut program: Program,
        early: Vec<Input>,
        commands: &mut mpsc::UnboundedReceiver<Command>,
    ) -> RunReport {
        let limits = self.job.limits;
        let mut input = StandardInput::new(program.stdin, &self.job.stdin, self.job.stdin_open);
        early.into_iter().for_each(|piece| input.add(piece));
        let deadline = tokio::time::sleep(limits.wall());
        tokio::pin!(deadline);
        let mut measure = measuring(self.started);
        let (mut stdout_open, mut stderr_open, mut told, mut ending) = (true, true, true, false);
        let exit = loop {
            // The select only says what happened; the match below acts on it.
            let happening = tokio::select! {
                exit = &mut program.exit => Happening::Exited(exit.ok().map(|exit| Exit {
                    cpu: exit.cpu.saturating_sub(program.cpu_before),
                    ..exit
                })),
                // An error shows again, as an end, when the pipe is read.
                _ = program.stdout.readable(), if stdout_open =>
                    Happening::Output(OutputStream::Stdout),
                _ = program.stderr.readable(), if stderr_open =>
                    Happening::Output(OutputStream::Stderr),
                command = commands.recv(), if told => Happening::Told(command),
                () = input.feed(), if input.is_waiting() => continue,
                _ = measure.tick() => Happening::Measure,
                resident = looked(&mut self.closer_look) => Happening::Looked(resident),
                () = &mut deadline => Happening::OutOfTime,
            };
            match happening {
                Happening::Exited(exit) => break exit,
                Happening::Output(stream) => {
                    let (pipe, open) = match stream {
                        OutputStream::Stdout => (&program.stdout, &mut stdout_open),
                        OutputStream::Stderr => (&program.stderr, &mut stderr_open),
                    };
                    *open = self.collect(stream, pipe).await;
                }
                Happening::Measure => {
                    self.measure().await;
                    if self
                        .gone_since
                        .is_some_and(|since| since.elapsed() > EXIT_NEWS)
                    {
                        break None;
                    }
                }
                Happening::Looked(resident) => self.resident(resident).await,
                // Killed long ago, and its end was never told: the reason is known all the same.
                Happening::OutOfTime if self.stopped.is_some() => break None,
                Happening::OutOfTime => match self.more_time() {
                    Some(until) => deadline.as_mut().reset(until),
                    None => self.stop(self.too_late()).await,
                },
                Happening::Told(Some(Command::Stdin(piece))) => input.add(piece),
                Happening::Told(Some(Command::Cancel)) => self.stop(Ending::Cancelled).await,
                Happening::Told(None) => told = false,
            }
            if self.stopped.is_some() && !ending {
                ending = true;
                deadline.as_mut().reset(Instant::now() + END_PATIENCE);
            }
        };
        // What it wrote before it ended is in the pipes already.
        self.collect(OutputStream::Stdout, &program.stdout).await;
        self.collect(OutputStream::Stderr, &program.stderr).await;
        self.report(exit)
    }

    /// Takes what is in the pipe now. `false` when it was closed.
    async fn collect(&mut self, stream: OutputStream, pipe: &pipe::Receiver) -> bool {
        loop {
            let mut data = Vec::with_capacity(READ_BYTES.min(4096));
            let open = drain(pipe, &mut data);
            if data.is_empty() {
                return open;
            }
            let room = self
                .job
                .limits
                .output_bytes
                .saturating_sub(self.output_bytes);
            let whole = data.len() as u64;
            if whole > room {
                data.truncate(usize::try_from(room).unwrap_or(usize::MAX));
                self.truncated = true;
            }
            self.output_bytes += data.len() as u64;
            if !data.is_empty() {
                self.log.push(JobEvent::Output { stream, data });
            }
            if self.truncated {
                self.stop(Ending::Limit(Reason::Output)).await;
            }
            if !open {
                return false;
            }
            if (whole as usize) < READ_BYTES {
                return true;
            }
        }
    }

    /// Until when it may run on, once its time is over: for as long as the machine kept it from running,
    /// within bounds.
    fn more_time(&mut self) -> Option<Instant> {
        let cpu = self.tree.usage().cpu + self.orphans.cpu();
        self.pressure.look(&self.tree, cpu);
        let wall = self.job.limits.wall();
        self.had_its_time = self.pressure.used() >= wall;
        if self.had_its_time {
            return None;
        }
        let allowed = wall + self.pressure.lost().min(most_more(wall));
        let left = allowed.saturating_sub(self.started.elapsed());
        (!left.is_zero()).then(|| Instant::now() + left.max(MEASURE_EVERY))
    }

    /// Why it is stopped when its time is over.
    fn too_late(&self) -> Ending {
        let lost = self.pressure.lost();
        if !self.had_its_time && lost > most_more(self.job.limits.wall()) {
            let waited_ms = millis(lost);
            return Ending::Starved { waited_ms };
        }
        Ending::Limit(Reason::Timeout)
    }

    async fn measure(&mut self) {
        let mut usage = self.tree.usage();
        usage.cpu += self.orphans.cpu();
        self.measured += 1;
        if self.measured.is_multiple_of(MEASURES_OF_PRESSURE) {
            self.pressure.look(&self.tree, usage.cpu);
            self.look_for_listeners();
        }
        self.gone_since = match usage.processes {
            0 => self.gone_since.or_else(|| Some(Instant::now())),
            _ => None,
        };
        if usage.resident <= self.job.limits.memory_bytes {
            self.peak = self.peak.max(usage.resident);
        } else if self.closer_look.is_none() {
            // Pages that its processes share were counted once for each; look closer. Not here: such a
            // look waits for each process that is changing its memory, and those may be many and wait
            // for their turn themselves, while other jobs' time runs out.
            let tree = self.tree.clone();
            let look = tokio::task::spawn_blocking(move || tree.proportional_memory());
            self.closer_look = Some(look);
        }
        if usage.cpu.as_millis() > u128::from(self.job.limits.cpu_ms) {
            self.stop(Ending::Limit(Reason::Cpu)).await;
        } else if self.slot.is_full() {
            self.stop(Ending::Limit(Reason::Disk)).await;
        }
    }

    /// A program that listens while it is tested is expected to when it is released.
    fn look_for_listeners(&mut self) {
        // What listens in an installation's network is its proxy. Without a user id and a network of its own
        // others cannot be told from it.
        let alone = self.slot.uid.is_some() || self.slot.root().is_some();
        if self.listened || self.job.online || !alone {
            return;
        }
        let uid = self.slot.uid;
        let uid = uid.unwrap_or_else(|| rustix::process::getuid().as_raw());
        let pid = self.tree.pids().first().copied();
        self.listened = pid.is_some_and(|pid| !listening(Some(pid), uid).is_empty());
    }

    /// Its memory was found to be this much, shared pages counted once.
    async fn resident(&mut self, bytes: u64) {
        self.closer_look = None;
        self.peak = self.peak.max(bytes);
        if bytes > self.job.limits.memory_bytes {
            self.stop(Ending::Limit(Reason::Memory)).await;
        }
    }

    /// Kills the job's whole tree. The first reason stands.
    async fn stop(&mut self, ending: Ending) {
        if self.stopped.is_none() {
            self.stopped = Some(ending);
            if let Err(error) = self.tree.kill(KILL_PATIENCE).await {
                tracing::error!(job = %self.job.id, %error, "a job's processes are still there");
            }
        }
    }

    fn report(&self, exit: Option<Exit>) -> RunReport {
        let limits = self.job.limits;
        let peak = self.peak.max(exit.map_or(0, |exit| exit.peak));
        let exit = exit.map(|exit| Exit {
            cpu: exit.cpu + self.orphans.cpu(),
            ..exit
        });
        let cpu = exit.map_or(Duration::ZERO, |exit| exit.cpu);
        let ending = match (&self.stopped, exit) {
            (Some(ending), _) => ending.clone(),
            (None, None) => Ending::NotStarted("the program's end was not seen".to_owned()),
            (None, Some(exit)) => self.judge(exit, peak, &limits),
        };
        RunReport {
            ending,
            duration_ms: millis(self.started.elapsed()),
            usage: Usage {
                cpu_ms: millis(cpu),
                memory_bytes: peak,
            },
            truncated: self.truncated,
            test_report: None,
            listened: self.listened,
        }
    }

    /// How a program that ended without being stopped really ended: it may have met a limit between
    /// two measurements.
    fn judge(&self, exit: Exit, peak: u64, limits: &Limits) -> Ending {
        let plain = if libc::WIFSIGNALED(exit.status) {
            Ending::Signalled(libc::WTERMSIG(exit.status))
        } else {
            Ending::Exited(libc::WEXITSTATUS(exit.status))
        };
        if peak > limits.memory_bytes {
            return Ending::Limit(Reason::Memory);
        }
        if millis(exit.cpu) > limits.cpu_ms {
            return Ending::Limit(Reason::Cpu);
        }
        let footprint = self.slot.footprint();
        let too_large = footprint.largest_file > limits.file_bytes.max(self.given);
        if too_large || (footprint.full && plain != Ending::Exited(0)) {
            return Ending::Limit(Reason::Disk);
        }
        plain
    }
}

/// Longest wait for killed processes to be gone. The contract allows one second.
pub const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// Longest wait for the news that a killed program has ended. It comes at once; a report without its
/// usage is better than none.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Longest wait for the news of an end after the last process has gone. The news takes
/// microseconds; it is lost only with the waiting interpreter that had to bring it.
const EXIT_NEWS: Duration = Duration::from_secs(2);

/// What the look finds; without one, nothing ever. Safe to drop at any time.
async fn looked(look: &mut Option<JoinHandle<u64>>) -> u64 {
    match look {
        // A look that failed found nothing.
        Some(look) => look.await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

fn measuring(started: Instant) -> Interval {
    let mut interval = interval_at(started + MEASURE_EVERY, MEASURE_EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Reads up to [`READ_BYTES`] without waiting. `false` when the pipe was closed.
fn drain(pipe: &pipe::Receiver, data: &mut Vec<u8>) -> bool {
    loop {
        if data.len() >= READ_BYTES {
            return true;
        }
        match pipe.try_read_buf(data) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
        if data.len() == data.capacity() {
            data.reserve(READ_BYTES - data.len().min(READ_BYTES));
        }
    }
}

/// A program's standard input: what is still to be written, and whether more may come.
struct StandardInput {
    pipe: Option<pipe::Sender>,
    waiting: VecDeque<u8>,
    /// Bytes that came after the first ones.
    received: u64,
    open: bool,
}

impl StandardInput {
    fn new(pipe: pipe::Sender, first: &[u8], open: bool) -> Self {
        let mut input = Self {
            pipe: Some(pipe),
            waiting: first.iter().copied().collect(),
            received: 0,
            open,
        };
        input.close_if_done();
        input
    }

    fn is_waiting(&self) -> bool {
        self.pipe.is_some() && !self.waiting.is_empty()
    }

    fn add(&mut self, Input { offset, data, eof }: Input) {
        // A server that lost the connection sends again what it does not know to have arrived.
        let known = usize::try_from(self.received.saturating_sub(offset)).unwrap_or(usize::MAX);
        let fresh = data.get(known..).unwrap_or_default();
        self.received = self.received.max(offset + data.len() as u64);
        if self.open && self.pipe.is_some() && self.waiting.len() + fresh.len() <= MAX_WAITING_INPUT
        {
            self.waiting.extend(fresh);
        }
        self.open &= !eof;
        self.close_if_done();
    }

    fn close_if_done(&mut self) {
        if self.waiting.is_empty() && !self.open {
            self.pipe = None;
        }
    }

    /// Writes some of it. Safe to drop at any time.
    async fn feed(&mut self) {
        let Some(pipe) = self.pipe.as_mut() else {
            return;
        };
        let (front, _) = self.waiting.as_slices();
        match pipe.write(front).await {
            Ok(written) => {
                self.waiting.drain(..written);
            }
            // The program closed its input or ended: nobody will read the rest.
            Err(_) => self.pipe = None,
        }
        self.close_if_done();
    }
}

/// Most input kept for a program that does not read it: what the server takes in frames for one
/// submission, and what a job can begin with.
const MAX_WAITING_INPUT: usize = (16 << 20) + MAX_FRAME_BYTES;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn input_that_comes_again_is_passed_over() {
        let (pipe, _reader) = pipe::pipe().unwrap();
        let mut input = StandardInput::new(pipe, b"first ", true);
        let piece = |offset, text: &str, eof| Input {
            offset,
            data: text.as_bytes().to_vec(),
            eof,
        };
        input.add(piece(0, "one ", false));
        input.add(piece(4, "two ", false));
        // All of it again, on a new connection, and something more.
        input.add(piece(0, "one ", false));
        input.add(piece(4, "two three", false));
        input.add(piece(13, "", true));
        input.add(piece(13, "too late", false));
        let all: Vec<u8> = input.waiting.iter().copied().collect();
        assert_eq!(String::from_utf8(all).unwrap(), "first one two three");
        assert!(!input.open);
    }
}
