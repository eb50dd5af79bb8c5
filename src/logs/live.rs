//! A server's own records as they become durable, for whoever follows them: its own clients, and other
//! servers on behalf of theirs. No index is waited for.

use std::fmt;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::elasticsearch::Cursor;
use super::query::{Filter, LogQuery};
use crate::journal::{Journal, JournalError};
use crate::model::FieldError;

/// Between a record and the look for more: many commits become one look. A live follower, also one at
/// another server, is to see a record within 50 ms.
const FOLLOW_PAUSE: Duration = Duration::from_millis(15);
/// Bytes of journal looked through at once.
const FOLLOW_BYTES: usize = 256 << 10;
/// After this long without a record its reader is told that there is none: one at another server would
/// not know otherwise whether the connection still stands.
pub const HEARTBEAT: Duration = Duration::from_secs(5);

/// What matches in a stretch of one journal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct News {
    /// Whose journal.
    pub journal: String,
    /// Everything behind this position, which is later than the next one when records were deleted,
    pub after: u64,
    /// up to this one was looked through.
    pub position: u64,
    /// The records that match, each with its position.
    pub records: Vec<(u64, Map<String, Value>)>,
}

impl News {
    /// The place behind it, as [`LogQuery::after`] takes it.
    pub fn place(&self) -> String {
        let mut cursor = Cursor::default();
        cursor.set(&self.journal, self.position);
        cursor.to_string()
    }
}

/// The other servers whose records meet in the same Elasticsearch, asked directly for what happens
/// there.
pub trait Neighbours: fmt::Debug + Send + Sync {
    /// What matches at each of them behind the places in `after`, or without one from now on. The news
    /// of one server come in order and without a gap, but for what its journal no longer has; of one
    /// that cannot be asked nothing comes until it can. Does not end by itself.
    fn follow(&self, query: &LogQuery) -> BoxStream<'static, News>;
}

/// What another server asks for its client: this journal's part of [`Neighbours::follow`].
pub fn own_news(
    journal: &Journal,
    mut query: LogQuery,
) -> Result<BoxStream<'static, Result<News, JournalError>>, FieldError> {
    let after = Cursor::parse("after", query.after.take())?;
    let filter = Filter::try_from(query)?;
    let after = match after {
        Some(after) => after.of(journal.identity()),
        None => *journal.durable_position().borrow(),
    };
    Ok(news(journal.clone(), filter, after))
}

/// This server's records behind `after` that match. Ends with an error, when the journal is closed or
/// cannot be read; where it is damaged, or deleted already, the news say so by where they begin.
pub(super) fn news(
    journal: Journal,
    filter: Filter,
    after: u64,
) -> BoxStream<'static, Result<News, JournalError>> {
    let looking = Looking {
        journal,
        filter,
        at: after,
    };
    let items = stream::unfold(Some(looking), |looking| async move {
        let mut looking = looking?;
        let item = looking.look().await;
        let goes_on = item.is_ok();
        Some((item, goes_on.then_some(looking)))
    });
    items.boxed()
}

struct Looking {
    journal: Journal,
    filter: Filter,
    /// Everything up to there was looked through.
    at: u64,
}

impl Looking {
    async fn look(&mut self) -> Result<News, JournalError> {
        let next = self.at + 1;
        let mut durable = self.journal.durable_position();
        if *durable.borrow() < next {
            let came = durable.wait_for(|durable| *durable >= next);
            match tokio::time::timeout(HEARTBEAT, came).await {
                Ok(came) => came.map_err(|_| JournalError::Closed)?,
                Err(_) => return Ok(self.goes_on_to(self.at)),
            };
            tokio::time::sleep(FOLLOW_PAUSE).await;
        }
        let oldest = self.journal.oldest_position();
        if next < oldest {
            self.at = oldest - 1;
            return Ok(self.goes_on_to(oldest - 1));
        }
        // Some of what is asked for was deleted, other users' records of the same time were not.
        let complete = self.journal.complete_from(self.filter.user.as_ref());
        let records = match self.journal.read_shared(next, FOLLOW_BYTES).await {
            Err(JournalError::Corrupt {
                resume: Some(resume),
                ..
            }) => return Ok(self.goes_on_to(resume.max(next) - 1)),
            records => records?,
        };
        let mut news = self.goes_on_to(records.last().map_or(self.at, |last| last.position));
        news.after = news.after.max(complete.saturating_sub(1));
        for record in records {
            if let Some(fields) = self.filter.accept(&record) {
                news.records.push((record.position, fields));
            }
        }
        // A long stretch without a match must let others run.
        tokio::task::yield_now().await;
        Ok(news)
    }

    fn goes_on_to(&mut self, position: u64) -> News {
        let after = std::mem::replace(&mut self.at, position);
        News {
            journal: self.journal.identity().to_owned(),
            after,
            position,
            records: Vec::new(),
        }
    }
}
