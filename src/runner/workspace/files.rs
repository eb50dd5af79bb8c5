//! The workspace's files, for its user far away. Whatever stands there, nothing outside is reached: every
//! path is walked below the workspace and through no link, and only regular files are opened.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use super::tree::Tree;
use crate::beneath::{self, Folder};
use crate::model::{
    Extras, Install, MAX_WORKSPACE_BYTES, MAX_WORKSPACE_ENTRIES, MAX_WORKSPACE_FILE_BYTES,
    Packages, RelativePath, is_gantrys, stays_inside,
};

/// Largest file that is read or written: as large as is kept.
pub const LARGEST: u64 = MAX_WORKSPACE_FILE_BYTES;

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
    /// The file can be run.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
    /// What the symbolic link holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// Why a save leaves it out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unkept: Option<String>,
    /// What is in the folder could not be looked at, and may be there.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
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
    /// there in another way are listed, unless that is too much. What cannot be kept says why; `stored`: the files
    /// that the code store has, which go before others when there is too much.
    pub fn tree(&self, stored: &BTreeSet<String>) -> io::Result<Vec<Entry>> {
        let (installed, others): (Vec<&Install>, Vec<&Install>) =
            Packages::installs().partition(|install| self.has_installed(install));
        let mut made = CACHES.to_vec();
        made.extend(installed.iter().flat_map(|install| install.own));
        let mut tree = Tree::of(&self.top, &made)?;
        if tree.is_too_much() {
            made.extend(others.iter().flat_map(|install| install.own));
            tree = Tree::of(&self.top, &made)?;
        }
        if tree.cut {
            tree.add(&self.top, stored);
        }
        let mut entries = tree.entries;
        choose(&mut entries, stored);
        for at in tree.unseen {
            entries[at].unkept = Some(not_seen());
        }
        Ok(entries)
    }

    /// Puts back what the code store says beside the content of files. What stands there already stays; says what
    /// could not be put back.
    pub fn restore(&self, extras: &Extras) -> Vec<String> {
        let mut left = Vec::new();
        let mut note = |path: &RelativePath, done: io::Result<()>| {
            if let Err(error) = done {
                left.push(format!("{path}: {error}"));
            }
        };
        for path in extras.folders.iter().take(MAX_WORKSPACE_ENTRIES) {
            note(path, self.make(path));
        }
        for (path, target) in extras.links.iter().take(MAX_WORKSPACE_ENTRIES) {
            note(path, self.link(path, target));
        }
        for path in extras.executable.iter().take(MAX_WORKSPACE_ENTRIES) {
            note(path, self.make_executable(path));
        }
        left
    }

    fn link(&self, path: &RelativePath, target: &str) -> io::Result<()> {
        if !stays_inside(path.as_str(), target) {
            return Err(io::Error::other("the link leads out of the workspace"));
        }
        let (folder, name) = self.enter(path, true)?;
        folder.link(name, target.as_bytes(), self.owner)
    }

    /// For everybody who can read it.
    fn make_executable(&self, path: &RelativePath) -> io::Result<()> {
        let file = self.top.read(path.as_str())?;
        let mode = self.top.about_path(path.as_str())?.mode;
        beneath::set_mode(&file, mode | (mode & 0o444) >> 2)
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

/// Why what is too much is not kept.
fn too_many() -> String {
    format!("at most {MAX_WORKSPACE_ENTRIES} files, folders and links of a workspace are kept")
}

/// Why not all of a folder is kept. What was seen of it may be.
fn not_seen() -> String {
    format!(
        "it holds more than the {MAX_WORKSPACE_ENTRIES} files, folders and links that are looked at; \
         the rest of it is not kept"
    )
}

fn too_large() -> String {
    format!(
        "the files of a workspace that are kept have at most {MAX_WORKSPACE_BYTES} bytes together"
    )
}

/// Marks what is too much to be kept. What the code store has goes first; then what is in folders with little in
/// them, since people's own files hardly come by the thousand; of what is too large together, the smaller files.
fn choose(entries: &mut [Entry], stored: &BTreeSet<String>) {
    let mut kept: Vec<usize> = (0..entries.len())
        .filter(|at| is_kept(&entries[*at]))
        .collect();
    if kept.len() > MAX_WORKSPACE_ENTRIES {
        let mut in_folder: HashMap<&str, usize> = HashMap::new();
        for at in &kept {
            *in_folder.entry(folder_of(&entries[*at].path)).or_default() += 1;
        }
        kept.sort_by_cached_key(|at| {
            let path = &entries[*at].path;
            let beside = in_folder.get(folder_of(path)).copied();
            (!stored.contains(path), beside, path.clone())
        });
        for at in kept.split_off(MAX_WORKSPACE_ENTRIES) {
            entries[at].unkept = Some(too_many());
        }
        // A folder is kept with what is in it.
        let above: BTreeSet<String> = kept
            .iter()
            .flat_map(|at| above(&entries[*at].path))
            .map(str::to_owned)
            .collect();
        for entry in entries.iter_mut() {
            if entry.kind == Kind::Folder && !entry.closed && above.contains(&entry.path) {
                entry.unkept = None;
            }
        }
    }
    kept.retain(|at| entries[*at].kind == Kind::File);
    let bytes: u64 = kept.iter().map(|at| entries[*at].size).sum();
    if bytes > MAX_WORKSPACE_BYTES {
        kept.sort_by_cached_key(|at| {
            let entry = &entries[*at];
            (
                !stored.contains(&entry.path),
                entry.size,
                entry.path.clone(),
            )
        });
        let mut bytes = 0;
        for at in kept {
            bytes += entries[at].size;
            if bytes > MAX_WORKSPACE_BYTES {
                entries[at].unkept = Some(too_large());
            }
        }
    }
}

/// Whether it is kept, as far as was decided.
pub fn is_kept(entry: &Entry) -> bool {
    entry.unkept.is_none() && !entry.made && !is_gantrys(&entry.path)
}

fn folder_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// The folders that a path is in.
fn above(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(end, _)| &path[..end])
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn path(text: &str) -> RelativePath {
        text.to_owned().try_into().unwrap()
    }

    fn tree(files: &Files) -> Vec<Entry> {
        files.tree(&BTreeSet::new()).unwrap()
    }

    fn why<'a>(tree: &'a [Entry], path: &str) -> Option<&'a str> {
        let entry = tree.iter().find(|entry| entry.path == path);
        entry.unwrap_or_else(|| panic!("{path}")).unkept.as_deref()
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
            tree(files).into_iter().map(|entry| entry.path).collect()
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
            let tree = tree(&files);
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
        for number in 0..MAX_WORKSPACE_ENTRIES {
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
        let kinds: Vec<Kind> = tree(&files).iter().map(|entry| entry.kind).collect();
        assert!(kinds.contains(&Kind::Other));
    }

    #[test]
    fn what_cannot_be_kept_says_why_and_everything_else_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, at(name)).unwrap();
        std::fs::create_dir_all(at("bin/empty")).unwrap();
        std::fs::write(at("bin/run"), "#!/bin/sh\n").unwrap();
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(at("bin/run"), mode).unwrap();
        link("../bin/run", "bin/inside");
        link("/etc/passwd", "outside");
        let large = |name: &str, bytes| {
            std::fs::File::create(at(name))
                .unwrap()
                .set_len(bytes)
                .unwrap();
        };
        large("seventy", 70 << 20);
        large("large", LARGEST + 1);
        std::fs::write(at("back\\slash"), "x").unwrap();
        use std::os::unix::ffi::OsStrExt;
        let no_text = std::ffi::OsStr::from_bytes(b"no-\xff-text");
        std::fs::write(folder.path().join(no_text), "x").unwrap();
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let files = Files::open(folder.path(), None).unwrap();
        let tree = tree(&files);
        for kept in ["bin", "bin/empty", "bin/run", "bin/inside", "seventy"] {
            assert_eq!(why(&tree, kept), None, "{kept}");
        }
        for (path, says) in [
            ("outside", "leads out"),
            ("large", "larger than 134217728 bytes"),
            ("back\\slash", "backslash"),
            ("no-\u{fffd}-text", "UTF-8"),
            ("socket", "socket"),
        ] {
            assert!(why(&tree, path).unwrap().contains(says), "{path}: {tree:?}");
        }
        let run = tree.iter().find(|entry| entry.path == "bin/run").unwrap();
        assert!(run.executable);
        let inside = tree.iter().find(|entry| entry.path == "bin/inside");
        assert_eq!(inside.unwrap().link.as_deref(), Some("../bin/run"));
    }

    #[test]
    fn of_too_many_files_those_are_kept_that_are_stored_or_few_in_their_folder() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["many", "own"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        for number in 0..MAX_WORKSPACE_ENTRIES {
            std::fs::write(at(&format!("many/{number:05}")), "").unwrap();
        }
        for name in ["zz.py", "own/code.py"] {
            std::fs::write(at(name), "").unwrap();
        }
        let files = Files::open(folder.path(), None).unwrap();
        let stored = BTreeSet::from(["many/09999".to_owned()]);
        let tree = files.tree(&stored).unwrap();
        for kept in [
            "many",
            "own",
            "zz.py",
            "own/code.py",
            "many/00000",
            "many/09999",
        ] {
            assert_eq!(why(&tree, kept), None, "{kept}");
        }
        let unkept: Vec<&str> = tree
            .iter()
            .filter(|entry| entry.unkept.is_some())
            .map(|entry| &*entry.path)
            .collect();
        // `many`, `own` and two files take the places of four.
        assert_eq!(
            unkept,
            ["many/09995", "many/09996", "many/09997", "many/09998"]
        );
        assert!(why(&tree, "many/09998").unwrap().contains("at most 10000"));
        // However many there are, the listing is bounded, and what is stored is in it.
        for number in 0..2 * MAX_WORKSPACE_ENTRIES {
            let name = format!("many/more-{number:05}");
            std::fs::hard_link(at("zz.py"), at(&name)).unwrap();
        }
        std::fs::write(at("many/zzz"), "").unwrap();
        let stored = BTreeSet::from(["many/zzz".to_owned(), "many/gone".to_owned()]);
        let tree = files.tree(&stored).unwrap();
        assert_eq!(why(&tree, "many/zzz"), None);
        assert!(
            tree.len() < 2 * MAX_WORKSPACE_ENTRIES + 10,
            "{}",
            tree.len()
        );
        assert!(tree.iter().any(|entry| entry.unkept.is_some()));
        assert!(!tree.iter().any(|entry| entry.path == "many/gone"));
    }

    #[test]
    fn what_is_deep_or_too_large_together_is_named_and_the_rest_is_listed() {
        let folder = tempfile::tempdir().unwrap();
        let deep = vec!["d"; 80].join("/");
        std::fs::create_dir_all(folder.path().join(&deep)).unwrap();
        std::fs::write(folder.path().join(&deep).join("file"), "").unwrap();
        for (name, bytes) in [("a", 100_u64 << 20), ("b", 100 << 20), ("c", 1)] {
            let file = std::fs::File::create(folder.path().join(name)).unwrap();
            file.set_len(bytes).unwrap();
        }
        let files = Files::open(folder.path(), None).unwrap();
        let tree = files.tree(&BTreeSet::from(["b".to_owned()])).unwrap();
        let deepest = vec!["d"; 65].join("/");
        assert!(why(&tree, &deepest).unwrap().contains("deeper than 64"));
        assert_eq!(why(&tree, &deepest[..deepest.len() - 2]), None);
        assert!(why(&tree, "a").unwrap().contains("together"));
        assert_eq!((why(&tree, "b"), why(&tree, "c")), (None, None));
    }

    #[test]
    fn what_files_cannot_say_is_put_back() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run"), "x").unwrap();
        std::fs::write(folder.path().join("stands"), "x").unwrap();
        let files = Files::open(folder.path(), None).unwrap();
        let links = [
            ("a/link", "../run"),
            ("out", "/etc/passwd"),
            ("stands", "run"),
        ];
        let extras = Extras {
            folders: BTreeSet::from([path("empty/folder")]),
            links: links.map(|(at, to)| (path(at), to.to_owned())).into(),
            executable: BTreeSet::from([path("run"), path("missing")]),
        };
        let left = files.restore(&extras).join("\n");
        for name in ["out:", "stands:", "missing:"] {
            assert!(left.contains(name), "{left}");
        }
        assert_eq!(left.lines().count(), 3, "{left}");
        let tree = tree(&files);
        let entry = |name: &str| tree.iter().find(|entry| entry.path == name);
        assert!(entry("run").unwrap().executable);
        assert_eq!(entry("a/link").unwrap().link.as_deref(), Some("../run"));
        assert_eq!(entry("empty/folder").unwrap().kind, Kind::Folder);
        assert_eq!(entry("stands").unwrap().kind, Kind::File);
        assert!(entry("out").is_none());
    }
}
