//! A failure a person can act on.

use serde::{Deserialize, Serialize};

/// What happened, why, and what to do. Every error a client sees has this shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}: {cause}")]
pub struct Problem {
    /// A stable word for programs, such as `field_invalid`.
    pub code: String,
    /// What happened.
    pub message: String,
    /// Why.
    pub cause: String,
    /// What to do about it.
    pub remediation: String,
}

impl Problem {
    /// A problem from its four parts.
    pub fn new(
        code: &str,
        message: impl Into<String>,
        cause: impl Into<String>,
        remediation: impl Into<String>,
    ) -> Self {
        Self {
            code: code.to_owned(),
            message: message.into(),
            cause: cause.into(),
            remediation: remediation.into(),
        }
    }
}
