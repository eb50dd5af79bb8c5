//! Starting `gantry-runner sandbox` and hearing what came of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::runner::PROGRAM;
use crate::runner::sandbox::{Made, SandboxSpec, give_listener};

/// A sandbox's first process. Killing it ends everything in the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstProcess {
    /// Its id on the host.
    pub pid: i32,
    /// When it started, in the kernel's ticks: ids are used again, this tells the processes apart.
    pub started: u64,
}

impl FirstProcess {
    fn of(pid: i32) -> Option<Self> {
        Self::with_parent(pid).map(|(process, _)| process)
    }

    fn with_parent(pid: i32) -> Option<(Self, i32)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, rest) = stat.rsplit_once(") ")?;
        // proc_pid_stat(5): the parent is field 4 and starttime field 22; `rest` starts at field 3.
        // A zombie is no process, unless only its first thread ended: num_threads is field 20.
        let fields: Vec<&str> = rest.split(' ').collect();
        let threads: u32 = fields.get(20 - 3)?.parse().ok()?;
        if fields.first() == Some(&"Z") && threads <= 1 {
            return None;
        }
        let started = fields.get(22 - 3)?.parse().ok()?;
        Some((Self { pid, started }, fields.get(4 - 3)?.parse().ok()?))
    }

    /// Whether it is still there.
    pub fn is_alive(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Ends a first process without a namespace, with everything below it. Orphans come back to
    /// it, so as long as it is there, stopped, nothing gets away.
    pub fn kill_with_descendants(self) {
        let deadline = Instant::now() + KILL_PATIENCE;
        while self.is_alive() && Instant::now() < deadline {
            // SAFETY: kill has no memory effects; the id was just seen to be this process's.
            unsafe {
                libc::kill(self.pid, libc::SIGSTOP);
            }
            let below = self.descendants();
            if below.is_empty() {
                break;
            }
            for process in below {
                // SAFETY: as above.
                unsafe {
                    libc::kill(process.pid, libc::SIGKILL);
                }
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        self.kill();
    }

    fn descendants(self) -> Vec<Self> {
        let processes: Vec<(Self, i32)> = std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter_map(Self::with_parent)
            .collect();
        let mut found = vec![self];
        let mut next = 0;
        while let Some(parent) = found.get(next).copied() {
            let children = processes.iter().filter(|(_, of)| *of == parent.pid);
            found.extend(children.map(|(process, _)| *process));
            next += 1;
        }
        found.split_off(1)
    }

    /// It and all processes below it.
    pub(super) fn with_descendants(self) -> Vec<Self> {
        let mut all = self.descendants();
        all.push(self);
        all
    }

    /// What it and all below it have written. A child's figures go to its parent when the parent waits
    /// for it, and an orphan's to the first process, so they last as long as the sandbox. Only those of a
    /// child for which nobody waits, because its parent ignores SIGCHLD, are lost.
    pub fn written(self) -> Written {
        let mut sum = Written::default();
        for process in self.with_descendants() {
            let text = std::fs::read_to_string(format!("/proc/{}/io", process.pid));
            let text = text.unwrap_or_default();
            let number = |name: &str| {
                let mut lines = text.lines();
                let found = lines.find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
                found.unwrap_or(0_u64)
            };
            sum.to_disks += number("write_bytes:");
            sum.by_calls += number("wchar:");
            sum.cancelled += number("cancelled_write_bytes:");
        }
        sum
    }

    /// Ends it, and with it its sandbox.
    pub fn kill(self) {
        if self.is_alive() {
            // SAFETY: kill has no memory effects; the id was just seen to be this process's.
            unsafe {
                libc::kill(self.pid, libc::SIGKILL);
            }
        }
        // Where the server is its parent it is collected; elsewhere this does nothing.
        // SAFETY: a null status pointer is allowed.
        unsafe {
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG);
        }
    }
}

/// Bytes that processes have written since they began.
#[derive(Debug, Clone, Copy, Default)]
pub struct Written {
    /// To file systems on disks, also by mappings.
    to_disks: u64,
    /// By system calls, to anything: the only figure for a disk in memory.
    by_calls: u64,
    /// Of those to disks, what was removed before it got there.
    cancelled: u64,
}

impl Written {
    /// The larger figure of each kind.
    pub fn max(self, other: Self) -> Self {
        Self {
            to_disks: self.to_disks.max(other.to_disks),
            by_calls: self.by_calls.max(other.by_calls),
            cancelled: self.cancelled.max(other.cancelled),
        }
    }

    /// Bytes that may have been written since `before`.
    pub fn since(self, before: Self) -> u64 {
        let calls = self.by_calls.saturating_sub(before.by_calls);
        self.to_disks.saturating_sub(before.to_disks) + calls
    }

    /// The most room that all this can take.
    pub fn most_room(self) -> u64 {
        let written = self.to_disks.max(self.by_calls);
        written.saturating_sub(self.cancelled)
    }
}

/// Longest try to end all that is below a first process: killed processes of a full machine die late.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Pause between two looks at what is left.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Makes a sandbox. `listener` becomes its listening socket, `log` takes what its runner says.
pub fn launch(
    runner: &Path,
    spec: &SandboxSpec,
    listener: Option<OwnedFd>,
    log: Option<File>,
) -> anyhow::Result<FirstProcess> {
    std::fs::create_dir_all(&spec.folder)?;
    let mut command = Command::new(runner);
    command
        .arg0(PROGRAM)
        .arg("sandbox")
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log.map_or_else(Stdio::null, Stdio::from));
    if let Some(listener) = listener {
        give_listener(&mut command, listener);
    }
    let mut child = command
        .spawn()
        .with_context(|| format!("starting {}", runner.display()))?;
    // Dropped after writing: the runner reads to the end.
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&serde_json::to_vec(spec)?)?;
    }
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout).read_line(&mut line)?;
    }
    let status = child.wait()?;
    match serde_json::from_str(&line) {
        Ok(Made::Pid(pid)) => {
            prefer(pid);
            Ok(FirstProcess::of(pid).unwrap_or(FirstProcess { pid, started: 0 }))
        }
        Ok(Made::Failed(why)) => anyhow::bail!("{why}"),
        Err(_) => anyhow::bail!("the runner ended ({status}) without an answer"),
    }
}

/// What goes before user code.
const NICE: i32 = -10;

/// Gives the server's threads, those that are started from here on, their turn before user code: health and
/// other users are answered while every sandbox is busy. Only root may; without it they have the same turn.
pub fn prefer_server() {
    let preferred = rustix::process::setpriority_process(None, NICE).map_err(std::io::Error::from);
    let session = std::fs::write("/proc/self/autogroup", NICE.to_string());
    if let Err(error) = preferred.and(session) {
        tracing::debug!(%error, "the server has the same turn as user code");
    }
}

/// Gives a sandbox's first process its turn before what runs in it: it ends runs at their limits, also
/// while as many processes as there may be do nothing but ask for the processor. Its children do
/// not inherit it.
fn prefer(pid: i32) {
    let priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: a pointer to a live sched_param, and integer arguments. Only root may; without it the
    // process has the same turn as all others.
    unsafe {
        libc::sched_setscheduler(
            pid,
            libc::SCHED_OTHER | libc::SCHED_RESET_ON_FORK,
            &priority,
        );
        libc::setpriority(libc::PRIO_PROCESS, pid.unsigned_abs(), NICE);
    }
    // Where the kernel shares the processor among sessions first, what counts is the session's.
    if let Err(error) = std::fs::write(format!("/proc/{pid}/autogroup"), NICE.to_string()) {
        tracing::debug!(pid, %error, "no preference for the session");
    }
}
