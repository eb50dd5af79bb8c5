//! One batch on its way, until every record of it is in the index or among the dead letters.

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;

use super::batch::{Batch, Refused};
use super::decision::{self, Fate, ItemAnswer, ItemError, RequestFate};
use super::{LONGEST_PAUSE, Shipper, pauses};
use crate::logs::elasticsearch::{Answer, ElasticsearchError, Method, Payload};

/// For one bulk request. A busy cluster takes seconds; after this the batch is sent again, which
/// doubles nothing.
const BULK_TIMEOUT: Duration = Duration::from_secs(30);
/// What is needed of the answer: without it each record's index, version and shards come back.
const ANSWER_FIELDS: &str = "items.create.status,items.create.error.type,items.create.error.reason";
/// Batches are not made smaller than this: what is refused then is one record.
const SMALLEST_BATCH: usize = 64 << 10;

/// What one request came to.
enum Outcome {
    Answered(Vec<ItemAnswer>),
    TooLarge,
    Again(String),
}

impl Shipper {
    /// Sends the batch until nothing of it is left.
    pub(super) async fn deliver(&self, batch: Batch) {
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            if let Some((left, right)) = self.deliver_part(part).await {
                parts.push(right);
                parts.push(left);
            }
        }
    }

    /// The same for one part; two halves when it is too large.
    async fn deliver_part(&self, mut batch: Batch) -> Option<(Batch, Batch)> {
        let mut pauses = pauses();
        let mut compressed = compress(&batch).await;
        while !batch.is_empty() {
            let cause = match self.send(&compressed, batch.len()).await {
                Outcome::Answered(answers) => {
                    let before = batch.len();
                    let cause = problem(&answers);
                    batch = self.settle(batch, &answers).await;
                    compressed = compress(&batch).await;
                    if batch.len() < before {
                        self.is_well();
                        pauses = self::pauses();
                    }
                    cause
                }
                Outcome::TooLarge if batch.len() > 1 => {
                    let less = (batch.body().len() / 2).max(SMALLEST_BATCH);
                    self.0.batch_bytes.fetch_min(less, Ordering::Relaxed);
                    return Some(batch.halves());
                }
                Outcome::TooLarge => {
                    let error = ItemError {
                        kind: "content_too_large".to_owned(),
                        reason: "the record alone is larger than a request may be".to_owned(),
                    };
                    let answer = ItemAnswer {
                        status: 413,
                        error: Some(error),
                    };
                    batch = self.settle(batch, &[answer]).await;
                    compressed = compress(&batch).await;
                    None
                }
                Outcome::Again(cause) => Some(cause),
            };
            if let Some(cause) = cause {
                metrics::counter!("gantry_logs_retries_total").increment(batch.len() as u64);
                self.is_ill(&cause);
                let pause = pauses.next().unwrap_or(LONGEST_PAUSE);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = self.0.recovered.notified() => {}
                }
            }
        }
        None
    }

    async fn send(&self, compressed: &Bytes, count: usize) -> Outcome {
        if let Err(error) = self.make_sure_of_templates().await {
            return Outcome::Again(error.to_string());
        }
        let query = [("filter_path", ANSWER_FIELDS)];
        let lines = Payload::Lines(compressed.clone());
        let sent = self
            .0
            .elastic
            .send(Method::Post, "/_bulk", &query, lines, BULK_TIMEOUT)
            .await;
        let answer = match sent {
            Ok(answer) => answer,
            Err(error) => return Outcome::Again(error.to_string()),
        };
        match decision::request_fate(answer.status) {
            RequestFate::Answered => read(&answer, count),
            RequestFate::Again => Outcome::Again(answer.error().to_string()),
            RequestFate::Smaller => Outcome::TooLarge,
        }
    }

    /// What is to be sent again: records that were not taken for now, and stand-ins for those that
    /// never will be.
    async fn settle(&self, batch: Batch, answers: &[ItemAnswer]) -> Batch {
        let mut rest = Batch::default();
        let mut letters = Vec::new();
        let mut done = 0;
        for (index, answer) in answers.iter().enumerate() {
            match decision::fate(answer) {
                Fate::Done => done += 1,
                Fate::Again => rest.take(&batch, index),
                Fate::Refused => match batch.refused(index) {
                    Ok(refused) => letters.push((refused, answer.clone())),
                    // It was written by this program a moment ago.
                    Err(error) => tracing::error!(%error, "a refused record cannot be read back"),
                },
            }
        }
        metrics::counter!("gantry_logs_shipped_total").increment(done);
        for (refused, answer) in self.put_aside(letters).await {
            if !refused.stand_in {
                let error = answer.error.unwrap_or_default();
                rest.put_stand_in(&refused, &error.kind, &error.reason);
            }
        }
        rest
    }

    /// Writes refused records to the dead letters, however long that takes: until then nothing of
    /// them may be forgotten.
    async fn put_aside(&self, letters: Vec<(Refused, ItemAnswer)>) -> Vec<(Refused, ItemAnswer)> {
        let Some((first, answer)) = letters.first() else {
            return letters;
        };
        metrics::counter!("gantry_logs_refused_total").increment(letters.len() as u64);
        tracing::error!(
            id = first.id,
            status = answer.status,
            error = ?answer.error,
            count = letters.len(),
            "Elasticsearch refused records; they are in the dead-letter file of the data folder"
        );
        let mut letters = letters;
        let mut pauses = pauses();
        loop {
            let shipper = self.clone();
            let write = move || {
                let written = shipper.0.dead_letters.add(&letters);
                (letters, written)
            };
            let written;
            match tokio::task::spawn_blocking(write).await {
                Ok(result) => (letters, written) = result,
                // Only when the server is stopping: the batch is sent again by the next one.
                Err(_) => return Vec::new(),
            }
            match written {
                Ok(()) => return letters,
                Err(error) => {
                    tracing::error!(%error, "dead letters cannot be written; they are tried again");
                }
            }
            tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }
}

fn read(answer: &Answer, count: usize) -> Outcome {
    match decision::answers(&answer.body, count) {
        Some(answers) => Outcome::Answered(answers),
        None => Outcome::Again(
            ElasticsearchError::Nonsense {
                cause: "a bulk request was answered without each record's status".to_owned(),
            }
            .to_string(),
        ),
    }
}

/// What keeps records from being taken for now, if something does.
fn problem(answers: &[ItemAnswer]) -> Option<String> {
    let kept = answers
        .iter()
        .find(|answer| decision::fate(answer) == Fate::Again)?;
    let error = kept.error.clone().unwrap_or_default();
    Some(format!(
        "Elasticsearch does not take records now (status {}, {}: {}); its own log says more",
        kept.status, error.kind, error.reason
    ))
}

/// The body as it is sent. Off the async threads: a megabyte takes some ten milliseconds.
async fn compress(batch: &Batch) -> Bytes {
    // Shared with the closure would need a lock around the batch; a copy costs less than compressing.
    let body = batch.body().to_vec();
    let work = move || {
        let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 6), Compression::fast());
        // Into memory: this cannot fail.
        let written = encoder.write_all(&body);
        written.and_then(|()| encoder.finish()).unwrap_or_default()
    };
    Bytes::from(tokio::task::spawn_blocking(work).await.unwrap_or_default())
}
