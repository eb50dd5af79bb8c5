//! What a search of the logs is, whatever answers it.

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use super::query::{LogPage, LogQuery, LogRecord, SearchError, SubmissionPage, SubmissionQuery};
use crate::model::FieldError;

/// Finds records and submissions again. Every implementation gives the same answers, but for the
/// text of cursors, which only the one that gave them understands.
#[async_trait]
pub trait LogSearch: std::fmt::Debug + Send + Sync {
    /// Says which field is wrong, if one is, before anything is searched.
    fn check(&self, query: &LogQuery) -> Result<(), FieldError>;

    /// Records that match. Includes everything that was durable when it was called, unless the index
    /// is further behind than a second.
    async fn query(&self, query: LogQuery) -> Result<LogPage, SearchError>;

    /// Submissions that match, newest first; as fresh as [`LogSearch::query`].
    async fn submissions(&self, query: SubmissionQuery) -> Result<SubmissionPage, SearchError>;

    /// Records that match: as [`LogSearch::query`] gives them, then live as they become durable,
    /// without waiting for any index. Does not end by itself. Never skips, never doubles, and holds a
    /// bounded number of records when the reader is slow.
    fn follow(&self, query: LogQuery) -> BoxStream<'static, Result<LogRecord, SearchError>>;
}
