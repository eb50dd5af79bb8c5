//! Repls' data on the machine's disk: where they are, how much they take, and how they are removed.
//!
//! The kernel bounds what a repl writes only where the file system has quotas, which an ordinary machine's
//! has not. So it is counted, and who takes too much is stopped: see `releases/disk.rs`.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::beneath::{Folder, Usage};
use crate::model::{DiskBounds, Problem, ReplId, UserId};
use crate::platform::local::hidden::Hidden;
use crate::storage::DirectoryStore;

/// Files and folders that a repl's data may have. Counting more than these takes too long, and a file
/// system has only so many.
const MOST_ENTRIES: u64 = 100_000;

/// The part of the disk that stays free when nothing is said, and the most of it that this is.
const RESERVED_PART: u64 = 20;
const MOST_RESERVED: u64 = 1 << 30;

/// Counts that may be incomplete in a row, as when a program moves its folders meanwhile.
const MOST_INCOMPLETE: u32 = 3;

/// Why a repl with too much data is not started.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct TooMuch(String);

/// Repls' data on this machine's disk.
#[derive(Debug)]
pub struct Disk {
    folder: PathBuf,
    store: DirectoryStore,
    bounds: DiskBounds,
    known: Mutex<HashMap<ReplId, Known>>,
}

/// What was counted last of a repl.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    data: Option<u64>,
    code: Option<u64>,
    incomplete: u32,
}

impl Disk {
    /// Of a platform with this folder.
    pub fn new(data: &Path, store: DirectoryStore, bounds: DiskBounds) -> Self {
        Self {
            folder: data.join("databases"),
            store,
            bounds,
            known: Mutex::default(),
        }
    }

    /// The folder of a repl's data, ready for its next sandbox. Its owner changes with the sandbox, so all
    /// may write: the folder above it is closed to everybody but the server. What is in it is user code's,
    /// and the previous release may still be changing it.
    pub fn ready(&self, repl: &ReplId) -> anyhow::Result<PathBuf> {
        let all = self.all()?;
        let folder = all.make(repl.as_str(), None)?;
        if let Some(why) = self.count(repl, Hidden::default())? {
            return Err(TooMuch(why).into());
        }
        folder.set_mode(0o777)?;
        if let Err(error) = folder.open_to_all(MOST_ENTRIES) {
            // The previous release still moves its folders; what was missed is opened when it has ended.
            tracing::debug!(%repl, %error, "not all of a repl's data is open to its next release");
        }
        Ok(self.folder.join(repl.as_str()))
    }

    /// Opens what a release that has ended left to the one that runs.
    pub fn hand_over(&self, repl: &ReplId) -> io::Result<()> {
        match self.all()?.folder(repl.as_str()) {
            Ok(folder) => folder.open_to_all(MOST_ENTRIES),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn all(&self) -> io::Result<Folder> {
        let all = Folder::open_or_make(&self.folder, 0o700)?;
        all.set_mode(0o700)?;
        Ok(all)
    }

    /// Removes a repl's data. Nothing of the repl may run.
    pub fn delete(&self, repl: &ReplId) -> io::Result<()> {
        match self.all()?.remove(repl.as_str()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.with(repl, |known| (known.data, known.incomplete) = (Some(0), 0));
        Ok(())
    }

    /// Counts a repl's data, with what its program hides, and says what is wrong with them.
    pub fn count(&self, repl: &ReplId, hidden: Hidden) -> io::Result<Option<String>> {
        let usage = match self.all()?.folder(repl.as_str()) {
            Ok(folder) => folder.usage(MOST_ENTRIES),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Usage {
                complete: true,
                ..Usage::default()
            },
            Err(error) => return Err(error),
        };
        let bytes = usage.bytes + hidden.bytes;
        let complete = usage.complete && !hidden.incomplete;
        let incomplete = self.with(repl, |known| {
            known.incomplete = match complete {
                true => 0,
                false => known.incomplete + 1,
            };
            // What was seen before may only have been missed this time.
            known.data = match (complete, known.data) {
                (false, Some(before)) => Some(before.max(bytes)),
                _ => Some(bytes),
            };
            known.incomplete
        });
        Ok(if bytes > self.bounds.repl_bytes {
            let most = self.bounds.repl_bytes;
            Some(format!(
                "its data take {bytes} bytes, more than the {most} that a repl may have"
            ))
        } else if usage.entries > MOST_ENTRIES {
            Some(format!(
                "its data are more than {MOST_ENTRIES} files and folders"
            ))
        } else if incomplete >= MOST_INCOMPLETE && hidden.incomplete {
            Some(
                "its data cannot be counted: it has too many threads, open files and mappings"
                    .to_owned(),
            )
        } else if incomplete >= MOST_INCOMPLETE {
            Some("its data cannot be counted: folders are moved or closed all the time".to_owned())
        } else {
            None
        })
    }

    /// Bytes of a repl's data as they were counted last, or are now.
    pub fn data(&self, repl: &ReplId) -> io::Result<u64> {
        if let Some(known) = self.with(repl, |known| known.data) {
            return Ok(known);
        }
        self.count(repl, Hidden::default())?;
        Ok(self.with(repl, |known| known.data).unwrap_or(0))
    }

    /// Bytes of all data and code of these repls, which are one user's.
    pub fn of_user(&self, repls: &[ReplId]) -> io::Result<u64> {
        let mut bytes = 0;
        for repl in repls {
            let code = match self.with(repl, |known| known.code) {
                Some(code) => code,
                None => self.count_code(repl)?,
            };
            bytes += code + self.data(repl)?;
        }
        Ok(bytes)
    }

    fn count_code(&self, repl: &ReplId) -> io::Result<u64> {
        let code = self.store.usage(repl)?;
        self.with(repl, |known| known.code = Some(code));
        Ok(code)
    }

    /// Whether so many bytes of code may be added to a repl of this user's, whose all of these are.
    pub fn admit(
        &self,
        user: &UserId,
        repl: &ReplId,
        repls: &[ReplId],
        more: u64,
    ) -> io::Result<Result<(), Problem>> {
        let (free, reserve) = self.free()?;
        if free < reserve + more {
            return Ok(Err(Problem::new(
                "disk_full",
                "The machine's disk is nearly full",
                format!("{free} bytes are free, of which {reserve} stay free for Gantry itself"),
                "Delete what nobody needs (DELETE /repls/{replId}/data), or give the machine more room.",
            )));
        }
        let most = self.bounds.user_bytes;
        if self.of_user(repls)? + more > most {
            // Old releases may have gone since they were counted.
            for repl in repls {
                self.count_code(repl)?;
            }
            let bytes = self.of_user(repls)?;
            if bytes + more > most {
                return Ok(Err(Problem::new(
                    "disk_quota",
                    "There is no room for more of this user's files",
                    format!(
                        "data and releases of {user} take {bytes} bytes, and with {more} more they would be more than {most}"
                    ),
                    "Delete data of a repl that does not need them: DELETE /repls/{replId}/data.",
                )));
            }
        }
        self.with(repl, |known| {
            known.code = known.code.map(|code| code + more)
        });
        Ok(Ok(()))
    }

    /// Bytes that are free, and how many of them are to stay so.
    pub fn free(&self) -> io::Result<(u64, u64)> {
        let room = self.all()?.room()?;
        let part = (room.bytes / RESERVED_PART).min(MOST_RESERVED);
        Ok((room.free, self.bounds.reserve_bytes.unwrap_or(part)))
    }

    /// The file system's number.
    pub fn device(&self) -> io::Result<u64> {
        self.all()?.device()
    }

    /// What may be written at most.
    pub fn bounds(&self) -> &DiskBounds {
        &self.bounds
    }

    fn with<T>(&self, repl: &ReplId, act: impl FnOnce(&mut Known) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        act(known.entry(repl.clone()).or_default())
    }
}
