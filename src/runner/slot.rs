//! A slot: the place where one job at a time runs. Its own user id where the machine allows, its own
//! root, and scratch space that is empty at the start of every job.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use serde::{Deserialize, Serialize};

use super::agent::AgentConfig;
use super::process::Tree;

/// Folders of a slot's scratch space, and where they appear in its root.
const SCRATCH: [(&str, &str); 3] = [
    ("workspace", "workspace"),
    ("tmp", "tmp"),
    ("shm", "dev/shm"),
];

/// Largest report file read back from a job: 500 tests with their messages fit.
const MAX_REPORT_BYTES: u64 = 1 << 20;

/// Most folder entries looked at when measuring; scratch space has fewer inodes than this.
const MAX_SCAN_ENTRIES: usize = 40_000;

/// Where slots stand, and what their jobs find there.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Ground {
    /// A root for each slot, with scratch space of its own mounted into it.
    Roots {
        /// The root of user code's world, which each slot's root shows.
        base: PathBuf,
        /// Where slots' roots go.
        slots: PathBuf,
        /// Where scratch space is mounted.
        scratch: PathBuf,
        /// Bytes of a slot's scratch space.
        bytes: u64,
        /// Files and folders of a slot's scratch space.
        files: u64,
    },
    /// The machine's own root: each slot has folders below this one, on the machine's disk.
    Folder(PathBuf),
    /// A container's own root, where nothing can be mounted: one slot has the container's folders,
    /// each of which was mounted for it.
    Container {
        /// Files and folders in each of them.
        files: u64,
        /// The folder with the waiting interpreter's hook.
        hook: PathBuf,
    },
}

/// The place of one job at a time.
#[derive(Debug)]
pub struct Slot {
    /// Its number.
    pub index: usize,
    /// Its own user id; `None` where the sandbox has only one.
    pub uid: Option<u32>,
    /// The folder that is `/` for its jobs; `None`: the runner's own root.
    root: Option<OwnedFd>,
    /// Its folders, in the order of [`SCRATCH`].
    folders: [PathBuf; 3],
    /// The workspace and the folder for temporary files, as its jobs see them.
    seen: [PathBuf; 2],
    /// File systems that are its alone, so that their being full is its job's doing.
    own_disks: Vec<PathBuf>,
    /// Files and folders in one of them.
    max_files: u64,
}

/// What a job's files look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// The scratch space has no room left, or no room for another file.
    pub full: bool,
    /// Apparent size of the largest file.
    pub largest_file: u64,
}

impl Slot {
    /// Makes the slot's root and scratch space.
    pub fn create(config: &AgentConfig, index: usize) -> io::Result<Slot> {
        let slot = Self::as_it_is(config, index)?;
        slot.wipe()?;
        Ok(slot)
    }

    /// The slot with whatever is in its folders.
    pub fn as_it_is(config: &AgentConfig, index: usize) -> io::Result<Slot> {
        let offset = u32::try_from(index).unwrap_or(0);
        let uid = config.first_uid.map(|first| first + offset);
        match &config.ground {
            Ground::Roots {
                base,
                slots,
                scratch,
                bytes,
                files,
            } => {
                let scratch = scratch.join(index.to_string());
                fs::create_dir_all(&scratch)?;
                mount_scratch(&scratch, *bytes, *files)?;
                let folders = SCRATCH.map(|(name, _)| scratch.join(name));
                make_folders(&folders)?;
                let root = slots.join(index.to_string());
                fs::create_dir_all(&root)?;
                bind(base, &root, true)?;
                for (folder, (_, place)) in folders.iter().zip(SCRATCH) {
                    bind(folder, &root.join(place), false)?;
                }
                let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                Ok(Slot {
                    index,
                    uid,
                    root: Some(fd),
                    folders,
                    seen: ["/workspace", "/tmp"].map(PathBuf::from),
                    own_disks: vec![scratch],
                    max_files: *files,
                })
            }
            Ground::Folder(folder) => {
                let scratch = folder.join(index.to_string());
                let folders = SCRATCH.map(|(name, _)| scratch.join(name));
                make_folders(&folders)?;
                let [workspace, temporary, _] = folders.clone();
                Ok(Slot {
                    index,
                    uid,
                    root: None,
                    folders,
                    seen: [workspace, temporary],
                    // Its use of the machine's disk cannot be told from others'.
                    own_disks: Vec::new(),
                    max_files: u64::MAX,
                })
            }
            Ground::Container { files, hook: _ } => {
                if index > 0 {
                    return Err(io::Error::other(
                        "a container has one workspace, and one slot",
                    ));
                }
                let folders = container_folders();
                let [workspace, temporary, _] = folders.clone();
                Ok(Slot {
                    index,
                    uid,
                    root: None,
                    own_disks: folders.iter().filter(|at| is_memory(at)).cloned().collect(),
                    folders,
                    seen: [workspace, temporary],
                    max_files: *files,
                })
            }
        }
    }

    /// The folder that is `/` for its jobs.
    pub fn root(&self) -> Option<RawFd> {
        self.root.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// The workspace, as the runner sees it.
    pub fn folder(&self) -> &Path {
        &self.folders[0]
    }

    /// The workspace, as its jobs see it.
    pub fn workspace(&self) -> &Path {
        &self.seen[0]
    }

    /// The folder for temporary files, as its jobs see it.
    pub fn temporary(&self) -> &Path {
        &self.seen[1]
    }

    /// Every process of its job. `known` are the runner's own helpers.
    pub fn tree(&self, known: Vec<i32>) -> Tree {
        match self.uid {
            Some(uid) => Tree::Uid(uid),
            None => Tree::DescendantsBut(known),
        }
    }

    /// Puts a job's files into the empty workspace, owned by its user.
    pub fn write_files(&self, files: &[(String, impl AsRef<[u8]>)]) -> io::Result<()> {
        let [workspace, ..] = &self.folders;
        for (path, content) in files {
            if let Some((folders, _)) = path.rsplit_once('/') {
                let mut folder = workspace.clone();
                for part in folders.split('/') {
                    folder.push(part);
                    if let Err(error) = fs::create_dir(&folder) {
                        if error.kind() != io::ErrorKind::AlreadyExists {
                            return Err(error);
                        }
                    } else {
                        std::os::unix::fs::chown(&folder, self.uid, self.uid)?;
                    }
                }
            }
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o644)
                .open(workspace.join(path))?;
            file.write_all(content.as_ref())?;
            if self.uid.is_some() {
                std::os::unix::fs::fchown(&file, self.uid, self.uid)?;
            }
        }
        Ok(())
    }

    /// Makes a folder in the workspace, for its user, unless there is one already.
    pub fn make_folder(&self, name: &str) -> io::Result<()> {
        let folder = self.folder().join(name);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
            made => made?,
        }
        std::os::unix::fs::chown(&folder, self.uid, self.uid)
    }

    /// Reads a small regular file from the folder for temporary files. The job chose what stands
    /// there, so links, pipes and devices are refused and nothing blocks.
    pub fn read_report(&self, name: &str) -> Option<String> {
        let [_, temporary, _] = &self.folders;
        let folder = rustix::fs::open(
            temporary,
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .ok()?;
        let file = rustix::fs::openat2(
            &folder,
            name,
            OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
        .ok()?;
        let file = fs::File::from(file);
        let about = file.metadata().ok()?;
        if !about.is_file() || about.nlink() != 1 || about.len() > MAX_REPORT_BYTES {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(MAX_REPORT_BYTES).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Whether the scratch space is full. Cheap enough to ask while the job runs.
    pub fn is_full(&self) -> bool {
        // A size or a number of 0 in all says that there is no bound.
        self.own_disks.iter().any(|disk| {
            rustix::fs::statfs(disk).is_ok_and(|disk| {
                let used = disk.f_files.saturating_sub(disk.f_ffree);
                (disk.f_blocks > 0 && disk.f_bavail == 0)
                    || (disk.f_files > 0 && (disk.f_ffree == 0 || used > self.max_files))
            })
        })
    }

    /// What the job has left behind, to be asked before [`Slot::wipe`].
    pub fn footprint(&self) -> Footprint {
        let mut scan = Scan::default();
        for folder in &self.folders {
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let opened = rustix::fs::open(folder, flags, Mode::empty());
            // What cannot be read has no files to count.
            let _ = opened.and_then(|top| scan.walk(top));
        }
        Footprint {
            full: self.is_full(),
            largest_file: scan.largest_file,
        }
    }

    /// Empties the scratch space. No process of the slot may be alive.
    pub fn wipe(&self) -> io::Result<()> {
        for path in &self.folders {
            std::os::unix::fs::chown(path, self.uid, self.uid)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))?;
            let folder = rustix::fs::open(
                path,
                OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            empty(folder.as_fd())?;
        }
        Ok(())
    }
}

fn make_folders(folders: &[PathBuf]) -> io::Result<()> {
    folders.iter().try_for_each(fs::create_dir_all)
}

/// A container's folders for its one slot, in the order of [`SCRATCH`].
pub fn container_folders() -> [PathBuf; 3] {
    SCRATCH.map(|(_, place)| Path::new("/").join(place))
}

/// Whether this is the top of a file system in memory.
pub fn is_memory(folder: &Path) -> bool {
    const TMPFS_MAGIC: i64 = 0x0102_1994;
    let memory = rustix::fs::statfs(folder).is_ok_and(|about| about.f_type == TMPFS_MAGIC);
    let device = |path: &Path| fs::metadata(path).map(|about| about.dev());
    let above = folder.parent().map(device);
    memory && above.is_some_and(|above| above.ok() != device(folder).ok())
}

/// Scratch space of its own: bounded in bytes and in files, and gone with the sandbox.
fn mount_scratch(at: &Path, bytes: u64, files: u64) -> io::Result<()> {
    let options = format!("size={bytes},nr_inodes={files},mode=0711");
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount(
        "tmpfs",
        at,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        options.as_c_str(),
    )?;
    Ok(())
}

/// Shows a folder at another place, with everything mounted below it.
pub fn bind(from: &Path, to: &Path, read_only: bool) -> io::Result<()> {
    rustix::mount::mount_bind_recursive(from, to)?;
    rustix::mount::mount_change(
        to,
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    if read_only {
        set_read_only(to)?;
    }
    Ok(())
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// Makes a mount and all below it read-only. Flags are only added, which mounts inherited from a
/// more privileged namespace allow.
pub fn set_read_only(at: &Path) -> io::Result<()> {
    const MOUNT_ATTR_RDONLY: u64 = 1;
    const MOUNT_ATTR_NOSUID: u64 = 2;
    let path = std::ffi::CString::new(at.as_os_str().as_encoded_bytes())?;
    let attributes = MountAttributes {
        set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the path and the attributes outlive the call, and the size is that of the struct.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Removes everything in a folder, however deep, holding two folders open at most: a folder found
/// inside another is first moved up to the top.
pub fn empty(top: BorrowedFd<'_>) -> io::Result<()> {
    let mut moved: u64 = 0;
    loop {
        let entries = names(top)?;
        if entries.is_empty() {
            return Ok(());
        }
        for (name, kind) in entries {
            if kind != FileType::Directory {
                rustix::fs::unlinkat(top, &name, AtFlags::empty())?;
                continue;
            }
            if rustix::fs::unlinkat(top, &name, AtFlags::REMOVEDIR).is_ok() {
                continue;
            }
            // A folder its owner may not write to is still his to open up.
            rustix::fs::chmodat(top, &name, Mode::RWXU, AtFlags::empty())?;
            let folder = rustix::fs::openat(
                top,
                &name,
                OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )?;
            for (inner, kind) in names(folder.as_fd())? {
                if kind == FileType::Directory {
                    // Moving a folder changes its own `..` entry, which takes write permission.
                    rustix::fs::chmodat(&folder, &inner, Mode::RWXU, AtFlags::empty())?;
                    loop {
                        moved += 1;
                        let target = format!(".moved-{moved}");
                        match rustix::fs::renameat_with(
                            &folder,
                            &inner,
                            top,
                            &target,
                            rustix::fs::RenameFlags::NOREPLACE,
                        ) {
                            Err(rustix::io::Errno::EXIST) => {}
                            result => break result?,
                        }
                    }
                } else {
                    rustix::fs::unlinkat(&folder, &inner, AtFlags::empty())?;
                }
            }
            rustix::fs::unlinkat(top, &name, AtFlags::REMOVEDIR)?;
        }
    }
}

/// A look at every file below a folder, however deep, holding one folder open at a time.
#[derive(Debug, Default)]
struct Scan {
    largest_file: u64,
    seen: usize,
}

/// A folder on the way down: its inode number, and the folders in it that are still to be seen.
struct Level {
    inode: u64,
    folders: Vec<std::ffi::CString>,
}

impl Scan {
    fn walk(&mut self, top: OwnedFd) -> rustix::io::Result<()> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut levels = vec![self.level(&top)?];
        let mut at = top;
        while let Some(level) = levels.last_mut() {
            if let Some(name) = level.folders.pop() {
                // One that vanished or may not be entered is passed over.
                if let Ok(inner) = rustix::fs::openat(&at, &name, flags, Mode::empty()) {
                    levels.push(self.level(&inner)?);
                    at = inner;
                }
                continue;
            }
            levels.pop();
            let Some(parent) = levels.last() else {
                break;
            };
            at = rustix::fs::openat(&at, "..", flags, Mode::empty())?;
            // Moved by a process of the job that is still there: the way back leads elsewhere.
            if rustix::fs::fstat(&at)?.st_ino != parent.inode {
                break;
            }
        }
        Ok(())
    }

    /// Looks at the entries of one folder.
    fn level(&mut self, folder: &OwnedFd) -> rustix::io::Result<Level> {
        let mut level = Level {
            inode: rustix::fs::fstat(folder)?.st_ino,
            folders: Vec::new(),
        };
        for entry in Dir::read_from(folder)? {
            let entry = entry?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            self.seen += 1;
            if self.seen > MAX_SCAN_ENTRIES {
                return Err(rustix::io::Errno::OVERFLOW);
            }
            let Ok(about) = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            match FileType::from_raw_mode(about.st_mode) {
                FileType::RegularFile => {
                    let size = u64::try_from(about.st_size).unwrap_or(0);
                    self.largest_file = self.largest_file.max(size);
                }
                FileType::Directory => level.folders.push(name.to_owned()),
                _ => {}
            }
        }
        Ok(level)
    }
}

fn names(folder: BorrowedFd<'_>) -> io::Result<Vec<(std::ffi::CString, FileType)>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn empty_removes_deep_trees_and_odd_names() {
        let dir = tempfile::tempdir().unwrap();
        let top = rustix::fs::open(dir.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let mut at = rustix::fs::open(dir.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
        for _ in 0..10_000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            at = rustix::fs::openat(&at, "d", OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        for name in [&b"new\nline"[..], b"\xff\xfe", b".moved-1", b" "] {
            fs::write(dir.path().join(OsStr::from_bytes(name)), "x").unwrap();
        }
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        let closed = dir.path().join("closed");
        fs::create_dir_all(closed.join("inner")).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o000)).unwrap();
        empty(top.as_fd()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(Path::new("/etc/passwd").exists());
    }
}
