//! Users' sandboxes: one agent each, kept, found again after a restart of the server.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::LocalConfig;
use super::cgroup::Cgroup;
use super::host::{FIRST_HOST_UID, Host, Interpreters, Lacking, Private};
use super::launch::{FirstProcess, launch};
use crate::beneath::Folder;
use crate::model::{Limits, UserId};
use crate::runner::agent::AgentConfig;
use crate::runner::confine::Reach;
use crate::runner::sandbox::{
    FIRST_SLOT_UID, HOOK_FOLDER, IDS, Isolation, Placed, Role, SandboxSpec,
};
use crate::runner::slot::{FOLDER_SLOTS, Ground};
use crate::runner::wire::{BUILD_SCRATCH_BYTES, FromRunner, VERSION, frames, scratch_bytes};

/// Files and folders in one slot's scratch space: enough for test runners and their caches.
const SCRATCH_FILES: u64 = 16_384;

/// An agent that has had no server and no job for this long ends itself, and its sandbox with it, whatever it
/// has to tell: its server may never come back.
const IDLE_SECONDS: u64 = 1_800;

/// An agent that does not greet within this time, two heartbeats, is dead: it has nothing to do before.
const AGENT_SILENCE: Duration = Duration::from_secs(10);

/// Memory of a sandbox beside its runs: the agent and the waiting interpreters.
const RUNNER_MEMORY: u64 = 512 << 20;

/// Everything that makes sandboxes: the machine, the interpreters, the numbers given out.
#[derive(Debug)]
pub struct Sandboxes {
    config: LocalConfig,
    host: Host,
    interpreters: OnceCell<Arc<Interpreters>>,
    private: Private,
    numbers: Mutex<BTreeSet<u32>>,
    users: Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<Option<Sandbox>>>>>,
}

/// A living sandbox.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its first process.
    pub process: FirstProcess,
    /// Which range of host user ids it has.
    pub number: u32,
}

/// What is to live in a new sandbox.
pub struct Tenant {
    /// A name for its files.
    pub name: String,
    /// Whose it is: all sandboxes of a user have one share of the processor. `None`: Gantry's own.
    pub user: Option<UserId>,
    /// Folders shown to it.
    pub placed: Vec<Placed>,
    /// Slots in it.
    pub slots: usize,
    /// Whether internet sockets may be made.
    pub network: bool,
    /// Bytes of memory that all that runs in it may use.
    pub memory: u64,
}

impl Sandboxes {
    /// Finds the sandboxes that an earlier server left.
    pub fn new(config: LocalConfig, host: Host) -> anyhow::Result<Self> {
        let folder = config.data.join("sandboxes");
        fs::create_dir_all(&folder)?;
        // The platform's folder is in the server's, which holds the keys.
        let private = Private::new(config.data.parent().unwrap_or(&config.data))?;
        let this = Self {
            private,
            config,
            host,
            interpreters: OnceCell::new(),
            numbers: Mutex::default(),
            users: Mutex::default(),
        };
        let mut remains = Vec::new();
        for entry in fs::read_dir(&folder)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let recorded = this.recorded(&name);
            let living = recorded.filter(|found| found.process.is_alive());
            let user = name.strip_prefix("user-").map(str::parse::<UserId>);
            if let (Some(sandbox), Some(Ok(user))) = (living, user) {
                this.locked_numbers().insert(sandbox.number);
                let entry = this.entry(&user);
                if let Ok(mut known) = entry.try_lock() {
                    *known = Some(sandbox);
                }
                continue;
            }
            let remain = (this.group(&name), entry.path());
            match living {
                // A released program without the server that watched it ends by itself; be sure.
                Some(sandbox) => {
                    this.end(sandbox);
                    remains.push(remain);
                }
                None => clear(remain),
            }
        }
        // Their processes take a moment to be gone; the start does not wait for that. Their names
        // are not used again.
        std::thread::spawn(move || remains.into_iter().for_each(clear));
        Ok(this)
    }

    /// How far sandboxes are cut off.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The interpreters of this machine, asked once.
    pub async fn interpreters(&self) -> Arc<Interpreters> {
        let find = || async {
            let private = self.private.clone();
            let found = tokio::task::spawn_blocking(move || Interpreters::find(&private)).await;
            let found = found.unwrap_or_else(|_| Interpreters::find(&self.private));
            for lacking in found.missing.values() {
                if let Lacking::Closed(tool, folder) = lacking {
                    tracing::warn!(
                        tool = tool.command,
                        folder = %folder.display(),
                        "not used: user code would see the folder, and in it more than programs, such as \
                         the server's data. Install the tool, or keep the data, elsewhere"
                    );
                }
            }
            Arc::new(found)
        };
        Arc::clone(self.interpreters.get_or_init(find).await)
    }

    /// A connection to the user's agent, its sandbox made first if need be.
    pub async fn connect(&self, user: &UserId) -> anyhow::Result<UnixStream> {
        let entry = self.entry(user);
        let mut sandbox = entry.lock().await;
        let name = format!("user-{user}");
        if sandbox.is_some_and(|found| found.process.is_alive()) {
            match self.dial_living(&name).await {
                Ok(stream) => return Ok(stream),
                Err(why) => {
                    tracing::warn!(%user, %why, "a sandbox is made anew; what ran in it is lost");
                }
            }
        }
        if let Some(dead) = sandbox.take() {
            self.forget(&name, dead).await;
        }
        let slots = match self.host.isolation {
            // While one job runs, the slot of the one before is emptied and made ready: with as many
            // again, runs that follow each other closely never wait for it.
            Isolation::Full { .. } => 2 * self.config.runs_per_user,
            Isolation::SingleUser | Isolation::None => 1,
        };
        let tenant = Tenant {
            name: name.clone(),
            user: Some(user.clone()),
            placed: Vec::new(),
            slots,
            network: self.config.network,
            // Scratch space is memory, and a compiler may fill both.
            memory: self.config.runs_per_user as u64
                * (self.config.maximum.memory_bytes)
                    .max(Limits::COMPILE.memory_bytes + BUILD_SCRATCH_BYTES),
        };
        let networks =
            matches!(self.host.isolation, Isolation::Full { .. }) && !self.config.network;
        let agent = |config| Role::Agent(AgentConfig { networks, ..config });
        *sandbox = Some(self.make(tenant, agent).await?);
        self.dial(&name)
            .await
            .context("the new sandbox does not answer")
    }

    /// A connection to an agent that was heard to live and to speak this server's frames.
    async fn dial_living(&self, name: &str) -> anyhow::Result<UnixStream> {
        // The kernel takes connections for one that is stopped, so that a first one is asked for a greeting.
        let (mut reader, _writer) = frames(self.dial(name).await?);
        let greeted = timeout(AGENT_SILENCE, reader.next::<FromRunner>()).await;
        match greeted.context("its agent does not speak")?? {
            FromRunner::Hello { version: VERSION } => Ok(self.dial(name).await?),
            FromRunner::Hello { version } => anyhow::bail!(
                "its agent speaks version {version} of the runner's frames, and this server {VERSION}"
            ),
            other => anyhow::bail!("its agent greets with {other:?}"),
        }
    }

    /// Ends the user's sandbox.
    pub async fn drop_user(&self, user: &UserId) {
        let entry = self.entry(user);
        let taken = entry.lock().await.take();
        if let Some(sandbox) = taken {
            self.forget(&format!("user-{user}"), sandbox).await;
        }
    }

    /// Ends every user's sandbox.
    pub async fn drop_all(&self) {
        let users: Vec<UserId> = self
            .users
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .cloned()
            .collect();
        for user in users {
            self.drop_user(&user).await;
        }
    }

    /// Makes a sandbox for a tenant.
    pub async fn make(
        &self,
        tenant: Tenant,
        role: impl FnOnce(AgentConfig) -> Role,
    ) -> anyhow::Result<Sandbox> {
        self.make_showing(tenant, Vec::new(), role).await
    }

    /// The same, with more of the host's folders shown to user code, read-only.
    pub async fn make_showing(
        &self,
        tenant: Tenant,
        inside: Vec<Placed>,
        role: impl FnOnce(AgentConfig) -> Role,
    ) -> anyhow::Result<Sandbox> {
        let number = self.take_number();
        let group = self.group(&tenant.name);
        let made = self.make_numbered(number, tenant, inside, role).await;
        if made.is_err() {
            self.return_number(number);
            // It may wait for processes to leave; the next sandbox of this name makes it anew.
            tokio::task::spawn_blocking(move || Cgroup::remove(&group));
        }
        made
    }

    async fn make_numbered(
        &self,
        number: u32,
        tenant: Tenant,
        inside: Vec<Placed>,
        role: impl FnOnce(AgentConfig) -> Role,
    ) -> anyhow::Result<Sandbox> {
        let interpreters = self.interpreters().await;
        let folder = self.folder(&tenant.name);
        fs::create_dir_all(folder.join("root"))?;
        let cgroups = if self.host.cgroups {
            let memory = tenant.memory + RUNNER_MEMORY;
            let processes = tenant.slots as u64 * Limits::MAXIMUM.processes + 64;
            let owner = self.group(&match &tenant.user {
                Some(user) => format!("owner-{user}"),
                None => "own".to_owned(),
            });
            Cgroup::create(&owner, &self.group(&tenant.name), memory, processes)?.procs()
        } else {
            Vec::new()
        };
        let spec = SandboxSpec {
            isolation: self.isolation(number),
            folder: folder.join("root"),
            shown: interpreters.shown.clone(),
            inside,
            cgroups,
            network: tenant.network,
            role: role(self.agent_config(&tenant, &interpreters)),
            placed: tenant.placed,
        };
        let listener = self.listen(&tenant.name)?;
        let log = File::create(folder.join("runner.log"))?;
        let runner = self.config.runner.clone();
        let launched =
            tokio::task::spawn_blocking(move || launch(&runner, &spec, Some(listener), Some(log)));
        let process = launched.await??;
        let sandbox = Sandbox { process, number };
        let text = serde_json::to_vec(&sandbox)?;
        let written = tokio::task::spawn_blocking(move || write_down(&folder, &text)).await;
        let written = written.map_err(io::Error::other).flatten();
        // What is not recorded would not be found again.
        written.inspect_err(|_| self.end(sandbox))?;
        Ok(sandbox)
    }

    /// Ends a sandbox and removes what it left.
    pub async fn forget(&self, name: &str, sandbox: Sandbox) {
        self.end(sandbox);
        if self.host.cgroups {
            let group = self.group(name);
            let removed = tokio::task::spawn_blocking(move || Cgroup::remove(&group)).await;
            if let Err(error) = removed {
                tracing::debug!(%name, %error, "its control groups stay behind");
            }
        }
        self.return_number(sandbox.number);
        let folder = self.folder(name);
        let removed = tokio::task::spawn_blocking(move || remove(&folder)).await;
        if let Err(error) = removed.map_err(io::Error::other).flatten() {
            tracing::debug!(%name, %error, "a sandbox's folder stays behind");
        }
    }

    /// Ends everything in a sandbox.
    fn end(&self, sandbox: Sandbox) {
        match self.host.isolation {
            // Nothing but its being below the first process marks what belongs to it.
            Isolation::None => sandbox.process.kill_with_descendants(),
            Isolation::Full { .. } | Isolation::SingleUser => sandbox.process.kill(),
        }
    }

    /// The name of a sandbox's control groups: two servers on one machine have different folders.
    fn group(&self, name: &str) -> String {
        let server = crc32fast::hash(self.config.data.as_os_str().as_encoded_bytes());
        format!("{server:08x}-{name}")
    }

    /// A connection to a sandbox's listening socket.
    pub async fn dial(&self, name: &str) -> io::Result<UnixStream> {
        let folder = open_folder(&self.folder(name))?;
        UnixStream::connect(short_path(&folder)).await
    }

    fn take_number(&self) -> u32 {
        let mut numbers = self.locked_numbers();
        let free = (0..).find(|n| !numbers.contains(n)).unwrap_or(0);
        numbers.insert(free);
        free
    }

    fn return_number(&self, number: u32) {
        self.locked_numbers().remove(&number);
    }

    fn locked_numbers(&self) -> std::sync::MutexGuard<'_, BTreeSet<u32>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn isolation(&self, number: u32) -> Isolation {
        match self.host.isolation {
            Isolation::Full { .. } => Isolation::Full {
                first_host_uid: FIRST_HOST_UID + number * IDS,
            },
            weaker => weaker,
        }
    }

    fn agent_config(&self, tenant: &Tenant, interpreters: &Interpreters) -> AgentConfig {
        let mounts = self.host.isolation != Isolation::None;
        let scratch = self.folder(&tenant.name).join("root/scratch");
        let reach = if mounts {
            vec![Reach {
                path: PathBuf::from("/base"),
                writable: true,
            }]
        } else {
            let shown = interpreters.shown.iter().filter(|path| path.exists());
            let mut reach: Vec<Reach> = shown.map(|path| reach(path, false)).collect();
            // What one run writes below the hook's folder, the interpreter of the next would read.
            reach.push(self::reach(&scratch.join(FOLDER_SLOTS), true));
            reach.push(self::reach(&scratch.join(HOOK_FOLDER), false));
            reach.extend(["/dev", "/proc"].map(reach_of));
            if tenant.network {
                let files = ["/etc/resolv.conf", "/etc/hosts"].map(Path::new);
                let files = files.iter().filter_map(|file| fs::canonicalize(file).ok());
                reach.extend(files.map(|file| self::reach(&file, false)));
            }
            let placed = tenant.placed.iter();
            reach.extend(placed.map(|placed| self::reach(&placed.from, placed.writable)));
            reach
        };
        AgentConfig {
            slots: tenant.slots,
            first_uid: matches!(self.host.isolation, Isolation::Full { .. })
                .then_some(FIRST_SLOT_UID),
            ground: if mounts {
                Ground::Roots {
                    base: PathBuf::from("/base"),
                    slots: PathBuf::from("/slots"),
                    scratch: PathBuf::from("/scratch"),
                    bytes: scratch_bytes(&self.config.maximum),
                    files: SCRATCH_FILES,
                }
            } else {
                Ground::Folder(scratch)
            },
            reach,
            // With a network namespace of its own, internet sockets lead nowhere and may be made.
            network: tenant.network || mounts,
            networks: false,
            secluded: mounts && !tenant.network,
            log_refused: self.config.log_refused,
            python: interpreters.python.clone(),
            path: interpreters.path.clone(),
            // The socket is in a folder of the server's.
            peer: None,
            idle_seconds: Some(IDLE_SECONDS),
        }
    }

    fn entry(&self, user: &UserId) -> Arc<tokio::sync::Mutex<Option<Sandbox>>> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(users.entry(user.clone()).or_default())
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.config.data.join("sandboxes").join(name)
    }

    fn recorded(&self, name: &str) -> Option<Sandbox> {
        let text = fs::read(self.folder(name).join("process.json")).ok()?;
        serde_json::from_slice(&text).ok()
    }

    fn listen(&self, name: &str) -> io::Result<OwnedFd> {
        let folder = self.folder(name);
        match fs::remove_file(folder.join(SOCKET)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let opened = open_folder(&folder)?;
        Ok(OwnedFd::from(UnixListener::bind(short_path(&opened))?))
    }
}

/// Removes what a dead sandbox left: its control groups and its folder.
fn clear((group, folder): (String, PathBuf)) {
    Cgroup::remove(&group);
    if let Err(error) = remove(&folder) {
        tracing::debug!(folder = %folder.display(), %error, "a sandbox's folder stays behind");
    }
}

/// Removes a sandbox's folder. Without namespaces its scratch space is in there, as its jobs left it.
fn remove(folder: &Path) -> io::Result<()> {
    let (Some(above), Some(name)) = (folder.parent(), folder.file_name()) else {
        return Ok(());
    };
    Folder::open(above)?.remove(name)
}

/// Records a sandbox's first process, whole or not at all, and on the disk when it returns.
fn write_down(folder: &Path, text: &[u8]) -> io::Result<()> {
    let (staged, whole) = (folder.join("process.new"), folder.join("process.json"));
    fs::write(&staged, text)?;
    File::open(&staged)?.sync_all()?;
    fs::rename(&staged, &whole)?;
    File::open(folder)?.sync_all()
}

const SOCKET: &str = "socket";

fn reach(path: &Path, writable: bool) -> Reach {
    Reach {
        path: path.to_owned(),
        writable,
    }
}

fn reach_of(path: &str) -> Reach {
    reach(Path::new(path), path == "/dev")
}

fn open_folder(folder: &Path) -> io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(
        folder,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// A socket's path may have 107 bytes (unix(7)); a data folder's may be longer.
fn short_path(folder: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", folder.as_raw_fd()))
}
