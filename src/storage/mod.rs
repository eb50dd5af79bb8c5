//! The code store: what was tested, kept so that it can be released.

mod directory;

use std::collections::BTreeMap;
use std::fmt;

use async_trait::async_trait;

use crate::model::{Problem, RelativePath, ReplId, SubmissionId};

pub use directory::DirectoryStore;

/// Keeps releases and each repl's current files.
#[async_trait]
pub trait CodeStore: Send + Sync + fmt::Debug {
    /// Stores a release's files, durably and whole or not at all. A release is immutable: storing
    /// it again changes nothing.
    async fn publish(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
    ) -> Result<(), Problem>;
}
