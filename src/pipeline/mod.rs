//! What happens next: admission → test → publish → release → reply.

mod claims;
mod compare;
mod control;
mod course;
mod fit;
mod held;
mod idle;
mod intake;
mod line;
pub mod modules;
mod names;
mod order;
mod places;
mod plan;
mod programs;
mod queue;
mod report;
mod runner;
mod save;
mod start;
mod text;
mod verdict;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::{Notify, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use crate::journal::{Appended, Item, Journal, JournalError, NewRecord, SubmissionState};
use crate::model::{
    Domain, DomainProof, Event, FieldError, Limits, Order, Outcome, Packages, Problem, ReplChange,
    ReplData, ReplId, ReplSettings, Status, Submission, SubmissionId, UserId,
};
use crate::platform::tunnel::Meters;
use crate::platform::{ConfigureError, Platform, PlatformError, RunningRelease, Sessions};
use crate::storage::CodeStore;
use claims::Claims;
use control::{Cancelling, Control, Received, beyond};
use course::{Course, History, JOURNAL_PAUSE};
use idle::Waking;
use intake::Intake;
use order::Deployments;
use places::Places;
use queue::FairQueue;
use save::Saves;

pub use claims::{NameRules, NotYours};
pub use idle::Awake;
pub use intake::Bounds;
pub use names::Names;
pub use save::{LastSave, NotSaved, Saved};

/// Submissions that were cancelled while they waited to be taken up again and are read back for
/// their replies at one time: each may be as large as all that a program wrote.
const READ_AT_ONCE: usize = 2;

/// Longest wait for the disk when the server ends.
const PUT_DOWN: Duration = Duration::from_secs(2);

/// What a stop is, among what is asked of a repl.
pub const STOPPED: &str = "it was stopped";

/// What a deletion is.
pub const DELETED: &str = "it was deleted";

/// What became of a submission that was sent in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// New; it will run.
    Accepted(SubmissionId),
    /// The same user sent this id before; it never runs twice.
    Known(SubmissionId),
}

/// Why a submission was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The message is wrong.
    #[error("{0}")]
    Invalid(FieldError),
    /// Gantry cannot take it now.
    #[error("{0}")]
    Unavailable(Problem),
}

/// How the pipeline is set up.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// Runs at one time.
    pub runs: usize,
    /// Runs of one user at one time.
    pub runs_per_user: usize,
    /// What the submissions under way of one user may keep.
    pub bounds: Bounds,
    /// Which keys were revoked.
    pub revoked: Revoked,
    /// The most a submission may ask for.
    pub maximum: Limits,
    /// Which repls' programs are recorded here.
    pub share: Share,
    /// Where what programs depend on may be installed from.
    pub packages: Packages,
    /// Where it is looked up whose a domain is.
    pub names: Names,
    /// Whose a name may become.
    pub name_rules: NameRules,
    /// Most repls of a user that run at one time; `None`: any number.
    pub repls_per_user: Option<usize>,
    /// A repl that nobody has used for so long is stopped; `None`: none is.
    pub idle_stop: Option<Duration>,
}

/// What is deleted with a repl.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Holdings {
    /// Current files, one of which may be Gantry's own.
    pub files: usize,
    /// Releases that can be gone back to, or failed.
    pub releases: usize,
    /// Variables and secrets.
    pub variables: usize,
    /// Host names of its own.
    pub domains: Vec<Domain>,
    /// What it keeps beside its code, such as its database.
    pub data: ReplData,
}

impl Holdings {
    /// Whether nothing at all is kept. Of data that are not counted there may be some.
    fn are_none(&self) -> bool {
        let counted = self.files + self.releases + self.variables + self.domains.len();
        counted == 0 && self.data.bytes == Some(0)
    }
}

/// Why a repl does not get the domains that were asked for.
#[derive(Debug)]
pub enum NotNamed {
    /// These proofs are not in the DNS.
    Unproved(Vec<DomainProof>),
    /// It could not be done.
    Failed(ConfigureError),
}

impl From<ConfigureError> for NotNamed {
    fn from(error: ConfigureError) -> Self {
        Self::Failed(error)
    }
}

impl From<PlatformError> for NotNamed {
    fn from(error: PlatformError) -> Self {
        Self::Failed(error.into())
    }
}

/// Which repls' programs are recorded here: with several replicas of the server each sees all of them,
/// and one records each.
#[derive(Clone)]
pub struct Share(pub Arc<dyn Fn(&ReplId) -> bool + Send + Sync>);

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Share")
    }
}

/// Which keys were revoked, by their ids.
#[derive(Clone)]
pub struct Revoked(pub Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl std::fmt::Debug for Revoked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Revoked")
    }
}

/// Takes submissions to their one terminal status.
#[derive(Debug, Clone)]
pub struct Pipeline {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    journal: Journal,
    platform: Arc<dyn Platform>,
    store: Arc<dyn CodeStore>,
    sessions: Sessions,
    queue: FairQueue,
    intake: Intake,
    revoked: Revoked,
    /// See [`READ_AT_ONCE`].
    reading: Semaphore,
    /// Who reads back what programs wrote whose replies are still to come, when it is much: one after the other.
    large_outputs: Semaphore,
    maximum: Limits,
    share: Share,
    names: Names,
    places: Places,
    claims: Claims,
    packages: Packages,
    /// What users move to and from package indexes.
    meters: Arc<Meters>,
    saves: Saves,
    /// Told when a repl may have become an open workspace.
    opened: Notify,
    idle_stop: Option<Duration>,
    waking: Waking,
    deployments: Deployments,
    under_way: Mutex<HashMap<SubmissionId, Arc<Control>>>,
    courses: TaskTracker,
}

/// What is asked of a repl.
struct Asked {
    order: Order,
    /// What was under way for the repl by then.
    under_way: Vec<(SubmissionId, Arc<Control>)>,
}

impl Pipeline {
    /// A pipeline; call [`Pipeline::recover`] next.
    pub fn new(
        journal: Journal,
        platform: Arc<dyn Platform>,
        store: Arc<dyn CodeStore>,
        options: &PipelineOptions,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                sessions: Sessions::new(Arc::clone(&platform)),
                queue: FairQueue::new(options.runs, options.runs_per_user),
                intake: Intake::new(options.bounds),
                revoked: options.revoked.clone(),
                reading: Semaphore::new(READ_AT_ONCE),
                large_outputs: Semaphore::new(1),
                maximum: options.maximum,
                share: options.share.clone(),
                names: options.names.clone(),
                places: Places::new(options.repls_per_user),
                claims: Claims::new(options.name_rules.clone()),
                packages: options.packages.clone(),
                meters: Arc::default(),
                saves: Saves::default(),
                opened: Notify::new(),
                idle_stop: options.idle_stop,
                waking: Waking::default(),
                deployments: Deployments::default(),
                under_way: Mutex::default(),
                courses: TaskTracker::new(),
                journal,
                platform,
                store,
            }),
        }
    }

    /// Takes up what an earlier server left unfinished, and follows released programs.
    pub fn recover(&self) {
        let journal = &self.inner.journal;
        let set_aside = journal.recovery().set_aside.clone();
        let unfinished = journal.unfinished().into_iter();
        let mut unfinished: Vec<_> = unfinished
            .filter_map(|id| Some((id, journal.submission(id)?)))
            .collect();
        // Those that ran came before those that waited.
        unfinished.sort_by_key(|(_, state)| state.position);
        for (id, state) in unfinished {
            if let Some(why) = set_aside.get(&id).cloned() {
                let this = self.clone();
                let courses = &self.inner.courses;
                courses.spawn(async move { this.answer_damaged(id, state, why).await });
                continue;
            }
            self.take_up(id, state.user_id, state.repl_id);
        }
        let this = self.clone();
        tokio::spawn(async move { this.record_programs().await });
        tokio::spawn(self.clone().keep_saving());
        if !self.inner.packages.indexes.is_empty() {
            tokio::spawn(self.clone().keep_lending());
            tokio::spawn(self.clone().keep_packages());
        }
        tokio::spawn(self.clone().keep_stopping_idle(self.inner.idle_stop));
    }

    /// Takes it in. Its events and its reply are then in the journal. `key`: the id of the key that it
    /// was sent with.
    pub async fn submit(&self, submission: Submission, key: &str) -> Result<Admission, Refusal> {
        let id = submission.id;
        if let Some(known) = self.known(&submission)? {
            return Ok(known);
        }
        if !self.inner.journal.healthy() {
            return Err(Refusal::Unavailable(journal_problem(&JournalError::Full)));
        }
        let kept = self.inner.intake.take(&submission);
        let kept = kept.map_err(Refusal::Unavailable)?;
        self.check_repl(&submission).await?;
        self.inner.platform.used(&submission.user_id);
        let received = NewRecord {
            user_id: submission.user_id.clone(),
            submission_id: Some(id),
            repl_id: submission.repl_id.clone(),
            event: Event::Received {
                submission: Box::new(submission.clone()),
                key: Some(key.to_owned()),
            },
        };
        let appended = match self.inner.journal.append(received).await {
            Ok(appended) => appended,
            // The same id came twice at once, and the other was first.
            Err(JournalError::Duplicate) => {
                return match self.known(&submission)? {
                    Some(known) => Ok(known),
                    // It ended meanwhile, and was forgotten for its age.
                    None => Err(Refusal::Unavailable(journal_problem(&JournalError::Ended))),
                };
            }
            Err(error) => return Err(Refusal::Unavailable(journal_problem(&error))),
        };
        let control = Control::new(kept, &submission, key.to_owned());
        self.launch(submission, control, appended.position);
        Ok(Admission::Accepted(id))
    }

    /// Cancels what was sent with keys that are revoked by now.
    pub fn cancel_revoked(&self) {
        for (id, control) in self.under_way().iter() {
            if control.was_sent_with(|key| (self.inner.revoked.0)(key)) {
                // Nothing is recorded: the key stays revoked, which the next server sees for itself.
                control.cancel_because(Some(key_revoked()));
                tracing::info!(submission = %id, "cancelled: its key was revoked");
            }
        }
    }

    /// Stops it; `false` when it is not running or past stopping. A server that takes it up again knows
    /// of it.
    pub async fn cancel(&self, id: SubmissionId) -> bool {
        let Some(control) = self.control(id) else {
            return false;
        };
        match control.cancel_because(None) {
            Cancelling::TooLate => return false,
            Cancelling::Again => return true,
            Cancelling::First => {}
        }
        let recorded = match self.record(id, Event::Cancelled { why: None }).await {
            // What comes behind it on a connection is answered when this is kept, as input is.
            Ok(Appended { position, .. }) => self.inner.journal.durable(position).await,
            Err(error) => Err(error),
        };
        match recorded {
            // It has ended by now.
            Ok(()) | Err(JournalError::Ended | JournalError::Unknown) => {}
            Err(error) => {
                tracing::warn!(submission = %id, %error, "a submission is cancelled, but not on the disk: it would run on after a restart");
            }
        }
        true
    }

    /// Records input for the program, which gets it once it is on the disk. `offset`: the bytes that its
    /// sender says came before it, so that what was received already is passed over; then the answer, which
    /// comes when all of it is on the disk, says how much was received.
    pub async fn stdin(
        &self,
        id: SubmissionId,
        data: &str,
        offset: Option<u64>,
        eof: bool,
    ) -> Result<Option<u64>, Problem> {
        let Some(control) = self.control(id) else {
            return Err(not_running());
        };
        let failed = |error: JournalError| stdin_problem(&error);
        let _one = control.recording.lock().await;
        let received = match control.received() {
            Some(received) => received,
            // Its turn to be read back has not come; what is not asked for is not looked up.
            None if offset.is_none() => Received::default(),
            None => self.received(id, &control).await.map_err(failed)?,
        };
        control.takes_input()?;
        let fresh = match offset {
            Some(offset) => beyond(data, offset, received.bytes)?,
            None => data,
        };
        let known = offset.is_some() && fresh.is_empty() && (received.eof || !eof);
        if received.eof && !known {
            return Err(Problem::new(
                "stdin_closed",
                "The input was not taken",
                "an earlier frame said that nothing follows",
                "Send \"eof\":true with the last input only.",
            ));
        }
        if !known {
            control.admit(fresh)?;
            let data = fresh.to_owned();
            let recorded = self.record(id, Event::Input { data, eof }).await;
            let Appended { position, .. } = recorded.map_err(failed)?;
            control.recorded(position, fresh.to_owned(), eof);
            if offset.is_some() {
                let durable = self.inner.journal.durable(position).await;
                durable.map_err(failed)?;
            }
        }
        Ok(offset.map(|_| received.bytes + fresh.len() as u64))
    }

    /// What the journal has of the input of a submission that was not read back.
    async fn received(
        &self,
        id: SubmissionId,
        control: &Control,
    ) -> Result<Received, JournalError> {
        let journal = &self.inner.journal;
        let (mut received, mut position) = (Received::default(), 0);
        loop {
            let page = journal.page_of_submission(id, position).await?;
            let Some(last) = page.last() else {
                return Ok(received);
            };
            position = last.position();
            for item in page {
                let Item::Record(record) = item else {
                    continue;
                };
                match record.event {
                    Event::Received { submission, .. } => {
                        control.note_interactive(submission.interactive);
                    }
                    Event::Input { data, eof } => {
                        received.bytes += data.len() as u64;
                        received.eof |= eof;
                    }
                    _ => {}
                }
            }
        }
    }

    /// Adds to what is recorded of a submission.
    async fn record(&self, id: SubmissionId, event: Event) -> Result<Appended, JournalError> {
        let journal = &self.inner.journal;
        let state = journal.submission(id).ok_or(JournalError::Unknown)?;
        let record = NewRecord {
            user_id: state.user_id,
            submission_id: Some(id),
            repl_id: state.repl_id,
            event,
        };
        journal.append(record).await
    }

    /// The most a submission may ask for.
    pub fn maximum_limits(&self) -> &Limits {
        &self.inner.maximum
    }

    /// Submissions under way, and those of them that wait for their turn.
    pub fn load(&self) -> (usize, usize) {
        (self.under_way().len(), self.inner.queue.waiting())
    }

    /// Makes an earlier release of the user's repl serve again.
    pub async fn rollback(
        &self,
        user: &UserId,
        repl: &ReplId,
        release: Option<u64>,
    ) -> Result<(RunningRelease, LastSave), PlatformError> {
        let back = match release {
            Some(release) => format!("it was rolled back to release {release}"),
            None => "it was rolled back".to_owned(),
        };
        let asked = self.asked(repl, |owner| owner == user, back);
        let platform = &self.inner.platform;
        let _place = self.inner.places.take(&**platform, user, repl).await?;
        // A workspace gives way to the release: what was edited in it is kept first.
        let last = self.save_before(repl).await;
        let last = last.map_err(PlatformError::Unavailable)?;
        let running = platform.rollback(repl, release, &asked.order).await?;
        self.inner.saves.forget(repl);
        self.overtake(asked).await;
        let message = format!("Rolled back to release {}{}", running.release, last.told());
        self.note(
            user,
            repl,
            "repl.rolled_back",
            message,
            Some(running.release),
        )
        .await;
        Ok((running, last))
    }

    /// Changes what the user's repl runs with.
    pub async fn configure(
        &self,
        user: &UserId,
        repl: &ReplId,
        change: &ReplChange,
    ) -> Result<ReplSettings, ConfigureError> {
        let mut last = LastSave::default();
        if let ReplChange::Variables(_) = change {
            // A workspace is started anew from what is in the code store.
            let saved = self.save_before(repl).await;
            last = saved.map_err(PlatformError::Unavailable)?;
        }
        let now = self.inner.platform.configure(repl, change).await?;
        let (action, message) = match change {
            ReplChange::Scale(scale) => ("repl.scaled", format!("Scaled to {scale}")),
            ReplChange::Variables(_) => {
                // Whatever was fetched anew has other times.
                self.inner.saves.forget(repl);
                let names: Vec<&str> = now
                    .env
                    .keys()
                    .chain(&now.secrets)
                    .map(String::as_str)
                    .collect();
                let message = format!("Given the variables {}{}", names.join(", "), last.told());
                ("repl.variables", message)
            }
            ReplChange::Domains(domains) => {
                let names: Vec<&str> = domains.iter().map(Domain::as_str).collect();
                let message = format!("Has the domains {}", names.join(", "));
                ("repl.domains", message)
            }
        };
        self.note(user, repl, action, message, None).await;
        Ok(now)
    }

    /// Gives the user's repl these domains and no others. One that it did not have has to be proved.
    pub async fn name(
        &self,
        user: &UserId,
        repl: &ReplId,
        domains: Vec<Domain>,
    ) -> Result<ReplSettings, NotNamed> {
        let before = self.inner.platform.settings(repl).await?;
        let mut fresh = domains.clone();
        fresh.retain(|domain| !before.domains.contains(domain));
        let missing = self.inner.names.missing(user, &fresh).await;
        let missing = missing.map_err(PlatformError::Unavailable)?;
        if !missing.is_empty() {
            return Err(NotNamed::Unproved(missing));
        }
        let change = ReplChange::Domains(domains);
        Ok(self.configure(user, repl, &change).await?)
    }

    /// Notes that this was asked of the user's repl: what was sent before and is under way is not deployed any
    /// more, by this server, a later one or another replica.
    async fn order(&self, user: &UserId, repl: &ReplId, what: &str) -> Result<(), PlatformError> {
        let asked = self.asked(repl, |owner| owner == user, what.to_owned());
        let order = asked.order.clone();
        self.overtake(asked).await;
        self.inner.platform.ordered(repl, &order).await
    }

    /// This is asked of the repl now; what these users sent before is still under way, and nothing that comes while
    /// it is carried out is among it.
    fn asked(&self, repl: &ReplId, whose: impl Fn(&UserId) -> bool, what: String) -> Asked {
        // Looked at first: the place in the journal is then behind all of it.
        let under_way = {
            let under_way = self.under_way();
            let of_repl = under_way
                .iter()
                .filter(|(_, control)| control.repl == *repl && whose(&control.user));
            of_repl
                .map(|(id, control)| (*id, Arc::clone(control)))
                .collect()
        };
        let journal = &self.inner.journal;
        let position = journal.next_position();
        Asked {
            order: Order::new(journal.identity(), position, Timestamp::now(), what),
            under_way,
        }
    }

    /// Has what these users have under way here for the repl not be deployed, for this reason: another replica is
    /// asked for it, or the repl is nobody's yet, so that there is nowhere to note it.
    pub async fn overtake_here(&self, repl: &ReplId, whose: impl Fn(&UserId) -> bool, why: &str) {
        let asked = self.asked(repl, whose, why.to_owned());
        self.overtake(asked).await;
    }

    /// Has what was under way when this was asked not be deployed.
    async fn overtake(&self, Asked { order, under_way }: Asked) {
        let by = order.what();
        let mut last = None;
        for (id, control) in under_way {
            control.overtake(by);
            let by = by.to_owned();
            // One that has just ended takes no more records.
            if let Ok(appended) = self.record(id, Event::Overtaken { by }).await {
                last = Some(appended.position);
            }
        }
        // Whoever asked is told that it is done.
        if let Some(last) = last {
            let _ = timeout(PUT_DOWN, self.inner.journal.durable(last)).await;
        }
    }

    /// Stops the user's repl, whatever of its workspace can be kept.
    pub async fn stop(&self, user: &UserId, repl: &ReplId) -> Result<LastSave, PlatformError> {
        let was_there = self.inner.platform.owner(repl).await?.is_some();
        self.order(user, repl, STOPPED).await?;
        let last = self.save_at_last(repl).await;
        self.inner.saves.forget(repl);
        self.inner.platform.drop_repl(repl).await?;
        if was_there {
            let message = format!("Stopped{}", last.told());
            self.note(user, repl, "repl.stopped", message, None).await;
        }
        Ok(last)
    }

    /// Deletes what the user's repl keeps beside its code, for good.
    pub async fn delete_data(&self, user: &UserId, repl: &ReplId) -> Result<(), PlatformError> {
        self.inner.platform.delete_data(repl).await?;
        let message = "Its data were deleted".to_owned();
        self.note(user, repl, "repl.data_deleted", message, None)
            .await;
        Ok(())
    }

    /// What is deleted with the user's repl.
    pub async fn holdings(&self, repl: &ReplId) -> Result<Holdings, PlatformError> {
        let platform = &self.inner.platform;
        let files = self.inner.store.list_current(repl).await;
        let files = files.map_err(PlatformError::Unavailable)?;
        let settings = platform.settings(repl).await?;
        Ok(Holdings {
            files: files.len(),
            releases: platform.releases(repl).await?.len(),
            variables: settings.env.len() + settings.secrets.len(),
            domains: settings.domains,
            data: platform.data(repl).await?,
        })
    }

    /// Lets anybody have the name of the user's repl, if nothing is kept under it and nothing of it ever ran; else
    /// says what is deleted with it.
    pub async fn give_up_name(
        &self,
        user: &UserId,
        repl: &ReplId,
    ) -> Result<Option<Holdings>, PlatformError> {
        let holdings = self.holdings(repl).await?;
        if !holdings.are_none() {
            return Ok(Some(holdings));
        }
        let platform = &self.inner.platform;
        platform.forget_unused(repl).await?;
        if platform.owner(repl).await?.as_ref() == Some(user) {
            return Ok(Some(holdings));
        }
        let message = "Its name is free; nothing was kept under it".to_owned();
        self.note(user, repl, "repl.deleted", message, None).await;
        Ok(None)
    }

    /// Stops the user's repl, deletes its files, releases, variables and data for good, and lets anybody have its
    /// name.
    pub async fn delete(&self, user: &UserId, repl: &ReplId) -> Result<(), PlatformError> {
        self.order(user, repl, DELETED).await?;
        // What is just being deployed is over before its files are looked for.
        let _turn = self.inner.deployments.turn(repl).await;
        let platform = &self.inner.platform;
        platform.drop_repl(repl).await?;
        {
            // A save that is under way must not put anything back.
            let saves = &self.inner.saves;
            let known = saves.of(repl);
            let _none = known.lock().await;
            saves.forget(repl);
            platform.delete_data(repl).await?;
            // Before the name is free: the next who has it must find nothing of this user's.
            let removed = self.inner.store.remove_repl(repl).await;
            removed.map_err(PlatformError::Unavailable)?;
            platform.forget(repl).await?;
        }
        let message = "Deleted, with its files, releases and data; its name is free".to_owned();
        self.note(user, repl, "repl.deleted", message, None).await;
        Ok(())
    }

    /// Leaves what is under way to the next server, which need not wonder why this one ended.
    pub async fn put_down(&self) {
        let left: Vec<SubmissionId> = self.under_way().keys().copied().collect();
        let mut last = None;
        for id in left {
            // One that has just ended takes no more records.
            if let Ok(appended) = self.record(id, Event::PutDown).await {
                last = Some(appended.position);
            }
        }
        if let Some(last) = last
            && !matches!(
                timeout(PUT_DOWN, self.inner.journal.durable(last)).await,
                Ok(Ok(()))
            )
        {
            tracing::warn!(
                "the journal's disk did not take what is left to the next server in time"
            );
        }
    }

    /// Waits until no submission is under way. What is left when the server ends all the same is
    /// taken up by the next one.
    pub async fn drain(&self) {
        self.inner.courses.close();
        self.inner.courses.wait().await;
    }

    /// Whether this id was sent before; another user's is as if reserved.
    fn known(&self, submission: &Submission) -> Result<Option<Admission>, Refusal> {
        match self.inner.journal.submission(submission.id) {
            None => Ok(None),
            Some(state) if state.user_id == submission.user_id => {
                Ok(Some(Admission::Known(submission.id)))
            }
            Some(_) => Err(Refusal::Invalid(FieldError::new(
                "submission_id",
                "is not available; choose another or leave it out",
            ))),
        }
    }

    /// Nothing is claimed here: a submission whose tests fail takes no name.
    async fn check_repl(&self, submission: &Submission) -> Result<(), Refusal> {
        let (repl, user) = (&submission.repl_id, &submission.user_id);
        let platform = &self.inner.platform;
        let invalid = |reason| Refusal::Invalid(FieldError::new("repl_id", reason));
        let unknown = |error| match error {
            PlatformError::Unavailable(problem) | PlatformError::NotReady(problem) => {
                Refusal::Unavailable(problem)
            }
            error @ PlatformError::NotFound(_) => Refusal::Unavailable(Problem::new(
                "platform_unavailable",
                "The repl's owner could not be found out",
                error.to_string(),
                "Try again.",
            )),
        };
        if !submission.deploy {
            return match platform.owner(repl).await.map_err(unknown)? {
                Some(owner) if owner != *user => {
                    Err(invalid("is not available; choose another".to_owned()))
                }
                _ => Ok(()),
            };
        }
        let checked = self.inner.check_name(user, repl).await;
        if let Err(not) = checked {
            return Err(not.reason().map_or_else(unknown, invalid));
        }
        // Said before anything is run; whether it holds then is seen again when it is deployed.
        let place = self.inner.places.take(&**platform, user, repl).await;
        place.map(drop).map_err(|error| match error {
            PlatformError::NotReady(full) => invalid(format!("cannot run: {}", full.cause)),
            other => Refusal::Unavailable(Problem::new(
                "platform_unavailable",
                "The repls that run could not be counted",
                other.to_string(),
                "Try again.",
            )),
        })
    }

    fn launch(&self, submission: Submission, control: Control, received: u64) {
        let id = submission.id;
        let control = Arc::new(control);
        self.under_way().insert(id, Arc::clone(&control));
        let inner = Arc::clone(&self.inner);
        let history = History::beginning(received);
        let course = Course::new(inner, submission, control, history);
        let this = self.clone();
        self.inner.courses.spawn(async move {
            course.run(None).await;
            this.under_way().remove(&id);
        });
    }

    /// Takes up what an earlier server left. It is read back when its turn has come: however many
    /// there are, no more are in memory than run at one time.
    fn take_up(&self, id: SubmissionId, user: UserId, repl: ReplId) {
        let kept = self.inner.intake.take_again(&user);
        let control = Arc::new(Control::unread(kept, user.clone(), repl));
        self.under_way().insert(id, Arc::clone(&control));
        let this = self.clone();
        self.inner.courses.spawn(async move {
            let permit = tokio::select! {
                permit = this.inner.queue.turn(&user) => Some(permit),
                () = control.cancelled() => None,
            };
            let _reading = match permit {
                Some(_) => None,
                None => this.inner.reading.acquire().await.ok(),
            };
            let read = loop {
                match this.read_back(id, &control).await {
                    // It waits for room, as those do that are under way.
                    Err(JournalError::Full | JournalError::Failing { .. }) => {
                        sleep(JOURNAL_PAUSE).await;
                    }
                    read => break read,
                }
            };
            match read {
                Ok((submission, history)) => {
                    tracing::info!(submission = %id, "taken up again after a restart");
                    let inner = Arc::clone(&this.inner);
                    let course = Course::new(inner, submission, Arc::clone(&control), history);
                    course.run(permit).await;
                }
                Err(JournalError::Closed) => {
                    tracing::info!(submission = %id, "left to the next start");
                }
                Err(error) => {
                    tracing::error!(submission = %id, %error, "a submission cannot be taken up again");
                    if let Some(state) = this.inner.journal.submission(id) {
                        this.answer_damaged(id, state, error.told()).await;
                    }
                }
            }
            this.under_way().remove(&id);
        });
    }

    /// Gives a submission its reply whose record cannot be read: it is not run from half of it, and nobody
    /// waits for it for ever.
    async fn answer_damaged(&self, id: SubmissionId, state: SubmissionState, why: String) {
        metrics::counter!("gantry_submissions_set_aside_total").increment(1);
        let mut outcome = Outcome::new(Status::Unavailable);
        outcome.namespace = Some(state.user_id.namespace());
        outcome.submission_id = Some(id);
        outcome.repl_id = Some(state.repl_id);
        outcome.error = Some(Problem::new(
            "record_unreadable",
            "The submission was not taken up again",
            format!("what was recorded of it cannot be read: {why}"),
            "Submit it again under a new submission_id, after a look whether its release serves.",
        ));
        loop {
            let reply = Event::Reply(Box::new(outcome.clone()));
            match self.record(id, reply).await {
                Err(JournalError::Full | JournalError::Failing { .. }) => {
                    sleep(JOURNAL_PAUSE).await;
                }
                Err(JournalError::Closed | JournalError::Ended) | Ok(_) => return,
                Err(error) => {
                    tracing::error!(submission = %id, %error, "a submission cannot be answered");
                    return;
                }
            }
        }
    }

    /// Reads a submission back that an earlier server left.
    async fn read_back(
        &self,
        id: SubmissionId,
        control: &Control,
    ) -> Result<(Submission, History), JournalError> {
        let journal = &self.inner.journal;
        // Input that comes meanwhile waits: whatever was recorded before is on the disk below.
        let _one = control.recording.lock().await;
        // On the disk first: should this submission end the server, the next one knows.
        let appended = self.record(id, Event::TakenUp).await?;
        journal.durable(appended.position).await?;
        let records = journal.read_submission(id).await?;
        let (submission, mut history) = History::read(records).ok_or(JournalError::Unknown)?;
        let (key, input) = (history.key().map(str::to_owned), history.take_input());
        control.read_back(&submission, key, input);
        if let Some(why) = history.cancelled() {
            control.cancel_because(why);
        }
        if let Some(by) = history.overtaken() {
            control.overtake(by);
        }
        if control.was_sent_with(|key| (self.inner.revoked.0)(key)) {
            control.cancel_because(Some(key_revoked()));
        }
        Ok((submission, history))
    }

    async fn note(
        &self,
        user: &UserId,
        repl: &ReplId,
        action: &str,
        message: String,
        release: Option<u64>,
    ) {
        let record = NewRecord {
            user_id: user.clone(),
            submission_id: None,
            repl_id: repl.clone(),
            event: Event::Repl {
                action: action.to_owned(),
                message,
                release,
                error: None,
                origin: None,
            },
        };
        if let Err(error) = self.inner.journal.append(record).await {
            tracing::warn!(%repl, %error, "what happened to a repl was not recorded");
        }
    }

    fn control(&self, id: SubmissionId) -> Option<Arc<Control>> {
        self.under_way().get(&id).cloned()
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, HashMap<SubmissionId, Arc<Control>>> {
        self.inner
            .under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_running() -> Problem {
    Problem::new(
        "not_running",
        "The input was not taken",
        "the submission has ended",
        "Send input while the program runs.",
    )
}

fn stdin_problem(error: &JournalError) -> Problem {
    if let JournalError::Ended | JournalError::Unknown = error {
        return not_running();
    }
    Problem::new(
        "journal_unavailable",
        "The input was not taken",
        error.told(),
        "Send it again while the submission is under way.",
    )
}

fn key_revoked() -> Problem {
    Problem::new(
        "key_revoked",
        "The submission was cancelled",
        "the key that it was sent with was revoked",
        "Submit it again with a key that counts.",
    )
}

fn journal_problem(error: &JournalError) -> Problem {
    Problem::new(
        "journal_unavailable",
        "The submission was not taken",
        error.told(),
        "The operator has to make room on the data folder's disk; it goes on by itself then.",
    )
}
