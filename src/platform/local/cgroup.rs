//! Control groups: the kernel's own bound on a whole sandbox, behind the supervisor's per run.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Groups of one sandbox: one folder with the unified hierarchy, one for each controller with the old.
#[derive(Debug, Clone)]
pub struct Cgroup {
    folders: Vec<PathBuf>,
}

const ROOT: &str = "/sys/fs/cgroup";

/// What the connections of a sandbox may hold that nobody has read yet. The old hierarchy counts it apart from
/// its memory, the unified one with it.
const TCP_BYTES: u64 = 64 << 20;

/// What all sandboxes together count for, where one process of the machine's own counts for 1.
const SHARES: u64 = 8;

/// A group for each user, with one for each of the user's sandboxes in it, makes users equal, however
/// many sandboxes and processes each has: one with ten busy programs has no more of the processor than
/// one with a single run, and dies no slower when it is killed. Bounds hold without it.
fn fairness(result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(%error, "users share the processor by processes");
    }
}

/// The file of the old hierarchy that has the processor time of a group.
const PROCESSOR_TIME: &str = "cpuacct.usage";

/// Folders with a group for each user, by controller of the old hierarchy; the first is the unified one's.
const BY_OWNER: [&str; 2] = ["", "cpu"];

impl Cgroup {
    /// Makes the groups of a sandbox, with bounds on memory and processes, in the owner's.
    pub fn create(
        owner: &str,
        name: &str,
        memory_bytes: u64,
        processes: u64,
    ) -> io::Result<Cgroup> {
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
            let folder = make_in(&parent.join(owner), name)?;
            for folder in [&parent, &parent.join(owner)] {
                fs::write(folder.join("cgroup.subtree_control"), "+memory +pids")?;
            }
            for folder in [Path::new(ROOT), &parent, &parent.join(owner)] {
                fairness(fs::write(folder.join("cgroup.subtree_control"), "+cpu"));
            }
            fairness(fs::write(
                parent.join("cpu.weight"),
                (100 * SHARES).to_string(),
            ));
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
        let sockets = folders[0].join("memory.kmem.tcp.limit_in_bytes");
        if let Err(error) = fs::write(sockets, TCP_BYTES.to_string()) {
            tracing::debug!(%error, "what TCP connections hold is not bounded");
        }
        let cpu = Path::new(ROOT).join("cpu").join("gantry");
        fairness(make_in(&cpu.join(owner), name).map(|folder| {
            folders.push(folder);
            fairness(fs::write(
                cpu.join("cpu.shares"),
                (1_024 * SHARES).to_string(),
            ));
        }));
        // Where the two controllers are together, the one folder is in both.
        let counts = |folder: &PathBuf| folder.join(PROCESSOR_TIME).exists();
        if !folders.iter().any(counts) {
            let folder = Path::new(ROOT).join("cpuacct").join("gantry").join(name);
            match fs::create_dir_all(&folder) {
                Ok(()) => folders.push(folder),
                Err(error) => {
                    tracing::debug!(%error, "processor time of children that nobody waits for is not seen");
                }
            }
        }
        Ok(Cgroup { folders })
    }

    /// The files that a process joins by writing to.
    pub fn procs(&self) -> Vec<PathBuf> {
        self.folders
            .iter()
            .map(|folder| folder.join("cgroup.procs"))
            .collect()
    }

    /// Removes a sandbox's groups, and its owner's with the last of them. Killed processes take a moment to
    /// leave; groups that are still in use after [`LEAVING`] stay behind, empty soon, until their name is
    /// used again.
    pub fn remove(name: &str) {
        for controller in ["memory", "pids", "cpuacct"] {
            let folder = Path::new(ROOT).join(controller).join("gantry").join(name);
            remove_folder(&folder);
        }
        for controller in BY_OWNER {
            let owners = fs::read_dir(Path::new(ROOT).join(controller).join("gantry"));
            for owner in owners.into_iter().flatten().flatten() {
                let folder = owner.path().join(name);
                if folder.is_dir() {
                    remove_folder(&folder);
                    // Its other sandboxes keep it.
                    let _ = fs::remove_dir(owner.path());
                }
            }
        }
    }
}

/// Makes a sandbox's group in its owner's. Another sandbox's end may remove that one in between.
fn make_in(owner: &Path, name: &str) -> io::Result<PathBuf> {
    let folder = owner.join(name);
    for _ in 0..MAKE_TRIES {
        match fs::create_dir_all(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            made => return made.map(|()| folder),
        }
    }
    fs::create_dir_all(&folder).map(|()| folder)
}

fn remove_folder(folder: &Path) {
    let mut waited = Duration::ZERO;
    while let Err(error) = fs::remove_dir(folder) {
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

/// Tries to make a group whose owner's is being removed: each takes microseconds.
const MAKE_TRIES: usize = 3;

/// Longest wait for killed processes to leave their group: the second the contract gives them.
const LEAVING: Duration = Duration::from_secs(1);

/// Pause between two tries.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
