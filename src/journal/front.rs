//! Where records come in: their order is checked, they get their numbers, and they wait for the
//! writer.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{Notify, watch};

use super::disk::Disk;
use super::frame::{self, MARK, Payload};
use super::index::Known;
use super::memory::Memory;
use super::store::{self, Store, lock};
use super::{Appended, JournalError, JournalOptions, NewRecord};
use crate::model::{Event, Record, SubmissionId};

/// Bytes that may wait to be written. At the disk's slowest useful speed (10 MB/s) that is under a
/// second; more would only make a crash lose more that nobody was told of.
pub(super) const WRITE_BUFFER: usize = 8 << 20;

/// How long records that nobody waits for may wait for company: what a short run writes, its end and its
/// reply then share one sync. Followers see them this much later; they are promised 50 ms.
const GATHER: Duration = Duration::from_millis(5);

/// Bytes that are worth a sync of their own.
const GATHERED: usize = 64 << 10;

/// Why nothing can be written at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ill {
    Full,
    Failing(String),
}

impl From<&io::Error> for Ill {
    fn from(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::FileTooLarge => Self::Full,
            _ => Self::Failing(error.to_string()),
        }
    }
}

impl From<Ill> for JournalError {
    fn from(ill: Ill) -> Self {
        match ill {
            Ill::Full => Self::Full,
            Ill::Failing(cause) => Self::Failing { cause },
        }
    }
}

/// Frames to be written together; the bytes begin with room for a mark.
pub(super) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) records: Vec<(Arc<Record>, usize)>,
}

impl Batch {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; MARK],
            records: Vec::new(),
        }
    }

    pub(super) fn has_room(&self, len: usize) -> bool {
        self.records.is_empty() || self.bytes.len() + len <= WRITE_BUFFER
    }
}

pub(super) struct Live {
    pub(super) known: Known,
    pub(super) ended: bool,
}

/// The side where records come in.
pub(super) struct Front {
    pub(super) next_position: u64,
    /// Submissions that have not ended, and those whose reply is not yet durable.
    pub(super) live: HashMap<SubmissionId, Live>,
    pub(super) batch: Batch,
    /// Whether somebody waits for a record of the batch to be on the disk.
    pub(super) awaited: bool,
    pub(super) spare: Option<Batch>,
    pub(super) ill: Option<Ill>,
    pub(super) closing: bool,
}

impl Front {
    /// Whether what waits may wait for more.
    fn gathers(&self) -> bool {
        !self.awaited && !self.closing && self.batch.bytes.len() < GATHERED
    }
}

/// How many segments were sealed, and how many of them the keeper had before it when it looked last.
#[derive(Default)]
pub(super) struct Behind {
    pub(super) sealed: u64,
    pub(super) looked_at: u64,
}

pub(super) struct Shared {
    pub(super) dir: PathBuf,
    pub(super) options: JournalOptions,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) front: Mutex<Front>,
    pub(super) work: Condvar,
    pub(super) room: Notify,
    /// What the keeper has still to look at.
    pub(super) behind: Mutex<Behind>,
    /// The keeper has looked.
    pub(super) looked: Condvar,
    pub(super) store: Mutex<Store>,
    /// Held while the list of segments is written.
    pub(super) chaining: Mutex<()>,
    /// Gone when the journal is closed.
    pub(super) durable: Mutex<Option<watch::Sender<u64>>>,
    pub(super) watching: watch::Receiver<u64>,
    pub(super) healthy: AtomicBool,
    /// Submissions that ended and were deleted.
    pub(super) memory: Memory,
    /// The first position that a reader outside still needs; the largest number: nobody does.
    pub(super) needed_from: AtomicU64,
}

impl Shared {
    /// Checks the submission's order, gives the record its numbers and puts it into the batch.
    pub(super) fn admit(
        &self,
        front: &mut Front,
        new: NewRecord,
        payload: Payload,
    ) -> Result<Appended, JournalError> {
        let mut record = Record {
            position: front.next_position,
            // What the file holds, so that live and replayed records are equal.
            time: Timestamp::from_microsecond(Timestamp::now().as_microsecond())
                .unwrap_or(Timestamp::UNIX_EPOCH),
            user_id: new.user_id,
            submission_id: new.submission_id,
            repl_id: new.repl_id,
            seq: None,
            event: new.event,
        };
        if let Some(id) = record.submission_id {
            record.seq = self.next_in_stream(front, id, &record)?;
        }
        if let Event::Reply(outcome) = &mut record.event {
            outcome.seq = record.seq;
        }
        front.next_position += 1;
        let appended = Appended {
            position: record.position,
            seq: record.seq,
        };
        let awaited = record.event.is_awaited();
        let before = front.batch.bytes.len();
        frame::encode(&mut front.batch.bytes, &record, payload);
        let len = front.batch.bytes.len() - before;
        front.batch.records.push((Arc::new(record), len));
        front.awaited |= awaited;
        if front.batch.records.len() == 1 || !front.gathers() {
            self.work.notify_one();
        }
        Ok(appended)
    }

    /// The sequence number of this record, after checking that it may come now.
    fn next_in_stream(
        &self,
        front: &mut Front,
        id: SubmissionId,
        record: &Record,
    ) -> Result<Option<u64>, JournalError> {
        let received = matches!(record.event, Event::Received { .. });
        match front.live.get_mut(&id) {
            Some(_) if received => Err(JournalError::Duplicate),
            Some(live) if live.ended => Err(JournalError::Ended),
            Some(live) => {
                live.ended = matches!(record.event, Event::Reply(_));
                if !record.event.streamed() {
                    return Ok(None);
                }
                live.known.last_seq += 1;
                Ok(Some(live.known.last_seq))
            }
            // An ended one leaves `live` only after it is in the store: it is in one of them.
            None => match (store::lookup(&self.store, id)?, received) {
                (Some(_), true) => Err(JournalError::Duplicate),
                (Some(_), false) => Err(JournalError::Ended),
                (None, false) => Err(JournalError::Unknown),
                (None, true) => {
                    let known = Known::new(
                        record.user_id.clone(),
                        record.repl_id.clone(),
                        record.time,
                        record.position,
                    );
                    front.live.insert(
                        id,
                        Live {
                            known,
                            ended: false,
                        },
                    );
                    Ok(None)
                }
            },
        }
    }

    /// All that is waiting, once there is something; `None` when closing and nothing is left.
    pub(super) fn take_batch(&self) -> Option<Batch> {
        let mut front = lock(&self.front);
        while front.batch.records.is_empty() {
            if front.closing {
                return None;
            }
            front = self
                .work
                .wait(front)
                .unwrap_or_else(PoisonError::into_inner);
        }
        let gathered = self
            .work
            .wait_timeout_while(front, GATHER, |front| front.gathers());
        (front, _) = gathered.unwrap_or_else(PoisonError::into_inner);
        front.awaited = false;
        let next = front.spare.take().unwrap_or_else(Batch::new);
        let batch = std::mem::replace(&mut front.batch, next);
        drop(front);
        self.room.notify_waiters();
        Some(batch)
    }

    /// Gives a written batch's memory back for the next one, unless a burst made it large.
    pub(super) fn recycle(&self, mut batch: Batch) {
        const KEPT: usize = 256 << 10;
        batch.records.clear();
        batch.bytes.truncate(MARK);
        batch.bytes.shrink_to(KEPT);
        batch.records.shrink_to(KEPT / 64);
        lock(&self.front).spare = Some(batch);
    }

    /// Tells everybody what is durable now.
    pub(super) fn announce(&self, durable: u64, records: &[(Arc<Record>, usize)]) {
        if let Some(sender) = &*lock(&self.durable) {
            sender.send_replace(durable);
        }
        let replies = records
            .iter()
            .filter(|(r, _)| matches!(r.event, Event::Reply(_)));
        let ended: Vec<SubmissionId> = replies.filter_map(|(r, _)| r.submission_id).collect();
        if !ended.is_empty() {
            let mut front = lock(&self.front);
            for id in ended {
                front.live.remove(&id);
            }
        }
    }

    /// Why a submission is not in the journal.
    pub(super) fn missing(&self, id: SubmissionId) -> JournalError {
        match self.memory.get(id) {
            Ok(Some(remembered)) => remembered.gone(),
            Ok(None) => JournalError::Unknown,
            Err(error) => error,
        }
    }

    pub(super) fn fall_ill(&self, ill: Ill, path: &Path) {
        let mut front = lock(&self.front);
        if front.ill.as_ref() != Some(&ill) {
            let error = JournalError::from(ill.clone());
            tracing::error!("writing {}: {error}", path.display());
        }
        front.ill = Some(ill);
        self.healthy.store(false, Ordering::Relaxed);
        drop(front);
        self.room.notify_waiters();
    }

    pub(super) fn recover(&self) {
        if !self.healthy.load(Ordering::Relaxed) {
            lock(&self.front).ill = None;
            self.healthy.store(true, Ordering::Relaxed);
            tracing::info!("the journal can be written again; nothing that was taken in was lost");
        }
    }

    /// Waits; true when the journal is closing.
    pub(super) fn wait(&self, pause: Duration) -> bool {
        let front = lock(&self.front);
        let result = self
            .work
            .wait_timeout_while(front, pause, |front| !front.closing);
        let (front, _) = result.unwrap_or_else(PoisonError::into_inner);
        front.closing
    }

    /// The writer has ended: nothing more becomes durable.
    pub(super) fn finish(&self) {
        lock(&self.front).closing = true;
        self.room.notify_waiters();
        *lock(&self.durable) = None;
        let mut store = lock(&self.store);
        store.closed = true;
        store.tail.close();
    }
}
