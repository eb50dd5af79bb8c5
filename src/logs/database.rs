//! The SQLite file behind the search.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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
const SCHEMA_VERSION: i64 = 4;
/// The version before had no count of what each user has.
const COUNTED: &str = "
BEGIN;
CREATE TABLE users (user TEXT PRIMARY KEY, bytes INTEGER NOT NULL) STRICT;
INSERT INTO users SELECT user, sum(octet_length(fields)) FROM records GROUP BY user;
PRAGMA user_version = 3;
COMMIT;
";
/// The version before that went by the machine's clock.
const AGED: &str = "
BEGIN;
CREATE TABLE ages (position INTEGER PRIMARY KEY, lived INTEGER NOT NULL) STRICT;
ALTER TABLE state ADD COLUMN lived INTEGER NOT NULL DEFAULT 0;
ALTER TABLE state ADD COLUMN set_back INTEGER NOT NULL DEFAULT 0;
INSERT INTO ages SELECT position, 0 FROM state;
UPDATE state SET set_back = position;
PRAGMA user_version = 4;
COMMIT;
";
/// Places whose age is known, in the longest time that a record is kept.
const AGES: i64 = 64;
/// Wait for another connection's lock. Readers never wait in WAL mode; this covers recovery of the
/// file after a crash.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Records deleted at once, so that the index is never held up for long.
const DELETE_CHUNK: i64 = 20_000;
/// Bytes of records on a page of an answer, which is built in memory; one that has more ends earlier.
const PAGE_BYTES: usize = 4 << 20;
/// The part of the bound that is kept free: words are put together anew now and then, and the file has both the
/// old and the new until that is done. With words that come once only it grew by up to 40 %.
const SLACK: u64 = 4;
/// Bytes of records deleted at once: several times what is taken in at once.
const DELETE_BYTES: i64 = 8 << 20;
/// How far a machine's clock may be set back without `until` missing records.
const CLOCK_SLACK_US: i64 = 3_600 * 1_000_000;

/// `clock` is the largest time up to this record: it never falls, so a time bounds positions, but for those
/// up to `set_back`, the last that was written after the machine's clock was set back far.
///
/// How old something is is never taken from that clock, which may be wrong for a while: `lived` is for how
/// many microseconds servers have run on this file, and `ages` says how much of it had passed at some places.
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
CREATE TABLE ages (position INTEGER PRIMARY KEY, lived INTEGER NOT NULL) STRICT;
CREATE TABLE state (
    only INTEGER PRIMARY KEY CHECK (only = 0), position INTEGER, clock INTEGER,
    lived INTEGER NOT NULL DEFAULT 0, set_back INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO state VALUES (0, 0, 0, 0, 0);
";

/// The connection that writes.
pub(super) struct Writer {
    connection: Connection,
    /// The last position taken in.
    pub(super) position: u64,
    clock: i64,
    set_back: i64,
    /// What earlier servers lived, and since when this one does.
    lived_before: i64,
    opened: Instant,
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
        set_back: 0,
        lived_before: 0,
        opened: Instant::now(),
    })
}

fn try_open(path: &Path) -> Result<Option<Writer>, rusqlite::Error> {
    if !path.exists() {
        return Ok(None);
    }
    let connection = connect(path)?;
    let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    match SCHEMA_VERSION - version {
        0 => {}
        1 => connection.execute_batch(AGED)?,
        2 => {
            connection.execute_batch(COUNTED)?;
            connection.execute_batch(AGED)?;
        }
        _ => return Ok(None),
    }
    let state = "SELECT position, clock, set_back, lived FROM state";
    let (position, clock, set_back, lived_before) = connection.query_row(state, [], |row| {
        Ok((row.get::<_, i64>(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
    })?;
    Ok(Some(Writer {
        connection,
        position: position as u64,
        clock,
        set_back,
        lived_before,
        opened: Instant::now(),
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
        let (mut clock, mut set_back) = (self.clock, self.set_back);
        let lived = self.lived();
        let transaction = self.connection.transaction()?;
        for record in records {
            let time = record.time.as_microsecond();
            clock = clock.max(time);
            if time < clock - CLOCK_SLACK_US {
                set_back = record.position as i64;
            }
            insert_record(&transaction, record, clock)?;
            match &record.event {
                Event::Received { .. } => insert_submission(&transaction, record)?,
                Event::Reply(outcome) => end_submission(&transaction, record, outcome)?,
                _ => {}
            }
        }
        store_state(&transaction, last.position, clock)?;
        transaction.execute(
            "UPDATE state SET set_back = ?1, lived = ?2",
            [set_back, lived],
        )?;
        transaction.commit()?;
        (self.position, self.clock, self.set_back) = (last.position, clock, set_back);
        Ok(())
    }

    /// Microseconds for which servers have run on this file.
    fn lived(&self) -> i64 {
        let own = i64::try_from(self.opened.elapsed().as_micros()).unwrap_or(i64::MAX);
        self.lived_before.saturating_add(own)
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
    /// they are older than `max_age`. True when there is more to delete.
    pub(super) fn retain(
        &mut self,
        max_bytes: u64,
        max_age: Duration,
    ) -> Result<bool, SearchError> {
        let lived = self.lived();
        let age = i64::try_from(max_age.as_micros()).unwrap_or(i64::MAX);
        let position = self.position as i64;
        let pragma = |name: &str| -> Result<u64, rusqlite::Error> {
            let number: i64 = self
                .connection
                .query_row(&format!("PRAGMA {name}"), [], |row| row.get(0))?;
            Ok(number as u64)
        };
        let used = (pragma("page_count")? - pragma("freelist_count")?) * pragma("page_size")?;
        let transaction = self.connection.transaction()?;
        let too_large = used > max_bytes - max_bytes / SLACK;
        if too_large {
            delete_of_largest(&transaction)?;
        }
        let last: Option<i64> =
            transaction.query_row("SELECT max(lived) FROM ages", [], |row| row.get(0))?;
        if last.is_none_or(|last| lived - last >= age / AGES) {
            transaction.execute(
                "INSERT OR REPLACE INTO ages VALUES (?1, ?2)",
                [position, lived],
            )?;
        }
        let old: Option<i64> = transaction.query_row(
            "SELECT max(position) FROM ages WHERE lived < ?1",
            [lived.saturating_sub(age)],
            |row| row.get(0),
        )?;
        // Only the last of these places is needed.
        transaction.execute("DELETE FROM ages WHERE position < ?1", [old.unwrap_or(0)])?;
        let bound: Option<i64> = transaction.query_row(
            "SELECT max(position) FROM (SELECT position FROM records WHERE position <= ?1 ORDER BY position LIMIT ?2)",
            [old.unwrap_or(-1), DELETE_CHUNK],
            |row| row.get(0),
        )?;
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
        let set_back: i64 =
            transaction.query_row("SELECT set_back FROM state", [], |row| row.get(0))?;
        last = later.map_or(last, |later| last.min(set_back.max(later - 1)));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use jiff::{SignedDuration, Timestamp};

    use super::*;
    use crate::logs::LogQuery;

    fn record(position: u64, time: Timestamp) -> Arc<Record> {
        Arc::new(Record {
            position,
            time,
            user_id: "ann".parse().unwrap(),
            submission_id: None,
            repl_id: "ann-prod".parse().unwrap(),
            seq: None,
            event: Event::Queued,
        })
    }

    #[test]
    fn a_clock_that_was_far_ahead_for_a_while_costs_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("search.sqlite");
        let mut writer = open(&path, 100).unwrap();
        let now = Timestamp::now();
        let ahead = now + SignedDuration::from_hours(40 * 24);
        let month = Duration::from_secs(30 * 24 * 3600);
        for position in 1..=30 {
            let time = if position == 10 { ahead } else { now };
            writer.insert(&[record(position, time)]).unwrap();
            writer.retain(1 << 30, month).unwrap();
        }
        let mut reader = reader(&path).unwrap();
        let mut found = |until| {
            let query = LogQuery {
                until,
                limit: 100,
                ..LogQuery::default()
            };
            let filter = Filter::try_from(query).unwrap();
            find(&mut reader, &filter, None).unwrap().records.len()
        };
        assert_eq!(found(None), 30);
        // All but the one that says it is of the future, those after it too.
        assert_eq!(found(Some(now + SignedDuration::from_secs(60))), 29);
        // A file of an earlier version is taken over.
        drop(writer);
        let before = "ALTER TABLE state DROP COLUMN lived; ALTER TABLE state DROP COLUMN set_back; \
             DROP TABLE ages; PRAGMA user_version = 3;";
        connect(&path).unwrap().execute_batch(before).unwrap();
        let mut writer = open(&path, 100).unwrap();
        assert_eq!(writer.position, 30);
        assert!(!writer.retain(1 << 30, month).unwrap());
        assert_eq!(found(None), 30);
    }
}
