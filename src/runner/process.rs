//! Processes as the kernel shows them: who belongs to a job, what it uses, and how to end it whole.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::pipe::PipeFlags;

use crate::model::Limits;

/// What a set of processes uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TreeUsage {
    /// Processes seen, zombies too.
    pub processes: usize,
    /// Processor time of those alive and of the children they waited for.
    pub cpu: Duration,
    /// Resident bytes, pages shared between processes counted once for each, and page tables.
    pub resident: u64,
    /// Descriptors of open files, those that processes share counted once for each.
    pub files: u64,
    /// One of them.
    pub one: Option<i32>,
}

/// Which processes are meant.
#[derive(Debug, Clone)]
pub enum Tree {
    /// Every process of this user id: each slot has its own, so none can hide from it.
    Uid(u32),
    /// Every descendant of this process but these. For machines that give a sandbox one user id
    /// only; then one job runs at a time. Orphans stay descendants: the runner adopts them.
    DescendantsBut(Vec<i32>),
}

fn clock_ticks() -> u64 {
    // SAFETY: sysconf reads a constant; it has no preconditions.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).unwrap_or(100).max(1)
}

impl Tree {
    /// The process ids of the tree now.
    pub fn pids(&self) -> Vec<i32> {
        match self {
            Tree::Uid(uid) => all_pids().filter(|pid| belongs_to(*pid, *uid)).collect(),
            Tree::DescendantsBut(known) => descendants()
                .into_iter()
                .filter(|pid| !known.contains(pid))
                .collect(),
        }
    }

    /// What the tree uses now.
    pub fn usage(&self) -> TreeUsage {
        let ticks = clock_ticks();
        let mut usage = TreeUsage::default();
        for pid in self.pids() {
            usage.processes += 1;
            usage.one = Some(pid);
            let kept = Kept::read(pid);
            usage.resident += kept.page_tables;
            usage.files += kept.files;
            let Some(stat) = Stat::read(pid) else {
                continue;
            };
            usage.cpu += Duration::from_millis(stat.cpu_ticks.saturating_mul(1_000) / ticks);
            usage.resident += stat.resident_pages * 4096;
        }
        usage
    }

    /// Bytes of memory with shared pages counted once. Dearer than [`Tree::usage`]. A process that
    /// does not let itself be looked at is counted with all that is resident.
    pub fn proportional_memory(&self) -> u64 {
        let pids = self.pids();
        let _owner = match self {
            Tree::Uid(uid) => Some(FileUser::become_user(*uid)),
            Tree::DescendantsBut(_) => None,
        };
        let resident = |pid| Stat::read(pid).map(|stat| stat.resident_pages * 4096);
        pids.into_iter()
            .map(|pid| {
                let pages = proportional_set(pid).or_else(|| resident(pid));
                pages.unwrap_or(0) + Kept::read(pid).page_tables
            })
            .sum()
    }

    /// Ends every process of the tree. `Err` when some are still there after `patience`.
    ///
    /// `kill(-1)` by a process of the same user id reaches all of them in one step, which no fork
    /// bomb can outrun; the look at `/proc` afterwards is the proof.
    pub async fn kill(&self, patience: Duration) -> io::Result<()> {
        let deadline = tokio::time::Instant::now() + patience;
        let mut pause = Duration::from_micros(200);
        loop {
            let pids = self.pids();
            if pids.is_empty() {
                return Ok(());
            }
            match self {
                Tree::Uid(uid) => kill_all_of(*uid)?,
                Tree::DescendantsBut(_) => pids.iter().for_each(|pid| signal(*pid, libc::SIGKILL)),
            }
            if tokio::time::Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "{} processes did not end when killed",
                    pids.len()
                )));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }
}

impl Tree {
    /// Ends every process of the tree that is in none of these sessions. Who forks faster than this looks
    /// gets away until the sandbox ends.
    pub async fn kill_but(&self, sessions: &[i32], patience: Duration) -> io::Result<()> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let in_session =
                |pid: &i32| Stat::read(*pid).is_some_and(|stat| sessions.contains(&stat.session));
            let mut pids = self.pids();
            pids.retain(|pid| !in_session(pid));
            if pids.is_empty() {
                return Ok(());
            }
            pids.iter().for_each(|pid| signal(*pid, libc::SIGKILL));
            if tokio::time::Instant::now() > deadline {
                return Err(io::Error::other(format!(
                    "{} processes did not end when killed",
                    pids.len()
                )));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// This thread opens files as another user until it is dropped: a process's owner may look at it,
/// where root without CAP_SYS_PTRACE may not.
struct FileUser {
    uid: libc::c_long,
    gid: libc::c_long,
}

impl FileUser {
    fn become_user(uid: u32) -> Self {
        // SAFETY: raw calls, which act on this thread only; both return the id before.
        unsafe {
            let gid = libc::syscall(libc::SYS_setfsgid, uid);
            let uid = libc::syscall(libc::SYS_setfsuid, uid);
            Self { uid, gid }
        }
    }
}

impl Drop for FileUser {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe {
            libc::syscall(libc::SYS_setfsuid, self.uid);
            libc::syscall(libc::SYS_setfsgid, self.gid);
        }
    }
}

fn all_pids() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn belongs_to(pid: i32, uid: u32) -> bool {
    use std::os::unix::fs::MetadataExt;
    let Ok(about) = fs::metadata(format!("/proc/{pid}")) else {
        return false;
    };
    // The folder of a process that may not be dumped belongs to root, whoever the process is.
    about.uid() == uid || (about.uid() == 0 && real_uid(pid) == Some(uid))
}

/// Every process below this one.
fn descendants() -> Vec<i32> {
    let parents: Vec<(i32, i32)> = all_pids()
        .filter_map(|pid| Some((pid, Stat::read(pid)?.parent)))
        .collect();
    let own = i32::try_from(std::process::id()).unwrap_or(1);
    let mut found = vec![own];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| *p == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.split_off(1)
}

struct Stat {
    parent: i32,
    session: i32,
    cpu_ticks: u64,
    resident_pages: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Stat> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field is the program's name in brackets and may itself hold spaces and brackets.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split(' ').collect();
        // proc_pid_stat(5): the session is field 6, utime, stime, cutime, cstime are fields 14 to 17, rss is 24; `rest` starts at 3.
        let number = |field: usize| fields.get(field - 3).and_then(|f| f.parse::<u64>().ok());
        Some(Stat {
            parent: i32::try_from(number(4)?).ok()?,
            session: i32::try_from(number(6)?).ok()?,
            cpu_ticks: number(14)? + number(15)? + number(16)? + number(17)?,
            resident_pages: number(24)?,
        })
    }
}

/// What the kernel keeps for a process beside its pages.
struct Kept {
    page_tables: u64,
    /// Descriptors of open files.
    files: u64,
}

impl Kept {
    fn read(pid: i32) -> Kept {
        use std::os::unix::fs::MetadataExt;
        // One that has ended keeps nothing.
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let number = |name| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        // The folder's size is their number, since Linux 6.2; before, the room for them is what is known.
        let open = fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |folder| folder.size());
        Kept {
            page_tables: number("VmPTE:").unwrap_or(0) * 1024,
            files: match open {
                0 => number("FDSize:").unwrap_or(0),
                open => open,
            },
        }
    }
}

/// Processor time of every process that this one can see and of the children they waited for, and by how much
/// that may be too little.
pub fn processor_time_of_all() -> (Duration, Duration) {
    let ticks = clock_ticks();
    let time = |number: u64| Duration::from_millis(number.saturating_mul(1_000) / ticks);
    let mut pids: Vec<i32> = all_pids().collect();
    // Children first, as a rule: what one has used that ends meanwhile is in its parent's sum as well, rather
    // than in none.
    pids.sort_unstable_by(|one, other| other.cmp(one));
    let times = pids.into_iter().filter_map(Stat::read);
    let (count, all) = times.fold((0, 0), |(count, all), stat| {
        (count + 1, all + stat.cpu_ticks)
    });
    // Each of the four numbers of a process is rounded down.
    (time(all), time(4 * count))
}

fn real_uid(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Processor time of one process until now, finer than the ticks of its `stat`.
pub fn processor_time(pid: i32) -> Option<Duration> {
    let schedule = fs::read_to_string(format!("/proc/{pid}/schedstat")).ok()?;
    Some(Duration::from_nanos(
        schedule.split(' ').next()?.parse().ok()?,
    ))
}

/// How long a process's threads have run and how long they have waited for a processor, until now, in all.
fn schedule(pid: i32) -> (Duration, Duration) {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let times = threads.into_iter().flatten().filter_map(|thread| {
        let schedule = fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        let mut times = schedule.split(' ').map(|nanos| nanos.parse::<u64>().ok());
        Some((times.next()??, times.next()??))
    });
    let (ran, waited) = times.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
    (Duration::from_nanos(ran), Duration::from_nanos(waited))
}

/// Processor time that the machine's own host has taken from it until now, of each of its processors.
fn stolen() -> Duration {
    let Ok(text) = fs::read_to_string("/proc/stat") else {
        return Duration::ZERO;
    };
    let processors = text.lines().filter(|line| line.starts_with("cpu")).count();
    let ticks = |line: &str| line.split_whitespace().nth(8)?.parse::<u64>().ok();
    let ticks = text.lines().next().and_then(ticks).unwrap_or(0);
    // The first of these lines is the sum.
    let each = ticks
        / u64::try_from(processors)
            .unwrap_or(1)
            .saturating_sub(1)
            .max(1);
    Duration::from_millis(each.saturating_mul(1_000) / clock_ticks())
}

/// For how long a set of processes could have run and had no processor: the machine was busy with
/// others. What its processes take from each other does not count.
#[derive(Debug)]
pub struct Pressure {
    looked: Instant,
    cpu: Duration,
    stolen: Duration,
    /// By process, how long it has run and how long it has waited.
    times: HashMap<i32, (Duration, Duration)>,
    used: Duration,
    lost: Duration,
}

impl Pressure {
    /// Nothing lost from here on.
    pub fn since(started: Instant) -> Self {
        Self {
            looked: started,
            cpu: Duration::ZERO,
            stolen: stolen(),
            times: HashMap::new(),
            used: Duration::ZERO,
            lost: Duration::ZERO,
        }
    }

    /// What was lost until the last look.
    pub fn lost(&self) -> Duration {
        self.lost
    }

    /// What was used until the last look.
    pub fn used(&self) -> Duration {
        self.used
    }

    /// Looks again. `cpu` is what the processes have used by now; for `away` since the last look nobody
    /// could have looked: the runner itself was stopped, and who knows whether they were.
    pub fn look(&mut self, tree: &Tree, cpu: Duration, away: Duration) {
        let passed = self.looked.elapsed();
        self.looked += passed;
        let taken = stolen();
        let stolen = taken.saturating_sub(self.stolen);
        self.stolen = taken;
        let before = std::mem::take(&mut self.times);
        let (mut ran, mut longest) = (Duration::ZERO, Duration::ZERO);
        for pid in tree.pids().into_iter().take(MAX_LOOKED_AT) {
            let now = schedule(pid);
            let known = before.get(&pid).copied().unwrap_or_default();
            ran += now.0.saturating_sub(known.0);
            longest = longest.max(now.1.saturating_sub(known.1));
            self.times.insert(pid, now);
        }
        // The one is exact and misses those that have ended, the other counts them, in ticks.
        let used = ran.max(cpu.saturating_sub(self.cpu));
        self.cpu = cpu;
        self.used += used;
        let stopped = away.min(passed.saturating_sub(used));
        self.lost += lost(passed, used, longest, stolen).max(stopped);
    }
}

/// What of this time was lost by processes that used so much of it, the longest of whose waits in it was
/// this one, on a machine that was itself away for so long.
fn lost(passed: Duration, used: Duration, wait: Duration, stolen: Duration) -> Duration {
    if passed.is_zero() {
        return Duration::ZERO;
    }
    // Who sleeps loses nothing when the machine is away.
    let busy = (used + wait).as_secs_f64() / passed.as_secs_f64();
    let missed = wait + stolen.mul_f64(busy.min(1.0));
    // Who had a whole processor's time has waited for itself alone.
    missed.min(passed.saturating_sub(used))
}

/// Most processes looked at: as many as a run may have.
const MAX_LOOKED_AT: usize = Limits::MAXIMUM.processes as usize;

fn proportional_set(pid: i32) -> Option<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// The sandbox's control group for memory, as far as it tells of processes that the kernel killed
/// because memory had run out. Without it such an end looks like any `SIGKILL`.
#[derive(Debug)]
pub struct MemoryGroup(Option<fs::File>);

impl MemoryGroup {
    /// Opens it while its folder can still be reached. `joined` are the groups' `cgroup.procs`.
    pub fn open(joined: &[PathBuf]) -> Self {
        let files = joined.iter().flat_map(|procs| {
            // The unified hierarchy's name, and the old one's.
            ["memory.events", "memory.oom_control"].map(|name| procs.with_file_name(name))
        });
        Self(files.filter_map(|file| fs::File::open(file).ok()).next())
    }

    /// Processes killed until now.
    pub fn kills(&self) -> u64 {
        let mut text = [0; 512];
        let read = self
            .0
            .as_ref()
            .and_then(|file| file.read_at(&mut text, 0).ok());
        String::from_utf8_lossy(&text[..read.unwrap_or(0)])
            .lines()
            .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
            .unwrap_or(0)
    }
}

/// The control group for processor time of everything in the sandbox.
#[derive(Debug)]
pub struct ProcessorGroup(Option<fs::File>);

impl ProcessorGroup {
    /// Opens it while its folder can still be reached. `joined` are the groups' `cgroup.procs`.
    pub fn open(joined: &[PathBuf]) -> Self {
        // The old hierarchy's name first: there the other file is another thing.
        let files = ["cpuacct.usage", "cpu.stat"].into_iter().flat_map(|name| {
            let named = move |procs: &PathBuf| fs::File::open(procs.with_file_name(name));
            joined.iter().filter_map(move |procs| named(procs).ok())
        });
        let told = |file: &fs::File| used_by(file).is_some();
        Self(files.into_iter().find(told))
    }

    /// What it has used until now.
    pub fn used(&self) -> Option<Duration> {
        used_by(self.0.as_ref()?)
    }
}

/// The processor time in `cpuacct.usage`, or in `cpu.stat`.
fn used_by(file: &fs::File) -> Option<Duration> {
    let mut text = [0; 1024];
    let read = file.read_at(&mut text, 0).ok()?;
    let text = String::from_utf8_lossy(&text[..read]);
    let micros = text
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "));
    match micros {
        Some(micros) => micros.trim().parse().ok().map(Duration::from_micros),
        None => text.trim().parse().ok().map(Duration::from_nanos),
    }
}

/// Makes the kernel take this process and its children first when the sandbox's memory runs out,
/// and the runner last. User code cannot take it back: its `/proc` is read-only.
pub fn die_first(pid: i32) {
    // Where it is not possible the largest goes first, which is user code as a rule.
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), "1000") {
        tracing::debug!(pid, %error, "not marked to go first");
    }
}

/// Gives signals that are ignored their default meaning again. Who starts a server with `nohup` or in
/// a shell's background hands ignored signals down to everything below it, and user code that is
/// ended by one elsewhere would not be here.
pub fn heed_signals() {
    for number in 1..=libc::SIGRTMAX() {
        // Ignored by every Rust program for itself; its children get it back.
        if number == libc::SIGPIPE {
            continue;
        }
        // SAFETY: sigaction is plain old data, for which all zeroes is a value; both pointers are to
        // it. Numbers that are no signal of ours to change are answered with an error.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let known = libc::sigaction(number, std::ptr::null(), &mut action) == 0;
            if known && action.sa_sigaction == libc::SIG_IGN {
                libc::signal(number, libc::SIG_DFL);
            }
        }
    }
}

/// Sends a signal; a process that is gone already is as good as signalled.
pub fn signal(pid: i32, signal: i32) {
    // SAFETY: kill has no memory effects; a wrong pid only returns an error.
    unsafe {
        libc::kill(pid, signal);
    }
}

/// `kill(-1, SIGKILL)` as `uid`, from a short-lived child that has taken that id.
fn kill_all_of(uid: u32) -> io::Result<()> {
    // SAFETY: between fork and _exit the child makes raw system calls only, which are
    // async-signal-safe; it takes no lock and allocates nothing.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as above.
        0 => unsafe {
            // Raw calls: libc's wrappers would synchronise ids across threads.
            if libc::syscall(libc::SYS_setresuid, uid, uid, uid) == 0 {
                libc::kill(-1, libc::SIGKILL);
            }
            libc::_exit(0)
        },
        // Waited for: one that is late would kill whatever the slot's next job has started by then.
        killer => wait_for(killer),
    }
}

/// Waits for the end of this child, which is at hand.
fn wait_for(pid: i32) -> io::Result<()> {
    loop {
        // SAFETY: no status is asked for.
        if unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } == pid {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            // Collected by somebody else: gone is gone.
            Some(libc::ECHILD) => return Ok(()),
            _ => return Err(error),
        }
    }
}

/// A child's end, as `wait4` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The raw wait status.
    pub status: i32,
    /// Processor time of it and of all descendants it waited for.
    pub cpu: Duration,
    /// Peak resident bytes of the largest of these processes. The kernel counts what a process had of its
    /// parent's memory before its program was executed: see [`PeakBefore`].
    pub peak: u64,
}

/// The peak that a command's process has before its program is executed: it is a copy of the runner until
/// then, and the kernel keeps that peak as its own.
#[derive(Debug)]
pub struct PeakBefore(OwnedFd);

/// What a process may gain between the note of its peak and its program's execution, and by how much the
/// kernel's counters may be behind.
const PEAK_SLACK: u64 = 2 << 20;

impl PeakBefore {
    /// Has the command's process note it. The last thing that it does before the program.
    pub fn of(command: &mut Command) -> io::Result<Self> {
        let (noted, note) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        // SAFETY: getrusage and write are async-signal-safe; the descriptor and the number live in the closure.
        unsafe {
            command.pre_exec(move || {
                let mut usage: libc::rusage = std::mem::zeroed();
                if libc::getrusage(libc::RUSAGE_SELF, &mut usage) < 0 {
                    return Err(io::Error::last_os_error());
                }
                let kib = u64::try_from(usage.ru_maxrss).unwrap_or(0).to_ne_bytes();
                match libc::write(note.as_raw_fd(), kib.as_ptr().cast(), kib.len()) {
                    8 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            });
        }
        Ok(Self(noted))
    }

    /// What the started process noted. Up to here its peak says nothing of its program.
    pub fn read(self) -> io::Result<u64> {
        let mut kib = [0; 8];
        // The command holds the other end as well, so that this would wait for a note that is not there; a
        // process that was started has noted it.
        fs::File::from(self.0).read_exact(&mut kib)?;
        Ok(u64::from_ne_bytes(kib) * 1024 + PEAK_SLACK)
    }
}

/// Peak resident bytes of a living process since its program was executed.
pub fn peak_of(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

/// Whether all threads of a process have ended, collected or not.
pub fn has_ended(pid: i32) -> bool {
    match fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(text) => ended_by_stat(&text),
        Err(error) => {
            error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
        }
    }
}

fn ended_by_stat(text: &str) -> bool {
    let Some((_, rest)) = text.rsplit_once(") ") else {
        return false;
    };
    let mut fields = rest.split(' ');
    let dead = fields
        .next()
        .is_some_and(|state| state == "Z" || state == "X");
    // proc_pid_stat(5): the number of threads is field 20. The first one can end before the others.
    dead && fields.nth(16).and_then(|threads| threads.parse().ok()) <= Some(1)
}

/// Collects one ended child of this process, if there is one, and says which user it was.
pub fn reap() -> Option<(i32, u32, Exit)> {
    // SAFETY: siginfo is plain old data, for which all zeroes is a value.
    let mut about: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let look = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: a pointer to a live local of the right type. The child stays to be waited for.
    let looked = unsafe { libc::waitid(libc::P_ALL, 0, &mut about, look) };
    // SAFETY: waitid fills these fields, or leaves them zero when no child has ended.
    let (child, uid) = unsafe { (about.si_pid(), about.si_uid()) };
    if looked < 0 || child == 0 {
        return None;
    }
    let mut status = 0;
    // SAFETY: rusage is plain old data, for which all zeroes is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the right type.
    let pid = unsafe { libc::wait4(child, &mut status, libc::WNOHANG, &mut usage) };
    (pid > 0).then(|| {
        let time = |t: libc::timeval| {
            Duration::from_secs(u64::try_from(t.tv_sec).unwrap_or(0))
                + Duration::from_micros(u64::try_from(t.tv_usec).unwrap_or(0))
        };
        let exit = Exit {
            status,
            cpu: time(usage.ru_utime) + time(usage.ru_stime),
            peak: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
        };
        (pid, uid, exit)
    })
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::cast_possible_wrap,
        clippy::cast_sign_loss
    )]
    use super::*;

    #[test]
    fn a_peak_before_the_program_is_known() {
        // A parent that is much larger than what it starts.
        let large = vec![1_u8; 96 << 20];
        let mut command = Command::new("/bin/true");
        let before = PeakBefore::of(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        let before = before.read().unwrap();
        assert!(large.iter().all(|byte| *byte == 1) && before > 96 << 20);
        while !has_ended(child.id() as i32) {
            std::thread::sleep(Duration::from_millis(1));
        }
        // SAFETY: rusage is plain old data, for which all zeroes is a value.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        let mut status = 0;
        let pid = child.id() as i32;
        // SAFETY: both pointers are to live locals of the right type.
        let collected = unsafe { libc::wait4(pid, &mut status, 0, &mut usage) };
        assert_eq!(collected, pid);
        let counted = usage.ru_maxrss as u64 * 1024;
        assert!(
            (96 << 20..=before).contains(&counted),
            "{counted} of {before}"
        );
        let _ = child.try_wait();
        assert!(peak_of(std::process::id() as i32).unwrap() > 96 << 20);
    }

    #[test]
    fn a_process_has_ended_when_its_last_thread_has() {
        let stat = |state, threads| {
            let between = "0 ".repeat(16);
            format!("7 (a) Z (b) {state} {between}{threads} 0 0")
        };
        assert!(ended_by_stat(&stat("Z", 1)));
        assert!(!ended_by_stat(&stat("Z", 2)));
        assert!(!ended_by_stat(&stat("S", 1)));
        assert!(!has_ended(std::process::id() as i32));
        assert!(has_ended(i32::MAX));
    }

    #[test]
    fn what_is_lost_is_what_others_took() {
        let ms = Duration::from_millis;
        let lost = |used, wait, stolen| lost(ms(100), ms(used), ms(wait), ms(stolen));
        assert_eq!(lost(0, 0, 90), ms(0), "it slept");
        assert_eq!(lost(30, 70, 0), ms(70), "it wanted to run all the time");
        assert_eq!(lost(30, 20, 0), ms(20), "it slept for half of the time");
        assert_eq!(
            lost(100, 90, 0),
            ms(0),
            "its own processes waited for each other"
        );
        assert_eq!(lost(60, 0, 40), ms(24), "the machine was away");
        assert_eq!(lost(200, 50, 0), ms(0), "it had two processors");
    }
}
