//! Installed packages, a folder for each set of them: those that Gantry itself names, which no user has a say in, and
//! each user's own. What is in a folder was unpacked by the server and is nobody's to change; the least recently used
//! make room.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::time::SystemTime;

use flate2::read::GzDecoder;
use tar::{Archive, EntryType};

use crate::beneath::{Folder, set_mode};
use crate::model::UserId;

/// Most sets that are kept for one user. A set has at most 192 MiB, as what a program depends on.
const MOST_SETS: usize = 16;

/// Most bytes of all of one user's sets.
const MOST_BYTES: u64 = 1 << 30;

/// Most bytes and files of one set, as the runner packs them.
const MOST_SET_BYTES: u64 = 192 << 20;
const MOST_SET_FILES: usize = 16_384;

/// What an archive has beside its files' bytes: a head for each, and padding.
const HEADERS: u64 = 4 * 512 * MOST_SET_FILES as u64;

/// Sets of a user's that an earlier version shared between all, and its installer's remains.
const FORMER: [&str; 3] = ["packages-", "tools-", "cache"];

/// Whose a set is.
#[derive(Debug, Clone, Copy)]
pub enum Whose<'a> {
    /// Named and pinned by Gantry itself.
    Own,
    /// A user's.
    User(&'a UserId),
}

/// Sets on disk.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

/// Why a set was not kept.
#[derive(Debug)]
pub enum NotKept {
    /// All that the user has is in use, and this is too much beside it.
    Full,
    /// It could not be unpacked or written.
    Failed(io::Error),
}

impl Store {
    /// In this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Removes what an earlier version left, and what was not finished.
    pub fn tidy(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.folder)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if FORMER.iter().any(|former| name.starts_with(former)) {
                remove(&entry.path());
            }
        }
        let users = fs::read_dir(self.folder.join("users"));
        let users = users
            .into_iter()
            .flatten()
            .flatten()
            .map(|user| user.path());
        for folder in users.chain([self.folder.join("own")]) {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().extension().is_some() {
                    remove(&entry.path());
                }
            }
        }
        Ok(())
    }

    fn of(&self, whose: Whose<'_>) -> PathBuf {
        match whose {
            Whose::Own => self.folder.join("own"),
            Whose::User(user) => self.folder.join("users").join(user.as_str()),
        }
    }

    /// The set of this name, if it is there; from now on it was used last.
    pub fn find(&self, whose: Whose<'_>, name: &str) -> Option<PathBuf> {
        let found = self.of(whose).join(name);
        let folder = File::open(&found).ok()?;
        let now = FileTimes::new().set_modified(SystemTime::now());
        if let Err(error) = folder.set_times(now) {
            tracing::debug!(set = name, %error, "it is not noted that a set of packages was used");
        }
        Some(found)
    }

    /// Keeps what is below `top` in the archive as the set of this name. `used` are not removed for it.
    pub fn keep(
        &self,
        whose: Whose<'_>,
        name: &str,
        (archive, top): (&[u8], &str),
        used: &BTreeSet<String>,
    ) -> Result<PathBuf, NotKept> {
        let parent = self.of(whose);
        let (staged, kept) = (parent.join(format!("{name}.new")), parent.join(name));
        let made = || -> io::Result<u64> {
            fs::create_dir_all(&parent)?;
            remove(&staged);
            fs::create_dir(&staged)?;
            fs::set_permissions(&staged, fs::Permissions::from_mode(0o755))?;
            unpack(archive, top, &staged)
        };
        let bytes = made().map_err(|error| {
            remove(&staged);
            NotKept::Failed(error)
        })?;
        if let Whose::User(_) = whose
            && !make_room(&parent, bytes, used)
        {
            remove(&staged);
            return Err(NotKept::Full);
        }
        fs::rename(&staged, &kept).map_err(NotKept::Failed)?;
        Ok(kept)
    }
}

/// Removes the least recently used sets until one of so many bytes fits; whether it does.
fn make_room(folder: &Path, bytes: u64, used: &BTreeSet<String>) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut sets: Vec<(SystemTime, PathBuf, u64)> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none())
        .map(|path| {
            let last = fs::metadata(&path).and_then(|about| about.modified());
            let last = last.unwrap_or(SystemTime::UNIX_EPOCH);
            let size = size(&path);
            (last, path, size)
        })
        .collect();
    sets.sort();
    let mut all: u64 = sets.iter().map(|(_, _, size)| size).sum();
    let mut number = sets.len();
    for (_, path, size) in sets {
        if number < MOST_SETS && all + bytes <= MOST_BYTES {
            break;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !used.contains(&*name) {
            remove(&path);
            number -= 1;
            all -= size;
        }
    }
    number < MOST_SETS && all + bytes <= MOST_BYTES
}

/// Bytes of everything below; nothing is followed.
fn size(path: &Path) -> u64 {
    let Ok(about) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !about.is_dir() {
        return about.len();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| size(&entry.path())).sum()
}

fn remove(path: &Path) {
    let removed = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return,
    };
    if let Err(error) = removed {
        tracing::warn!(path = %path.display(), %error, "packages that nobody needs stay behind");
    }
}

/// Writes the folders and files below `top` in the archive into a new folder: its bytes. Wheels have nothing else, and
/// nothing else is written: what was packed was a user's to make.
fn unpack(archive: &[u8], top: &str, folder: &Path) -> io::Result<u64> {
    let at = Folder::open(folder)?;
    let mut archive = Archive::new(GzDecoder::new(archive).take(MOST_SET_BYTES + HEADERS));
    let mut bytes = 0;
    for (number, entry) in archive.entries()?.enumerate() {
        if number >= MOST_SET_FILES {
            return Err(refused(format!(
                "they are more than {MOST_SET_FILES} files"
            )));
        }
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let plain = path
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let inside = path.strip_prefix(top).ok().filter(|_| plain);
        let Some(inside) = inside else {
            return Err(refused(format!("{} is not below {top}", path.display())));
        };
        let kind = entry.header().entry_type();
        match kind {
            EntryType::Directory if inside.as_os_str().is_empty() => {}
            EntryType::Directory => {
                let name = inside.to_str();
                let name =
                    name.ok_or_else(|| refused("a folder's name is not UTF-8".to_owned()))?;
                at.make(name, None)?.set_mode(0o755)?;
            }
            EntryType::Regular => {
                bytes += write(&at, inside, &mut entry)?;
                if bytes > MOST_SET_BYTES {
                    return Err(refused(format!(
                        "they are more than {MOST_SET_BYTES} bytes"
                    )));
                }
            }
            _ => {
                let why = format!("{} is no file and no folder", path.display());
                return Err(refused(why));
            }
        }
    }
    Ok(bytes)
}

fn write(at: &Folder, path: &Path, entry: &mut tar::Entry<'_, impl Read>) -> io::Result<u64> {
    let executable = entry.header().mode()? & 0o111 != 0;
    let mut file = at.create(path, 0o600)?;
    let bytes = io::copy(entry, &mut file)?;
    // Whatever the server's umask is: user code reads it, under another user id.
    set_mode(&file, if executable { 0o755 } else { 0o644 })?;
    Ok(bytes)
}

fn refused(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use tar::{Builder, Header};

    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o4755);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let link = matches!(kind, EntryType::Symlink | EntryType::Link);
            if link {
                header.set_link_name(content).unwrap();
            }
            let content = if link { "" } else { content };
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content.as_bytes()).unwrap();
        }
        archive.into_inner().unwrap().finish().unwrap()
    }

    fn wheel(text: &str) -> Vec<u8> {
        use EntryType::{Directory, Regular};
        archive(&[
            ("out", Directory, ""),
            ("out/pkg", Directory, ""),
            ("out/pkg/a.py", Regular, text),
        ])
    }

    #[test]
    fn folders_and_files_are_unpacked_and_nothing_else() {
        use EntryType::{Block, Directory, Fifo, Link, Regular, Symlink};
        let above = tempfile::tempdir().unwrap();
        let store = Store::new(above.path().join("modules"));
        let ann: UserId = "ann".parse().unwrap();
        let keep =
            |archive: &[u8]| store.keep(Whose::User(&ann), "a", (archive, "out"), &BTreeSet::new());
        let kept = keep(&wheel("x = 1")).unwrap();
        let file = kept.join("pkg/a.py");
        assert_eq!(fs::read(&file).unwrap(), b"x = 1");
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o755, "no setuid bit");
        fs::write(above.path().join("host"), "secret").unwrap();
        let host = above.path().join("host");
        let host = host.to_str().unwrap();
        for entries in [
            &[("out/../../../../escaped", Regular, "x")][..],
            &[("/escaped", Regular, "x")],
            &[("elsewhere", Regular, "x")],
            &[("out", Directory, ""), ("out/link", Symlink, "/etc")],
            &[("out/link", Link, host)],
            &[("out/pipe", Fifo, "")],
            &[("out/disk", Block, "")],
            &[("out/a", Regular, "x"), ("out/a", Regular, "y")],
        ] {
            let store = Store::new(above.path().join("other"));
            let archive = archive(entries);
            let kept = store.keep(Whose::Own, "a", (&archive, "out"), &BTreeSet::new());
            assert!(matches!(kept, Err(NotKept::Failed(_))), "{entries:?}");
            let left = fs::read_dir(above.path().join("other/own")).unwrap();
            assert_eq!(left.count(), 0, "{entries:?}");
        }
        assert!(!above.path().join("escaped").exists());
    }

    #[test]
    fn a_users_least_used_sets_make_room_and_nobody_elses() {
        let above = tempfile::tempdir().unwrap();
        let store = Store::new(above.path().to_owned());
        let (ann, bob): (UserId, UserId) = ("ann".parse().unwrap(), "bob".parse().unwrap());
        let wheel = wheel("x = 1");
        let keep = |user: &UserId, name: &str, used: &[&str]| {
            let used = used.iter().map(|name| (*name).to_owned()).collect();
            store.keep(Whose::User(user), name, (&wheel, "out"), &used)
        };
        keep(&bob, "bobs", &[]).unwrap();
        for number in 0..MOST_SETS {
            let kept = keep(&ann, &format!("set{number}"), &[]).unwrap();
            let then = SystemTime::now() - Duration::from_secs(1_000 - number as u64);
            let times = FileTimes::new().set_modified(then);
            File::open(kept).unwrap().set_times(times).unwrap();
        }
        let has = |user: &UserId, name: &str| {
            above
                .path()
                .join("users")
                .join(user.as_str())
                .join(name)
                .is_dir()
        };
        // The oldest is in use; the next one was used just now.
        assert!(store.find(Whose::User(&ann), "set1").is_some());
        keep(&ann, "new", &["set0"]).unwrap();
        assert!(has(&ann, "set0") && has(&ann, "set1") && !has(&ann, "set2") && has(&ann, "new"));
        assert!(has(&bob, "bobs"));
        assert!(store.find(Whose::User(&bob), "set1").is_none());
        let all: Vec<String> = (0..MOST_SETS)
            .map(|n| format!("set{n}"))
            .chain(["new".to_owned()])
            .collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        assert!(matches!(keep(&ann, "more", &all), Err(NotKept::Full)));
        assert!(!has(&ann, "more") && !has(&ann, "more.new"));
        fs::create_dir(above.path().join("packages-0000abcd")).unwrap();
        fs::create_dir(above.path().join("users/ann/half.new")).unwrap();
        store.tidy().unwrap();
        assert!(!above.path().join("packages-0000abcd").exists() && !has(&ann, "half.new"));
        assert!(has(&ann, "set0"));
    }
}
