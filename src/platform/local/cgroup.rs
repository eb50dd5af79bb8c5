//! Control groups: the kernel's own bound on a whole sandbox, behind the supervisor's per run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Groups of one sandbox: one folder with the unified hierarchy, one per controller with the old.
#[derive(Debug, Clone)]
pub struct Cgroup {
    folders: Vec<PathBuf>,
}

const ROOT: &str = "/sys/fs/cgroup";

/// What all sandboxes together count for, where one process of the machine's own counts for 1.
const SHARES: u64 = 8;

/// A group of its own for the processor makes sandboxes equal, however many processes each has: one
/// full of them slows no neighbour, and dies no slower when it is killed. Bounds hold without it.
fn fairness(result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "sandboxes share the processor by processes");
    }
}

impl Cgroup {
    /// Makes the groups, with bounds on memory and processes.
    pub fn create(name: &str, memory_bytes: u64, processes: u64) -> io::Result<Cgroup> {
        let unified = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers"));
        if let Ok(controllers) = unified {
            if !controllers.split_whitespace().any(|c| c == "memory") {
                return Err(io::Error::other("the memory controller is not there"));
            }
            let parent = Path::new(ROOT).join("gantry");
            // Usually on already; a failure shows at the next write.
            let _ = fs::write(
                Path::new(ROOT).join("cgroup.subtree_control"),
                "+memory +pids",
            );
            fs::create_dir_all(&parent)?;
            fs::write(parent.join("cgroup.subtree_control"), "+memory +pids")?;
            for folder in [Path::new(ROOT), &parent] {
                fairness(fs::write(folder.join("cgroup.subtree_control"), "+cpu"));
            }
            fairness(fs::write(
                parent.join("cpu.weight"),
                (100 * SHARES).to_string(),
            ));
            let folder = parent.join(name);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join("memory.max"), memory_bytes.to_string())?;
            fs::write(folder.join("pids.max"), processes.to_string())?;
            return Ok(Cgroup {
                folders: vec![folder],
            });
        }
        let mut folders = Vec::new();
        for (controller, file, value) in [
            ("memory", "memory.limit_in_bytes", memory_bytes),
            ("pids", "pids.max", processes),
        ] {
            let folder = Path::new(ROOT).join(controller).join("gantry").join(name);
            fs::create_dir_all(&folder)?;
            fs::write(folder.join(file), value.to_string())?;
            folders.push(folder);
        }
        let cpu = Path::new(ROOT).join("cpu").join("gantry");
        let made = fs::create_dir_all(cpu.join(name));
        if made.is_ok() {
            folders.push(cpu.join(name));
            fairness(fs::write(
                cpu.join("cpu.shares"),
                (1_024 * SHARES).to_string(),
            ));
        }
        fairness(made);
        Ok(Cgroup { folders })
    }

    /// The files that a process joins by writing to.
    pub fn procs(&self) -> Vec<PathBuf> {
        self.folders
            .iter()
            .map(|folder| folder.join("cgroup.procs"))
            .collect()
    }

    /// Removes the groups of this name. Killed processes take a moment to leave; groups that are
    /// still in use after [`LEAVING`] stay behind, empty soon, until their name is used again.
    pub fn remove(name: &str) {
        for parent in ["", "memory", "pids", "cpu"] {
            let folder = Path::new(ROOT).join(parent).join("gantry").join(name);
            let mut waited = Duration::ZERO;
            while let Err(error) = fs::remove_dir(&folder) {
                if error.kind() == io::ErrorKind::NotFound {
                    break;
                }
                if waited >= LEAVING {
                    tracing::debug!(folder = %folder.display(), %error, "a control group stays behind");
                    break;
                }
                std::thread::sleep(LOOK_AGAIN);
                waited += LOOK_AGAIN;
            }
        }
    }
}

/// Longest wait for killed processes to leave their group: the second the contract gives them.
const LEAVING: Duration = Duration::from_secs(1);

/// Pause between two tries.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
