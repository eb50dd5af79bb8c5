//! Where each submission's records lie, segment by segment.
//!
//! The segment being written has its index in memory. A sealed segment has its own in a file beside
//! it, of which only 8 bytes per submission and one checkpoint per 64 KiB stay in memory: a GiB of
//! journal costs a few MiB, and opening it reads no record.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::frame::Raw;
use super::{JournalError, SubmissionState};
use crate::model::{ReplId, SubmissionId, UserId};

const MAGIC: &[u8; 8] = b"GANTRYX2";
const PREFIX: usize = 16;
/// One place to start reading per this many bytes: about a tenth of a millisecond of scanning.
const CHECKPOINT_BYTES: u64 = 64 << 10;
/// Most extents of one submission in one segment. A usual submission has about ten records; one
/// with many more gets coarser extents, and readers skip what lies between.
const MAX_EXTENTS: usize = 32;

/// What is known of a submission.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub(super) user: UserId,
    pub(super) repl: ReplId,
    time_us: i64,
    /// The position of its `Received`.
    pub(super) start: u64,
    pub(super) last_seq: u64,
}

impl Known {
    pub(super) fn new(user: UserId, repl: ReplId, time: Timestamp, start: u64) -> Self {
        Self {
            user,
            repl,
            time_us: time.as_microsecond(),
            start,
            last_seq: 0,
        }
    }

    /// What was there of it is lost: it begins at this position.
    pub(super) fn begin_anew(&mut self, position: u64) {
        self.start = position;
        self.last_seq = 0;
    }

    pub(super) fn state(&self, ended: bool) -> SubmissionState {
        SubmissionState {
            user_id: self.user.clone(),
            repl_id: self.repl.clone(),
            // Every stored time came from a valid one.
            time: Timestamp::from_microsecond(self.time_us).unwrap_or(Timestamp::UNIX_EPOCH),
            position: self.start,
            last_seq: self.last_seq,
            ended,
        }
    }
}

/// Bytes `from..to` of a segment that hold records of one submission, maybe among others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Extent {
    pub(super) from: u32,
    pub(super) to: u32,
    /// The submission's last sequence number before this extent.
    pub(super) seq_before: u64,
}

/// One submission in one segment, as of that segment's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) id: SubmissionId,
    pub(super) known: Known,
    pub(super) ended: bool,
    /// The position of its last record up to there.
    pub(super) last: u64,
    pub(super) extents: Vec<Extent>,
}

impl Entry {
    fn add(&mut self, from: u32, to: u32, seq_before: u64) {
        match self.extents.last_mut() {
            Some(last) if last.to == from => last.to = to,
            _ => self.extents.push(Extent {
                from,
                to,
                seq_before,
            }),
        }
        if self.extents.len() > MAX_EXTENTS {
            self.extents = self
                .extents
                .chunks(2)
                .filter_map(|pair| {
                    let (first, last) = (pair.first()?, pair.last()?);
                    Some(Extent {
                        to: last.to,
                        ..*first
                    })
                })
                .collect();
        }
    }
}

/// Received and not ended, as far as it is durable.
pub(super) type Unfinished = HashMap<SubmissionId, Known>;

/// The position of the first record at or after an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    position: u64,
    offset: u32,
}

/// The record at the last checkpoint at or before `position`; `start` when there is none.
fn seek(checkpoints: &[Checkpoint], position: u64, start: u64) -> u64 {
    let after = checkpoints.partition_point(|c| c.position <= position);
    match after.checked_sub(1).and_then(|i| checkpoints.get(i)) {
        Some(checkpoint) => u64::from(checkpoint.offset),
        None => start,
    }
}

/// What the index needs of a record.
pub(super) struct Indexed<'a> {
    pub(super) position: u64,
    pub(super) time: Timestamp,
    pub(super) submission: Option<SubmissionId>,
    pub(super) seq: Option<u64>,
    pub(super) received: bool,
    pub(super) reply: bool,
    pub(super) user: &'a UserId,
    pub(super) repl: &'a ReplId,
}

/// The index of the segment being written.
#[derive(Debug, Default)]
pub(super) struct OpenIndex {
    entries: HashMap<SubmissionId, Entry>,
    checkpoints: Vec<Checkpoint>,
    pub(super) users: HashMap<UserId, u64>,
    pub(super) last_position: u64,
}

impl OpenIndex {
    /// Counts a record that lies at `at`.
    fn count(&mut self, position: u64, user: &UserId, at: u64, len: u64) {
        self.last_position = position;
        match self.users.get_mut(user) {
            Some(bytes) => *bytes += len,
            None => {
                self.users.insert(user.clone(), len);
            }
        }
        let due = match self.checkpoints.last() {
            Some(last) => at - u64::from(last.offset) >= CHECKPOINT_BYTES,
            None => true,
        };
        if due {
            self.checkpoints.push(Checkpoint {
                position,
                offset: at as u32,
            });
        }
    }

    /// Takes in a record that an older index has, with what that one says of its submission.
    pub(super) fn carry(
        &mut self,
        raw: &Raw<'_>,
        old: Option<&Entry>,
        at: u64,
        len: u64,
    ) -> Result<(), String> {
        let user = raw.user.parse().map_err(|e| format!("{e}"))?;
        self.count(raw.position, &user, at, len);
        let Some(old) = old else { return Ok(()) };
        let entry = self.entries.entry(old.id).or_insert_with(|| {
            let before = old.extents.first().map_or(0, |first| first.seq_before);
            Entry {
                known: Known {
                    last_seq: before,
                    ..old.known.clone()
                },
                ended: false,
                last: 0,
                extents: Vec::new(),
                ..old.clone()
            }
        });
        let seq_before = entry.known.last_seq;
        entry.known.last_seq = raw.seq.unwrap_or(seq_before);
        entry.ended = raw.reply;
        entry.last = raw.position;
        entry.add(at as u32, (at + len) as u32, seq_before);
        Ok(())
    }

    /// Takes in a record found while scanning.
    pub(super) fn apply_raw(
        &mut self,
        unfinished: &mut Unfinished,
        raw: &Raw<'_>,
        at: u64,
        len: u64,
    ) -> Result<(), String> {
        let user = raw.user.parse().map_err(|e| format!("{e}"))?;
        let repl = raw.repl.parse().map_err(|e| format!("{e}"))?;
        let record = Indexed {
            position: raw.position,
            time: raw.time,
            submission: raw.submission,
            seq: raw.seq,
            received: raw.received,
            reply: raw.reply,
            user: &user,
            repl: &repl,
        };
        self.apply(unfinished, &record, at, len);
        Ok(())
    }

    /// Takes in a record that lies at `at`.
    pub(super) fn apply(
        &mut self,
        unfinished: &mut Unfinished,
        record: &Indexed<'_>,
        at: u64,
        len: u64,
    ) {
        // Segments end far below 4 GiB (`JournalOptions::segment_bytes` is bounded).
        let (from, to) = (at as u32, (at + len) as u32);
        self.count(record.position, record.user, at, len);
        let Some(id) = record.submission else { return };
        if record.received {
            let known = Known::new(
                record.user.clone(),
                record.repl.clone(),
                record.time,
                record.position,
            );
            // An id comes again only after its records were deleted for age.
            self.entries.remove(&id);
            unfinished.insert(id, known);
        }
        let Some(known) = unfinished.get_mut(&id) else {
            return;
        };
        let seq_before = known.last_seq;
        known.last_seq = record.seq.unwrap_or(seq_before);
        let entry = self.entries.entry(id).or_insert_with(|| Entry {
            id,
            known: known.clone(),
            ended: false,
            last: 0,
            extents: Vec::new(),
        });
        entry.known.last_seq = known.last_seq;
        entry.ended = record.reply;
        entry.last = record.position;
        entry.add(from, to, seq_before);
        if record.reply {
            unfinished.remove(&id);
        }
    }

    pub(super) fn forget(&mut self, id: SubmissionId) {
        self.entries.remove(&id);
    }

    pub(super) fn entry(&self, id: SubmissionId) -> Option<&Entry> {
        self.entries.get(&id)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.checkpoints.is_empty()
    }

    pub(super) fn seek(&self, position: u64, start: u64) -> u64 {
        seek(&self.checkpoints, position, start)
    }
}

/// The part of a sealed index that stays in memory.
#[derive(Debug, Serialize, Deserialize)]
struct Resident {
    segment_len: u64,
    last_position: u64,
    entries_len: u64,
    checkpoints: Vec<Checkpoint>,
    /// (fingerprint, offset of the entry), sorted.
    slots: Vec<(u32, u32)>,
    /// Bytes of each user's records.
    users: Vec<(UserId, u64)>,
    unfinished: Vec<(SubmissionId, Known)>,
}

#[derive(Debug)]
enum Entries {
    File(File),
    /// The index file could not be written; the next start rebuilds it.
    Memory(Vec<u8>, Unfinished),
}

/// Why an index file is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    /// It is not there, or is another segment's or an earlier version's: nothing is wrong with it.
    Other,
    /// Its bytes are not those that were written.
    Damaged,
}

/// The index of a sealed segment.
#[derive(Debug)]
pub(super) struct SealedIndex {
    path: PathBuf,
    entries: Entries,
    entries_at: u64,
    entries_len: u64,
    checkpoints: Vec<Checkpoint>,
    slots: Vec<(u32, u32)>,
    /// Bytes of each user's records.
    pub(super) users: HashMap<UserId, u64>,
    pub(super) last_position: u64,
}

/// 32 bits of an id's SHA-256: ids are chosen by clients, who must not be able to choose many that
/// share a fingerprint.
pub(super) fn fingerprint(id: SubmissionId) -> u32 {
    let digest = Sha256::digest(id.as_bytes());
    u32::from_le_bytes([digest[0], digest[1], digest[2], digest[3]])
}

/// The index file of a segment file.
pub(super) fn index_path(segment: &Path) -> PathBuf {
    segment.with_extension("index")
}

impl SealedIndex {
    /// Writes the index file. When that fails the index stays in memory and the failure is logged:
    /// it holds nothing that the segment does not.
    pub(super) fn seal(
        open: &OpenIndex,
        unfinished: &Unfinished,
        segment: &Path,
        segment_len: u64,
    ) -> Result<Self, JournalError> {
        let path = index_path(segment);
        let failed = |e: postcard::Error| {
            JournalError::io("serialise", &path, io::Error::other(e.to_string()))
        };
        let mut entries = Vec::new();
        let mut slots = Vec::with_capacity(open.entries.len());
        for entry in open.entries.values() {
            slots.push((fingerprint(entry.id), entries.len() as u32));
            let bytes = postcard::to_stdvec(entry).map_err(failed)?;
            entries.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
            entries.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            entries.extend_from_slice(&bytes);
        }
        slots.sort_unstable();
        let resident = Resident {
            segment_len,
            last_position: open.last_position,
            entries_len: entries.len() as u64,
            checkpoints: open.checkpoints.clone(),
            slots,
            users: open.users.iter().map(|(u, b)| (u.clone(), *b)).collect(),
            unfinished: unfinished
                .iter()
                .map(|(id, known)| (*id, known.clone()))
                .collect(),
        };
        let head = postcard::to_stdvec(&resident).map_err(failed)?;
        let mut file = Vec::with_capacity(PREFIX + head.len() + entries.len());
        file.extend_from_slice(MAGIC);
        file.extend_from_slice(&(head.len() as u32).to_le_bytes());
        file.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
        file.extend_from_slice(&head);
        file.extend_from_slice(&entries);
        // Not synced: its checksum and the segment's length say whether it is whole.
        let temporary = path.with_extension("index-new");
        let written = std::fs::write(&temporary, &file)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .and_then(|()| File::open(&path));
        let entries = match written {
            Ok(file) => Entries::File(file),
            Err(error) => {
                tracing::warn!(
                    "cannot write {}: {error}; it stays in memory and is rebuilt at the next start",
                    path.display()
                );
                Entries::Memory(entries, unfinished.clone())
            }
        };
        Ok(Self::from_resident(path, entries, (PREFIX + head.len()) as u64, resident).0)
    }

    /// The index file of a segment, with the submissions unfinished at the segment's end. All of it is looked at:
    /// an entry is read later, when nothing can be put in the place of one that is damaged.
    pub(super) fn load(segment: &Path, segment_len: u64) -> Result<(Self, Unfinished), Unusable> {
        let (index, unfinished, _) = Self::load_of(segment, Some(segment_len))?;
        Ok((index, unfinished))
    }

    fn load_of(
        segment: &Path,
        segment_len: Option<u64>,
    ) -> Result<(Self, Unfinished, u64), Unusable> {
        let path = index_path(segment);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Unusable::Other,
            _ => Unusable::Damaged,
        })?;
        let damaged = |_| Unusable::Damaged;
        let len = file.metadata().map_err(damaged)?.len();
        let mut prefix = [0; PREFIX];
        file.read_exact_at(&mut prefix, 0).map_err(damaged)?;
        if &prefix[..8] != MAGIC {
            return Err(match prefix[..7] == MAGIC[..7] && prefix[7] < MAGIC[7] {
                true => Unusable::Other,
                false => Unusable::Damaged,
            });
        }
        let head_len = u32::from_le_bytes([prefix[8], prefix[9], prefix[10], prefix[11]]);
        let crc = u32::from_le_bytes([prefix[12], prefix[13], prefix[14], prefix[15]]);
        let entries_at = PREFIX as u64 + u64::from(head_len);
        if entries_at > len {
            return Err(Unusable::Damaged);
        }
        let mut head = vec![0; head_len as usize];
        file.read_exact_at(&mut head, PREFIX as u64)
            .map_err(damaged)?;
        if crc32fast::hash(&head) != crc {
            return Err(Unusable::Damaged);
        }
        let resident: Resident = postcard::from_bytes(&head).map_err(|_| Unusable::Damaged)?;
        if entries_at + resident.entries_len != len {
            return Err(Unusable::Damaged);
        }
        let mut entries = vec![0; resident.entries_len as usize];
        file.read_exact_at(&mut entries, entries_at)
            .map_err(damaged)?;
        if !are_whole(&entries, resident.slots.len()) {
            return Err(Unusable::Damaged);
        }
        if segment_len.is_some_and(|len| resident.segment_len != len) {
            return Err(Unusable::Other);
        }
        let len = resident.segment_len;
        let entries = Entries::File(file);
        let (index, unfinished) = Self::from_resident(path, entries, entries_at, resident);
        Ok((index, unfinished, len))
    }

    /// The index file of a segment that is not as it was, and how long that was.
    pub(super) fn load_any(segment: &Path) -> Option<(Self, u64)> {
        let (index, _, len) = Self::load_of(segment, None).ok()?;
        Some((index, len))
    }

    /// Whether the index file is as it was written; one that could not be written is in memory.
    pub(super) fn is_whole(&self, segment: &Path, segment_len: u64) -> bool {
        match &self.entries {
            Entries::Memory(..) => true,
            Entries::File(_) => Self::load(segment, segment_len).is_ok(),
        }
    }

    fn from_resident(
        path: PathBuf,
        entries: Entries,
        entries_at: u64,
        resident: Resident,
    ) -> (Self, Unfinished) {
        let index = Self {
            path,
            entries,
            entries_at,
            entries_len: resident.entries_len,
            checkpoints: resident.checkpoints,
            slots: resident.slots,
            users: resident.users.into_iter().collect(),
            last_position: resident.last_position,
        };
        (index, resident.unfinished.into_iter().collect())
    }

    /// Received and not ended at the segment's end. `None` when the index file was lost.
    pub(super) fn unfinished(&self, segment: &Path, segment_len: u64) -> Option<Unfinished> {
        match &self.entries {
            Entries::Memory(_, unfinished) => Some(unfinished.clone()),
            Entries::File(_) => {
                let loaded = Self::load(segment, segment_len).ok()?;
                Some(loaded.1)
            }
        }
    }

    /// Every submission that is here.
    pub(super) fn all(&self) -> Result<Vec<Entry>, JournalError> {
        let offsets = self.slots.iter().map(|(_, offset)| u64::from(*offset));
        offsets.map(|offset| self.entry_at(offset)).collect()
    }

    /// Whether a submission with this fingerprint may be here; wrong once in billions, and only
    /// towards yes.
    pub(super) fn may_hold(&self, wanted: u32) -> bool {
        let at = self.slots.partition_point(|(found, _)| *found < wanted);
        self.slots
            .get(at)
            .is_some_and(|(found, _)| *found == wanted)
    }

    /// The submission's entry. Reads the file when the fingerprint matches.
    pub(super) fn entry(&self, id: SubmissionId) -> Result<Option<Entry>, JournalError> {
        let wanted = fingerprint(id);
        let first = self.slots.partition_point(|(found, _)| *found < wanted);
        for (found, offset) in &self.slots[first..] {
            if *found != wanted {
                break;
            }
            let entry = self.entry_at(u64::from(*offset))?;
            if entry.id == id {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn entry_at(&self, offset: u64) -> Result<Entry, JournalError> {
        let damaged = |cause: &str| {
            JournalError::damaged_index(&self.path, self.entries_at + offset, cause.to_owned())
        };
        let head = self.read(offset, 8)?;
        let crc = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let len = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        if offset + 8 + len > self.entries_len {
            return Err(damaged("an entry is longer than the file"));
        }
        let bytes = self.read(offset + 8, len as usize)?;
        if crc32fast::hash(&bytes) != crc {
            return Err(damaged("an entry's checksum does not match its bytes"));
        }
        postcard::from_bytes(&bytes).map_err(|e| damaged(&e.to_string()))
    }

    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, JournalError> {
        let mut out = vec![0; len];
        let done = match &self.entries {
            Entries::File(file) => file.read_exact_at(&mut out, self.entries_at + offset),
            Entries::Memory(all, _) => match all.get(offset as usize..offset as usize + len) {
                Some(part) => {
                    out.copy_from_slice(part);
                    Ok(())
                }
                None => Err(io::ErrorKind::UnexpectedEof.into()),
            },
        };
        done.map_err(|e| JournalError::io("read", &self.path, e))?;
        Ok(out)
    }

    pub(super) fn seek(&self, position: u64, start: u64) -> u64 {
        seek(&self.checkpoints, position, start)
    }
}

/// Whether these are so many entries, each with the bytes that its checksum is of.
fn are_whole(entries: &[u8], count: usize) -> bool {
    let mut rest = entries;
    for _ in 0..count {
        let Some((head, behind)) = rest.split_first_chunk::<8>() else {
            return false;
        };
        let crc = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        match behind.split_at_checked(len) {
            Some((entry, behind)) if crc32fast::hash(entry) == crc => rest = behind,
            _ => return false,
        }
    }
    rest.is_empty()
}
