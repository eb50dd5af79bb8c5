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
    SeccompRule, TargetArch, sock_filter,
};

use crate::model::Limits;

/// Open files of one process. Plenty for programs and test runners, and small enough that a full
/// slot of processes stays far below the machine's own bound.
const OPEN_FILES: u64 = 512;

/// Capabilities a warm interpreter keeps until its child becomes the slot's user: to enter the
/// slot's root and to take its ids. Everything else is out of reach for good.
const KEPT_CAPABILITIES: [u32; 3] = [
    6,  // CAP_SETGID
    7,  // CAP_SETUID
    18, // CAP_SYS_CHROOT
];

/// The version of Landlock that came with rules for connections.
const NETWORK_VERSION: u32 = 4;

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
}

/// Who the confined process is to be.
#[derive(Debug, Clone, Copy)]
pub enum Identity {
    /// The slot's own user, with nothing kept.
    User(u32),
    /// The runner's own user, for want of another, with nothing kept.
    Own,
    /// The runner's own user, keeping what it takes to become a slot's user later.
    Launcher,
}

impl Confinement {
    /// Prepares the filters and the Landlock rules.
    ///
    /// `network` is whether internet sockets may be made at all; a sandbox with a network namespace
    /// of its own may make them, since they lead nowhere.
    pub fn new(reach: &[Reach], network: bool) -> anyhow::Result<Self> {
        Ok(Self {
            filters: Arc::new(vec![denied(network, false)?, absent()?, other_numbers()?]),
            landlock: domain(reach, None)?.map(Arc::new),
        })
    }

    /// The same for a program that writes to a disk which it shares with others.
    pub fn on_shared_disk(mut self) -> anyhow::Result<Self> {
        Arc::make_mut(&mut self.filters).push(no_reservations()?);
        Ok(self)
    }

    /// For a program that may connect to this port, and speak to nobody else. Every kernel without this
    /// part of Landlock refuses.
    pub fn with_line(reach: &[Reach], port: u16) -> anyhow::Result<Self> {
        let version = landlock_version().unwrap_or_default();
        anyhow::ensure!(
            version >= NETWORK_VERSION,
            "an installer cannot be kept to its package index: that takes Landlock version \
             {NETWORK_VERSION} (Linux 6.7), and this kernel has {version}"
        );
        Ok(Self {
            filters: Arc::new(vec![denied(true, true)?, absent()?, other_numbers()?]),
            landlock: domain(reach, Some(port))?.map(Arc::new),
        })
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
                set_limits(&limits)?;
                this.enter(identity)
            });
        }
        Ok(())
    }

    fn enter(&self, identity: Identity) -> io::Result<()> {
        for capability in 0..=LAST_CAPABILITY {
            let kept =
                matches!(identity, Identity::Launcher) && KEPT_CAPABILITIES.contains(&capability);
            if !kept {
                // SAFETY: prctl with integer arguments only. An unknown capability is an error
                // that means there is nothing to drop.
                unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            }
        }
        // SAFETY: integer arguments only.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        if !matches!(identity, Identity::User(_)) {
            // A slot's user loses all of them with the user id.
            keep_capabilities(matches!(identity, Identity::Launcher))?;
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
            // SAFETY: the program outlives the call; seccompiler's instruction has the kernel's
            // layout (both are `struct sock_filter`).
            check(unsafe {
                libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program)
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

/// Gives up every capability, or all but the launcher's. Dropping them from the bounding set takes
/// one that a container's root may not have; this takes none, and without new privileges a program
/// that is executed afterwards cannot have them again, root's or not.
fn keep_capabilities(launcher: bool) -> io::Result<()> {
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
    let kept = KEPT_CAPABILITIES.iter().fold(0, |set, bit| set | 1 << bit);
    let kept = if launcher { kept } else { 0 };
    let permitted = sets[0].permitted & kept;
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

/// The kernel's own limits of a process. They are the hard stop behind the supervisor, which gives
/// the reason: so the processor limit here is a second later.
pub fn kernel_limits(limits: &Limits) -> [(libc::__rlimit_resource_t, u64); 4] {
    [
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
    libc::SYS_setns,
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
fn denied(network: bool, streams_only: bool) -> anyhow::Result<BpfProgram> {
    let mut rules: Rules = DENIED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_socket, socket_rules(network, streams_only)?);
    rules.insert(libc::SYS_clone, namespace_flags()?);
    if streams_only {
        // Sending with this flag connects, without a look at Landlock's rules.
        let connects = libc::MSG_FASTOPEN as u64;
        let flags = [
            (libc::SYS_sendto, 3),
            (libc::SYS_sendmsg, 2),
            (libc::SYS_sendmmsg, 3),
        ];
        for (call, at) in flags {
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

/// System calls that a kernel may lack, so that programs have another way.
const ABSENT: &[libc::c_long] = &[
    // It hides its flags behind a pointer; every libc goes back to `clone`.
    libc::SYS_clone3,
    // Memory that is no process's own: the supervisor would not see it.
    libc::SYS_memfd_create,
    libc::SYS_memfd_secret,
    // Objects that outlive the job: memory nobody gives back, and a way to leave word for the
    // next. POSIX shared memory and semaphores are files in /dev/shm and go with the slot.
    libc::SYS_shmget,
    libc::SYS_semget,
    libc::SYS_msgget,
    libc::SYS_mq_open,
];

/// The filter that answers "not supported" to a call which takes room on a disk without writing: it would
/// take all there is before anybody sees it. Programs and libraries write zeroes instead.
fn no_reservations() -> anyhow::Result<BpfProgram> {
    let rules = Rules::from([(libc::SYS_fallocate, Vec::new())]);
    compile(
        rules,
        SeccompAction::Errno(u32::try_from(libc::EOPNOTSUPP)?),
    )
}

/// The filter that answers "no such call".
fn absent() -> anyhow::Result<BpfProgram> {
    let rules = ABSENT.iter().map(|call| (*call, Vec::new())).collect();
    compile(rules, SeccompAction::Errno(u32::try_from(libc::ENOSYS)?))
}

/// Answers "no such call" to numbers with bit 30 set. Kernels with the x32 dialect know every call
/// under a second number there, which the other filters would let through.
fn other_numbers() -> anyhow::Result<BpfProgram> {
    const X32_BIT: u32 = 0x4000_0000;
    let statement = |code: u32, jt, jf, k| -> anyhow::Result<sock_filter> {
        let code = u16::try_from(code)?;
        Ok(sock_filter { code, jt, jf, k })
    };
    let absent = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS)?;
    Ok(vec![
        // The number is the first field of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0)?,
        statement(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32_BIT)?,
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, absent)?,
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW)?,
    ])
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
        match Confinement::with_line(&reach, ports[0]) {
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
