//! Ids of submissions that ended and whose records were deleted, so that none of them runs again.
//!
//! An id enters when the keeper deletes its records, before they are deleted: taking a submission
//! in, running it and answering it write nothing here. The file is bounded by age and by number;
//! past the number, the users with the most ids lose their oldest ones.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, params};

use super::JournalError;
use super::damage::rename_aside;
use super::index::{Entry, Known};
use super::keeper::level;
use super::store::lock;
use crate::model::{Status, SubmissionId};

/// What is kept of a submission: together with the key and the names about a hundred bytes.
const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS ended (
    id BLOB PRIMARY KEY,
    user TEXT NOT NULL,
    repl TEXT NOT NULL,
    status TEXT NOT NULL,
    ended INTEGER NOT NULL,
    submission BLOB NOT NULL,
    reply BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ended_by_user ON ended (user, ended);
CREATE TABLE IF NOT EXISTS lived (only INTEGER PRIMARY KEY CHECK (only = 0), microseconds INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO lived VALUES (0, 0);
";

/// When an id was added: not by the machine's clock, which may be wrong for a while, but by how long servers
/// had run on this file.
const ADDED: &str = "
ALTER TABLE ended ADD COLUMN added INTEGER NOT NULL DEFAULT 0;
CREATE INDEX ended_by_age ON ended (added);
DROP INDEX IF EXISTS ended_by_time;
PRAGMA user_version = 1;
";

/// Bytes of a SHA-256 that are kept: 128 bits, enough that nobody finds two texts with the same ones.
pub(super) const DIGEST: usize = 16;

/// A submission that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remembered {
    pub(super) id: SubmissionId,
    pub(super) user: String,
    pub(super) repl: String,
    pub(super) status: Status,
    pub(super) ended_us: i64,
    /// Of the submission as it was recorded.
    pub(super) submission: [u8; DIGEST],
    /// Of the reply as it was sent.
    pub(super) reply: [u8; DIGEST],
}

impl Remembered {
    /// Of a submission whose records are lost: that it was received is all that is known.
    pub(super) fn lost(entry: &Entry) -> Self {
        Self {
            id: entry.id,
            user: entry.known.user.as_str().to_owned(),
            repl: entry.known.repl.as_str().to_owned(),
            status: Status::Unavailable,
            ended_us: Timestamp::now().as_microsecond(),
            submission: [0; DIGEST],
            reply: [0; DIGEST],
        }
    }

    fn ended(&self) -> Timestamp {
        // Every stored time came from a valid one.
        Timestamp::from_microsecond(self.ended_us).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// As the index knows submissions.
    pub(super) fn known(&self) -> Option<Known> {
        let (user, repl) = (self.user.parse().ok()?, self.repl.parse().ok()?);
        Some(Known::new(user, repl, self.ended(), 0))
    }

    pub(super) fn gone(&self) -> JournalError {
        JournalError::Gone {
            status: self.status,
            ended: self.ended(),
            reply: self.reply.iter().map(|b| format!("{b:02x}")).collect(),
        }
    }
}

/// The ids, on disk.
pub(super) struct Memory {
    path: PathBuf,
    age: Duration,
    most: u64,
    /// Lookups do not wait for the keeper's transactions.
    reader: Mutex<Connection>,
    writer: Mutex<Connection>,
    /// How many there are: while there is none, nobody asks the database.
    count: AtomicU64,
    /// Changes before any record is deleted whose id was just added.
    generation: AtomicU64,
    /// Microseconds that earlier servers ran, and since when this one does.
    lived_before: i64,
    opened: Instant,
}

impl Memory {
    /// Opens the file. A damaged one is set aside and added to `replaced`; the new one begins with the ids that can
    /// still be read. A submission whose id cannot be read would run again if somebody sent it again. That is rare,
    /// and better than a server that takes no submission at all.
    pub(super) fn open(
        dir: &Path,
        age: Duration,
        most: u64,
        replaced: &mut Vec<PathBuf>,
    ) -> Result<Self, JournalError> {
        let path = dir.join("ended.sqlite");
        let failed = |source| JournalError::Memory {
            file: path.clone(),
            source,
        };
        let opened = match connect_whole(&path) {
            Err(error) if is_damage(&error, &path) => {
                let aside = set_aside(&path).map_err(|e| JournalError::io("rename", &path, e))?;
                replaced.push(path.clone());
                let opened = connect_whole(&path).map_err(failed)?;
                let saved = salvage(&aside, &opened.writer);
                tracing::warn!(
                    "{} is damaged ({error}) and was set aside as {}; {saved} ids of ended submissions could still be read, and an id that could not may run a second time if it is sent again",
                    path.display(),
                    aside.display()
                );
                opened
            }
            opened => opened.map_err(failed)?,
        };
        let memory = Self {
            path,
            age,
            most,
            reader: Mutex::new(opened.reader),
            writer: Mutex::new(opened.writer),
            count: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            lived_before: opened.lived,
            opened: Instant::now(),
        };
        // Counts, too.
        memory.trim()?;
        Ok(memory)
    }

    fn failed(&self, source: rusqlite::Error) -> JournalError {
        JournalError::Memory {
            file: self.path.clone(),
            source,
        }
    }

    fn lived(&self) -> i64 {
        let own = i64::try_from(self.opened.elapsed().as_micros()).unwrap_or(i64::MAX);
        self.lived_before.saturating_add(own)
    }

    /// What was added before is too old.
    fn oldest(&self) -> i64 {
        let age = i64::try_from(self.age.as_micros()).unwrap_or(i64::MAX);
        self.lived().saturating_sub(age)
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn next_generation(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// What is remembered of this id.
    pub(super) fn get(&self, id: SubmissionId) -> Result<Option<Remembered>, JournalError> {
        if self.count.load(Ordering::Acquire) == 0 {
            return Ok(None);
        }
        let oldest = self.oldest();
        let find = || -> rusqlite::Result<Option<Remembered>> {
            let reader = lock(&self.reader);
            let mut statement = reader.prepare_cached(
                "SELECT user, repl, status, ended, submission, reply FROM ended WHERE id = ?1 AND added >= ?2",
            )?;
            let row = statement.query_row(params![id.as_bytes(), oldest], |row| {
                let status: String = row.get(2)?;
                Ok(Remembered {
                    id,
                    user: row.get(0)?,
                    repl: row.get(1)?,
                    status: status_of(&status),
                    ended_us: row.get(3)?,
                    submission: row.get(4)?,
                    reply: row.get(5)?,
                })
            });
            row.optional()
        };
        find().map_err(|error| self.failed(error))
    }

    /// Adds ids, durably. One that is there stays as it is.
    pub(super) fn add(&self, ended: &[Remembered]) -> Result<(), JournalError> {
        if ended.is_empty() {
            return Ok(());
        }
        let lived = self.lived();
        let add = || -> rusqlite::Result<u64> {
            let mut writer = lock(&self.writer);
            let transaction = writer.transaction()?;
            let mut added = 0;
            {
                let mut statement = transaction.prepare_cached(
                    "INSERT OR IGNORE INTO ended VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                )?;
                for one in ended {
                    added += statement.execute(params![
                        one.id.as_bytes(),
                        one.user,
                        one.repl,
                        one.status.as_str(),
                        one.ended_us,
                        one.submission,
                        one.reply,
                        lived,
                    ])?;
                }
            }
            transaction.commit()?;
            Ok(added as u64)
        };
        let added = add().map_err(|error| self.failed(error))?;
        self.count.fetch_add(added, Ordering::Release);
        Ok(())
    }

    /// Forgets what is too old, and what is too many of the users that have the most.
    pub(super) fn trim(&self) -> Result<(), JournalError> {
        let (oldest, lived) = (self.oldest(), self.lived());
        let trim = || -> rusqlite::Result<(u64, u64)> {
            let mut writer = lock(&self.writer);
            let transaction = writer.transaction()?;
            transaction.execute("UPDATE lived SET microseconds = ?1", [lived])?;
            transaction.execute("DELETE FROM ended WHERE added < ?1", [oldest])?;
            let count = "SELECT count(*) FROM ended";
            let count = |t: &rusqlite::Transaction<'_>| -> rusqlite::Result<u64> {
                Ok(t.query_row(count, [], |row| row.get::<_, i64>(0))? as u64)
            };
            let mut early = 0;
            if count(&transaction)? > self.most {
                let users: Vec<(String, u64)> = transaction
                    .prepare("SELECT user, count(*) FROM ended GROUP BY user")?
                    .query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?
                    .collect::<rusqlite::Result<_>>()?;
                // A little more than must go, so that this is not done for each one that comes.
                let most = level(
                    users.iter().map(|(_, count)| *count),
                    self.most - self.most / 16,
                );
                for (user, count) in users.iter().filter(|(_, count)| *count > most) {
                    early += transaction.execute(
                        "DELETE FROM ended WHERE id IN (SELECT id FROM ended WHERE user = ?1 ORDER BY added, ended LIMIT ?2)",
                        params![user, (count - most) as i64],
                    )? as u64;
                }
            }
            let left = count(&transaction)?;
            transaction.commit()?;
            Ok((left, early))
        };
        let (left, early) = trim().map_err(|error| self.failed(error))?;
        self.count.store(left, Ordering::Release);
        if early > 0 {
            tracing::warn!(
                "{early} ids of ended submissions were forgotten before their time, of the users with the most: more than {} would be remembered. A submission that is sent again under one of them would run again",
                self.most
            );
        }
        Ok(())
    }
}

/// A status by its word; what is not known ended somehow.
fn status_of(word: &str) -> Status {
    serde_json::from_value(word.into()).unwrap_or(Status::Unavailable)
}

/// The file, opened twice.
struct Opened {
    reader: Connection,
    writer: Connection,
    /// Microseconds that earlier servers ran.
    lived: i64,
}

/// Opens the file, made if it is not there, and looks through it: a quarter of a second for 100 MB.
fn connect_whole(path: &Path) -> rusqlite::Result<Opened> {
    let connect = || -> rusqlite::Result<Connection> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // The records are deleted next: a crash must not lose what was added.
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.pragma_update(None, "journal_size_limit", 16 << 20)?;
        Ok(connection)
    };
    let writer = connect()?;
    writer.execute_batch(SCHEMA)?;
    let version: i64 = writer.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == 0 {
        writer.execute_batch(&format!("BEGIN; {ADDED} COMMIT;"))?;
    }
    let found: String = writer.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if found != "ok" {
        let damaged = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
        return Err(rusqlite::Error::SqliteFailure(damaged, Some(found)));
    }
    let lived = "SELECT microseconds FROM lived";
    let lived = writer.query_row(lived, [], |row| row.get(0))?;
    // Every column is there, under its name.
    writer.prepare(ROWS)?;
    writer.prepare("SELECT added FROM ended")?;
    Ok(Opened {
        reader: connect()?,
        writer,
        lived,
    })
}

/// What is kept of each, but for when it was added.
const ROWS: &str = "SELECT id, user, repl, status, ended, submission, reply FROM ended";

/// Whether it is the file that is at fault. A flipped bit may show as a statement that makes no sense as well, so it
/// is everything that is not the machine's: a full disk, or a file that somebody else has or that may not be written.
fn is_damage(error: &rusqlite::Error, path: &Path) -> bool {
    use rusqlite::ErrorCode::{
        CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, PermissionDenied,
    };
    let machines = [
        CannotOpen,
        DatabaseBusy,
        DatabaseLocked,
        DiskFull,
        OutOfMemory,
        PermissionDenied,
    ];
    let code = error.sqlite_error_code();
    let writable = std::fs::File::options().append(true).open(path).is_ok();
    writable && code.is_none_or(|code| !machines.contains(&code))
}

/// Renames the file, and what SQLite keeps beside it.
fn set_aside(path: &Path) -> std::io::Result<PathBuf> {
    let beside = |path: &Path, suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        PathBuf::from(name)
    };
    let aside = rename_aside(path)?;
    for suffix in ["-wal", "-shm"] {
        match std::fs::rename(beside(path, suffix), beside(&aside, suffix)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(aside)
}

/// Takes over what can be read of a damaged file, from both of its ends; says how much that was.
fn salvage(aside: &Path, to: &Connection) -> usize {
    let mut saved = 0;
    for order in ["ASC", "DESC"] {
        if let Err(error) = salvage_from(aside, order, to, &mut saved) {
            tracing::debug!(%error, "not all of what was set aside can be read");
        }
    }
    saved
}

/// From the one end on, until something cannot be read. How old an id was counts from now on: how long servers had
/// run on the old file is not known for sure.
fn salvage_from(
    aside: &Path,
    order: &str,
    to: &Connection,
    saved: &mut usize,
) -> rusqlite::Result<()> {
    let from = Connection::open(aside)?;
    let mut rows = from.prepare(&format!("{ROWS} ORDER BY id {order}"))?;
    let mut rows = rows.query([])?;
    let transaction = to.unchecked_transaction()?;
    {
        let mut insert = transaction
            .prepare("INSERT OR IGNORE INTO ended VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, 0)")?;
        // What came before a row that cannot be read is kept.
        while let Ok(Some(row)) = rows.next() {
            let values = (0..7).map(|at| row.get_ref(at));
            let values = values.collect::<rusqlite::Result<Vec<_>>>()?;
            // Bytes that are no text are damage, which SQLite itself does not look for.
            let is_whole = |value: &ValueRef<'_>| match value {
                ValueRef::Text(text) => std::str::from_utf8(text).is_ok(),
                _ => true,
            };
            if values.iter().all(is_whole) {
                let values = values.into_iter().map(ToSqlOutput::Borrowed);
                *saved += insert
                    .execute(rusqlite::params_from_iter(values))
                    .unwrap_or(0);
            }
        }
    }
    transaction.commit()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_row_with_bytes_that_are_no_text_is_left_out_of_what_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        let (aside, fresh) = (dir.path().join("aside"), dir.path().join("fresh"));
        let damaged = connect_whole(&aside).unwrap();
        for (id, user) in [
            ("x'01'", "'ann'"),
            ("x'02'", "CAST(x'ff61' AS TEXT)"),
            ("x'03'", "'bob'"),
        ] {
            let row =
                format!("INSERT INTO ended VALUES ({id}, {user}, 'r', 'deployed', 1, x'', x'', 1)");
            damaged.writer.execute_batch(&row).unwrap();
        }
        drop(damaged);
        let fresh = connect_whole(&fresh).unwrap();
        assert_eq!(salvage(&aside, &fresh.writer), 2);
    }
}
