//! The seam between what Gantry decides and where it happens: whatever owns sandboxes and releases.
//!
//! It is the smallest thing that differs between a cluster and one machine: "a byte stream to this
//! user's runner", "make this release serve", "drop it", "list", "dial". Everything above speaks
//! the same frames to the same runner on both.

pub mod conformance;
pub mod kubernetes;
pub mod local;
mod modules;
mod services;
mod sessions;
pub mod tunnel;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use jiff::Timestamp;

use crate::model::{
    Event, FieldError, Language, Order, Origin, Problem, Release, ReplChange, ReplData, ReplId,
    ReplSettings, ReplStatus, Serves, SubmissionId, Tested, TicketKey, UserId,
};

pub use crate::runner::client::ByteStream;
pub use modules::{Modules, ModulesError};
pub use services::{Services, ServicesError};
pub use sessions::Sessions;

/// Why a platform could not do what it was asked. Always Gantry's side or the operator's, never the
/// user's program: a program that fails is data, not an error.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PlatformError {
    /// What was asked for is not there.
    #[error("{0} does not exist")]
    NotFound(String),
    /// It cannot be had now; trying later may help.
    #[error("{}", .0.message)]
    Unavailable(Problem),
    /// The release, or the sandbox, does not come up, and will not by waiting; a previous release
    /// still serves.
    #[error("{}", .0.message)]
    NotReady(Problem),
}

/// Why a repl runs with what it ran with before.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConfigureError {
    /// The change is wrong.
    #[error("{0}")]
    Refused(#[from] FieldError),
    /// It could not be made.
    #[error("{0}")]
    Failed(#[from] PlatformError),
}

/// One thing looked at when the platform starts.
#[derive(Debug, Clone)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What was found.
    pub finding: Finding,
    /// What it means for the operator, in words.
    pub detail: String,
}

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// As it should be.
    Good,
    /// Works, with less protection or speed; `--require-sandbox` refuses to start.
    Weaker,
    /// Cannot work.
    Missing,
}

/// What a release is made of. The files are already in the code store, immutable.
#[derive(Debug, Clone)]
pub struct ReleaseSpec {
    /// Whose.
    pub user_id: UserId,
    /// Which repl.
    pub repl_id: ReplId,
    /// The submission whose tests passed.
    pub submission_id: SubmissionId,
    /// When it was sent.
    pub order: Order,
    /// What those tests were about.
    pub tested: Tested,
    /// Command, entrypoint and arguments.
    pub argv: Vec<String>,
    /// The program's own variables.
    pub env: BTreeMap<String, String>,
    /// Give it a database.
    pub database: bool,
    /// Whether it has to listen before it serves.
    pub serves: Serves,
}

/// A release that serves.
#[derive(Debug, Clone)]
pub struct RunningRelease {
    /// Its number within the repl.
    pub release: u64,
    /// Where it is served.
    pub url: String,
}

/// What a repl's workspace is: its current files, whoever put them into the code store, and the
/// command that starts them. They were not tested; their user is there to look at them.
#[derive(Debug, Clone)]
pub struct WorkspaceSpec {
    /// Whose.
    pub user_id: UserId,
    /// Which repl.
    pub repl_id: ReplId,
    /// When its start was asked for.
    pub order: Order,
    /// Command, entrypoint and arguments.
    pub argv: Vec<String>,
}

/// A repl that runs.
#[derive(Debug, Clone)]
pub struct Opened {
    /// Whether this call made it run.
    pub created: bool,
    /// Where its program is served.
    pub url: String,
    /// Where its terminal is.
    pub terminal_url: String,
}

/// Something a released program did, or that happened to it.
#[derive(Debug, Clone)]
pub struct ProgramEvent {
    /// Whose.
    pub user_id: UserId,
    /// Which repl.
    pub repl_id: ReplId,
    /// What, ready for the journal.
    pub event: Event,
}

/// What the journal has of released programs already.
#[derive(Debug, Clone, Default)]
pub struct Recorded {
    /// The last piece of output of each container.
    pub output: HashMap<String, Origin>,
    /// Everything else that happened.
    pub events: HashSet<Origin>,
}

/// A backend that owns sandboxes and releases.
///
/// # Contract
///
/// `platform::conformance` holds every backend to it.
///
/// - **One sandbox per user**, made on the first `connect`, kept, reused, made anew when dead. Two
///   users' sandboxes cannot see each other.
/// - `connect` **returns a stream to a living runner or an error**; it never waits longer than
///   [`CONNECT_TIMEOUT`]. Closing the stream stops nothing in the sandbox.
/// - `ensure_release` **returns when the release serves**, and only then does the previous one
///   stop. When it fails, the previous one serves on, and the error says why, with the program's
///   last lines. Again with the same submission: the same release, not a second one. What was asked of the
///   repl later stands: then nothing is made, and the error is [`SUPERSEDED`](crate::model::SUPERSEDED).
/// - `open_workspace` **returns when everything is made**, which is before the program serves. Again, or
///   with a release running: nothing changes. A program that ends leaves its workspace there. A later
///   release takes its place.
/// - `configure` **returns when what runs has changed**, or everything is as before and the error says why.
///   A repl that does not run has it at its next start. Variables are a release's: a later release begins
///   with those of the one before, and a rollback brings back those it had. So are domains, as long as no
///   other repl has taken them: **two repls never have one host name**.
/// - `stop_idle` **removes what serves the repl and keeps that it is to serve**: `wake` brings back the same
///   release or workspace. What was started after that was looked at stays.
/// - `drop_repl` and `drop_sandbox` **remove all that was made**; absent is `Ok`.
/// - State is the backend's own: after a restart of the server `repls` and `releases` answer as before.
/// - Nothing here writes logs about a user's program; program output is returned as a stream.
#[async_trait]
pub trait Platform: Send + Sync + fmt::Debug {
    /// `local` or `kubernetes`.
    fn name(&self) -> &'static str;

    /// What the platform found on its machine or cluster when it started.
    fn checks(&self) -> Vec<Check>;

    /// Files of its own that cannot be read, by name, and were set aside. What they were about is kept for whoever
    /// has it.
    fn set_aside(&self) -> Vec<String> {
        Vec::new()
    }

    /// Why programs of this language cannot run here, if it is known that they cannot. Looked at once,
    /// when the platform starts; where an image brings the languages, it has them.
    async fn lacks(&self, _language: &'static Language) -> Option<Problem> {
        None
    }

    /// A stream to the user's runner, its sandbox made first if it is not there.
    async fn connect(&self, user: &UserId) -> Result<Box<dyn ByteStream>, PlatformError>;

    /// Notes that the user's sandbox is in use. A backend that never removes an unused one has nothing
    /// to note.
    fn used(&self, _user: &UserId) {}

    /// Removes the user's sandbox and everything running in it.
    async fn drop_sandbox(&self, user: &UserId) -> Result<(), PlatformError>;

    /// Why the release is not to be made: something that was asked of its repl later stands. `None` also for
    /// one that was made already.
    async fn overtaken(&self, spec: &ReleaseSpec) -> Result<Option<Problem>, PlatformError>;

    /// Notes that this was asked of the repl: no release is made any more that was asked for before. Nothing
    /// is noted of a repl that is not there.
    async fn ordered(&self, repl: &ReplId, order: &Order) -> Result<(), PlatformError>;

    /// Makes the release serve.
    async fn ensure_release(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError>;

    /// Makes an earlier release of the repl serve again: `release`, or the last one before the
    /// current that served. Noted together with the order, so that no release that was asked for before
    /// takes its place; one that was asked for later stands, as with `ensure_release`.
    async fn rollback(
        &self,
        repl: &ReplId,
        release: Option<u64>,
        order: &Order,
    ) -> Result<RunningRelease, PlatformError>;

    /// Makes the repl's current files run, unless something of the repl's runs already. What it makes run is
    /// noted together with the order; what merely wakes an idle one is not.
    async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError>;

    /// Stops the repl until it is woken, unless something else was made to run since `looked`; whether this
    /// call did. `unused_since` is remembered as the cause.
    async fn stop_idle(
        &self,
        repl: &ReplId,
        unused_since: Timestamp,
        looked: Timestamp,
    ) -> Result<bool, PlatformError>;

    /// Whether the repl waits to be woken.
    fn is_idle(&self, repl: &ReplId) -> bool;

    /// Makes an idle repl run again, as it was; returns when everything is made: whether by this call. Nothing
    /// happens to one that is not idle.
    async fn wake(&self, repl: &ReplId) -> Result<bool, PlatformError>;

    /// Finishes what a server left that died while it stopped or woke an idle repl.
    async fn settle_idle(&self) {}

    /// Stops the repl and removes everything that served it. Its code and database stay.
    async fn drop_repl(&self, repl: &ReplId) -> Result<(), PlatformError>;

    /// Whether there is room for so many bytes more of the user's code in the code store, for this repl.
    /// Where the store has no disk of the machine's, it is the store's to refuse.
    async fn admit(&self, _user: &UserId, _repl: &ReplId, _bytes: u64) -> Result<(), Problem> {
        Ok(())
    }

    /// What the repl keeps beside its code.
    async fn data(&self, repl: &ReplId) -> Result<ReplData, PlatformError>;

    /// Deletes what the repl keeps beside its code, for good; nothing there is `Ok`. Nothing of the repl may
    /// run; its code and releases stay.
    async fn delete_data(&self, repl: &ReplId) -> Result<(), PlatformError>;

    /// Who owns the repl, if it exists.
    async fn owner(&self, repl: &ReplId) -> Result<Option<UserId>, PlatformError>;

    /// Claims the repl's name for the user: `Ok` with the owner, who may be another.
    async fn claim(&self, repl: &ReplId, user: &UserId) -> Result<UserId, PlatformError>;

    /// How many names the user has.
    async fn names(&self, user: &UserId) -> Result<usize, PlatformError>;

    /// Forgets the repl of this name and removes what it keeps here beside its program, which was dropped
    /// before: anybody can have the name then. Absent is fine. What was asked of it last is known for as long as
    /// a submission may be under way that its owner sent before: it does not bring the repl back.
    async fn forget(&self, repl: &ReplId) -> Result<(), PlatformError>;

    /// The same for a name that nothing was ever deployed or started under; any other stays.
    async fn forget_unused(&self, repl: &ReplId) -> Result<(), PlatformError>;

    /// The most replicas that a repl can have here.
    fn most_replicas(&self) -> u32 {
        1
    }

    /// What the repl runs with.
    async fn settings(&self, repl: &ReplId) -> Result<ReplSettings, PlatformError>;

    /// Changes what the repl runs with.
    async fn configure(
        &self,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError>;

    /// The repl that has this host name for its own.
    fn repl_of(&self, host: &str) -> Option<ReplId>;

    /// Every repl, with its state and cause.
    async fn repls(&self) -> Result<Vec<ReplStatus>, PlatformError>;

    /// Every release of the repl, newest first.
    async fn releases(&self, repl: &ReplId) -> Result<Vec<Release>, PlatformError>;

    /// A connection to the repl's program port, for the server's own reverse proxy.
    async fn dial(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError>;

    /// A connection to the port of the repl's runner: terminals and files, for whoever has a ticket.
    async fn dial_runner(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError>;

    /// The same to every runner of the repl; an error when it cannot tell what its runners see.
    async fn dial_runners(&self, repl: &ReplId) -> Result<Vec<Box<dyn ByteStream>>, PlatformError> {
        Ok(vec![self.dial_runner(repl).await?])
    }

    /// What tickets for the repl's runner are made with, as long as it runs.
    async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError>;

    /// Services; `None` on a backend that has only one machine to run them on.
    fn services(&self) -> Option<Arc<dyn Services>> {
        None
    }

    /// Python modules served over gRPC.
    fn modules(&self) -> Arc<dyn Modules>;

    /// Released programs are followed from where the journal ends. Called once, after the start; `recorded` costs
    /// a look through the journal, and is awaited only where programs go on while no server reads them.
    fn follow_programs(&self, _recorded: BoxFuture<'static, Recorded>) {}

    /// The next thing a released program did; `None` when the platform was shut down.
    async fn next_program_event(&self) -> Option<ProgramEvent>;

    /// Ends everything of this server's that should not outlive it.
    async fn shutdown(&self);
}

/// What begins, in a cause, the end of what a program wrote. It is for the program's owner.
pub const LAST_LINES: &str = ". Its last lines:\n";

/// What to do about a release that did not come to serve.
pub const LISTEN_OR_END: &str = "Have the program listen on port 3000 (PORT says so) of 0.0.0.0, or end with exit code 0; \
     for a worker, which does neither, send \"serves\": false. The previous release serves on.";

/// The code of a problem that means: the platform itself cannot be asked now. What runs goes on.
pub const AWAY: &str = "cluster_unavailable";

/// Longest wait for a sandbox: twice what making one takes on a slow, busy machine.
pub const CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(30);
