//! Why a command did not do what was asked.

use crate::model::Problem;

/// How a command ends. The numbers are what scripts test for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Exit {
    /// Done; for `submit`: deployed, or tests passed.
    Done = 0,
    /// The server refused what was asked, or the submission failed.
    Failed = 1,
    /// The command line was wrong; nothing was sent. The same number clap uses.
    Usage = 2,
    /// The server is away, does not let us in, or could not tell the outcome.
    Unavailable = 3,
    /// Ctrl+C: 128 and the number of SIGINT, as shells have it.
    Interrupted = 130,
}

/// A command's failure: how it ends, and what a person can do.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) exit: Exit,
    pub(super) problem: Box<Problem>,
    /// Trying the same again may help.
    pub(super) passes: bool,
}

impl Failure {
    pub(super) fn new(exit: Exit, problem: Problem) -> Self {
        Self {
            exit,
            problem: Box::new(problem),
            passes: false,
        }
    }

    /// The command line was wrong.
    pub(super) fn usage(
        message: impl Into<String>,
        cause: impl Into<String>,
        remediation: impl Into<String>,
    ) -> Self {
        Self::new(
            Exit::Usage,
            Problem::new("usage", message, cause, remediation),
        )
    }

    /// The server is away or its outcome is unknown.
    pub(super) fn unavailable(
        message: impl Into<String>,
        cause: impl Into<String>,
        remediation: impl Into<String>,
    ) -> Self {
        Self {
            passes: true,
            ..Self::new(
                Exit::Unavailable,
                Problem::new("unavailable", message, cause, remediation),
            )
        }
    }
}

/// An error with everything that caused it, on one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Many libraries repeat the cause in their own message.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}
