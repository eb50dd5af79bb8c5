//! Ships the journal to Elasticsearch: at least once on the wire, exactly once in the index.
//!
//! The journal is read in order, cut into batches, and a few batches are on their way at a time.
//! Every record has an id made from itself, and is only ever created: sent again after a lost answer
//! or a crash, it is found to be there. Nothing waits for the shipper; while Elasticsearch is away it
//! holds a few batches, and the rest stays where it is: in the journal.

mod batch;
mod dead_letter;
mod decision;
mod delivery;
mod progress;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};
use jiff::Timestamp;
use serde_json::json;
use tokio::sync::{self, Notify, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::elasticsearch::{
    CALL_TIMEOUT, Elasticsearch, ElasticsearchError, Method, Payload, answers, install, installed,
};
use crate::journal::{Journal, JournalError};
pub(in crate::logs) use batch::{Batch, CLOCK, JOURNAL, Origin, POSITION};
use dead_letter::DeadLetters;
use progress::{InOrder, Progress};

/// Between two attempts, growing: long enough that a cluster in trouble is not pressed, short enough
/// that records flow seconds after it is back.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Between two looks for more records while a batch fills.
const COLLECT_PAUSE: Duration = Duration::from_millis(100);
/// Bytes of journal turned into lines at once.
const READ_BYTES: usize = 512 << 10;
/// Between two records of how far it is: what a crash makes it send again.
const SAVE_PAUSE: Duration = Duration::from_secs(1);
/// Between two messages about the same trouble: its cause may have changed.
const TELL_PAUSE: Duration = Duration::from_secs(60);
/// How old the knowledge may be that the templates are there. An Elasticsearch that is put in another's
/// place takes longer than this to start.
const TEMPLATES_AGE: Duration = Duration::from_secs(1);
/// After the journal could not be read.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);

/// Sizes and places.
#[derive(Debug, Clone)]
pub struct ShipperOptions {
    /// Where its progress and the dead letters are kept.
    pub folder: PathBuf,
    /// A batch sets out when it has this many bytes of lines,
    pub batch_bytes: usize,
    /// or when its first record has waited this long.
    pub batch_age: Duration,
    /// Batches on their way at a time.
    pub in_flight: usize,
}

impl ShipperOptions {
    /// The usual sizes: a request of 2 MiB is within every server's limit, 0.5 s is less than the
    /// index takes to show a record and few enough requests to leave a small Elasticsearch time for
    /// others, and with three requests on the way none waits for another's answer.
    pub fn in_folder(folder: PathBuf) -> Self {
        Self {
            folder,
            batch_bytes: 2 << 20,
            batch_age: Duration::from_millis(500),
            in_flight: 3,
        }
    }
}

/// The shipper. Clones are the same.
#[derive(Debug, Clone)]
pub struct Shipper(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    journal: Journal,
    elastic: Elasticsearch,
    origin: Origin,
    options: ShipperOptions,
    /// Bytes of a batch; less than in the options once something on the way found those too many.
    batch_bytes: AtomicUsize,
    order: Mutex<InOrder>,
    /// Everything up to there is in the index.
    shipped: watch::Sender<Progress>,
    /// Somebody waits for what is in the journal now.
    wanted: Notify,
    well: AtomicBool,
    /// When it was last said that it is not.
    told: Mutex<Option<Instant>>,
    recovered: Notify,
    dead_letters: DeadLetters,
    templates: sync::Mutex<Templates>,
    /// Elasticsearch has lost what was shipped to it.
    wiped: Notify,
}

/// What is known of the templates.
#[derive(Debug, Default)]
struct Templates {
    /// They are of this version or a later one.
    checked: bool,
    /// When they were last seen to be there.
    seen: Option<Instant>,
}

/// Where the reading is.
#[derive(Debug, Clone, Copy)]
struct Place {
    next: u64,
    clock: i64,
}

impl Shipper {
    /// Takes up where an earlier one left off. From here on the journal keeps what was not shipped.
    pub fn open(
        journal: Journal,
        elastic: Elasticsearch,
        options: ShipperOptions,
    ) -> std::io::Result<Shipper> {
        std::fs::create_dir_all(&options.folder)?;
        let progress = Progress::load(&options.folder.join("shipped.json"), journal.identity());
        journal.keep_from(progress.position + 1);
        Ok(Shipper(Arc::new(Inner {
            origin: Origin {
                journal: journal.identity().to_owned(),
                index: elastic.logs(),
            },
            batch_bytes: AtomicUsize::new(options.batch_bytes),
            order: Mutex::default(),
            shipped: watch::channel(progress).0,
            wanted: Notify::new(),
            well: AtomicBool::new(true),
            told: Mutex::default(),
            recovered: Notify::new(),
            dead_letters: DeadLetters::new(options.folder.join("dead-letters.ndjson")),
            templates: sync::Mutex::default(),
            wiped: Notify::new(),
            journal,
            elastic,
            options,
        })))
    }

    /// Ships until told to stop. What is on its way then is sent again by the next one.
    pub async fn run(self, stop: CancellationToken) {
        let work = async {
            self.prepare().await;
            tokio::select! {
                () = self.ship() => {}
                () = self.keep_account() => {}
            }
        };
        stop.run_until_cancelled(work).await;
        self.save().await;
    }

    /// The position up to which every record is in the index.
    pub(in crate::logs) fn position(&self) -> u64 {
        self.0.shipped.borrow().position
    }

    /// Waits until everything up to this position is in the index, and has what waits set out now.
    /// False when that takes longer than `limit`, or would because Elasticsearch is away.
    pub(in crate::logs) async fn reached(&self, position: u64, limit: Duration) -> bool {
        let mut shipped = self.0.shipped.subscribe();
        if shipped.borrow().position >= position {
            return true;
        }
        if !self.0.well.load(Ordering::Relaxed) {
            return false;
        }
        self.0.wanted.notify_one();
        let reached = shipped.wait_for(|progress| progress.position >= position);
        matches!(tokio::time::timeout(limit, reached).await, Ok(Ok(_)))
    }

    /// Waits until the templates are in place.
    async fn prepare(&self) {
        let mut pauses = pauses();
        loop {
            match self.make_sure_of_templates().await {
                Ok(()) => {
                    self.is_well();
                    tracing::info!(url = self.0.elastic.url(), "shipping to Elasticsearch");
                    return;
                }
                Err(error) => self.is_ill(&error.to_string()),
            }
            tokio::time::sleep(pauses.next().unwrap_or(LONGEST_PAUSE)).await;
        }
    }

    /// Before the templates no record may go, or its fields would be guessed. They may go missing at any
    /// time: with all the rest, when a cluster is made anew.
    async fn make_sure_of_templates(&self) -> Result<(), ElasticsearchError> {
        let elastic = &self.0.elastic;
        let mut templates = self.0.templates.lock().await;
        let seen = templates.seen.take();
        if seen.is_some_and(|seen| seen.elapsed() < TEMPLATES_AGE) {
            templates.seen = seen;
            return Ok(());
        }
        let missing = !installed(elastic).await?;
        if missing && self.position() > 0 {
            let own = format!("/{}/_doc/{}", elastic.journals(), self.0.origin.journal);
            if !answers(elastic, &own).await? {
                self.0.wiped.notify_one();
            }
        }
        if missing || !templates.checked {
            let abilities = install(elastic).await?;
            if !abilities.lifecycle && !templates.checked {
                tracing::warn!(
                    "this Elasticsearch has no index lifecycle management: delete old gantry-logs-* indices by other means"
                );
            }
            templates.checked = true;
        }
        templates.seen = Some(Instant::now());
        Ok(())
    }

    /// Begins again with what the journal still has.
    fn begin_again(&self) {
        tracing::warn!(
            "Elasticsearch has none of the records that were shipped to it; what the journal still has is shipped again"
        );
        self.0.shipped.send_modify(|progress| {
            progress.position = 0;
            progress.clock = 0;
        });
    }

    /// Reads, and sends what it read, until the journal closes.
    async fn ship(&self) {
        let permits = Arc::new(Semaphore::new(self.0.options.in_flight));
        loop {
            let mut deliveries = JoinSet::new();
            let mut place = self.start_over();
            let failed = loop {
                let collected = tokio::select! {
                    collected = self.collect(&mut place) => collected,
                    () = self.0.wiped.notified() => break None,
                };
                match collected {
                    Ok(batch) => {
                        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else {
                            return;
                        };
                        let ticket = self.order().sets_out(place.next - 1, place.clock);
                        let shipper = self.clone();
                        deliveries.spawn(async move {
                            shipper.deliver(batch).await;
                            shipper.arrived(ticket);
                            drop(permit);
                        });
                    }
                    Err(JournalError::Closed) => return,
                    Err(error) => {
                        tracing::error!("shipping the logs failed and goes on in a moment: {error}")
                    }
                }
                if let Some(Err(error)) = deliveries.try_join_next() {
                    break Some(error);
                }
            };
            let Some(failed) = failed else {
                self.begin_again();
                continue;
            };
            // A batch that was never delivered would hold up all later ones.
            tracing::error!(%failed, "a delivery died; what was under way is sent again");
            tokio::time::sleep(FAILURE_PAUSE).await;
        }
    }

    /// The place behind everything that arrived.
    fn start_over(&self) -> Place {
        self.order().start_over();
        let progress = self.0.shipped.borrow();
        Place {
            next: progress.position + 1,
            clock: progress.clock,
        }
    }

    /// The next batch: full, or as old as it may become.
    async fn collect(&self, place: &mut Place) -> Result<Batch, JournalError> {
        let mut batch = Batch::default();
        let mut deadline = None;
        loop {
            let most = self.0.batch_bytes.load(Ordering::Relaxed);
            // A record's lines are larger than what the journal has of it.
            let read = READ_BYTES.min(most / 2);
            let records = match self.0.journal.read_shared(place.next, read).await {
                Ok(records) => records,
                Err(error) => {
                    self.skip_damage(&error, place).await;
                    if batch.is_empty() {
                        return Err(error);
                    } else {
                        return Ok(batch);
                    }
                }
            };
            let Some(last) = records.last().map(|record| record.position) else {
                match deadline {
                    None => {
                        let mut durable = self.0.journal.durable_position();
                        let came = durable.wait_for(|durable| *durable >= place.next);
                        came.await.map_err(|_| JournalError::Closed)?;
                    }
                    Some(deadline) => {
                        let pause = (Instant::now() + COLLECT_PAUSE).min(deadline);
                        tokio::select! {
                            () = tokio::time::sleep_until(pause) => {}
                            () = self.0.wanted.notified() => return Ok(batch),
                        }
                        if Instant::now() >= deadline {
                            return Ok(batch);
                        }
                    }
                }
                continue;
            };
            let origin = self.0.origin.clone();
            let mut clock = place.clock;
            let encoded = tokio::task::spawn_blocking(move || {
                for record in records {
                    clock = clock.max(record.time.as_microsecond());
                    batch.push(&record, &origin, clock);
                }
                (batch, clock)
            });
            (batch, place.clock) = encoded.await.map_err(|_| JournalError::Closed)?;
            place.next = last + 1;
            let deadline = *deadline.get_or_insert(Instant::now() + self.0.options.batch_age);
            if batch.body().len() >= most || Instant::now() >= deadline {
                return Ok(batch);
            }
        }
    }

    /// Goes on behind a damaged file; waits after any other failure.
    async fn skip_damage(&self, error: &JournalError, place: &mut Place) {
        if let JournalError::Corrupt {
            resume: Some(resume),
            ..
        } = error
        {
            metrics::counter!("gantry_logs_damaged_total").increment(1);
            place.next = (*resume).max(place.next + 1);
        } else if !matches!(error, JournalError::Closed) {
            tokio::time::sleep(FAILURE_PAUSE).await;
        }
    }

    fn arrived(&self, ticket: u64) {
        let reached = self.order().arrives(ticket);
        if let Some((position, clock)) = reached {
            self.0.shipped.send_modify(|progress| {
                progress.position = position;
                progress.clock = clock;
            });
        }
    }

    /// Writes down how far it is, here and where other servers see it.
    async fn keep_account(&self) {
        let mut shipped = self.0.shipped.subscribe();
        shipped.mark_changed();
        loop {
            self.measure();
            // Cannot fail: the sender is in `self`.
            if shipped.has_changed().unwrap_or(false) {
                shipped.mark_unchanged();
                self.save().await;
                self.announce().await;
            } else if self.0.well.load(Ordering::Relaxed) {
                // Seen also while nothing happens. Whoever ships says what is wrong.
                let _ = self.make_sure_of_templates().await;
            }
            tokio::time::sleep(SAVE_PAUSE).await;
        }
    }

    async fn save(&self) {
        let progress = self.0.shipped.borrow().clone();
        let path = self.0.options.folder.join("shipped.json");
        let position = progress.position;
        let stored = tokio::task::spawn_blocking(move || progress.store(&path)).await;
        match stored {
            Ok(Ok(())) => self.0.journal.keep_from(position + 1),
            // Only more is sent again after a crash.
            Ok(Err(error)) => {
                tracing::warn!(%error, "how far the logs were shipped cannot be written down")
            }
            Err(error) => {
                tracing::warn!(%error, "how far the logs were shipped cannot be written down")
            }
        }
    }

    /// Tells other servers that everything up to there can be found.
    async fn announce(&self) {
        if self.make_sure_of_templates().await.is_err() {
            // Whoever ships says why.
            return;
        }
        let progress = self.0.shipped.borrow().clone();
        let path = format!("/{}/_doc/{}", self.0.elastic.journals(), progress.journal);
        let body = json!({
            "@timestamp": Timestamp::now().to_string(),
            "journal": progress.journal,
            "position": progress.position,
        });
        // One small document a second: seen at once, so that nobody else has to ask for it.
        let seen = [("refresh", "true")];
        let told = self
            .0
            .elastic
            .call(Method::Put, &path, &seen, Payload::Json(body), CALL_TIMEOUT)
            .await;
        if let Err(error) = told {
            tracing::debug!(%error, "other servers are not told how far the logs were shipped");
        }
    }

    fn measure(&self) {
        let progress = self.0.shipped.borrow();
        let waits = *self.0.journal.durable_position().borrow() > progress.position;
        let lag = match Timestamp::from_microsecond(progress.clock) {
            Ok(clock) if waits && progress.clock > 0 => Timestamp::now()
                .duration_since(clock)
                .as_secs_f64()
                .max(0.0),
            _ => 0.0,
        };
        metrics::gauge!("gantry_logs_shipping_lag_seconds").set(lag);
    }

    fn order(&self) -> std::sync::MutexGuard<'_, InOrder> {
        self.0.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Elasticsearch does what it should again.
    fn is_well(&self) {
        metrics::gauge!("gantry_elasticsearch_up").set(1.0);
        if !self.0.well.swap(true, Ordering::Relaxed) {
            tracing::info!("Elasticsearch takes records again");
            self.0.recovered.notify_waiters();
        }
    }

    fn is_ill(&self, cause: &str) {
        metrics::gauge!("gantry_elasticsearch_up").set(0.0);
        let newly = self.0.well.swap(false, Ordering::Relaxed);
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if newly || told.is_none_or(|told| told.elapsed() > TELL_PAUSE) {
            *told = Some(Instant::now());
            tracing::warn!("logs stay in the journal and are shipped later: {cause}");
        }
    }
}

/// Growing pauses without an end, each of a random length so that servers do not come back together.
fn pauses() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LONGEST_PAUSE)
        .with_jitter()
        .without_max_times()
        .build()
}
