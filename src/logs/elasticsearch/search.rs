//! The search in Elasticsearch.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use serde_json::{Map, Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::cursor::{Before, Cursor, is_journal};
use super::find::{self, Hit, Order};
use super::follow;
use super::{Elasticsearch, ElasticsearchError, Method, Payload};
use crate::journal::Journal;
use crate::logs::live::Neighbours;
use crate::logs::query::{
    Filter, LogPage, LogQuery, LogRecord, SearchError, SubmissionFilter, SubmissionPage,
    SubmissionQuery, SubmissionSummary,
};
use crate::logs::search::LogSearch;
use crate::logs::shipper::Shipper;
use crate::logs::turns::{Turn, Turns};
use crate::model::{FieldError, UserId};

/// How long an answer waits for what was durable when it was asked to be in the index. Usually some
/// tens of milliseconds; a backlog must not hold up every page.
const FRESHNESS_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest search; what takes longer is a mistake, and holds up everybody else's.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// How old the knowledge of how far other servers are may be.
const OTHERS_AGE: Duration = Duration::from_secs(1);
/// Other servers, dead ones included, whose records are looked for.
const MAX_OTHERS: usize = 255;
/// Submissions looked through for one page of those with a status: the page says where it stopped.
const SCANNED_SUBMISSIONS: usize = 5_000;
/// Submissions asked for at once.
const SUBMISSIONS_AT_ONCE: usize = 500;

/// The search in Elasticsearch. Clones are the same.
#[derive(Debug, Clone)]
pub struct ElasticsearchSearch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    elastic: Elasticsearch,
    journal: Journal,
    shipper: Shipper,
    neighbours: Option<Arc<dyn Neighbours>>,
    seen: Mutex<Seen>,
    turns: Turns,
}

/// What can be found for certain.
#[derive(Debug, Default)]
struct Seen {
    bounds: Cursor,
    others: Cursor,
    others_at: Option<Instant>,
}

/// A page, with the place behind it.
pub(super) struct Found {
    pub(super) records: Vec<LogRecord>,
    pub(super) next: Cursor,
    /// There may be more up to the bounds.
    pub(super) full: bool,
}

impl ElasticsearchSearch {
    /// Searches what `shipper` brings there, and what other servers did; `neighbours` are those of them
    /// that can be asked for what has just happened.
    pub fn new(
        elastic: Elasticsearch,
        journal: Journal,
        shipper: Shipper,
        neighbours: Option<Arc<dyn Neighbours>>,
    ) -> Self {
        Self(Arc::new(Inner {
            elastic,
            journal,
            shipper,
            neighbours,
            seen: Mutex::default(),
            turns: Turns::new(QUERY_TIMEOUT),
        }))
    }

    pub(super) fn neighbours(&self) -> Option<&Arc<dyn Neighbours>> {
        self.0.neighbours.as_ref()
    }

    /// Waits for the turn of a follower's user.
    pub(super) async fn turn(&self, asker: Option<&UserId>) -> Result<Turn, SearchError> {
        self.0.turns.wait(asker).await
    }

    pub(super) fn journal(&self) -> &Journal {
        &self.0.journal
    }

    /// Everything of this server up to there was shipped.
    pub(super) fn shipped(&self) -> u64 {
        self.0.shipper.position()
    }

    /// Up to where each server's records can be found, made sure of by a refresh where something
    /// came since the last one. Who comes while one is under way waits for it, and often needs no
    /// other.
    pub(super) async fn bounds(&self) -> Result<Cursor, SearchError> {
        let mut seen = self.0.seen.lock().await;
        if seen.others_at.is_none_or(|at| at.elapsed() > OTHERS_AGE) {
            seen.others = self.others().await?;
            seen.others_at = Some(Instant::now());
        }
        let mut wanted = seen.others.clone();
        wanted.set(self.0.journal.identity(), self.shipped());
        if wanted != seen.bounds {
            self.refresh(&self.every_day()).await?;
            seen.bounds = wanted;
        }
        Ok(seen.bounds.clone())
    }

    /// How far other servers have shipped, as they say.
    async fn others(&self) -> Result<Cursor, SearchError> {
        // As a pattern: before the first record it matches nothing, which is not an error.
        let journals = format!("{}*", self.0.elastic.journals());
        let body = json!({
            "size": MAX_OTHERS,
            "sort": [{"@timestamp": {"order": "desc", "unmapped_type": "date"}}],
            "query": {"bool": {"must_not": {"term": {"journal": self.0.journal.identity()}}}},
        });
        let answer = self.search(&journals, body).await?;
        let mut others = Cursor::default();
        for hit in answer["hits"]["hits"].as_array().into_iter().flatten() {
            let source = &hit["_source"];
            if let (Some(journal), Some(position)) =
                (source["journal"].as_str(), source["position"].as_u64())
                && is_journal(journal)
            {
                others.set(journal, position);
            }
        }
        Ok(others)
    }

    fn every_day(&self) -> String {
        format!("{}*", self.0.elastic.logs())
    }

    async fn refresh(&self, index: &str) -> Result<(), SearchError> {
        let path = format!("/{index}/_refresh");
        self.call(&path, &[], Payload::None).await.map(|_| ())
    }

    async fn search(&self, index: &str, body: Value) -> Result<Value, SearchError> {
        let path = format!("/{index}/_search");
        // Given up there a little before it is given up here.
        let limit = format!("{}ms", QUERY_TIMEOUT.as_millis() - 500);
        let answer = self
            .call(&path, &[("timeout", limit.as_str())], Payload::Json(body))
            .await?;
        // Half of what there is would be no answer.
        match answer["timed_out"] == true || answer["terminated_early"] == true {
            true => Err(slow()),
            false => Ok(answer),
        }
    }

    async fn call(
        &self,
        path: &str,
        query: &[(&str, &str)],
        payload: Payload,
    ) -> Result<Value, SearchError> {
        // Before the first record there is no index, which is not an error.
        let mut all = vec![("ignore_unavailable", "true"), ("allow_no_indices", "true")];
        all.extend_from_slice(query);
        // Given up here first: the client would say that nobody answers.
        let longest = QUERY_TIMEOUT * 2;
        let called = self
            .0
            .elastic
            .call(Method::Post, path, &all, payload, longest);
        match tokio::time::timeout(QUERY_TIMEOUT, called).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(slow()),
        }
    }

    async fn hits(
        &self,
        filter: Vec<Value>,
        order: Order,
        size: usize,
    ) -> Result<Vec<Hit>, SearchError> {
        let body = find::body(filter, order, size);
        let answer = self.search(&self.every_day(), body).await?;
        Ok(find::hits(answer)?)
    }

    /// Records that match: those behind `after`, or without it the newest.
    pub(super) async fn find(
        &self,
        filter: &Filter,
        after: Option<&Cursor>,
        bounds: &Cursor,
    ) -> Result<Found, SearchError> {
        let mut conditions = find::conditions(filter);
        conditions.push(find::between(after, bounds));
        let order = match after {
            Some(_) => Order::OldestFirst,
            None => Order::NewestFirst,
        };
        let mut hits = self.hits(conditions, order, filter.limit).await?;
        let full = after.is_some() && hits.len() == filter.limit;
        if order == Order::NewestFirst {
            hits.reverse();
        }
        let mut at = match after {
            Some(after) => after.clone(),
            None => before_all(&hits, bounds),
        };
        let mut records = Vec::with_capacity(hits.len());
        for hit in hits {
            at.set(&hit.journal, hit.position);
            records.push(LogRecord {
                fields: hit.fields,
                cursor: at.to_string(),
            });
        }
        if !full {
            // Everything up to the bounds was looked through.
            at.advance_to(bounds);
        }
        Ok(Found {
            records,
            next: at,
            full,
        })
    }

    /// The replies of these submissions, by id.
    async fn replies(
        &self,
        submissions: &[Hit],
        bounds: &Cursor,
    ) -> Result<HashMap<String, Map<String, Value>>, SearchError> {
        let ids: Vec<&Value> = submissions
            .iter()
            .filter_map(|hit| hit.fields.get("gantry.submission_id"))
            .collect();
        let conditions = vec![
            json!({"term": {"event.action": "submission.ended"}}),
            json!({"terms": {"gantry.submission_id": ids}}),
            find::between(None, bounds),
        ];
        let hits = self
            .hits(conditions, Order::NewestFirst, submissions.len().max(1))
            .await?;
        let by_id = hits.into_iter().filter_map(|hit| {
            let id = hit.fields.get("gantry.submission_id")?.as_str()?.to_owned();
            Some((id, hit.fields))
        });
        Ok(by_id.collect())
    }
}

fn slow() -> SearchError {
    SearchError::Slow {
        seconds: QUERY_TIMEOUT.as_secs(),
    }
}

/// The place before a page of the newest records: what of a journal is not on the page lies before
/// it, or does not match.
fn before_all(hits: &[Hit], bounds: &Cursor) -> Cursor {
    let mut at = bounds.clone();
    for hit in hits.iter().rev() {
        at.set(&hit.journal, hit.position.saturating_sub(1));
    }
    at
}

/// One line of the list, of a record that a submission was received and of its reply.
fn summary(
    received: &Map<String, Value>,
    reply: Option<&Map<String, Value>>,
) -> Result<SubmissionSummary, SearchError> {
    let of_reply = |name: &str| reply.and_then(|reply| reply.get(name)).cloned();
    let of_receipt = |name: &str| received.get(name).cloned().unwrap_or_default();
    let nanoseconds = of_reply("event.duration").and_then(|value| value.as_u64());
    let line = json!({
        "submission_id": of_receipt("gantry.submission_id"),
        "user_id": of_receipt("user.id"),
        "repl_id": of_receipt("gantry.repl_id"),
        "language": of_receipt("gantry.language"),
        "status": of_reply("gantry.status"),
        "reason": of_reply("error.type"),
        "release": of_reply("gantry.release"),
        "url": of_reply("url.full"),
        "time": of_receipt("@timestamp"),
        "duration_ms": nanoseconds.map(|ns| ns / 1_000_000),
    });
    let parsed = serde_json::from_value(line);
    Ok(parsed.map_err(|error| ElasticsearchError::Nonsense {
        cause: format!("a submission's record: {error}"),
    })?)
}

#[async_trait]
impl LogSearch for ElasticsearchSearch {
    fn check(&self, query: &LogQuery) -> Result<(), FieldError> {
        split(query.clone()).map(|_| ())
    }

    async fn query(&self, query: LogQuery) -> Result<LogPage, SearchError> {
        let asker = query.asker.clone();
        let (filter, after) = split(query)?;
        self.wait_for_index().await;
        let _turn = self.0.turns.enter(asker.as_ref()).await?;
        let bounds = self.bounds().await?;
        let found = self.find(&filter, after.as_ref(), &bounds).await?;
        Ok(LogPage {
            records: found.records,
            next: Some(found.next.to_string()),
        })
    }

    async fn submissions(&self, mut query: SubmissionQuery) -> Result<SubmissionPage, SearchError> {
        let mut before = Before::parse(query.before.take())?;
        let asker = query.asker.clone();
        let filter = SubmissionFilter::try_from(query)?;
        self.wait_for_index().await;
        let _turn = self.0.turns.enter(asker.as_ref()).await?;
        let bounds = self.bounds().await?;
        let mut page = SubmissionPage {
            submissions: Vec::new(),
            next: None,
        };
        for _ in 0..SCANNED_SUBMISSIONS / SUBMISSIONS_AT_ONCE {
            let hits = self.received(&filter, before.as_ref(), &bounds).await?;
            let replies = self.replies(&hits, &bounds).await?;
            let scanned = hits.len();
            for hit in hits {
                if page.submissions.len() == filter.limit {
                    page.next = before.map(|before| before.to_string());
                    return Ok(page);
                }
                let id = hit
                    .fields
                    .get("gantry.submission_id")
                    .and_then(Value::as_str);
                let reply = id.and_then(|id| replies.get(id));
                let line = summary(&hit.fields, reply)?;
                let status = line.status.map_or("", |status| status.as_str());
                before = Some(Before {
                    clock: hit.clock,
                    journal: hit.journal,
                    position: hit.position,
                });
                if filter.status.is_none_or(|wanted| wanted == status) {
                    page.submissions.push(line);
                }
            }
            if scanned < SUBMISSIONS_AT_ONCE {
                return Ok(page);
            }
        }
        page.next = before.map(|before| before.to_string());
        Ok(page)
    }

    fn follow(&self, query: LogQuery) -> BoxStream<'static, Result<LogRecord, SearchError>> {
        follow::follow(self.clone(), query.clone(), split(query))
    }
}

impl ElasticsearchSearch {
    async fn wait_for_index(&self) {
        let wanted = *self.0.journal.durable_position().borrow();
        if !self.0.shipper.reached(wanted, FRESHNESS_TIMEOUT).await {
            tracing::debug!("Elasticsearch is behind the journal; an answer shows what it has");
        }
    }

    /// Records that a submission was received, newest first, older than `before`.
    async fn received(
        &self,
        filter: &SubmissionFilter,
        before: Option<&Before>,
        bounds: &Cursor,
    ) -> Result<Vec<Hit>, SearchError> {
        let mut conditions = vec![
            json!({"term": {"event.action": "submission.received"}}),
            find::between(None, bounds),
        ];
        if let Some(user) = &filter.user {
            conditions.push(json!({"term": {"user.id": user.as_str()}}));
        }
        if let Some(repl) = &filter.repl {
            conditions.push(json!({"term": {"gantry.repl_id": repl.as_str()}}));
        }
        let mut body = find::body(conditions, Order::NewestFirst, SUBMISSIONS_AT_ONCE);
        if let Some(before) = before {
            body["search_after"] = json!([before.clock, before.journal, before.position]);
        }
        let answer = self.search(&self.every_day(), body).await?;
        Ok(find::hits(answer)?)
    }
}

/// The parts of a query: what to look for, and where to begin.
fn split(mut query: LogQuery) -> Result<(Filter, Option<Cursor>), FieldError> {
    let after = Cursor::parse("after", query.after.take())?;
    Ok((Filter::try_from(query)?, after))
}
