//! What a sandbox looks like from the machine: its processes, its agent, the agent's descriptors.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;

/// A sandbox's processes as this machine numbers them: on a test bed's nodes too, which share its kernel.
pub struct Processes {
    agent: i32,
    namespace: PathBuf,
    slots: usize,
    descriptors: usize,
}

/// Descriptors that come and go: a connection, a pipe of a run that is just ending.
const PASSING_DESCRIPTORS: usize = 12;

impl Processes {
    /// What belongs to this agent, as it is now.
    pub fn of(agent: i32, slots: usize) -> anyhow::Result<Self> {
        let mut processes = Self {
            agent,
            namespace: fs::read_link(format!("/proc/{agent}/ns/pid"))?,
            slots,
            descriptors: 0,
        };
        processes.descriptors = processes.open_descriptors()?;
        Ok(processes)
    }

    /// Nothing but one waiting interpreter in each slot, in time.
    pub async fn is_empty_within(&self, patience: Duration, since: Instant) -> anyhow::Result<()> {
        loop {
            let left = self.left_behind();
            if left.is_empty() {
                return Ok(());
            }
            ensure!(
                since.elapsed() < patience,
                "still there after {patience:?}: {left:?}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Processes of user code beyond one for each slot's user id.
    fn left_behind(&self) -> Vec<String> {
        let mut seen: Vec<(u32, String)> = Vec::new();
        let own = owner(self.agent);
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let namespace = fs::read_link(format!("/proc/{pid}/ns/pid"));
            if namespace.ok().as_ref() != Some(&self.namespace) {
                continue;
            }
            if let Some(uid) = owner(pid).filter(|uid| Some(*uid) != own) {
                let name = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                seen.push((uid, name.chars().take(60).collect()));
            }
        }
        seen.sort();
        let mut more: Vec<String> = seen
            .windows(2)
            .filter(|pair| pair[0].0 == pair[1].0)
            .map(|pair| format!("{:?}", pair[1]))
            .collect();
        if seen.len() > self.slots {
            more.push(format!("{} processes for {} slots", seen.len(), self.slots));
        }
        more
    }

    /// The agent holds no more descriptors than when it was met.
    pub async fn has_its_descriptors_back(&self) -> anyhow::Result<()> {
        let since = Instant::now();
        loop {
            let open = self.open_descriptors()?;
            if open <= self.descriptors + PASSING_DESCRIPTORS {
                return Ok(());
            }
            ensure!(
                since.elapsed() < Duration::from_secs(1),
                "the agent holds {open} descriptors instead of {}",
                self.descriptors
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn open_descriptors(&self) -> anyhow::Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.agent))?.count())
    }
}

fn owner(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}
