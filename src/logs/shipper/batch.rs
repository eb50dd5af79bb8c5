//! Records as the lines of one bulk request.

use std::ops::Range;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value, json};

use super::super::query::spoken;
use super::super::record::ecs;
use crate::model::Record;

/// Fields that a search needs and that are no part of a record's public shape.
pub(in crate::logs) const JOURNAL: &str = "gantry.journal";
pub(in crate::logs) const POSITION: &str = "gantry.position";
/// The largest time up to this record in its journal, in microseconds: unlike the record's own time
/// it never falls, so that records sorted by it stand in the order they were made.
pub(in crate::logs) const CLOCK: &str = "gantry.clock";
/// The words of message and error, as the search splits text; not kept in `_source`.
const WORDS: &str = "gantry.words";

/// What of a record goes into its stand-in: nothing that a program or a client chose freely.
const KEPT_FOR_STAND_IN: &[&str] = &[
    "@timestamp",
    "event.action",
    "event.sequence",
    "user.id",
    "service.name",
    "orchestrator.namespace",
    "orchestrator.resource.name",
    "gantry.submission_id",
    "gantry.repl_id",
    "gantry.step",
    JOURNAL,
    POSITION,
    CLOCK,
];

/// One record of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Item {
    /// Its two lines.
    lines: Range<usize>,
    /// Where the second begins.
    document: usize,
    stand_in: bool,
}

/// What is the same for all records of a server.
#[derive(Debug, Clone)]
pub(in crate::logs) struct Origin {
    /// The name of its journal.
    pub(in crate::logs) journal: String,
    /// Every index of records begins like this; a record's own day follows.
    pub(in crate::logs) index: String,
}

/// The body of a bulk request, with each record's place in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::logs) struct Batch {
    body: Vec<u8>,
    items: Vec<Item>,
}

/// A record that was refused, as it was sent.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) index: String,
    pub(super) id: String,
    pub(super) document: Map<String, Value>,
    /// It was the stand-in of another already.
    pub(super) stand_in: bool,
}

impl Batch {
    /// Puts a record in. Its index is that of its own day, its id is made from the record alone, or from where
    /// it comes from: sent again, by whatever server, it is the same document.
    pub(in crate::logs) fn push(&mut self, record: &Record, origin: &Origin, clock: i64) {
        let mut document = ecs(record);
        let words = spoken(&document);
        if !words.is_empty() {
            document.insert(WORDS.to_owned(), words.into());
        }
        document.insert(CLOCK.to_owned(), clock.into());
        document.insert(JOURNAL.to_owned(), origin.journal.as_str().into());
        document.insert(POSITION.to_owned(), record.position.into());
        self.put(
            &index_of(&origin.index, record.happened()),
            &id_of(record, &origin.journal),
            &document,
            false,
        );
    }

    fn put(&mut self, index: &str, id: &str, document: &Map<String, Value>, stand_in: bool) {
        let start = self.body.len();
        let action = json!({"create": {"_index": index, "_id": id}});
        let document_at = start + write_line(&mut self.body, &action);
        write_line(&mut self.body, document);
        self.items.push(Item {
            lines: start..self.body.len(),
            document: document_at,
            stand_in,
        });
    }

    pub(in crate::logs) fn body(&self) -> &[u8] {
        &self.body
    }

    /// Records in it.
    pub(in crate::logs) fn len(&self) -> usize {
        self.items.len()
    }

    pub(in crate::logs) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes over another batch's record.
    pub(super) fn take(&mut self, other: &Batch, index: usize) {
        let Some(item) = other.items.get(index) else {
            return;
        };
        let start = self.body.len();
        self.body.extend_from_slice(&other.body[item.lines.clone()]);
        self.items.push(Item {
            lines: start..self.body.len(),
            document: start + (item.document - item.lines.start),
            stand_in: item.stand_in,
        });
    }

    /// Two halves of what is too large in one piece.
    pub(super) fn halves(&self) -> (Batch, Batch) {
        let middle = self.len() / 2;
        let part = |range: Range<usize>| {
            let mut part = Batch::default();
            range.for_each(|index| part.take(self, index));
            part
        };
        (part(0..middle), part(middle..self.len()))
    }

    /// The record as it was sent.
    pub(super) fn refused(&self, index: usize) -> serde_json::Result<Refused> {
        let item = &self.items[index];
        let action: Value = serde_json::from_slice(&self.body[item.lines.start..item.document])?;
        let text = |name: &str| {
            action["create"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        Ok(Refused {
            index: text("_index"),
            id: text("_id"),
            document: serde_json::from_slice(&self.body[item.document..item.lines.end])?,
            stand_in: item.stand_in,
        })
    }

    /// Puts in what takes a refused record's place: the same id, so that no record is missing, and
    /// only what cannot have been the reason.
    pub(super) fn put_stand_in(&mut self, refused: &Refused, kind: &str, reason: &str) {
        let mut document = Map::new();
        for name in KEPT_FOR_STAND_IN {
            if let Some(value) = refused.document.get(*name) {
                document.insert((*name).to_owned(), value.clone());
            }
        }
        let message = "This record was refused by Elasticsearch and stands in the dead-letter file";
        document.insert("message".to_owned(), message.into());
        document.insert("log.level".to_owned(), "error".into());
        document.insert("event.outcome".to_owned(), "unknown".into());
        document.insert("error.code".to_owned(), "record_refused".into());
        document.insert("error.type".to_owned(), kind.into());
        document.insert("error.message".to_owned(), reason.into());
        let words = spoken(&document);
        document.insert(WORDS.to_owned(), words.into());
        self.put(&refused.index, &refused.id, &document, true);
    }
}

/// Writes one line of JSON; the number of bytes.
fn write_line(body: &mut Vec<u8>, value: &impl serde::Serialize) -> usize {
    let start = body.len();
    // Into memory, and of values whose keys are strings: this cannot fail.
    if serde_json::to_writer(&mut *body, value).is_err() {
        body.truncate(start);
    }
    body.push(b'\n');
    body.len() - start
}

/// The index of a record of this time.
fn index_of(prefix: &str, time: Timestamp) -> String {
    let day = time.to_zoned(TimeZone::UTC).date();
    format!(
        "{prefix}{:04}.{:02}.{:02}",
        day.year(),
        day.month(),
        day.day()
    )
}

/// Made of the journal's name, the position in it and the time. The time tells records apart whose
/// journal was put back from a backup and gave a position a second time. Ids of one journal begin
/// alike and grow, which Elasticsearch finds and stores faster than random ones.
fn id_of(record: &Record, journal: &str) -> String {
    if let Some(origin) = record.event.origin() {
        // Another server may have it in its journal as well.
        let (container, time) = (&origin.container, origin.time.as_nanosecond());
        return format!(
            "{container}-{time:x}-{:x}-{:x}",
            origin.checksum, origin.part
        );
    }
    format!(
        "{journal}-{:016x}-{:x}",
        record.position,
        record.time.as_microsecond()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{Event, OutputStream};

    const NAME: &str = "00000000000000aa";

    fn origin() -> Origin {
        Origin {
            journal: NAME.to_owned(),
            index: "gantry-logs-".to_owned(),
        }
    }

    fn record(position: u64, time: &str, text: &str) -> Record {
        Record {
            position,
            time: time.parse().unwrap(),
            user_id: "ada".parse().unwrap(),
            submission_id: None,
            repl_id: "shop".parse().unwrap(),
            seq: None,
            event: Event::Output {
                stream: OutputStream::Stdout,
                data: text.to_owned(),
                run: 0,
                run_seq: 1,
            },
        }
    }

    fn lines(batch: &Batch) -> Vec<Value> {
        let text = std::str::from_utf8(batch.body()).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'));
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    fn three() -> Batch {
        let mut batch = Batch::default();
        for (n, text) in ["one\ntwo", "\"{}\u{0}", ""].iter().enumerate() {
            batch.push(
                &record(n as u64, "2026-01-31T12:00:00Z", text),
                &origin(),
                1,
            );
        }
        batch
    }

    #[test]
    fn a_record_is_two_lines_with_its_own_day_and_a_fixed_id() {
        let mut batch = Batch::default();
        let late = record(7, "2026-01-31T23:59:59.999999Z", "Hello, World_1");
        batch.push(&late, &origin(), 12);
        batch.push(&record(8, "2026-02-01T00:00:00Z", "x"), &origin(), 12);
        let lines = lines(&batch);
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[0]["create"]["_index"], "gantry-logs-2026.01.31");
        assert_eq!(
            lines[0]["create"]["_id"],
            format!("{NAME}-0000000000000007-{:x}", late.time.as_microsecond())
        );
        assert_eq!(lines[2]["create"]["_index"], "gantry-logs-2026.02.01");
        let mut document = lines[1].as_object().unwrap().clone();
        assert_eq!(document.remove("gantry.words").unwrap(), "hello world 1");
        assert_eq!(document.remove(JOURNAL).unwrap(), NAME);
        assert_eq!(document.remove(POSITION).unwrap(), 7);
        assert_eq!(document.remove(CLOCK).unwrap(), 12);
        assert_eq!(document, ecs(&late));
    }

    #[test]
    fn what_is_taken_over_and_halved_is_unchanged() {
        let batch = three();
        let (left, right) = batch.halves();
        assert_eq!((left.len(), right.len()), (1, 2));
        assert_eq!([left.body(), right.body()].concat(), batch.body());
        let mut copy = Batch::default();
        (0..3).for_each(|index| copy.take(&batch, index));
        assert_eq!(copy, batch);
        copy.take(&batch, 3);
        assert_eq!(copy, batch);
    }

    #[test]
    fn a_stand_in_has_the_same_id_and_none_of_the_text() {
        let batch = three();
        let refused = batch.refused(1).unwrap();
        assert_eq!(refused.document["message"], "\"{}\u{0}");
        assert!(!refused.stand_in);
        let mut stand_in = Batch::default();
        stand_in.put_stand_in(&refused, "document_parsing_exception", "too odd");
        assert!(stand_in.refused(0).unwrap().stand_in);
        let (sent, instead) = (lines(&batch), lines(&stand_in));
        assert_eq!(instead[0], sent[2]);
        assert_eq!(instead[1]["gantry.position"], 1);
        assert_eq!(instead[1]["error.type"], "document_parsing_exception");
        assert_eq!(instead[1]["log.level"], "error");
        assert!(!instead[1]["message"].as_str().unwrap().contains('{'));
    }
}
