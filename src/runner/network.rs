//! A network of a slot's own: a namespace with nothing but a loopback device.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::{Mode, OFlags};
use rustix::thread::UnshareFlags;

/// What a network is set to, so that a run finds no trace of the one before: no ports that stay taken
/// after their connections have ended, and no measurements of connections.
const SETTINGS: [(&str, &str); 2] = [
    ("/proc/sys/net/ipv4/tcp_max_tw_buckets", "0"),
    ("/proc/sys/net/ipv4/tcp_no_metrics_save", "1"),
];

/// A network namespace.
#[derive(Debug)]
pub struct Network(OwnedFd);

impl Network {
    /// Makes one, with its loopback device up. Takes a thread of its own: a namespace is a thread's.
    pub fn new() -> io::Result<Self> {
        in_thread(|| {
            // SAFETY: the thread shares its network namespace with no code that relies on it.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            settle()?;
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let namespace = rustix::fs::open("/proc/thread-self/ns/net", flags, Mode::empty())?;
            Ok(Self(namespace))
        })
    }

    /// Does something in it: a socket stays in the network that it was made in.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let namespace = self.0.as_raw_fd();
        in_thread(move || {
            enter(namespace)?;
            act()
        })
    }

    /// Puts what `command` will execute into it.
    pub fn apply(&self, command: &mut Command) {
        let namespace = self.0.as_raw_fd();
        // SAFETY: one system call with integer arguments; the descriptor outlives the command, which is
        // started while the slot is held.
        unsafe {
            command.pre_exec(move || enter(namespace));
        }
    }
}

impl AsRawFd for Network {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}

/// Prepares this thread's network for runs.
pub fn settle() -> io::Result<()> {
    for (setting, value) in SETTINGS {
        // Kernels that do not let a namespace's root set it leave more behind; nothing else changes.
        if let Err(error) = fs::write(setting, value) {
            tracing::debug!(setting, %error, "a network keeps its default");
        }
    }
    loopback_up()
}

fn in_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(act).join())
        .unwrap_or_else(|_| Err(io::Error::other("the thread of a network ended")))
}

fn enter(namespace: i32) -> io::Result<()> {
    // SAFETY: integer arguments only.
    match unsafe { libc::setns(namespace, libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Brings this thread's loopback device up.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: ifreq is plain old data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request is a live ifreq, which is what this ioctl reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
