//! The journal's own name.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::JournalError;
use super::damage::rename_aside;
use super::disk::sync_folder;

/// Letters of a name: 64 random bits.
const LETTERS: usize = 16;

/// The journal's name, from its file. A folder without one gets a new name. So does one whose file is damaged, which
/// is added to `replaced`.
pub(super) fn load_or_make(
    dir: &Path,
    replaced: &mut Vec<PathBuf>,
) -> Result<String, JournalError> {
    let path = dir.join("identity");
    match std::fs::read(&path) {
        Ok(text) => {
            if let Some(name) = std::str::from_utf8(&text).ok().and_then(whole) {
                return Ok(name.to_owned());
            }
            tracing::warn!(
                "{} does not hold a journal's name; the journal gets a new one, and records that were shipped under the old one may be shipped twice",
                path.display()
            );
            rename_aside(&path).map_err(|e| JournalError::io("rename", &path, e))?;
            replaced.push(path.clone());
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(JournalError::io("read", &path, error)),
    }
    make(dir, &path).map_err(|e| JournalError::io("make", &path, e))
}

/// The name in the file, if it is as it was written. An earlier version wrote no checksum.
fn whole(text: &str) -> Option<&str> {
    let line = text.strip_suffix('\n')?;
    let (name, checksum) = match line.split_once(' ') {
        Some((name, checksum)) => (name, Some(checksum)),
        None => (line, None),
    };
    let is_name = name.len() == LETTERS && name.bytes().all(|b| b.is_ascii_hexdigit());
    let fits = checksum.is_none_or(|checksum| checksum == checksum_of(name));
    (is_name && fits).then_some(name)
}

fn checksum_of(name: &str) -> String {
    format!("{:08x}", crc32fast::hash(name.as_bytes()))
}

fn make(dir: &Path, path: &Path) -> io::Result<String> {
    let mut random = [0; LETTERS / 2];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let name = format!("{:0LETTERS$x}", u64::from_le_bytes(random));
    // A crash leaves the whole file or none.
    let fresh = dir.join("identity-new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    writeln!(file, "{name} {}", checksum_of(&name))?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    sync_folder(dir)?;
    Ok(name)
}
