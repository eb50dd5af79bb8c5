//! Files in folders that user code can write to. What stands there was put there by somebody else, and
//! may be replaced between two system calls. So nothing is reached by its path from the root: a folder is
//! opened once, everything else is opened below it and through no link, and owners and modes are changed
//! through the descriptor of what was opened. `tests/house.rs` holds the code to using this module.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::path::Arg;
use rustix::process::{Gid, Uid};

/// Below the folder, through no link.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

const FOLDER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A pipe that stands in a file's place is not waited for.
const FILE: OFlags = OFlags::NONBLOCK
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Names that are read of a folder at one time: a folder may have more than fit into memory.
const NAMES: usize = 4_096;

/// What stands at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
    /// A symbolic link.
    Link,
    /// A pipe, a socket or a device.
    Other,
}

impl Kind {
    fn of(kind: FileType) -> Self {
        match kind {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Folder,
            FileType::Symlink => Kind::Link,
            _ => Kind::Other,
        }
    }
}

/// What is known of a name without opening it.
#[derive(Debug, Clone, Copy)]
pub struct About {
    /// What it is.
    pub kind: Kind,
    /// Bytes, as a reader sees them.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// When it was changed, in milliseconds of the Unix clock.
    pub modified: i64,
}

impl About {
    #[allow(
        clippy::allow_attributes,
        reason = "the fields' types differ between machines"
    )]
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' types differ between machines"
    )]
    fn of(stat: &rustix::fs::Stat) -> Self {
        Self {
            kind: Kind::of(FileType::from_raw_mode(stat.st_mode)),
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mode: stat.st_mode & 0o777,
            modified: stat.st_mtime as i64 * 1_000
                + i64::try_from(stat.st_mtime_nsec / 1_000_000).unwrap_or(0),
        }
    }
}

/// An open folder.
#[derive(Debug)]
pub struct Folder(OwnedFd);

impl Folder {
    /// The folder at a path. Only the last name is not followed as a link: whoever calls this knows that no
    /// user can write to the folders above it.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::open(path, FOLDER, Mode::empty())?))
    }

    /// The same, made if it is not there.
    pub fn open_or_make(path: &Path, mode: u32) -> io::Result<Self> {
        match rustix::fs::mkdir(path, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => Self::open(path),
            Err(error) => Err(error.into()),
        }
    }

    /// Another descriptor of the same folder.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// A folder in it.
    pub fn folder(&self, path: impl Arg) -> io::Result<Self> {
        let opened = rustix::fs::openat2(&self.0, path, FOLDER, Mode::empty(), BENEATH);
        Ok(Self(opened?))
    }

    /// A folder in it, made with those above it where they are not there, for this user.
    pub fn make(&self, path: &str, owner: Option<u32>) -> io::Result<Self> {
        let mut at = self.try_clone()?;
        for part in path.split('/').filter(|part| !part.is_empty()) {
            let made = rustix::fs::mkdirat(&at.0, part, Mode::from_raw_mode(0o755));
            match made {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            at = at.folder(part)?;
            if made.is_ok() {
                at.give(owner)?;
            }
        }
        Ok(at)
    }

    /// A regular file in it, for reading.
    pub fn read(&self, path: impl Arg) -> io::Result<File> {
        let flags = OFlags::RDONLY | FILE;
        let opened = rustix::fs::openat2(&self.0, path, flags, Mode::empty(), BENEATH)?;
        regular(opened)
    }

    /// A new file in it, for writing. Nothing may stand at the name.
    pub fn create(&self, path: impl Arg, mode: u32) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | FILE;
        let mode = Mode::from_raw_mode(mode);
        let made = rustix::fs::openat2(&self.0, path, flags, mode, BENEATH)?;
        Ok(File::from(made))
    }

    /// A file in it, for writing: the one that is there, emptied if `anew`, or a new one.
    pub fn write(&self, path: impl Arg, mode: u32, anew: bool) -> io::Result<File> {
        let begin = if anew { OFlags::TRUNC } else { OFlags::empty() };
        let flags = begin | OFlags::WRONLY | OFlags::CREATE | FILE;
        let mode = Mode::from_raw_mode(mode);
        let opened = rustix::fs::openat2(&self.0, path, flags, mode, BENEATH)?;
        regular(opened)
    }

    /// Makes a symbolic link with this content, for this user. It is never followed here.
    pub fn link(&self, name: &str, content: &[u8], owner: Option<u32>) -> io::Result<()> {
        rustix::fs::symlinkat(content, &self.0, name)?;
        if let Some(id) = owner {
            let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
            let flags = AtFlags::SYMLINK_NOFOLLOW;
            rustix::fs::chownat(&self.0, name, Some(user), Some(group), flags)?;
        }
        Ok(())
    }

    /// What a symbolic link leads to.
    pub fn link_content(&self, name: impl Arg) -> io::Result<CString> {
        Ok(rustix::fs::readlinkat(&self.0, name, Vec::new())?)
    }

    /// What stands at a name in this folder itself.
    pub fn about(&self, name: impl Arg) -> io::Result<About> {
        let stat = rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(About::of(&stat))
    }

    /// What stands at a path, whose folders are entered one by one.
    pub fn about_path(&self, path: &str) -> io::Result<About> {
        match path.rsplit_once('/') {
            None => self.about(path),
            Some((folders, name)) => self.folder(folders)?.about(name),
        }
    }

    /// Moves what stands at a name to another folder, where it replaces what `replace` allows it to.
    pub fn rename(
        &self,
        name: impl Arg,
        into: &Folder,
        wanted: impl Arg,
        replace: bool,
    ) -> io::Result<()> {
        let flags = match replace {
            true => RenameFlags::empty(),
            false => RenameFlags::NOREPLACE,
        };
        Ok(rustix::fs::renameat_with(
            &self.0, name, &into.0, wanted, flags,
        )?)
    }

    /// Makes it this user's; `None`: it stays whose it is.
    pub fn give(&self, owner: Option<u32>) -> io::Result<()> {
        give(&self.0, owner)
    }

    /// Sets its permission bits.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        Ok(rustix::fs::fchmod(&self.0, Mode::from_raw_mode(mode))?)
    }

    /// Calls this for every name in the folder itself. The folder is read in one go.
    pub fn each<E: From<io::Error>>(
        &self,
        mut act: impl FnMut(&CStr, Kind) -> Result<(), E>,
    ) -> Result<(), E> {
        let entries = Dir::read_from(&self.0).map_err(io::Error::from)?;
        for entry in entries {
            let entry = entry.map_err(io::Error::from)?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let kind = match entry.file_type() {
                // Not every file system says it.
                FileType::Unknown => self.about(name).map_or(Kind::Other, |about| about.kind),
                known => Kind::of(known),
            };
            act(name, kind)?;
        }
        Ok(())
    }

    /// Lets every user read and write the folder and all that is in it, however deep, holding one folder open
    /// at a time, until there were more names than `most`. What can be executed stays so.
    pub fn open_to_all(&self, most: u64) -> io::Result<()> {
        let mut left = most;
        let mut levels = vec![self.open_level_to_all(&mut left)?];
        let mut at = self.folder(".")?;
        while let Some(level) = levels.last_mut() {
            if let Some(name) = level.folders.pop() {
                // One that was removed or replaced since it was read is passed over.
                if let Ok(inner) = at.enter(&*name) {
                    levels.push(inner.open_level_to_all(&mut left)?);
                    at = inner;
                }
                continue;
            }
            levels.pop();
            let Some(parent) = levels.last() else {
                break;
            };
            at = Folder(rustix::fs::openat(&at.0, "..", FOLDER, Mode::empty())?);
            // Moved by a process that is still there: the way back leads elsewhere.
            if rustix::fs::fstat(&at.0)?.st_ino != parent.inode {
                return Err(io::Error::other("a folder was moved meanwhile"));
            }
        }
        Ok(())
    }

    /// The same of one folder and its files. Its folders are still to be entered.
    fn open_level_to_all(&self, left: &mut u64) -> io::Result<Level> {
        self.set_mode(0o777)?;
        let mut level = Level {
            inode: rustix::fs::fstat(&self.0)?.st_ino,
            folders: Vec::new(),
        };
        self.each(|name, kind| {
            *left = left.checked_sub(1).ok_or(Errno::OVERFLOW)?;
            match kind {
                Kind::Folder => level.folders.push(name.to_owned()),
                // One that was replaced meanwhile, or that its owner closed to this user, is passed over.
                Kind::File => {
                    let Ok(about) = self.about(name) else {
                        return Ok(());
                    };
                    let executed = if about.mode & 0o111 == 0 { 0 } else { 0o111 };
                    let wanted = 0o666 | executed;
                    if about.mode != wanted
                        && let Ok(file) = self.read(name)
                    {
                        set_mode(&file, wanted)?;
                    }
                }
                Kind::Link | Kind::Other => {}
            }
            io::Result::Ok(())
        })?;
        Ok(level)
    }

    /// Removes a file, or a folder with all that is in it.
    pub fn remove(&self, name: impl Arg + Copy) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.0, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            result => return Ok(result?),
        }
        self.enter(name)?.empty()?;
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    /// Removes everything in it, however deep, holding two folders open at most: a folder found inside
    /// another is first moved up to the top.
    pub fn empty(&self) -> io::Result<()> {
        let mut moved: u64 = 0;
        loop {
            let entries = self.names()?;
            if entries.is_empty() {
                return Ok(());
            }
            for (name, kind) in entries {
                if kind != Kind::Folder {
                    rustix::fs::unlinkat(&self.0, &name, AtFlags::empty())?;
                    continue;
                }
                if rustix::fs::unlinkat(&self.0, &name, AtFlags::REMOVEDIR).is_ok() {
                    continue;
                }
                let folder = self.enter(&name)?;
                let inside = folder.names()?;
                let whole = inside.len() < NAMES;
                for (inner, kind) in inside {
                    if kind == Kind::Folder {
                        folder.move_up(&inner, self, &mut moved)?;
                    } else {
                        folder.opened_up(|| {
                            rustix::fs::unlinkat(&folder.0, &inner, AtFlags::empty())
                        })?;
                    }
                }
                match rustix::fs::unlinkat(&self.0, &name, AtFlags::REMOVEDIR) {
                    // The rest of it is met again.
                    Err(Errno::NOTEMPTY) if !whole => {}
                    result => result?,
                }
            }
        }
    }

    /// Moves a folder in this one to the top, under a name that is free there.
    fn move_up(&self, inner: &CStr, top: &Folder, moved: &mut u64) -> io::Result<()> {
        let mut tried = false;
        loop {
            *moved += 1;
            let target = format!(".moved-{moved}");
            let flags = RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(&self.0, inner, &top.0, &target, flags) {
                Err(Errno::EXIST) => {}
                // Moving a folder changes its own `..` entry, which takes write permission in both.
                Err(Errno::ACCESS) if !tried => {
                    tried = true;
                    self.set_mode(0o700)?;
                    self.unlock(inner)?;
                }
                result => return Ok(result?),
            }
        }
    }

    /// Does this in the folder, which its owner may have closed to himself.
    fn opened_up<T>(&self, act: impl Fn() -> rustix::io::Result<T>) -> io::Result<T> {
        match act() {
            Err(Errno::ACCESS) => {
                self.set_mode(0o700)?;
                Ok(act()?)
            }
            result => Ok(result?),
        }
    }

    /// A folder in this one, opened up when its owner has closed it to himself.
    fn enter(&self, name: impl Arg + Copy) -> io::Result<Self> {
        match rustix::fs::openat2(&self.0, name, FOLDER, Mode::empty(), BENEATH) {
            Err(Errno::ACCESS) => {
                self.unlock(name)?;
                self.folder(name)
            }
            result => Ok(Self(result?)),
        }
    }

    /// Gives a folder's owner all rights to it. It cannot be opened for reading, and a descriptor that is
    /// not open for anything has no fchmod: the kernel's link to exactly what the descriptor stands for does.
    fn unlock(&self, name: impl Arg) -> io::Result<()> {
        let flags = OFlags::PATH | FOLDER;
        let closed = rustix::fs::openat2(&self.0, name, flags, Mode::empty(), BENEATH)?;
        let itself = format!("/proc/self/fd/{}", closed.as_raw_fd());
        Ok(rustix::fs::chmod(itself, Mode::RWXU)?)
    }

    fn names(&self) -> io::Result<Vec<(CString, Kind)>> {
        let mut names = Vec::new();
        let read = self.each(|name, kind| {
            names.push((name.to_owned(), kind));
            match names.len() < NAMES {
                true => Ok(()),
                false => Err(Enough::Names),
            }
        });
        match read {
            Ok(()) | Err(Enough::Names) => Ok(names),
            Err(Enough::Failed(error)) => Err(error),
        }
    }

    /// The room of its file system.
    #[allow(
        clippy::allow_attributes,
        reason = "the fields' types differ between machines"
    )]
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' types differ between machines"
    )]
    pub fn room(&self) -> io::Result<Room> {
        let about = rustix::fs::fstatfs(&self.0)?;
        let block = u64::try_from(about.f_bsize).unwrap_or(0);
        Ok(Room {
            bytes: block * about.f_blocks as u64,
            free: block * about.f_bavail as u64,
        })
    }

    /// The number of its file system.
    pub fn device(&self) -> io::Result<u64> {
        Ok(rustix::fs::fstat(&self.0)?.st_dev)
    }

    /// Counts what is below it, however deep, holding one folder open at a time, until there are more names
    /// than `most`.
    pub fn usage(&self, most: u64) -> Usage {
        let mut usage = Usage {
            complete: true,
            ..Usage::default()
        };
        if usage.walk(self, most).is_err() {
            usage.complete = false;
        }
        usage
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why reading a folder ended before its end.
enum Enough {
    Names,
    Failed(io::Error),
}

impl From<io::Error> for Enough {
    fn from(error: io::Error) -> Self {
        Enough::Failed(error)
    }
}

/// Makes an open file this user's; `None`: it stays whose it is.
pub fn give(file: impl AsFd, owner: Option<u32>) -> io::Result<()> {
    match owner {
        Some(_) => std::os::unix::fs::fchown(file, owner, owner),
        None => Ok(()),
    }
}

/// Sets an open file's permission bits.
pub fn set_mode(file: impl AsFd, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?)
}

fn regular(opened: OwnedFd) -> io::Result<File> {
    let file = File::from(opened);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok(file)
}

/// The room of a file system.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Bytes in all.
    pub bytes: u64,
    /// Bytes that the server may still write.
    pub free: u64,
}

/// What is below a folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk. A file with several names counts once for all of them together.
    pub bytes: u64,
    /// Files, folders and whatever else has a name.
    pub entries: u64,
    /// Bytes of the largest file, as a reader sees them.
    pub largest_file: u64,
    /// Everything was seen. It was not when there is too much, or when folders were moved or closed
    /// meanwhile.
    pub complete: bool,
}

/// A folder on the way down: its inode number, and the folders in it that are still to be seen.
struct Level {
    inode: u64,
    folders: Vec<CString>,
}

impl Usage {
    fn walk(&mut self, top: &Folder, most: u64) -> io::Result<()> {
        let mut levels = vec![self.level(top, most)?];
        let mut at = top.folder(".")?;
        while let Some(level) = levels.last_mut() {
            if let Some(name) = level.folders.pop() {
                match at.folder(&*name) {
                    Ok(inner) => {
                        levels.push(self.level(&inner, most)?);
                        at = inner;
                    }
                    // Removed, or replaced, since it was read.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(_) => self.complete = false,
                }
                continue;
            }
            levels.pop();
            let Some(parent) = levels.last() else {
                break;
            };
            at = Folder(rustix::fs::openat(&at.0, "..", FOLDER, Mode::empty())?);
            // Moved by a process that is still there: the way back leads elsewhere.
            if rustix::fs::fstat(&at.0)?.st_ino != parent.inode {
                self.complete = false;
                break;
            }
        }
        Ok(())
    }

    /// Looks at the entries of one folder.
    #[allow(
        clippy::allow_attributes,
        reason = "the fields' types differ between machines"
    )]
    #[allow(
        clippy::unnecessary_cast,
        reason = "the fields' types differ between machines"
    )]
    fn level(&mut self, folder: &Folder, most: u64) -> io::Result<Level> {
        let about = rustix::fs::fstat(&folder.0)?;
        self.bytes += on_disk(&about);
        let mut level = Level {
            inode: about.st_ino,
            folders: Vec::new(),
        };
        folder.each(|name, _| {
            self.entries += 1;
            if self.entries > most {
                return Err(io::Error::from(Errno::OVERFLOW));
            }
            let Ok(about) = rustix::fs::statat(&folder.0, name, AtFlags::SYMLINK_NOFOLLOW) else {
                return Ok(());
            };
            match Kind::of(FileType::from_raw_mode(about.st_mode)) {
                Kind::File => {
                    self.largest_file = self.largest_file.max(About::of(&about).size);
                    self.bytes += on_disk(&about) / (about.st_nlink as u64).max(1);
                }
                Kind::Folder => level.folders.push(name.to_owned()),
                Kind::Link | Kind::Other => {}
            }
            Ok(())
        })?;
        Ok(level)
    }
}

/// The kernel counts in pieces of 512 bytes.
fn on_disk(about: &rustix::fs::Stat) -> u64 {
    u64::try_from(about.st_blocks).unwrap_or(0) * 512
}

/// Calls `act`, which waits for the disk, such that other tasks of this thread go on elsewhere meanwhile.
pub fn waiting<T>(act: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    let many = Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == RuntimeFlavor::MultiThread);
    match many {
        true => tokio::task::block_in_place(act),
        false => act(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::ffi::OsStr;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn empty_removes_deep_trees_and_odd_names() {
        let dir = tempfile::tempdir().unwrap();
        let top = Folder::open(dir.path()).unwrap();
        let mut at = rustix::fs::open(dir.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..10_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "d", OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        for name in [&b"new\nline"[..], b"\xff\xfe", b".moved-1", b" "] {
            fs::write(dir.path().join(OsStr::from_bytes(name)), "x").unwrap();
        }
        symlink("/etc", dir.path().join("link")).unwrap();
        let closed = dir.path().join("closed");
        fs::create_dir_all(closed.join("inner")).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        top.empty().unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
    }

    #[test]
    fn nothing_is_reached_through_a_link() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = elsewhere.path().join("secret");
        fs::write(&secret, "s").unwrap();
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
        symlink(&secret, dir.path().join("file")).unwrap();
        symlink(elsewhere.path(), dir.path().join("folder")).unwrap();
        let top = Folder::open(dir.path()).unwrap();
        top.open_to_all(100).unwrap();
        assert!(top.read("file").is_err() && top.write("file", 0o666, true).is_err());
        assert!(top.folder("folder").is_err() && top.make("folder/new", None).is_err());
        assert!(top.read("folder/secret").is_err() && top.create("folder/new", 0o666).is_err());
        assert!(top.read("../secret").is_err() && top.folder("..").is_err());
        assert!(Folder::open(&dir.path().join("folder")).is_err());
        assert_eq!(top.usage(100).largest_file, 0);
        top.empty().unwrap();
        let mode = fs::metadata(&secret).unwrap().permissions().mode();
        assert_eq!(
            (fs::read(&secret).unwrap(), mode & 0o777),
            (b"s".to_vec(), 0o600)
        );
    }

    #[test]
    fn files_are_opened_to_all_and_pipes_are_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            fs::write(dir.path().join(name), "x").unwrap();
            fs::set_permissions(dir.path().join(name), fs::Permissions::from_mode(0o600)).unwrap();
        }
        let top = Folder::open(dir.path()).unwrap();
        rustix::fs::mknodat(&top, "pipe", FileType::Fifo, Mode::RWXU, 0).unwrap();
        top.open_to_all(100).unwrap();
        let mode = |name: &str| {
            fs::metadata(dir.path().join(name))
                .unwrap()
                .permissions()
                .mode()
        };
        assert_eq!((mode("one") & 0o777, mode("two") & 0o777), (0o666, 0o666));
        assert!(top.read("pipe").is_err() && top.write("pipe", 0o666, true).is_err());
    }

    #[test]
    fn what_is_deep_is_opened_to_all_and_can_still_be_executed() {
        let dir = tempfile::tempdir().unwrap();
        let top = Folder::open(dir.path()).unwrap();
        let deep = top.make(&vec!["d"; 300].join("/"), None).unwrap();
        deep.create("file", 0o600).unwrap();
        let program = deep.create("program", 0o700).unwrap();
        set_mode(&program, 0o4755).unwrap();
        deep.set_mode(0o500).unwrap();
        top.open_to_all(1_000).unwrap();
        let mode = |file: &dyn AsFd| rustix::fs::fstat(file.as_fd()).unwrap().st_mode & 0o7777;
        assert_eq!(mode(&deep.read("file").unwrap()), 0o666);
        assert_eq!(mode(&program), 0o777);
        assert_eq!(mode(&deep), 0o777);
        assert!(top.open_to_all(100).is_err(), "it is bounded");
    }

    #[test]
    fn what_is_on_the_disk_is_counted_once_however_deep_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let top = Folder::open(dir.path()).unwrap();
        let deep = top.make(&vec!["d"; 300].join("/"), None).unwrap();
        let content = vec![1; 1 << 20];
        std::io::Write::write_all(&mut deep.create("file", 0o600).unwrap(), &content).unwrap();
        for name in ["a", "b", "c"] {
            rustix::fs::linkat(&deep, "file", &deep, name, AtFlags::empty()).unwrap();
        }
        let sparse = top.create("sparse", 0o600).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let usage = top.usage(1_000);
        assert!(usage.complete && usage.largest_file == 1 << 30, "{usage:?}");
        assert!((1 << 20..4 << 20).contains(&usage.bytes), "{usage:?}");
        assert_eq!(usage.entries, 305);
        assert!(!top.usage(10).complete);
    }
}
