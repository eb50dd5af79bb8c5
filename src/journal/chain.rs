//! Which segments there are, in a file beside them: so that one that is gone is noticed.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::disk::sync_folder;

/// The first line.
const TITLE: &str = "GANTRYC1";

pub(super) fn path(dir: &Path) -> PathBuf {
    dir.join("segments")
}

/// Writes down the segments that begin at these positions, durably.
pub(super) fn write(dir: &Path, bases: impl Iterator<Item = u64>) -> io::Result<()> {
    let mut text = String::new();
    for base in bases {
        text.push_str(&format!("{base}\n"));
    }
    let text = format!("{TITLE} {:08x}\n{text}", crc32fast::hash(text.as_bytes()));
    let temporary = path(dir).with_extension("new");
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&temporary, path(dir))?;
    sync_folder(dir)
}

/// What was written down last; nothing when it cannot be read.
pub(super) fn read(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(path(dir)).unwrap_or_default();
    let bases = whole(&text).unwrap_or_default();
    bases.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Whether the file is there and is not as it was written.
pub(super) fn is_damaged(dir: &Path) -> bool {
    match std::fs::read(path(dir)) {
        Ok(bytes) => std::str::from_utf8(&bytes).ok().and_then(whole).is_none(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// The lines below the title, if its checksum is theirs.
fn whole(text: &str) -> Option<&str> {
    let (title, bases) = text.split_once('\n')?;
    let right = format!("{TITLE} {:08x}", crc32fast::hash(bases.as_bytes()));
    (title == right).then_some(bases)
}
