//! Segment files: found, checked and indexed at start; read afterwards.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::JournalError;
use super::frame::{self, Frame, HEADER, Raw, Scan, ScanError};
use super::index::{OpenIndex, SealedIndex, Unfinished, index_path};

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
    };
    let mut bases = list(dir)?;
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
            Some((index, unfinished)) => {
                found.unfinished = unfinished;
                index
            }
            None => {
                let index = scan(&file, &path, base, len, &mut found.unfinished)?.whole(&path)?;
                found.rebuilt += 1;
                SealedIndex::seal(&index, &found.unfinished, &path, len)?
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
    let scanned = scan(&file, &path, last, len, &mut found.unfinished)?;
    if let Some((offset, cause)) = &scanned.damage {
        found.torn = Some(cut_tail(&file, &path, *offset, len, cause)?);
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
            (_, Some("index-new" | REWRITTEN)) => extra.push((u64::MAX, path)),
            _ => {}
        }
    }
    bases.sort_unstable();
    for (base, path) in extra {
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

/// What a scan of a whole segment gave.
struct Scanned {
    index: OpenIndex,
    /// Where the last whole frame ends.
    end: u64,
    /// Where and why it stopped before the file's end.
    damage: Option<(u64, String)>,
}

impl Scanned {
    /// The index of a segment that must have no damage.
    fn whole(self, path: &Path) -> Result<OpenIndex, JournalError> {
        match self.damage {
            None => Ok(self.index),
            Some((offset, cause)) => Err(JournalError::damaged_segment(path, offset, cause)),
        }
    }
}

fn scan(
    file: &File,
    path: &Path,
    base: u64,
    len: u64,
    unfinished: &mut Unfinished,
) -> Result<Scanned, JournalError> {
    let mut start = vec![0; len.min(HEADER) as usize];
    file.read_exact_at(&mut start, 0)
        .map_err(|e| JournalError::io("read", path, e))?;
    if start != frame::header(base) {
        let cause = "its header is not that of this journal".to_owned();
        return Err(JournalError::damaged_segment(path, 0, cause));
    }
    let mut index = OpenIndex::default();
    let mut frames = Scan::new(file, HEADER, len);
    let mut end = HEADER;
    let damage = loop {
        let step = match frames.next() {
            Ok(None) => break None,
            Ok(Some((offset, length, frame))) => {
                let applied = match &frame {
                    Frame::Mark => Ok(()),
                    Frame::Record(raw) if raw.position < base.max(index.last_position + 1) => {
                        Err("a position is not larger than the one before".to_owned())
                    }
                    Frame::Record(raw) => index.apply_raw(unfinished, raw, offset, length),
                };
                if let Err(cause) = applied {
                    break Some((offset, cause));
                }
                length
            }
            Err(ScanError::Damage { offset, cause }) => break Some((offset, cause)),
            Err(ScanError::Io(e)) => return Err(JournalError::io("read", path, e)),
        };
        frames.advance(step);
        end += step;
    };
    Ok(Scanned { index, end, damage })
}

/// Cuts an unfinished batch. Refuses when something durable follows.
fn cut_tail(
    file: &File,
    path: &Path,
    offset: u64,
    len: u64,
    cause: &str,
) -> Result<TornTail, JournalError> {
    let mark =
        frame::find_mark(file, offset, len).map_err(|e| JournalError::io("read", path, e))?;
    if let Some(mark) = mark {
        let cause = format!("{cause}, and whole records follow at byte {mark}");
        return Err(JournalError::damaged_segment(path, offset, cause));
    }
    file.set_len(offset)
        .and_then(|()| file.sync_all())
        .map_err(|e| JournalError::io("cut", path, e))?;
    Ok(TornTail {
        file: path.to_owned(),
        offset,
        bytes: len - offset,
    })
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
            Ok(Some((_, length, Frame::Mark))) => length,
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
