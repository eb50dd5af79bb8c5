//! What of the journal cannot be read: found, set aside, counted. The rest is as good as before.
//!
//! A start looks through the segments that it has no index of, and the last one. Where the bytes are no
//! frame it looks for the next one that is: what lies between is copied beside the journal and covered
//! by a frame that says so, so that every reader passes over it and no offset changes. A submission that
//! lost something and has no reply is set aside: it is answered `unavailable`, and is not run again from
//! half of what was recorded.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::JournalError;
use super::frame::{self, HEADER, Head, MAX_FRAME};
use super::index::{Entry, Known, Unfinished};
use super::store::lock;
use crate::model::SubmissionId;

/// Places told one by one; of more only the number.
const MOST_TOLD: usize = 1_000;

/// Folder of what was set aside, below the journal's.
const SET_ASIDE: &str = "set-aside";

/// Most bytes of what was set aside that are kept for somebody to look at.
const MOST_KEPT: u64 = 256 << 20;

/// A place of the journal that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub file: PathBuf,
    /// Where in it.
    pub offset: u64,
    /// How many bytes; 0: all of the file is missing.
    pub bytes: u64,
    /// What is wrong there.
    pub cause: String,
    /// The submission that it was about, where that is known.
    pub submission: Option<SubmissionId>,
}

impl Damage {
    /// The damage as users are told of it: without the file's name.
    fn told(&self) -> String {
        match self.bytes {
            0 => self.cause.clone(),
            bytes => format!("{bytes} bytes are not what was written: {}", self.cause),
        }
    }
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            file,
            offset,
            bytes,
            cause,
            submission,
        } = self;
        write!(f, "{}: ", file.display())?;
        if *bytes > 0 {
            write!(f, "{bytes} bytes at byte {offset}: ")?;
        }
        write!(f, "{cause}")?;
        match submission {
            Some(id) => write!(f, " (submission {id})"),
            None => Ok(()),
        }
    }
}

/// Every place that was found, once each.
#[derive(Debug, Default)]
pub(super) struct Register {
    places: Mutex<BTreeMap<(PathBuf, u64), Damage>>,
    /// Damaged files beside the segments that were replaced.
    replaced: Mutex<BTreeSet<PathBuf>>,
}

impl Register {
    /// Notes a place; whether it is new.
    pub(super) fn note(&self, damage: Damage) -> bool {
        let mut known = lock(&self.places);
        let place = (damage.file.clone(), damage.offset);
        if known.contains_key(&place) {
            return false;
        }
        metrics::counter!("gantry_journal_damaged_total").increment(1);
        if known.len() < MOST_TOLD {
            known.insert(place, damage);
        }
        true
    }

    /// The same of what a reader met.
    pub(super) fn met(&self, path: &Path, offset: u64, bytes: u64, cause: &str) {
        let damage = Damage {
            file: path.to_owned(),
            offset,
            bytes,
            cause: cause.to_owned(),
            submission: None,
        };
        let words = damage.to_string();
        if self.note(damage) {
            tracing::error!("the journal is damaged and the place is passed over: {words}");
        }
    }

    pub(super) fn all(&self) -> Vec<Damage> {
        lock(&self.places).values().cloned().collect()
    }

    /// Notes a file that holds nothing which the segments do not, or nothing that cannot be done without.
    pub(super) fn note_replaced(&self, file: &Path) {
        if lock(&self.replaced).insert(file.to_owned()) {
            metrics::counter!("gantry_journal_damaged_total").increment(1);
            tracing::warn!("{} was damaged and has been replaced", file.display());
        }
    }

    pub(super) fn replaced(&self) -> Vec<PathBuf> {
        lock(&self.replaced).iter().cloned().collect()
    }
}

/// What a start finds.
#[derive(Debug, Default)]
pub(super) struct Losses {
    pub(super) places: Vec<Damage>,
    /// Submissions that lost something, and what.
    suspects: HashMap<SubmissionId, String>,
    /// It is not known whose some of it was: records may come whose first one was lost.
    blind: bool,
    /// Whatever began before this position may have lost something.
    blind_before: u64,
    /// Submissions that ended, whose beginning is gone with a whole file.
    pub(super) gone: Vec<Entry>,
}

impl Losses {
    /// This part of a segment is no frame. `unfinished`: as of there.
    pub(super) fn lost(
        &mut self,
        path: &Path,
        offset: u64,
        bytes: u64,
        cause: &str,
        head: Option<Head>,
        unfinished: &mut Unfinished,
    ) {
        let submission = head.as_ref().and_then(|head| head.submission);
        let damage = Damage {
            file: path.to_owned(),
            offset,
            bytes,
            cause: cause.to_owned(),
            submission,
        };
        let why = damage.told();
        self.places.push(damage);
        // No record is as short.
        if bytes < frame::SHORTEST_RECORD {
            return;
        }
        let first = head.filter(|head| head.received);
        match (submission, first) {
            (Some(id), _) if unfinished.contains_key(&id) => {
                self.suspects.insert(id, why);
                return;
            }
            (Some(id), Some(head)) => {
                let known = Known::new(head.user, head.repl, head.time, head.position);
                unfinished.insert(id, known);
                self.suspects.insert(id, why.clone());
            }
            _ => {}
        }
        // Any part of the head may be what is damaged, so nobody can say whose it was: nothing that was under
        // way then is run from half of what was recorded.
        self.blind = true;
        for id in unfinished.keys() {
            self.suspects.entry(*id).or_insert_with(|| why.clone());
        }
    }

    /// A whole segment is not there; its index says what was in it. `next`: where the one behind it begins.
    pub(super) fn lost_segment(&mut self, path: &Path, entries: Option<Vec<Entry>>, next: u64) {
        let cause = "the file is missing, and the records in it with it".to_owned();
        let damage = Damage {
            file: path.to_owned(),
            offset: 0,
            bytes: 0,
            cause,
            submission: None,
        };
        let why = damage.told();
        self.places.push(damage);
        match entries {
            Some(entries) => {
                for entry in entries {
                    self.suspects.insert(entry.id, why.clone());
                    self.gone.push(entry);
                }
            }
            None => {
                self.blind = true;
                self.blind_before = self.blind_before.max(next);
            }
        }
    }

    /// A segment is shorter than it was; its old index says what was in it.
    pub(super) fn lost_end(&mut self, path: &Path, len: u64, before: u64, entries: Vec<Entry>) {
        let damage = Damage {
            file: path.to_owned(),
            offset: len,
            bytes: before - len,
            cause: "the end of the file is missing, and the records in it with it".to_owned(),
            submission: None,
        };
        let why = damage.told();
        self.places.push(damage);
        for entry in entries {
            if entry
                .extents
                .last()
                .is_some_and(|last| u64::from(last.to) > len)
            {
                self.suspects.insert(entry.id, why.clone());
            }
        }
    }

    /// Whether a record of a submission that is not known may be one whose first record was lost.
    pub(super) fn may_be_orphan(&self, id: SubmissionId) -> bool {
        self.blind || self.suspects.contains_key(&id)
    }

    /// This submission has lost its first record.
    pub(super) fn orphan(&mut self, id: SubmissionId) {
        let why = "its first record could not be read".to_owned();
        self.suspects.entry(id).or_insert(why);
    }

    /// Of those without a reply, the ones that lost something.
    pub(super) fn set_aside(&self, unfinished: &Unfinished) -> BTreeMap<SubmissionId, String> {
        let missing = "records of that time are missing".to_owned();
        let why = |id: &SubmissionId, known: &Known| {
            let suspected = self.suspects.get(id).cloned();
            suspected.or_else(|| (known.start < self.blind_before).then(|| missing.clone()))
        };
        unfinished
            .iter()
            .filter_map(|(id, known)| Some((*id, why(id, known)?)))
            .collect()
    }
}

/// Covers a part of a segment that is no frame, after keeping a copy of it.
pub(super) fn cover(file: &File, path: &Path, from: u64, to: u64) -> Result<(), JournalError> {
    if let Err(error) = keep_copy(file, path, from, to) {
        // The copy is for somebody to look at; nothing reads it again.
        tracing::warn!(
            "{} bytes at byte {from} of {} are not kept: {error}",
            to - from,
            path.display()
        );
    }
    let mut at = from;
    while at < to {
        // What is left over must itself have room for a frame.
        let most = (MAX_FRAME / 2) as u64;
        let len = if to - at > 2 * most { most } else { to - at };
        let written = file.write_all_at(&frame::cover(len as usize), at);
        written.map_err(|e| JournalError::io("cover a damaged part of", path, e))?;
        at += len;
    }
    file.sync_data()
        .map_err(|e| JournalError::io("cover a damaged part of", path, e))
}

fn keep_copy(file: &File, path: &Path, from: u64, to: u64) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new(".")).join(SET_ASIDE);
    std::fs::create_dir_all(&folder)?;
    let mut kept = 0;
    for entry in std::fs::read_dir(&folder)? {
        kept += entry?.metadata()?.len();
    }
    if kept + (to - from) > MOST_KEPT {
        return Err(io::Error::other(format!(
            "{} holds {kept} bytes already",
            folder.display()
        )));
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let mut bytes = vec![0; (to - from) as usize];
    file.read_exact_at(&mut bytes, from)?;
    let mut copy = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(folder.join(format!("{name}-{from}")))?;
    copy.write_all(&bytes)?;
    copy.sync_all()
}

/// Renames a damaged file beside the segments, as `set-aside`: another takes its place.
pub(super) fn rename_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = path.with_extension("set-aside");
    std::fs::rename(path, &aside)?;
    Ok(aside)
}

/// Puts right what a segment's header says, when it is not what its name says.
pub(super) fn mend_header(file: &File, path: &Path, base: u64) -> Result<(), JournalError> {
    file.write_all_at(&frame::header(base), 0)
        .and_then(|()| file.sync_data())
        .map_err(|e| JournalError::io("mend the header of", path, e))
}

/// Gives segments that have each other's names their own again; says which had not.
pub(super) fn mend_names(dir: &Path, bases: &[u64]) -> Result<Vec<Damage>, JournalError> {
    let mut wrong = Vec::new();
    for named in bases {
        let path = super::segment::segment_path(dir, *named);
        let mut start = [0; HEADER as usize];
        let read = File::open(&path).and_then(|file| file.read_exact_at(&mut start, 0));
        // Too short for one, or damaged: it is looked at later.
        if read.is_ok()
            && let Some(said) = frame::base_of(&start)
            && said != *named
        {
            wrong.push((*named, said));
        }
    }
    let free = |said: &u64| !bases.contains(said) || wrong.iter().any(|(named, _)| named == said);
    let once = |said: &u64| wrong.iter().filter(|(_, other)| other == said).count() == 1;
    let mut mended = Vec::new();
    let (right, lost): (Vec<_>, Vec<_>) =
        wrong.iter().partition(|(_, said)| free(said) && once(said));
    let path = |base: u64| super::segment::segment_path(dir, base);
    let rename = |from: &Path, to: &Path| {
        std::fs::rename(from, to).map_err(|e| JournalError::io("rename", from, e))
    };
    for (named, said) in &lost {
        // Another has this name: which of them is the right one cannot be told. It is not deleted.
        rename(&path(*named), &path(*named).with_extension("set-aside"))?;
        mended.push(misnamed(path(*named), *said, "it is set aside"));
    }
    for (named, _) in &right {
        rename(&path(*named), &path(*named).with_extension("renamed"))?;
    }
    for (named, said) in &right {
        rename(&path(*named).with_extension("renamed"), &path(*said))?;
        mended.push(misnamed(path(*named), *said, "it has its own name again"));
    }
    if !mended.is_empty() {
        super::disk::sync_folder(dir).map_err(|e| JournalError::io("write", dir, e))?;
    }
    Ok(mended)
}

fn misnamed(file: PathBuf, said: u64, done: &str) -> Damage {
    Damage {
        file,
        offset: 0,
        bytes: HEADER,
        cause: format!("its content is that of the segment that begins at {said}; {done}"),
        submission: None,
    }
}
