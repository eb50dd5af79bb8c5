//! The record's shape, and finding records again.
//!
//! [`ecs`] gives every journal record its one public shape. [`Search`] is the embedded search: an
//! SQLite file fed from the journal. It holds nothing of its own, and is rebuilt when it is lost.

mod database;
mod query;
mod record;
mod search;
#[cfg(test)]
mod tests;

pub use query::{
    LogPage, LogQuery, LogRecord, SearchError, SubmissionPage, SubmissionQuery, SubmissionSummary,
};
pub use record::ecs;
pub use search::{Search, SearchOptions};
