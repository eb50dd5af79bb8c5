//! Following: history from the index, then this server's records from its journal as they become
//! durable, and other servers' from the index as they arrive there.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::time::Instant;

use super::cursor::Cursor;
use super::search::ElasticsearchSearch;
use crate::journal::JournalError;
use crate::logs::query::{Filter, LogRecord, SearchError};
use crate::model::FieldError;

/// Pause between two looks into the journal; below what a person notices.
const FOLLOW_PAUSE: Duration = Duration::from_millis(20);
/// Bytes of journal looked through at once.
const FOLLOW_BYTES: usize = 256 << 10;
/// Between two looks for other servers' records; the index shows new ones once a second as well.
const OTHERS_PAUSE: Duration = Duration::from_secs(1);

pub(super) fn follow(
    search: ElasticsearchSearch,
    query: Result<(Filter, Option<Cursor>), FieldError>,
) -> BoxStream<'static, Result<LogRecord, SearchError>> {
    let (filter, after) = match query {
        Ok(query) => query,
        Err(error) => return stream::once(async { Err(error.into()) }).boxed(),
    };
    let follower = Follower {
        search,
        filter,
        after,
        place: Place::Before,
        others_at: Instant::now(),
        knows_others: false,
        waiting: VecDeque::new(),
    };
    let items = stream::unfold(Some(follower), |follower| async move {
        let mut follower = follower?;
        let item = follower.next().await;
        let goes_on = item.is_ok();
        Some((item, goes_on.then_some(follower)))
    });
    items.boxed()
}

/// How far a follower is.
#[derive(Debug, Clone)]
enum Place {
    /// Nothing was looked at yet.
    Before,
    /// In the index, which is read up to these bounds.
    Index(Cursor),
    /// In the journal, next at this position.
    Journal(u64),
}

struct Follower {
    search: ElasticsearchSearch,
    filter: Filter,
    /// What was given out, in each journal.
    after: Option<Cursor>,
    place: Place,
    others_at: Instant,
    /// `after` says how far other servers' records were given out.
    knows_others: bool,
    waiting: VecDeque<LogRecord>,
}

impl Follower {
    async fn next(&mut self) -> Result<LogRecord, SearchError> {
        loop {
            if let Some(record) = self.waiting.pop_front() {
                return Ok(record);
            }
            match self.place.clone() {
                Place::Before => self.begin().await?,
                Place::Index(bounds) => self.look_in_index(&bounds).await?,
                Place::Journal(next) => self.look_in_journal(next).await?,
            }
        }
    }

    /// Begins in the index. While that is away, in the journal: a follower wants to see what happens
    /// now, but must not be shown a gap.
    async fn begin(&mut self) -> Result<(), SearchError> {
        let journal = self.search.journal();
        let own = self
            .after
            .as_ref()
            .map(|after| after.of(journal.identity()));
        let failed = match self.search.bounds().await {
            Ok(bounds) => {
                self.place = Place::Index(bounds);
                return Ok(());
            }
            Err(error) => error,
        };
        let next = match own {
            Some(own) if own + 1 < journal.oldest_position() => return Err(failed),
            Some(own) => own + 1,
            None => *journal.durable_position().borrow() + 1,
        };
        tracing::warn!(error = %failed, "a follower begins without history");
        self.place = Place::Journal(next);
        Ok(())
    }

    async fn look_in_index(&mut self, bounds: &Cursor) -> Result<(), SearchError> {
        let found = self
            .search
            .find(&self.filter, self.after.as_ref(), bounds)
            .await?;
        if !found.full {
            let own = found.next.of(self.search.journal().identity());
            self.place = Place::Journal(own + 1);
            self.knows_others = true;
        }
        self.after = Some(found.next);
        self.waiting.extend(found.records);
        Ok(())
    }

    async fn look_in_journal(&mut self, next: u64) -> Result<(), SearchError> {
        let journal = self.search.journal().clone();
        let mut durable = journal.durable_position();
        if *durable.borrow() < next {
            let others_due = self.others_at + OTHERS_PAUSE;
            let came = durable.wait_for(|durable| *durable >= next);
            let came = tokio::time::timeout_at(others_due, came).await;
            match came.map(|came| came.is_ok()) {
                // Many commits become one look.
                Ok(true) => tokio::time::sleep(FOLLOW_PAUSE).await,
                Ok(false) => return Err(JournalError::Closed.into()),
                Err(_) => return self.look_for_others().await,
            }
        }
        let oldest = journal.oldest_position();
        if next < oldest {
            return self.fell_behind(next, oldest).await;
        }
        let records = match journal.read_shared(next, FOLLOW_BYTES).await {
            Err(JournalError::Corrupt {
                resume: Some(resume),
                ..
            }) => {
                self.place = Place::Journal(resume);
                return Ok(());
            }
            records => records?,
        };
        for record in &records {
            self.place = Place::Journal(record.position + 1);
            let after = self.after.get_or_insert_default();
            after.set(journal.identity(), record.position);
            if let Some(fields) = self.filter.accept(record) {
                let cursor = after.to_string();
                self.waiting.push_back(LogRecord { fields, cursor });
            }
        }
        if self.others_at.elapsed() > OTHERS_PAUSE {
            self.look_for_others().await?;
        }
        // A long stretch without a match must let others run.
        tokio::task::yield_now().await;
        Ok(())
    }

    /// A reader so slow that the journal deleted what it has not seen: the index has it.
    async fn fell_behind(&mut self, next: u64, oldest: u64) -> Result<(), SearchError> {
        let shipped = self.search.shipped();
        self.after
            .get_or_insert_default()
            .set(self.search.journal().identity(), next - 1);
        self.place = match shipped >= next {
            true => Place::Index(self.search.bounds().await?),
            false => Place::Journal(oldest),
        };
        Ok(())
    }

    /// Takes in what other servers shipped meanwhile.
    async fn look_for_others(&mut self) -> Result<(), SearchError> {
        self.others_at = Instant::now();
        // They are seen later while the index is away; this server's own go on.
        let Ok(bounds) = self.search.bounds().await else {
            return Ok(());
        };
        let others = bounds.without(self.search.journal().identity());
        let after = self.after.get_or_insert_default();
        if !self.knows_others {
            // The index was away at the beginning: like this server's, they begin now.
            after.advance_to(&others);
            self.knows_others = true;
        }
        if others.iter().all(|(journal, at)| after.of(journal) >= at) {
            return Ok(());
        }
        let found = self.search.find(&self.filter, Some(after), &others).await;
        let Ok(found) = found else { return Ok(()) };
        *after = found.next;
        self.waiting.extend(found.records);
        if found.full {
            // The rest at once, when these were given out.
            self.others_at -= OTHERS_PAUSE;
        }
        Ok(())
    }
}
