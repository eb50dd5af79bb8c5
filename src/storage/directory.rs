//! The code store as a folder of this machine.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{CodeStore, LANES, lane};
use crate::model::{Problem, RelativePath, ReplId, SubmissionId};

/// A folder with `releases/{repl}/{submission}/` (immutable) and `code/{repl}/` (current).
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    root: PathBuf,
    lanes: Arc<[Mutex<()>; LANES]>,
}

impl DirectoryStore {
    /// A store in this folder, made if it is not there.
    pub fn open(root: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(root.join("releases"))?;
        fs::create_dir_all(root.join("code"))?;
        let lanes = Arc::new(std::array::from_fn(|_| Mutex::new(())));
        Ok(Self { root, lanes })
    }

    /// Where a release's files are.
    pub fn release(&self, repl: &ReplId, submission: SubmissionId) -> PathBuf {
        self.root
            .join("releases")
            .join(repl.as_str())
            .join(submission.to_string())
    }

    /// Where a repl's current files are.
    pub fn current(&self, repl: &ReplId) -> PathBuf {
        self.root.join("code").join(repl.as_str())
    }

    /// Removes a release's files; absent is fine. Nothing may need them any more.
    pub async fn forget(&self, repl: &ReplId, submission: SubmissionId) -> io::Result<()> {
        let release = self.release(repl, submission);
        tokio::task::spawn_blocking(move || remove(&release))
            .await
            .map_err(io::Error::other)
            .flatten()
    }
}

#[async_trait]
impl CodeStore for DirectoryStore {
    async fn publish(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
    ) -> Result<(), Problem> {
        let release = self.release(repl, submission);
        let code = self.current(repl);
        let files = files.clone();
        let (lanes, lane) = (Arc::clone(&self.lanes), lane(repl));
        let write = move || {
            let _alone = lanes[lane].lock().unwrap_or_else(PoisonError::into_inner);
            if !release.exists() {
                write_whole(&release, &files)?;
            }
            write_whole(&code, &files)
        };
        tokio::task::spawn_blocking(write)
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| {
                Problem::new(
                    "store_failed",
                    "The code could not be stored",
                    error.to_string(),
                    "Check that the data folder is writable and has room, then submit again.",
                )
            })
    }

    async fn has_current(&self, repl: &ReplId, path: &str) -> Result<bool, Problem> {
        let path = DirectoryStore::current(self, repl).join(path);
        // Not what a link leads to: that may be anywhere.
        Ok(tokio::fs::symlink_metadata(path)
            .await
            .is_ok_and(|about| about.is_file()))
    }
}

/// Writes a folder beside its place and moves it there, so that it is seen whole or not at all.
fn write_whole(folder: &Path, files: &BTreeMap<RelativePath, String>) -> io::Result<()> {
    let parent = folder.parent().unwrap_or(folder);
    fs::create_dir_all(parent)?;
    let staged = parent.join(format!(".{}.new", file_name(folder)));
    let replaced = parent.join(format!(".{}.old", file_name(folder)));
    remove(&staged)?;
    fs::create_dir(&staged)?;
    for (path, text) in files {
        let target = staged.join(path.as_str());
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create_new(&target)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
    }
    File::open(&staged)?.sync_all()?;
    remove(&replaced)?;
    if folder.exists() {
        fs::rename(folder, &replaced)?;
    }
    fs::rename(&staged, folder)?;
    File::open(parent)?.sync_all()?;
    remove(&replaced)
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
