//! Following: history from the index; then this server's records from its journal and the other servers'
//! from theirs, as they become durable. What another server that cannot be asked had shipped comes from
//! the index.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};

use super::cursor::Cursor;
use super::search::ElasticsearchSearch;
use crate::journal::JournalError;
use crate::logs::live::{self, News};
use crate::logs::query::{Filter, LogQuery, LogRecord, SearchError};
use crate::model::FieldError;

/// Between two looks into the index for records of servers that could not be asked themselves; the
/// index shows new ones once a second as well.
const OTHERS_PAUSE: Duration = Duration::from_secs(1);

pub(super) fn follow(
    search: ElasticsearchSearch,
    query: LogQuery,
    parts: Result<(Filter, Option<Cursor>), FieldError>,
) -> BoxStream<'static, Result<LogRecord, SearchError>> {
    let (filter, after) = match parts {
        Ok(parts) => parts,
        Err(error) => return stream::once(async { Err(error.into()) }).boxed(),
    };
    let follower = Follower {
        search,
        query,
        filter,
        after,
        place: Place::Before,
        shipped: None,
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
enum Place {
    /// Nothing was looked at yet.
    Before,
    /// In the index, which is read up to these bounds.
    Index(Cursor),
    /// In the journals.
    Live(Live),
}

/// What comes from the journals.
struct Live {
    own: BoxStream<'static, Result<News, JournalError>>,
    others: BoxStream<'static, News>,
    /// How far the others have shipped, now and then; asked for beside the rest, because it takes longer
    /// than a record may.
    shipped: BoxStream<'static, Cursor>,
}

/// What a live follower waits for.
enum Came {
    Own(Option<Result<News, JournalError>>),
    Other(Option<News>),
    Shipped(Option<Cursor>),
}

struct Follower {
    search: ElasticsearchSearch,
    query: LogQuery,
    filter: Filter,
    /// What was given out, in each journal.
    after: Option<Cursor>,
    place: Place,
    /// Up to where the index is to be looked through for others' records.
    shipped: Option<Cursor>,
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
            if let Some(shipped) = self.shipped.take() {
                self.look_for_others(shipped).await;
                continue;
            }
            match &mut self.place {
                Place::Before => self.begin().await?,
                Place::Index(bounds) => {
                    let bounds = bounds.clone();
                    self.look_in_index(&bounds).await?;
                }
                Place::Live(live) => {
                    let came = live.wait().await;
                    self.take_in(came).await?;
                }
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
        let own = match own {
            Some(own) if own + 1 < journal.complete_from(self.filter.user.as_ref()) => {
                return Err(failed);
            }
            Some(own) => own,
            None => *journal.durable_position().borrow(),
        };
        tracing::warn!(error = %failed, "a follower begins without history");
        self.go_live(own);
        Ok(())
    }

    /// Goes on in the journals: in this server's behind `own`, in the others' behind what was seen.
    fn go_live(&mut self, own: u64) {
        let journal = self.search.journal().clone();
        let others = match self.search.neighbours() {
            Some(neighbours) => neighbours.follow(&LogQuery {
                after: self.after.as_ref().map(Cursor::to_string),
                ..self.query.clone()
            }),
            None => stream::pending().boxed(),
        };
        self.place = Place::Live(Live {
            own: live::news(journal, self.filter.clone(), own),
            others,
            shipped: shipped(self.search.clone()),
        });
    }

    async fn look_in_index(&mut self, bounds: &Cursor) -> Result<(), SearchError> {
        let _turn = self.search.turn(self.query.asker.as_ref()).await?;
        let found = self
            .search
            .find(&self.filter, self.after.as_ref(), bounds)
            .await?;
        let own = found.next.of(self.search.journal().identity());
        self.after = Some(found.next);
        self.waiting.extend(found.records);
        if !found.full {
            self.knows_others = true;
            self.go_live(own);
        }
        Ok(())
    }

    async fn take_in(&mut self, came: Came) -> Result<(), SearchError> {
        match came {
            Came::Own(Some(Ok(news))) => {
                let after = self.after.get_or_insert_default();
                if after.knows(&news.journal) && after.of(&news.journal) < news.after {
                    return self.fell_behind(news.after).await;
                }
                self.give_out(news);
            }
            Came::Own(Some(Err(error))) => return Err(error.into()),
            Came::Own(None) | Came::Other(None) | Came::Shipped(None) => {
                return Err(JournalError::Closed.into());
            }
            Came::Other(Some(news)) => {
                let after = self.after.get_or_insert_default();
                if !self.knows_others && !after.knows(&news.journal) {
                    // Like this server's, they begin now.
                    after.set(&news.journal, news.after);
                }
                // Its journal no longer has what comes next; the index does.
                if after.of(&news.journal) >= news.after {
                    self.give_out(news);
                }
            }
            Came::Shipped(Some(others)) => {
                let after = self.after.get_or_insert_default();
                if !self.knows_others {
                    // The index was away at the beginning: like this server's, they begin now.
                    after.begin_at(&others);
                    self.knows_others = true;
                }
                if others.iter().any(|(journal, at)| after.of(journal) < at) {
                    self.shipped = Some(others);
                }
            }
        }
        Ok(())
    }

    /// What of it was not given out yet: the same records may have come from the index.
    fn give_out(&mut self, news: News) {
        let after = self.after.get_or_insert_default();
        let mut at = after.of(&news.journal);
        for (position, fields) in news.records {
            if position > at {
                at = position;
                after.set(&news.journal, position);
                let cursor = after.to_string();
                self.waiting.push_back(LogRecord { fields, cursor });
            }
        }
        after.set(&news.journal, at.max(news.position));
    }

    /// A reader so slow that the journal deleted what it has not seen: the index has it, unless it was
    /// deleted before it was shipped.
    async fn fell_behind(&mut self, gone: u64) -> Result<(), SearchError> {
        if self.search.shipped() >= gone {
            self.place = Place::Index(self.search.bounds().await?);
        } else {
            let journal = self.search.journal().identity().to_owned();
            self.after.get_or_insert_default().set(&journal, gone);
            self.go_live(gone);
        }
        Ok(())
    }

    /// Takes in what other servers shipped and did not tell themselves.
    async fn look_for_others(&mut self, shipped: Cursor) {
        let Ok(_turn) = self.search.turn(self.query.asker.as_ref()).await else {
            return;
        };
        let after = self.after.get_or_insert_default();
        let found = self.search.find(&self.filter, Some(after), &shipped).await;
        // While the index is away they are seen later; this server's own go on.
        let Ok(found) = found else { return };
        *after = found.next;
        self.waiting.extend(found.records);
        if found.full {
            // The rest when these were given out.
            self.shipped = Some(shipped);
        }
    }
}

impl Live {
    async fn wait(&mut self) -> Came {
        tokio::select! {
            news = self.own.next() => Came::Own(news),
            news = self.others.next() => Came::Other(news),
            shipped = self.shipped.next() => Came::Shipped(shipped),
        }
    }
}

/// How far other servers' records can be found, again and again while the index answers.
fn shipped(search: ElasticsearchSearch) -> BoxStream<'static, Cursor> {
    let asked = stream::unfold(search, |search| async move {
        loop {
            tokio::time::sleep(OTHERS_PAUSE).await;
            if let Ok(bounds) = search.bounds().await {
                let others = bounds.without(search.journal().identity());
                return Some((others, search));
            }
        }
    });
    asked.boxed()
}
