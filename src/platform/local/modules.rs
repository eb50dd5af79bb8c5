//! Modules on this machine: each replica is a sandbox like a released program's, with the server from
//! `runner-image/gantry_module` in it.

mod install;
mod store;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::program::{Owner, Program};
use super::sandboxes::{Sandboxes, Tenant};
use super::stored;
use super::{LocalConfig, MAX_WAITING_EVENTS, WITH_THE_SERVER, unavailable};
use crate::beneath::Folder;
use crate::kept;
use crate::model::{
    Limits, ModuleName, ModuleSpec, ModuleState, ModuleStatus, Package, Problem, ReplId, ReplState,
    Scale, SecretText, TicketKey, UserId,
};
use crate::platform::modules::{Modules, ModulesError};
use crate::platform::{ByteStream, PlatformError};
use crate::runner::app::{AppConfig, ProgramConfig};
use crate::runner::sandbox::{Isolation, Placed, Role};
use crate::runner::wire::AppPort;
use crate::runner::workspace::Identity;
use install::{Installer, PACKAGES, Parts, SERVER, TOOLS};

/// What the supervisor and the module itself may take beside the calls: an interpreter, gRPC, and large
/// packages such as pandas.
const SERVER_MEMORY: u64 = 256 << 20;

/// How long those that serve go on beside new ones that do not serve yet: an import of large packages takes some
/// seconds, and who asked waits a minute for all of it.
const COMES_UP: Duration = Duration::from_secs(20);

/// The repl that a module's sandbox takes itself for. Nobody has a ticket for it.
const NO_REPL: &str = "module";

/// What is stored of a module.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    user_id: UserId,
    module: ModuleName,
    packages: Vec<Package>,
    replicas: u32,
    since: Timestamp,
    /// Nobody called it for long; the next call starts it again.
    #[serde(default)]
    stopped: bool,
}

#[derive(Debug)]
struct Replica {
    name: String,
    program: Arc<Program>,
}

#[derive(Debug)]
struct Module {
    record: Record,
    replicas: Vec<Replica>,
    /// Why its replicas could not be started, when they could not.
    failure: Option<String>,
}

type Key = (UserId, ModuleName);

/// Modules of this machine.
#[derive(Debug)]
pub struct LocalModules {
    folder: PathBuf,
    config: LocalConfig,
    sandboxes: Arc<Sandboxes>,
    installer: Installer,
    modules: Mutex<HashMap<Key, Module>>,
    /// Names of records that cannot be read. Whose they are is in the name; what was to be installed is not known.
    unreadable: Mutex<BTreeSet<String>>,
    /// One change of a module at a time.
    changing: Mutex<HashMap<Key, Arc<tokio::sync::Mutex<()>>>>,
}

impl LocalModules {
    /// Reads what an earlier server stored.
    pub fn open(config: LocalConfig, sandboxes: Arc<Sandboxes>) -> anyhow::Result<Arc<Self>> {
        let folder = config.data.join("modules");
        fs::create_dir_all(folder.join("records"))?;
        // Every sandbox wants a release; a module's is empty.
        fs::create_dir_all(folder.join("empty"))?;
        let found = stored::read_all::<Record>(&folder.join("records"))?;
        let mut modules = HashMap::new();
        for record in found.records.into_values() {
            let key = (record.user_id.clone(), record.module.clone());
            let module = Module {
                record,
                replicas: Vec::new(),
                failure: None,
            };
            modules.insert(key, module);
        }
        Ok(Arc::new(Self {
            installer: Installer::new(
                folder.clone(),
                Arc::clone(&sandboxes),
                config.packages.clone(),
            ),
            folder,
            config,
            sandboxes,
            modules: Mutex::new(modules),
            unreadable: Mutex::new(found.unreadable.into_keys().collect()),
            changing: Mutex::default(),
        }))
    }

    /// Starts every module that an earlier server served, one after the other.
    pub fn bring_back(self: &Arc<Self>) {
        self.installer.tidy();
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let keys: Vec<Key> = {
                let modules = this.locked();
                let wanted = modules.iter().filter(|(_, module)| !module.record.stopped);
                wanted.map(|(key, _)| key.clone()).collect()
            };
            for (user, name) in keys {
                let spec = ModuleSpec {
                    name,
                    packages: None,
                    scale: None,
                };
                if let Err(error) = this.ensure(&user, &spec).await {
                    tracing::error!(%user, module = %spec.name, %error, "a module did not come back");
                    this.with(&(user, spec.name), |module| {
                        module.failure = Some(error.to_string());
                    });
                }
            }
        });
    }

    /// Ends every module; they come back with the next server.
    pub async fn stop_all(&self) {
        let modules: Vec<_> = self.locked().drain().collect();
        let replicas = modules.into_iter().flat_map(|(_, module)| module.replicas);
        // A module that is asked to end takes no more calls and answers those that it has: nothing is waited for
        // before it is asked, there is no time for both.
        let patience = self.config.drain.min(WITH_THE_SERVER);
        end_all(replicas.collect(), patience, false).await;
    }

    /// Ends replicas that nobody is sent to any more, once they have answered what they were asked. They end also
    /// when who asked for it is gone.
    async fn end(&self, replicas: Vec<Replica>) {
        let ended = tokio::spawn(end_all(replicas, self.config.drain, true));
        if let Err(error) = ended.await {
            tracing::error!(%error, "a module's sandboxes may not have ended; the server's end ends them");
        }
    }

    /// The same, and nobody waits for it.
    fn end_later(&self, replicas: Vec<Replica>) {
        if !replicas.is_empty() {
            tokio::spawn(end_all(replicas, self.config.drain, true));
        }
    }

    /// Whether the machine has the memory for so many replicas more.
    fn has_room(&self, replicas: u32) -> bool {
        let one = self.config.maximum.memory_bytes + SERVER_MEMORY;
        // A machine that does not say is not risked: then the old ones end first.
        let available = available_memory().unwrap_or(0);
        available >= one.saturating_mul(replicas.into())
    }

    /// Names of files that were set aside.
    pub fn set_aside(&self) -> Vec<String> {
        let names = self.unreadable();
        let files = names.iter();
        files
            .map(|name| format!("modules/records/{name}.json"))
            .collect()
    }

    fn unreadable(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.unreadable
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wanted, with what is left out filled in.
    fn merged(&self, user: &UserId, spec: &ModuleSpec) -> Result<Record, Problem> {
        let key = (user.clone(), spec.name.clone());
        if spec.packages.is_none() && self.unreadable().contains(&file_name(&key)) {
            return Err(record_unreadable(&spec.name));
        }
        let known = self.with(&key, |module| module.record.clone());
        let known = known.unwrap_or_else(|| Record {
            user_id: user.clone(),
            module: spec.name.clone(),
            packages: Vec::new(),
            replicas: 1,
            since: Timestamp::now(),
            stopped: false,
        });
        let replicas = match spec.scale {
            None => known.replicas,
            Some(Scale::Fixed { replicas }) => replicas,
            Some(Scale::Auto(_)) => return Err(no_autoscaling()),
        };
        Ok(Record {
            packages: spec.packages.clone().unwrap_or(known.packages),
            replicas,
            stopped: false,
            ..known
        })
    }

    /// Whether it has replicas with other packages than are wanted.
    fn has_others(&self, key: &Key, wanted: &Record) -> bool {
        let others = self.with(key, |module| {
            !module.replicas.is_empty() && module.record.packages != wanted.packages
        });
        others.unwrap_or(false)
    }

    /// Takes out what must not serve any more: the dead, those with other packages, those too many.
    fn take_out(&self, key: &Key, wanted: &Record) -> Vec<Replica> {
        self.with(key, |module| {
            let other = module.record.packages != wanted.packages;
            let mut kept = Vec::new();
            let mut out = Vec::new();
            for replica in module.replicas.drain(..) {
                let dead = replica.program.standing().borrow().over || !replica.program.is_alive();
                let enough = kept.len() >= wanted.replicas as usize;
                match other || dead || enough {
                    true => out.push(replica),
                    false => kept.push(replica),
                }
            }
            module.replicas = kept;
            out
        })
        .unwrap_or_default()
    }

    /// Starts replicas with other packages beside those that serve, which serve until the new ones do. When they
    /// cannot be started everything stays as it is.
    async fn replace(&self, key: &Key, wanted: Record, parts: &Parts) -> Result<(), PlatformError> {
        let mut fresh = Vec::new();
        for _ in 0..wanted.replicas {
            match self.start(&wanted, parts).await {
                Ok(replica) => fresh.push(replica),
                Err(error) => {
                    self.end_later(fresh);
                    return Err(not_made(&error));
                }
            }
        }
        let came = fresh.iter().map(|replica| came_up(&replica.program));
        futures_util::future::join_all(came).await;
        if let Err(error) = self.save(key, &wanted) {
            self.end_later(fresh);
            return Err(error);
        }
        let replaced = self.with(key, |module| {
            module.record = wanted;
            module.failure = None;
            std::mem::replace(&mut module.replicas, std::mem::take(&mut fresh))
        });
        self.end_later(replaced.unwrap_or_default());
        // The server stops, and has taken all modules out.
        self.end_later(fresh);
        Ok(())
    }

    async fn start(&self, record: &Record, parts: &Parts) -> anyhow::Result<Replica> {
        let nonce = Timestamp::now().as_microsecond();
        let name = format!(
            "module-{}-{}-{nonce:x}",
            record.user_id,
            record.module.label()
        );
        let maximum = self.config.maximum;
        let memory = maximum.memory_bytes + SERVER_MEMORY;
        let env = self.variables(record, parts.packages.is_some());
        let mut random = [0; 32];
        getrandom::fill(&mut random)
            .map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
        let key = TicketKey::new(random);
        let repl: ReplId = NO_REPL.parse()?;
        let identity = Identity {
            repl: repl.clone(),
            key: key.text(),
        };
        let tenant = Tenant {
            name: name.clone(),
            user: Some(record.user_id.clone()),
            placed: vec![Placed {
                from: self.folder.join("empty"),
                name: "release".to_owned(),
                writable: false,
            }],
            slots: 1,
            network: false,
            memory,
        };
        let argv = ["python3", "-m", "gantry_module"].map(str::to_owned);
        let made = self
            .sandboxes
            .make_showing(tenant, parts.inside(), |sandbox| {
                let program = ProgramConfig {
                    argv: argv.to_vec(),
                    stays: false,
                    serves: None,
                    served: false,
                    env,
                    memory_bytes: Some(memory),
                    processes: Some(Limits::MAXIMUM.processes),
                    sandbox,
                };
                Role::App(AppConfig {
                    program,
                    release: PathBuf::from("/release"),
                    data: None,
                    identity,
                })
            });
        let sandbox = made.await?;
        let owner = Owner {
            user_id: record.user_id.clone(),
            repl_id: repl,
            key,
        };
        // What a module prints is kept for its status; it is no repl's log.
        let (tell, mut events) = mpsc::channel(MAX_WAITING_EVENTS);
        tokio::spawn(async move { while events.recv().await.is_some() {} });
        let sandboxes = Arc::clone(&self.sandboxes);
        let program = Program::watch(name.clone(), sandbox, sandboxes, owner, 0, tell).await?;
        Ok(Replica {
            name,
            program: Arc::new(program),
        })
    }

    fn variables(&self, record: &Record, packages: bool) -> Vec<(String, String)> {
        let memory = self.config.maximum.memory_bytes;
        let packages = if packages { PACKAGES } else { "" };
        [
            ("MODULE_NAME", record.module.to_string()),
            ("MODULE_HOST", "127.0.0.1".to_owned()),
            ("MODULE_PACKAGES", absolute(packages)),
            ("MODULE_CALL_MEMORY_BYTES", (memory / 2).to_string()),
            ("MODULE_MEMORY_BYTES", memory.to_string()),
            ("PYTHONPATH", format!("/{SERVER}:/{TOOLS}")),
            // What a call writes to its folder is nothing that the next one imports.
            ("PYTHONSAFEPATH", "1".to_owned()),
            ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
            // A call has a processor; threads for more of them only cost memory.
            ("OPENBLAS_NUM_THREADS", "1".to_owned()),
            ("OMP_NUM_THREADS", "1".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
    }

    fn records(&self) -> PathBuf {
        self.folder.join("records")
    }

    /// Stores it whole or not at all.
    fn save(&self, key: &Key, record: &Record) -> Result<(), PlatformError> {
        let write = || -> anyhow::Result<()> {
            let (folder, name) = (self.records(), file_name(key));
            let staged = folder.join(format!("{name}.new"));
            fs::write(&staged, kept::seal(record)?)?;
            fs::File::open(&staged)?.sync_data()?;
            fs::rename(&staged, folder.join(format!("{name}.json")))?;
            fs::File::open(folder)?.sync_all()?;
            // It takes the place of one that could not be read.
            self.unreadable().remove(&name);
            Ok(())
        };
        crate::beneath::waiting(write).map_err(|error| {
            unavailable(
                "The module's record could not be stored",
                &error,
                "Check that the data folder is writable and has room.",
            )
        })
    }

    /// The sets of packages that the user's modules have.
    fn used_sets(&self, user: &UserId, python: &Path) -> BTreeSet<String> {
        let modules = self.locked();
        let records = modules.values().map(|module| &module.record);
        let with_packages =
            records.filter(|record| record.user_id == *user && !record.packages.is_empty());
        with_packages
            .map(|record| self.installer.set_name(python, &record.packages))
            .collect()
    }

    fn with<T>(&self, key: &Key, act: impl FnOnce(&mut Module) -> T) -> Option<T> {
        self.locked().get_mut(key).map(act)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Module>> {
        self.modules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self, key: &Key) -> Arc<tokio::sync::Mutex<()>> {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever asks for modules that are not there leaves nothing behind.
        changing.retain(|_, lock| Arc::strong_count(lock) > 1);
        Arc::clone(changing.entry(key.clone()).or_default())
    }
}

async fn end_all(replicas: Vec<Replica>, patience: Duration, drain: bool) {
    let ended = replicas
        .iter()
        .map(|replica| replica.program.end(patience, drain));
    futures_util::future::join_all(ended).await;
}

/// Waits until it serves, or will not.
async fn came_up(program: &Program) {
    let mut standing = program.standing();
    let settled = standing.wait_for(|now| now.over || now.state == ReplState::Running);
    // Who waits for the module is told what it says of itself.
    let _ = tokio::time::timeout(COMES_UP, settled).await;
}

/// Bytes of memory that programs can be given without swapping, as the kernel reckons.
fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

fn not_made(error: &anyhow::Error) -> PlatformError {
    let remedy = "Look at the server's log; try again.";
    unavailable("The module's sandbox could not be made", error, remedy)
}

/// Where a sandbox has it; nothing stays nothing.
fn absolute(place: &str) -> String {
    match place {
        "" => String::new(),
        place => format!("/{place}"),
    }
}

fn status(module: &Module) -> ModuleStatus {
    let (mut ready, mut restarts, mut over, mut cause) = (0, 0, 0, module.failure.clone());
    for replica in &module.replicas {
        let standing = replica.program.standing().borrow().clone();
        ready += u32::from(standing.state == ReplState::Running);
        over += usize::from(standing.over);
        restarts += standing.restarts;
        if standing.state != ReplState::Running && standing.last_error.is_some() {
            let lines = replica.program.last_lines();
            cause = standing.last_error.map(|error| match lines.is_empty() {
                true => error,
                false => format!("{error}. Its last lines:\n{lines}"),
            });
        }
    }
    let record = &module.record;
    let state = match ready {
        _ if record.stopped => ModuleState::Stopped,
        0 if over == module.replicas.len() && cause.is_some() => ModuleState::Failed,
        0 => ModuleState::Starting,
        _ => ModuleState::Running,
    };
    ModuleStatus {
        module: record.module.clone(),
        user_id: record.user_id.clone(),
        namespace: record.user_id.namespace(),
        state,
        cause,
        ready,
        replicas: record.replicas,
        autoscale: None,
        restarts,
        authority: None,
        last_used: None,
        packages: record.packages.clone(),
        since: record.since,
    }
}

/// What a module's record is named, without an ending.
fn file_name((user, name): &Key) -> String {
    format!("{user}.{}", name.label())
}

/// Of a module whose record cannot be read.
fn unreadable_status(user: &UserId, name: &ModuleName) -> ModuleStatus {
    let record = Record {
        user_id: user.clone(),
        module: name.clone(),
        packages: Vec::new(),
        replicas: 0,
        since: Timestamp::now(),
        stopped: false,
    };
    status(&Module {
        record,
        replicas: Vec::new(),
        failure: Some(record_unreadable(name).to_string()),
    })
}

fn record_unreadable(name: &ModuleName) -> Problem {
    Problem::new(
        "module_record_unreadable",
        format!("The module {name} cannot be started"),
        "its record is damaged, so that it is not known which packages it has",
        "Create it again with its packages, or delete it.",
    )
}

fn no_python() -> ModulesError {
    ModulesError::Refused(Problem::new(
        "python_missing",
        "There is no Python on this machine",
        "the command python3 is not found, or does not run",
        "Install Python 3.9 or newer, and start the server again.",
    ))
}

fn no_autoscaling() -> Problem {
    Problem::new(
        "autoscaling_not_here",
        "The module cannot be scaled by processor time",
        "this server runs on the local platform, where all replicas share one machine",
        "Ask for a number of replicas, or use a server on Kubernetes.",
    )
}

fn starting(name: &ModuleName, cause: &str) -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "module_starting",
        format!("The module {name} does not answer yet"),
        cause,
        "Ask again in a moment; GET /modules tells how it is.",
    ))
}

#[async_trait]
impl Modules for LocalModules {
    async fn ensure(&self, user: &UserId, spec: &ModuleSpec) -> Result<bool, ModulesError> {
        if self.sandboxes.host().isolation == Isolation::None {
            let error = anyhow::anyhow!("this machine does not allow namespaces");
            let remedy =
                "Look at what the server said at its start; a module needs a port of its own.";
            return Err(unavailable("A module cannot be served here", &error, remedy).into());
        }
        let key = (user.clone(), spec.name.clone());
        let changing = self.changing(&key);
        let _one = changing.lock().await;
        let mut wanted = self.merged(user, spec).map_err(ModulesError::Refused)?;
        let interpreters = self.sandboxes.interpreters().await;
        let python = interpreters.python.as_deref().ok_or_else(no_python)?;
        let used = self.used_sets(user, python);
        let parts = self
            .installer
            .parts(python, user, &wanted.module, &wanted.packages, &used)
            .await
            .map_err(ModulesError::Refused)?;
        let others = self.has_others(&key, &wanted);
        if others && self.has_room(wanted.replicas) {
            self.replace(&key, wanted, &parts).await?;
            return Ok(true);
        }
        let out = self.take_out(&key, &wanted);
        if others {
            // Their memory is needed for those that come.
            self.end(out).await;
        } else {
            self.end_later(out);
        }
        if self.with(&key, |_| ()).is_none() {
            // Its installation may have taken longer than a module may be quiet.
            wanted.since = Timestamp::now();
        }
        self.save(&key, &wanted)?;
        let running = {
            let mut modules = self.locked();
            let module = modules.entry(key.clone()).or_insert_with(|| Module {
                record: wanted.clone(),
                replicas: Vec::new(),
                failure: None,
            });
            module.record = wanted.clone();
            module.failure = None;
            module.replicas.len()
        };
        let missing = (wanted.replicas as usize).saturating_sub(running);
        for _ in 0..missing {
            let started = self.start(&wanted, &parts).await;
            let replica = started.map_err(|error| not_made(&error))?;
            self.with(&key, |module| module.replicas.push(replica));
        }
        Ok(missing > 0)
    }

    async fn pause(&self, user: &UserId, name: &ModuleName) -> Result<(), PlatformError> {
        let key = (user.clone(), name.clone());
        let changing = self.changing(&key);
        let _one = changing.lock().await;
        let record = self.with(&key, |module| module.record.clone());
        let Some(record) = record.filter(|record| !record.stopped) else {
            return Ok(());
        };
        let stopped = Record {
            stopped: true,
            ..record
        };
        self.save(&key, &stopped)?;
        let replicas = self.with(&key, |module| {
            module.record = stopped;
            std::mem::take(&mut module.replicas)
        });
        self.end(replicas.unwrap_or_default()).await;
        Ok(())
    }

    async fn remove(&self, user: &UserId, name: &ModuleName) -> Result<bool, PlatformError> {
        let key = (user.clone(), name.clone());
        let changing = self.changing(&key);
        let _one = changing.lock().await;
        let module = self.locked().remove(&key);
        let name = file_name(&key);
        if module.is_none() && !self.unreadable().contains(&name) {
            return Ok(false);
        }
        // Before they end, which may take a while: a server that is killed meanwhile does not bring it back.
        let removed = Folder::open(&self.records()).and_then(|all| stored::remove(&all, &name));
        if let Some(module) = module {
            self.end(module.replicas).await;
        }
        removed.map_err(|error| {
            unavailable(
                "The module's record could not be removed",
                &error.into(),
                "Check that the data folder is writable.",
            )
        })?;
        self.unreadable().remove(&name);
        Ok(true)
    }

    async fn list(&self) -> Result<Vec<ModuleStatus>, PlatformError> {
        let mut all: Vec<ModuleStatus> = self.locked().values().map(status).collect();
        let unreadable = self.unreadable().clone();
        // A name that a label cannot hold is not known any more; `/readyz` tells of the file.
        all.extend(unreadable.iter().filter_map(|file| {
            let (user, label) = file.split_once('.')?;
            let (user, name) = (user.parse().ok()?, label.parse().ok()?);
            Some(unreadable_status(&user, &name))
        }));
        all.sort_by(|a, b| (&a.user_id, &a.module).cmp(&(&b.user_id, &b.module)));
        Ok(all)
    }

    async fn status(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<ModuleStatus>, PlatformError> {
        let key = (user.clone(), name.clone());
        let known = self.with(&key, |module| status(module));
        let unreadable = || self.unreadable().contains(&file_name(&key));
        Ok(match known {
            None if unreadable() => Some(unreadable_status(user, name)),
            known => known,
        })
    }

    async fn replicas(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<Vec<String>>, PlatformError> {
        let key = (user.clone(), name.clone());
        Ok(self.with(&key, |module| {
            let living = module
                .replicas
                .iter()
                .filter(|replica| replica.program.is_alive());
            living.map(|replica| replica.name.clone()).collect()
        }))
    }

    /// Its port is in its sandbox's own network, to which the server alone has a way.
    async fn token(
        &self,
        _user: &UserId,
        _name: &ModuleName,
    ) -> Result<Option<SecretText>, PlatformError> {
        Ok(None)
    }

    async fn dial(
        &self,
        user: &UserId,
        name: &ModuleName,
        replica: &str,
    ) -> Result<Box<dyn ByteStream>, PlatformError> {
        let program = self.with(&(user.clone(), name.clone()), |module| {
            let mut all = module.replicas.iter();
            let found = all.find(|one| one.name == replica)?;
            Some(Arc::clone(&found.program))
        });
        let program = program
            .flatten()
            .ok_or_else(|| starting(name, "the replica is gone; another one takes its place"))?;
        let standing = program.standing().borrow().clone();
        if standing.state != ReplState::Running {
            let cause = standing.last_error;
            let cause = cause.as_deref().unwrap_or("its server is starting");
            return Err(starting(name, cause));
        }
        match program.dial(AppPort::Program).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(unavailable(
                "The module cannot be reached",
                &error.into(),
                "Look at GET /modules; create its pod again if its sandbox ended.",
            )),
        }
    }
}
