//! One session per user, kept open.

/// The sessions to every user's runner.
#[derive(Debug)]
pub struct Sessions;
