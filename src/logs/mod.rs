//! The record's shape, shipping records, and finding them again.
//!
//! [`ecs`] gives every journal record its one public shape. [`LogSearch`] is what finds records
//! again; it has two implementations. [`EmbeddedSearch`] is an SQLite file fed from the journal: it
//! holds nothing of its own, and is rebuilt when it is lost. [`ElasticsearchSearch`] asks the
//! Elasticsearch that [`Shipper`] brings the records to.

mod database;
mod elasticsearch;
mod embedded;
mod live;
mod query;
mod record;
mod search;
mod shipper;
#[cfg(test)]
mod tests;
mod turns;

pub use elasticsearch::{
    Elasticsearch, ElasticsearchError, ElasticsearchSearch, ElasticsearchSettings,
};
pub use embedded::{EmbeddedSearch, SearchOptions};
pub use live::{HEARTBEAT, Neighbours, News, own_news};
pub use query::{
    LogPage, LogQuery, LogRecord, SearchError, SubmissionPage, SubmissionQuery, SubmissionSummary,
};
pub use record::ecs;
pub use search::LogSearch;
pub use shipper::{Shipper, ShipperOptions};
pub use turns::{Place, Places};
