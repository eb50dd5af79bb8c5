//! In a container of a pod: `gantry-runner agent` and `gantry-runner app` as first process.
//!
//! # What protects the runner from the programs it runs, and each other's pods from them
//!
//! Containers of a cluster may neither mount nor make namespaces, so the agent has what is left:
//!
//! | guard | against |
//! |---|---|
//! | a user id of its own for user code, another one in every pod of a node | signals, tracing, `/proc/PID/environ`, `mem` and `fd` of the runner; the kernel's per-user counts (processes, pipes) shared with neighbours |
//! | no capability and no way to get one (`no_new_privs`) | setuid programs |
//! | seccomp | ptrace and the like, new namespaces, raw sockets; internet sockets unless allowed |
//! | Landlock | files outside of the workspace, control groups, signals and abstract sockets that leave the run |
//! | a folder only root may enter | whoever would speak to the agent or in its name |
//!
//! # What the agent needs of root's power
//!
//! `SETUID`, `SETGID`: to become the slot's user before user code starts, and to end what that user
//! left behind (`kill(-1)` in its name). `CHOWN`: to give the slot its folders and files.
//! `DAC_OVERRIDE`: to write into folders that only the slot's user may enter, and to clear those that
//! nobody may. `FOWNER`: to clear folders with the sticky bit and to take their modes back. Not
//! needed: `KILL`, `SYS_PTRACE` (memory is looked at in the owner's name), `SYS_RESOURCE` (a run sets
//! its own limits), `SETPCAP`.

mod app;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use rustix::fs::Access;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::agent::{self, AgentConfig};
use super::confine::{Reach, landlock_version};
use super::process::{MemoryGroup, ProcessorGroup, Tree};
use super::sandbox::{FIRST_SLOT_UID, close_inherited, describe_slots, write_hook};
use super::slot::{Ground, container_folders, is_memory};
use super::wire::scratch_bytes;
use crate::model::Limits;

pub use app::main as app;

/// The runner's own folder. Everybody may pass through it; [`PRIVATE`] is for root.
const FOLDER: &str = "/run/gantry";

/// Below it: the agent's socket.
const PRIVATE: &str = "agent";

/// Below it: the waiting interpreter's hook.
const HOOK: &str = "hook";

/// Below it: names of the user ids of slots, for `libnss-extrausers`, which the image links here.
const USERS: &str = "users";

/// The agent's socket.
pub const SOCKET: &str = "/run/gantry/agent/socket";

/// Files and folders in each of a slot's folders, as on the local platform.
const DEFAULT_FILES: u64 = 16_384;

const DEFAULT_PYTHON: &str = "/usr/bin/python3";
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What programs may read of the image: all that a distribution installs, and nothing that a cluster
/// mounts. `/proc` shows other users' processes, but nothing in them.
const READABLE: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/etc",
    "/opt",
    "/srv",
    "/nix/store",
    "/proc",
];

/// Time that killed jobs get to be gone when the pod is ended. The kernel ends them with the first
/// process in any case; where that is another, this is what is waited for.
const END_PATIENCE: Duration = Duration::from_millis(500);

/// The first of the user ids for slots where the node's ids are the pod's, and how many there are:
/// above all that distributions and systemd hand out, and apart from the local platform's.
const FIRST_POD_UID: u32 = 0x7800_0000;
const POD_UIDS: u32 = 1 << 26;

/// `gantry-runner agent`.
pub fn agent() -> anyhow::Result<()> {
    close_inherited().context("closing what was left open")?;
    hide().context("hiding from other processes")?;
    require_capabilities()?;
    let config = agent_config()?;
    let listener = prepare(&config)?;
    for line in protections(&config) {
        eprintln!("gantry-runner agent: {line}");
    }
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let groups = ["/sys/fs/cgroup", "/sys/fs/cgroup/memory"];
    let memory = MemoryGroup::open(&groups.map(|group| Path::new(group).join("cgroup.procs")));
    // The time of what the kubelet starts in the container is in the group's, and when that ends in no process's
    // that can be seen here: it would be taken for the run's.
    let groups = (memory, ProcessorGroup::open(&[]));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let uid = config.first_uid;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut end = Termination::listen()?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        tokio::select! {
            ended = agent::run(config, listener, groups) => ended,
            () = end.wait() => {
                if let Some(uid) = uid {
                    let _ = Tree::Uid(uid).kill(END_PATIENCE).await;
                }
                std::process::exit(0)
            }
        }
    })
}

/// The kernel's request to end, as the kubelet makes it.
struct Termination(Signal, Signal);

impl Termination {
    fn listen() -> io::Result<Self> {
        Ok(Self(
            signal(SignalKind::terminate())?,
            signal(SignalKind::interrupt())?,
        ))
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Keeps other processes of this user from looking into this one, and its orphans with it.
fn hide() -> anyhow::Result<()> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    // SAFETY: umask always succeeds.
    unsafe { libc::umask(0o022) };
    Ok(())
}

/// Names and numbers of the capabilities that the agent cannot do without; see the head of this file.
const NEEDED: [(&str, u32); 5] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("FOWNER", 3),
    ("SETGID", 6),
    ("SETUID", 7),
];

fn require_capabilities() -> anyhow::Result<()> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = line
        .and_then(|line| u64::from_str_radix(line.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(_, bit)| set & (1 << bit) == 0)
        .map(|(name, _)| *name)
        .collect();
    anyhow::ensure!(
        missing.is_empty() && rustix::process::getuid().is_root(),
        "user code cannot be given a user id of its own: this is user {} and lacks {}. Set \
         securityContext runAsUser: 0 and capabilities add: [{}]",
        rustix::process::getuid().as_raw(),
        if missing.is_empty() {
            "nothing else".to_owned()
        } else {
            missing.join(", ")
        },
        NEEDED.map(|(name, _)| name).join(", ")
    );
    Ok(())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name)
        .ok()
        .filter(|value| !value.trim().is_empty())
}

fn parsed<T: std::str::FromStr>(name: &str, expected: &str) -> anyhow::Result<Option<T>> {
    let Some(text) = variable(name) else {
        return Ok(None);
    };
    let value = text.trim().parse();
    match value {
        Ok(value) => Ok(Some(value)),
        Err(_) => anyhow::bail!("{name} is {text:?}; it has to be {expected}"),
    }
}

/// The configuration in the environment, with defaults that fit the image.
fn agent_config() -> anyhow::Result<AgentConfig> {
    let network = parsed("GANTRY_ALLOW_NETWORK", "true or false")?.unwrap_or(false);
    let files = parsed("GANTRY_SCRATCH_FILES", "a number of files")?.unwrap_or(DEFAULT_FILES);
    let bytes = parsed("GANTRY_SCRATCH_BYTES", "a number of bytes")?;
    let uid = match parsed("GANTRY_SLOT_UID", "a user id other than 0")? {
        Some(0) => anyhow::bail!("GANTRY_SLOT_UID is 0; user code must not be root"),
        Some(uid) => uid,
        None => slot_uid()?,
    };
    let python = PathBuf::from(variable("GANTRY_PYTHON").unwrap_or(DEFAULT_PYTHON.to_owned()));
    Ok(AgentConfig {
        slots: 1,
        first_uid: Some(uid),
        ground: Ground::Container {
            bytes: bytes.unwrap_or_else(|| scratch_bytes(&Limits::MAXIMUM)),
            files,
            hook: Path::new(FOLDER).join(HOOK),
        },
        reach: reach(),
        network,
        networks: false,
        secluded: true,
        log_refused: log_refused()?,
        python: python.is_file().then_some(python),
        path: variable("GANTRY_PATH").unwrap_or(DEFAULT_PATH.to_owned()),
        peer: Some(0),
        idle_seconds: None,
    })
}

/// Whether the node's kernel logs the system calls that user code is refused.
fn log_refused() -> anyhow::Result<bool> {
    Ok(parsed("GANTRY_LOG_REFUSED_CALLS", "true or false")?.unwrap_or(false))
}

/// The user id for the slot. Where the pod's ids are the node's it is another one in each pod: the
/// kernel counts a user's processes, pipes and watches over all of them together.
fn slot_uid() -> anyhow::Result<u32> {
    let map = fs::read_to_string("/proc/self/uid_map")?;
    let whole = map.split_whitespace().nth(2) == Some("4294967295");
    if !whole {
        return Ok(FIRST_SLOT_UID);
    }
    let mut bytes = [0; 4];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("no random number: {error}"))?;
    Ok(FIRST_POD_UID + u32::from_ne_bytes(bytes) % POD_UIDS)
}

fn reach() -> Vec<Reach> {
    let place = |path: &Path, writable| Reach {
        path: path.to_owned(),
        writable,
    };
    let own = [HOOK, USERS].map(|name| Path::new(FOLDER).join(name));
    let read = READABLE
        .iter()
        .map(Path::new)
        .chain(own.iter().map(PathBuf::as_path));
    // In /dev root's own modes decide; /dev/shm is in it.
    let written = container_folders();
    let write = written
        .iter()
        .map(PathBuf::as_path)
        .chain([Path::new("/dev")]);
    read.map(|path| place(path, false))
        .chain(write.map(|path| place(path, true)))
        .filter(|reach| reach.path.exists() || reach.path.starts_with(FOLDER))
        .collect()
}

/// Makes the runner's own folders and its socket.
fn prepare(config: &AgentConfig) -> anyhow::Result<UnixListener> {
    for folder in container_folders() {
        rustix::fs::access(&folder, Access::WRITE_OK).with_context(|| {
            format!(
                "user code cannot have {} (mount an emptyDir with medium: Memory and a sizeLimit there)",
                folder.display()
            )
        })?;
    }
    let folder = Path::new(FOLDER);
    make(folder, 0o711).with_context(|| {
        format!(
            "{FOLDER} cannot be made (mount an emptyDir with medium: Memory at /run or at {FOLDER})"
        )
    })?;
    // A volume comes open to everybody.
    if let Some(above) = folder.parent() {
        let _ = fs::set_permissions(above, fs::Permissions::from_mode(0o755));
    }
    make(&folder.join(PRIVATE), 0o700)?;
    let hook = folder.join(HOOK);
    make(&hook, 0o755)?;
    write_hook(&hook)?;
    let users = folder.join(USERS);
    make(&users, 0o755)?;
    describe_slots(&users, config.first_uid.into_iter())?;
    match fs::remove_file(SOCKET) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(SOCKET).with_context(|| format!("listening at {SOCKET}"))?;
    fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600))?;
    rustix::io::fcntl_setfd(listener.as_fd(), rustix::io::FdFlags::CLOEXEC)?;
    Ok(listener)
}

fn make(folder: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::set_permissions(folder, fs::Permissions::from_mode(mode))
}

/// What protects this pod, for whoever reads its log.
fn protections(config: &AgentConfig) -> Vec<String> {
    let mut lines = vec![match config.first_uid {
        Some(uid) => format!("user ids: the runner is root, user code is user {uid}"),
        None => "user ids: WEAKER: user code is the runner's own user".to_owned(),
    }];
    lines.push(match landlock_version() {
        Some(version) => {
            format!("landlock: version {version}; user code reaches its own folders and the image")
        }
        None => {
            "landlock: WEAKER: this kernel or the container's seccomp profile does not have it; \
                 file modes alone confine user code"
                .to_owned()
        }
    });
    lines.push(format!(
        "seccomp: on; internet sockets are {}",
        if config.network { "allowed" } else { "denied" }
    ));
    let disks = container_folders();
    let shared: Vec<String> = disks
        .iter()
        .filter(|folder| !is_memory(folder))
        .map(|folder| folder.display().to_string())
        .collect();
    lines.push(if shared.is_empty() {
        "disk: each of the slot's folders has a bound of its own".to_owned()
    } else {
        format!(
            "disk: WEAKER: {} not in memory, so that a full disk is not told from a failure; mount an \
             emptyDir with medium: Memory",
            shared.join(", ")
        )
    });
    lines.push(match &config.python {
        Some(python) => format!("python: {} is started ahead of time", python.display()),
        None => "python: there is none where GANTRY_PYTHON says; runs start cold".to_owned(),
    });
    lines
}
