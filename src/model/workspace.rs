//! What of a workspace is kept in the code store: its files, and what a store of files alone cannot hold.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{BUILD_ARCHIVE, BUILD_FOLDER, RelativePath};

/// Most files, folders and links of a workspace that are kept: as many files as a start takes.
pub const MAX_WORKSPACE_ENTRIES: usize = 10_000;

/// Largest file of a workspace that is kept, and that can be read or written from far away.
pub const MAX_WORKSPACE_FILE_BYTES: u64 = 128 << 20;

/// Most bytes of all files of a workspace that are kept. With an archive of packages it is as much as a start
/// takes.
pub const MAX_WORKSPACE_BYTES: u64 = 192 << 20;

/// Deepest folder of a workspace that is kept.
pub const MAX_WORKSPACE_DEPTH: usize = 64;

/// The file among a repl's current files that says what the files themselves cannot: see [`Extras`]. It is put
/// there by a save and is no file of the workspace's.
pub const WORKSPACE_EXTRAS: &str = ".gantry-workspace.json";

/// Most bytes of that file: so many entries with long names.
pub const MAX_EXTRAS_BYTES: usize = 16 << 20;

/// Where programs find the workspace, on every platform that gives them a file system of their own.
const WORKSPACE: &str = "/workspace/";

/// What a workspace has beside the content of its files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extras {
    /// Folders with nothing in them that is kept.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub folders: BTreeSet<RelativePath>,
    /// Symbolic links, and what each holds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub links: BTreeMap<RelativePath, String>,
    /// Files that can be run.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub executable: BTreeSet<RelativePath>,
}

impl Extras {
    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.folders.is_empty() && self.links.is_empty() && self.executable.is_empty()
    }
}

/// Something of a workspace that a save leaves out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsaved {
    /// What.
    pub path: String,
    /// Why, as the rest of a sentence about it.
    pub reason: String,
}

/// Whether something at this path is made by Gantry: compiled output is made again at the next start, archives
/// and [`Extras`] are no files of the workspace's.
pub fn is_gantrys(path: &str) -> bool {
    let below = path.strip_prefix(BUILD_FOLDER);
    [BUILD_ARCHIVE, WORKSPACE_EXTRAS].contains(&path)
        || below.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Whether a link at this path leads to a place in the workspace, going by its text. What is at other places is
/// not the workspace's, and may be something else at the next start.
pub fn stays_inside(path: &str, target: &str) -> bool {
    let mut depth = match target.strip_prefix(WORKSPACE) {
        Some(_) => 0,
        None if target.starts_with('/') => return target == WORKSPACE.trim_end_matches('/'),
        None => path.matches('/').count(),
    };
    let relative = target.strip_prefix(WORKSPACE).unwrap_or(target);
    for part in relative.split('/') {
        match part {
            "" | "." => {}
            ".." if depth == 0 => return false,
            ".." => depth -= 1,
            _ => depth += 1,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_stays_inside_or_leads_out() {
        for (path, target) in [
            ("link", "main.py"),
            ("link", "a/../b"),
            ("a/b/link", "../../main.py"),
            ("a/link", ".."),
            ("link", "."),
            ("link", "/workspace"),
            ("a/link", "/workspace/b"),
        ] {
            assert!(stays_inside(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("link", ".."),
            ("link", "a/../../b"),
            ("a/link", "../../etc"),
            ("link", "/etc/passwd"),
            ("link", "/workspaces"),
            ("link", "/workspace/../etc"),
        ] {
            assert!(!stays_inside(path, target), "{path} -> {target}");
        }
    }

    #[test]
    fn what_gantry_makes_is_told_from_what_is_named_alike() {
        for path in [".build", ".build/a", BUILD_ARCHIVE, WORKSPACE_EXTRAS] {
            assert!(is_gantrys(path), "{path}");
        }
        for path in [".builds", "a/.build", "build"] {
            assert!(!is_gantrys(path), "{path}");
        }
    }
}
