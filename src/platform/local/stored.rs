//! Records as files: one that cannot be read is set aside and named, and the others are read all the same.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::kept;

/// What a record's file ends with, and what it is named when it was set aside.
const RECORD: &str = "json";
const SET_ASIDE: &str = "set-aside";

/// The records of a folder.
#[derive(Debug)]
pub struct Found<T> {
    /// By name, which is that of the file without its ending.
    pub records: BTreeMap<String, T>,
    /// Names whose records cannot be read.
    pub unreadable: BTreeMap<String, PathBuf>,
}

/// Reads every record of a folder. One that is damaged is renamed, so that a look at the folder shows it; whatever was
/// set aside before stays unreadable until there is a record of its name again, or it is removed.
pub fn read_all<T: DeserializeOwned>(folder: &Path) -> io::Result<Found<T>> {
    let mut found = Found {
        records: BTreeMap::new(),
        unreadable: BTreeMap::new(),
    };
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let name = name.into_owned();
        match path.extension().and_then(|ending| ending.to_str()) {
            Some(RECORD) => match read(&path)? {
                Ok(record) => drop(found.records.insert(name, record)),
                Err(why) => {
                    found.unreadable.insert(name, set_aside(&path, &why));
                }
            },
            Some(SET_ASIDE) => drop(found.unreadable.insert(name, path)),
            _ => {}
        }
    }
    // Somebody has put a good one in its place.
    let records = &found.records;
    found
        .unreadable
        .retain(|name, _| !records.contains_key(name));
    Ok(found)
}

/// The record in the file, or why the file is damaged. That it cannot be opened now, such as for want of
/// descriptors, is no damage.
fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Result<T, String>> {
    match fs::read(path) {
        Ok(text) => Ok(kept::open(&text)),
        Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(Err(error.to_string())),
        Err(error) => {
            let why = format!("{} cannot be read: {error}", path.display());
            Err(io::Error::new(error.kind(), why))
        }
    }
}

/// Where it is now.
fn set_aside(path: &Path, why: &str) -> PathBuf {
    let aside = path.with_extension(SET_ASIDE);
    let (aside, done) = match fs::rename(path, &aside) {
        Ok(()) => (aside, "it is renamed to end with .set-aside".to_owned()),
        Err(error) => (path.to_owned(), format!("it stays where it is: {error}")),
    };
    tracing::error!(
        "{} cannot be read: {why}; {done}. Put it back from a backup and start the server again",
        path.display()
    );
    aside
}

/// Removes a record, and one of the same name that was set aside; nothing there is fine.
pub fn remove(folder: &crate::beneath::Folder, name: &str) -> io::Result<()> {
    for ending in [RECORD, SET_ASIDE] {
        match folder.remove(format!("{name}.{ending}").as_str()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}
