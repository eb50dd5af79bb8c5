//! Why the journal refused.

use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::model::Status;

/// What went wrong, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The disk has no room; nothing is taken until it has.
    #[error(
        "the journal's disk is full: nothing new is taken in until there is room again; free some space, writing goes on by itself"
    )]
    Full,
    /// The disk refuses to write for another reason than room.
    #[error(
        "the journal cannot be written: {cause}; nothing new is taken in until it can, writing is tried again by itself"
    )]
    Failing {
        /// The system's words.
        cause: String,
    },
    /// The submission was received before.
    #[error("a submission with this id was received before; follow it instead of sending it again")]
    Duplicate,
    /// The submission has its reply.
    #[error("this submission has ended; nothing can follow its reply")]
    Ended,
    /// The submission was never received, or its records were deleted for age.
    #[error(
        "no submission with this id is in the journal; it was never received, or it is older than what is kept"
    )]
    Unknown,
    /// The submission ended and its records were deleted; that it ended is remembered.
    #[error(
        "this submission ended as {} at {ended}, and its record is no longer kept; it does not run again. The SHA-256 of its reply began with {reply}",
        status.as_str()
    )]
    Gone {
        /// How it ended.
        status: Status,
        /// When.
        ended: Timestamp,
        /// The first half of the SHA-256 of its reply as it was sent, in hexadecimal.
        reply: String,
    },
    /// What is remembered of ended submissions cannot be read or written.
    #[error(
        "{}: {source}; check the disk. If the file is damaged, restore it from a backup, or stop the server and delete it: then an id whose record was deleted may run a second time",
        file.display()
    )]
    Memory {
        /// The file.
        file: PathBuf,
        /// The database's words.
        source: rusqlite::Error,
    },
    /// One record is larger than any may be.
    #[error(
        "a record of {bytes} bytes is larger than the {limit} bytes one may have; send less at once"
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The bound.
        limit: usize,
    },
    /// A file holds something else than what was written.
    #[error(
        "{} is damaged at byte {offset}: {cause}; restore the file from a backup, or {remedy}",
        file.display()
    )]
    Corrupt {
        /// The file.
        file: PathBuf,
        /// Where.
        offset: u64,
        /// What is wrong there.
        cause: String,
        /// What else may be done.
        remedy: String,
        /// The first position after the damaged file, for readers that must go on.
        resume: Option<u64>,
    },
    /// Another process has the folder.
    #[error(
        "{} is used by another server{}; stop that one, or give this one another data folder",
        dir.display(), holder.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    Locked {
        /// The folder.
        dir: PathBuf,
        /// The process that has it, as it said itself.
        holder: Option<u32>,
    },
    /// The system refused.
    #[error(
        "cannot {action}: {source}; check that the folder exists, is writable and its disk is healthy"
    )]
    Io {
        /// What was tried.
        action: String,
        /// The system's words.
        source: io::Error,
    },
    /// The server is stopping.
    #[error("the journal is closed because the server is stopping; try again when it is back")]
    Closed,
}

impl JournalError {
    /// Why, for users: what the operator has to do, and where the data are, is in the server's log only.
    pub fn told(&self) -> String {
        match self {
            Self::Corrupt { cause, .. } => format!("what the server stored is damaged: {cause}"),
            Self::Memory { .. } => {
                "what the server remembers of ended submissions cannot be read or written"
                    .to_owned()
            }
            Self::Locked { .. } => "another server uses the data".to_owned(),
            Self::Io { source, .. } => format!("the server's disk failed: {source}"),
            Self::Full
            | Self::Failing { .. }
            | Self::Duplicate
            | Self::Ended
            | Self::Unknown
            | Self::Gone { .. }
            | Self::TooLarge { .. }
            | Self::Closed => self.to_string(),
        }
    }

    pub(super) fn io(action: &str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action: format!("{action} {}", path.display()),
            source,
        }
    }

    /// Damage inside a segment file.
    pub(super) fn damaged_segment(path: &Path, offset: u64, cause: String) -> Self {
        Self::Corrupt {
            file: path.to_owned(),
            offset,
            cause,
            remedy: "run the version that wrote it".to_owned(),
            resume: None,
        }
    }

    /// Damage inside an index file.
    pub(super) fn damaged_index(path: &Path, offset: u64, cause: String) -> Self {
        Self::Corrupt {
            file: path.to_owned(),
            offset,
            cause,
            remedy: "delete it and restart the server: it is rebuilt from the journal".to_owned(),
            resume: None,
        }
    }

    /// The same, saying where a reader may go on.
    pub(super) fn resuming_at(mut self, position: Option<u64>) -> Self {
        if let Self::Corrupt { resume, .. } = &mut self {
            *resume = position;
        }
        self
    }
}
