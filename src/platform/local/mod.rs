//! The local platform: sandboxed processes on one Linux machine, no cluster, no services.

mod cgroup;
mod disk;
mod hidden;
mod host;
mod launch;
mod modules;
mod program;
mod record;
mod releases;
mod sandboxes;
mod stored;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{
    ByteStream, CONNECT_TIMEOUT, Check, ConfigureError, Modules, Opened, Platform, PlatformError,
    ProgramEvent, ReleaseSpec, RunningRelease, WorkspaceSpec,
};
use crate::model::{
    DiskBounds, Language, Limits, Order, Packages, Problem, Release, ReplChange, ReplData, ReplId,
    ReplSettings, ReplStatus, Sites, TicketKey, UserId,
};
use crate::storage::DirectoryStore;
use host::{Host, Lacking};
pub use launch::prefer_server;
use modules::LocalModules;
use releases::Releases;
use sandboxes::Sandboxes;

/// How the local platform is set up.
#[derive(Debug, Clone)]
pub struct LocalConfig {
    /// Its folder.
    pub data: PathBuf,
    /// The `gantry-runner` program.
    pub runner: PathBuf,
    /// Runs of one user at one time.
    pub runs_per_user: usize,
    /// The most a run may ask for.
    pub maximum: Limits,
    /// Whether test runs may use the machine's network.
    pub network: bool,
    /// Where modules' packages may be installed from.
    pub packages: Packages,
    /// Whether the kernel logs the system calls that user code is refused.
    pub log_refused: bool,
    /// How long a release that is replaced may take to answer what it was asked, and any to end after SIGTERM.
    pub drain: Duration,
    /// Where releases and repls' terminals are.
    pub sites: Sites,
    /// How much of the machine's disk is whose.
    pub disk: DiskBounds,
}

/// The local platform.
#[derive(Debug)]
pub struct LocalPlatform {
    sandboxes: Arc<Sandboxes>,
    releases: Releases,
    modules: Arc<LocalModules>,
}

/// Most time that programs get to end with the server, which waits three seconds for its platform: whoever stops
/// it, such as a container engine, kills it soon.
const WITH_THE_SERVER: Duration = Duration::from_secs(2);

/// Program output that may wait for the journal: when it cannot keep up, programs are slowed.
const MAX_WAITING_EVENTS: usize = 1_024;

impl LocalPlatform {
    /// Looks at the machine, finds what an earlier server left, brings its releases back.
    pub async fn start(
        config: LocalConfig,
        store: DirectoryStore,
    ) -> anyhow::Result<LocalPlatform> {
        let (runner, trial) = (config.runner.clone(), config.data.join("trial"));
        let host = tokio::task::spawn_blocking(move || Host::probe(&runner, &trial)).await?;
        let sandboxes = Arc::new(Sandboxes::new(config.clone(), host)?);
        // Asked now so that the first submission does not wait for the answer.
        let asked = Arc::clone(&sandboxes);
        tokio::spawn(async move { asked.interpreters().await });
        let (tell, events) = mpsc::channel(MAX_WAITING_EVENTS);
        let modules = LocalModules::open(config.clone(), Arc::clone(&sandboxes))?;
        let releases = Releases::open(config, store, Arc::clone(&sandboxes), tell, events)?;
        releases.bring_back();
        releases.watch_disk();
        modules.bring_back();
        Ok(LocalPlatform {
            sandboxes,
            releases,
            modules,
        })
    }
}

/// A problem on Gantry's side that another try may get over.
fn unavailable(message: &str, cause: &anyhow::Error, remediation: &str) -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        "platform_unavailable",
        message,
        format!("{cause:#}"),
        remediation,
    ))
}

#[async_trait]
impl Platform for LocalPlatform {
    fn name(&self) -> &'static str {
        "local"
    }

    fn checks(&self) -> Vec<Check> {
        self.sandboxes.host().checks.clone()
    }

    fn set_aside(&self) -> Vec<String> {
        let mut files = self.releases.set_aside();
        files.extend(self.modules.set_aside());
        files
    }

    async fn lacks(&self, language: &'static Language) -> Option<Problem> {
        let interpreters = self.sandboxes.interpreters().await;
        let (cause, remediation) = match interpreters.missing.get(language.name)? {
            Lacking::Tool(tool) => (
                format!("{} is not installed where the server runs", tool.command),
                format!(
                    "Install it there ({}) and start the server again.",
                    tool.install
                ),
            ),
            Lacking::Closed(tool, folder) => (
                format!(
                    "{} is in {}, which cannot be shown to user code because it holds more than programs",
                    tool.command,
                    folder.display()
                ),
                "Install it elsewhere, such as in /opt, and start the server again.".to_owned(),
            ),
        };
        Some(Problem::new(
            "language_unavailable",
            format!("{} programs cannot run here", language.name),
            cause,
            remediation,
        ))
    }

    async fn connect(&self, user: &UserId) -> Result<Box<dyn ByteStream>, PlatformError> {
        let made = timeout(CONNECT_TIMEOUT, self.sandboxes.connect(user)).await;
        let result = made
            .unwrap_or_else(|_| Err(anyhow::anyhow!("it took longer than {CONNECT_TIMEOUT:?}")));
        match result {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(unavailable(
                &format!("The sandbox could not be made: {error:#}"),
                &error,
                "Look at runner.log in the data folder's sandboxes/ and at what the server said at its start.",
            )),
        }
    }

    async fn drop_sandbox(&self, user: &UserId) -> Result<(), PlatformError> {
        self.sandboxes.drop_user(user).await;
        Ok(())
    }

    async fn overtaken(&self, spec: &ReleaseSpec) -> Result<Option<Problem>, PlatformError> {
        Ok(self.releases.overtaken(spec))
    }

    async fn ordered(&self, repl: &ReplId, order: &Order) -> Result<(), PlatformError> {
        self.releases.ordered(repl, order).await
    }

    async fn ensure_release(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        self.releases.ensure(spec).await
    }

    async fn rollback(
        &self,
        repl: &ReplId,
        release: Option<u64>,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError> {
        self.releases.rollback(repl, release, order).await
    }

    async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError> {
        self.releases.open_workspace(spec).await
    }

    async fn stop_idle(
        &self,
        repl: &ReplId,
        unused_since: Timestamp,
        looked: Timestamp,
    ) -> Result<bool, PlatformError> {
        self.releases.stop_idle(repl, unused_since, looked).await
    }

    fn is_idle(&self, repl: &ReplId) -> bool {
        self.releases.is_idle(repl)
    }

    async fn wake(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        self.releases.wake(repl).await
    }

    async fn drop_repl(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.stop(repl).await
    }

    async fn admit(&self, user: &UserId, repl: &ReplId, bytes: u64) -> Result<(), Problem> {
        self.releases.admit(user, repl, bytes).await
    }

    async fn data(&self, repl: &ReplId) -> Result<ReplData, PlatformError> {
        self.releases.data(repl).await
    }

    async fn delete_data(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.delete_data(repl).await
    }

    async fn owner(&self, repl: &ReplId) -> Result<Option<UserId>, PlatformError> {
        self.releases.known_owner(repl)
    }

    async fn claim(&self, repl: &ReplId, user: &UserId) -> Result<UserId, PlatformError> {
        self.releases.claim(repl, user).await
    }

    async fn names(&self, user: &UserId) -> Result<usize, PlatformError> {
        Ok(self.releases.names(user))
    }

    async fn forget(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.forget(repl, true).await
    }

    async fn forget_unused(&self, repl: &ReplId) -> Result<(), PlatformError> {
        self.releases.forget(repl, false).await
    }

    async fn settings(&self, repl: &ReplId) -> Result<ReplSettings, PlatformError> {
        self.releases.settings(repl)
    }

    async fn configure(
        &self,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError> {
        self.releases.configure(repl, change).await
    }

    fn repl_of(&self, host: &str) -> Option<ReplId> {
        self.releases.repl_of(host)
    }

    async fn repls(&self) -> Result<Vec<ReplStatus>, PlatformError> {
        Ok(self.releases.statuses())
    }

    async fn releases(&self, repl: &ReplId) -> Result<Vec<Release>, PlatformError> {
        self.releases.of(repl)
    }

    async fn dial(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.releases.dial(repl).await
    }

    async fn dial_runner(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.releases.dial_runner(repl).await
    }

    async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError> {
        self.releases.ticket_key(repl).await
    }

    fn modules(&self) -> Arc<dyn Modules> {
        Arc::clone(&self.modules) as Arc<dyn Modules>
    }

    async fn next_program_event(&self) -> Option<ProgramEvent> {
        self.releases.next_event().await
    }

    async fn shutdown(&self) {
        tokio::join!(self.modules.stop_all(), self.releases.stop_all());
        self.sandboxes.drop_all().await;
    }
}

/// Longest wait for a new release to serve. Its runner gives a program that has to listen 50 s, so this is only
/// met by one that is slow to start *and* to end.
const DEPLOY_PATIENCE: Duration = Duration::from_secs(60);
