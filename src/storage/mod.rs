//! The code store: what was tested, kept so that it can be released.

pub mod conformance;
mod directory;
mod s3;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};

use async_trait::async_trait;

use crate::model::{Problem, RelativePath, ReplId, SubmissionId};

pub use directory::DirectoryStore;
pub use s3::{
    FETCH_GREETING, FETCH_PORT, FETCH_TAKEN, GrantedFile, INCOMPLETE, MAX_OFFER_BYTES, Manifest,
    ManifestFile, Object, Offer, REFUSED, S3Config, S3Store, hexadecimal, release_prefix,
};

/// Keeps releases and each repl's current files.
///
/// # Contract
///
/// `storage::conformance` holds every store to it.
#[async_trait]
pub trait CodeStore: Send + Sync + fmt::Debug {
    /// Stores a release's files, durably and whole or not at all. A release is immutable: storing
    /// it again changes nothing. Then they are the repl's current files, and no others.
    async fn publish(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
    ) -> Result<(), Problem> {
        self.publish_built(repl, submission, files, None).await
    }

    /// The same with an archive of what was built from the files, which the release has as
    /// [`BUILD_ARCHIVE`](crate::model::BUILD_ARCHIVE). It is no current file.
    async fn publish_built(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
        build: Option<Vec<u8>>,
    ) -> Result<(), Problem>;

    /// Puts one file among the repl's current files, durably and whole or not at all. A folder with no file in it
    /// gives way. What the store cannot take of this file alone is a problem with the code [`FILE_REFUSED`].
    async fn put_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        content: Vec<u8>,
    ) -> Result<(), Problem>;

    /// Removes one of the repl's current files; absent is fine.
    async fn remove_current(&self, repl: &ReplId, path: &RelativePath) -> Result<(), Problem>;

    /// Removes all that is stored of the repl, its releases too; absent is fine.
    async fn remove_repl(&self, repl: &ReplId) -> Result<(), Problem>;

    /// Whether this file is among the repl's current files.
    async fn has_current(&self, repl: &ReplId, path: &str) -> Result<bool, Problem>;

    /// The repl's current files, and the bytes of each. Links are none.
    async fn list_current(&self, repl: &ReplId) -> Result<BTreeMap<String, u64>, Problem>;

    /// The content of one of the current files; `None`: it is not there, or has more than `most` bytes.
    async fn read_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        most: u64,
    ) -> Result<Option<Vec<u8>>, Problem>;
}

/// The code of a problem that is one file's own: the store takes others, and does not take this one later either.
pub const FILE_REFUSED: &str = "store_file_refused";

/// Changes of current code that may go on at one time in one server; one repl's never overlap.
const LANES: usize = 64;

/// Which of them is the repl's.
fn lane(repl: &ReplId) -> usize {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(repl) as usize % LANES
}
