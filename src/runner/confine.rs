//! What every process of user code is put into before it runs its first instruction: no new
//! privileges, a system-call filter, a Landlock domain, resource limits, no capabilities.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::model::Limits;

/// Open files of one process. Plenty for programs and test runners, and small enough that a full
/// slot of processes stays far below the machine's own bound.
pub const OPEN_FILES: u64 = 512;

/// Open files of all processes of a run or a released program together, shared ones counted for each: as many
/// as the most processes with the smallest table of them (64). The machine has room for some 100,000 for each
/// gigabyte of memory.
pub const ALL_OPEN_FILES: u64 = 64 * Limits::MAXIMUM.processes;

/// Capabilities a warm interpreter keeps until its child becomes the slot's user: to enter the
/// slot's root and to take its ids. Everything else is out of reach for good.
const KEPT_CAPABILITIES: u64 = 1 << 6 // CAP_SETGID
    | 1 << 7 // CAP_SETUID
    | 1 << 18; // CAP_SYS_CHROOT

/// It keeps this one too where slots have networks of their own: setns(2) asks for it. What else it
/// allows the filters deny.
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// The version of Landlock that came with rules for connections.
const NETWORK_VERSION: u32 = 4;

/// The version of Landlock that keeps signals and abstract sockets to a domain (Linux 6.12).
pub const SIGNALS_VERSION: u32 = 6;

/// The highest capability that may exist; asking for one that does not is answered with an error.
const LAST_CAPABILITY: u32 = 63;

/// A folder user code may reach, and whether it may write there.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct Reach {
    /// The folder.
    pub path: PathBuf,
    /// Write, create and remove too.
    pub writable: bool,
}

/// The confinement of one sandbox, worked out once; applying it is a few system calls.
#[derive(Debug, Clone)]
pub struct Confinement {
    filters: Arc<Vec<BpfProgram>>,
    landlock: Option<Arc<OwnedFd>>,
    /// Whether the kernel logs the calls that are refused.
    logged: bool,
}

/// How strictly system calls are filtered.
#[derive(Debug, Clone, Copy, Default, serde::Serialize, serde::Deserialize)]
pub struct Calls {
    /// Whether internet sockets may be made at all; a sandbox with a network namespace of its own may
    /// make them, since they lead nowhere.
    pub network: bool,
    /// Whether what runs here shares its user id with what starts the next run, whose limits and
    /// priorities it must not change.
    pub shared_user: bool,
    /// Whether the kernel logs each call that is refused.
    pub logged: bool,
}

/// Who the confined process is to be.
#[derive(Debug, Clone, Copy)]
pub enum Identity {
    /// The slot's own user, with nothing kept.
    User(u32),
    /// The runner's own user, for want of another, with nothing kept.
    Own,
    /// The runner's own user, keeping what it takes to become a slot's user later.
    Launcher {
        /// And to enter the slot's own network.
        networks: bool,
    },
}

impl Identity {
    /// The capabilities that it keeps, as a set of bits.
    fn capabilities(self) -> u64 {
        match self {
            Identity::User(_) | Identity::Own => 0,
            Identity::Launcher { networks: false } => KEPT_CAPABILITIES,
            Identity::Launcher { networks: true } => KEPT_CAPABILITIES | CAP_SYS_ADMIN,
        }
    }
}

impl Confinement {
    /// Prepares the filters and the Landlock rules.
    pub fn new(reach: &[Reach], calls: Calls) -> anyhow::Result<Self> {
        Self::prepare(reach, calls, None)
    }

    fn prepare(reach: &[Reach], calls: Calls, line: Option<u16>) -> anyhow::Result<Self> {
        // Where several have an answer, the one that is installed last counts.
        Ok(Self {
            filters: Arc::new(vec![
                allowed()?,
                ignored()?,
                unsupported()?,
                denied(calls, line.is_some())?,
            ]),
            landlock: domain(reach, line)?.map(Arc::new),
            logged: calls.logged,
        })
    }

    /// The same for a program that writes to a disk which it shares with others.
    pub fn on_shared_disk(mut self) -> anyhow::Result<Self> {
        Arc::make_mut(&mut self.filters).push(no_reservations()?);
        Ok(self)
    }

    /// For a program that may connect to this port, and speak to nobody else. Every kernel without this
    /// part of Landlock refuses.
    pub fn with_line(reach: &[Reach], calls: Calls, port: u16) -> anyhow::Result<Self> {
        let version = landlock_version().unwrap_or_default();
        anyhow::ensure!(
            version >= NETWORK_VERSION,
            "an installer cannot be kept to its package index: that takes Landlock version \
             {NETWORK_VERSION} (Linux 6.7), and this kernel has {version}"
        );
        let calls = Calls {
            network: true,
            ..calls
        };
        Self::prepare(reach, calls, Some(port))
    }

    /// Confines what `command` will execute. `root` is the folder to make its root.
    pub fn apply(
        &self,
        command: &mut Command,
        identity: Identity,
        root: Option<RawFd>,
        workspace: &std::path::Path,
        limits: &Limits,
    ) -> anyhow::Result<()> {
        let this = self.clone();
        let limits = *limits;
        let workspace = std::ffi::CString::new(workspace.as_os_str().as_encoded_bytes())?;
        // SAFETY: the closure runs between fork and exec; it makes system calls on values made
        // before the fork and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                if let Some(root) = root {
                    check(libc::fchdir(root))?;
                    check(libc::chroot(c".".as_ptr()))?;
                }
                check(libc::chdir(workspace.as_ptr()))?;
                check(libc::setsid())?;
                take_short_turns();
                set_limits(&limits)?;
                this.enter(identity)
            });
        }
        Ok(())
    }

    fn enter(&self, identity: Identity) -> io::Result<()> {
        let kept = identity.capabilities();
        for capability in 0..=LAST_CAPABILITY {
            if kept & (1 << capability) == 0 {
                // SAFETY: prctl with integer arguments only. An unknown capability is an error
                // that means there is nothing to drop.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
        }
        // SAFETY: integer arguments only.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        if !matches!(identity, Identity::User(_)) {
            // A slot's user loses all of them with the user id.
            keep_capabilities(kept)?;
        }
        if let Some(domain) = &self.landlock {
            // SAFETY: the descriptor is a Landlock ruleset owned by `self`.
            let result =
                unsafe { libc::syscall(libc::SYS_landlock_restrict_self, domain.as_raw_fd(), 0) };
            check(i32::try_from(result).unwrap_or(-1))?;
        }
        if let Identity::User(uid) = identity {
            // SAFETY: raw calls with integer arguments; a null group list of length 0.
            unsafe {
                check_long(libc::syscall(libc::SYS_setgroups, 0, 0))?;
                check_long(libc::syscall(libc::SYS_setresgid, uid, uid, uid))?;
                check_long(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
            }
        }
        for filter in self.filters.iter() {
            let program = libc::sock_fprog {
                len: u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
                filter: filter.as_ptr().cast::<libc::sock_filter>().cast_mut(),
            };
            let flags = match self.logged {
                true => libc::SECCOMP_FILTER_FLAG_LOG,
                false => 0,
            };
            // SAFETY: the program outlives the call; seccompiler's instruction has the kernel's
            // layout (both are `struct sock_filter`).
            check_long(unsafe {
                libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    flags,
                    &raw const program,
                )
            })?;
        }
        Ok(())
    }
}

/// `struct __user_cap_data_struct` of capset(2), of which version 3 takes two.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Gives up every capability but these. Dropping them from the bounding set takes
/// one that a container's root may not have; this takes none, and without new privileges a program
/// that is executed afterwards cannot have them again, root's or not.
fn keep_capabilities(kept: u64) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let mut sets = [Capabilities::default(); 2];
    // SAFETY: both pointers are to live values of the layout that version 3 has.
    unsafe {
        check_long(libc::syscall(
            libc::SYS_capget,
            header.as_ptr(),
            sets.as_mut_ptr(),
        ))?;
    }
    // All of them are among the first 32, which are in the first set.
    let permitted = sets[0].permitted & u32::try_from(kept).unwrap_or(0);
    sets = [Capabilities::default(); 2];
    sets[0].permitted = permitted;
    sets[0].effective = permitted;
    // SAFETY: as above.
    unsafe {
        check_long(libc::syscall(
            libc::SYS_capset,
            header.as_ptr(),
            sets.as_ptr(),
        ))
    }
}

/// The version of Landlock that this kernel has; `None`: none.
pub fn landlock_version() -> Option<u32> {
    // SAFETY: asks for the version only (flag 1); no pointer is read.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<u8>(),
            0,
            1,
        )
    };
    u32::try_from(version).ok().filter(|version| *version > 0)
}

/// Signals and timers that a user's processes may have pending. All sandboxes share the number that the
/// server's user has, some 10,000 for each gigabyte of memory.
const PENDING_SIGNALS: u64 = 1_024;

/// The kernel's own limits of a process. They are the hard stop behind the supervisor, which gives
/// the reason: so the processor limit here is a second later.
pub fn kernel_limits(limits: &Limits) -> [(libc::__rlimit_resource_t, u64); 5] {
    [
        (libc::RLIMIT_SIGPENDING, PENDING_SIGNALS),
        (libc::RLIMIT_NPROC, limits.processes),
        (libc::RLIMIT_CPU, limits.cpu_ms.div_ceil(1_000) + 1),
        (libc::RLIMIT_NOFILE, OPEN_FILES),
        (libc::RLIMIT_CORE, 0),
    ]
}

/// Sets them for this process. A bound that is lower already stays.
fn set_limits(limits: &Limits) -> io::Result<()> {
    for (resource, value) in kernel_limits(limits) {
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: a pointer to a live rlimit.
        check(unsafe { libc::getrlimit(resource, &mut limit) })?;
        let value = value.min(limit.rlim_max);
        limit.rlim_cur = value;
        limit.rlim_max = value;
        // SAFETY: as above.
        check(unsafe { libc::setrlimit(resource, &limit) })?;
    }
    Ok(())
}

/// How long user code keeps a processor that others wait for. The kernel's usual slice is some 3 ms, and a
/// submission changes hands several times: beside somebody whose programs keep every processor busy,
/// each hand-over waited for one. Its shortest is 0.1 ms.
const TURN_NANOSECONDS: u64 = 200_000;

/// Has this process and its children give way to others more often. Kernels before 6.12 take no notice.
fn take_short_turns() {
    // SAFETY: integer arguments; without an error it is the priority that the process keeps.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: TURN_NANOSECONDS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: a pointer to a live structure that says its own size. A failure leaves the usual slice.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn check_long(result: libc::c_long) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn arch() -> anyhow::Result<TargetArch> {
    Ok(TargetArch::try_from(std::env::consts::ARCH)?)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// System calls that user code has no business with. Each is a way to look into other processes,
/// to get at kernel parts with a history of holes, or to change the machine.
const DENIED: &[libc::c_long] = &[
    // other processes' memory, files and keys
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // longer turns on a processor than others have
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    // kernel parts that widen the attack surface
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_fanotify_init,
    libc::SYS_lookup_dcookie,
    libc::SYS_nfsservctl,
    libc::SYS_move_pages,
    libc::SYS_migrate_pages,
    // namespaces and mounts
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_unshare,
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // the machine itself
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_syslog,
    libc::SYS_vhangup,
];

/// The filter that answers "not permitted".
fn denied(calls: Calls, streams_only: bool) -> anyhow::Result<BpfProgram> {
    let mut rules: Rules = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, socket_rules(calls.network, streams_only)?);
    rules.insert(libc::SYS_clone, namespace_flags()?);
    // A network may be entered by who may make one, which is the interpreter on its way into a slot.
    let network = u64::from(libc::CLONE_NEWNET.unsigned_abs());
    let other_namespace = rule(&[(1, SeccompCmpOp::Ne, network)])?;
    rules.insert(libc::SYS_setns, vec![other_namespace]);
    if calls.shared_user {
        // A kind other than "process", the first one, stands for all processes of a group or a user.
        let of_many = |one: u64| rule(&[(0, SeccompCmpOp::Ne, one)]);
        let of_another = rule(&[(0, SeccompCmpOp::Ne, 0)])?;
        rules.insert(libc::SYS_sched_setaffinity, vec![of_another]);
        let kinds = [
            (libc::SYS_setpriority, u64::from(libc::PRIO_PROCESS)),
            (libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS),
        ];
        for (call, process) in kinds {
            let of_another = rule(&[(1, SeccompCmpOp::Ne, 0)])?;
            rules.insert(call, vec![of_another, of_many(process)?]);
        }
        let sets = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)?;
        let of_another = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, 0)?;
        let rules_of_limits = vec![SeccompRule::new(vec![of_another, sets])?];
        rules.insert(libc::SYS_prlimit64, rules_of_limits);
    }
    if streams_only {
        // Sending with this flag connects, without a look at Landlock's rules.
        let connects = libc::MSG_FASTOPEN as u64;
        for (call, at) in SENDS {
            let fast_open = rule(&[(at, SeccompCmpOp::MaskedEq(connects), connects)])?;
            rules.insert(call, vec![fast_open]);
        }
    }
    // Pushing characters into a terminal's input is running commands as whoever sits there.
    let terminal_injection = [libc::TIOCSTI, libc::TIOCLINUX]
        .into_iter()
        .map(|request| rule(&[(1, SeccompCmpOp::Eq, request)]))
        .collect::<anyhow::Result<_>>()?;
    rules.insert(libc::SYS_ioctl, terminal_injection);
    let eperm = SeccompAction::Errno(u32::try_from(libc::EPERM)?);
    compile(rules, eperm)
}

/// From the kernel's linux/ioprio.h; `libc` does not have it.
const IOPRIO_WHO_PROCESS: u64 = 1;

/// The older ways to say `fallocate`, from the kernel's linux/falloc.h: FS_IOC_RESVSP, FS_IOC_RESVSP64 and
/// FS_IOC_ZERO_RANGE.
const RESERVATIONS: [u64; 3] = [0x4030_5828, 0x4030_582a, 0x4030_5839];

/// The filter that answers "not supported" to a call which takes room on a disk without writing: it would
/// take all there is before anybody sees it. Programs and libraries write zeroes instead.
fn no_reservations() -> anyhow::Result<BpfProgram> {
    let requests = RESERVATIONS
        .into_iter()
        .map(|request| rule(&[(1, SeccompCmpOp::Eq, request)]))
        .collect::<anyhow::Result<_>>()?;
    let rules = Rules::from([
        (libc::SYS_fallocate, Vec::new()),
        (libc::SYS_ioctl, requests),
    ]);
    compile(
        rules,
        SeccompAction::Errno(u32::try_from(libc::EOPNOTSUPP)?),
    )
}

/// The calls that send, and which of their arguments has the flags.
const SENDS: [(libc::c_long, u8); 3] = [
    (libc::SYS_sendto, 3),
    (libc::SYS_sendmsg, 2),
    (libc::SYS_sendmmsg, 3),
];

/// A read that takes only what is in the page cache, from the kernel's linux/fs.h (RWF_NOWAIT).
const ONLY_CACHED: u64 = 8;

/// The filter that answers "not supported" to two things. A read may not tell whether others have read the same
/// file of the machine: who asks for that reads in the usual way then. And a datagram is not put together in the
/// kernel, which counts what is not sent yet for nobody; streams lose nothing but a hint.
fn unsupported() -> anyhow::Result<BpfProgram> {
    let cached = rule(&[(5, SeccompCmpOp::MaskedEq(ONLY_CACHED), ONLY_CACHED)])?;
    let mut rules = Rules::from([(libc::SYS_preadv2, vec![cached])]);
    let more = libc::MSG_MORE as u64;
    for (call, at) in SENDS {
        rules.insert(
            call,
            vec![rule(&[(at, SeccompCmpOp::MaskedEq(more), more)])?],
        );
    }
    let [udp, cork] = [libc::IPPROTO_UDP, libc::UDP_CORK].map(|number| number as u64);
    let corks = rule(&[(1, SeccompCmpOp::Eq, udp), (2, SeccompCmpOp::Eq, cork)])?;
    rules.insert(libc::SYS_setsockopt, vec![corks]);
    compile(
        rules,
        SeccompAction::Errno(u32::try_from(libc::EOPNOTSUPP)?),
    )
}

/// The filter that answers "done" and does nothing to two hints. One says that a file's pages are no longer
/// needed, which takes them from everybody who reads the same file of the machine. The other makes a socket's
/// receive buffer larger: what netlink and the queues of errors hold of it counts for nobody. Connections find
/// a size by themselves.
fn ignored() -> anyhow::Result<BpfProgram> {
    let not_needed = u64::try_from(libc::POSIX_FADV_DONTNEED)?;
    let hint = rule(&[(3, SeccompCmpOp::Eq, not_needed)])?;
    let [level, size] = [libc::SOL_SOCKET, libc::SO_RCVBUF].map(|number| number as u64);
    let larger = rule(&[(1, SeccompCmpOp::Eq, level), (2, SeccompCmpOp::Eq, size)])?;
    let rules = Rules::from([
        (libc::SYS_fadvise64, vec![hint]),
        (libc::SYS_setsockopt, vec![larger]),
    ]);
    compile(rules, SeccompAction::Errno(0))
}

/// What programs may ask the kernel for: what the interpreters, compilers and package managers of every
/// language use, and the calls that other versions of the C library use in their place. All others are
/// answered "no such call", for which libraries have another way. Not here, on purpose: memory that is
/// no process's own (`memfd_create`; the supervisor would not see it), objects that outlive a job (System
/// V's and message queues: POSIX shared memory and semaphores are files in /dev/shm, and go with the
/// slot), `clone3` (it hides its flags behind a pointer; every libc goes back to `clone`), and `sync`,
/// which makes all of the machine's disks write.
const ALLOWED: &[libc::c_long] = &[
    // descriptors, files and folders
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_flock,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_readlinkat,
    libc::SYS_getdents64,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_chdir,
    libc::SYS_fchdir,
    libc::SYS_chroot,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_unlinkat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_renameat2,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_umask,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_getxattr,
    libc::SYS_lgetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_flistxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    // waiting for something
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_rm_watch,
    libc::SYS_signalfd4,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    // sockets
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
    // memory
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mlockall,
    libc::SYS_munlockall,
    libc::SYS_membarrier,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_pkey_mprotect,
    libc::SYS_mseal,
    // processes, signals and threads
    libc::SYS_clone,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_tgkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    // ids, rights (of which user code has none to take) and limits
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getpgid,
    libc::SYS_setpgid,
    libc::SYS_getsid,
    libc::SYS_setsid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getgroups,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_setns,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_prctl,
    libc::SYS_seccomp,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
    libc::SYS_prlimit64,
    libc::SYS_getrusage,
    libc::SYS_times,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getcpu,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
    libc::SYS_ioprio_get,
    libc::SYS_ioprio_set,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_rr_get_interval,
    libc::SYS_sched_getattr,
    // time and chance
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_getitimer,
    libc::SYS_setitimer,
    libc::SYS_timer_create,
    libc::SYS_timer_settime,
    libc::SYS_timer_gettime,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_delete,
    libc::SYS_getrandom,
];

/// Calls that the headers have no name for yet. Their numbers are the same on every processor.
const ALLOWED_NUMBERS: &[libc::c_long] = &[
    452, // fchmodat2
    453, // map_shadow_stack
    454, // futex_wake
    455, // futex_wait
    456, // futex_requeue
];

/// The older ways to do the same.
#[cfg(target_arch = "x86_64")]
const ALLOWED_OLDER: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_creat,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_mknod,
    libc::SYS_unlink,
    libc::SYS_symlink,
    libc::SYS_link,
    libc::SYS_rename,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_eventfd,
    libc::SYS_epoll_create,
    libc::SYS_epoll_wait,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_inotify_init,
    libc::SYS_signalfd,
    libc::SYS_alarm,
    libc::SYS_pause,
    libc::SYS_time,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_getpgrp,
    libc::SYS_arch_prctl,
    libc::SYS_renameat,
    libc::SYS_sync_file_range,
    libc::SYS_getrlimit,
    libc::SYS_setrlimit,
];

/// The older ways to do the same: `renameat`, `sync_file_range`, `getrlimit`, `setrlimit`.
#[cfg(target_arch = "aarch64")]
const ALLOWED_OLDER: &[libc::c_long] = &[38, 84, 163, 164];

/// The filter that answers "no such call" to what is not allowed. Kernels with the x32 dialect know
/// every call under a second number, which is among these.
fn allowed() -> anyhow::Result<BpfProgram> {
    let allowed = [ALLOWED, ALLOWED_OLDER, ALLOWED_NUMBERS].concat();
    let mut rules: Rules = allowed.into_iter().map(|call| (call, Vec::new())).collect();
    // Which dialect of Linux a process speaks may be asked, and be this one; others switch guards of
    // its memory off.
    let [query, linux] = [0xffff_ffff, 0].map(|value| rule(&[(0, SeccompCmpOp::Eq, value)]));
    rules.insert(libc::SYS_personality, vec![query?, linux?]);
    let absent = SeccompAction::Errno(u32::try_from(libc::ENOSYS)?);
    let filter = SeccompFilter::new(rules, absent, SeccompAction::Allow, arch()?)?;
    Ok(filter.try_into()?)
}

fn compile(rules: Rules, action: SeccompAction) -> anyhow::Result<BpfProgram> {
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch()?)?;
    Ok(filter.try_into()?)
}

fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> anyhow::Result<SeccompRule> {
    let conditions = conditions
        .iter()
        .map(|(argument, op, value)| {
            SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, op.clone(), *value)
        })
        .collect::<Result<Vec<_>, _>>()?;
    Ok(SeccompRule::new(conditions)?)
}

/// Only Unix, internet and routing sockets, and none of them raw.
fn socket_rules(network: bool, streams_only: bool) -> anyhow::Result<Vec<SeccompRule>> {
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    let [unix, inet, inet6, netlink] = [
        libc::AF_UNIX,
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
    ]
    .map(|f| f as u64);
    let raw = (1, MaskedEq(0xf), libc::SOCK_RAW as u64);
    let mut rules = vec![
        rule(&[
            (0, Ne, unix),
            (0, Ne, inet),
            (0, Ne, inet6),
            (0, Ne, netlink),
        ])?,
        rule(&[(0, Eq, inet), raw.clone()])?,
        rule(&[(0, Eq, inet6), raw])?,
        rule(&[(0, Eq, netlink), (2, Ne, libc::NETLINK_ROUTE as u64)])?,
    ];
    if streams_only {
        // Landlock's rules are about TCP's connections alone, by no protocol beside it.
        let other = [
            libc::SOCK_DGRAM,
            libc::SOCK_RDM,
            libc::SOCK_SEQPACKET,
            libc::SOCK_DCCP,
        ];
        for family in [inet, inet6] {
            for kind in other {
                rules.push(rule(&[(0, Eq, family), (1, MaskedEq(0xf), kind as u64)])?);
            }
            let tcp = libc::IPPROTO_TCP as u64;
            rules.push(rule(&[(0, Eq, family), (2, Ne, 0), (2, Ne, tcp)])?);
        }
    }
    if !network {
        rules.push(rule(&[(0, Eq, inet)])?);
        rules.push(rule(&[(0, Eq, inet6)])?);
    }
    Ok(rules)
}

fn namespace_flags() -> anyhow::Result<Vec<SeccompRule>> {
    [
        libc::CLONE_NEWNS,
        libc::CLONE_NEWUTS,
        libc::CLONE_NEWIPC,
        libc::CLONE_NEWUSER,
        libc::CLONE_NEWPID,
        libc::CLONE_NEWNET,
        libc::CLONE_NEWCGROUP,
    ]
    .into_iter()
    .map(|flag| {
        let flag = u64::from(flag.unsigned_abs());
        rule(&[(0, SeccompCmpOp::MaskedEq(flag), flag)])
    })
    .collect()
}

/// A Landlock ruleset that knows `reach` and nothing else; `None` where the kernel has no Landlock.
fn domain(reach: &[Reach], line: Option<u16>) -> anyhow::Result<Option<OwnedFd>> {
    let abi = ABI::V6;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .scope(Scope::from_all(abi))?;
    let mut ruleset = match line {
        Some(port) => ruleset
            .handle_access(AccessNet::from_all(abi))?
            .create()?
            .add_rule(NetPort::new(port, AccessNet::ConnectTcp))?,
        None => ruleset.create()?,
    };
    for Reach { path, writable } in reach {
        let access = if *writable {
            AccessFs::from_all(abi)
        } else {
            AccessFs::from_read(abi)
        };
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
    }
    Ok(ruleset.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::TcpListener;

    /// Tries to reach two ports by TCP, the second by other ways too.
    const TRIES: &str = r#"
import errno, socket, sys
allowed, other = (("127.0.0.1", int(port)) for port in sys.argv[1:])
def tried(act):
    try:
        act()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
print(
    tried(lambda: socket.socket().connect(allowed)),
    tried(lambda: socket.socket().connect(other)),
    tried(lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, other)),
    tried(lambda: socket.socket().sendmsg([b"x"], [], socket.MSG_FASTOPEN, other)),
    tried(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", other)),
    tried(lambda: socket.socket().bind(("127.0.0.1", 0))),
    tried(lambda: socket.socket(proto=262)),
)
"#;

    fn tried(confinement: Option<&Confinement>, ports: [u16; 2]) -> String {
        let mut command = Command::new("python3");
        command
            .args(["-c", TRIES])
            .args(ports.map(|port| port.to_string()));
        if let Some(confinement) = confinement {
            let limits = Limits {
                // Counted for all of this user's.
                processes: 1 << 20,
                ..Limits::MAXIMUM
            };
            let folder = std::path::Path::new("/");
            let applied = confinement.apply(&mut command, Identity::Own, None, folder, &limits);
            applied.unwrap();
        }
        let told = command.output().unwrap();
        assert!(told.status.success(), "{told:?}");
        String::from_utf8(told.stdout).unwrap()
    }

    #[test]
    fn an_installer_reaches_its_line_and_nothing_else() {
        let listeners = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let ports = listeners.map(|listener| {
            let port = listener.local_addr().unwrap().port();
            // It listens until the test is over.
            std::mem::forget(listener);
            port
        });
        let reach = [Reach {
            path: PathBuf::from("/"),
            writable: true,
        }];
        // All of it is possible here.
        let free = tried(None, ports);
        assert!(free.starts_with("done done done done done done "), "{free}");
        match Confinement::with_line(&reach, Calls::default(), ports[0]) {
            Ok(line) => {
                let kept = tried(Some(&line), ports);
                assert_eq!(kept, "done EACCES EPERM EPERM EPERM EACCES EPERM\n");
            }
            Err(error) => {
                assert!(landlock_version().unwrap_or(0) < NETWORK_VERSION, "{error}");
                eprintln!("SKIPPED, NOT TESTED: {error}");
            }
        }
    }
}
