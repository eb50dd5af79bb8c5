//! The embedded search: indexing the journal, answering, following.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use rusqlite::Connection;
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use super::database::{self, Writer};
use super::live::{self, News};
use super::query::{
    Filter, LogPage, LogQuery, LogRecord, SearchError, SubmissionFilter, SubmissionPage,
    SubmissionQuery,
};
use super::search::LogSearch;
use super::turns::{Turn, Turns};
use crate::journal::{Journal, JournalError};
use crate::model::{FieldError, UserId};

/// How long an answer waits for the index to reach what was durable when it was asked. Usually a few
/// milliseconds; an index that is being rebuilt must not hold up every page.
const FRESHNESS_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest search; what takes longer is a mistake, and a thread lost to everybody else.
const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two batches of the index: nobody is waiting, and a transaction per record would
/// take processor time from the programs being tested.
const INDEX_PAUSE: Duration = Duration::from_millis(50);
/// Pause after a failure of the index or of the journal.
const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// Bytes of journal taken in at once.
const BATCH_BYTES: usize = 1 << 20;
/// Searches at the same time; two cores gain nothing from more.
const CONNECTIONS: usize = 4;

/// How much the index keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SearchOptions {
    /// Bytes of the index file. The oldest records are deleted before it is as large.
    pub max_bytes: u64,
    /// Age past which records are deleted.
    pub max_age: Duration,
}

impl Default for SearchOptions {
    fn default() -> Self {
        Self {
            max_bytes: 1 << 30,
            max_age: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

/// The embedded search. Clones are the same.
#[derive(Clone)]
pub struct EmbeddedSearch(Arc<Inner>);

impl std::fmt::Debug for EmbeddedSearch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedSearch")
            .field("path", &self.0.path)
            .finish_non_exhaustive()
    }
}

struct Inner {
    path: PathBuf,
    journal: Journal,
    options: SearchOptions,
    writer: Mutex<Writer>,
    indexed: watch::Sender<u64>,
    /// Somebody waits for the index.
    wanted: Notify,
    readers: Mutex<Vec<Connection>>,
    permits: Arc<Semaphore>,
    turns: Turns,
}

impl EmbeddedSearch {
    /// Opens the index in this file; makes it when it is lost or not usable.
    pub fn open(path: &Path, journal: Journal) -> Result<EmbeddedSearch, SearchError> {
        Self::open_with(path, journal, SearchOptions::default())
    }

    /// The same, with other bounds.
    pub fn open_with(
        path: &Path,
        journal: Journal,
        options: SearchOptions,
    ) -> Result<EmbeddedSearch, SearchError> {
        let writer = database::open(path, *journal.durable_position().borrow())?;
        Ok(EmbeddedSearch(Arc::new(Inner {
            path: path.to_owned(),
            journal,
            options,
            indexed: watch::channel(writer.position).0,
            writer: Mutex::new(writer),
            wanted: Notify::new(),
            readers: Mutex::new(Vec::new()),
            permits: Arc::new(Semaphore::new(CONNECTIONS)),
            turns: Turns::new(QUERY_TIMEOUT),
        })))
    }

    /// Takes the journal in as it grows, until told to stop.
    pub async fn run(self, stop: CancellationToken) {
        stop.run_until_cancelled(self.index()).await;
    }

    async fn index(&self) {
        let mut durable = self.0.journal.durable_position();
        loop {
            match self.index_batch().await {
                Ok(true) => {}
                Ok(false) => {
                    let indexed = *self.0.indexed.borrow();
                    // An error is the end of the journal.
                    if durable
                        .wait_for(|durable| *durable > indexed)
                        .await
                        .is_err()
                    {
                        return;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(INDEX_PAUSE) => {}
                        () = self.0.wanted.notified() => {}
                    }
                }
                Err(SearchError::Journal(JournalError::Closed)) => return,
                Err(error) => {
                    tracing::error!("indexing the logs failed and is tried again: {error}");
                    tokio::time::sleep(FAILURE_PAUSE).await;
                }
            }
        }
    }

    /// Takes in the next records; false when there are none.
    async fn index_batch(&self) -> Result<bool, SearchError> {
        let next = *self.0.indexed.borrow() + 1;
        let records = match self.0.journal.read_shared(next, BATCH_BYTES).await {
            Ok(records) => records,
            Err(JournalError::Corrupt {
                resume: Some(resume),
                file,
                ..
            }) => {
                tracing::error!(
                    "{} is damaged: the logs in it cannot be searched",
                    file.display()
                );
                self.write(move |writer| writer.skip_to(resume - 1)).await?;
                return Ok(true);
            }
            Err(error) => return Err(error.into()),
        };
        if records.is_empty() {
            return Ok(false);
        }
        let options = self.0.options;
        self.write(move |writer| {
            writer.insert(&records)?;
            // Deletes at least as fast as it takes in: a batch is smaller than what one call deletes.
            writer.retain(options.max_bytes, options.max_age)?;
            Ok(())
        })
        .await?;
        Ok(true)
    }

    async fn write(
        &self,
        work: impl FnOnce(&mut Writer) -> Result<(), SearchError> + Send + 'static,
    ) -> Result<(), SearchError> {
        let inner = Arc::clone(&self.0);
        let done = tokio::task::spawn_blocking(move || {
            let mut writer = inner.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let result = work(&mut writer);
            inner.indexed.send_replace(writer.position);
            result
        });
        done.await.map_err(|_| SearchError::Closed)?
    }

    async fn wait_for_index(&self) {
        let wanted = *self.0.journal.durable_position().borrow();
        let mut indexed = self.0.indexed.subscribe();
        if *indexed.borrow() >= wanted {
            return;
        }
        self.0.wanted.notify_one();
        let reached = indexed.wait_for(|indexed| *indexed >= wanted);
        if tokio::time::timeout(FRESHNESS_TIMEOUT, reached)
            .await
            .is_err()
        {
            tracing::debug!("the search index is behind; an answer shows what it has");
        }
    }

    /// Runs a search on a connection of its own, off the async threads.
    async fn read<T: Send + 'static>(
        &self,
        turn: Turn,
        work: impl FnOnce(&mut Connection) -> Result<T, SearchError> + Send + 'static,
    ) -> Result<T, SearchError> {
        let permits = Arc::clone(&self.0.permits);
        let permit = tokio::time::timeout(QUERY_TIMEOUT, permits.acquire_owned()).await;
        let permit = permit
            .map_err(|_| slow())?
            .map_err(|_| SearchError::Closed)?;
        let idle = self.readers().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => {
                let path = self.0.path.clone();
                let opened = tokio::task::spawn_blocking(move || database::reader(&path));
                opened.await.map_err(|_| SearchError::Closed)??
            }
        };
        let interrupt = connection.get_interrupt_handle();
        let inner = Arc::clone(&self.0);
        let mut task = tokio::task::spawn_blocking(move || {
            let mut connection = connection;
            let result = work(&mut connection);
            inner
                .readers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(connection);
            // Held by the task, not by the caller, who may have gone.
            drop(permit);
            drop(turn);
            result
        });
        match tokio::time::timeout(QUERY_TIMEOUT, &mut task).await {
            Ok(done) => done.map_err(|_| SearchError::Closed)?,
            Err(_) => {
                interrupt.interrupt();
                // It may have finished at the last moment.
                task.await
                    .map_err(|_| SearchError::Closed)?
                    .map_err(|_| slow())
            }
        }
    }

    fn readers(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.0
            .readers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl LogSearch for EmbeddedSearch {
    fn check(&self, query: &LogQuery) -> Result<(), FieldError> {
        Filter::try_from(query.clone()).map(|_| ())
    }

    async fn query(&self, query: LogQuery) -> Result<LogPage, SearchError> {
        let asker = query.asker.clone();
        let filter = Filter::try_from(query)?;
        self.wait_for_index().await;
        let turn = self.0.turns.enter(asker.as_ref()).await?;
        self.read(turn, move |connection| {
            database::find(connection, &filter, None)
        })
        .await
    }

    async fn submissions(&self, query: SubmissionQuery) -> Result<SubmissionPage, SearchError> {
        let asker = query.asker.clone();
        let filter = SubmissionFilter::try_from(query)?;
        self.wait_for_index().await;
        let turn = self.0.turns.enter(asker.as_ref()).await?;
        self.read(turn, move |connection| database::list(connection, &filter))
            .await
    }

    fn follow(&self, query: LogQuery) -> BoxStream<'static, Result<LogRecord, SearchError>> {
        let asker = query.asker.clone();
        let filter = match Filter::try_from(query) {
            Ok(filter) => filter,
            Err(error) => return stream::once(async { Err(error.into()) }).boxed(),
        };
        let follower = Follower {
            search: self.clone(),
            asker,
            filter,
            place: Place::Before,
            waiting: VecDeque::new(),
        };
        let items = stream::unfold(Some(follower), |follower| async move {
            let mut follower = follower?;
            let (item, goes_on) = follower.next().await;
            Some((item, goes_on.then_some(follower)))
        });
        items.boxed()
    }
}

fn slow() -> SearchError {
    SearchError::Slow {
        seconds: QUERY_TIMEOUT.as_secs(),
    }
}

/// How far a follower is.
enum Place {
    /// Nothing was looked at yet.
    Before,
    /// In the index, which is read up to this position.
    Index(u64),
    /// In the journal.
    Journal(BoxStream<'static, Result<News, JournalError>>),
}

struct Follower {
    search: EmbeddedSearch,
    asker: Option<UserId>,
    filter: Filter,
    place: Place,
    waiting: VecDeque<LogRecord>,
}

impl Follower {
    /// The next item, and whether another may follow it.
    async fn next(&mut self) -> (Result<LogRecord, SearchError>, bool) {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                return (Ok(record), true);
            }
            let looked = match &mut self.place {
                Place::Before => {
                    // What the index has now comes from it, everything else from the journal.
                    self.place = Place::Index(*self.search.0.indexed.borrow());
                    Ok(())
                }
                Place::Index(up_to) => {
                    let up_to = *up_to;
                    self.look_in_index(up_to).await
                }
                Place::Journal(news) => match news.next().await {
                    Some(Ok(news)) => {
                        let records = news.records.into_iter();
                        self.waiting
                            .extend(records.map(|(position, fields)| LogRecord {
                                fields,
                                cursor: position.to_string(),
                            }));
                        Ok(())
                    }
                    Some(Err(error)) => Err(error.into()),
                    None => Err(SearchError::Closed),
                },
            };
            if let Err(error) = looked {
                return (Err(error), false);
            }
        }
    }

    async fn look_in_index(&mut self, up_to: u64) -> Result<(), SearchError> {
        let filter = self.filter.clone();
        let find =
            move |connection: &mut Connection| database::find(connection, &filter, Some(up_to));
        let turn = self.search.0.turns.wait(self.asker.as_ref()).await?;
        let page = self.search.read(turn, find).await?;
        let next = page
            .next
            .and_then(|next| next.parse().ok())
            .unwrap_or(up_to);
        self.filter.after = Some(next);
        if next >= up_to {
            let journal = self.search.0.journal.clone();
            self.place = Place::Journal(live::news(journal, self.filter.clone(), next));
        }
        self.waiting.extend(page.records);
        Ok(())
    }
}
