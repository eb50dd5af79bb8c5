//! A slot: the place where one job at a time runs. Its own user id where the machine allows, its own
//! root, and scratch space that is empty at the start of every job.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{IFlags, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use serde::{Deserialize, Serialize};

use super::agent::AgentConfig;
use super::network::Network;
use super::process::Tree;
use super::sockets::held;
use super::wire::{BUILD_SCRATCH_BYTES, BUILD_SCRATCH_FILES};
use crate::beneath::{self, Folder};

/// Folders of a slot's scratch space, and where they appear in its root.
const SCRATCH: [(&str, &str); 3] = [
    ("workspace", "workspace"),
    ("tmp", "tmp"),
    ("shm", "dev/shm"),
];

/// Most bytes of all names of a file's extended attributes (XATTR_LIST_MAX).
const MAX_ATTRIBUTE_NAMES: usize = 65_536;

/// Below [`Ground::Folder`]: the slots' folders.
pub const FOLDER_SLOTS: &str = "slots";

/// Most folder entries looked at when measuring; scratch space has fewer inodes than this.
const MAX_SCAN_ENTRIES: u64 = 100_000;

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
        /// Bytes of a program's scratch space; the workspace itself has room for a build.
        bytes: u64,
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
    /// Its own network; `None`: the sandbox's.
    network: Option<Network>,
    /// Whether the network in which its jobs are is shared with nobody but the runner.
    secluded: bool,
    /// Its folders, in the order of [`SCRATCH`].
    folders: [PathBuf; 3],
    /// How its folders are made new for each job.
    space: Space,
    /// The workspace and the folder for temporary files, as its jobs see them.
    seen: [PathBuf; 2],
    /// File systems that are its alone, so that their being full is its job's doing.
    own_disks: Vec<PathBuf>,
    /// Scratch space of a program.
    usual: Room,
    /// Scratch space of the job that has the slot, where that is another one.
    room: Mutex<Option<Room>>,
}

/// Bytes, and files and folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes.
    pub bytes: u64,
    /// Files and folders.
    pub files: u64,
}

impl Room {
    /// Without bounds of its own.
    const ANY: Room = Room {
        bytes: u64::MAX,
        files: u64::MAX,
    };

    /// For installing and for compiling.
    const BUILD: Room = Room {
        bytes: BUILD_SCRATCH_BYTES,
        files: BUILD_SCRATCH_FILES,
    };
}

/// How a slot's folders are made new for each job.
#[derive(Debug)]
enum Space {
    /// A file system in memory of its own, mounted for each job.
    Mounted {
        /// Where it is mounted.
        at: PathBuf,
        /// The slot's root, which shows its folders.
        root: PathBuf,
        /// Its bounds.
        bytes: u64,
        files: u64,
    },
    /// Folders that are removed with this one, which holds nothing else, and made again.
    Removed(PathBuf),
    /// Others have mounted the folders, which can only be emptied: a container may not mount.
    Emptied,
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

    /// The slot with what is in its folders; those that are made for each job are not there before
    /// the first [`Slot::wipe`].
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
                let root = slots.join(index.to_string());
                fs::create_dir_all(&root)?;
                bind(base, &root, true)?;
                let fd = rustix::fs::open(&root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
                Ok(Slot {
                    index,
                    uid,
                    root: Some(fd),
                    network: None,
                    secluded: config.secluded,
                    folders: SCRATCH.map(|(name, _)| scratch.join(name)),
                    seen: ["/workspace", "/tmp"].map(PathBuf::from),
                    own_disks: vec![scratch.clone()],
                    usual: Room {
                        bytes: *bytes,
                        files: *files,
                    },
                    room: Mutex::default(),
                    space: Space::Mounted {
                        at: scratch,
                        root,
                        bytes: *bytes,
                        files: *files,
                    },
                })
            }
            Ground::Folder(folder) => {
                let scratch = folder.join(FOLDER_SLOTS).join(index.to_string());
                let folders = SCRATCH.map(|(name, _)| scratch.join(name));
                let [workspace, temporary, _] = folders.clone();
                Ok(Slot {
                    index,
                    uid,
                    root: None,
                    network: None,
                    secluded: config.secluded,
                    folders,
                    seen: [workspace, temporary],
                    // Its use of the machine's disk cannot be told from others'.
                    own_disks: Vec::new(),
                    usual: Room::ANY,
                    room: Mutex::default(),
                    space: Space::Removed(scratch),
                })
            }
            Ground::Container {
                bytes,
                files,
                hook: _,
            } => {
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
                    network: None,
                    secluded: config.secluded,
                    own_disks: folders.iter().filter(|at| is_memory(at)).cloned().collect(),
                    folders,
                    seen: [workspace, temporary],
                    usual: Room {
                        bytes: *bytes,
                        files: *files,
                    },
                    room: Mutex::default(),
                    space: Space::Emptied,
                })
            }
        }
    }

    /// The same slot in a network of its own.
    pub fn with_network(self, network: Network) -> Slot {
        Slot {
            network: Some(network),
            secluded: true,
            ..self
        }
    }

    /// What the sockets of its job hold in the kernel beside what counts elsewhere, as far as they can be told
    /// from others'. `one` is one of the job's processes.
    pub fn held_by_sockets(&self, one: Option<i32>) -> u64 {
        one.filter(|_| self.secluded).map_or(0, held)
    }

    /// The network of its jobs; `None`: the sandbox's.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
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
        let workspace = Folder::open(self.folder())?;
        for (path, content) in files {
            let mut file = match path.rsplit_once('/') {
                None => workspace.create(path.as_str(), 0o644)?,
                Some((folders, name)) => workspace.make(folders, self.uid)?.create(name, 0o644)?,
            };
            let content = content.as_ref();
            file.write_all(content)?;
            beneath::set_mode(&file, mode_of(content))?;
            beneath::give(&file, self.uid)?;
        }
        Ok(())
    }

    /// Makes a folder in the workspace, for its user, unless there is one already.
    pub fn make_folder(&self, name: &str) -> io::Result<()> {
        Folder::open(self.folder())?.make(name, self.uid)?;
        Ok(())
    }

    /// Gives the scratch space the size that a build needs, before anything is in it.
    pub fn make_room_to_build(&self) -> io::Result<()> {
        if self.usual == Room::ANY {
            return Ok(());
        }
        self.set_room(Room {
            bytes: self.usual.bytes.max(Room::BUILD.bytes),
            files: self.usual.files.max(Room::BUILD.files),
        })
    }

    /// What is in the scratch space now does not count.
    pub fn make_room_beside(&self) -> io::Result<()> {
        let room = self.room();
        if room == Room::ANY {
            return Ok(());
        }
        let used = Folder::open(self.folder())?.usage(MAX_SCAN_ENTRIES);
        self.set_room(Room {
            bytes: room.bytes + used.bytes,
            files: room.files + used.entries,
        })
    }

    fn set_room(&self, room: Room) -> io::Result<()> {
        if let Space::Mounted { at, .. } = &self.space {
            let options = CString::new(format!("size={},nr_inodes={}", room.bytes, room.files))?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            rustix::mount::mount_remount(at, flags, options.as_c_str())?;
        }
        *self.locked_room() = Some(room);
        Ok(())
    }

    /// The scratch space of the job that has the slot.
    pub fn room(&self) -> Room {
        self.locked_room().unwrap_or(self.usual)
    }

    fn locked_room(&self) -> std::sync::MutexGuard<'_, Option<Room>> {
        self.room.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the scratch space is full. Cheap enough to ask while the job runs.
    pub fn is_full(&self) -> bool {
        let room = self.room();
        // A size or a number of 0 in all says that there is no bound.
        self.own_disks.iter().any(|disk| {
            rustix::fs::statfs(disk).is_ok_and(|disk| {
                let files = disk.f_files.saturating_sub(disk.f_ffree);
                let blocks = disk.f_blocks.saturating_sub(disk.f_bavail);
                let bytes = blocks.saturating_mul(u64::try_from(disk.f_bsize).unwrap_or(0));
                (disk.f_blocks > 0 && (disk.f_bavail == 0 || bytes > room.bytes))
                    || (disk.f_files > 0 && (disk.f_ffree == 0 || files > room.files))
            })
        })
    }

    /// What the job has left behind, to be asked before [`Slot::wipe`].
    pub fn footprint(&self) -> Footprint {
        // What cannot be read has no files to count.
        let largest = |folder: &PathBuf| {
            Folder::open(folder).map_or(0, |folder| folder.usage(MAX_SCAN_ENTRIES).largest_file)
        };
        Footprint {
            full: self.is_full(),
            largest_file: self.folders.iter().map(largest).max().unwrap_or(0),
        }
    }

    /// Makes the scratch space new. No process of the slot may be alive.
    ///
    /// Where it can be, everything is made again, the folders themselves too: access control lists,
    /// extended attributes, flags and counters of inodes belong to folders and file systems, and would
    /// keep the next job out or carry word to it.
    pub fn wipe(&self) -> io::Result<()> {
        *self.locked_room() = None;
        match &self.space {
            Space::Mounted {
                at,
                root,
                bytes,
                files,
            } => {
                let places = SCRATCH.map(|(_, place)| root.join(place));
                // All go with one call: the kernel waits in each until no processor looks at the mount.
                for (folder, place) in self.folders.iter().zip(&places) {
                    unless_unmounted(rustix::mount::mount_move(place, folder))?;
                }
                unless_unmounted(rustix::mount::unmount(at, UnmountFlags::DETACH))?;
                mount_scratch(at, *bytes, *files)?;
                self.make_folders()?;
                for (folder, place) in self.folders.iter().zip(places) {
                    bind(folder, &place, false)?;
                }
                Ok(())
            }
            Space::Removed(scratch) => {
                remove(scratch)?;
                fs::create_dir_all(scratch)?;
                self.make_folders()
            }
            Space::Emptied => self.folders.iter().try_for_each(|path| {
                let folder = Folder::open(path)?;
                self.take_back(&folder)?;
                folder.empty()?;
                forget_attributes(&folder)?;
                // With a list of who may enter, the group's part of the mode was the list's.
                self.take_back(&folder)
            }),
        }
    }

    fn make_folders(&self) -> io::Result<()> {
        self.folders.iter().try_for_each(|path| {
            fs::create_dir(path)?;
            self.take_back(&Folder::open(path)?)
        })
    }

    /// The folder belongs to the slot's user, and to nobody else.
    fn take_back(&self, folder: &Folder) -> io::Result<()> {
        folder.give(self.uid)?;
        folder.set_mode(0o700)
    }
}

/// Before the first job nothing is mounted, and the folders are not there.
fn unless_unmounted(result: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match result {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// A file's permission bits: one that names its interpreter is a program.
pub fn mode_of(beginning: &[u8]) -> u32 {
    match beginning.starts_with(b"#!") {
        true => 0o755,
        false => 0o644,
    }
}

/// Removes a folder and everything in it, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match Folder::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        folder => folder?.empty()?,
    }
    fs::remove_dir(path)
}

/// Takes what a job may have attached to a folder itself: access control lists, extended attributes,
/// flags, times.
fn forget_attributes(folder: &Folder) -> io::Result<()> {
    use rustix::io::Errno;
    let mut names = vec![0; MAX_ATTRIBUTE_NAMES];
    let length = match rustix::fs::flistxattr(folder, &mut names[..]) {
        // The file system has none.
        Err(Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    for name in names[..length].split(|byte| *byte == 0) {
        // What only the system may set it keeps; no job has set it.
        if !name.is_empty() && !name.starts_with(b"security.") {
            rustix::fs::fremovexattr(folder, name)?;
        }
    }
    if let Ok(flags) = rustix::fs::ioctl_getflags(folder)
        && flags.intersects(OWNER_FLAGS)
        && let Err(error) = rustix::fs::ioctl_setflags(folder, flags.difference(OWNER_FLAGS))
    {
        // None of them keeps the next job from anything.
        tracing::warn!(%error, "a folder keeps the flags that a job gave it");
    }
    let now = rustix::fs::Timespec {
        tv_sec: 0,
        tv_nsec: rustix::fs::UTIME_NOW,
    };
    let times = rustix::fs::Timestamps {
        last_access: now,
        last_modification: now,
    };
    Ok(rustix::fs::futimens(folder, &times)?)
}

/// Flags that a folder's owner may set (FS_FL_USER_MODIFIABLE), as far as they say nothing of how the
/// file system stores it.
const OWNER_FLAGS: IFlags = IFlags::COMPRESSED
    .union(IFlags::DIRSYNC)
    .union(IFlags::NOATIME)
    .union(IFlags::NODUMP)
    .union(IFlags::NOTAIL)
    .union(IFlags::SECURE_REMOVAL)
    .union(IFlags::SYNC)
    .union(IFlags::TOPDIR)
    .union(IFlags::UNRM);

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

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_NOSUID: u64 = 2;
const MOUNT_ATTR_NODEV: u64 = 4;

/// Makes a mount and all below it read-only.
pub fn set_read_only(at: &Path) -> io::Result<()> {
    set_attributes(at, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID)
}

/// Takes from a mount that user code writes to, and from all below it, what only a system's own mounts
/// need: programs with another user's rights, and devices.
pub fn set_plain(at: &Path) -> io::Result<()> {
    set_attributes(at, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
}

/// Flags are only added, which mounts inherited from a more privileged namespace allow.
fn set_attributes(at: &Path, set: u64) -> io::Result<()> {
    let path = std::ffi::CString::new(at.as_os_str().as_encoded_bytes())?;
    let attributes = MountAttributes {
        set,
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_keeps_nothing_that_a_job_attached_to_it() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let folder = Folder::open(dir.path()).unwrap();
        // Another test changes the process's umask.
        let closed = fs::Permissions::from_mode(0o700);
        fs::set_permissions(dir.path(), closed.clone()).unwrap();
        let fresh = fs::metadata(dir.path()).unwrap().mode();
        // Version 2; the owner, user 12345 and the group may read, others nothing.
        let mut list = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in [
            (1u16, 7u16, u32::MAX),
            (2, 7, 12_345),
            (4, 5, u32::MAX),
            (16, 7, u32::MAX),
            (32, 0, u32::MAX),
        ] {
            list.extend(tag.to_le_bytes());
            list.extend(permissions.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        let flags = rustix::fs::XattrFlags::empty();
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            rustix::fs::fsetxattr(&folder, name, &list, flags).unwrap();
        }
        rustix::fs::fsetxattr(&folder, "user.word", b"for the next", flags).unwrap();
        rustix::fs::ioctl_setflags(&folder, IFlags::NODUMP).unwrap();
        forget_attributes(&folder).unwrap();
        let mut names = [0; 1_024];
        assert_eq!(rustix::fs::flistxattr(&folder, &mut names[..]), Ok(0));
        let flags = rustix::fs::ioctl_getflags(&folder).unwrap();
        assert!(!flags.intersects(OWNER_FLAGS), "{flags:?}");
        fs::set_permissions(dir.path(), closed).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().mode(), fresh);
    }
}
