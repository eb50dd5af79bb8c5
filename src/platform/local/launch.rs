//! Starting `gantry-runner sandbox` and hearing what came of it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
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
        // A zombie is no process.
        let fields: Vec<&str> = rest.split(' ').collect();
        if fields.first() == Some(&"Z") {
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

    /// Bytes that it and all below it have had written to disks, or have written to files in memory.
    pub fn written(self) -> u64 {
        let of = |process: &Self| {
            let text = std::fs::read_to_string(format!("/proc/{}/io", process.pid)).ok()?;
            let number = |name: &str| {
                let mut lines = text.lines();
                lines.find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
            };
            // What is written to a mapping is in the one, what goes to a disk in memory in the other.
            number("write_bytes:")?.checked_add(number("wchar:")?)
        };
        let mut all = self.descendants();
        all.push(self);
        all.iter().filter_map(of).sum()
    }

    /// Bytes of files of this file system that have no name any more and that it, or what is below it, holds
    /// open.
    pub fn hidden(self, device: u64) -> u64 {
        let mut files = std::collections::BTreeMap::new();
        for process in self.descendants() {
            let open = std::fs::read_dir(format!("/proc/{}/fd", process.pid));
            for file in open.into_iter().flatten().flatten() {
                // Looked at and not opened: it may be anything.
                if let Ok(about) = std::fs::metadata(file.path())
                    && about.nlink() == 0
                    && about.dev() == device
                {
                    files.insert(about.ino(), about.blocks() * 512);
                }
            }
        }
        files.values().sum()
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

/// Gives a sandbox's first process its turn before what runs in it: it ends runs at their limits, also
/// while as many processes as there may be do nothing but ask for the processor. Its children do
/// not inherit it.
fn prefer(pid: i32) {
    const NICE: i32 = -10;
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
