//! A slot: the place where one job at a time runs. Its own user id where the machine allows, its own
//! root, and scratch space that is empty at the start of every job.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};
use serde::{Deserialize, Serialize};

use super::agent::AgentConfig;
use super::process::Tree;
use crate::beneath::{self, Folder};

/// Folders of a slot's scratch space, and where they appear in its root.
const SCRATCH: [(&str, &str); 3] = [
    ("workspace", "workspace"),
    ("tmp", "tmp"),
    ("shm", "dev/shm"),
];

/// Most folder entries looked at when measuring; scratch space has fewer inodes than this.
const MAX_SCAN_ENTRIES: u64 = 40_000;

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
        let workspace = Folder::open(self.folder())?;
        for (path, content) in files {
            let mut file = match path.rsplit_once('/') {
                None => workspace.create(path.as_str(), 0o644)?,
                Some((folders, name)) => workspace.make(folders, self.uid)?.create(name, 0o644)?,
            };
            file.write_all(content.as_ref())?;
            beneath::give(&file, self.uid)?;
        }
        Ok(())
    }

    /// Makes a folder in the workspace, for its user, unless there is one already.
    pub fn make_folder(&self, name: &str) -> io::Result<()> {
        Folder::open(self.folder())?.make(name, self.uid)?;
        Ok(())
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
        // What cannot be read has no files to count.
        let largest = |folder: &PathBuf| {
            Folder::open(folder).map_or(0, |folder| folder.usage(MAX_SCAN_ENTRIES).largest_file)
        };
        Footprint {
            full: self.is_full(),
            largest_file: self.folders.iter().map(largest).max().unwrap_or(0),
        }
    }

    /// Empties the scratch space. No process of the slot may be alive.
    pub fn wipe(&self) -> io::Result<()> {
        for path in &self.folders {
            let folder = Folder::open(path)?;
            folder.give(self.uid)?;
            folder.set_mode(0o700)?;
            folder.empty()?;
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
