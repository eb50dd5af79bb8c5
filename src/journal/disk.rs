//! What the journal asks of the file system; the seam where tests inject faults.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;

use super::JournalError;

/// Makes files that can be written durably.
pub(super) trait Disk: Send + Sync {
    /// Opens a file for writing; makes it when `create`, and empties it then.
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn Sink>>;
}

/// A file being written.
pub(super) trait Sink: Send {
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when everything written is on the disk.
    fn sync(&self) -> io::Result<()>;
    /// Cuts the file.
    fn truncate(&self, len: u64) -> io::Result<()>;
}

/// The machine's own file system.
pub(super) struct RealDisk;

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn Sink>> {
        let file = OpenOptions::new()
            .write(true)
            .create(create)
            .truncate(create)
            .mode(0o600)
            .open(path)?;
        Ok(Box::new(file))
    }
}

impl Sink for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.set_len(len)
    }
}

/// Makes the folder, for its owner only: it holds users' code.
pub(super) fn make_folder(dir: &Path) -> Result<(), JournalError> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| JournalError::io("make the folder", dir, e))
}

/// Takes the folder for this process alone. The lock goes when the returned file is dropped, also
/// by a crash.
pub(super) fn lock_folder(dir: &Path) -> Result<File, JournalError> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(|e| JournalError::io("open", &path, e))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            // Only to name it; an unreadable name changes nothing.
            let _ = file.read_to_string(&mut holder);
            return Err(JournalError::Locked {
                dir: dir.to_owned(),
                holder: holder.trim().parse().ok(),
            });
        }
        Err(TryLockError::Error(e)) => return Err(JournalError::io("lock", &path, e)),
    }
    // The name is a courtesy to whoever comes second: a full disk must not stop the first.
    let _ = file
        .set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(file)
}

/// Makes the folder's list of names durable.
pub(super) fn sync_folder(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
