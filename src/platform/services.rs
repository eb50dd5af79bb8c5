//! The part of the seam that only a cluster has: services, kept at their number when nodes die.

use std::fmt;

use async_trait::async_trait;

use super::PlatformError;
use crate::model::{
    FieldError, ServiceEvent, ServiceName, ServiceOutcome, ServiceSpec, Snapshot, UserId,
};

/// Why nothing of a body was done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ServicesError {
    /// A field is wrong; the path is the body's own.
    #[error("{} {}", .0.field, .0.reason)]
    Field(FieldError),
    /// The cluster could not be asked.
    #[error(transparent)]
    Platform(#[from] PlatformError),
}

/// Services of a backend that can run them on several machines.
///
/// # Contract
///
/// - `apply` **makes nothing when it answers `Err`**: what is wrong with any service, its image
///   included, is found before the first is made. After that each service has an outcome of its own.
/// - `remove` **removes all that was made**; `false`: it was not there.
/// - `snapshot`, `events` and `owners` **ask nobody**: they are answered from what is watched.
/// - State is the cluster's own: after a restart of the server all of them answer as before, but for
///   what the timeline told of nodes.
#[async_trait]
pub trait Services: Send + Sync + fmt::Debug {
    /// Makes the user's services be as they are wanted.
    async fn apply(
        &self,
        user: &UserId,
        services: &[ServiceSpec],
    ) -> Result<Vec<ServiceOutcome>, ServicesError>;

    /// Ends a service.
    async fn remove(&self, user: &UserId, name: &ServiceName) -> Result<bool, PlatformError>;

    /// Everything, or what is one user's; nodes are nobody's, so that a user's has none.
    fn snapshot(&self, of: Option<&UserId>) -> Snapshot;

    /// What happened to a service, oldest first; `None`: there is no such service.
    fn events(&self, user: &UserId, name: &ServiceName) -> Option<Vec<ServiceEvent>>;

    /// Who has a service of this name.
    fn owners(&self, name: &ServiceName) -> Vec<UserId>;
}
