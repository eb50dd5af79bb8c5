//! What a job built: packed when the job has ended, put into the workspaces of those that follow, and
//! at last into the release's. What lies there was made by user code, so nothing of it is followed.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use tar::{Archive, Builder, Entry, EntryType, Header};

use super::wire::{JobId, MAX_BUILD_BYTES, MAX_UNPACKED_BYTES};
use crate::beneath::{self, Folder, Kind};

/// Most bytes in an archive, unpacked.
const MAX_BYTES: u64 = MAX_UNPACKED_BYTES;

/// Most files and folders in an archive.
const MAX_ENTRIES: usize = 16_384;

/// Bytes of all their paths, which the archive repeats: 256 for each.
const MAX_PATH_BYTES: usize = 256 * MAX_ENTRIES;

/// Bytes of archives that are kept for jobs that follow. A server says when one is not needed any more;
/// what a server that died has left goes when there is no room.
const MAX_KEPT_BYTES: usize = 192 << 20;

/// Bytes of archives that are kept in case the same is to be built again.
const MAX_CACHED_BYTES: usize = 96 << 20;

/// Archives of jobs whose submissions are not over.
#[derive(Debug, Default)]
pub struct Builds {
    kept: RefCell<Kept<JobId>>,
    /// Those that come out the same for the same key.
    cached: RefCell<Kept<String>>,
}

/// Archives, the oldest first.
type Kept<K> = VecDeque<(K, Arc<Vec<u8>>)>;

/// Adds one; the oldest make room.
fn add<K>(kept: &mut Kept<K>, key: K, archive: Arc<Vec<u8>>, most: usize) {
    kept.push_back((key, archive));
    let mut bytes: usize = kept.iter().map(|(_, archive)| archive.len()).sum();
    while bytes > most && kept.len() > 1 {
        bytes -= kept.pop_front().map_or(0, |(_, archive)| archive.len());
    }
}

impl Builds {
    /// Keeps one; the oldest make room.
    pub fn keep(&self, job: JobId, archive: Arc<Vec<u8>>) {
        add(&mut self.kept.borrow_mut(), job, archive, MAX_KEPT_BYTES);
    }

    /// The one that this job built.
    pub fn of(&self, job: JobId) -> Option<Arc<Vec<u8>>> {
        let kept = self.kept.borrow();
        let (_, archive) = kept.iter().find(|(id, _)| *id == job)?;
        Some(Arc::clone(archive))
    }

    /// It is not needed any more.
    pub fn forget(&self, job: JobId) {
        self.kept.borrow_mut().retain(|(id, _)| *id != job);
    }

    /// Keeps one for every job with this key.
    pub fn cache(&self, key: &str, archive: Arc<Vec<u8>>) {
        let mut cached = self.cached.borrow_mut();
        cached.retain(|(known, _)| known != key);
        add(&mut cached, key.to_owned(), archive, MAX_CACHED_BYTES);
    }

    /// The one with this key.
    pub fn cached(&self, key: &str) -> Option<Arc<Vec<u8>>> {
        let cached = self.cached.borrow();
        let (_, archive) = cached.iter().find(|(known, _)| known == key)?;
        Some(Arc::clone(archive))
    }
}

/// Packs folders of a workspace. No process that could change them may be alive.
pub fn pack(workspace: &Path, folders: &[String]) -> io::Result<Vec<u8>> {
    let bounded = Bounded {
        bytes: Vec::new(),
        most: MAX_BUILD_BYTES,
    };
    let mut archive = Builder::new(GzEncoder::new(bounded, Compression::fast()));
    let (mut bytes, mut entries, mut path_bytes) = (0, 0, 0);
    let top = Rc::new(Folder::open(workspace)?);
    // Each with the folder it is in, which stays open as long as anything of it waits.
    let mut waiting: Vec<(Rc<Folder>, PathBuf)> = Vec::new();
    for path in folders.iter().map(PathBuf::from) {
        let above = match path.parent().filter(|above| !above.as_os_str().is_empty()) {
            Some(above) => Rc::new(top.folder(above)?),
            None => Rc::clone(&top),
        };
        waiting.push((above, path));
    }
    while let Some((above, path)) = waiting.pop() {
        let name = path.file_name().unwrap_or(path.as_os_str());
        let about = above.about(name)?;
        entries += 1;
        if entries > MAX_ENTRIES {
            return Err(too_large(&format!("it is more than {MAX_ENTRIES} files")));
        }
        path_bytes += path.as_os_str().len();
        if path_bytes > MAX_PATH_BYTES {
            return Err(too_large(
                "its folders are too deep, and their names too long",
            ));
        }
        let mut header = Header::new_gnu();
        // Neither whose it was nor when it was made: the same input gives the same archive.
        header.set_mtime(0);
        match about.kind {
            Kind::Folder => {
                header.set_entry_type(EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                archive.append_data(&mut header, &path, io::empty())?;
                let folder = Rc::new(above.folder(name)?);
                folder.each(|inner, _| {
                    let inner = path.join(OsStr::from_bytes(inner.to_bytes()));
                    waiting.push((Rc::clone(&folder), inner));
                    match waiting.len() + entries > MAX_ENTRIES {
                        true => Err(too_large(&format!("it is more than {MAX_ENTRIES} files"))),
                        false => Ok(()),
                    }
                })?;
            }
            Kind::File => {
                let file = above.read(name)?;
                let length = file.metadata()?.len();
                bytes += length;
                if bytes > MAX_BYTES {
                    return Err(too_large(&format!("it is more than {MAX_BYTES} bytes")));
                }
                let executable = about.mode & 0o111 != 0;
                header.set_mode(if executable { 0o755 } else { 0o644 });
                header.set_size(length);
                // As much as its head says, whatever happens to the file meanwhile.
                archive.append_data(&mut header, &path, file.take(length))?;
            }
            Kind::Link => {
                let content = above.link_content(name)?;
                header.set_entry_type(EntryType::Symlink);
                header.set_mode(0o777);
                header.set_size(0);
                let content = OsStr::from_bytes(content.to_bytes());
                archive.append_link(&mut header, &path, content)?;
            }
            // Pipes and sockets are nothing that could be released.
            Kind::Other => {}
        }
    }
    Ok(archive.into_inner()?.finish()?.bytes)
}

/// Unpacks an archive into a workspace, for its user. Nothing is written outside of it.
pub fn unpack(archive: impl Read, workspace: &Path, uid: Option<u32>) -> io::Result<()> {
    let mut archive = Archive::new(GzDecoder::new(archive).take(MAX_BYTES + HEADERS));
    let top = Folder::open(workspace)?;
    for (number, entry) in archive.entries()?.enumerate() {
        if number >= MAX_ENTRIES {
            return Err(too_large(&format!("it is more than {MAX_ENTRIES} files")));
        }
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        unpack_one(&mut entry, &path, &top, uid).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", path.display()))
        })?;
    }
    Ok(())
}

fn unpack_one(
    entry: &mut Entry<'_, impl Read>,
    path: &Path,
    top: &Folder,
    uid: Option<u32>,
) -> io::Result<()> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part.to_str().ok_or(io::ErrorKind::InvalidData)?),
            // The folder itself, as `tar` calls it.
            Component::CurDir => {}
            _ => return Err(io::Error::other("it leads out of the workspace")),
        }
    }
    let Some((name, folders)) = parts.split_last() else {
        return Ok(());
    };
    let mode = entry.header().mode()? & 0o777;
    let kind = entry.header().entry_type();
    if kind.is_dir() {
        let made = top.make(&parts.join("/"), uid)?;
        return made.set_mode(mode | 0o700);
    }
    let folder = top.make(&folders.join("/"), uid)?;
    match folder.about(*name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(about) if about.kind == Kind::Folder => return Err(io::ErrorKind::IsADirectory.into()),
        Ok(_) => folder.remove(*name)?,
    }
    if kind.is_symlink() {
        let content = entry.link_name_bytes().ok_or(io::ErrorKind::InvalidData)?;
        return folder.link(name, &content, uid);
    }
    // Pipes and devices are nothing that anybody installed.
    if kind.is_fifo() || kind.is_character_special() || kind.is_block_special() {
        return Ok(());
    }
    if !kind.is_file() {
        return Err(io::Error::other("it is no file, folder or symbolic link"));
    }
    let mut file = folder.create(*name, 0o600)?;
    io::copy(entry, &mut file)?;
    beneath::give(&file, uid)?;
    beneath::set_mode(&file, mode | 0o600)
}

/// Whether it can be unpacked.
pub fn fits(archive: &[u8]) -> bool {
    let mut archive = Archive::new(GzDecoder::new(archive).take(MAX_BYTES));
    let Ok(entries) = archive.entries() else {
        return false;
    };
    let mut number = 0;
    for entry in entries {
        number += 1;
        if entry.is_err() || number > MAX_ENTRIES {
            return false;
        }
    }
    number > 0
}

/// What an archive has beside its files' bytes: a head for each, and padding.
const HEADERS: u64 = 4 * 512 * MAX_ENTRIES as u64;

fn too_large(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, why)
}

/// Bytes that do not become more than a bound.
struct Bounded {
    bytes: Vec<u8>,
    most: usize,
}

impl Write for Bounded {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > self.most {
            let why = format!("it is more than {} bytes, compressed", self.most);
            return Err(too_large(&why));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::SubmissionId;
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn out() -> [String; 1] {
        ["out".to_owned()]
    }

    fn folder(make: impl Fn(&Path)) -> tempfile::TempDir {
        let workspace = tempfile::tempdir().unwrap();
        fs::create_dir(workspace.path().join("out")).unwrap();
        make(&workspace.path().join("out"));
        workspace
    }

    #[test]
    fn what_was_packed_comes_out_as_it_was() {
        let long = "n".repeat(200);
        let from = folder(|out| {
            fs::create_dir_all(out.join("a/b")).unwrap();
            fs::write(out.join("a/b/program"), b"\x7fELF\xff").unwrap();
            let mode = fs::Permissions::from_mode(0o4755);
            fs::set_permissions(out.join("a/b/program"), mode).unwrap();
            fs::write(out.join(&long), "text").unwrap();
            symlink("a/b/program", out.join("link")).unwrap();
            symlink("/etc/passwd", out.join("outside")).unwrap();
        });
        fs::write(from.path().join("beside"), "not packed").unwrap();
        let archive = pack(from.path(), &out()).unwrap();
        assert_eq!(archive, pack(from.path(), &out()).unwrap());
        let to = tempfile::tempdir().unwrap();
        unpack(&archive[..], to.path(), None).unwrap();
        let out = to.path().join("out");
        assert_eq!(fs::read(out.join("link")).unwrap(), b"\x7fELF\xff");
        let mode = |name: &str| fs::metadata(out.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("a/b/program") & 0o7777, 0o755);
        assert_eq!(mode(&long) & 0o7777, 0o644);
        assert_eq!(
            fs::read_link(out.join("outside")).unwrap(),
            Path::new("/etc/passwd")
        );
        assert!(!to.path().join("beside").exists());
    }

    #[test]
    fn a_link_in_the_folders_place_is_not_followed() {
        let elsewhere = folder(|out| fs::write(out.join("secret"), "s").unwrap());
        let workspace = tempfile::tempdir().unwrap();
        symlink(elsewhere.path(), workspace.path().join("out")).unwrap();
        let archive = pack(workspace.path(), &out()).unwrap();
        let to = tempfile::tempdir().unwrap();
        unpack(&archive[..], to.path(), None).unwrap();
        assert!(
            fs::symlink_metadata(to.path().join("out"))
                .unwrap()
                .is_symlink()
        );
        assert!(pack(workspace.path(), &["absent".to_owned()]).is_err());
    }

    /// An archive as nobody here makes it.
    fn hostile(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, kind, content) in entries {
            let mut header = Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            if *kind == EntryType::Symlink {
                header.set_link_name(content).unwrap();
                header.set_size(0);
                header.set_cksum();
                archive.append(&header, io::empty()).unwrap();
            } else {
                header.set_size(content.len() as u64);
                header.set_cksum();
                archive.append(&header, content.as_bytes()).unwrap();
            }
        }
        archive.into_inner().unwrap().finish().unwrap()
    }

    #[test]
    fn what_cannot_be_unpacked_is_known_before() {
        let from = folder(|out| fs::write(out.join("a"), [7; 5_000]).unwrap());
        let archive = pack(from.path(), &out()).unwrap();
        assert!(fits(&archive));
        assert!(!fits(&archive[..archive.len() / 2]));
        assert!(!fits(b"no archive") && !fits(b""));
        let mut many = Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for number in 0..=MAX_ENTRIES {
            let mut header = Header::new_gnu();
            header.set_size(0);
            many.append_data(&mut header, number.to_string(), io::empty())
                .unwrap();
        }
        assert!(!fits(&many.into_inner().unwrap().finish().unwrap()));
    }

    #[test]
    fn nothing_is_written_outside() {
        use EntryType::{Regular, Symlink};
        let above = tempfile::tempdir().unwrap();
        let workspace = above.path().join("workspace");
        fs::create_dir(&workspace).unwrap();
        let elsewhere = above.path().to_str().unwrap();
        for entries in [
            &[("../escaped", Regular, "x")][..],
            &[("/escaped-to-root", Regular, "x")],
            &[("link", Symlink, elsewhere), ("link/escaped", Regular, "x")],
        ] {
            assert!(unpack(&hostile(entries)[..], &workspace, None).is_err());
        }
        assert!(!above.path().join("escaped").exists());
        assert!(!Path::new("/escaped-to-root").exists());
        assert!(unpack(&b"no archive"[..], &workspace, None).is_err());
    }

    #[test]
    fn what_is_too_large_is_refused() {
        let from = folder(|out| {
            let sparse = File::create(out.join("sparse")).unwrap();
            sparse.set_len(MAX_BYTES + 1).unwrap();
        });
        let error = pack(from.path(), &out()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
    }

    #[test]
    fn the_oldest_make_room() {
        let builds = Builds::default();
        let submission = SubmissionId::new();
        let ids = [0, 1, 2].map(|run| JobId { submission, run });
        for id in ids {
            builds.keep(id, Arc::new(vec![0; MAX_KEPT_BYTES / 2]));
        }
        assert!(builds.of(ids[0]).is_none());
        assert!(builds.of(ids[1]).is_some() && builds.of(ids[2]).is_some());
        builds.forget(ids[2]);
        assert!(builds.of(ids[2]).is_none());
        for (key, byte) in [("a", 1), ("b", 2), ("a", 3)] {
            builds.cache(key, Arc::new(vec![byte; MAX_CACHED_BYTES / 2]));
        }
        assert_eq!(builds.cached("a").unwrap()[0], 3);
        builds.cache("c", Arc::new(vec![4]));
        assert!(builds.cached("b").is_none() && builds.cached("a").is_some());
    }
}
