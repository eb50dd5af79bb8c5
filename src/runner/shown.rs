//! What sandboxes see of the machine's own files.
//!
//! A bind mount would show the same inodes to every sandbox, and with them locks (`flock`) and notices
//! of use (inotify) of programs in other sandboxes. So each sandbox gets the folders through an overlay
//! of its own, which has inodes of its own and still shares the machine's page cache, and copies of
//! single small files. Where the kernel makes no overlay it is a bind mount after all.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use super::slot::{bind, set_read_only};

/// A single file up to this many bytes is copied; `/etc/ld.so.cache` has some 100 KiB. Larger ones are
/// programs that stand beside other things, such as `~/.local/bin/uv`.
const MAX_COPIED_BYTES: u64 = 512 << 10;

/// Most bytes of a mount's options: one page, with the final zero (mount(2)).
const MAX_OPTIONS_BYTES: usize = 4095;

/// Shows parts of the machine in a sandbox.
pub struct Shown<'a> {
    /// The folder that becomes the root of user code's world.
    pub base: &'a Path,
    /// An empty folder: an overlay that nobody can write to takes two layers.
    pub empty: &'a Path,
    /// Where something is mounted, from [`mounts`].
    pub mounts: &'a [PathBuf],
}

impl Shown<'_> {
    /// Shows one host path read-only at the same place; a link is made again as a link.
    pub fn same(&self, path: &Path) -> io::Result<()> {
        let at = self.base.join(path.strip_prefix("/").unwrap_or(path));
        let Ok(about) = fs::symlink_metadata(path) else {
            return Ok(());
        };
        if let Some(parent) = at.parent() {
            fs::create_dir_all(parent)?;
        }
        if about.is_symlink() {
            return symlink(fs::read_link(path)?, at);
        }
        if about.is_dir() {
            return self.folder(path, &at);
        }
        if about.is_file() && about.len() <= MAX_COPIED_BYTES {
            fs::write(&at, fs::read(path)?)?;
            return fs::set_permissions(
                &at,
                fs::Permissions::from_mode(about.permissions().mode() & 0o755),
            );
        }
        fs::write(&at, "")?;
        bind(path, &at, false)?;
        set_read_only(&at)
    }

    /// Shows a host folder read-only at another place, with what is mounted in it.
    pub fn folder(&self, path: &Path, at: &Path) -> io::Result<()> {
        fs::create_dir_all(at)?;
        let mut inside: Vec<&Path> = self
            .mounts
            .iter()
            .filter_map(|mount| mount.strip_prefix(path).ok())
            .filter(|rest| !rest.as_os_str().is_empty())
            .collect();
        inside.sort();
        if self.overlay(path, at).is_err() {
            bind(path, at, false)?;
            return set_read_only(at);
        }
        for rest in inside {
            let (from, to) = (path.join(rest), at.join(rest));
            // One that is covered by another mount is not there.
            let (Ok(of), Ok(there)) = (fs::metadata(&from), fs::metadata(&to)) else {
                continue;
            };
            if !of.is_dir() || !there.is_dir() || self.overlay(&from, &to).is_err() {
                bind(&from, &to, false)?;
            }
        }
        set_read_only(at)
    }

    fn overlay(&self, path: &Path, at: &Path) -> io::Result<()> {
        let options = layers(path, self.empty)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY;
        rustix::mount::mount("overlay", at, "overlay", flags, options.as_c_str())?;
        Ok(())
    }
}

/// The options of an overlay of two folders, of which the first one counts.
fn layers(first: &Path, second: &Path) -> io::Result<std::ffi::CString> {
    let mut options = b"lowerdir=".to_vec();
    for (at, folder) in [first, second].into_iter().enumerate() {
        if at > 0 {
            options.push(b':');
        }
        for byte in folder.as_os_str().as_bytes() {
            // What the kernel reads as the end of a folder or of an option.
            if b":,\\".contains(byte) {
                options.push(b'\\');
            }
            options.push(*byte);
        }
    }
    if options.len() > MAX_OPTIONS_BYTES {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    Ok(std::ffi::CString::new(options)?)
}

/// Where something is mounted on this machine; nothing where `/proc` does not say.
pub fn mounts() -> Vec<PathBuf> {
    let text = fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|byte| *byte == b'\n')
        .filter_map(mount_point)
        .collect()
}

/// The fifth field of a line of `/proc/self/mountinfo`, in which blanks and such are octal (proc(5)).
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'\\' {
            path.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(3)?;
        path.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()?);
        rest = after;
    }
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&path)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn blanks_in_a_mount_point_are_octal() {
        let line = br"36 35 98:0 /a /mnt\040two\134 rw,noatime - ext4 /dev/root rw";
        assert_eq!(mount_point(line), Some(PathBuf::from("/mnt two\\")));
        assert_eq!(mount_point(b"36 35"), None);
        assert_eq!(mount_point(br"36 35 98:0 /a /mnt\04 rw"), None);
    }

    #[test]
    fn separators_in_names_are_no_separators() {
        let options = layers(Path::new("/a:b,c\\d"), Path::new("/e")).unwrap();
        assert_eq!(options.as_bytes(), br"lowerdir=/a\:b\,c\\d:/e");
        assert!(layers(&Path::new("/").join("x".repeat(5000)), Path::new("/e")).is_err());
    }
}
