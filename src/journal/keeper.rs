//! Keeps the journal within its space, so that a user's records cost that user's history only.
//!
//! One thread, woken when a segment is full. While all of it together is small enough nothing is
//! deleted. Past the bound every user's share is the same: the oldest ended submissions of those over
//! it go, and nobody else's. Segments hold everybody's records in the order they came, so what stays
//! is copied into a new file that takes the old ones' place. A crash leaves the old files or the new
//! one, and the next start knows which.
//!
//! A submission goes whole or stays whole: a reader that finds its first record finds all. Segments
//! are rewritten oldest first, so that a reply never goes before the record that asked for it: a
//! start that found that record alone would run the submission again. An unfinished submission stays.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::JournalError;
use super::disk::sync_folder;
use super::frame::{self, Frame, HEADER, MARK, Raw, Scan, ScanError};
use super::front::Shared;
use super::index::{Entry, OpenIndex, SealedIndex, Unfinished, fingerprint};
use super::memory::{DIGEST, Remembered};
use super::segment::{self, REWRITTEN, Sealed};
use super::store::{self, lock};
use super::writer::write_chain;
use crate::model::{Status, SubmissionId, UserId};

/// What is deleted at once beyond the bound, as a part of it: so that full segments are not copied
/// for each one that is written.
const SLACK: u64 = 8;
/// A segment smaller than this part of a full one is joined with its neighbours, so that the number
/// of files stays bounded.
const SMALL: u64 = 4;
/// Bytes copied between two marks.
const COPY: usize = 1 << 20;

/// Works until the writer ends.
pub(super) fn run(shared: &Shared, full: &mpsc::Receiver<()>) {
    while full.recv().is_ok() {
        while full.try_recv().is_ok() {}
        let sealed = lock(&shared.behind).sealed;
        let done = keep(shared).and_then(|()| shared.memory.trim());
        if let Err(error) = done {
            tracing::error!("the journal may grow past its bound: {error}");
        }
        // Also when it failed: that is no reason to take nothing in.
        lock(&shared.behind).looked_at = sealed;
        shared.looked.notify_all();
    }
}

/// The most that each may have so that all together have at most `room`: who has less keeps it, and
/// those who have more share what is left.
pub(super) fn level(amounts: impl Iterator<Item = u64>, room: u64) -> u64 {
    let mut amounts: Vec<u64> = amounts.collect();
    amounts.sort_unstable();
    let mut left = room;
    let mut users = amounts.len() as u64;
    for amount in amounts {
        let share = left / users;
        if amount > share {
            return share;
        }
        left -= amount;
        users -= 1;
    }
    u64::MAX
}

/// Up to where each user's ended submissions go.
type Floors = HashMap<UserId, u64>;

fn keep(shared: &Shared) -> Result<(), JournalError> {
    let (mut sealed, active) = {
        let store = lock(&shared.store);
        let active = &store.active;
        let active = (active.base, active.len, active.index.users.clone());
        (store.sealed.clone(), active)
    };
    let damaged = mend_indexes(shared, &mut sealed);
    let total = active.1 + sealed.iter().map(|s| s.len).sum::<u64>();
    let retain = shared.options.retain_bytes;
    let backlog = shared.options.backlog_bytes.max(retain);
    let needed_from = shared.needed_from.load(Ordering::Relaxed);
    let mut floors = Floors::new();
    if total > retain {
        floors = find_floors(&sealed, &active, retain, needed_from)?;
        if total > backlog {
            for (user, floor) in find_floors(&sealed, &active, backlog, u64::MAX)? {
                let lower = floors.entry(user).or_default();
                *lower = floor.max(*lower);
            }
        }
    }
    let mut pass = Pass {
        shared,
        floors,
        deleted: HashMap::new(),
        damaged,
        needed_from,
        unread_bytes: 0,
    };
    pass.choose(&sealed)?;
    pass.remember()?;
    let result = pass.rewrite(&sealed);
    pass.report();
    result
}

/// Rebuilds every damaged index: nothing is deleted by one, and the journal would grow without bound. Returns the
/// segments whose index cannot be rebuilt, by their first position.
fn mend_indexes(shared: &Shared, sealed: &mut [Arc<Sealed>]) -> HashSet<u64> {
    let mut damaged = HashSet::new();
    for at in 0..sealed.len() {
        let old = Arc::clone(&sealed[at]);
        if old.index.is_whole(&old.path, old.len) {
            continue;
        }
        let before = at.checked_sub(1).map(|before| &sealed[before]);
        // Submissions that were unfinished at its beginning. The indexes before this one are whole by now.
        let unfinished = match before {
            None => Some(Unfinished::new()),
            Some(before) => before.index.unfinished(&before.path, before.len),
        };
        let index = unfinished
            .ok_or_else(|| {
                let cause = "nor can the one before it be read".to_owned();
                JournalError::damaged_index(&old.path, 0, cause)
            })
            .and_then(|unfinished| segment::index_again(&old, unfinished));
        let index = match index {
            Ok(index) => index,
            Err(error) => {
                tracing::error!(
                    "the index of a segment cannot be rebuilt, so none of its records are deleted: {error}"
                );
                damaged.insert(old.base);
                continue;
            }
        };
        let fresh = Arc::new(Sealed {
            base: old.base,
            path: old.path.clone(),
            file: Arc::clone(&old.file),
            len: old.len,
            index,
        });
        let mut store = lock(&shared.store);
        store
            .damage
            .note_replaced(&super::index::index_path(&old.path));
        if let Some(known) = store.sealed.iter_mut().find(|s| Arc::ptr_eq(s, &old)) {
            *known = Arc::clone(&fresh);
        }
        drop(store);
        sealed[at] = fresh;
    }
    damaged
}

/// For every user with more than the share of `room`, the position before which enough lies to be
/// within it; never above `cap`.
fn find_floors(
    sealed: &[Arc<Sealed>],
    (base, _, newest): &(u64, u64, HashMap<UserId, u64>),
    room: u64,
    cap: u64,
) -> Result<Floors, JournalError> {
    let mut all = newest.clone();
    for segment in sealed {
        for (user, bytes) in &segment.index.users {
            *all.entry(user.clone()).or_default() += bytes;
        }
    }
    let share = level(all.values().copied(), room - room / SLACK);
    let mut floors = Floors::new();
    // The segment in which a user's share begins, and how much of that one belongs to it.
    let mut borders: HashMap<usize, HashMap<&str, u64>> = HashMap::new();
    for (user, _) in all.iter().filter(|(_, bytes)| **bytes > share) {
        let mut left = share.checked_sub(newest.get(user).copied().unwrap_or(0));
        if left.is_none() {
            floors.insert(user.clone(), cap.min(*base));
            continue;
        }
        for (index, segment) in sealed.iter().enumerate().rev() {
            let bytes = segment.index.users.get(user).copied().unwrap_or(0);
            let room = left.unwrap_or(0);
            left = room.checked_sub(bytes);
            if left.is_none() {
                borders
                    .entry(index)
                    .or_default()
                    .insert(user.as_str(), room);
                break;
            }
        }
    }
    for (index, users) in borders {
        let segment = &sealed[index];
        let mut lengths: HashMap<&str, Vec<(u64, u64)>> = HashMap::new();
        let collected = segment::visit(
            &segment.file,
            &segment.path,
            HEADER,
            segment.len,
            |raw, len| {
                if let Some((user, _)) = users.get_key_value(raw.user) {
                    lengths.entry(user).or_default().push((raw.position, len));
                }
                Ok(true)
            },
        );
        if let Err(error) = collected {
            tracing::error!("{error}");
        }
        for (user, mut room) in users {
            // Of a damaged segment nothing is counted: its border is the segment's end.
            let mut floor = segment.index.last_position + 1;
            for (position, len) in lengths.remove(user).into_iter().flatten().rev() {
                if len > room {
                    break;
                }
                room -= len;
                floor = position;
            }
            let user = user.parse().map_err(|_| JournalError::Unknown)?;
            floors.insert(user, cap.min(floor));
        }
    }
    Ok(floors)
}

/// One look through the journal.
struct Pass<'a> {
    shared: &'a Shared,
    floors: Floors,
    /// Submissions that go, by id, with the position of their first record.
    deleted: HashMap<SubmissionId, Deleted>,
    /// Segments that cannot be read, by their first position: they stay.
    damaged: HashSet<u64>,
    needed_from: u64,
    unread_bytes: u64,
}

struct Deleted {
    start: u64,
    remembered: Option<Remembered>,
    submission: [u8; DIGEST],
}

impl Pass<'_> {
    fn floor(&self, user: &UserId) -> u64 {
        self.floors.get(user).copied().unwrap_or(0)
    }

    /// Whether something in this segment may go.
    fn touches(&self, segment: &Sealed) -> bool {
        let mut users = segment.index.users.keys();
        !self.damaged.contains(&segment.base) && users.any(|user| self.floor(user) > segment.base)
    }

    /// Finds the submissions that go, and what is to be remembered of them.
    fn choose(&mut self, sealed: &[Arc<Sealed>]) -> Result<(), JournalError> {
        let touched: Vec<_> = sealed.iter().filter(|s| self.touches(s)).cloned().collect();
        for segment in &touched {
            for entry in segment.index.all()? {
                let floor = self.floor(&entry.known.user);
                if entry.known.start >= floor || self.deleted.contains_key(&entry.id) {
                    continue;
                }
                let newest = match entry.ended {
                    true => Some(entry.clone()),
                    false => match store::lookup(&self.shared.store, entry.id) {
                        Ok(newest) => newest,
                        Err(error) => {
                            // Where it goes on cannot be read: it stays whole.
                            tracing::debug!(submission_id = %entry.id, %error, "a submission is not deleted");
                            continue;
                        }
                    },
                };
                // One that is not found has lost its beginning already: the rest goes as well.
                if newest
                    .is_none_or(|n| n.known.start == entry.known.start && n.ended && n.last < floor)
                {
                    let deleted = Deleted {
                        start: entry.known.start,
                        remembered: None,
                        submission: [0; DIGEST],
                    };
                    self.deleted.insert(entry.id, deleted);
                }
            }
        }
        for segment in &touched {
            let deleted = &mut self.deleted;
            let seen = segment::visit(
                &segment.file,
                &segment.path,
                HEADER,
                segment.len,
                |raw, _| {
                    if let Some(deleted) = raw.submission.and_then(|id| deleted.get_mut(&id)) {
                        deleted.see(raw)?;
                    }
                    Ok(true)
                },
            );
            if let Err(error) = seen {
                tracing::error!("{error}; it is left as it is");
                self.damaged.insert(segment.base);
            }
        }
        for segment in sealed.iter().filter(|s| self.damaged.contains(&s.base)) {
            // What may be in a segment that stays, stays in the others.
            let index = &segment.index;
            self.deleted
                .retain(|id, _| !index.may_hold(fingerprint(*id)));
        }
        Ok(())
    }

    /// Writes down which ids ended. From here on none of them runs again, whatever becomes of its
    /// records.
    fn remember(&self) -> Result<(), JournalError> {
        let ended = self.deleted.values().filter_map(|d| d.remembered.clone());
        self.shared.memory.add(&ended.collect::<Vec<_>>())?;
        // Who takes a submission in holds this lock while looking for its id in both places.
        let front = lock(&self.shared.front);
        self.shared.memory.next_generation();
        drop(front);
        let mut store = lock(&self.shared.store);
        for (user, floor) in &self.floors {
            let lost = store.deleted_before.entry(user.clone()).or_default();
            *lost = (*floor).max(*lost);
        }
        let deleted = &self.deleted;
        store.tail.forget(|id| deleted.contains_key(&id));
        Ok(())
    }

    /// Rewrites, oldest first, what has something to lose, and joins small neighbours.
    fn rewrite(&mut self, sealed: &[Arc<Sealed>]) -> Result<(), JournalError> {
        let small = self.shared.options.segment_bytes / SMALL;
        let mut open: Option<Joined> = None;
        for segment in sealed {
            let touched = self.touches(segment);
            if self.damaged.contains(&segment.base) || !(touched || segment.len < small) {
                self.finish(open.take())?;
                continue;
            }
            let mut entries = HashMap::new();
            for entry in segment.index.all()? {
                entries.insert(entry.id, entry);
            }
            let mut kept = 0;
            let seen = segment::visit(
                &segment.file,
                &segment.path,
                HEADER,
                segment.len,
                |raw, len| {
                    let stays = !touched || self.stays(raw, &entries);
                    kept += if stays { len } else { 0 };
                    Ok(true)
                },
            );
            if let Err(error) = seen {
                tracing::error!("{error}; it is left as it is");
                self.finish(open.take())?;
                continue;
            }
            let most = self.shared.options.segment_bytes;
            if open
                .as_ref()
                .is_some_and(|o| o.len + kept + kept / COPY as u64 * MARK as u64 > most)
            {
                self.finish(open.take())?;
            }
            let mut joined = match open.take() {
                Some(joined) => joined,
                None => Joined::new(self.shared, segment)?,
            };
            self.copy(segment, touched, &entries, &mut joined)?;
            joined.inputs.push(Arc::clone(segment));
            joined.changed |= touched;
            if joined.index.is_empty() {
                // Nothing stays: the next one keeps its own name, which says where the journal begins.
                self.finish(Some(joined))?;
            } else {
                open = Some(joined);
            }
        }
        self.finish(open)
    }

    fn stays(&self, raw: &Raw<'_>, entries: &HashMap<SubmissionId, Entry>) -> bool {
        match raw.submission {
            None => {
                let user: Option<UserId> = raw.user.parse().ok();
                user.is_none_or(|user| raw.position >= self.floor(&user))
            }
            Some(id) => match (entries.get(&id), self.deleted.get(&id)) {
                (_, Some(deleted)) => raw.position < deleted.start,
                (Some(entry), None) => raw.position >= entry.known.start,
                // The rest of a submission whose beginning is gone.
                (None, None) => false,
            },
        }
    }

    fn copy(
        &mut self,
        segment: &Sealed,
        touched: bool,
        entries: &HashMap<SubmissionId, Entry>,
        to: &mut Joined,
    ) -> Result<(), JournalError> {
        let damaged = |e: ScanError| match e {
            ScanError::Damage { offset, cause } => {
                JournalError::damaged_segment(&segment.path, offset, cause)
            }
            ScanError::Io(e) => JournalError::io("read", &segment.path, e),
        };
        let mut frames = Scan::new(&segment.file, HEADER, segment.len);
        loop {
            let (len, stays) = match frames.next().map_err(damaged)? {
                None => return Ok(()),
                Some((_, len, Frame::Mark | Frame::Cover | Frame::Unknown)) => (len, false),
                Some((offset, len, Frame::Record(raw))) => {
                    let stays = !touched || self.stays(&raw, entries);
                    if stays {
                        to.begin_frame()?;
                        let old = raw.submission.and_then(|id| entries.get(&id));
                        to.index.carry(&raw, old, to.len, len).map_err(|cause| {
                            JournalError::damaged_segment(&segment.path, offset, cause)
                        })?;
                    } else if raw.position >= self.needed_from {
                        self.unread_bytes += len;
                    }
                    (len, stays)
                }
            };
            if stays {
                to.take(frames.whole(len).map_err(damaged)?);
            }
            frames.advance(len);
        }
    }

    /// Puts a new segment in the place of those it was made from.
    fn finish(&self, joined: Option<Joined>) -> Result<(), JournalError> {
        let Some(mut joined) = joined else {
            return Ok(());
        };
        let first = match joined.inputs.first() {
            Some(first) if joined.changed || joined.inputs.len() > 1 => Arc::clone(first),
            _ => return joined.abandon(),
        };
        let last = joined
            .inputs
            .last()
            .map_or_else(|| Arc::clone(&first), Arc::clone);
        let fresh = match joined.index.is_empty() {
            true => {
                joined.abandon()?;
                None
            }
            false => {
                joined.flush()?;
                // Read from the old file, whose place the new one takes.
                let unfinished = last.index.unfinished(&last.path, last.len);
                let mut unfinished: Unfinished = unfinished.ok_or_else(|| {
                    let cause = "it was removed or changed while the server ran".to_owned();
                    JournalError::damaged_index(&last.path, 0, cause)
                })?;
                let failed = |e| JournalError::io("write", &joined.temporary, e);
                joined.file.sync_all().map_err(failed)?;
                // A longer one beside a file would say that something of the file is lost.
                let index = super::index::index_path(&first.path);
                match std::fs::remove_file(&index) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(JournalError::io("remove", &index, error));
                    }
                    _ => {}
                }
                std::fs::rename(&joined.temporary, &first.path).map_err(failed)?;
                sync_folder(&self.shared.dir).map_err(failed)?;
                unfinished.retain(|id, _| !self.deleted.contains_key(id));
                let file = File::open(&first.path).map_err(failed)?;
                let index = SealedIndex::seal(&joined.index, &unfinished, &first.path, joined.len)?;
                Some(Arc::new(Sealed {
                    base: first.base,
                    path: first.path.clone(),
                    file: Arc::new(file),
                    len: joined.len,
                    index,
                }))
            }
        };
        {
            let mut store = lock(&self.shared.store);
            let at = store.sealed.iter().position(|s| Arc::ptr_eq(s, &first));
            let Some(at) = at else { return Ok(()) };
            let end = at + joined.inputs.len();
            store.sealed.splice(at..end, fresh.clone());
        }
        // Before they are removed: they are not missing then.
        write_chain(self.shared);
        let skip = usize::from(fresh.is_some());
        for old in joined.inputs.iter().skip(skip) {
            segment::remove(&old.path)?;
        }
        Ok(())
    }

    fn report(&self) {
        if self.unread_bytes > 0 {
            metrics::counter!("gantry_journal_unshipped_deleted_bytes_total")
                .increment(self.unread_bytes);
            tracing::error!(
                "{} bytes of the journal were deleted before they were shipped: the backlog is larger than the {} bytes it may have. They were of the users with the most; those records are lost to the search. Bring Elasticsearch back, or allow a larger backlog",
                self.unread_bytes,
                self.shared.options.backlog_bytes
            );
        }
        if !self.floors.is_empty() {
            tracing::info!(
                submissions = self.deleted.len(),
                users = self.floors.len(),
                "the oldest records of the users with the most were deleted: the journal was over its bound"
            );
        }
    }
}

impl Deleted {
    fn see(&mut self, raw: &Raw<'_>) -> Result<(), String> {
        #[derive(Deserialize)]
        struct Ending {
            status: Status,
        }
        let Some(id) = raw.submission.filter(|_| raw.position >= self.start) else {
            return Ok(());
        };
        if raw.received {
            self.submission = half(Sha256::digest(raw.json).as_slice());
        }
        if raw.reply {
            let ending: Ending = serde_json::from_slice(raw.json)
                .map_err(|e| format!("a reply has no status: {e}"))?;
            self.remembered = Some(Remembered {
                id,
                user: raw.user.to_owned(),
                repl: raw.repl.to_owned(),
                status: ending.status,
                ended_us: raw.time.as_microsecond(),
                submission: self.submission,
                reply: reply_digest(raw),
            });
        }
        Ok(())
    }
}

fn half(digest: &[u8]) -> [u8; DIGEST] {
    let mut out = [0; DIGEST];
    out.copy_from_slice(&digest[..DIGEST]);
    out
}

/// Of the reply as a client got it: without the tag of the event, with its place in the stream.
fn reply_digest(raw: &Raw<'_>) -> [u8; DIGEST] {
    let mut digest = Sha256::new();
    let members = frame::without_tag(raw.json, frame::REPLY_TAG);
    digest.update(b"{");
    digest.update(members.strip_suffix(b"}").unwrap_or(members));
    if let Some(seq) = raw.seq {
        digest.update(format!(",\"seq\":{seq}"));
    }
    digest.update(b"}");
    half(digest.finalize().as_slice())
}

/// A segment being made of others.
struct Joined {
    inputs: Vec<Arc<Sealed>>,
    /// Something of the inputs is not in it.
    changed: bool,
    temporary: PathBuf,
    file: File,
    pending: Vec<u8>,
    len: u64,
    /// Bytes since the last mark.
    unmarked: usize,
    index: OpenIndex,
}

impl Joined {
    fn new(shared: &Shared, first: &Sealed) -> Result<Self, JournalError> {
        let temporary = segment::segment_path(&shared.dir, first.base).with_extension(REWRITTEN);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(|e| JournalError::io("make", &temporary, e))?;
        Ok(Self {
            inputs: Vec::new(),
            changed: false,
            temporary,
            file,
            pending: frame::header(first.base).to_vec(),
            len: HEADER,
            unmarked: COPY,
            index: OpenIndex::default(),
        })
    }

    /// Makes room for the next frame: every so often a mark comes first.
    fn begin_frame(&mut self) -> Result<(), JournalError> {
        if self.unmarked < COPY {
            return Ok(());
        }
        self.flush()?;
        self.pending.extend_from_slice(&frame::mark(self.len));
        self.len += MARK as u64;
        self.unmarked = 0;
        Ok(())
    }

    fn take(&mut self, frame: &[u8]) {
        self.pending.extend_from_slice(frame);
        self.len += frame.len() as u64;
        self.unmarked += frame.len();
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        let written = self.file.write_all(&self.pending);
        self.pending.clear();
        written.map_err(|e| JournalError::io("write", &self.temporary, e))
    }

    fn abandon(&self) -> Result<(), JournalError> {
        std::fs::remove_file(&self.temporary)
            .map_err(|e| JournalError::io("remove", &self.temporary, e))
    }
}
