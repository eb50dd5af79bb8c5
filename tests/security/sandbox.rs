//! Runs that try to poison the next one, or to take what others need.
#![allow(clippy::print_stdout)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry::model::{
    DiskBounds, Ending, Limits, Order, Reason, Serves, SubmissionId, Tested, Tests, UserId,
};
use gantry::platform::conformance::{Ended, finish, python};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::platform::{Platform, ReleaseSpec, Sessions};
use gantry::runner::wire::Job;
use gantry::storage::{CodeStore, DirectoryStore};

/// Tests that measure take turns.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

struct Machine {
    platform: Arc<LocalPlatform>,
    sessions: Sessions,
    store: DirectoryStore,
    data: tempfile::TempDir,
}

impl Machine {
    async fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let store = DirectoryStore::open(data.path().join("store")).unwrap();
        let config = LocalConfig {
            data: data.path().to_owned(),
            runner: env!("CARGO_BIN_EXE_gantry-runner").into(),
            runs_per_user: 2,
            maximum: Limits::MAXIMUM,
            network: false,
            packages: Default::default(),
            log_refused: false,
            drain: Duration::from_secs(10),
            disk: DiskBounds::USUAL,
            sites: gantry::model::Sites::plain("apps.localhost:8000", "localhost:8000"),
        };
        let platform = LocalPlatform::start(config, store.clone()).await.unwrap();
        let platform = Arc::new(platform);
        Self {
            sessions: Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>),
            platform,
            store,
            data,
        }
    }

    async fn run(&self, user: &str, job: Job) -> Ended {
        let user: UserId = user.parse().unwrap();
        finish(&mut self.sessions.of(&user).start(job))
            .await
            .unwrap()
    }

    /// What this program writes, which ends well.
    async fn says(&self, user: &str, code: &str) -> String {
        let ended = self.run(user, python(code)).await;
        assert_eq!(ended.report.ending, Ending::Exited(0), "{}", words(&ended));
        String::from_utf8(ended.stdout).unwrap()
    }

    async fn release(&self, user: &str, repl: &str, code: &str) {
        let files = [("main.py".to_owned().try_into().unwrap(), code.to_owned())].into();
        let spec = ReleaseSpec {
            user_id: user.parse().unwrap(),
            repl_id: repl.parse().unwrap(),
            submission_id: SubmissionId::new(),
            order: Order::now(),
            tested: Tested::of(&files, &Tests::ExitCode),
            argv: vec!["python3".to_owned(), "main.py".to_owned()],
            env: BTreeMap::new(),
            database: false,
            serves: Serves::No,
        };
        let published = self
            .store
            .publish(&spec.repl_id, spec.submission_id, &files);
        published.await.unwrap();
        self.platform.ensure_release(&spec).await.unwrap();
    }

    /// The control group of a user's sandbox for test runs, as far as the processor is concerned.
    fn processor_group(&self, user: &str) -> Option<PathBuf> {
        let server = crc32fast::hash(self.data.path().as_os_str().as_encoded_bytes());
        let name = format!("{server:08x}-owner-{user}/{server:08x}-user-{user}");
        ["cpu/gantry", "gantry"]
            .map(|parent| Path::new("/sys/fs/cgroup").join(parent).join(&name))
            .into_iter()
            .find(|folder| folder.is_dir())
    }
}

fn words(ended: &Ended) -> String {
    format!(
        "{:?} {:?} {:?}",
        ended.report,
        String::from_utf8_lossy(&ended.stdout),
        String::from_utf8_lossy(&ended.stderr)
    )
}

fn is_root() -> bool {
    let root = rustix::process::getuid().is_root();
    if !root {
        println!("SKIPPED, NOT TESTED: it takes root");
    }
    root
}

/// Some 500 ms of work; writes how long it took.
const WORK: &str = "
import time
n, started = 0, time.monotonic()
while time.process_time() < 0.5:
    n += 1
print(time.monotonic() - started)
";

#[tokio::test(flavor = "multi_thread")]
async fn ten_busy_programs_of_one_user_have_one_share_of_the_processor() {
    if !is_root() {
        return;
    }
    let _alone = ALONE.lock().await;
    let machine = Machine::start().await;
    machine.says("neighbour", "print(1)").await;
    let Some(group) = machine.processor_group("neighbour") else {
        panic!("the neighbour has no group of its own");
    };
    const BUSY: &str = "
import os
os.fork()
while True: pass
";
    for number in 0..8 {
        let repl = format!("busy-{number}");
        machine.release("greedy", &repl, BUSY).await;
    }
    let beside = group.parent().unwrap().with_file_name(
        group
            .parent()
            .unwrap()
            .file_name()
            .unwrap()
            .to_string_lossy()
            .replace("neighbour", "greedy"),
    );
    let groups = std::fs::read_dir(&beside).unwrap().flatten();
    let groups = groups.filter(|entry| entry.path().is_dir()).count();
    assert_eq!(groups, 8, "{}", beside.display());
    let mut took: Vec<f64> = Vec::new();
    for _ in 0..3 {
        took.push(
            machine
                .says("neighbour", WORK)
                .await
                .trim()
                .parse()
                .unwrap(),
        );
    }
    took.sort_by(f64::total_cmp);
    println!("0.5 s of work beside 16 busy processes took {took:.2?} s");
    // Half of two processors is one; a ninth of them, as one of nine equal sandboxes, makes it 2.2 s.
    assert!(took[0] < 1.4, "{took:?}");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_the_machine_kept_from_running_does_not_fail() {
    if !is_root() {
        return;
    }
    let _alone = ALONE.lock().await;
    let machine = Machine::start().await;
    machine.says("slowed", "print(1)").await;
    let group = machine.processor_group("slowed").expect("no group");
    let slow = |percent: u64| {
        let old = group.join("cpu.cfs_quota_us");
        match old.exists() {
            true => std::fs::write(old, (percent * 1_000).to_string()).unwrap(),
            false => std::fs::write(group.join("cpu.max"), format!("{} 100000", percent * 1_000))
                .unwrap(),
        }
    };
    let work = |cpu: f64| {
        let mut job = python(&format!(
            "import time\nwhile time.process_time() < {cpu}: pass\nprint('done')"
        ));
        job.limits.wall_ms = 800;
        job
    };
    // It takes longer than its limit, and as long as it should.
    slow(40);
    let ended = machine.run("slowed", work(0.5)).await;
    assert_eq!(ended.report.ending, Ending::Exited(0), "{}", words(&ended));
    assert!(ended.report.duration_ms > 800, "{}", words(&ended));
    // A program that waits has had all of its time.
    let mut sleeps = python("import time\ntime.sleep(20)");
    sleeps.limits.wall_ms = 800;
    let ended = machine.run("slowed", sleeps).await;
    let timeout = Ending::Limit(Reason::Timeout);
    assert_eq!(ended.report.ending, timeout, "{}", words(&ended));
    assert!(ended.report.duration_ms < 2_000, "{}", words(&ended));
    // There is an end to it, which is not the program's failure.
    slow(5);
    let ended = machine.run("slowed", work(10.0)).await;
    let starved = matches!(ended.report.ending, Ending::Starved { .. });
    assert!(starved, "{}", words(&ended));
    slow(100);
    let own_doing = "import os\nos.fork(), os.fork(), os.fork()\nwhile True: pass";
    let mut busy = python(own_doing);
    busy.limits.wall_ms = 800;
    busy.limits.cpu_ms = 30_000;
    let ended = machine.run("slowed", busy).await;
    assert_eq!(ended.report.ending, timeout, "{}", words(&ended));
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_at_one_time_share_neither_loopback_nor_abstract_sockets() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    const SERVES: &str = "
import socket, time
sockets = [socket.socket(), socket.socket(socket.AF_UNIX)]
sockets[0].bind(('127.0.0.1', 4000))
sockets[1].bind('\\0gantry-test')
for server in sockets:
    server.listen()
own = socket.create_connection(('127.0.0.1', 4000))
print('serves', flush=True)
time.sleep(3)
";
    const CALLS: &str = "
import socket, time
began = time.time()
reached = 0
while time.time() < began + 1.5:
    for family, address in ((socket.AF_INET, ('127.0.0.1', 4000)), (socket.AF_UNIX, '\\0gantry-test')):
        try:
            socket.socket(family).connect(address)
            reached += 1
        except OSError:
            pass
    time.sleep(0.05)
print('reached', reached)
";
    let (served, called) = tokio::join!(machine.says("pair", SERVES), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        machine.says("pair", CALLS).await
    });
    assert_eq!(
        (served.as_str(), called.as_str()),
        ("serves\n", "reached 0\n")
    );
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn proc_tells_nothing_of_the_machine_beyond_its_size() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    const LOOKS: &str = "
import os
told = []
for name in os.listdir('/proc'):
    path = '/proc/' + name
    if name.isdigit() or os.path.islink(path):
        continue
    try:
        full = bool(os.listdir(path)) if os.path.isdir(path) else bool(open(path, 'rb').read(1))
    except OSError:
        continue
    if full:
        told.append(name)
print(' '.join(sorted(told)))
for path in ('/proc/sys/kernel/hostname', '/proc/sys/vm/overcommit_memory', '/proc/sysrq-trigger'):
    try:
        open(path, 'w').write('1')
        print('wrote', path)
    except OSError:
        pass
print(os.cpu_count() > 0, 'MemTotal' in open('/proc/meminfo').read(), os.path.exists('/sys/firmware'))
";
    let said = machine.says("looks", LOOKS).await;
    assert_eq!(
        said,
        "cpuinfo filesystems loadavg meminfo stat sys uptime version\nTrue True False\n"
    );
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_system_calls_that_programs_need_are_there() {
    let machine = Machine::start().await;
    // Numbers of x86-64 where they differ from others'.
    const CALLS: &str = "
import ctypes, errno, platform
call = ctypes.CDLL(None, use_errno=True).syscall
def answer(number, *arguments):
    ctypes.set_errno(0)
    result = call(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return errno.errorcode.get(ctypes.get_errno(), result)
absent = {'clone3': 435, 'open_tree_attr': 467, 'statmount': 457, 'listmount': 458, 'lsm_list_modules': 461, 'none': 999}
denied = {'io_uring_setup': 425, 'pidfd_getfd': 438, 'process_madvise': 440, 'mount_setattr': 442, 'quotactl_fd': 443}
if platform.machine() == 'x86_64':
    absent |= {'memfd_create': 319, 'io_setup': 206, 'remap_file_pages': 216, 'modify_ldt': 154, 'iopl': 172, 'vmsplice': 278, 'mbind': 237, 'sync': 162, 'x32 read': 0x40000000}
    denied |= {'ptrace': 101, 'mount': 165, 'unshare': 272, 'bpf': 321, 'userfaultfd': 323, 'keyctl': 250, 'syslog': 103}
print('absent', {name for name, number in absent.items() if answer(number, -1, 0, 0, 0) != 'ENOSYS'} or 'all')
print('denied', {name for name, number in denied.items() if answer(number, -1, 0, 0, 0) != 'EPERM'} or 'all')
import os, socket, threading, subprocess
print(subprocess.run(['true']).returncode)
";
    let said = machine.says("calls", CALLS).await;
    assert_eq!(said, "absent all\ndenied all\n0\n");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_are_not_late_after_one_that_attacked_the_waiting_interpreter() {
    let machine = Machine::start().await;
    machine.says("late", "print(1)").await;
    for _ in 0..4 {
        let attack = "import os, signal\nfor pid in (1, os.getppid()):\n    try:\n        os.kill(pid, signal.SIGSTOP)\n        print('stopped')\n    except OSError:\n        pass";
        assert_eq!(machine.says("late", attack).await, "");
        let started = Instant::now();
        machine.says("late", "print(1)").await;
        assert!(started.elapsed() < Duration::from_millis(1_900));
    }
    machine.platform.shutdown().await;
}

/// What the kernel counts for all sandboxes together, in the end for the server's own user.
const TAKE_ALL: &str = "
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
watchers = 0
while libc.inotify_init1(0) >= 0: watchers += 1
signal.pthread_sigmask(signal.SIG_BLOCK, {40})
signals = 0
while signals < 200000 and libc.sigqueue(os.getpid(), 40, 0) == 0: signals += 1
print(watchers, signals, flush=True)
time.sleep(3)
";

#[tokio::test(flavor = "multi_thread")]
async fn no_run_takes_all_watchers_and_signals_of_the_machine() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    let code = "
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
timer = ctypes.c_void_p()
assert libc.inotify_init1(0) >= 0, ctypes.get_errno()
assert libc.timer_create(1, None, ctypes.byref(timer)) == 0, ctypes.get_errno()
print('fine')
";
    let greedy = machine.says("greedy", TAKE_ALL);
    let neighbour = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        machine.says("neighbour", code).await
    };
    let (taken, said) = tokio::join!(greedy, neighbour);
    assert_eq!(said, "fine\n");
    let taken: Vec<u64> = taken
        .split_whitespace()
        .map(|number| number.parse().unwrap())
        .collect();
    assert!((1..=8).contains(&taken[0]), "{taken:?}");
    assert!((1..=1_024).contains(&taken[1]), "{taken:?}");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_hold_no_more_memory_than_their_bound() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    let code = "
import socket
listener = socket.socket()
listener.bind(('127.0.0.1', 0))
listener.listen(200)
held, pairs = 0, []
for _ in range(100):
    sender = socket.create_connection(listener.getsockname())
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
    sender.setblocking(False)
    pairs.append((sender, listener.accept()[0]))
    try:
        for _ in range(64): held += sender.send(b'x' * (1 << 20))
    except BlockingIOError: pass
print(held)
";
    let mut job = python(code);
    job.limits.memory_bytes = 128 << 20;
    let ended = machine.run("holder", job).await;
    assert_eq!(ended.report.ending, Ending::Exited(0), "{}", words(&ended));
    let held: u64 = String::from_utf8_lossy(&ended.stdout)
        .trim()
        .parse()
        .unwrap();
    assert!(held > 0 && held < 128 << 20, "{held} bytes are held");
    machine.platform.shutdown().await;
}

/// Looks at the machine's own files from one sandbox while a neighbour in another uses them.
const LOOKS: &str = r"
import ctypes, fcntl, os, select, sys, time
libc = ctypes.CDLL(None, use_errno=True)
files = ['/usr/bin/env', '/usr/lib/os-release', '/etc/nsswitch.conf', '/dev/null', '/dev/zero']
files = [file for file in files if os.path.exists(file)]
watch = libc.inotify_init()
for file in files:
    if libc.inotify_add_watch(watch, file.encode(), 0xfff) < 0: raise OSError(ctypes.get_errno(), file)
print('ready', flush=True)
end = time.monotonic() + 3
seen = locked = 0
while time.monotonic() < end:
    if select.select([watch], [], [], 0.1)[0]: seen += len(os.read(watch, 65536))
for file in files:
    handle = os.open(file, os.O_RDONLY)
    try: fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError: locked += 1
own = select.select([watch], [], [], 1)[0] != []
print('seen', seen, 'locked', locked, 'own', own)
";
const USES: &str = r"
import fcntl, os, time
files = ['/usr/bin/env', '/usr/lib/os-release', '/etc/nsswitch.conf', '/dev/null', '/dev/zero']
files = [file for file in files if os.path.exists(file)]
for file in files:
    fcntl.flock(os.open(file, os.O_RDONLY), fcntl.LOCK_EX)
end = time.monotonic() + 6
while time.monotonic() < end:
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.read(handle, 100)
        os.close(handle)
    time.sleep(0.05)
";

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_a_neighbours_use_of_the_machines_files() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    // Whoever uses them has begun before the look, and goes on after it.
    let uses = machine.run("neighbour", python(USES));
    let looks = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        machine.says("curious", LOOKS).await
    };
    let (used, looked) = tokio::join!(uses, looks);
    assert_eq!(used.report.ending, Ending::Exited(0), "{}", words(&used));
    assert_eq!(looked.trim(), "ready\nseen 0 locked 0 own True");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_cache_of_the_machines_files_is_neither_asked_nor_emptied() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    let said = machine
        .says(
            "curious",
            r"
import errno, os
handle = os.open('/usr/bin/env', os.O_RDONLY)
try: print(os.preadv(handle, [bytearray(10)], 0, os.RWF_NOWAIT))
except OSError as error: print(error.errno == errno.EOPNOTSUPP)
print(os.preadv(handle, [bytearray(10)], 0, 0))
os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
",
        )
        .await;
    assert_eq!(said, "True\n10\n");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_program_fills_the_kernel_with_datagrams_or_terminals() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    let said = machine
        .says(
            "greedy",
            r"
import errno, socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.connect(('127.0.0.1', 9))
def refused(act):
    try: act()
    except OSError as error: return error.errno == errno.EOPNOTSUPP
    return False
print(refused(lambda: udp.send(b'x', socket.MSG_MORE)))
print(refused(lambda: udp.sendmsg([b'x'], [], socket.MSG_MORE)))
print(refused(lambda: udp.setsockopt(socket.IPPROTO_UDP, 1, 1)))
print(udp.send(b'x'))
",
        )
        .await;
    assert_eq!(said, "True\nTrue\nTrue\n1\n");
    const TERMINALS: &str = r"
import http.server, os
held = []
try:
    while len(held) < 200: held.append(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY))
except OSError: pass
assert 1 <= len(held) <= 64, len(held)
http.server.HTTPServer(('', int(os.environ['PORT'])), http.server.SimpleHTTPRequestHandler).serve_forever()
";
    machine
        .release("greedy", "greedy-terminals", TERMINALS)
        .await;
    machine.platform.shutdown().await;
}

/// What the kernel has for its own data and cannot take back at once, in KiB.
fn slab_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find(|line| line.starts_with("SUnreclaim:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse().unwrap()
}

/// Runs programs that take what counts for nobody by itself, each of which has to end like this.
async fn each_ends(cases: &[(&str, &str, Limits, Reason)]) -> Vec<Ended> {
    let machine = Machine::start().await;
    let mut all = Vec::new();
    for (name, code, limits, reason) in cases {
        let before = slab_kib();
        let mut job = python(code);
        job.limits = *limits;
        let running = tokio::spawn(async move {
            let mut most = 0;
            loop {
                most = most.max(slab_kib());
                println!("{} KiB in the kernel", most.saturating_sub(before));
                tokio::time::sleep(Duration::from_millis(250)).await;
            }
        });
        let ended = machine.run("greedy", job).await;
        running.abort();
        println!("{name}: {}", words(&ended));
        let wanted = Ending::Limit(*reason);
        assert_eq!(ended.report.ending, wanted, "{name}: {}", words(&ended));
        all.push(ended);
    }
    machine.platform.shutdown().await;
    all
}

/// Some 300 KiB of replies for each of 400 sockets.
const UNREAD_REPLIES: &str = r"
import socket, struct, time
ask = struct.pack('=IHHIIBBHiII', 32, 18, 1, 1, 0, 0, 0, 0, 1, 0, 0)
held = []
for _ in range(400):
    one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    one.setblocking(False)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 300 << 10)
    try:
        for _ in range(20): one.send(ask * 50)
    except OSError: pass
    held.append(one)
time.sleep(1)
";

const SOCKETS: &str = r"
import os, socket, time
for _ in range(4):
    if os.fork() == 0:
        held = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(500)]
        time.sleep(3)
        os._exit(0)
for _ in range(4): os.wait()
";

const OPEN_FILES: &str = r"
import os, time
for _ in range(40):
    if os.fork() == 0:
        held = [os.open('/dev/null', os.O_RDONLY) for _ in range(500)]
        time.sleep(3)
        os._exit(0)
for _ in range(40): os.wait()
";

/// Reads the one page of zeroes at 60,000 places, for each of which the kernel makes a table.
const PAGE_TABLES: &str = r"
import mmap, time
PRIVATE_ANONYMOUS_NORESERVE, NOHUGEPAGE = 0x4022, 15
room = mmap.mmap(-1, 60000 << 21, flags=PRIVATE_ANONYMOUS_NORESERVE, prot=mmap.PROT_READ)
room.madvise(NOHUGEPAGE)
for at in range(0, 60000 << 21, 1 << 21): room[at]
time.sleep(1)
";

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_keeps_for_a_run_counts_for_it() {
    if !is_root() {
        return;
    }
    let _alone = ALONE.lock().await;
    let small = Limits {
        memory_bytes: 64 << 20,
        ..Limits::DEFAULT
    };
    let all = each_ends(&[
        ("unread replies", UNREAD_REPLIES, small, Reason::Memory),
        ("sockets", SOCKETS, Limits::DEFAULT, Reason::Memory),
        ("open files", OPEN_FILES, Limits::MAXIMUM, Reason::Memory),
        ("page tables", PAGE_TABLES, Limits::DEFAULT, Reason::Memory),
    ])
    .await;
    let said = String::from_utf8_lossy(&all[2].stderr).into_owned();
    assert!(said.contains("Too many open files"), "{said}");
}

/// A child at a time, each of which the kernel collects: some 5 s of processor time in 10 s.
const NOBODY_WAITS: &str = r"
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
end = time.monotonic() + 8
while time.monotonic() < end:
    ended, tell = os.pipe()
    if os.fork() == 0:
        while time.process_time() < 0.05: pass
        os._exit(0)
    os.close(tell)
    os.read(ended, 1)
    os.close(ended)
";

#[tokio::test(flavor = "multi_thread")]
async fn processor_time_of_children_that_nobody_waits_for_counts() {
    if !is_root() {
        return;
    }
    let _alone = ALONE.lock().await;
    let little = Limits {
        cpu_ms: 1_000,
        wall_ms: 20_000,
        ..Limits::DEFAULT
    };
    let all = each_ends(&[("nobody waits", NOBODY_WAITS, little, Reason::Cpu)]).await;
    let used = all[0].report.usage.cpu_ms;
    assert!((1_000..1_800).contains(&used), "{used}");
    // One that waits for its children is charged once, and a neighbour with none of it nothing.
    let machine = Machine::start().await;
    let waits = NOBODY_WAITS
        .replace("SIG_IGN", "SIG_DFL")
        .replace("os.read(ended, 1)", "os.wait()")
        .replace("+ 8", "+ 2");
    let (waits, sleeps) = tokio::join!(
        machine.run("pair", python(&waits)),
        machine.run("pair", python("import time\ntime.sleep(2)")),
    );
    for (ended, most) in [(&waits, 2_600), (&sleeps, 300)] {
        assert_eq!(ended.report.ending, Ending::Exited(0), "{}", words(ended));
        assert!(ended.report.usage.cpu_ms <= most, "{}", words(ended));
    }
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn interfaces_are_listed_and_receive_buffers_stay_as_they_are() {
    if !is_root() {
        return;
    }
    let machine = Machine::start().await;
    let code = "
import socket
print([name for _, name in socket.if_nameindex()])
print(socket.getaddrinfo('localhost', 80, type=socket.SOCK_STREAM)[0][4][1])
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
before = udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
print(udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == before)
";
    assert_eq!(machine.says("plain", code).await, "['lo']\n80\nTrue\n");
    machine.platform.shutdown().await;
}
