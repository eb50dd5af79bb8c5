//! The workspace's files, for its user far away. Whatever stands there, nothing outside is reached: every
//! path is walked below the workspace and through no link, and only regular files are opened.

use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use crate::beneath::{self, Folder};
use crate::model::{Install, Packages, RelativePath};

/// Most files that are listed, as many as a repl may be started with.
const MOST_ENTRIES: usize = 10_000;

/// Deepest folder that is looked into.
const DEEPEST: usize = 64;

/// Largest file that is read or written, as much as a run may write.
pub const LARGEST: u64 = 64 << 20;

/// Largest piece of a file that is read at once: as text or in base64 it fits into a message.
pub const PIECE: u64 = 512 << 10;

/// What stands at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A link, a pipe, a device: shown, and never opened.
    Other,
    /// A file that was there and is not any more.
    Gone,
}

/// One thing in the workspace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Where.
    pub path: String,
    /// What.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// When it was changed, in milliseconds of the Unix clock.
    pub modified: i64,
    /// What is in the folder is nobody's work, and not listed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub made: bool,
}

/// What tools keep to be faster the next time.
const CACHES: [&str; 3] = [".cache", ".npm", ".config/go"];

/// The workspace's files.
#[derive(Debug)]
pub struct Files {
    top: Folder,
    /// Whose they are; `None`: the runner's own user's.
    owner: Option<u32>,
}

impl Files {
    /// Those in this folder.
    pub fn open(folder: &Path, owner: Option<u32>) -> io::Result<Self> {
        let top = Folder::open(folder)?;
        Ok(Self { top, owner })
    }

    /// Everything there is, folders before what is in them, but for what is in folders of caches and of packages
    /// that were installed: that may be a hundred thousand files, and nobody wrote them. Packages that somebody put
    /// there in another way are listed, unless that is too much.
    pub fn tree(&self) -> io::Result<Vec<Entry>> {
        let (installed, others): (Vec<&Install>, Vec<&Install>) =
            Packages::installs().partition(|install| self.has_installed(install));
        let mut made = CACHES.to_vec();
        made.extend(installed.iter().flat_map(|install| install.own));
        let mut entries = Vec::new();
        if list(&self.top, "", 0, &made, &mut entries).is_err() {
            entries.clear();
            made.extend(others.iter().flat_map(|install| install.own));
            list(&self.top, "", 0, &made, &mut entries)?;
        }
        Ok(entries)
    }

    /// Whether it has, or is at it.
    fn has_installed(&self, install: &Install) -> bool {
        let installed = install.installed();
        let there = |path: &str| self.top.about_path(path).is_ok();
        there(&installed) || there(&format!("{installed}.new"))
    }

    /// Whether a folder stands there, and no link to one.
    pub fn is_folder(&self, path: &str) -> bool {
        let about = self.top.about_path(path);
        about.is_ok_and(|about| about.kind == beneath::Kind::Folder)
    }

    /// When what stands there was changed, in milliseconds of the Unix clock.
    pub fn changed(&self, path: &str) -> Option<u64> {
        u64::try_from(self.top.about_path(path).ok()?.modified).ok()
    }

    /// A piece of a file, from `offset`, and the file's size.
    pub fn read(&self, path: &RelativePath, offset: u64) -> io::Result<(Vec<u8>, u64)> {
        let file = self.top.read(path.as_str())?;
        let size = file.metadata()?.len();
        let mut piece = vec![0; usize::try_from(PIECE).unwrap_or_default()];
        let length = file.read_at(&mut piece, offset)?;
        piece.truncate(length);
        Ok((piece, size))
    }

    /// The whole of a file.
    pub fn read_whole(&self, path: &RelativePath) -> io::Result<Vec<u8>> {
        let file = self.top.read(path.as_str())?;
        let mut content = Vec::new();
        file.take(LARGEST + 1).read_to_end(&mut content)?;
        if content.len() as u64 > LARGEST {
            return Err(io::Error::other(format!(
                "it is larger than {LARGEST} bytes"
            )));
        }
        Ok(content)
    }

    /// Writes a piece at `offset`; with the last one (`done`) the file takes its place, whole.
    pub fn write(
        &self,
        path: &RelativePath,
        offset: u64,
        piece: &[u8],
        done: bool,
    ) -> io::Result<()> {
        if offset.saturating_add(piece.len() as u64) > LARGEST {
            return Err(io::Error::other(format!(
                "it is larger than {LARGEST} bytes"
            )));
        }
        let (folder, name) = self.enter(path, true)?;
        let staged = format!(".{name}.part");
        let file = folder.write(&*staged, 0o644, offset == 0)?;
        beneath::give(&file, self.owner)?;
        file.write_all_at(piece, offset)?;
        if done {
            // Left by an upload that was longer and broke off.
            file.set_len(offset + piece.len() as u64)?;
            // A script stays one that can be run.
            if let Ok(about) = folder.about(name)
                && about.kind == beneath::Kind::File
            {
                beneath::set_mode(&file, about.mode)?;
            }
            folder.rename(&*staged, &folder, name, true)?;
        }
        Ok(())
    }

    /// Makes a folder, and those above it.
    pub fn make(&self, path: &RelativePath) -> io::Result<()> {
        self.top.make(path.as_str(), self.owner)?;
        Ok(())
    }

    /// Moves a file or a folder to where nothing stands.
    pub fn rename(&self, path: &RelativePath, to: &RelativePath) -> io::Result<()> {
        let (from, name) = self.enter(path, false)?;
        let (into, wanted) = self.enter(to, true)?;
        from.rename(name, &into, wanted, false)
    }

    /// Removes a file, or a folder with all that is in it.
    pub fn delete(&self, path: &RelativePath) -> io::Result<()> {
        let (folder, name) = self.enter(path, false)?;
        folder.remove(name)
    }

    /// The folder a path is in, and its name there.
    fn enter<'a>(&self, path: &'a RelativePath, make: bool) -> io::Result<(Folder, &'a str)> {
        let path = path.as_str();
        let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
        let folder = match (make, folders) {
            (true, folders) => self.top.make(folders, self.owner)?,
            (false, "") => self.top.try_clone()?,
            (false, folders) => self.top.folder(folders)?,
        };
        Ok((folder, name))
    }
}

fn list(
    folder: &Folder,
    above: &str,
    depth: usize,
    made: &[&str],
    entries: &mut Vec<Entry>,
) -> io::Result<()> {
    let mut folders = Vec::new();
    folder.each(|name, _| {
        // A name that is no text cannot be asked for.
        let (Ok(name), Ok(about)) = (name.to_str(), folder.about(name)) else {
            return Ok(());
        };
        let kind = match about.kind {
            beneath::Kind::File => Kind::File,
            beneath::Kind::Folder => Kind::Folder,
            beneath::Kind::Link | beneath::Kind::Other => Kind::Other,
        };
        let path = match above {
            "" => name.to_owned(),
            above => format!("{above}/{name}"),
        };
        let made_here = kind == Kind::Folder && made.contains(&&*path);
        if kind == Kind::Folder && !made_here {
            folders.push((name.to_owned(), path.clone()));
        }
        if entries.len() == MOST_ENTRIES {
            let why = format!("there are more than {MOST_ENTRIES} files and folders");
            return Err(io::Error::other(why));
        }
        entries.push(Entry {
            path,
            kind,
            size: about.size,
            modified: about.modified,
            made: made_here,
        });
        Ok(())
    })?;
    folders.sort();
    if depth == DEEPEST && !folders.is_empty() {
        let why = format!("folders are deeper than {DEEPEST}");
        return Err(io::Error::other(why));
    }
    for (name, path) in folders {
        // One that vanished or may not be entered is passed over.
        if let Ok(inner) = folder.folder(&*name) {
            list(&inner, &path, depth + 1, made, entries)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn path(text: &str) -> RelativePath {
        text.to_owned().try_into().unwrap()
    }

    #[test]
    fn files_are_written_whole_moved_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path(), None).unwrap();
        files.write(&path("a/b/c.txt"), 0, b"one ", false).unwrap();
        assert!(
            files.read(&path("a/b/c.txt"), 0).is_err(),
            "it is not whole yet"
        );
        files.write(&path("a/b/c.txt"), 4, b"two", true).unwrap();
        assert_eq!(
            files.read(&path("a/b/c.txt"), 4).unwrap(),
            (b"two".to_vec(), 7)
        );
        files.write(&path("a/b/c.txt"), 0, b"three", true).unwrap();
        assert_eq!(files.read_whole(&path("a/b/c.txt")).unwrap(), b"three");
        files.make(&path("empty/folder")).unwrap();
        files.rename(&path("a/b"), &path("moved/here")).unwrap();
        assert!(
            files.rename(&path("empty"), &path("moved")).is_err(),
            "it would be lost"
        );
        let names = |files: &Files| -> Vec<String> {
            files
                .tree()
                .unwrap()
                .into_iter()
                .map(|entry| entry.path)
                .collect()
        };
        let mut found = names(&files);
        found.sort();
        assert_eq!(
            found,
            [
                "a",
                "empty",
                "empty/folder",
                "moved",
                "moved/here",
                "moved/here/c.txt"
            ]
        );
        files.delete(&path("moved")).unwrap();
        files.delete(&path("a")).unwrap();
        assert_eq!(names(&files).len(), 2);
        assert!(files.delete(&path("a")).is_err());
        let late = files.write(&path("big"), LARGEST, b"x", true);
        assert!(late.unwrap_err().to_string().contains("larger"));
    }

    #[test]
    fn packages_that_were_installed_are_not_listed() {
        let folder = tempfile::tempdir().unwrap();
        for made in [
            "node_modules/a",
            "go/pkg/mod/a",
            "go/own",
            ".cache/a",
            ".cargo-home",
            "src/.cache",
        ] {
            std::fs::create_dir_all(folder.path().join(made)).unwrap();
        }
        let files = Files::open(folder.path(), None).unwrap();
        let paths = || {
            let tree = files.tree().unwrap();
            let mut paths: Vec<String> = tree.into_iter().map(|entry| entry.path).collect();
            paths.retain(|path| path.matches('/').count() > 0 && !path.starts_with("src"));
            paths.sort_unstable();
            paths.join(" ")
        };
        // Somebody else may have put them there: they are somebody's.
        let all = "go/own go/pkg go/pkg/mod go/pkg/mod/a node_modules/a";
        assert_eq!(paths(), all);
        let mark = |name: &str| std::fs::write(folder.path().join(name), "").unwrap();
        mark("node_modules/.gantry-installed");
        mark("go/pkg/mod/.gantry-installed.new");
        assert_eq!(paths(), "go/own go/pkg go/pkg/mod");
        for number in 0..MOST_ENTRIES {
            mark(&format!(".cargo-home/{number}"));
        }
        assert_eq!(paths(), "go/own go/pkg go/pkg/mod");
    }

    #[test]
    fn nothing_outside_is_reached_and_nothing_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "s").unwrap();
        let top = folder.path().join("top");
        std::fs::create_dir(&top).unwrap();
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, top.join(name)).unwrap();
        link(outside.path(), "folder");
        link(&outside.path().join("secret"), "file");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            top.join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
        let files = Files::open(&top, None).unwrap();
        for name in ["folder/secret", "file", "pipe"] {
            assert!(files.read(&path(name), 0).is_err(), "{name}");
            assert!(files.read_whole(&path(name)).is_err(), "{name}");
        }
        assert!(files.write(&path("folder/new"), 0, b"x", true).is_err());
        assert!(files.rename(&path("folder/secret"), &path("mine")).is_err());
        files.delete(&path("folder")).unwrap();
        files.write(&path("file"), 0, b"mine", true).unwrap();
        assert_eq!(
            std::fs::read_to_string(outside.path().join("secret")).unwrap(),
            "s"
        );
        assert!(!outside.path().join("new").exists());
        let kinds: Vec<Kind> = files
            .tree()
            .unwrap()
            .iter()
            .map(|entry| entry.kind)
            .collect();
        assert!(kinds.contains(&Kind::Other));
    }
}
