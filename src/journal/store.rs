//! Everything that is durable: which segments there are and what is in them.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::JournalError;
use super::damage::Register;
use super::frame::{self, Frame, HEADER, Scan, ScanError};
use super::index::{Entry, Extent, Indexed, Unfinished, fingerprint};
use super::pieces::{Item, LARGE, LargeReply};
use super::segment::{self, Active, Sealed};
use super::tail::Tail;
use crate::model::{Event, Record, SubmissionId, UserId};

/// Locks, also after a panic of another holder: every holder leaves whole values behind.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What readers see; the writer alone changes it.
pub(super) struct Store {
    pub(super) sealed: Vec<Arc<Sealed>>,
    pub(super) active: Active,
    pub(super) unfinished: Unfinished,
    pub(super) tail: Tail,
    pub(super) durable: u64,
    pub(super) closed: bool,
    /// Users that lost records since the start, and before which position.
    pub(super) deleted_before: HashMap<UserId, u64>,
    /// What cannot be read.
    pub(super) damage: Arc<Register>,
}

/// A submission's records in one file.
struct Part {
    file: Arc<File>,
    path: PathBuf,
    entry: Entry,
    /// Where to begin.
    from: u64,
}

impl Store {
    /// Takes in records that lie, durable, from `at` on in the active segment.
    pub(super) fn publish(&mut self, records: &[(Arc<Record>, usize)], at: u64) {
        let mut at = at;
        for (record, len) in records {
            let indexed = Indexed {
                position: record.position,
                time: record.time,
                submission: record.submission_id,
                seq: record.seq,
                received: matches!(record.event, Event::Received { .. }),
                reply: matches!(record.event, Event::Reply(_)),
                user: &record.user_id,
                repl: &record.repl_id,
            };
            self.active
                .index
                .apply(&mut self.unfinished, &indexed, at, *len as u64);
            at += *len as u64;
            self.durable = record.position;
            self.tail.push(Arc::clone(record), *len);
        }
        self.active.len = at;
    }

    /// The position before which nothing is kept.
    pub(super) fn oldest(&self) -> u64 {
        self.sealed.first().map_or(self.active.base, |s| s.base)
    }

    /// The position from which everything of this user, or of everybody, is kept.
    pub(super) fn complete_from(&self, user: Option<&UserId>) -> u64 {
        let deleted = match user {
            Some(user) => self.deleted_before.get(user).copied(),
            None => self.deleted_before.values().max().copied(),
        };
        self.oldest().max(deleted.unwrap_or(0))
    }

    /// The submission's newest entry in memory, and the sealed segments that may hold an older one,
    /// newest first.
    fn candidates(&self, id: SubmissionId) -> (Option<Entry>, Vec<Arc<Sealed>>) {
        let wanted = fingerprint(id);
        let sealed = self.sealed.iter().rev();
        let sealed = sealed.filter(|s| s.index.may_hold(wanted));
        (
            self.active.index.entry(id).cloned(),
            sealed.cloned().collect(),
        )
    }
}

/// The submission as the durable records know it. Reads an index file when it is not recent.
pub(super) fn lookup(
    store: &Mutex<Store>,
    id: SubmissionId,
) -> Result<Option<Entry>, JournalError> {
    let (recent, sealed, oldest) = {
        let store = lock(store);
        let (recent, sealed) = store.candidates(id);
        (recent, sealed, store.oldest())
    };
    let mut newest = recent;
    let mut found_in = None;
    for segment in sealed {
        if newest.is_some() {
            break;
        }
        newest = segment.index.entry(id)?;
        found_in = Some(segment.base);
    }
    let Some(entry) = newest.filter(|entry| entry.known.start >= oldest) else {
        return Ok(None);
    };
    // A submission that lost its first record is forgotten whole.
    let holder = {
        let store = lock(store);
        match entry.known.start >= store.active.base {
            true => None,
            false => {
                let after = store
                    .sealed
                    .partition_point(|s| s.base <= entry.known.start);
                match after.checked_sub(1).and_then(|at| store.sealed.get(at)) {
                    Some(holder) => Some(Arc::clone(holder)),
                    None => return Ok(None),
                }
            }
        }
    };
    match holder {
        Some(holder) if found_in != Some(holder.base) => {
            let first = holder.index.entry(id)?;
            let same = first.is_some_and(|first| first.known.start == entry.known.start);
            Ok(same.then_some(entry))
        }
        _ => Ok(Some(entry)),
    }
}

/// Every part of a submission, oldest first. Reads index files. Nothing up to `position` is wanted.
fn parts(store: &Mutex<Store>, id: SubmissionId, position: u64) -> Result<Vec<Part>, JournalError> {
    let Some(newest) = lookup(store, id)? else {
        return Err(JournalError::Unknown);
    };
    let (recent, sealed, file, path, from) = {
        let store = lock(store);
        let (recent, sealed) = store.candidates(id);
        (
            recent,
            sealed,
            Arc::clone(&store.active.file),
            store.active.path.clone(),
            store.active.index.seek(position, HEADER),
        )
    };
    let mut parts = Vec::new();
    if let Some(entry) = recent {
        parts.push(Part {
            file,
            path,
            entry,
            from,
        });
    }
    for segment in sealed {
        // The same id of an earlier life, whose first records were deleted, is not this one.
        if let Some(entry) = segment.index.entry(id)?
            && entry.known.start == newest.known.start
        {
            parts.push(Part {
                file: Arc::clone(&segment.file),
                path: segment.path.clone(),
                entry,
                from: segment.index.seek(position, HEADER),
            });
        }
    }
    parts.reverse();
    Ok(parts)
}

/// What of a submission a page begins behind.
#[derive(Debug, Clone, Copy)]
pub(super) struct After {
    /// Streamed records behind this number; without it all of them.
    pub(super) seq: Option<u64>,
    /// Nothing up to there is wanted.
    pub(super) position: u64,
}

/// A submission's next durable records, until `max_bytes` are passed; a large reply is left on the
/// disk. Empty when there are none. Blocks.
pub(super) fn read_page(
    store: &Mutex<Store>,
    id: SubmissionId,
    after: After,
    max_bytes: usize,
) -> Result<Vec<Item>, JournalError> {
    let mut out = Vec::new();
    let mut bytes = 0;
    let register = Arc::clone(&lock(store).damage);
    for part in parts(store, id, after.position)? {
        if after
            .seq
            .is_some_and(|seq| part.entry.known.last_seq <= seq)
            || part.entry.last <= after.position
        {
            continue;
        }
        for extent in &part.entry.extents {
            let (from, to) = (u64::from(extent.from).max(part.from), u64::from(extent.to));
            let mut frames = Scan::outlined(&part.file, from, to, LARGE);
            loop {
                let damaged =
                    |offset, cause| JournalError::damaged_segment(&part.path, offset, cause);
                let failed = |e| match e {
                    ScanError::Damage { offset, cause } => damaged(offset, cause),
                    ScanError::Io(e) => JournalError::io("read", &part.path, e),
                };
                // It may be another's; of one that has ended, what is there is shown.
                let next = match frames.next() {
                    Err(ScanError::Damage { offset, cause }) => {
                        let place = (offset, to);
                        let (file, path) = (&part.file, &part.path);
                        segment::pass_over(&mut frames, file, path, place, &cause, &register)?;
                        continue;
                    }
                    next => next.map_err(failed)?,
                };
                let unknown = |offset, length, cause: &str| {
                    register.met(&part.path, offset, length, cause);
                };
                let (length, item) = match next {
                    None => break,
                    Some((_, length, Frame::Mark | Frame::Cover | Frame::Unknown)) => {
                        (length, None)
                    }
                    Some((offset, length, Frame::Record(raw))) => {
                        let wanted = raw.submission == Some(id)
                            && raw.position >= part.entry.known.start
                            && raw.position > after.position
                            && after
                                .seq
                                .is_none_or(|after| raw.seq.is_some_and(|s| s > after));
                        let item = match raw.outline.clone() {
                            _ if !wanted => None,
                            Some(outline) if raw.reply => Some(Item::Large(LargeReply {
                                file: Arc::clone(&part.file),
                                path: part.path.clone(),
                                seq: raw.seq,
                                position: raw.position,
                                outline,
                            })),
                            Some(_) => {
                                let mut whole = Scan::new(&part.file, offset, offset + length);
                                match whole.next().map_err(failed)? {
                                    Some((_, _, Frame::Record(raw))) => {
                                        let record = raw.record();
                                        let record = record
                                            .inspect_err(|cause| unknown(offset, length, cause));
                                        record.ok().map(|r| Item::Record(Box::new(r)))
                                    }
                                    _ => None,
                                }
                            }
                            None => {
                                let record = raw.record();
                                let record =
                                    record.inspect_err(|cause| unknown(offset, length, cause));
                                record.ok().map(|r| Item::Record(Box::new(r)))
                            }
                        };
                        (length, item)
                    }
                };
                frames.advance(length);
                if let Some(item) = item {
                    bytes += length as usize;
                    out.push(item);
                    if bytes >= max_bytes {
                        return Ok(out);
                    }
                }
            }
        }
    }
    Ok(out)
}

/// All of a submission's durable records, or why some of them cannot be read. Blocks.
pub(super) fn read_submission(
    store: &Mutex<Store>,
    id: SubmissionId,
) -> Result<Vec<Record>, JournalError> {
    let register = Arc::clone(&lock(store).damage);
    let mut out = Vec::new();
    for part in parts(store, id, 0)? {
        for Extent { from, to, .. } in &part.entry.extents {
            let (from, to) = (u64::from(*from), u64::from(*to));
            let mut frames = Scan::new(&part.file, from, to);
            loop {
                let damaged =
                    |offset, cause| JournalError::damaged_segment(&part.path, offset, cause);
                let length = match frames.next() {
                    Ok(None) => break,
                    Ok(Some((_, length, Frame::Mark | Frame::Cover | Frame::Unknown))) => length,
                    Ok(Some((offset, length, Frame::Record(raw)))) => {
                        if raw.submission == Some(id) && raw.position >= part.entry.known.start {
                            out.push(raw.record().map_err(|cause| damaged(offset, cause))?);
                        }
                        length
                    }
                    Err(ScanError::Damage { offset, cause }) => {
                        let place = (offset, to);
                        let (file, path) = (&part.file, &part.path);
                        let head = frame::head_of(file, offset, to);
                        segment::pass_over(&mut frames, file, path, place, &cause, &register)?;
                        // Among its records there may be others'; an id that nobody has is what is damaged.
                        let other = head.and_then(|head| head.submission);
                        let others = other
                            .is_some_and(|other| other != id && parts(store, other, 0).is_ok());
                        if !others {
                            return Err(damaged(offset, cause));
                        }
                        continue;
                    }
                    Err(ScanError::Io(e)) => return Err(JournalError::io("read", &part.path, e)),
                };
                frames.advance(length);
            }
        }
    }
    Ok(out)
}

/// Durable records from `position` on, at least one if there is one. Blocks.
pub(super) fn read_from(
    store: &Mutex<Store>,
    position: u64,
    max_bytes: usize,
) -> Result<Vec<Record>, JournalError> {
    let (sealed, active, durable) = {
        let store = lock(store);
        let active = &store.active;
        let at = active.index.seek(position, HEADER);
        let shown = (
            Arc::clone(&active.file),
            active.path.clone(),
            at,
            active.len,
            active.base,
        );
        let first = store
            .sealed
            .partition_point(|s| s.index.last_position < position);
        (store.sealed[first..].to_vec(), shown, store.durable)
    };
    let mut out = Vec::new();
    if position > durable {
        return Ok(out);
    }
    let register = Arc::clone(&lock(store).damage);
    let mut reading = Reading {
        position,
        max_bytes,
        bytes: 0,
        skipped: None,
        out: &mut out,
    };
    for segment in &sealed {
        let at = segment.index.seek(position, HEADER);
        let place = (at, segment.len);
        if !reading.take(&segment.file, &segment.path, place, &register)? {
            return Ok(out);
        }
    }
    reading.take(&active.0, &active.1, (active.2, active.3), &register)?;
    let skipped = reading.skipped;
    match skipped {
        // Whoever reads on must not ask for the same again.
        Some((path, offset, cause)) if out.is_empty() => {
            let error = JournalError::damaged_segment(&path, offset, cause);
            Err(error.resuming_at(Some(durable + 1)))
        }
        _ => Ok(out),
    }
}

/// Records being read in the order of the journal.
struct Reading<'a> {
    position: u64,
    max_bytes: usize,
    bytes: usize,
    /// The last place that was passed over.
    skipped: Option<(PathBuf, u64, String)>,
    out: &'a mut Vec<Record>,
}

impl Reading<'_> {
    /// Takes what one segment has; `false`: it is enough. What cannot be read is passed over and counted.
    fn take(
        &mut self,
        file: &File,
        path: &std::path::Path,
        (from, to): (u64, u64),
        register: &Register,
    ) -> Result<bool, JournalError> {
        let mut frames = Scan::new(file, from, to);
        loop {
            let length = match frames.next() {
                Ok(None) => return Ok(true),
                Ok(Some((_, length, Frame::Mark | Frame::Cover | Frame::Unknown))) => length,
                Ok(Some((offset, length, Frame::Record(raw)))) => {
                    if raw.position >= self.position {
                        if self.bytes > 0 && self.bytes + length as usize > self.max_bytes {
                            return Ok(false);
                        }
                        match raw.record() {
                            Ok(record) => {
                                self.out.push(record);
                                self.bytes += length as usize;
                            }
                            Err(cause) => {
                                register.met(path, offset, length, &cause);
                                self.skipped = Some((path.to_owned(), offset, cause));
                            }
                        }
                    }
                    if self.bytes >= self.max_bytes && self.bytes > 0 {
                        return Ok(false);
                    }
                    length
                }
                Err(ScanError::Damage { offset, cause }) => {
                    segment::pass_over(&mut frames, file, path, (offset, to), &cause, register)?;
                    self.skipped = Some((path.to_owned(), offset, cause));
                    continue;
                }
                Err(ScanError::Io(e)) => return Err(JournalError::io("read", path, e)),
            };
            frames.advance(length);
        }
    }
}
