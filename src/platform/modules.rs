//! The part of the seam about modules: pods that serve a Python module over gRPC, and the way to them.

use std::fmt;

use async_trait::async_trait;

use super::{ByteStream, PlatformError};
use crate::model::{ModuleName, ModuleSpec, ModuleStatus, Problem, SecretText, UserId};

/// Why a module's pods could not be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ModulesError {
    /// What was asked for cannot be had: packages that do not install.
    #[error("{}", .0.message)]
    Refused(Problem),
    /// The platform could not do it.
    #[error(transparent)]
    Platform(#[from] PlatformError),
}

/// Packages were asked for and may not be installed.
pub(super) fn packages_not_allowed() -> Problem {
    Problem::new(
        "packages_not_allowed",
        "The module's packages were not installed",
        "this server is not set up to install packages",
        "Do without, or ask the operator to start the server with GANTRY_ALLOW_PACKAGES=true, and PIP_INDEX_URL where the packages come from an index of their own.",
    )
}

/// Modules of a backend.
///
/// # Contract
///
/// - `ensure` **returns when everything is made**, which is before the module answers: `true` when this
///   call made it. Again with the same: nothing changes. With other packages: pods with those.
/// - `pause` **ends its pods**, and after that its state is `stopped`; `ensure` brings them back as they were.
/// - `remove` **removes all that was made**; `false`: it was not there.
/// - `replicas` names pods that answer, or will; `dial` connects to one of them by that name.
/// - State is the backend's own: after a restart of the server all answer as before.
/// - A module's pods have the limits of any user code, no rights in the cluster, and no network.
/// - Where others than the server reach a module's port, its pods answer those alone who send its `token`.
#[async_trait]
pub trait Modules: Send + Sync + fmt::Debug {
    /// Makes the user's module be as it is wanted.
    async fn ensure(&self, user: &UserId, spec: &ModuleSpec) -> Result<bool, ModulesError>;

    /// Ends the module's pods and keeps all that is known of it: `ensure` makes them again.
    async fn pause(&self, user: &UserId, name: &ModuleName) -> Result<(), PlatformError>;

    /// Removes a module.
    async fn remove(&self, user: &UserId, name: &ModuleName) -> Result<bool, PlatformError>;

    /// Every user's modules.
    async fn list(&self) -> Result<Vec<ModuleStatus>, PlatformError>;

    /// One module; `None`: it is not there.
    async fn status(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<ModuleStatus>, PlatformError>;

    /// Names of the module's pods; `None`: there is no such module.
    async fn replicas(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<Vec<String>>, PlatformError>;

    /// What calls of the module have to send; `None`: nobody but the server reaches it.
    async fn token(
        &self,
        user: &UserId,
        name: &ModuleName,
    ) -> Result<Option<SecretText>, PlatformError>;

    /// A connection to the gRPC port of one of the module's pods.
    async fn dial(
        &self,
        user: &UserId,
        name: &ModuleName,
        replica: &str,
    ) -> Result<Box<dyn ByteStream>, PlatformError>;

    /// Notes that the module was called, where other servers have to know: see
    /// [`ModuleStatus::last_used`].
    fn used(&self, _user: &UserId, _name: &ModuleName) {}
}
