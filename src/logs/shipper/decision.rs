//! What an answer of Elasticsearch means for what was sent. Without I/O.

use serde::Deserialize;

/// What becomes of one record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is in the index.
    Done,
    /// It is to be sent again.
    Again,
    /// It will never be taken as it is.
    Refused,
}

/// What becomes of a whole request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestFate {
    /// Each record has an answer of its own.
    Answered,
    /// It is to be sent again as it is.
    Again,
    /// It is to be sent in smaller pieces; a single record is refused.
    Smaller,
}

/// Why one record was not taken.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub(super) struct ItemError {
    #[serde(rename = "type", default)]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) reason: String,
}

/// The answer for one record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct ItemAnswer {
    pub(super) status: u16,
    #[serde(default)]
    pub(super) error: Option<ItemError>,
}

#[derive(Debug, Deserialize)]
struct Created {
    create: ItemAnswer,
}

#[derive(Debug, Deserialize)]
struct BulkAnswer {
    items: Vec<Created>,
}

/// The fate of one record.
pub(super) fn fate(answer: &ItemAnswer) -> Fate {
    match answer.status {
        200..=299 => Fate::Done,
        // Its id is there: an earlier attempt was applied, whatever came back from it.
        409 => Fate::Done,
        // Too busy, timed out, or failing: nothing is wrong with the record.
        408 | 429 | 500..=599 => Fate::Again,
        // No right to write, an index that is closed to writing (a full disk closes them all), no
        // index and no leave to make one: an operator's to mend.
        401 | 403 | 404 => Fate::Again,
        400 if is_about_the_cluster(answer) => Fate::Again,
        _ => Fate::Refused,
    }
}

/// Refusals with status 400 that every record meets: too many shards to make the day's index, an
/// index that is closed, an alias that leads nowhere.
fn is_about_the_cluster(answer: &ItemAnswer) -> bool {
    let Some(error) = &answer.error else {
        return false;
    };
    matches!(
        error.kind.as_str(),
        "validation_exception"
            | "index_closed_exception"
            | "cluster_block_exception"
            | "invalid_index_name_exception"
            | "illegal_state_exception"
    ) || error.reason.contains("maximum normal shards open")
}

/// The fate of a request by its own status.
pub(super) fn request_fate(status: u16) -> RequestFate {
    match status {
        200..=299 => RequestFate::Answered,
        // Larger than the server, or a proxy before it, takes.
        413 => RequestFate::Smaller,
        // 400 as well: the lines are well formed, so it is something on the way that refuses all.
        _ => RequestFate::Again,
    }
}

/// The answers of a request for `count` records, in order. `None` when it is not such an answer: then
/// nothing is known of any of them.
pub(super) fn answers(body: &[u8], count: usize) -> Option<Vec<ItemAnswer>> {
    let answer: BulkAnswer = serde_json::from_slice(body).ok()?;
    let items: Vec<ItemAnswer> = answer.items.into_iter().map(|item| item.create).collect();
    (items.len() == count).then_some(items)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn answer(status: u16, kind: &str, reason: &str) -> ItemAnswer {
        let error = ItemError {
            kind: kind.to_owned(),
            reason: reason.to_owned(),
        };
        ItemAnswer {
            status,
            error: (!kind.is_empty()).then_some(error),
        }
    }

    #[test]
    fn every_status_has_its_fate() {
        let cases = [
            (200, "", "", Fate::Done),
            (201, "", "", Fate::Done),
            (
                409,
                "version_conflict_engine_exception",
                "[x]: version conflict, document already exists",
                Fate::Done,
            ),
            (
                429,
                "es_rejected_execution_exception",
                "queue full",
                Fate::Again,
            ),
            (408, "", "", Fate::Again),
            (500, "", "", Fate::Again),
            (
                503,
                "unavailable_shards_exception",
                "primary shard is not active",
                Fate::Again,
            ),
            (
                403,
                "cluster_block_exception",
                "disk usage exceeded flood-stage watermark",
                Fate::Again,
            ),
            (401, "security_exception", "expired", Fate::Again),
            (
                404,
                "index_not_found_exception",
                "no such index and auto_create_index is off",
                Fate::Again,
            ),
            (
                400,
                "validation_exception",
                "this cluster currently has [1000]/[1000] maximum normal shards open",
                Fate::Again,
            ),
            (
                400,
                "illegal_argument_exception",
                "adds [2] shards, but this cluster has [1000]/[1000] maximum normal shards open",
                Fate::Again,
            ),
            (400, "index_closed_exception", "closed", Fate::Again),
            (
                400,
                "document_parsing_exception",
                "failed to parse field [event.duration] of type [long]",
                Fate::Refused,
            ),
            (
                400,
                "strict_dynamic_mapping_exception",
                "not allowed",
                Fate::Refused,
            ),
            (400, "", "", Fate::Refused),
            (413, "", "", Fate::Refused),
            (418, "", "", Fate::Refused),
        ];
        for (status, kind, reason, expected) in cases {
            assert_eq!(
                fate(&answer(status, kind, reason)),
                expected,
                "{status} {kind}"
            );
        }
        // A status that is none is not taken for success.
        assert_eq!(fate(&answer(0, "", "")), Fate::Refused);
    }

    #[test]
    fn a_request_is_answered_repeated_or_divided() {
        for (status, expected) in [
            (200, RequestFate::Answered),
            (400, RequestFate::Again),
            (413, RequestFate::Smaller),
            (401, RequestFate::Again),
            (404, RequestFate::Again),
            (429, RequestFate::Again),
            (502, RequestFate::Again),
        ] {
            assert_eq!(request_fate(status), expected, "{status}");
        }
    }

    #[test]
    fn an_answer_that_is_not_whole_is_no_answer() {
        let whole = br#"{"errors":true,"items":[{"create":{"status":201}},{"create":{"status":400,"error":{"type":"t","reason":"r","caused_by":{}}}}]}"#;
        let items = answers(whole, 2).unwrap();
        assert_eq!(items[0], answer(201, "", ""));
        assert_eq!(items[1], answer(400, "t", "r"));
        assert_eq!(answers(whole, 3), None);
        assert_eq!(answers(&whole[..whole.len() - 1], 2), None);
        assert_eq!(answers(b"<html>busy</html>", 1), None);
        assert_eq!(answers(br#"{"items":[{"index":{"status":201}}]}"#, 1), None);
    }
}
