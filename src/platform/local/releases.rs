//! Repls and their releases on this machine: a record per repl, a program per current release.

mod again;
mod disk;
mod idle;
mod settings;
mod workspace;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::disk::{Disk, TooMuch};
use super::program::{Owner, Program};
use super::record::{Record, Stored};
use super::sandboxes::{Sandboxes, Tenant};
use super::stored;
use super::{DEPLOY_PATIENCE, LocalConfig, WITH_THE_SERVER, unavailable};
use crate::beneath::{Folder, waiting};
use crate::kept;
use crate::model::{
    LatestOrder, Limits, MAX_KNOWN_DELETED, Order, Problem, Release, ReleaseState, ReplId,
    ReplState, ReplStatus, TicketKey, UserId, idle_cause, is_known_after,
};
use crate::platform::{
    ByteStream, LAST_LINES, LISTEN_OR_END, PlatformError, ProgramEvent, ReleaseSpec, RunningRelease,
};
use crate::runner::app::{AppConfig, ProgramConfig};
use crate::runner::sandbox::{Isolation, Placed, Role};
use crate::runner::wire::AppPort;
use crate::runner::workspace::Identity;
use crate::storage::DirectoryStore;

/// How long a caller waits for a program that is being started, as after a restart of the server: shorter
/// than the proxy waits for a connection, so that the caller is told why.
const COMING_BACK: Duration = Duration::from_secs(4);

/// The code of the problem that a repl's record cannot be read.
const RECORD_UNREADABLE: &str = "repl_record_unreadable";

/// Where a program finds the folder that outlives its releases.
const DATA: &str = "data";

#[derive(Debug)]
struct Repl {
    record: Record,
    program: Option<Arc<Program>>,
    /// Why its program did not come back with this server.
    lost: Option<String>,
}

impl Repl {
    fn new(record: Record) -> Self {
        Self {
            record,
            program: None,
            lost: None,
        }
    }
}

/// Every repl of this machine.
#[derive(Debug, Clone)]
pub struct Releases {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: LocalConfig,
    store: DirectoryStore,
    sandboxes: Arc<Sandboxes>,
    disk: Disk,
    /// Programs that write to their repls' data.
    writers: Mutex<Vec<disk::Writer>>,
    repls: Mutex<HashMap<ReplId, Repl>>,
    /// Records of repls that were deleted, for what was asked of them last. They end with the server: what is under
    /// way then has it in its own record.
    deleted: Mutex<HashMap<ReplId, Record>>,
    /// Repls whose records cannot be read, and where the files are: nobody else gets their names.
    unreadable: BTreeMap<ReplId, PathBuf>,
    /// Changes when a program was installed.
    installed: watch::Sender<()>,
    /// One change of a repl at a time.
    changing: Mutex<HashMap<ReplId, Arc<tokio::sync::Mutex<()>>>>,
    tell: mpsc::Sender<ProgramEvent>,
    events: tokio::sync::Mutex<mpsc::Receiver<ProgramEvent>>,
    stopped: tokio_util::sync::CancellationToken,
}

impl Releases {
    /// Reads what an earlier server stored.
    pub fn open(
        config: LocalConfig,
        store: DirectoryStore,
        sandboxes: Arc<Sandboxes>,
        tell: mpsc::Sender<ProgramEvent>,
        events: mpsc::Receiver<ProgramEvent>,
    ) -> anyhow::Result<Self> {
        let folder = config.data.join("repls");
        fs::create_dir_all(&folder)?;
        let found = stored::read_all::<Record>(&folder)?;
        let records = found.records.into_iter();
        let repls =
            records.filter_map(|(name, record)| Some((name.parse().ok()?, Repl::new(record))));
        let unreadable = found.unreadable.into_iter();
        let unreadable = unreadable.filter_map(|(name, file)| Some((name.parse().ok()?, file)));
        Ok(Self {
            inner: Arc::new(Inner {
                disk: Disk::new(&config.data, store.clone(), config.disk),
                writers: Mutex::default(),
                config,
                store,
                sandboxes,
                repls: Mutex::new(repls.collect()),
                deleted: Mutex::default(),
                unreadable: unreadable.collect(),
                installed: watch::Sender::default(),
                changing: Mutex::default(),
                tell,
                events: tokio::sync::Mutex::new(events),
                stopped: tokio_util::sync::CancellationToken::new(),
            }),
        })
    }

    /// Starts the current release of every repl that should be serving, one after the other.
    pub fn bring_back(&self) {
        let this = self.clone();
        tokio::spawn(async move {
            for repl in this.wanted() {
                let changing = this.changing(&repl);
                let _one = changing.lock().await;
                // A submission that was taken up again may have been faster.
                let has_program = this.with(&repl, |repl| repl.program.is_some());
                let Some(stored) = this.current(&repl).filter(|_| has_program != Some(true)) else {
                    continue;
                };
                match this.start(&repl, &stored, true).await {
                    Ok(program) => this.install(&repl, program),
                    Err(error) => {
                        tracing::error!(%repl, %error, "a release did not come back");
                        this.with(&repl, |repl| repl.lost = Some(format!("{error:#}")));
                        this.inner.installed.send_replace(());
                    }
                }
            }
        });
    }

    /// See [`Platform::ensure_release`](crate::platform::Platform::ensure_release).
    pub async fn ensure(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        let changing = self.changing(&spec.repl_id);
        let _one = changing.lock().await;
        // Before its name is taken.
        if let Some(problem) = self.overtaken(spec) {
            return Err(PlatformError::NotReady(problem));
        }
        if self.claim(&spec.repl_id, &spec.user_id).await? != spec.user_id {
            return Err(PlatformError::NotFound(format!(
                "the repl {}",
                spec.repl_id
            )));
        }
        let known = self.with(&spec.repl_id, |repl| {
            let known = repl.record.of(spec.submission_id)?.clone();
            Some((known, repl.program.is_some()))
        });
        if let Some((known, has_program)) = known.flatten() {
            // It serves, or a later one took over from it: it was released once, and that is enough.
            if has_program || known.release.state != ReleaseState::Current {
                return Ok(RunningRelease {
                    release: known.release.release,
                    url: self.url(&spec.repl_id),
                });
            }
            // An earlier server released it and was killed before it said so.
            return self.switch(&spec.repl_id, known, None).await;
        }
        let known = self.with(&spec.repl_id, |repl| {
            (repl.record.last_number(), repl.record.given.clone())
        });
        let (last, given) = known.unwrap_or_default();
        let number = last + 1;
        let stored = Stored {
            release: Release {
                release: number,
                submission_id: spec.submission_id,
                time: Timestamp::now(),
                state: ReleaseState::Current,
            },
            argv: spec.argv.clone(),
            env: spec.env.clone(),
            given,
            database: spec.database,
            serves: Some(spec.serves),
        };
        let order = Some(&spec.order);
        self.switch(&spec.repl_id, stored, order).await
    }

    /// See [`Platform::overtaken`](crate::platform::Platform::overtaken).
    pub fn overtaken(&self, spec: &ReleaseSpec) -> Option<Problem> {
        let known = self.with(&spec.repl_id, |repl| {
            match repl.record.of(spec.submission_id) {
                Some(_) => None,
                None => repl.record.order.supersedes(&spec.order),
            }
        });
        known.unwrap_or_else(|| {
            let before = self.before_deletion(&spec.repl_id, &spec.user_id);
            before.supersedes(&spec.order)
        })
    }

    /// What was asked last of the user's repl that had this name and was deleted.
    fn before_deletion(&self, repl: &ReplId, user: &UserId) -> LatestOrder {
        let deleted = self.deleted();
        let own = deleted
            .get(repl)
            .filter(|record| record.user_id == *user && is_known_after(record.since));
        own.map(|record| record.order.clone()).unwrap_or_default()
    }

    fn deleted(&self) -> std::sync::MutexGuard<'_, HashMap<ReplId, Record>> {
        self.inner
            .deleted
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`Platform::ordered`](crate::platform::Platform::ordered).
    pub async fn ordered(&self, repl: &ReplId, order: &Order) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        self.with(repl, |repl| repl.record.order.note(order));
        self.save(repl)
    }

    /// See [`Platform::rollback`](crate::platform::Platform::rollback).
    pub async fn rollback(
        &self,
        repl: &ReplId,
        release: Option<u64>,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let later = self.with(repl, |repl| repl.record.order.supersedes(order));
        if let Some(problem) = later.flatten() {
            return Err(PlatformError::NotReady(problem));
        }
        let target = self.with(repl, |repl| repl.record.earlier(release).cloned());
        let mut target = target.flatten().ok_or_else(|| {
            PlatformError::NotFound(match release {
                Some(number) => format!("release {number} of {repl} that served"),
                None => format!("an earlier release of {repl}"),
            })
        })?;
        target.given.domains = self.nameable(repl, target.given.domains);
        self.switch(repl, target, Some(order)).await
    }

    /// Stops the repl. Its releases, code and database stay.
    pub async fn stop(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let program = self.with(repl, |repl| {
            repl.record.stopped();
            repl.lost = None;
            repl.program.take()
        });
        let Some(program) = program else {
            return Ok(());
        };
        // Before it ends, which may take a while: a server that is killed meanwhile does not bring it back.
        let saved = self.save(repl);
        if let Some(program) = program {
            program.end(self.inner.config.drain, false).await;
        }
        saved
    }

    /// Ends every program; they come back with the next server.
    pub async fn stop_all(&self) {
        let repls = self.locked().drain().collect::<Vec<_>>();
        let programs = repls.iter().filter_map(|(_, repl)| repl.program.as_ref());
        let patience = self.inner.config.drain.min(WITH_THE_SERVER);
        let ended = programs.map(|program| program.end(patience, false));
        futures_util::future::join_all(ended).await;
        // Whoever waits in `next_event` holds the lock on the channel.
        self.inner.stopped.cancel();
    }

    /// Names of files that were set aside.
    pub fn set_aside(&self) -> Vec<String> {
        let repls = self.inner.unreadable.keys();
        repls.map(|repl| format!("repls/{repl}.json")).collect()
    }

    /// Whose it is; an error while that cannot be read.
    pub fn known_owner(&self, repl: &ReplId) -> Result<Option<UserId>, PlatformError> {
        self.check_readable(repl)?;
        Ok(self.owner(repl))
    }

    fn check_readable(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let Some(file) = self.inner.unreadable.get(repl) else {
            return Ok(());
        };
        Err(PlatformError::Unavailable(Problem::new(
            RECORD_UNREADABLE,
            format!("The record of the repl {repl} cannot be read"),
            "its file is damaged, so that it is not known whose it is; its files, releases and data are there",
            format!(
                "Put local/repls/{repl}.json back from a backup and start the server again. To give the name up, remove local/databases/{repl}, store/code/{repl}, store/releases/{repl} and then local/repls/{}.",
                file.file_name().unwrap_or_default().to_string_lossy()
            ),
        )))
    }

    /// Whose it is.
    pub fn owner(&self, repl: &ReplId) -> Option<UserId> {
        self.with(repl, |repl| repl.record.user_id.clone())
    }

    /// Takes the name for the user unless it is taken; says whose it is now.
    pub async fn claim(&self, repl: &ReplId, user: &UserId) -> Result<UserId, PlatformError> {
        self.check_readable(repl)?;
        let owner = {
            let mut repls = self.locked();
            if let Some(known) = repls.get(repl) {
                return Ok(known.record.user_id.clone());
            }
            let mut record = Record::new(user.clone());
            record.order = self.before_deletion(repl, user);
            repls.insert(repl.clone(), Repl::new(record));
            user.clone()
        };
        if let Err(error) = self.save(repl) {
            // What is not stored would be gone after a restart, and count until then.
            self.locked().remove(repl);
            return Err(error);
        }
        Ok(owner)
    }

    /// How many names are the user's.
    pub fn names(&self, user: &UserId) -> usize {
        let repls = self.locked();
        let own = repls.values().filter(|repl| repl.record.user_id == *user);
        own.count()
    }

    /// Forgets the repl, with its database: one that was `used`, too.
    pub async fn forget(&self, repl: &ReplId, used: bool) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let program = {
            let mut repls = self.locked();
            match repls.get(repl) {
                Some(known) if used || !known.record.is_used() => {}
                _ => return Ok(()),
            }
            let removed = repls.remove(repl);
            if let Some(Repl { record, .. }) = &removed {
                let mut deleted = self.deleted();
                deleted.retain(|_, record| is_known_after(record.since));
                if !record.order.is_none() {
                    forget_oldest_of(&mut deleted, &record.user_id);
                    let mut last = Record::new(record.user_id.clone());
                    last.order.clone_from(&record.order);
                    deleted.insert(repl.clone(), last);
                }
            }
            removed.and_then(|known| known.program)
        };
        if let Some(program) = program {
            program.end(self.inner.config.drain, false).await;
        }
        let (this, name) = (self.clone(), repl.clone());
        let removed = tokio::task::spawn_blocking(move || this.remove(&name)).await;
        let removed = removed.unwrap_or_else(|error| Err(error.into()));
        removed.map_err(|error| {
            unavailable(
                "What the repl kept could not be removed",
                &error,
                "Look at the data folder's local/repls and local/databases, then try again.",
            )
        })
    }

    /// The database first: without its record nobody would look for it.
    fn remove(&self, repl: &ReplId) -> anyhow::Result<()> {
        let data = &self.inner.config.data;
        self.inner.disk.delete(repl)?;
        let records = Folder::open(&data.join("repls"))?;
        Ok(stored::remove(&records, repl.as_str())?)
    }

    /// Every repl that has or had a release, or was started.
    pub fn statuses(&self) -> Vec<ReplStatus> {
        let repls = self.locked();
        let mut statuses: Vec<ReplStatus> = repls
            .iter()
            .filter(|(_, repl)| repl.record.is_used())
            .map(|(id, repl)| self.status(id, repl))
            .collect();
        statuses.sort_by(|a, b| a.repl_id.cmp(&b.repl_id));
        statuses
    }

    /// Every release of the repl, newest first.
    pub fn of(&self, repl: &ReplId) -> Result<Vec<Release>, PlatformError> {
        self.with(repl, |repl| {
            repl.record
                .releases
                .iter()
                .rev()
                .map(|s| s.release.clone())
                .collect()
        })
        .ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))
    }

    /// A connection to the repl's program.
    pub async fn dial(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.dial_port(repl, AppPort::Program).await
    }

    /// The repl's program; one that is being started is waited for.
    async fn program(&self, repl: &ReplId) -> Result<Arc<Program>, PlatformError> {
        let mut installed = self.inner.installed.subscribe();
        let found = async {
            loop {
                let known = self.with(repl, |repl| {
                    (repl.program.clone(), repl.record.runs(), repl.lost.clone())
                });
                match known {
                    Some((Some(program), ..)) => return Ok(program),
                    Some((None, true, None)) => drop(installed.changed().await),
                    Some((None, true, Some(why))) => return Err(did_not_come_back(why)),
                    Some((None, false, _)) | None => {
                        let what = format!("a running release of {repl}");
                        return Err(PlatformError::NotFound(what));
                    }
                }
            }
        };
        let late = |_| {
            PlatformError::Unavailable(Problem::new(
                "starting",
                "The repl is being started",
                format!("it is not up after {} s", COMING_BACK.as_secs()),
                "Try again in a moment; the server's log says more.",
            ))
        };
        timeout(COMING_BACK, found).await.map_err(late)?
    }

    async fn dial_port(
        &self,
        repl: &ReplId,
        port: AppPort,
    ) -> Result<Box<dyn ByteStream>, PlatformError> {
        match self.program(repl).await?.dial(port).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(unavailable(
                "The program cannot be reached",
                &error.into(),
                "Look at its log; deploy it again if its sandbox ended.",
            )),
        }
    }

    /// See [`Platform::next_program_event`](crate::platform::Platform::next_program_event).
    pub async fn next_event(&self) -> Option<ProgramEvent> {
        let next = async { self.inner.events.lock().await.recv().await };
        tokio::select! {
            event = next => event,
            () = self.inner.stopped.cancelled() => None,
        }
    }

    /// Starts a release and, when it serves, lets it take over from the previous one.
    async fn switch(
        &self,
        repl: &ReplId,
        stored: Stored,
        order: Option<&Order>,
    ) -> Result<RunningRelease, PlatformError> {
        let number = stored.release.release;
        let program = match self.start(repl, &stored, false).await {
            Ok(program) => program,
            Err(error) => {
                self.note_failure(repl, stored).await?;
                let cause = format!("{error:#}");
                let message = "The release could not be started";
                if error.is::<TooMuch>() {
                    let remediation = format!("Delete them: DELETE /repls/{repl}/data.");
                    let problem = Problem::new("disk_quota", message, cause, remediation);
                    return Err(PlatformError::NotReady(problem));
                }
                let remediation = "Look at the server's log; the previous release serves on.";
                let problem = Problem::new("deploy_failed", message, cause, remediation);
                return Err(PlatformError::Unavailable(problem));
            }
        };
        if let Err(mut problem) = wait_until_ready(&program).await {
            if let Some(why) = self.why_stopped(program.name()) {
                problem.cause = why;
            }
            program.stop().await;
            self.note_failure(repl, stored).await?;
            return Err(PlatformError::NotReady(problem));
        }
        self.with(repl, |repl| {
            repl.record.serves(stored);
            if let Some(order) = order {
                repl.record.order.note(order);
            }
        });
        self.remember(repl).await?;
        self.install(repl, program);
        Ok(RunningRelease {
            release: number,
            url: self.url(repl),
        })
    }

    async fn note_failure(&self, repl: &ReplId, stored: Stored) -> Result<(), PlatformError> {
        self.with(repl, |repl| repl.record.failed(stored));
        self.remember(repl).await
    }

    /// Stores the repl's record, and removes the files of releases that are no longer in it.
    async fn remember(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let forgotten = self.with(repl, |repl| repl.record.forget_old());
        self.save(repl)?;
        for submission in forgotten.unwrap_or_default() {
            if let Err(error) = self.inner.store.forget(repl, submission).await {
                tracing::warn!(%repl, %submission, %error, "the files of an old release stay behind");
            }
        }
        Ok(())
    }

    /// Makes it the one that callers reach; the previous one finishes what it is answering.
    fn install(&self, repl: &ReplId, program: Program) {
        self.install_again(repl, program, 0);
    }

    /// The same of one that was started again as often, soon after a start.
    fn install_again(&self, repl: &ReplId, program: Program, early: u32) {
        let program = Arc::new(program);
        let replaced = self.with(repl, |repl| {
            repl.lost = None;
            repl.program.replace(Arc::clone(&program))
        });
        self.inner.installed.send_replace(());
        self.keep_up(repl, &program, early);
        if let Some(Some(replaced)) = replaced {
            let drain = self.inner.config.drain;
            let (this, repl) = (self.clone(), repl.clone());
            tokio::spawn(async move {
                replaced.end(drain, true).await;
                let handed = tokio::task::spawn_blocking(move || this.inner.disk.hand_over(&repl));
                let handed = handed.await.map_err(io::Error::other).flatten();
                if let Err(error) = handed {
                    tracing::warn!(%error, "not all that a release left is open to the next");
                }
            });
        }
    }

    /// `served`: it has served before, and is not judged anew.
    async fn start(&self, repl: &ReplId, stored: &Stored, served: bool) -> anyhow::Result<Program> {
        let inner = &self.inner;
        let user_id = self
            .owner(repl)
            .ok_or_else(|| anyhow::anyhow!("the repl {repl} is gone"))?;
        let name = format!("repl-{repl}-{}-{}", stored.release.release, nonce());
        let release = if stored.is_workspace() {
            inner.store.current(repl)
        } else {
            inner.store.release(repl, stored.release.submission_id)
        };
        anyhow::ensure!(
            release.is_dir(),
            "there are no files of the repl: {} is not there",
            release.display()
        );
        let mut placed = vec![Placed {
            from: release,
            name: "release".to_owned(),
            writable: false,
        }];
        let mut env = stored.variables();
        if stored.database {
            let (this, named) = (self.clone(), repl.clone());
            let ready = tokio::task::spawn_blocking(move || this.inner.disk.ready(&named));
            let from = ready.await??;
            placed.push(Placed {
                from,
                name: DATA.to_owned(),
                writable: true,
            });
        }
        let memory_bytes = inner.config.maximum.memory_bytes;
        let (release, data) = if inner.sandboxes.host().isolation == Isolation::None {
            let folder = |index: usize| placed.get(index).map(|placed| placed.from.clone());
            (folder(0).unwrap_or_default(), folder(1))
        } else {
            let data = stored.database.then(|| PathBuf::from("/").join(DATA));
            (PathBuf::from("/release"), data)
        };
        if let Some(data) = &data {
            let url = format!("sqlite:///{}/db.sqlite3", data.display());
            env.entry("DATABASE_URL".to_owned()).or_insert(url);
        }
        let key = TicketKey::new(random()?);
        let identity = Identity {
            repl: repl.clone(),
            key: key.text(),
        };
        let (argv, stays) = (stored.argv.clone(), stored.is_workspace());
        let serves = stored.serves;
        let tenant = Tenant {
            name: name.clone(),
            user: Some(user_id.clone()),
            placed,
            slots: 1,
            network: false,
            memory: memory_bytes,
        };
        let sandbox = inner
            .sandboxes
            .make(tenant, |sandbox| {
                let program = ProgramConfig {
                    argv,
                    stays,
                    serves,
                    served,
                    env: env.into_iter().collect(),
                    memory_bytes: Some(memory_bytes),
                    processes: Some(Limits::MAXIMUM.processes),
                    sandbox,
                };
                Role::App(AppConfig {
                    program,
                    release,
                    data,
                    identity,
                })
            })
            .await?;
        let owner = Owner {
            user_id,
            repl_id: repl.clone(),
            key,
        };
        let sandboxes = Arc::clone(&inner.sandboxes);
        let tell = inner.tell.clone();
        let user = owner.user_id.clone();
        let release = stored.release.release;
        let program = Program::watch(name, sandbox, sandboxes, owner, release, tell).await?;
        if stored.database {
            self.writes(repl, &user, &program);
        }
        Ok(program)
    }

    fn current(&self, repl: &ReplId) -> Option<Stored> {
        self.with(repl, |repl| repl.record.current().cloned())?
    }

    fn wanted(&self) -> Vec<ReplId> {
        let repls = self.locked();
        let wanted = repls.iter().filter(|(_, repl)| repl.record.runs());
        wanted.map(|(id, _)| id.clone()).collect()
    }

    fn status(&self, id: &ReplId, repl: &Repl) -> ReplStatus {
        let standing = repl.program.as_ref().map(|p| p.standing().borrow().clone());
        let (state, since) = match &standing {
            Some(standing) => (standing.state, standing.since),
            None if repl.record.idle.is_some() => (ReplState::Idle, repl.record.since),
            None if repl.record.wanted => (ReplState::Starting, repl.record.since),
            None => (ReplState::Stopped, repl.record.since),
        };
        let wanted = u32::from(repl.record.runs());
        let current = repl.record.current();
        let number = match &repl.program {
            Some(program) => Some(program.release),
            None => current.map(|stored| stored.release.release),
        };
        ReplStatus {
            repl_id: id.clone(),
            user_id: repl.record.user_id.clone(),
            state,
            ready: u32::from(is_ready(state, repl.record.current())),
            replicas: wanted,
            autoscale: None,
            restarts: standing.as_ref().map_or(0, |s| s.restarts),
            url: self.url(id),
            domains: repl.record.given.domains.clone(),
            release: number.filter(|number| *number > 0),
            cause: repl.record.idle.map(idle_cause),
            last_error: match standing {
                Some(standing) => standing.last_error,
                None => repl.lost.clone(),
            },
            since,
        }
    }

    fn url(&self, repl: &ReplId) -> String {
        self.inner.config.sites.program(repl)
    }

    /// Stores the repl's record: whole or not at all, and on the disk when this returns.
    fn save(&self, repl: &ReplId) -> Result<(), PlatformError> {
        match self.with(repl, |repl| repl.record.clone()) {
            Some(record) => self.store(repl, &record),
            None => Ok(()),
        }
    }

    /// The same of a record that is to be the repl's.
    fn store(&self, repl: &ReplId, record: &Record) -> Result<(), PlatformError> {
        let folder = self.inner.config.data.join("repls");
        let write = || -> anyhow::Result<()> {
            let staged = folder.join(format!("{repl}.new"));
            // Its environment may hold secrets.
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&staged)?;
            file.write_all(&kept::seal(record)?)?;
            file.sync_data()?;
            fs::rename(&staged, folder.join(format!("{repl}.json")))?;
            File::open(&folder)?.sync_all()?;
            Ok(())
        };
        waiting(write).map_err(|error| {
            unavailable(
                "The repl's record could not be stored",
                &error,
                "Check that the data folder is writable and has room.",
            )
        })
    }

    fn with<T>(&self, repl: &ReplId, act: impl FnOnce(&mut Repl) -> T) -> Option<T> {
        self.locked().get_mut(repl).map(act)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, HashMap<ReplId, Repl>> {
        self.inner
            .repls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn changing(&self, repl: &ReplId) -> Arc<tokio::sync::Mutex<()>> {
        let mut changing = self
            .inner
            .changing
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Arc::clone(changing.entry(repl.clone()).or_default())
    }
}

/// Makes room for another deleted repl of this user.
fn forget_oldest_of(deleted: &mut HashMap<ReplId, Record>, user: &UserId) {
    let own = deleted.iter().filter(|(_, record)| record.user_id == *user);
    let mut own: Vec<_> = own
        .map(|(repl, record)| (record.since, repl.clone()))
        .collect();
    own.sort_unstable();
    let excess = (own.len() + 1).saturating_sub(MAX_KNOWN_DELETED);
    for (_, repl) in own.into_iter().take(excess) {
        deleted.remove(&repl);
    }
}

/// A program that ended with exit code 0 is as good as one that serves, and a workspace is there for its
/// user whatever its program does.
fn is_ready(state: ReplState, current: Option<&Stored>) -> bool {
    match state {
        ReplState::Running | ReplState::Exited(0) => true,
        ReplState::Exited(_) => current.is_some_and(Stored::is_workspace),
        ReplState::Starting | ReplState::Crashed | ReplState::Stopped | ReplState::Idle => false,
    }
}

fn random() -> anyhow::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes)
        .map_err(|error| anyhow::anyhow!("the system gives no random numbers: {error}"))?;
    Ok(bytes)
}

/// Tells apart two starts of the same release, whose sandboxes may overlap, also across servers:
/// the microsecond of the start.
fn nonce() -> String {
    format!("{:x}", Timestamp::now().as_microsecond())
}

fn did_not_come_back(why: String) -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "start_failed",
        "The repl did not come back with the server",
        why,
        "Start or deploy it again; the server's log says more.",
    ))
}

async fn wait_until_ready(program: &Program) -> Result<(), Problem> {
    let mut standing = program.standing();
    let settled = standing.wait_for(|standing| standing.ready || standing.over);
    let cause = match timeout(DEPLOY_PATIENCE, settled).await {
        Ok(Ok(standing)) if standing.ready => return Ok(()),
        Ok(Ok(standing)) => standing
            .last_error
            .clone()
            .unwrap_or_else(|| "the program ended".to_owned()),
        Ok(Err(_)) => "its sandbox ended".to_owned(),
        Err(_) => format!("it was not ready within {} s", DEPLOY_PATIENCE.as_secs()),
    };
    let lines = program.last_lines();
    let cause = if lines.is_empty() {
        cause
    } else {
        format!("{cause}{LAST_LINES}{lines}")
    };
    Err(Problem::new(
        "deploy_failed",
        "The release did not come up",
        cause,
        LISTEN_OR_END,
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn of_a_users_deleted_repls_the_last_are_known_and_all_of_others() {
        let record = |user: &str, second: usize| {
            let mut record = Record::new(user.parse().unwrap());
            record.since = Timestamp::from_second(second as i64).unwrap();
            record
        };
        let ann: UserId = "ann".parse().unwrap();
        let repl = |name: String| name.parse::<ReplId>().unwrap();
        let mut deleted = HashMap::from([(repl("others".to_owned()), record("bob", 0))]);
        for number in 0..MAX_KNOWN_DELETED + 50 {
            forget_oldest_of(&mut deleted, &ann);
            deleted.insert(repl(format!("r{number}")), record("ann", number));
        }
        assert_eq!(deleted.len(), MAX_KNOWN_DELETED + 1);
        assert!(deleted.contains_key(&repl("others".to_owned())));
        assert!(!deleted.contains_key(&repl("r49".to_owned())));
        assert!(deleted.contains_key(&repl("r50".to_owned())));
    }
}
