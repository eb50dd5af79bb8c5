//! What happens next: admission → test → publish → release → reply.

use std::sync::Arc;

use crate::journal::Journal;
use crate::model::{FieldError, Limits, Problem, ReplId, Submission, SubmissionId, UserId};
use crate::platform::{Platform, PlatformError, RunningRelease};

/// What became of a submission that was sent in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// New; it will run.
    Accepted(SubmissionId),
    /// The same user sent this id before; it never runs twice.
    Known(SubmissionId),
}

/// Why a submission was not taken.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Refusal {
    /// The message is wrong.
    #[error("{0}")]
    Invalid(FieldError),
    /// Gantry cannot take it now.
    #[error("{0}")]
    Unavailable(Problem),
}

/// Takes submissions to their one terminal status.
#[derive(Debug, Clone)]
pub struct Pipeline {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    journal: Journal,
    platform: Arc<dyn Platform>,
}

impl Pipeline {
    /// Takes it in. Its events and its reply are then in the journal.
    pub async fn submit(&self, submission: Submission) -> Result<Admission, Refusal> {
        let _ = submission;
        unimplemented!()
    }

    /// Stops it; `false` when it is not running.
    pub fn cancel(&self, id: SubmissionId) -> bool {
        let _ = id;
        unimplemented!()
    }

    /// Hands input to the running program.
    pub async fn stdin(&self, id: SubmissionId, data: Vec<u8>, eof: bool) -> Result<(), Problem> {
        let _ = (id, data, eof);
        unimplemented!()
    }

    /// The most a submission may ask for.
    pub fn maximum_limits(&self) -> &Limits {
        unimplemented!()
    }

    /// Makes an earlier release of the user's repl serve again.
    pub async fn rollback(
        &self,
        user: &UserId,
        repl: &ReplId,
        release: Option<u64>,
    ) -> Result<RunningRelease, PlatformError> {
        let _ = (user, repl, release);
        unimplemented!()
    }

    /// Stops the user's repl.
    pub async fn stop(&self, user: &UserId, repl: &ReplId) -> Result<(), PlatformError> {
        let _ = (user, repl);
        unimplemented!()
    }
}
