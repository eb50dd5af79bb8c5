//! One job, from its first instruction to the report of how it ended.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};

use super::agent::{Exits, Orphans};
use super::confine::ALL_OPEN_FILES;
use super::listening::listening;
use super::process::{Exit, Pressure, Tree, has_ended, peak_of};
use super::slot::Slot;
use super::unclaimed::{Share, Unclaimed};
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
    /// Up to here they were given away, and stay as they are.
    given: u64,
    ended: bool,
}

/// Events that nobody was given yet, after which a stream's output joins its last event also when the other
/// stream wrote in between: a program that writes to both by turns, byte by byte, makes no more.
const MOST_BY_TURNS: u64 = 64;

impl Events {
    /// The event that more output of this stream belongs to.
    fn open_for(&mut self, stream: OutputStream, more: usize) -> Option<&mut Vec<u8>> {
        let (given, waiting) = (self.given, self.last - self.given);
        let reach = if waiting < MOST_BY_TURNS { 1 } else { 2 };
        let mut last = self.kept.iter_mut().rev().take(reach);
        last.find_map(|(number, event)| match event {
            JobEvent::Output { stream: of, data }
                if *number > given && *of == stream && data.len() + more <= READ_BYTES =>
            {
                Some(data)
            }
            _ => None,
        })
    }
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

    /// Adds what it wrote: to its last event while nobody was given that, so that a program that writes byte
    /// by byte costs no event for each.
    pub fn output(&self, stream: OutputStream, data: &[u8]) {
        let mut events = self.events.borrow_mut();
        if let Some(before) = events.open_for(stream, data.len()) {
            before.extend_from_slice(data);
            drop(events);
            self.changed.notify_waiters();
            return;
        }
        drop(events);
        let data = data.to_vec();
        self.push(JobEvent::Output { stream, data });
    }

    /// Whether an event follows `seq`, waiting for one if need be; `false` after the last.
    pub async fn is_more(&self, seq: u64) -> bool {
        loop {
            let changed = self.changed.notified();
            {
                let events = self.events.borrow();
                if events.last > seq || events.ended {
                    return events.last > seq;
                }
            }
            changed.await;
        }
    }

    /// The first event after `seq` that is still kept.
    pub fn after(&self, seq: u64) -> Option<(u64, JobEvent)> {
        let mut events = self.events.borrow_mut();
        // Their numbers have no gaps: there may be many.
        let first = events.kept.front().map_or(0, |(number, _)| *number);
        let at = usize::try_from((seq + 1).saturating_sub(first)).ok();
        let next = events.kept.get(at?).cloned()?;
        events.given = events.given.max(next.0);
        Some(next)
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
    exits: Exits,
    unclaimed: Rc<Unclaimed>,
    /// Its share of that, once it was looked at.
    share: Option<Share>,
    log: &'a Rc<JobLog>,
    /// Bytes of the largest file that was there before it started, built by an earlier job.
    given: u64,
    started: Instant,
    output_bytes: u64,
    truncated: bool,
    peak: u64,
    /// Processor time that it had used by the last measure, with children that nobody may wait for any more.
    used: Duration,
    /// What its sockets hold that counts nowhere else.
    in_sockets: u64,
    /// Something of it listened on a TCP port.
    listened: bool,
    /// See [`Program::peak_before`].
    peak_before: u64,
    /// What the machine kept from it.
    pressure: Pressure,
    /// When the runner last looked at anything of it.
    looked: Instant,
    /// For how long the runner was stopped since the last measure of pressure.
    away: Duration,
    /// What was read of a pipe.
    read: Vec<u8>,
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
        (orphans, exits, unclaimed): (Orphans, Exits, Rc<Unclaimed>),
        log: &'a Rc<JobLog>,
        given: u64,
    ) -> Self {
        Self {
            job,
            slot,
            tree,
            orphans,
            exits,
            unclaimed,
            share: None,
            log,
            given,
            started: Instant::now(),
            pressure: Pressure::since(std::time::Instant::now()),
            measured: 0,
            had_its_time: false,
            output_bytes: 0,
            truncated: false,
            peak: 0,
            used: Duration::ZERO,
            in_sockets: 0,
            listened: false,
            peak_before: 0,
            looked: Instant::now(),
            away: Duration::ZERO,
            read: Vec::with_capacity(READ_BYTES),
            closer_look: None,
            stopped: None,
            gone_since: None,
        }
    }

    /// Runs until the program has ended, by itself or at a limit. `early` came before it was started.
    pub async fn watch(
        mut self,
        program: Program,
        early: Vec<Input>,
        commands: &mut mpsc::UnboundedReceiver<Command>,
    ) -> RunReport {
        let limits = self.job.limits;
        let mut input = StandardInput::new(program.stdin, &self.job.stdin, self.job.stdin_open);
        early.into_iter().for_each(|piece| input.add(piece));
        let mut end = End {
            pid: program.pid,
            cpu_before: program.cpu_before,
            told: program.exit,
        };
        self.peak_before = program.peak_before;
        self.look_at_peak(end.pid);
        let deadline = tokio::time::sleep(limits.wall());
        tokio::pin!(deadline);
        let mut measure = measuring(self.started);
        let (mut stdout_open, mut stderr_open, mut told, mut ending) = (true, true, true, false);
        let exit = loop {
            // The select only says what happened; the match below acts on it.
            let happening = tokio::select! {
                exit = end.told() => Happening::Exited(exit),
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
            self.note_absence();
            // A limit that it has met, unless it has ended before it was looked at.
            let limit = match happening {
                Happening::Exited(exit) => break exit,
                Happening::Output(stream) => {
                    let (pipe, open) = match stream {
                        OutputStream::Stdout => (&program.stdout, &mut stdout_open),
                        OutputStream::Stderr => (&program.stderr, &mut stderr_open),
                    };
                    *open = self.collect(stream, pipe).await;
                    None
                }
                Happening::Measure => {
                    self.look_at_peak(end.pid);
                    let limit = self.measure();
                    if self
                        .gone_since
                        .is_some_and(|since| since.elapsed() > EXIT_NEWS)
                    {
                        break end.by_now(&self.exits).await;
                    }
                    limit
                }
                Happening::Looked(resident) => self.resident(resident),
                // Killed long ago, and its end was never told: the reason is known all the same.
                Happening::OutOfTime if self.stopped.is_some() => {
                    break end.by_now(&self.exits).await;
                }
                Happening::OutOfTime => match self.more_time() {
                    Some(until) => {
                        deadline.as_mut().reset(until);
                        None
                    }
                    None => Some(self.too_late()),
                },
                Happening::Told(Some(Command::Stdin(piece))) => {
                    input.add(piece);
                    None
                }
                Happening::Told(Some(Command::Cancel)) => {
                    self.stop(Ending::Cancelled).await;
                    None
                }
                Happening::Told(None) => {
                    told = false;
                    None
                }
            };
            if let Some(limit) = limit.filter(|_| self.stopped.is_none()) {
                if let Some(exit) = end.by_now(&self.exits).await {
                    break Some(exit);
                }
                self.stop(limit).await;
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
            self.read.clear();
            let open = drain(pipe, &mut self.read);
            if self.read.is_empty() {
                return open;
            }
            let room = self
                .job
                .limits
                .output_bytes
                .saturating_sub(self.output_bytes);
            let whole = self.read.len();
            if whole as u64 > room {
                self.read
                    .truncate(usize::try_from(room).unwrap_or(usize::MAX));
                self.truncated = true;
            }
            self.output_bytes += self.read.len() as u64;
            if !self.read.is_empty() {
                self.log.output(stream, &self.read);
            }
            if self.truncated {
                self.stop(Ending::Limit(Reason::Output)).await;
            }
            if !open {
                return false;
            }
            if whole < READ_BYTES {
                return true;
            }
        }
    }

    /// Until when it may run on, once its time is over: for as long as the machine kept it from running,
    /// within bounds.
    fn more_time(&mut self) -> Option<Instant> {
        let cpu = self.tree.usage().cpu + self.of_others();
        let away = std::mem::take(&mut self.away);
        self.pressure.look(&self.tree, cpu, away);
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

    /// Whether the runner has been stopped meanwhile, with the machine or by itself.
    fn note_absence(&mut self) {
        let passed = self.looked.elapsed();
        self.looked += passed;
        if passed > MOST_BETWEEN_LOOKS {
            self.away += passed;
        }
    }

    /// Looks at the peak of a program that may stay below what the kernel will tell at its end.
    fn look_at_peak(&mut self, pid: i32) {
        if self.peak < self.peak_before {
            self.peak = self.peak.max(peak_of(pid).unwrap_or(0));
        }
    }

    /// What it uses now. `Some`: it has met a limit.
    fn measure(&mut self) -> Option<Ending> {
        let mut usage = self.tree.usage();
        self.measured += 1;
        if self.measured > 1 {
            // Not for a run that is as good as over.
            self.in_sockets = self.slot.held_by_sockets(usage.one);
            usage.resident += self.in_sockets;
        }
        self.look_at_unclaimed(usage.cpu + self.orphans.cpu());
        usage.cpu += self.of_others();
        self.used = self.used.max(usage.cpu);
        if self.measured.is_multiple_of(MEASURES_OF_PRESSURE) {
            let away = std::mem::take(&mut self.away);
            self.pressure.look(&self.tree, usage.cpu, away);
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
            return Some(Ending::Limit(Reason::Cpu));
        }
        if usage.files > ALL_OPEN_FILES {
            // No word on the wire says it, and what the kernel keeps for them is memory.
            let words = too_many_files(usage.files);
            self.log.output(OutputStream::Stderr, words.as_bytes());
            return Some(Ending::Limit(Reason::Memory));
        }
        self.slot.is_full().then_some(Ending::Limit(Reason::Disk))
    }

    /// Processor time that none of its processes has in its sum.
    fn of_others(&self) -> Duration {
        let share = self.share.as_ref().map_or(Duration::ZERO, Share::cpu);
        self.orphans.cpu() + share
    }

    /// Looks for processor time that is in nobody's sum, which takes a file of each process in the sandbox: a
    /// run that ends soon costs no look.
    fn look_at_unclaimed(&mut self, claimed: Duration) {
        if !self.measured.is_multiple_of(MEASURES_OF_PRESSURE) {
            return;
        }
        match &mut self.share {
            None => self.share = self.unclaimed.share(),
            Some(share) => share.look(claimed),
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

    /// Its memory was found to be this much, shared pages counted once. `Some`: it has met its limit.
    fn resident(&mut self, bytes: u64) -> Option<Ending> {
        self.closer_look = None;
        let bytes = bytes + self.in_sockets;
        self.peak = self.peak.max(bytes);
        (bytes > self.job.limits.memory_bytes).then_some(Ending::Limit(Reason::Memory))
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
        let own = |exit: Exit| (exit.peak > self.peak_before).then_some(exit.peak);
        let peak = self.peak.max(exit.and_then(own).unwrap_or(0));
        let exit = exit.map(|exit| Exit {
            cpu: self.used.max(exit.cpu + self.of_others()),
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

/// Why a program was ended that has too many files open.
pub fn too_many_files(files: u64) -> String {
    format!(
        "Too many open files: all processes together have {files}, and {ALL_OPEN_FILES} are allowed\n"
    )
}

/// Longest wait for killed processes to be gone. The contract allows one second.
pub const KILL_PATIENCE: Duration = Duration::from_secs(1);

/// Longest wait for the news that a killed program has ended. It comes at once; a report without its
/// usage is better than none.
const END_PATIENCE: Duration = Duration::from_secs(1);

/// Longest wait for the news of an end after the last process has gone. The news takes
/// microseconds; it is lost only with the waiting interpreter that had to bring it.
const EXIT_NEWS: Duration = Duration::from_secs(2);

/// Longest between two looks of a runner that is not stopped: it looks every 20 ms, and on a machine full of
/// work its turn may come late.
const MOST_BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// The end of a program, and the news of it.
struct End {
    pid: i32,
    cpu_before: Duration,
    told: oneshot::Receiver<Exit>,
}

impl End {
    /// Resolves when it has ended; `None` when that will never be told. Safe to drop at any time.
    async fn told(&mut self) -> Option<Exit> {
        let exit = (&mut self.told).await.ok()?;
        Some(Exit {
            cpu: exit.cpu.saturating_sub(self.cpu_before),
            ..exit
        })
    }

    /// Its end, if that has come, also when the news is still under way: whoever is kept from looking must not
    /// take a program that ended in time for one that did not.
    async fn by_now(&mut self, exits: &Exits) -> Option<Exit> {
        if !has_ended(self.pid) {
            return None;
        }
        exits.collect();
        timeout(EXIT_NEWS, self.told()).await.ok()?
    }
}

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
        // It has room for as much.
        match pipe.try_read_buf(data) {
            Ok(0) => return false,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
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
    use OutputStream::{Stderr, Stdout};

    use super::*;
    use crate::model::SubmissionId;

    fn log() -> JobLog {
        let id = JobId {
            submission: SubmissionId::new(),
            run: 0,
        };
        JobLog::new(id, mpsc::unbounded_channel().0)
    }

    fn all(log: &JobLog) -> Vec<(u64, JobEvent)> {
        let mut seen: Vec<(u64, JobEvent)> = Vec::new();
        while let Some(next) = log.after(seen.last().map_or(0, |(number, _)| *number)) {
            seen.push(next);
        }
        seen
    }

    #[test]
    fn output_joins_the_last_event_until_that_is_given_away() {
        let log = log();
        let output = |stream, data: &[u8]| {
            let data = data.to_vec();
            JobEvent::Output { stream, data }
        };
        log.output(Stdout, b"a");
        log.output(Stdout, b"b");
        log.output(Stderr, b"c");
        log.output(Stdout, b"d");
        assert_eq!(log.after(0), Some((1, output(Stdout, b"ab"))));
        log.output(Stdout, b"e");
        let rest = [(2, output(Stderr, b"c")), (3, output(Stdout, b"de"))];
        assert_eq!(all(&log)[1..], rest);
        // All were given away by now.
        log.output(Stdout, b"f");
        assert_eq!(log.after(3), Some((4, output(Stdout, b"f"))));
        assert_eq!(log.after(1), Some(rest[0].clone()));
    }

    #[test]
    fn writes_of_one_byte_cost_what_their_bytes_do() {
        let log = log();
        for _ in 0..200_000 {
            log.output(Stdout, b"x");
            log.output(Stderr, b"y");
        }
        let events = all(&log);
        assert!(events.len() < 100, "{} events", events.len());
        let mut written = [0, 0];
        let mut room = 0;
        for (_, event) in events {
            let JobEvent::Output { stream, data } = event else {
                unreachable!("nothing has ended");
            };
            written[stream as usize] += data.len();
            assert!(data.len() <= READ_BYTES);
        }
        for (_, event) in &log.events.borrow().kept {
            if let JobEvent::Output { data, .. } = event {
                room += data.capacity();
            }
        }
        assert_eq!(written, [200_000, 200_000]);
        assert!(room < 1 << 20, "{room} bytes are held");
    }

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
