//! The newest durable records in memory, so that following live reads no disk.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use tokio::sync::watch;

use super::pieces::LARGE;
use crate::model::{Record, SubmissionId};

/// Bytes of records kept. A live follower needs only what came since it last looked, fractions of a
/// second; this is seconds of a full load and small beside the rest of the server.
const TAIL_BYTES: usize = 4 << 20;
/// Most records, so that many tiny ones stay bounded as well.
const TAIL_RECORDS: usize = 16 << 10;

#[derive(Default)]
pub(super) struct Tail {
    /// Every record, by position.
    all: VecDeque<(Arc<Record>, usize)>,
    bytes: usize,
    /// The streamed ones among them, by submission.
    streams: HashMap<SubmissionId, VecDeque<(Arc<Record>, usize)>>,
    /// Who waits for a submission's next record; told its sequence number.
    followers: HashMap<SubmissionId, watch::Sender<u64>>,
}

impl Tail {
    /// Takes in a record that has just become durable and wakes its followers.
    pub(super) fn push(&mut self, record: Arc<Record>, bytes: usize) {
        if let (Some(id), Some(seq)) = (record.submission_id, record.seq) {
            self.streams
                .entry(id)
                .or_default()
                .push_back((Arc::clone(&record), bytes));
            if let Some(follower) = self.followers.get(&id) {
                follower.send_replace(seq);
            }
        }
        self.all.push_back((record, bytes));
        self.bytes += bytes;
        while self.bytes > TAIL_BYTES || self.all.len() > TAIL_RECORDS {
            self.forget_first();
        }
    }

    /// Forgets submissions that were deleted.
    pub(super) fn forget(&mut self, deleted: impl Fn(SubmissionId) -> bool) {
        self.streams.retain(|id, _| !deleted(*id));
        self.all
            .retain(|(record, _)| !record.submission_id.is_some_and(&deleted));
        self.bytes = self.all.iter().map(|(_, bytes)| bytes).sum();
    }

    fn forget_first(&mut self) {
        let Some((oldest, bytes)) = self.all.pop_front() else {
            return;
        };
        self.bytes -= bytes;
        let (Some(id), Some(_)) = (oldest.submission_id, oldest.seq) else {
            return;
        };
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.pop_front();
            if stream.is_empty() {
                self.streams.remove(&id);
            }
        }
    }

    /// The submission's records after `after_seq`, up to `max` of them and about `max_bytes`; `None`
    /// when the next one is not in memory, or so large that it is read from disk in pieces.
    pub(super) fn stream_after(
        &self,
        id: SubmissionId,
        after_seq: u64,
        max: usize,
        max_bytes: usize,
    ) -> Option<Vec<Arc<Record>>> {
        let stream = self.streams.get(&id)?;
        let first = stream.front()?.0.seq?;
        // Sequence numbers have no gaps: the place follows from the number.
        let skip = usize::try_from(after_seq.saturating_add(1).checked_sub(first)?).ok()?;
        let mut room = max_bytes;
        let mut out = Vec::new();
        for (record, bytes) in stream.iter().skip(skip).take(max) {
            if *bytes > LARGE || (*bytes > room && !out.is_empty()) {
                break;
            }
            room = room.saturating_sub(*bytes);
            out.push(Arc::clone(record));
        }
        (!out.is_empty()).then_some(out)
    }

    /// Records from this position on, up to `max_bytes` but at least one; `None` when the tail
    /// begins later.
    pub(super) fn from(&self, position: u64, max_bytes: usize) -> Option<Vec<Arc<Record>>> {
        let (first, _) = self.all.front()?;
        if first.position > position {
            return None;
        }
        let start = self
            .all
            .partition_point(|(record, _)| record.position < position);
        let mut room = max_bytes;
        let mut out = Vec::new();
        for (record, bytes) in self.all.iter().skip(start) {
            if *bytes > room && !out.is_empty() {
                break;
            }
            room = room.saturating_sub(*bytes);
            out.push(Arc::clone(record));
        }
        Some(out)
    }

    /// Waits for records of this submission.
    pub(super) fn subscribe(&mut self, id: SubmissionId) -> watch::Receiver<u64> {
        self.followers
            .entry(id)
            .or_insert_with(|| watch::channel(0).0)
            .subscribe()
    }

    /// Forgets the submission's followers when none is left.
    pub(super) fn unsubscribe(&mut self, id: SubmissionId) {
        if self
            .followers
            .get(&id)
            .is_some_and(|f| f.receiver_count() == 0)
        {
            self.followers.remove(&id);
        }
    }

    /// Wakes every follower for good: nothing more will come.
    pub(super) fn close(&mut self) {
        self.followers.clear();
    }
}
