//! The bytes that a sandbox's processes hold in files without a name. No listing of a folder shows them.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::launch::FirstProcess;

/// Threads, descriptors and mappings of a sandbox that one look covers. A server of many processes has some
/// ten thousand, and this many take less than a second.
const MOST_LOOKS: u32 = 200_000;

/// Bytes in files without a name.
#[derive(Debug, Clone, Copy, Default)]
pub struct Hidden {
    /// Bytes of the files that were seen.
    pub bytes: u64,
    /// Whether a descriptor was on its way through a socket: the kernel does not show its file.
    pub in_flight: bool,
    /// Whether there was more than one look covers.
    pub incomplete: bool,
}

impl FirstProcess {
    /// Files of this file system that have no name any more and that this process or one below it
    /// holds: by a descriptor, by a mapping, or because it runs the file.
    pub fn hidden(self, device: u64) -> Hidden {
        let mut look = Look {
            device,
            left: MOST_LOOKS,
            files: BTreeMap::new(),
            in_flight: false,
        };
        for process in self.with_descendants() {
            look.process(process.pid);
        }
        Hidden {
            bytes: look.files.values().sum(),
            in_flight: look.in_flight,
            incomplete: look.left == 0,
        }
    }
}

struct Look {
    device: u64,
    left: u32,
    /// Bytes by inode, so that each file counts once.
    files: BTreeMap<u64, u64>,
    in_flight: bool,
}

impl Look {
    fn process(&mut self, process: i32) {
        // The first thread may have ended before the others, and then it shows nothing.
        let mut mapped = false;
        let mut last_table = None;
        let threads = std::fs::read_dir(format!("/proc/{process}/task"));
        for thread in threads.into_iter().flatten().flatten() {
            if !self.one_more() {
                return;
            }
            let name = thread.file_name();
            let Some(thread) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            // Threads share their memory, but each may have a descriptor table of its own.
            mapped = mapped || self.mappings(thread);
            if last_table.is_none_or(|last| !share_descriptors(last, thread)) {
                last_table = Some(thread);
                self.descriptors(thread);
            }
        }
    }

    fn descriptors(&mut self, thread: i32) {
        let open = std::fs::read_dir(format!("/proc/{thread}/fd"));
        for file in open.into_iter().flatten().flatten() {
            if !self.one_more() {
                return;
            }
            if let Some(about) = self.file(&file.path())
                && about.file_type().is_socket()
                && let Some(number) = file.file_name().to_str()
            {
                self.in_flight |= carries_descriptors(thread, number);
            }
        }
    }

    /// Whether the thread has memory.
    fn mappings(&mut self, thread: i32) -> bool {
        self.file(Path::new(&format!("/proc/{thread}/exe")));
        let Ok(mappings) = std::fs::File::open(format!("/proc/{thread}/maps")) else {
            return false;
        };
        let mut any = false;
        // A file's name may be in any encoding.
        for line in BufReader::new(mappings).split(b'\n').map_while(Result::ok) {
            any = true;
            if !self.one_more() {
                break;
            }
            let line = String::from_utf8_lossy(&line);
            if line.ends_with(" (deleted)")
                && let Some((range, _)) = line.split_once(' ')
            {
                self.file(Path::new(&format!("/proc/{thread}/map_files/{range}")));
            }
        }
        any
    }

    fn file(&mut self, path: &Path) -> Option<Metadata> {
        // Looked at and not opened: it may be anything.
        let about = std::fs::metadata(path).ok()?;
        if about.nlink() == 0 && about.dev() == self.device {
            self.files.insert(about.ino(), about.blocks() * 512);
        }
        Some(about)
    }

    fn one_more(&mut self) -> bool {
        self.left = self.left.saturating_sub(1);
        self.left > 0
    }
}

/// Whether both threads have the same descriptor table. Where the kernel does not say, they do not.
fn share_descriptors(one: i32, other: i32) -> bool {
    // From linux/kcmp.h.
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: kcmp takes integers only and has no memory effects.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0_u64, 0_u64) };
    order == 0
}

/// Whether messages that wait in this socket carry descriptors (`scm_fds`, since Linux 5.6).
fn carries_descriptors(thread: i32, descriptor: &str) -> bool {
    let about = std::fs::read_to_string(format!("/proc/{thread}/fdinfo/{descriptor}"));
    let about = about.unwrap_or_default();
    let count = about.lines().find_map(|line| line.strip_prefix("scm_fds:"));
    count.is_some_and(|count| count.trim() != "0")
}
