//! What repls keep on the disk beside their code, and how much that may be.

use serde::{Deserialize, Serialize};

use super::{Problem, ReplId};

/// How much of the machine's disk is whose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskBounds {
    /// Most bytes of one repl's data.
    pub repl_bytes: u64,
    /// Most bytes of all data and code of one user.
    pub user_bytes: u64,
    /// Bytes that stay free for the journal and the server's own files; `None`: a part of the disk.
    pub reserve_bytes: Option<u64>,
}

impl DiskBounds {
    /// What is so when nothing else is said: the size of a database's volume in a cluster, and a few of
    /// them for each user.
    pub const USUAL: DiskBounds = DiskBounds {
        repl_bytes: 1 << 30,
        user_bytes: 4 << 30,
        reserve_bytes: None,
    };
}

/// What a repl keeps beside its code, such as its database.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplData {
    /// Bytes on the disk, where the platform can tell; 0: there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Most bytes that they may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_bytes: Option<u64>,
    /// Bytes of all data and code of its user.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_bytes: Option<u64>,
    /// Most bytes that those may be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_limit_bytes: Option<u64>,
}

/// Why the data of a repl that runs are not deleted.
pub fn repl_runs(repl: &ReplId) -> Problem {
    Problem::new(
        "repl_runs",
        "Data are deleted only while the repl is stopped",
        format!("{repl} runs, and its program uses them"),
        "Stop it (POST /stop), delete its data, and start it again.",
    )
}
