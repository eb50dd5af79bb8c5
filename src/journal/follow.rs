//! Following one submission: what is there, then what comes.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::watch;
use tokio::time::timeout;

use super::front::Shared;
use super::pieces::Item;
use super::store::{self, lock};
use super::{JournalError, blocking};
use crate::model::{Record, SubmissionId};

/// Records taken from memory at once: they are shared, so this bounds what a slow reader keeps alive.
const MEMORY_CHUNK: usize = 64;
/// Bytes taken from memory or read from disk at once: what each submission holds that a client follows
/// and does not read, a thousand on one connection.
const CHUNK_BYTES: usize = 64 << 10;

/// A second look after this long. A commit takes milliseconds; this is for the disk that hangs.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub(super) fn follow(
    shared: Arc<Shared>,
    id: SubmissionId,
    after_seq: u64,
) -> impl Stream<Item = Result<Item, JournalError>> + Send + 'static {
    let news = {
        let mut store = lock(&shared.store);
        (!store.closed).then(|| store.tail.subscribe(id))
    };
    let follower = Follower {
        news,
        shared,
        id,
        last: after_seq,
        position: 0,
        waiting: VecDeque::new(),
        done: false,
    };
    stream::unfold(follower, |mut follower| async move {
        let item = follower.next().await?;
        Some((item, follower))
    })
}

struct Follower {
    shared: Arc<Shared>,
    id: SubmissionId,
    last: u64,
    /// Of the last record given out.
    position: u64,
    /// `None` when the journal was closed before.
    news: Option<watch::Receiver<u64>>,
    waiting: VecDeque<Waiting>,
    done: bool,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.news = None;
        lock(&self.shared.store).tail.unsubscribe(self.id);
    }
}

/// A record that was not given out yet.
enum Waiting {
    Shared(Arc<Record>),
    Own(Item),
}

/// Where the next records are.
enum Next {
    Here(Vec<Arc<Record>>),
    OnDisk,
    NotYet,
    /// Not in memory and not unfinished: the index files know.
    Past,
}

impl Follower {
    async fn next(&mut self) -> Option<Result<Item, JournalError>> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                let item = match record {
                    Waiting::Shared(record) => Item::Record(Box::new(Arc::unwrap_or_clone(record))),
                    Waiting::Own(item) => item,
                };
                self.last = item.seq().unwrap_or(self.last);
                self.position = item.position();
                self.done = item.ends();
                return Some(Ok(item));
            }
            if self.done {
                return None;
            }
            match self.refill().await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
    }

    /// Gets more, waiting if need be; false at the end.
    async fn refill(&mut self) -> Result<bool, JournalError> {
        // Marked as seen before looking: what comes after the look wakes the wait below.
        if let Some(news) = &mut self.news {
            news.borrow_and_update();
        }
        // Looked at before the store: a submission leaves this list only after it is in the store.
        let live = lock(&self.shared.front).live.contains_key(&self.id);
        match self.look() {
            Next::Here(records) => {
                let shared = records.into_iter().map(Waiting::Shared);
                self.waiting.extend(shared);
            }
            Next::OnDisk => self.read().await?,
            // Received a moment ago: not durable yet, and not worth asking the disk for.
            Next::Past if live => self.wait_a_while().await?,
            Next::Past => {
                let (shared, id) = (Arc::clone(&self.shared), self.id);
                let entry = blocking(move || store::lookup(&shared.store, id)).await?;
                match entry {
                    // Received a moment ago: not durable yet.
                    None if live => self.wait().await?,
                    None => return Err(self.missing().await),
                    // Not ended: it became durable between the look and the lookup. Look again.
                    Some(entry) if entry.known.last_seq <= self.last => return Ok(!entry.ended),
                    Some(_) => self.read().await?,
                }
            }
            Next::NotYet => self.wait().await?,
        }
        Ok(true)
    }

    /// Waits for news, and looks again after a while without: between the two looks the submission
    /// may have ended and its last record have left memory.
    async fn wait_a_while(&mut self) -> Result<(), JournalError> {
        match timeout(LOOK_AGAIN, self.wait()).await {
            Ok(result) => result,
            Err(_) => Ok(()),
        }
    }

    async fn wait(&mut self) -> Result<(), JournalError> {
        let news = self.news.as_mut().ok_or(JournalError::Closed)?;
        news.changed().await.map_err(|_| JournalError::Closed)
    }

    fn look(&self) -> Next {
        let store = lock(&self.shared.store);
        if let Some(records) =
            store
                .tail
                .stream_after(self.id, self.last, MEMORY_CHUNK, CHUNK_BYTES)
        {
            return Next::Here(records);
        }
        match store.unfinished.get(&self.id) {
            Some(known) if known.last_seq <= self.last => Next::NotYet,
            Some(_) => Next::OnDisk,
            // Ended a moment ago, with a reply that is too large for memory.
            None => match store.active.index.entry(self.id) {
                Some(entry) if entry.known.last_seq > self.last => Next::OnDisk,
                _ => Next::Past,
            },
        }
    }

    async fn missing(&self) -> JournalError {
        let (shared, id) = (Arc::clone(&self.shared), self.id);
        let looked = blocking(move || Err::<(), _>(shared.missing(id))).await;
        looked.err().unwrap_or(JournalError::Unknown)
    }

    async fn read(&mut self) -> Result<(), JournalError> {
        let (shared, id) = (Arc::clone(&self.shared), self.id);
        let after = store::After {
            seq: Some(self.last),
            position: self.position,
        };
        let read = move || store::read_page(&shared.store, id, after, CHUNK_BYTES);
        let records = match blocking(read).await {
            // Deleted in the meantime.
            Err(JournalError::Unknown) => return Err(self.missing().await),
            Ok(records) if records.is_empty() => return Err(self.missing().await),
            records => records?,
        };
        self.waiting.extend(records.into_iter().map(Waiting::Own));
        Ok(())
    }
}
