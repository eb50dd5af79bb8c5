//! How records lie in a segment file.
//!
//! A segment is a header and frames: `length u32, crc32 u32, body`. A body is a *mark* or a
//! *record*. A mark stands before every batch that was written and synced together: where a whole
//! mark is found, everything before it was durable. That tells a torn batch (no mark follows: it
//! was never acknowledged, cut it) from damage (a mark follows: do not touch it). A record's head
//! is binary, so that the index is rebuilt without parsing a single event; the event is JSON.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use jiff::Timestamp;

use crate::model::{Event, Record, ReplId, SubmissionId, UserId};

/// Longest frame. A submission's code is at most 8 MiB and JSON's escapes make it six times that.
pub(super) const MAX_FRAME: usize = 64 << 20;
/// Bytes of a segment's header.
pub(super) const HEADER: u64 = 20;
/// Bytes of a whole mark frame.
pub(super) const MARK: usize = PREFIX + MARK_BODY;

const MAGIC: &[u8; 8] = b"GANTRYJ1";
const PREFIX: usize = 8;
const MARK_BODY: usize = 16;
/// The body of a frame that covers what could not be read.
const COVER_MAGIC: &[u8; 8] = b"\x01\0GJGONE";
/// Shorter than this is no record.
pub(super) const SHORTEST_RECORD: u64 = (PREFIX + RECORD_HEAD) as u64;
/// Longest name of a user or repl: a DNS label.
const LONGEST_NAME: u8 = 63;
/// JSON text holds no NUL, so no event can contain a mark.
pub(super) const MARK_MAGIC: &[u8; 8] = b"\x01\0GJMARK";
const RECORD_KIND: u8 = 2;
const RECORD_HEAD: usize = 44;
const HAS_SUBMISSION: u8 = 1;
const HAS_SEQ: u8 = 2;
const RECEIVED: u8 = 4;
const REPLY: u8 = 8;
/// Read from the file at once while scanning.
const WINDOW: usize = 256 << 10;

/// How the JSON of a reply begins.
pub(super) const REPLY_TAG: &[u8] = b"{\"kind\":\"reply\",";

/// The JSON of an event behind its tag.
pub(super) fn without_tag<'a>(json: &'a [u8], tag: &[u8]) -> &'a [u8] {
    json.strip_prefix(tag).unwrap_or(json)
}

/// A segment's header.
pub(super) fn header(base: u64) -> [u8; HEADER as usize] {
    let mut bytes = [0; HEADER as usize];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&base.to_le_bytes());
    let crc = crc32fast::hash(&bytes[..16]);
    bytes[16..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The position that a header says; `None`: it is none.
pub(super) fn base_of(start: &[u8; HEADER as usize]) -> Option<u64> {
    let base = u64::from_le_bytes(fixed(start, 8));
    (*start == header(base)).then_some(base)
}

/// A frame of this length that readers pass over.
pub(super) fn cover(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    bytes[..4].copy_from_slice(&((len - PREFIX) as u32).to_le_bytes());
    bytes[PREFIX..PREFIX + 8].copy_from_slice(COVER_MAGIC);
    let crc = crc32fast::hash(&bytes[PREFIX..]);
    bytes[4..PREFIX].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The mark frame for this offset.
pub(super) fn mark(offset: u64) -> [u8; MARK] {
    let mut bytes = [0; MARK];
    bytes[..4].copy_from_slice(&(MARK_BODY as u32).to_le_bytes());
    bytes[PREFIX..PREFIX + 8].copy_from_slice(MARK_MAGIC);
    bytes[PREFIX + 8..].copy_from_slice(&offset.to_le_bytes());
    let crc = crc32fast::hash(&bytes[PREFIX..]);
    bytes[4..PREFIX].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// An event, serialised and summed before the lock is taken.
pub(super) struct Payload {
    json: Vec<u8>,
    crc: crc32fast::Hasher,
}

impl Payload {
    pub(super) fn of(event: &Event) -> serde_json::Result<Self> {
        let json = serde_json::to_vec(event)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&json);
        Ok(Self { json, crc })
    }

    /// Of an event that this version does not have.
    #[cfg(test)]
    pub(super) fn raw(json: &str) -> Self {
        let mut crc = crc32fast::Hasher::new();
        crc.update(json.as_bytes());
        Self {
            json: json.as_bytes().to_vec(),
            crc,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.json.len()
    }
}

/// Appends the record's frame to `out`.
pub(super) fn encode(out: &mut Vec<u8>, record: &Record, payload: Payload) {
    let user = record.user_id.as_str().as_bytes();
    let repl = record.repl_id.as_str().as_bytes();
    let body = RECORD_HEAD + user.len() + repl.len() + payload.json.len();
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    let flags = flag(record.submission_id.is_some(), HAS_SUBMISSION)
        | flag(record.seq.is_some(), HAS_SEQ)
        | flag(matches!(record.event, Event::Received { .. }), RECEIVED)
        | flag(matches!(record.event, Event::Reply(_)), REPLY);
    let start = out.len();
    out.reserve(PREFIX + body);
    out.extend_from_slice(&(body as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    // Names are DNS labels of at most 50 bytes.
    out.extend_from_slice(&[RECORD_KIND, flags, user.len() as u8, repl.len() as u8]);
    out.extend_from_slice(&record.position.to_le_bytes());
    out.extend_from_slice(&record.time.as_microsecond().to_le_bytes());
    out.extend_from_slice(&record.seq.unwrap_or(0).to_le_bytes());
    match &record.submission_id {
        Some(id) => out.extend_from_slice(id.as_bytes()),
        None => out.extend_from_slice(&[0; 16]),
    }
    out.extend_from_slice(user);
    out.extend_from_slice(repl);
    // The payload is summed first because it is known first.
    let mut crc = payload.crc;
    crc.update(&out[start + PREFIX..]);
    out.extend_from_slice(&payload.json);
    out[start + 4..start + PREFIX].copy_from_slice(&crc.finalize().to_le_bytes());
}

/// A record as it lies in the file.
#[derive(Debug)]
pub(super) struct Raw<'a> {
    pub(super) position: u64,
    pub(super) time: Timestamp,
    pub(super) submission: Option<SubmissionId>,
    pub(super) seq: Option<u64>,
    pub(super) received: bool,
    pub(super) reply: bool,
    pub(super) user: &'a str,
    pub(super) repl: &'a str,
    /// Empty in an outline.
    pub(super) json: &'a [u8],
    /// Set in an outline: where the JSON lies in the file, and the sum of the frame.
    pub(super) outline: Option<Outline>,
}

/// A record of which only the head was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Outline {
    pub(super) json: std::ops::Range<u64>,
    head: Vec<u8>,
    crc: u32,
}

impl Outline {
    /// Whether this is the sum of the whole frame; `json`: what was summed of the event.
    pub(super) fn is_whole(&self, mut json: crc32fast::Hasher) -> bool {
        json.update(&self.head);
        json.finalize() == self.crc
    }
}

impl Raw<'_> {
    /// The record with its event parsed. Its bytes are as they were written: where it is not understood, a
    /// newer version wrote it.
    pub(super) fn record(&self) -> Result<Record, String> {
        let mut event: Event = serde_json::from_slice(self.json)
            .map_err(|e| {
                format!(
                    "the event at position {} is of a kind that this version does not know, which a newer one wrote: {e}",
                    self.position
                )
            })?;
        if let Event::Reply(outcome) = &mut event {
            outcome.seq = self.seq;
        }
        Ok(Record {
            position: self.position,
            time: self.time,
            user_id: self.user.parse().map_err(|e| format!("{e}"))?,
            submission_id: self.submission,
            repl_id: self.repl.parse().map_err(|e| format!("{e}"))?,
            seq: self.seq,
            event,
        })
    }
}

/// Why a scan stopped before its end.
#[derive(Debug)]
pub(super) enum ScanError {
    /// The bytes are not a frame.
    Damage { offset: u64, cause: String },
    /// The file could not be read.
    Io(io::Error),
}

/// One step of a scan.
#[derive(Debug)]
pub(super) enum Frame<'a> {
    Mark,
    /// It covers what could not be read.
    Cover,
    /// Whole, and of a kind that this version does not know.
    Unknown,
    Record(Raw<'a>),
}

/// Reads frames one after the other, holding one window of the file.
pub(super) struct Scan<'f> {
    file: &'f File,
    at: u64,
    end: u64,
    window: Vec<u8>,
    window_at: u64,
    /// Of longer frames only the head is read.
    whole_up_to: usize,
}

impl<'f> Scan<'f> {
    /// Frames from `at`, which is a frame's start, up to `end`.
    pub(super) fn new(file: &'f File, at: u64, end: u64) -> Self {
        Self {
            file,
            at,
            end,
            window: Vec::new(),
            window_at: at,
            whole_up_to: MAX_FRAME,
        }
    }

    /// The same; of frames longer than this only the head is read.
    pub(super) fn outlined(file: &'f File, at: u64, end: u64, whole_up_to: usize) -> Self {
        Self {
            whole_up_to,
            ..Self::new(file, at, end)
        }
    }

    /// The next frame with its offset and length; `None` at the end.
    pub(super) fn next(&mut self) -> Result<Option<(u64, u64, Frame<'_>)>, ScanError> {
        let offset = self.at;
        if offset >= self.end {
            return Ok(None);
        }
        let damage = |cause: &str| ScanError::Damage {
            offset,
            cause: cause.to_owned(),
        };
        let prefix = self
            .bytes(PREFIX)?
            .ok_or_else(|| damage("a frame is cut short"))?;
        let len = u32::from_le_bytes(fixed(prefix, 0)) as usize;
        let crc = u32::from_le_bytes(fixed(prefix, 4));
        if !(MARK_BODY..=MAX_FRAME).contains(&len) {
            return Err(damage("a frame has an impossible length"));
        }
        let total = PREFIX + len;
        if len > self.whole_up_to {
            let end = self.end;
            let most = len.min(RECORD_HEAD + 2 * usize::from(u8::MAX));
            let Some(bytes) = self.bytes(PREFIX + most)? else {
                return Err(damage("a frame is cut short"));
            };
            if end - offset < total as u64 {
                return Err(damage("a frame is cut short"));
            }
            let body = &bytes[PREFIX..];
            if body.starts_with(COVER_MAGIC) {
                return Ok(Some((offset, total as u64, Frame::Cover)));
            }
            let head_end = head_end(body, len).map_err(damage)?;
            let mut raw = head(body, head_end).map_err(damage)?;
            let json = offset + (PREFIX + head_end) as u64;
            raw.outline = Some(Outline {
                json: json..offset + total as u64,
                head: body[..head_end].to_vec(),
                crc,
            });
            return Ok(Some((offset, total as u64, Frame::Record(raw))));
        }
        let Some(bytes) = self.bytes(total)? else {
            return Err(damage("a frame is cut short"));
        };
        // Counted here, while the borrow of the window lasts.
        let frame = parse(&bytes[PREFIX..], crc, offset).map_err(damage)?;
        Ok(Some((offset, total as u64, frame)))
    }

    /// The whole frame that `next` showed.
    pub(super) fn whole(&mut self, len: u64) -> Result<&[u8], ScanError> {
        let offset = self.at;
        self.bytes(len as usize)?.ok_or(ScanError::Damage {
            offset,
            cause: "a frame is cut short".to_owned(),
        })
    }

    /// Steps over the frame that `next` showed.
    pub(super) fn advance(&mut self, len: u64) {
        self.at += len;
    }

    /// `len` bytes at the current place; `None` when the end comes first.
    fn bytes(&mut self, len: usize) -> Result<Option<&[u8]>, ScanError> {
        if self.end - self.at < len as u64 {
            return Ok(None);
        }
        let inside = self.at - self.window_at;
        if inside + len as u64 > self.window.len() as u64 {
            let want = (self.end - self.at).min(WINDOW.max(len) as u64) as usize;
            self.window.resize(want, 0);
            self.file
                .read_exact_at(&mut self.window, self.at)
                .map_err(ScanError::Io)?;
            self.window_at = self.at;
        }
        let from = (self.at - self.window_at) as usize;
        Ok(Some(&self.window[from..from + len]))
    }
}

fn fixed<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn parse(body: &[u8], crc: u32, offset: u64) -> Result<Frame<'_>, &'static str> {
    const WRONG_SUM: &str = "a frame's checksum does not match its bytes";
    if body.len() == MARK_BODY && body.starts_with(MARK_MAGIC) {
        return if crc32fast::hash(body) == crc && fixed(body, 8) == offset.to_le_bytes() {
            Ok(Frame::Mark)
        } else {
            Err(WRONG_SUM)
        };
    }
    if body.starts_with(COVER_MAGIC) {
        return match crc32fast::hash(body) == crc {
            true => Ok(Frame::Cover),
            false => Err(WRONG_SUM),
        };
    }
    if body.first() != Some(&RECORD_KIND) && crc32fast::hash(body) == crc {
        return Ok(Frame::Unknown);
    }
    let head_end = head_end(body, body.len())?;
    let mut sum = crc32fast::Hasher::new();
    sum.update(&body[head_end..]);
    sum.update(&body[..head_end]);
    if sum.finalize() != crc {
        return Err(WRONG_SUM);
    }
    let mut raw = head(body, head_end)?;
    raw.json = &body[head_end..];
    Ok(Frame::Record(raw))
}

/// Where the head of a record ends whose body has this length.
fn head_end(body: &[u8], len: usize) -> Result<usize, &'static str> {
    if body.len() < RECORD_HEAD {
        return Err("a frame is neither a mark nor a record");
    }
    let end = RECORD_HEAD + usize::from(body[2]) + usize::from(body[3]);
    if len < end || body.len() < end {
        return Err("a frame is shorter than its head says");
    }
    Ok(end)
}

fn head(body: &[u8], head_end: usize) -> Result<Raw<'_>, &'static str> {
    if body[0] != RECORD_KIND {
        return Err("a frame is of a kind this version does not know");
    }
    let user_end = RECORD_HEAD + usize::from(body[2]);
    let flags = body[1];
    let text = |from, to| std::str::from_utf8(&body[from..to]).map_err(|_| "a name is not UTF-8");
    Ok(Raw {
        position: u64::from_le_bytes(fixed(body, 4)),
        time: Timestamp::from_microsecond(i64::from_le_bytes(fixed(body, 12)))
            .map_err(|_| "a time is out of range")?,
        seq: (flags & HAS_SEQ != 0).then(|| u64::from_le_bytes(fixed(body, 20))),
        submission: (flags & HAS_SUBMISSION != 0)
            .then(|| SubmissionId::from_bytes(fixed(body, 28))),
        received: flags & RECEIVED != 0,
        reply: flags & REPLY != 0,
        user: text(RECORD_HEAD, user_end)?,
        repl: text(user_end, head_end)?,
        json: &[],
        outline: None,
    })
}

/// What the head of a record says that is not whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) submission: Option<SubmissionId>,
    pub(super) user: UserId,
    pub(super) repl: ReplId,
    pub(super) time: Timestamp,
    pub(super) position: u64,
    pub(super) received: bool,
}

/// What can be told of the record that lies between these places and is not whole.
pub(super) fn head_of(file: &File, from: u64, to: u64) -> Option<Head> {
    let most = PREFIX + RECORD_HEAD + 2 * usize::from(u8::MAX);
    let mut bytes = vec![0; usize::try_from(to - from).ok()?.min(most)];
    file.read_exact_at(&mut bytes, from).ok()?;
    // Nothing else is as long: it may be the kind that was damaged.
    *bytes.get_mut(PREFIX)? = RECORD_KIND;
    let body = bytes.get(PREFIX..)?;
    let end = head_end(body, body.len()).ok()?;
    let raw = head(body, end).ok()?;
    // Where the flag is what was damaged, the id is there all the same.
    let id: [u8; 16] = fixed(body, 28);
    Some(Head {
        submission: (id != [0; 16]).then(|| SubmissionId::from_bytes(id)),
        user: raw.user.parse().ok()?,
        repl: raw.repl.parse().ok()?,
        time: raw.time,
        position: raw.position,
        received: raw.received,
    })
}

/// The first whole frame at or after `from`, if there is one. No text of a user can be taken for one: a
/// frame's length, and its kind, have bytes that JSON does not.
pub(super) fn find_frame(file: &File, from: u64, end: u64) -> io::Result<Option<u64>> {
    const LOOK: usize = PREFIX + RECORD_HEAD;
    let mut at = from;
    let mut window = Vec::new();
    while end.saturating_sub(at) >= MARK as u64 {
        let want = (end - at).min(WINDOW as u64) as usize;
        window.resize(want, 0);
        file.read_exact_at(&mut window, at)?;
        let last = want - MARK;
        for index in 0..=last {
            let offset = at + index as u64;
            if begins_frame(&window[index..], end - offset)
                && matches!(Scan::new(file, offset, end).next(), Ok(Some(_)))
            {
                return Ok(Some(offset));
            }
        }
        if at + want as u64 >= end {
            break;
        }
        // Windows overlap so that a frame across their border is seen.
        at += (want - LOOK.min(want - 1)) as u64;
    }
    Ok(None)
}

/// Whether a frame may begin with these bytes, of which `left` follow.
fn begins_frame(bytes: &[u8], left: u64) -> bool {
    let len = u32::from_le_bytes(fixed(bytes, 0)) as usize;
    if !(MARK_BODY..=MAX_FRAME).contains(&len) || (PREFIX + len) as u64 > left {
        return false;
    }
    let body = &bytes[PREFIX..];
    if body.starts_with(MARK_MAGIC) || body.starts_with(COVER_MAGIC) {
        return true;
    }
    let named = |length: Option<&u8>| length.is_some_and(|len| (1..=LONGEST_NAME).contains(len));
    body.first() == Some(&RECORD_KIND) && named(body.get(2)) && named(body.get(3))
}

/// Whether what lies from here to the end was written whole: its length ends there, or its sum is that of
/// all the bytes up to there. What a crash cut off is neither.
pub(super) fn was_whole(file: &File, from: u64, end: u64) -> io::Result<bool> {
    let Some(len) = (end - from)
        .checked_sub(PREFIX as u64)
        .filter(|len| (MARK_BODY as u64..=MAX_FRAME as u64).contains(len))
    else {
        return Ok(false);
    };
    let mut bytes = vec![0; PREFIX + len as usize];
    file.read_exact_at(&mut bytes, from)?;
    let said = u32::from_le_bytes(fixed(&bytes, 0));
    let crc = u32::from_le_bytes(fixed(&bytes, 4));
    // A page that was not written is empty.
    let ends = bytes.last() != Some(&0);
    Ok((u64::from(said) == len && ends) || parse(&bytes[PREFIX..], crc, from).is_ok())
}
