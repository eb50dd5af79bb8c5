//! The local platform's sandbox, as it looks from the machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use gantry::model::UserId;

use super::traces::Processes;

/// One user's sandbox, as it was when it was met.
pub struct Sandbox {
    folder: PathBuf,
    record: String,
    pub processes: Processes,
}

impl Sandbox {
    pub fn of(data: &Path, user: &UserId, slots: usize) -> anyhow::Result<Sandbox> {
        let folder = data.join("sandboxes").join(format!("user-{user}"));
        let record = fs::read_to_string(folder.join("process.json")).context("process.json")?;
        let parsed: serde_json::Value = serde_json::from_str(&record)?;
        let agent = i32::try_from(parsed["process"]["pid"].as_i64().context("no pid")?)?;
        Ok(Sandbox {
            folder,
            record,
            processes: Processes::of(agent, slots)?,
        })
    }

    /// The process that was met is still there, and gave up nothing.
    pub fn is_the_same(&self) -> anyhow::Result<()> {
        let record = fs::read_to_string(self.folder.join("process.json"))?;
        ensure!(
            record == self.record,
            "the agent is another process: {record}"
        );
        let log = self.log();
        ensure!(!log.contains("given up"), "the agent lost a slot: {log}");
        Ok(())
    }

    /// What the runner said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("runner.log")).unwrap_or_default()
    }
}
