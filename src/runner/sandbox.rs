//! Making a sandbox: namespaces, a root of its own, user ids of its own.
//!
//! `gantry-runner sandbox` reads a [`SandboxSpec`] from standard input, makes the sandbox, answers
//! with one line on standard output and leaves the sandbox's first process behind. With root's
//! power the mounts are made before the user namespace is entered, since folders such as an
//! interpreter below `/root` cannot be reached afterwards; without it everything happens inside.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};

use super::agent::{self, AgentConfig};
use super::app::{self, AppConfig};
use super::network::{loopback_up, settle};
use super::process::{MemoryGroup, ProcessorGroup};
use super::report::REPORTERS;
use super::shown::{Shown, mounts};
use super::slot::{FOLDER_SLOTS, bind, set_plain};
pub use super::warm::HOOK_FOLDER;
use super::warm::PYTHON_HOOK;

/// User ids in a sandbox: 0 is the runner, slots have 1000 and up.
pub const IDS: u32 = 2_048;

/// The first slot's user id inside a sandbox.
pub const FIRST_SLOT_UID: u32 = 1_000;

/// The listening socket a sandbox is given.
const LISTENER_FD: i32 = 3;

/// How far a sandbox is cut off from the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Isolation {
    /// Every namespace, and a range of user ids of its own, the first of which is this on the host.
    Full {
        /// The host's id for the sandbox's root.
        first_host_uid: u32,
    },
    /// Every namespace, but one user id: the server is not root.
    SingleUser,
    /// No namespaces: the machine forbids them. Filters and limits only.
    None,
}

/// What to make.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// How far it is cut off.
    pub isolation: Isolation,
    /// An empty folder on the host, to mount the new root on (or to work in, without namespaces).
    pub folder: PathBuf,
    /// Host paths shown read-only at the same place.
    pub shown: Vec<PathBuf>,
    /// Host folders shown at another place, writable or not.
    pub placed: Vec<Placed>,
    /// Host folders shown to user code at another place, read-only.
    pub inside: Vec<Placed>,
    /// `cgroup.procs` files to join first.
    pub cgroups: Vec<PathBuf>,
    /// Whether it shares the machine's network.
    pub network: bool,
    /// What lives in it.
    pub role: Role,
}

/// A host folder shown at another place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Placed {
    /// On the host.
    pub from: PathBuf,
    /// Name below the sandbox's root.
    pub name: String,
    /// Whether it may be written to.
    pub writable: bool,
}

/// What lives in a sandbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Role {
    /// The runner's agent, which takes jobs.
    Agent(AgentConfig),
    /// A released program.
    App(AppConfig),
    /// Nothing: whether it can be made is the question.
    Trial,
}

/// What making a sandbox came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Made {
    /// Its first process, as the host numbers it.
    Pid(i32),
    /// Why there is none.
    Failed(String),
}

/// `gantry-runner sandbox`.
pub fn main() -> anyhow::Result<()> {
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    let spec: SandboxSpec = serde_json::from_str(&text).context("the sandbox's specification")?;
    close_inherited().context("closing what the server left open")?;
    let groups = (
        MemoryGroup::open(&spec.cgroups),
        ProcessorGroup::open(&spec.cgroups),
    );
    let made = match make(&spec) {
        Ok(Fork::Outside(pid)) => Made::Pid(pid),
        Ok(Fork::Inside) => return live(spec.role, groups),
        Err(error) => Made::Failed(format!("{error:#}")),
    };
    let mut line = serde_json::to_string(&made)?;
    line.push('\n');
    io::stdout().write_all(line.as_bytes())?;
    Ok(())
}

enum Fork {
    /// Back in the process that was started, with the new one's id.
    Outside(i32),
    /// In the sandbox's first process.
    Inside,
}

fn make(spec: &SandboxSpec) -> anyhow::Result<Fork> {
    for procs in &spec.cgroups {
        fs::write(procs, "0").with_context(|| format!("joining {}", procs.display()))?;
    }
    let host_proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    match spec.isolation {
        Isolation::Full { first_host_uid } => {
            // SAFETY: this process has one thread.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
                .context("a mount namespace")?;
            build_root(spec, Some(first_host_uid)).context("the sandbox's root")?;
            let maps = Maps::range(first_host_uid);
            fork_into(namespaces(spec), &host_proc, &null, &maps, || furnish(spec))
        }
        Isolation::SingleUser => {
            let maps = Maps::own();
            fork_into(namespaces(spec), &host_proc, &null, &maps, || {
                build_root(spec, None).context("the sandbox's root")?;
                furnish(spec)
            })
        }
        Isolation::None => {
            let scratch = spec.folder.join("scratch");
            write_hook(&scratch.join(HOOK_FOLDER))?;
            fs::create_dir_all(scratch.join(FOLDER_SLOTS))?;
            fork_into(0, &host_proc, &null, &Maps::none(), || Ok(()))
        }
    }
}

/// Closes every descriptor but the standard ones and the listener. Whatever started the server may
/// have left it some that survive an exec, and through the sandbox they would reach user code.
pub fn close_inherited() -> io::Result<()> {
    // SAFETY: integer arguments only; this program has opened nothing yet.
    let result = unsafe { libc::syscall(libc::SYS_close_range, LISTENER_FD + 1, i32::MAX, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn namespaces(spec: &SandboxSpec) -> i32 {
    let own = libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP;
    if spec.network {
        own
    } else {
        own | libc::CLONE_NEWNET
    }
}

/// What the kernel is told about a user namespace's ids, by the process that made it.
struct Maps {
    deny_groups: bool,
    uid: Option<String>,
    gid: Option<String>,
}

impl Maps {
    fn range(first: u32) -> Self {
        let map = format!("0 {first} {IDS}");
        Self {
            deny_groups: false,
            uid: Some(map.clone()),
            gid: Some(map),
        }
    }

    fn own() -> Self {
        Self {
            // Without privilege the kernel wants groups given up first (user_namespaces(7)).
            deny_groups: true,
            uid: Some(format!("0 {} 1", rustix::process::getuid().as_raw())),
            gid: Some(format!("0 {} 1", rustix::process::getgid().as_raw())),
        }
    }

    fn none() -> Self {
        Self {
            deny_groups: false,
            uid: None,
            gid: None,
        }
    }

    fn write(&self, host_proc: &OwnedFd, pid: i32) -> anyhow::Result<()> {
        let write = |name: &str, text: &str| -> anyhow::Result<()> {
            let path = format!("{pid}/{name}");
            let file = rustix::fs::openat(
                host_proc,
                path.as_str(),
                OFlags::WRONLY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .with_context(|| format!("opening {name}"))?;
            rustix::io::write(&file, text.as_bytes()).with_context(|| format!("writing {name}"))?;
            Ok(())
        };
        if self.deny_groups {
            write("setgroups", "deny")?;
        }
        if let Some(map) = &self.gid {
            write("gid_map", map)?;
        }
        if let Some(map) = &self.uid {
            write("uid_map", map)?;
        }
        Ok(())
    }
}

/// Forks into new namespaces. The child waits for its id maps, prepares, and says how that went.
fn fork_into(
    namespaces: i32,
    host_proc: &OwnedFd,
    null: &OwnedFd,
    maps: &Maps,
    prepare: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Fork> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (mapped_read, mapped_write) = pipe()?;
    let (ready_read, ready_write) = pipe()?;
    let flags = u64::try_from(namespaces | libc::SIGCHLD)?;
    // SAFETY: as fork: no new stack, no shared memory; this process has one thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if pid < 0 {
        return Err(io::Error::last_os_error()).context("making namespaces");
    }
    if pid > 0 {
        drop((mapped_read, ready_write));
        let pid = i32::try_from(pid)?;
        let mapped = maps.write(host_proc, pid);
        if mapped.is_ok() {
            let _ = rustix::io::write(&mapped_write, b"m");
        }
        drop(mapped_write);
        mapped?;
        let mut said = String::new();
        fs::File::from(ready_read).read_to_string(&mut said)?;
        return match said.as_str() {
            "ready" => Ok(Fork::Outside(pid)),
            "" => anyhow::bail!("the sandbox's first process ended at once"),
            why => anyhow::bail!("{why}"),
        };
    }
    drop((mapped_write, ready_read));
    let prepared = enter(&mapped_read, namespaces != 0, null).and_then(|()| prepare());
    match prepared {
        Ok(()) => {
            rustix::io::write(&ready_write, b"ready")?;
            Ok(Fork::Inside)
        }
        Err(error) => {
            let _ = rustix::io::write(&ready_write, format!("{error:#}").as_bytes());
            std::process::exit(1)
        }
    }
}

/// In the new process: wait for the maps, become the namespace's root, let go of the server.
fn enter(mapped: &OwnedFd, new_user: bool, null: &OwnedFd) -> anyhow::Result<()> {
    let mut byte = [0u8; 1];
    if rustix::io::read(mapped, &mut byte)? != 1 {
        anyhow::bail!("the id maps were not written");
    }
    if new_user {
        // SAFETY: raw calls with integer arguments; a failing setgroups (denied maps) is harmless.
        unsafe {
            libc::syscall(libc::SYS_setgroups, 0, 0);
            anyhow::ensure!(
                libc::syscall(libc::SYS_setresgid, 0, 0, 0) == 0,
                "becoming group 0"
            );
            anyhow::ensure!(
                libc::syscall(libc::SYS_setresuid, 0, 0, 0) == 0,
                "becoming user 0"
            );
        }
    }
    rustix::process::setsid().context("a session of its own")?;
    rustix::stdio::dup2_stdin(null)?;
    rustix::stdio::dup2_stdout(null)?;
    // SAFETY: umask always succeeds.
    unsafe { libc::umask(0o022) };
    // Orphans of jobs come back to this process, and so stay in its tree.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(())
}

/// In the new namespaces: its own `/proc`, host name and loopback.
fn furnish(spec: &SandboxSpec) -> anyhow::Result<()> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let none = CString::default();
    rustix::mount::mount("proc", "/proc", "proc", flags, none.as_c_str())
        .context("mounting /proc")?;
    // User code sees its own processes only.
    rustix::mount::mount("proc", "/base/proc", "proc", flags, c"hidepid=2")
        .context("mounting /proc for user code")?;
    hide_machine(Path::new("/base/proc")).context("covering what /proc says of the machine")?;
    for (bound, value) in BOUNDS {
        // A kernel without it counts for the whole machine only.
        if let Err(error) = fs::write(bound, value) {
            tracing::debug!(bound, %error, "a bound of the user namespace is not set");
        }
    }
    if has_terminals(spec) {
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        // Without a bound of its own it may take all terminals of the machine, 4,096 by default.
        let options = c"newinstance,ptmxmode=0666,mode=0620,max=64";
        rustix::mount::mount("devpts", "/base/dev/pts", "devpts", flags, options)
            .context("mounting terminals")?;
    }
    rustix::system::sethostname(b"sandbox").context("the host name")?;
    let network = match spec.role {
        // It is the machine's, which has one that is up and is not this sandbox's to change.
        _ if spec.network => Ok(()),
        // One run follows the other, where slots have no networks of their own.
        Role::Agent(_) => settle(),
        _ => loopback_up(),
    };
    network.context("the loopback device")?;
    Ok(())
}

/// What each user id in here may have of things that all sandboxes share the number of, which is by default
/// 128 instances and, with 16 GiB of memory, some 130,000 watches.
const BOUNDS: [(&str, &str); 2] = [
    ("/proc/sys/user/max_inotify_instances", "8"),
    ("/proc/sys/user/max_inotify_watches", "16384"),
];

/// What of `/proc`, beside processes, programs need: they ask how many processors and how much memory
/// there is, and how busy they are. Links lead into a process's own folder. `sys` is read-only in a slot.
const PROC_SHOWN: [&str; 8] = [
    "cpuinfo",
    "filesystems",
    "loadavg",
    "meminfo",
    "stat",
    "sys",
    "uptime",
    "version",
];

/// A folder and a file that nobody may open, in the runner's root.
const COVERS: [&str; 2] = ["/covers/folder", "/covers/file"];

/// Covers everything else in `/proc` that is not a process: the machine's memory, devices, interrupts,
/// timers, keys, locks and settings are nothing of user code's, nor what newer kernels add.
fn hide_machine(proc: &Path) -> io::Result<()> {
    for entry in fs::read_dir(proc)? {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        let shown = name.to_str().is_none_or(|name| {
            PROC_SHOWN.contains(&name) || name.bytes().all(|byte| byte.is_ascii_digit())
        });
        if shown {
            continue;
        }
        let about = fs::symlink_metadata(&entry)?;
        if about.is_symlink() {
            continue;
        }
        let cover = match about.is_dir() {
            true => COVERS[0],
            false => COVERS[1],
        };
        rustix::mount::mount_bind(cover, &entry)?;
    }
    Ok(())
}

/// Builds the new root on a file system of its own and makes it this process's root.
///
/// `/` is for the runner only; user code's world is `/base`, which slots show under roots of their own.
fn build_root(spec: &SandboxSpec, owner: Option<u32>) -> anyhow::Result<()> {
    rustix::mount::mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )?;
    let root = &spec.folder;
    rustix::mount::mount(
        "tmpfs",
        root,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=0755,size=8m,nr_inodes=8k",
    )
    .context("mounting its file system")?;
    let base = root.join("base");
    for folder in ["proc", "tmp", "workspace", "dev", "etc", "run", "var/tmp"] {
        fs::create_dir_all(base.join(folder))?;
    }
    show_devices(&base)?;
    if has_terminals(spec) {
        fs::create_dir_all(base.join("dev/pts"))?;
        symlink("pts/ptmx", base.join("dev/ptmx"))?;
        show_device("tty", &base.join("dev"))?;
    }
    let [folder, file] = COVERS.map(|cover| root.join(cover.trim_start_matches('/')));
    fs::create_dir_all(&folder)?;
    fs::write(&file, "")?;
    let shown = Shown {
        base: &base,
        empty: &folder,
        mounts: &mounts(),
    };
    for path in &spec.shown {
        shown
            .same(path)
            .with_context(|| format!("showing {}", path.display()))?;
    }
    for placed in &spec.inside {
        shown
            .folder(&placed.from, &base.join(&placed.name))
            .with_context(|| format!("showing {}", placed.name))?;
    }
    describe_users(&base.join("etc"))?;
    if spec.network {
        name_servers(&base.join("etc"));
    }
    write_hook(&base.join(HOOK_FOLDER))?;
    for cover in [folder, file] {
        fs::set_permissions(&cover, fs::Permissions::from_mode(0o000))?;
        std::os::unix::fs::chown(&cover, owner, owner)?;
    }
    for folder in ["proc", "slots", "scratch", "tmp"] {
        let folder = root.join(folder);
        fs::create_dir_all(&folder)?;
        std::os::unix::fs::chown(&folder, owner, owner)?;
    }
    for placed in &spec.placed {
        let at = root.join(&placed.name);
        fs::create_dir_all(&at)?;
        fs::create_dir_all(base.join(&placed.name))?;
        bind(&placed.from, &at, !placed.writable)?;
        set_plain(&at)?;
    }
    // The kernel lets a user namespace mount its own /proc only where it can see a whole one
    // already; this one is covered by it in [`furnish`].
    bind(Path::new("/proc"), &root.join("proc"), false)?;
    rustix::process::chdir(root)?;
    rustix::process::pivot_root(".", ".").context("pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).context("letting go of the old root")?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// Test runs have no use for terminals, and are not given any.
fn has_terminals(spec: &SandboxSpec) -> bool {
    matches!(spec.role, Role::App(_))
}

/// Makes a device in the sandbox, so that locks on it and notices of its use are not the machine's. Without
/// root's power it is shown as the machine has it.
fn show_device(device: &str, dev: &Path) -> io::Result<()> {
    let (from, at) = (Path::new("/dev").join(device), dev.join(device));
    let about = rustix::fs::stat(&from)?;
    let (kind, everyone) = (FileType::CharacterDevice, Mode::from_raw_mode(0o666));
    if rustix::fs::mknodat(rustix::fs::CWD, &at, kind, everyone, about.st_rdev).is_ok() {
        return fs::set_permissions(&at, fs::Permissions::from_mode(0o666));
    }
    fs::write(&at, "")?;
    bind(&from, &at, false)
}

fn show_devices(base: &Path) -> io::Result<()> {
    let dev = base.join("dev");
    // The root's own file system has no devices.
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = c"mode=0755,size=64k,nr_inodes=64";
    rustix::mount::mount("tmpfs", &dev, "tmpfs", flags, options)?;
    fs::create_dir(dev.join("shm"))?;
    for device in ["null", "zero", "full", "random", "urandom"] {
        show_device(device, &dev)?;
    }
    for (link, to) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        symlink(to, dev.join(link))?;
    }
    Ok(())
}

/// Names for the ids that exist in a sandbox, and the one host it knows.
fn describe_users(etc: &Path) -> io::Result<()> {
    describe_slots(etc, FIRST_SLOT_UID..FIRST_SLOT_UID + 64)?;
    let add = |name: &str, line: &str| -> io::Result<()> {
        let path = etc.join(name);
        let slots = fs::read_to_string(&path)?;
        fs::write(path, line.to_owned() + &slots)
    };
    add("passwd", "root:x:0:0:root:/root:/usr/sbin/nologin\n")?;
    add("group", "root:x:0:\n")?;
    fs::write(
        etc.join("hosts"),
        "127.0.0.1 localhost sandbox\n::1 localhost\n",
    )?;
    fs::write(etc.join("hostname"), "sandbox\n")
}

/// The machine's name servers. A copy: the file is often a link to where nothing is shown.
fn name_servers(etc: &Path) {
    let copied =
        fs::read("/etc/resolv.conf").and_then(|text| fs::write(etc.join("resolv.conf"), text));
    if let Err(error) = copied {
        tracing::debug!(%error, "no name servers are known");
    }
}

/// Names for the ids of slots, as `passwd` and `group` in this folder.
pub fn describe_slots(folder: &Path, ids: impl Iterator<Item = u32>) -> io::Result<()> {
    let (mut passwd, mut group) = (String::new(), String::new());
    for id in ids {
        passwd.push_str(&format!("user{id}:x:{id}:{id}::/workspace:/bin/sh\n"));
        group.push_str(&format!("user{id}:x:{id}:\n"));
    }
    fs::write(folder.join("passwd"), passwd)?;
    fs::write(folder.join("group"), group)
}

/// Writes the waiting interpreter's hook, and what reports tests.
pub fn write_hook(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for (name, text) in [("sitecustomize.py", PYTHON_HOOK)]
        .into_iter()
        .chain(REPORTERS)
    {
        let file = folder.join(name);
        fs::write(&file, text)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// The life of a sandbox's first process.
fn live(role: Role, groups: (MemoryGroup, ProcessorGroup)) -> anyhow::Result<()> {
    if matches!(role, Role::Trial) {
        return Ok(());
    }
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        // SAFETY: the platform passes its listening socket under this number, and nothing else in
        // this program has taken it.
        let listener: std::os::unix::net::UnixListener =
            unsafe { std::os::fd::FromRawFd::from_raw_fd(LISTENER_FD) };
        rustix::io::fcntl_setfd(listener.as_fd(), rustix::io::FdFlags::CLOEXEC)?;
        listener.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(listener)?;
        match role {
            Role::Agent(config) => agent::run(config, listener, groups).await,
            Role::App(config) => app::run(config, listener).await,
            Role::Trial => Ok(()),
        }
    })
}

/// Gives a command the listening socket a sandbox expects.
pub fn give_listener(command: &mut std::process::Command, listener: OwnedFd) {
    // SAFETY: dup2 is async-signal-safe and the descriptor lives in the closure.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(listener.as_raw_fd(), LISTENER_FD) < 0 {
                return Err(io::Error::last_os_error());
            }
            // dup2 onto itself leaves close-on-exec as it was.
            if libc::fcntl(LISTENER_FD, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}
