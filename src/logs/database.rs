//! The SQLite file behind the search.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rusqlite::types::Value as Sql;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params, params_from_iter};
use serde_json::{Map, Value};

use super::query::{
    Filter, LogPage, LogRecord, SearchError, SubmissionFilter, SubmissionPage, SubmissionSummary,
    searchable,
};
use super::record::ecs;
use crate::model::{Event, Outcome, Record};

/// Another number rebuilds the file from the journal.
const SCHEMA_VERSION: i64 = 3;
/// The version before had no count of what each user has.
const COUNTED: &str = "
BEGIN;
CREATE TABLE users (user TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;
INSERT INTO users SELECT user, sum(octet_length(fields)) FROM records GROUP BY user;
PRAGMA user_version = 3;
COMMIT;
";
/// Wait for another connection's lock. Readers never wait in WAL mode; this covers recovery of the
/// file after a crash.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Records deleted at once, so that the index is never held up for long.
const DELETE_CHUNK: i64 = 20_000;
/// Bytes of records on a page of an answer, which is built in memory; one that has more ends earlier.
const PAGE_BYTES: usize = 4 << 20;
/// Bytes of records deleted at once: several times what is taken in at once.
const DELETE_BYTES: i64 = 8 << 20;
/// How far a machine's clock may be set back without `until` missing records.
const CLOCK_SLACK_US: i64 = 3_600 * 1_000_000;

/// `clock` is the largest time up to this record: it never falls, so a time bounds positions.
const SCHEMA: &str = "
CREATE TABLE records (
    position INTEGER PRIMARY KEY,
    clock INTEGER NOT NULL,
    time INTEGER NOT NULL,
    user TEXT NOT NULL,
    repl TEXT NOT NULL,
    submission BLOB,
    step TEXT,
    level TEXT NOT NULL,
    fields TEXT NOT NULL
) STRICT;
CREATE INDEX records_by_clock ON records (clock);
CREATE INDEX records_by_user ON records (user);
CREATE INDEX records_by_repl ON records (repl);
CREATE INDEX records_by_submission ON records (submission) WHERE submission IS NOT NULL;
CREATE VIRTUAL TABLE words USING fts5 (
    text, content = '', contentless_delete = 1, tokenize = 'unicode61 remove_diacritics 0'
);
CREATE TABLE submissions (
    position INTEGER PRIMARY KEY,
    id BLOB NOT NULL UNIQUE,
    user TEXT NOT NULL,
    repl TEXT NOT NULL,
    status TEXT NOT NULL,
    summary TEXT NOT NULL
) STRICT;
CREATE INDEX submissions_by_user ON submissions (user);
CREATE INDEX submissions_by_repl ON submissions (repl);
CREATE TABLE users (user TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;
CREATE TABLE state (only INTEGER PRIMARY KEY CHECK (only = 0), position INTEGER, clock INTEGER) STRICT;
INSERT INTO state VALUES (0, 0, 0);
";

/// The connection that writes.
pub(super) struct Writer {
    connection: Connection,
    /// The last position taken in.
    pub(super) position: u64,
    clock: i64,
}

/// Opens the file, or makes it anew when it is lost, damaged, of another version, or ahead of the
/// journal.
pub(super) fn open(path: &Path, durable: u64) -> Result<Writer, SearchError> {
    match try_open(path) {
        Ok(Some(writer)) if writer.position <= durable => return Ok(writer),
        Ok(Some(_)) => tracing::warn!("the search index is of another journal; it is rebuilt"),
        Ok(None) => {}
        Err(error) => tracing::warn!("the search index cannot be opened ({error}); it is rebuilt"),
    }
    for suffix in ["", "-wal", "-shm"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        // What is really in the way shows when the file is made.
        let _ = std::fs::remove_file(name);
    }
    let connection = connect(path)?;
    connection.execute_batch(&format!(
        "BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    ))?;
    Ok(Writer {
        connection,
        position: 0,
        clock: 0,
    })
}

fn try_open(path: &Path) -> Result<Option<Writer>, rusqlite::Error> {
    if !path.exists() {
        return Ok(None);
    }
    let connection = connect(path)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    if version == SCHEMA_VERSION - 1 {
        connection.execute_batch(COUNTED)?;
    } else if version != SCHEMA_VERSION {
        return Ok(None);
    }
    let (position, clock) =
        connection.query_row("SELECT position, clock FROM state", [], |row| {
            Ok((row.get::<_, i64>(0)?, row.get(1)?))
        })?;
    Ok(Some(Writer {
        connection,
        position: position as u64,
        clock,
    }))
}

fn connect(path: &Path) -> Result<Connection, rusqlite::Error> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // A crash may lose the last transactions, never the file: they are taken in again.
    connection.pragma_update(None, "synchronous", "NORMAL")?;
    connection.pragma_update(None, "journal_size_limit", 16 << 20)?;
    Ok(connection)
}

/// A connection for reading.
pub(super) fn reader(path: &Path) -> Result<Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    Ok(connection)
}

impl Writer {
    /// Takes in records, and where that leaves it, in one transaction.
    pub(super) fn insert(&mut self, records: &[Arc<Record>]) -> Result<(), SearchError> {
        let Some(last) = records.last() else {
            return Ok(());
        };
        let mut clock = self.clock;
        let transaction = self.connection.transaction()?;
        for record in records {
            clock = clock.max(record.time.as_microsecond());
            insert_record(&transaction, record, clock)?;
            match &record.event {
                Event::Received { .. } => insert_submission(&transaction, record)?,
                Event::Reply(outcome) => end_submission(&transaction, record, outcome)?,
                _ => {}
            }
        }
        store_state(&transaction, last.position, clock)?;
        transaction.commit()?;
        (self.position, self.clock) = (last.position, clock);
        Ok(())
    }

    /// Goes on behind `position` without the records up to it, which cannot be read.
    pub(super) fn skip_to(&mut self, position: u64) -> Result<(), SearchError> {
        let transaction = self.connection.transaction()?;
        store_state(&transaction, position, self.clock)?;
        transaction.commit()?;
        self.position = position;
        Ok(())
    }

    /// Deletes a bounded number of the oldest records when the file is larger than `max_bytes` or
    /// they are older than `oldest`. True when there is more to delete.
    pub(super) fn retain(
        &mut self,
        max_bytes: u64,
        oldest: Timestamp,
    ) -> Result<bool, SearchError> {
        let pragma = |name: &str| -> Result<u64, rusqlite::Error> {
            let number: i64 = self
                .connection
                .query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?;
            Ok(number as u64)
        };
        let used = (pragma("page_count")? - pragma("freelist_count")?) * pragma("page_size")?;
        let transaction = self.connection.transaction()?;
        let too_large = used > max_bytes;
        if too_large {
            delete_of_largest(&transaction)?;
        }
        let bound: Option<i64> = {
            transaction.query_row(
                "SELECT max(position) FROM (SELECT position FROM records WHERE clock < ?1 ORDER BY clock LIMIT ?2)",
                [oldest.as_microsecond(), DELETE_CHUNK],
                |row| row.get(0),
            )?
        };
        let Some(bound) = bound else {
            transaction.commit()?;
            return Ok(too_large);
        };
        transaction.execute(
            "UPDATE users SET bytes = users.bytes - gone.bytes FROM
             (SELECT user, sum(octet_length(fields)) AS bytes FROM records WHERE position <= ?1 GROUP BY user) AS gone
             WHERE users.user = gone.user",
            [bound],
        )?;
        // Row by row: a range is not something the full-text table can delete by.
        transaction.execute(
            "DELETE FROM words WHERE rowid IN (SELECT position FROM records WHERE position <= ?1)",
            [bound],
        )?;
        let deleted = transaction.execute("DELETE FROM records WHERE position <= ?1", [bound])?;
        transaction.execute("DELETE FROM submissions WHERE position <= ?1", [bound])?;
        transaction.commit()?;
        Ok(too_large || deleted as i64 == DELETE_CHUNK)
    }
}

/// Deletes the oldest records of the user with the most: who has less keeps what is there.
fn delete_of_largest(transaction: &Transaction<'_>) -> rusqlite::Result<()> {
    let largest = "SELECT user FROM users ORDER BY bytes DESC LIMIT 1";
    let user: Option<String> = transaction
        .query_row(largest, [], |row| row.get(0))
        .optional()?;
    let Some(user) = user else { return Ok(()) };
    let (mut last, mut bytes) = (None, 0);
    {
        let mut oldest = transaction.prepare_cached(
            "SELECT position, octet_length(fields) FROM records WHERE user = ?1 ORDER BY position LIMIT ?2",
        )?;
        let mut rows = oldest.query(params![user, DELETE_CHUNK])?;
        while let Some(row) = rows.next()?
            && bytes < DELETE_BYTES
        {
            last = Some(row.get::<_, i64>(0)?);
            bytes += row.get::<_, i64>(1)?;
        }
    }
    // Nothing: the count is of records that are gone.
    let last = last.unwrap_or(0);
    for delete in [
        "DELETE FROM words WHERE rowid IN (SELECT position FROM records WHERE user = ?1 AND position <= ?2)",
        "DELETE FROM records WHERE user = ?1 AND position <= ?2",
        "DELETE FROM submissions WHERE user = ?1 AND position <= ?2",
    ] {
        transaction.execute(delete, params![user, last])?;
    }
    let left = match bytes {
        0 => "UPDATE users SET bytes = 0 * ?2 WHERE user = ?1",
        _ => "UPDATE users SET bytes = bytes - ?2 WHERE user = ?1",
    };
    transaction.execute(left, params![user, bytes])?;
    Ok(())
}

fn store_state(transaction: &Transaction<'_>, position: u64, clock: i64) -> rusqlite::Result<()> {
    transaction
        .prepare_cached("UPDATE state SET position = ?1, clock = ?2")?
        .execute(params![position as i64, clock])?;
    Ok(())
}

fn insert_record(
    transaction: &Transaction<'_>,
    record: &Record,
    clock: i64,
) -> Result<(), SearchError> {
    let fields = ecs(record);
    let text = |name| fields.get(name).and_then(Value::as_str);
    let position = record.position as i64;
    let written = json(&fields)?;
    let mut statement = transaction
        .prepare_cached("INSERT INTO records VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)")?;
    statement.execute(params![
        position,
        clock,
        record.happened().as_microsecond(),
        record.user_id.as_str(),
        record.repl_id.as_str(),
        record
            .submission_id
            .as_ref()
            .map(|id| id.as_bytes().as_slice()),
        text("gantry.step"),
        text("log.level"),
        &written,
    ])?;
    transaction
        .prepare_cached(
            "INSERT INTO users VALUES (?1, ?2) ON CONFLICT (user) DO UPDATE SET bytes = bytes + ?2",
        )?
        .execute(params![record.user_id.as_str(), written.len() as i64])?;
    transaction
        .prepare_cached("INSERT INTO words (rowid, text) VALUES (?1, ?2)")?
        .execute(params![position, searchable(&fields)])?;
    Ok(())
}

fn insert_submission(transaction: &Transaction<'_>, record: &Record) -> Result<(), SearchError> {
    let (Some(id), Event::Received { submission, .. }) = (record.submission_id, &record.event)
    else {
        return Ok(());
    };
    let summary = SubmissionSummary {
        submission_id: id,
        user_id: record.user_id.clone(),
        repl_id: record.repl_id.clone(),
        language: submission.language.name.to_owned(),
        status: None,
        reason: None,
        release: None,
        url: None,
        time: record.time,
        duration_ms: None,
    };
    // An id comes again only after its first records were deleted for age.
    transaction
        .prepare_cached("INSERT OR REPLACE INTO submissions VALUES (?1, ?2, ?3, ?4, '', ?5)")?
        .execute(params![
            record.position as i64,
            id.as_bytes(),
            record.user_id.as_str(),
            record.repl_id.as_str(),
            json(&summary)?,
        ])?;
    Ok(())
}

fn end_submission(
    transaction: &Transaction<'_>,
    record: &Record,
    outcome: &Outcome,
) -> Result<(), SearchError> {
    let Some(id) = record.submission_id else {
        return Ok(());
    };
    let summary: Option<String> = transaction
        .prepare_cached("SELECT summary FROM submissions WHERE id = ?1")?
        .query_row([id.as_bytes()], |row| row.get(0))
        .optional()?;
    // Absent when its beginning was deleted for age.
    let Some(summary) = summary else {
        return Ok(());
    };
    let summary = SubmissionSummary {
        status: Some(outcome.status),
        reason: outcome.reason,
        release: outcome.release,
        url: outcome.url.clone(),
        duration_ms: outcome.duration_ms,
        ..parse(0, &summary)?
    };
    transaction
        .prepare_cached("UPDATE submissions SET status = ?2, summary = ?3 WHERE id = ?1")?
        .execute(params![
            id.as_bytes(),
            outcome.status.as_str(),
            json(&summary)?
        ])?;
    Ok(())
}

fn json(value: &impl serde::Serialize) -> Result<String, SearchError> {
    serde_json::to_string(value)
        .map_err(|e| SearchError::Database(rusqlite::Error::ToSqlConversionFailure(Box::new(e))))
}

fn parse<T: serde::de::DeserializeOwned>(column: usize, text: &str) -> rusqlite::Result<T> {
    serde_json::from_str(text).map_err(|e| {
        rusqlite::Error::FromSqlConversionFailure(column, rusqlite::types::Type::Text, Box::new(e))
    })
}

/// Conditions and their values.
#[derive(Default)]
struct Conditions {
    text: String,
    values: Vec<Sql>,
}

impl Conditions {
    fn add(&mut self, condition: &str, value: impl Into<Sql>) {
        self.text.push_str(if self.text.is_empty() {
            " WHERE "
        } else {
            " AND "
        });
        self.text.push_str(condition);
        self.values.push(value.into());
    }

    fn add_if(&mut self, condition: &str, value: Option<impl Into<Sql>>) {
        if let Some(value) = value {
            self.add(condition, value);
        }
    }
}

/// The records that match, up to position `up_to`: the newest, or those that follow `after`.
pub(super) fn find(
    connection: &mut Connection,
    filter: &Filter,
    up_to: Option<u64>,
) -> Result<LogPage, SearchError> {
    let transaction = connection.transaction()?;
    let indexed: i64 = transaction.query_row("SELECT position FROM state", [], |row| row.get(0))?;
    let indexed = up_to.unwrap_or(u64::MAX).min(indexed as u64);
    let conditions = conditions(&transaction, filter, indexed)?;
    let full_text = filter.full_text();
    let (from, order) = match (&full_text, filter.after) {
        (Some(_), Some(_)) => (
            "words JOIN records r ON r.position = words.rowid",
            "words.rowid",
        ),
        (Some(_), None) => (
            "words JOIN records r ON r.position = words.rowid",
            "words.rowid DESC",
        ),
        (None, Some(_)) => ("records r", "r.position"),
        (None, None) => ("records r", "r.position DESC"),
    };
    let mut statement = transaction.prepare_cached(&format!(
        "SELECT r.position, r.fields FROM {from}{} ORDER BY {order} LIMIT {}",
        conditions.text, filter.limit
    ))?;
    let rows = statement.query_map(params_from_iter(conditions.values), |row| {
        let position: i64 = row.get(0)?;
        let text = row.get_ref(1)?.as_str()?;
        let fields: Map<String, Value> = parse(1, text)?;
        Ok((position as u64, fields, text.len()))
    })?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    for row in rows {
        let (position, fields, length) = row?;
        found.push((position, fields));
        bytes += length;
        if bytes >= PAGE_BYTES {
            break;
        }
    }
    let mut rows = found;
    let full = rows.len() == filter.limit || bytes >= PAGE_BYTES;
    if filter.after.is_none() {
        rows.reverse();
    }
    // When the page is not full, everything up to `indexed` was looked through.
    let next = match rows.last() {
        Some((last, _)) if filter.after.is_some() && full => *last,
        _ => indexed.max(filter.after.unwrap_or(0)),
    };
    let record = |(position, fields): (u64, _)| LogRecord {
        fields,
        cursor: position.to_string(),
    };
    Ok(LogPage {
        records: rows.into_iter().map(record).collect(),
        next: Some(next.to_string()),
    })
}

/// The conditions of a log query. A `+` keeps SQLite from using that column's index: the narrowest
/// condition is known here, not there.
fn conditions(
    transaction: &Transaction<'_>,
    filter: &Filter,
    indexed: u64,
) -> Result<Conditions, SearchError> {
    let mut all = Conditions::default();
    let full_text = filter.full_text();
    let searched = full_text.is_some();
    let place = if searched {
        "words.rowid"
    } else {
        "r.position"
    };
    all.add_if("words MATCH ?", full_text);
    // SQLite uses one bound on each side: the narrowest is chosen here.
    let mut last = indexed as i64;
    let mut first = filter.after.map(|after| after as i64 + 1);
    if let Some(since) = filter.since {
        let found: Option<i64> = transaction
            .prepare_cached(
                "SELECT position FROM records WHERE clock >= ?1 ORDER BY clock, position LIMIT 1",
            )?
            .query_row([since.as_microsecond()], |row| row.get(0))
            .optional()?;
        first = first.max(Some(found.unwrap_or(i64::MAX)));
        all.add("r.time >= ?", since.as_microsecond());
    }
    all.add_if(&format!("{place} >= ?"), first);
    if let Some(until) = filter.until {
        let until = until.as_microsecond();
        let later: Option<i64> = transaction
            .prepare_cached(
                "SELECT position FROM records WHERE clock > ?1 ORDER BY clock, position LIMIT 1",
            )?
            .query_row([until.saturating_add(CLOCK_SLACK_US)], |row| row.get(0))
            .optional()?;
        last = later.map_or(last, |later| last.min(later - 1));
        all.add("r.time <= ?", until);
    }
    all.add(&format!("{place} <= ?"), last);
    let submission = filter.submission.map(|id| id.as_bytes().to_vec());
    let text = |value: &str| value.to_owned();
    let by_submission = submission.is_some() && !searched;
    let by_repl = filter.repl.is_some() && !searched && !by_submission;
    let by_user = !searched && !by_submission && !by_repl;
    let column = |used: bool, name: &str| format!("{}r.{name} = ?", if used { "" } else { "+" });
    all.add_if(&column(by_submission, "submission"), submission);
    all.add_if(
        &column(by_repl, "repl"),
        filter.repl.as_ref().map(|id| text(id.as_str())),
    );
    all.add_if(
        &column(by_user, "user"),
        filter.user.as_ref().map(|id| text(id.as_str())),
    );
    all.add_if("r.step = ?", filter.step.map(text));
    all.add_if("r.level = ?", filter.level.map(text));
    Ok(all)
}

/// The submissions that match, newest first.
pub(super) fn list(
    connection: &mut Connection,
    filter: &SubmissionFilter,
) -> Result<SubmissionPage, SearchError> {
    let mut all = Conditions::default();
    all.add(
        "position < ?",
        filter.before.map_or(i64::MAX, |before| before as i64),
    );
    let repl_column = "repl = ?";
    let user_column = if filter.repl.is_some() {
        "+user = ?"
    } else {
        "user = ?"
    };
    all.add_if(
        repl_column,
        filter.repl.as_ref().map(|id| id.as_str().to_owned()),
    );
    all.add_if(
        user_column,
        filter.user.as_ref().map(|id| id.as_str().to_owned()),
    );
    all.add_if("status = ?", filter.status.map(str::to_owned));
    let mut statement = connection.prepare_cached(&format!(
        "SELECT position, summary FROM submissions{} ORDER BY position DESC LIMIT {}",
        all.text,
        // One more tells whether there are older ones.
        filter.limit + 1
    ))?;
    let rows = statement.query_map(params_from_iter(all.values), |row| {
        let position: i64 = row.get(0)?;
        let summary: SubmissionSummary = parse(1, row.get_ref(1)?.as_str()?)?;
        Ok((position, summary))
    })?;
    let mut rows = rows.collect::<Result<Vec<_>, _>>()?;
    let more = rows.len() > filter.limit;
    rows.truncate(filter.limit);
    let last = rows.last().map(|(position, _)| position.to_string());
    Ok(SubmissionPage {
        submissions: rows.into_iter().map(|(_, summary)| summary).collect(),
        next: last.filter(|_| more),
    })
}
