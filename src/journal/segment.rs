//! Segment files: found, checked and indexed at start; read afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::damage::{self, Losses, Register};
use super::frame::{self, Frame, HEADER, MARK, Raw, Scan, ScanError};
use super::index::{Known, OpenIndex, SealedIndex, Unfinished, Unusable, index_path};
use super::{JournalError, chain};

/// A segment that is written no more.
#[derive(Debug)]
pub(super) struct Sealed {
    pub(super) base: u64,
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) len: u64,
    pub(super) index: SealedIndex,
}

/// The segment being written; `len` counts durable bytes only.
#[derive(Debug)]
pub(super) struct Active {
    pub(super) base: u64,
    pub(super) path: PathBuf,
    pub(super) file: Arc<File>,
    pub(super) len: u64,
    pub(super) index: OpenIndex,
}

/// A tail that was cut because its writing never finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TornTail {
    /// The file it was in.
    pub file: PathBuf,
    /// Where the last whole record ended.
    pub offset: u64,
    /// How many bytes were cut.
    pub bytes: u64,
}

/// What `open` found.
pub(super) struct Found {
    pub(super) sealed: Vec<Sealed>,
    /// `None` in an empty folder.
    pub(super) active: Option<Active>,
    pub(super) unfinished: Unfinished,
    pub(super) torn: Option<TornTail>,
    pub(super) rebuilt: usize,
    /// Damaged files beside the segments, which are replaced.
    pub(super) replaced: Vec<PathBuf>,
    pub(super) losses: Losses,
}

/// Extension of a segment that is being rewritten and has no name of its own yet.
pub(super) const REWRITTEN: &str = "rewritten";

/// The file of the segment that begins at `base`.
pub(super) fn segment_path(dir: &Path, base: u64) -> PathBuf {
    dir.join(format!("{base:020}.journal"))
}

/// Finds every segment, repairs the last one's end and loads or rebuilds the indexes.
pub(super) fn find(dir: &Path) -> Result<Found, JournalError> {
    let mut found = Found {
        sealed: Vec::new(),
        active: None,
        unfinished: Unfinished::new(),
        torn: None,
        rebuilt: 0,
        replaced: Vec::new(),
        losses: Losses::default(),
    };
    if chain::is_damaged(dir) {
        found.replaced.push(chain::path(dir));
    }
    let mut bases = list(dir)?;
    let misnamed = damage::mend_names(dir, &bases)?;
    if !misnamed.is_empty() {
        found.losses.places.extend(misnamed);
        bases = list(dir)?;
    }
    find_missing(dir, &bases, &mut found.losses);
    drop_unborn(dir, &mut bases, &mut found)?;
    let Some(last) = bases.pop() else {
        return Ok(found);
    };
    for base in bases {
        let path = segment_path(dir, base);
        if found
            .sealed
            .last()
            .is_some_and(|before| before.index.last_position >= base)
        {
            // A crash interrupted the keeper between writing this segment's records into the one
            // before it and removing this one.
            remove(&path)?;
            continue;
        }
        let file = open(&path)?;
        let len = file_len(&file, &path)?;
        let index = match SealedIndex::load(&path, len) {
            Ok((index, unfinished)) => {
                found.unfinished = unfinished;
                index
            }
            Err(unusable) => {
                if unusable == Unusable::Damaged {
                    found.replaced.push(index_path(&path));
                }
                if let Some((index, before)) = SealedIndex::load_any(&path)
                    && before > len
                    && let Ok(entries) = index.all()
                {
                    found.losses.lost_end(&path, len, before, entries);
                }
                let to = Scanning {
                    unfinished: &mut found.unfinished,
                    losses: &mut found.losses,
                };
                let scanned = scan(&file, &path, base, len, false, to)?;
                found.rebuilt += 1;
                SealedIndex::seal(&scanned.index, &found.unfinished, &path, len)?
            }
        };
        found.sealed.push(Sealed {
            base,
            path,
            file: Arc::new(file),
            len,
            index,
        });
    }
    let path = segment_path(dir, last);
    let file = open(&path)?;
    let len = file_len(&file, &path)?;
    let to = Scanning {
        unfinished: &mut found.unfinished,
        losses: &mut found.losses,
    };
    let scanned = scan(&file, &path, last, len, true, to)?;
    if scanned.end < len {
        found.torn = Some(cut_tail(&file, &path, scanned.end, len)?);
    }
    // The index of an earlier time, when this segment was not the last.
    let _ = std::fs::remove_file(index_path(&path));
    found.active = Some(Active {
        base: last,
        len: scanned.end,
        file: Arc::new(file),
        path,
        index: scanned.index,
    });
    Ok(found)
}

/// The bases of all segments, in order; files that belong to none are removed.
fn list(dir: &Path) -> Result<Vec<u64>, JournalError> {
    let failed = |e| JournalError::io("list", dir, e);
    let mut bases = Vec::new();
    let mut extra = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let base = path
            .file_stem()
            .and_then(|s| s.to_str())
            .and_then(|s| s.parse::<u64>().ok());
        match (base, path.extension().and_then(|e| e.to_str())) {
            (Some(base), Some("journal")) => bases.push(base),
            (Some(base), Some("index")) => extra.push((base, path)),
            (_, Some("index-new" | "new" | REWRITTEN)) => extra.push((u64::MAX, path)),
            _ => {}
        }
    }
    bases.sort_unstable();
    let known = chain::read(dir);
    for (base, path) in extra {
        // That of a segment which is missing says what was in it.
        if known.contains(&base) {
            continue;
        }
        if bases.binary_search(&base).is_err() {
            // Only tidiness: an orphan is never read.
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(bases)
}

/// A crash while a segment was being made leaves a file without a whole header: it never held a
/// record.
fn drop_unborn(dir: &Path, bases: &mut Vec<u64>, found: &mut Found) -> Result<(), JournalError> {
    let Some(&last) = bases.last() else {
        return Ok(());
    };
    let path = segment_path(dir, last);
    let file = open(&path)?;
    let len = file_len(&file, &path)?;
    let mut start = vec![0; len.min(HEADER) as usize];
    file.read_exact_at(&mut start, 0)
        .map_err(|e| JournalError::io("read", &path, e))?;
    if len <= HEADER && start != frame::header(last) {
        std::fs::remove_file(&path).map_err(|e| JournalError::io("remove", &path, e))?;
        found.torn = Some(TornTail {
            file: path,
            offset: 0,
            bytes: len,
        });
        bases.pop();
    }
    Ok(())
}

/// Removes a segment and its index.
pub(super) fn remove(path: &Path) -> Result<(), JournalError> {
    for path in [index_path(path), path.to_owned()] {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(JournalError::io("remove", &path, error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<File, JournalError> {
    File::options()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|e| JournalError::io("open", path, e))
}

fn file_len(file: &File, path: &Path) -> Result<u64, JournalError> {
    let metadata = file
        .metadata()
        .map_err(|e| JournalError::io("look at", path, e))?;
    Ok(metadata.len())
}

/// Segments that were there once and are not any more. What their indexes say of them, which are still
/// there, is used before they are removed.
fn find_missing(dir: &Path, bases: &[u64], losses: &mut Losses) {
    for base in chain::read(dir) {
        if bases.binary_search(&base).is_ok() {
            continue;
        }
        let path = segment_path(dir, base);
        let index = SealedIndex::load_any(&path);
        let entries = index.and_then(|(index, _)| index.all().ok());
        let next = bases.iter().find(|next| **next > base).copied();
        losses.lost_segment(&path, entries, next.unwrap_or(u64::MAX));
        let _ = std::fs::remove_file(index_path(&path));
    }
}

/// What a scan of a whole segment gave.
struct Scanned {
    index: OpenIndex,
    /// Where what is whole ends.
    end: u64,
}

/// What a scan adds to.
struct Scanning<'a> {
    unfinished: &'a mut Unfinished,
    losses: &'a mut Losses,
}

/// Indexes a segment. What is no frame is covered; of the last one (`may_be_torn`) what a crash cut off
/// is left.
fn scan(
    file: &File,
    path: &Path,
    base: u64,
    len: u64,
    may_be_torn: bool,
    to: Scanning<'_>,
) -> Result<Scanned, JournalError> {
    let Scanning { unfinished, losses } = to;
    let failed = |e| JournalError::io("read", path, e);
    let mut start = vec![0; len.min(HEADER) as usize];
    file.read_exact_at(&mut start, 0).map_err(failed)?;
    if start != frame::header(base) {
        let cause = "its header is damaged and is written again";
        losses.lost(path, 0, HEADER, cause, None, unfinished);
        damage::mend_header(file, path, base)?;
    }
    let len = len.max(HEADER);
    let mut index = OpenIndex::default();
    let mut frames = Scan::new(file, HEADER, len);
    let mut end = HEADER;
    loop {
        let (length, cause) = match frames.next() {
            Ok(None) => break,
            Ok(Some((_, length, Frame::Mark | Frame::Cover))) => (length, None),
            Ok(Some((_, length, Frame::Unknown))) => {
                tracing::warn!(
                    "{} has something at byte {end} that a newer version wrote; it is passed over",
                    path.display()
                );
                (length, None)
            }
            Ok(Some((offset, length, Frame::Record(raw)))) => {
                let backwards = raw.position < base.max(index.last_position + 1);
                let applied = match backwards {
                    true => Err("a position is not larger than the one before".to_owned()),
                    false => {
                        adopt(&raw, &index, unfinished, losses);
                        index.apply_raw(unfinished, &raw, offset, length)
                    }
                };
                (length, applied.err())
            }
            Err(ScanError::Damage { cause, .. }) => {
                let next = frame::find_frame(file, end + 1, len).map_err(failed)?;
                let whole = || frame::was_whole(file, end, len);
                if next.is_none() && may_be_torn && !whole().map_err(failed)? {
                    break;
                }
                (next.unwrap_or(len) - end, Some(cause))
            }
            Err(ScanError::Io(e)) => return Err(failed(e)),
        };
        if let Some(cause) = cause {
            let to = end + length;
            let head = frame::head_of(file, end, to);
            losses.lost(path, end, length, &cause, head, unfinished);
            match length >= MARK as u64 {
                true => damage::cover(file, path, end, to)?,
                // Too little for a frame: the end of a file that is written no more.
                false if !may_be_torn => {}
                false => break,
            }
        }
        frames.advance(length);
        end += length;
    }
    Ok(Scanned { index, end })
}

/// Rebuilds the index of a sealed segment. `unfinished`: the submissions that were unfinished at its beginning.
pub(super) fn index_again(
    segment: &Sealed,
    mut unfinished: Unfinished,
) -> Result<SealedIndex, JournalError> {
    let Sealed {
        file, path, len, ..
    } = segment;
    let mut index = OpenIndex::default();
    let mut frames = Scan::new(file, HEADER, *len);
    loop {
        let length = match frames.next() {
            Ok(None) => break,
            Ok(Some((_, length, Frame::Mark | Frame::Cover | Frame::Unknown))) => length,
            Ok(Some((offset, length, Frame::Record(raw)))) => {
                let applied = index.apply_raw(&mut unfinished, &raw, offset, length);
                applied.map_err(|cause| JournalError::damaged_segment(path, offset, cause))?;
                length
            }
            Err(ScanError::Damage { offset, cause }) => {
                return Err(JournalError::damaged_segment(path, offset, cause));
            }
            Err(ScanError::Io(e)) => return Err(JournalError::io("read", path, e)),
        };
        frames.advance(length);
    }
    SealedIndex::seal(&index, &unfinished, path, *len)
}

/// A record of a submission whose first one could not be read makes it known.
fn adopt(raw: &Raw<'_>, index: &OpenIndex, unfinished: &mut Unfinished, losses: &mut Losses) {
    let Some(id) = raw.submission.filter(|_| !raw.received) else {
        return;
    };
    if !losses.may_be_orphan(id) || unfinished.contains_key(&id) || index.entry(id).is_some() {
        return;
    }
    if let (Ok(user), Ok(repl)) = (raw.user.parse(), raw.repl.parse()) {
        unfinished.insert(id, Known::new(user, repl, raw.time, raw.position));
        losses.orphan(id);
    }
}

/// Cuts what a crash left unfinished.
fn cut_tail(file: &File, path: &Path, offset: u64, len: u64) -> Result<TornTail, JournalError> {
    file.set_len(offset)
        .and_then(|()| file.sync_all())
        .map_err(|e| JournalError::io("cut", path, e))?;
    Ok(TornTail {
        file: path.to_owned(),
        offset,
        bytes: len - offset,
    })
}

/// Passes over what is no frame: the bytes up to the next one, or to the end.
pub(super) fn pass_over(
    frames: &mut Scan<'_>,
    file: &File,
    path: &Path,
    (offset, end): (u64, u64),
    cause: &str,
    register: &Register,
) -> Result<(), JournalError> {
    let next = frame::find_frame(file, offset + 1, end);
    let next = next.map_err(|e| JournalError::io("read", path, e))?;
    let bytes = next.unwrap_or(end) - offset;
    register.met(path, offset, bytes, cause);
    frames.advance(bytes);
    Ok(())
}

/// Shows every record of `from..to` to `visit`, until it says stop (`false`).
pub(super) fn visit(
    file: &File,
    path: &Path,
    from: u64,
    to: u64,
    mut visit: impl FnMut(&Raw<'_>, u64) -> Result<bool, String>,
) -> Result<bool, JournalError> {
    let mut frames = Scan::new(file, from, to);
    loop {
        let length = match frames.next() {
            Ok(None) => return Ok(true),
            Ok(Some((_, length, Frame::Mark | Frame::Cover | Frame::Unknown))) => length,
            Ok(Some((offset, length, Frame::Record(raw)))) => match visit(&raw, length) {
                Ok(true) => length,
                Ok(false) => return Ok(false),
                Err(cause) => return Err(JournalError::damaged_segment(path, offset, cause)),
            },
            Err(ScanError::Damage { offset, cause }) => {
                return Err(JournalError::damaged_segment(path, offset, cause));
            }
            Err(ScanError::Io(e)) => return Err(JournalError::io("read", path, e)),
        };
        frames.advance(length);
    }
}
