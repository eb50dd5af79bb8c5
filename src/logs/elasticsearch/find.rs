//! Queries in Elasticsearch's language, and what they give back.

use serde_json::{Map, Value, json};

use super::ElasticsearchError;
use super::cursor::{Cursor, is_journal};
use crate::logs::query::Filter;
use crate::logs::shipper::{CLOCK, JOURNAL, POSITION};

/// Longest token of the index; longer words are split there.
const LONGEST_TOKEN: usize = 255;
/// Records that one part of an index looks at for one search; one that would need more is refused as
/// too wide. More than a day of a busy server has, so that nobody meets it who names a user or a time.
const MOST_LOOKED_AT: usize = 10_000_000;
/// Words that a beginning may stand for inside a phrase. More than one index of a day has of them.
const MAX_EXPANSIONS: usize = 100_000;

/// One record found.
#[derive(Debug, Clone)]
pub(super) struct Hit {
    pub(super) journal: String,
    pub(super) position: u64,
    pub(super) clock: i64,
    /// The record's public shape.
    pub(super) fields: Map<String, Value>,
}

/// Which end to begin at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    OldestFirst,
    NewestFirst,
}

/// The conditions of a log query, but for its place.
pub(super) fn conditions(filter: &Filter) -> Vec<Value> {
    let mut all = Vec::new();
    let mut term = |field: &str, value: Option<String>| {
        if let Some(value) = value {
            all.push(json!({"term": {field: value}}));
        }
    };
    term("user.id", filter.user.as_ref().map(|id| id.to_string()));
    term(
        "gantry.repl_id",
        filter.repl.as_ref().map(|id| id.to_string()),
    );
    term(
        "gantry.submission_id",
        filter.submission.map(|id| id.to_string()),
    );
    term("gantry.step", filter.step.map(str::to_owned));
    term("log.level", filter.level.map(str::to_owned));
    if let Some(since) = filter.since {
        all.push(json!({"range": {"@timestamp": {"gte": since.to_string()}}}));
    }
    if let Some(until) = filter.until {
        all.push(json!({"range": {"@timestamp": {"lte": until.to_string()}}}));
    }
    all.extend(filter.phrases().map(phrase));
    all
}

fn phrase((words, open_end): (&[String], bool)) -> Value {
    let text = words.join(" ");
    match words {
        [word] if open_end && word.chars().count() <= LONGEST_TOKEN => {
            json!({"prefix": {"gantry.words": {"value": text}}})
        }
        _ if open_end => json!({"match_phrase_prefix": {
            "gantry.words": {"query": text, "max_expansions": MAX_EXPANSIONS},
        }}),
        _ => json!({"match_phrase": {"gantry.words": text}}),
    }
}

/// Records behind `after` and not behind `bounds`, of the journals in `bounds`.
pub(super) fn between(after: Option<&Cursor>, bounds: &Cursor) -> Value {
    let part = |(journal, to): (&str, u64)| {
        let mut range = json!({"lte": to});
        if let Some(after) = after {
            range["gt"] = after.of(journal).into();
        }
        json!({"bool": {"filter": [
            {"term": {JOURNAL: journal}},
            {"range": {POSITION: range}},
        ]}})
    };
    let parts: Vec<Value> = bounds.iter().map(part).collect();
    json!({"bool": {"should": parts, "minimum_should_match": 1}})
}

/// A whole search. Within a journal the order is that of its records; between journals that of time.
pub(super) fn body(filter: Vec<Value>, order: Order, size: usize) -> Value {
    let order = match order {
        Order::OldestFirst => "asc",
        Order::NewestFirst => "desc",
    };
    // Nothing was shipped yet: there are no fields to sort by.
    let by = |field: &str, kind: &str| json!({field: {"order": order, "unmapped_type": kind}});
    json!({
        "size": size,
        "track_total_hits": false,
        "terminate_after": MOST_LOOKED_AT,
        "query": {"bool": {"filter": filter}},
        "sort": [by(CLOCK, "long"), by(JOURNAL, "keyword"), by(POSITION, "long")],
    })
}

/// The records in an answer.
pub(super) fn hits(mut answer: Value) -> Result<Vec<Hit>, ElasticsearchError> {
    let nonsense = |cause: &str| ElasticsearchError::Nonsense {
        cause: cause.to_owned(),
    };
    if answer["_shards"]["failed"].as_u64() > Some(0) {
        return Err(ElasticsearchError::Failed {
            status: 200,
            cause: "a part of the search failed".to_owned(),
        });
    }
    let Value::Array(found) = answer["hits"]["hits"].take() else {
        return Err(nonsense("a search without hits"));
    };
    let hit = |mut found: Value| {
        let Value::Object(mut fields) = found["_source"].take() else {
            return Err(nonsense("a record without a source"));
        };
        let mut own = |name: &str| fields.shift_remove(name).unwrap_or_default();
        let (journal, position, clock) = (own(JOURNAL), own(POSITION), own(CLOCK));
        match (journal.as_str(), position.as_u64(), clock.as_i64()) {
            (Some(journal), Some(position), Some(clock)) if is_journal(journal) => Ok(Hit {
                journal: journal.to_owned(),
                position,
                clock,
                fields,
            }),
            _ => Err(nonsense("a record without its place")),
        }
    };
    found.into_iter().map(hit).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::logs::LogQuery;

    #[test]
    fn what_a_client_sends_is_a_value_and_never_syntax() {
        let filter = Filter::try_from(LogQuery {
            q: Some("\"quick\" OR *:* bro* \"two wor*\"".to_owned()),
            step: Some("test".to_owned()),
            ..LogQuery::default()
        })
        .unwrap();
        let expected = json!([
            {"term": {"gantry.step": "test"}},
            {"match_phrase": {"gantry.words": "quick"}},
            {"match_phrase": {"gantry.words": "or"}},
            {"prefix": {"gantry.words": {"value": "bro"}}},
            {"match_phrase_prefix": {"gantry.words": {"query": "two wor", "max_expansions": MAX_EXPANSIONS}}},
        ]);
        let found = conditions(&filter);
        assert_eq!(Value::Array(found), expected);
    }

    #[test]
    fn half_an_answer_is_an_error() {
        let whole = json!({"timed_out": false, "_shards": {"failed": 0}, "hits": {"hits": [
            {"_source": {"message": "x", JOURNAL: "00000000000000aa", POSITION: 5, CLOCK: 7}},
        ]}});
        let found = hits(whole.clone()).unwrap();
        assert_eq!((found[0].position, found[0].clock), (5, 7));
        assert_eq!(
            Value::Object(found[0].fields.clone()),
            json!({"message": "x"})
        );
        for (path, value) in [
            ("/_shards/failed", json!(1)),
            ("/hits/hits", json!(null)),
            ("/hits/hits/0/_source", json!({"message": "x"})),
        ] {
            let mut broken = whole.clone();
            *broken.pointer_mut(path).unwrap() = value;
            assert!(hits(broken).is_err(), "{path}");
        }
    }
}
