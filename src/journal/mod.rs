//! The append-only, fsynced event log: append, replay, follow.
//!
//! Records go into segment files in one folder. One thread writes: it takes everything that is
//! waiting, writes it with one call, syncs once, and only then shows it to readers (group commit).
//! What is not durable is never read, followed or acknowledged. Positions count records; a start
//! leaves a gap, so that a position handed out before a crash is never used again.

mod chain;
mod damage;
mod disk;
mod error;
mod follow;
mod frame;
mod front;
mod identity;
mod index;
mod keeper;
mod memory;
mod pieces;
mod segment;
mod store;
mod tail;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::Stream;
use jiff::Timestamp;
use tokio::sync::{Notify, watch};

pub use damage::Damage;
pub use error::JournalError;
pub use pieces::{Item, LargeReply};
pub use segment::TornTail;

use crate::model::{Event, Record, ReplId, SubmissionId, UserId};
use damage::Register;
use disk::{Disk, RealDisk};
use frame::{MAX_FRAME, Payload};
use front::{Batch, Front, Live, Shared};
use memory::Memory;
use store::{Store, lock};
use tail::Tail;

/// Left free at every start. More than the records that can have been handed out and lost: the
/// write buffer holds at most a quarter million of the smallest. A segment of the largest size holds
/// fewer as well, so that cutting a damaged one by hand reuses nothing either.
const POSITION_GAP: u64 = 1 << 24;
/// Largest segment: offsets in the index have 32 bits.
const MAX_SEGMENT: u64 = 1 << 30;

/// Bytes of one page of a submission's records.
const PAGE_BYTES: usize = 128 << 10;

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalOptions {
    /// A new segment begins when the last one has this many bytes (at most 1 GiB).
    pub segment_bytes: u64,
    /// Past this the oldest ended submissions are deleted of the users that have the most, but for
    /// what a reader still needs ([`Journal::keep_from`]).
    pub retain_bytes: u64,
    /// Past this they are deleted even when a reader still needs them.
    pub backlog_bytes: u64,
    /// How long the id of a submission whose records were deleted is remembered.
    pub remember: Duration,
    /// Most ids that are remembered, about a hundred bytes each.
    pub remembered_ids: u64,
}

impl Default for JournalOptions {
    fn default() -> Self {
        Self {
            segment_bytes: 64 << 20,
            retain_bytes: 1 << 30,
            backlog_bytes: 8 << 30,
            remember: Duration::from_secs(30 * 24 * 3600),
            remembered_ids: 4 << 20,
        }
    }
}

/// An event to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRecord {
    /// Whose.
    pub user_id: UserId,
    /// The submission, unless it is about a repl only.
    pub submission_id: Option<SubmissionId>,
    /// The repl.
    pub repl_id: ReplId,
    /// What happened.
    pub event: Event,
}

/// Where a record went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its place in the journal.
    pub position: u64,
    /// Its place in the submission's stream, when it is part of one.
    pub seq: Option<u64>,
}

/// What the journal knows of a submission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubmissionState {
    /// Whose.
    pub user_id: UserId,
    /// Where it goes.
    pub repl_id: ReplId,
    /// When it was received.
    pub time: Timestamp,
    /// Its place in the journal, which says what came before it, whatever the clock did.
    pub position: u64,
    /// Its last sequence number; 0 before the first.
    pub last_seq: u64,
    /// Whether it has its reply.
    pub ended: bool,
}

/// What the start found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// A tail whose writing was cut off by a crash, and which was cut.
    pub torn: Option<TornTail>,
    /// Sealed segments whose index was missing or wrong and was rebuilt.
    pub rebuilt_indexes: usize,
    /// Damaged files beside the segments that were replaced.
    pub replaced: Vec<PathBuf>,
    /// What cannot be read, and was set aside.
    pub damage: Vec<Damage>,
    /// Submissions without a reply that lost something of their records, and what: they are not to be run.
    pub set_aside: BTreeMap<SubmissionId, String>,
}

/// The journal. Clones are the same journal; the last one dropped writes what is waiting and
/// releases the folder.
#[derive(Clone)]
pub struct Journal(Arc<Handle>);

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("dir", &self.0.shared.dir)
            .finish_non_exhaustive()
    }
}

struct Handle {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
    recovery: Recovery,
    identity: String,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Handle {
    fn stop(&self) {
        lock(&self.shared.front).closing = true;
        self.shared.work.notify_all();
        if let Some(writer) = lock(&self.writer).take()
            && writer.join().is_err()
        {
            tracing::error!("the journal's writer had panicked; restart the server");
        }
    }
}

impl Journal {
    /// Opens or makes the journal in `dir`, for this process alone.
    pub fn open(dir: &Path, options: JournalOptions) -> Result<Journal, JournalError> {
        Self::open_on(dir, options, Arc::new(RealDisk))
    }

    fn open_on(
        dir: &Path,
        options: JournalOptions,
        disk: Arc<dyn Disk>,
    ) -> Result<Journal, JournalError> {
        let options = JournalOptions {
            segment_bytes: options.segment_bytes.min(MAX_SEGMENT),
            ..options
        };
        disk::make_folder(dir)?;
        let folder_lock = disk::lock_folder(dir)?;
        let mut replaced = Vec::new();
        let identity = identity::load_or_make(dir, &mut replaced)?;
        let (remember, most) = (options.remember, options.remembered_ids);
        let memory = Memory::open(dir, remember, most, &mut replaced)?;
        let mut found = segment::find(dir)?;
        remember_lost(&found, &memory)?;
        let set_aside = found.losses.set_aside(&found.unfinished);
        let headless = drop_ended(&mut found, &memory, &set_aside)?;
        let recovery = Recovery {
            torn: found.torn.take(),
            rebuilt_indexes: found.rebuilt,
            replaced: {
                replaced.append(&mut found.replaced);
                replaced
            },
            damage: std::mem::take(&mut found.losses.places),
            set_aside: found.losses.set_aside(&found.unfinished),
        };
        recovery.report();
        let register = Register::default();
        for damage in &recovery.damage {
            register.note(damage.clone());
        }
        for file in &recovery.replaced {
            register.note_replaced(file);
        }
        let last_sealed = found.sealed.last().map_or(0, |s| s.index.last_position);
        let (mut active, last) = match found.active.take() {
            Some(active) => {
                let last = active.index.last_position.max(last_sealed);
                let handed_out = last.max(active.base);
                (active, (last, handed_out + POSITION_GAP))
            }
            None => (first_segment(dir, &*disk)?, (0, 1)),
        };
        let (durable, next_position) = last;
        for id in headless {
            // It begins with its reply: what comes before cannot be found any more.
            active.index.forget(id);
            if let Some(known) = found.unfinished.get_mut(&id) {
                known.begin_anew(next_position);
            }
        }
        let sealed = found.sealed.iter().map(|sealed| sealed.base);
        if let Err(error) = chain::write(dir, sealed.chain([active.base])) {
            tracing::warn!(
                "which segments the journal has is not written down: {error}; one that is lost would not be noticed"
            );
        }
        let live = found.unfinished.iter().map(|(id, known)| {
            let known = known.clone();
            (
                *id,
                Live {
                    known,
                    ended: false,
                },
            )
        });
        let front = Front {
            awaited: false,
            next_position,
            live: live.collect(),
            batch: Batch::new(),
            spare: None,
            ill: None,
            closing: false,
        };
        let store = Store {
            sealed: found.sealed.into_iter().map(Arc::new).collect(),
            active,
            unfinished: found.unfinished,
            tail: Tail::default(),
            durable,
            closed: false,
            deleted_before: HashMap::new(),
            damage: Arc::new(register),
        };
        let (sender, watching) = watch::channel(durable);
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            options,
            disk,
            front: Mutex::new(front),
            work: Condvar::new(),
            room: Notify::new(),
            behind: Mutex::default(),
            looked: Condvar::new(),
            store: Mutex::new(store),
            chaining: Mutex::default(),
            durable: Mutex::new(Some(sender)),
            watching,
            healthy: AtomicBool::new(true),
            memory,
            needed_from: AtomicU64::new(u64::MAX),
        });
        let (full, woken) = mpsc::channel();
        let writer = writer::Writer::new(Arc::clone(&shared), full);
        let start = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread
                .spawn(work)
                .map_err(|e| JournalError::io("start a thread of", dir, e))
        };
        let kept = Arc::clone(&shared);
        let keeper = start(
            "journal-keeper",
            Box::new(move || keeper::run(&kept, &woken)),
        )?;
        let thread = start(
            "journal",
            Box::new(move || {
                writer.run();
                if keeper.join().is_err() {
                    tracing::error!("the journal's keeper had panicked");
                }
                drop(folder_lock);
            }),
        )?;
        Ok(Journal(Arc::new(Handle {
            shared,
            writer: Mutex::new(Some(thread)),
            recovery,
            identity,
        })))
    }

    /// Takes a record in. Its position and sequence number are final at once, but it is not durable
    /// yet ([`Journal::durable`]). Waits only while the write buffer is full.
    pub async fn append(&self, record: NewRecord) -> Result<Appended, JournalError> {
        let shared = &self.0.shared;
        let payload = Payload::of(&record.event).map_err(|e| JournalError::Io {
            action: "serialise an event".to_owned(),
            source: e.into(),
        })?;
        // Leaves room for the head.
        let limit = MAX_FRAME - 1024;
        if payload.len() > limit {
            return Err(JournalError::TooLarge {
                bytes: payload.len(),
                limit,
            });
        }
        let received = match (&record.event, record.submission_id) {
            (Event::Received { .. }, Some(id)) => Some(id),
            _ => None,
        };
        loop {
            let generation = shared.memory.generation();
            if let Some(id) = received
                && shared.memory.get(id)?.is_some()
            {
                return Err(JournalError::Duplicate);
            }
            let room = shared.room.notified();
            tokio::pin!(room);
            // Registered before looking, so that room made in between is not missed.
            room.as_mut().enable();
            {
                let mut front = lock(&shared.front);
                if front.closing {
                    return Err(JournalError::Closed);
                }
                if let Some(ill) = front.ill.clone() {
                    return Err(ill.into());
                }
                if received.is_some() && shared.memory.generation() != generation {
                    // Records were deleted meanwhile, and their ids are remembered now.
                    continue;
                }
                if front.batch.has_room(payload.len() + 1024) {
                    return shared.admit(&mut front, record, payload);
                }
            }
            room.await;
        }
    }

    /// Returns when the record at this position, and every one before it, is on the disk.
    pub async fn durable(&self, position: u64) -> Result<(), JournalError> {
        let mut watching = self.0.shared.watching.clone();
        match watching.wait_for(|durable| *durable >= position).await {
            Ok(_) => Ok(()),
            Err(_) => Err(JournalError::Closed),
        }
    }

    /// The last durable position, as it moves.
    pub fn durable_position(&self) -> watch::Receiver<u64> {
        self.0.shared.watching.clone()
    }

    /// What is known of a submission, also when its records are not yet durable. An index that
    /// cannot be read is logged, and refuses the submission when it is appended to.
    pub fn submission(&self, id: SubmissionId) -> Option<SubmissionState> {
        if let Some(live) = lock(&self.0.shared.front).live.get(&id) {
            return Some(live.known.state(live.ended));
        }
        match store::lookup(&self.0.shared.store, id) {
            Ok(Some(entry)) => Some(entry.known.state(entry.ended)),
            // Asked second: an id is remembered before its records are deleted.
            Ok(None) => self.remembered(id),
            Err(error) => {
                tracing::error!(submission_id = %id, "cannot look up submission {id}: {error}");
                None
            }
        }
    }

    /// How a submission ended whose records were deleted.
    fn remembered(&self, id: SubmissionId) -> Option<SubmissionState> {
        match self.0.shared.memory.get(id) {
            Ok(remembered) => Some(remembered?.known()?.state(true)),
            Err(error) => {
                tracing::error!(submission_id = %id, "cannot look up submission {id}: {error}");
                None
            }
        }
    }

    /// All of a submission's durable records, in order.
    pub async fn read_submission(&self, id: SubmissionId) -> Result<Vec<Record>, JournalError> {
        let fresh = lock(&self.0.shared.front).live.contains_key(&id);
        let shared = Arc::clone(&self.0.shared);
        let read = move || store::read_submission(&shared.store, id);
        match blocking(read).await {
            Err(JournalError::Unknown) if fresh => Ok(Vec::new()),
            Err(JournalError::Unknown) => {
                let shared = Arc::clone(&self.0.shared);
                blocking(move || Err(shared.missing(id))).await
            }
            other => other,
        }
    }

    /// A submission's next durable records behind this position, about a hundred KiB of them: who reads
    /// page by page holds no more. A large reply is left on the disk. Empty at the end.
    pub async fn page_of_submission(
        &self,
        id: SubmissionId,
        position: u64,
    ) -> Result<Vec<Item>, JournalError> {
        let fresh = lock(&self.0.shared.front).live.contains_key(&id);
        let shared = Arc::clone(&self.0.shared);
        let read = move || {
            let after = store::After {
                seq: None,
                position,
            };
            match store::read_page(&shared.store, id, after, PAGE_BYTES) {
                Err(JournalError::Unknown) if fresh => Ok(Vec::new()),
                Err(JournalError::Unknown) => Err(shared.missing(id)),
                page => page,
            }
        };
        blocking(read).await
    }

    /// The submission's streamed records after `after_seq` as they become durable: those that are
    /// there, then live, ending with the reply. Never skips, never doubles; a slow reader holds a
    /// bounded number of records.
    pub fn follow_submission(
        &self,
        id: SubmissionId,
        after_seq: u64,
    ) -> impl Stream<Item = Result<Item, JournalError>> + Send + 'static {
        follow::follow(Arc::clone(&self.0.shared), id, after_seq)
    }

    /// Submissions that were received and have no reply.
    pub fn unfinished(&self) -> Vec<SubmissionId> {
        let front = lock(&self.0.shared.front);
        let unfinished = front.live.iter().filter(|(_, live)| !live.ended);
        unfinished.map(|(id, _)| *id).collect()
    }

    /// Durable records from this position on, up to `max_bytes` but at least one if there is one.
    /// When those at `position` were deleted it begins with the first that is kept.
    pub async fn read_from(
        &self,
        position: u64,
        max_bytes: usize,
    ) -> Result<Vec<Record>, JournalError> {
        let records = self.read_shared(position, max_bytes).await?;
        Ok(records.into_iter().map(Arc::unwrap_or_clone).collect())
    }

    /// As [`Journal::read_from`], without copying what is in memory.
    pub(crate) async fn read_shared(
        &self,
        position: u64,
        max_bytes: usize,
    ) -> Result<Vec<Arc<Record>>, JournalError> {
        let recent = lock(&self.0.shared.store).tail.from(position, max_bytes);
        if let Some(records) = recent {
            return Ok(records);
        }
        let shared = Arc::clone(&self.0.shared);
        let records =
            blocking(move || store::read_from(&shared.store, position, max_bytes)).await?;
        Ok(records.into_iter().map(Arc::new).collect())
    }

    /// A name no other journal has, the same for as long as this folder lives: with a position it
    /// names a record wherever records of several servers meet.
    pub fn identity(&self) -> &str {
        &self.0.identity
    }

    /// Says that a reader still needs the records from this position on: they are kept past the
    /// usual size, up to [`JournalOptions::backlog_bytes`].
    pub fn keep_from(&self, position: u64) {
        self.0.shared.needed_from.store(position, Ordering::Relaxed);
    }

    /// The position that the next record gets: whatever was taken in before has a lower one.
    pub fn next_position(&self) -> u64 {
        lock(&self.0.shared.front).next_position
    }

    /// The position before which nothing is kept.
    pub fn oldest_position(&self) -> u64 {
        lock(&self.0.shared.store).oldest()
    }

    /// The position from which everything of this user is kept; without a user, of everybody.
    pub fn complete_from(&self, user: Option<&UserId>) -> u64 {
        lock(&self.0.shared.store).complete_from(user)
    }

    /// False while the disk is full or refuses to write.
    pub fn healthy(&self) -> bool {
        self.0.shared.healthy.load(Ordering::Relaxed)
    }

    /// Every place that was found to be unreadable, at the start or since.
    pub fn damage(&self) -> Vec<Damage> {
        let register = Arc::clone(&lock(&self.0.shared.store).damage);
        register.all()
    }

    /// Damaged files beside the segments that were replaced, at the start or since.
    pub fn replaced(&self) -> Vec<PathBuf> {
        let register = Arc::clone(&lock(&self.0.shared.store).damage);
        register.replaced()
    }

    /// What the start found and did.
    pub fn recovery(&self) -> &Recovery {
        &self.0.recovery
    }

    /// Writes what is waiting, refuses everything after it and releases the folder.
    pub async fn close(&self) -> Result<(), JournalError> {
        let handle = Arc::clone(&self.0);
        blocking(move || {
            handle.stop();
            Ok(())
        })
        .await
    }
}

impl Recovery {
    fn report(&self) {
        if let Some(torn) = &self.torn {
            tracing::warn!(
                "{} was cut at byte {}: a crash had left {} bytes of records behind that were never acknowledged",
                torn.file.display(),
                torn.offset,
                torn.bytes
            );
        }
        if self.rebuilt_indexes > 0 {
            tracing::info!(
                "rebuilt the index of {} journal segments",
                self.rebuilt_indexes
            );
        }
        for damage in &self.damage {
            tracing::error!(
                "the journal is damaged; the place is set aside, a copy of it is in the journal's folder set-aside: {damage}"
            );
        }
        for (id, why) in &self.set_aside {
            tracing::error!(submission_id = %id, "submission {id} is not run again: {why}");
        }
    }
}

/// A submission whose beginning went with a whole file never runs again, even if it is sent again.
fn remember_lost(found: &segment::Found, memory: &Memory) -> Result<(), JournalError> {
    let gone = found.losses.gone.iter();
    let gone = gone.filter(|entry| !found.unfinished.contains_key(&entry.id));
    let gone: Vec<_> = gone.map(memory::Remembered::lost).collect();
    memory.add(&gone)
}

/// A crash between the deletion of two segments must not bring an ended submission back: it is
/// unfinished only when its first record is there and its id is not remembered. Returns those that are set
/// aside and have lost that record.
fn drop_ended(
    found: &mut segment::Found,
    memory: &Memory,
    set_aside: &BTreeMap<SubmissionId, String>,
) -> Result<Vec<SubmissionId>, JournalError> {
    let (mut over, mut headless) = (Vec::new(), Vec::new());
    for (id, known) in &found.unfinished {
        let active = found.active.as_ref();
        let after = found.sealed.partition_point(|s| s.base <= known.start);
        let first = match after.checked_sub(1).and_then(|at| found.sealed.get(at)) {
            _ if active.is_some_and(|active| active.base <= known.start) => {
                active.and_then(|active| active.index.entry(*id)).cloned()
            }
            Some(sealed) => sealed.index.entry(*id)?,
            None => None,
        };
        let there = first.is_some_and(|first| first.known.start == known.start);
        if memory.get(*id)?.is_some() || !there && !set_aside.contains_key(id) {
            over.push(*id);
        } else if !there {
            headless.push(*id);
        }
    }
    for id in over {
        found.unfinished.remove(&id);
    }
    Ok(headless)
}

/// The first segment of a new journal.
fn first_segment(dir: &Path, disk: &dyn Disk) -> Result<segment::Active, JournalError> {
    let path = segment::segment_path(dir, 1);
    let (_, file) =
        writer::create(disk, dir, &path, 1).map_err(|e| JournalError::io("make", &path, e))?;
    Ok(segment::Active {
        base: 1,
        path,
        file: Arc::new(file),
        len: frame::HEADER,
        index: index::OpenIndex::default(),
    })
}

/// Runs what reads the disk off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, JournalError> + Send + 'static,
) -> Result<T, JournalError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(JournalError::Io {
            action: "finish a read".to_owned(),
            source: io::Error::other(error),
        }),
    }
}
