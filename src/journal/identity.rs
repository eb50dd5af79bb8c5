//! The journal's own name.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::JournalError;
use super::disk::sync_folder;

/// Letters of a name: 64 random bits.
const LETTERS: usize = 16;

/// The name in this folder; a new folder gets one.
pub(super) fn load_or_make(dir: &Path) -> Result<String, JournalError> {
    let path = dir.join("identity");
    match std::fs::read_to_string(&path) {
        Ok(text) => {
            let name = text.trim();
            if name.len() == LETTERS && name.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Ok(name.to_owned());
            }
            Err(JournalError::Corrupt {
                file: path,
                offset: 0,
                cause: "it does not hold a journal's name".to_owned(),
                remedy: "delete it: the journal gets a new name, and records that were shipped under the old one may be shipped twice".to_owned(),
                resume: None,
            })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(dir, &path).map_err(|e| JournalError::io("make", &path, e))
        }
        Err(error) => Err(JournalError::io("read", &path, error)),
    }
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
    writeln!(file, "{name}")?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    sync_folder(dir)?;
    Ok(name)
}
