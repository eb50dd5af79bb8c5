//! The hostile programs themselves.

use std::path::PathBuf;

pub const FORK_BOMB: &str = "
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
";

pub const FORK_BOMB_GROUPS: &str = "
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
";

pub const COUNTED_FORKS: &str = "
import os, time
for _ in range(100):
    if os.fork() == 0:
        time.sleep(1)
        os._exit(0)
";

pub const DAEMON: &str = "
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        while True:
            time.sleep(1)
    os._exit(0)
os.wait()
print('done')
sys.exit(5)
";

pub const OUTLIVED: &str = "
import os, sys, time
for _ in range(20):
    if os.fork() == 0:
        time.sleep(600)
sys.exit(6)
";

pub const THREADS: &str = "
import os, threading, time
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(0.3,)).start()
except RuntimeError:
    os._exit(1)
";

/// As many zombies at one time as there may be processes: a zombie counts as one. Half of them are
/// collected by nobody but the runner.
pub fn zombies(pairs: u32) -> String {
    format!(
        "
import os
children = 0
for _ in range({pairs}):
    try:
        if os.fork() == 0:
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
        children += 1
    except OSError:
        for _ in range(children // 2):
            os.wait()
        children -= children // 2
print('done')
"
    )
}

pub const IGNORES_SIGNALS: &str = "
import signal, time
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    time.sleep(1)
";

/// Signal 0 asks whether a signal would be delivered.
pub const SIGNALS_ALL: &str = "
import os
try:
    os.kill(os.getppid(), 0)
    print('parent reached', flush=True)
except OSError:
    print('parent denied')
    reached = 0
    for number in (9, 19):
        for pid in [1, os.getppid()] + list(range(2, 400)):
            if pid != os.getpid():
                try:
                    os.kill(pid, number)
                    reached += 1
                except OSError:
                    pass
    print('reached', reached)
";

pub const STOPS_ALL: &str = "
import os
try:
    os.kill(-1, 19)
except ProcessLookupError:
    pass
print('done')
";

pub const BURN: &str = "
import time
while time.process_time() < 0.8:
    pass
";

pub const BURN_IN_CHILDREN: &str = "
import os, time
for _ in range(4):
    if os.fork() == 0:
        while time.process_time() < 0.2:
            pass
        os._exit(0)
for _ in range(4):
    os.wait()
time.sleep(0.1)
";

/// Each child is another's orphan when it ends: nobody of the job waits for it.
pub const BURN_IN_TURNS: &str = "
import os, time
for _ in range(8):
    if os.fork() == 0:
        if os.fork() == 0:
            while time.process_time() < 0.1:
                pass
            os._exit(0)
        os._exit(0)
    os.wait()
    time.sleep(0.15)
";

pub const CLOSES_OUTPUT: &str = "
import os, time
os.close(1)
time.sleep(0.3)
os._exit(3)
";

pub const TOUCH: &str = "
import time
data = bytearray(256 << 20)
for i in range(0, len(data), 4096):
    data[i] = 1
time.sleep(0.1)
";

pub const TOUCH_IN_CHILDREN: &str = "
import os, time
for _ in range(50):
    if os.fork() == 0:
        data = b'x' * (256 << 20 >> 6) + b'y' * (256 << 20 >> 8)
        time.sleep(1)
        os._exit(0)
for _ in range(50):
    os.wait()
";

pub const MEMFD: &str = "
import os
fd = os.memfd_create('x')
for _ in range(64):
    os.write(fd, b'x' * (1 << 20))
print('filled')
";

pub const SYSTEM_V: &str = "
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def ask(made):
    return 'denied' if made < 0 else 'made'
IPC_PRIVATE, CREATE = 0, 0o1600
shm = libc.shmget(IPC_PRIVATE, 1 << 20, CREATE)
queue = libc.msgget(IPC_PRIVATE, CREATE)
sem = libc.semget(IPC_PRIVATE, 1, CREATE)
mq = libc.syscall(240, b'gantry-hostile', 0o102, 0o600, None)
print(ask(shm), ask(queue), ask(sem), ask(mq))
libc.shmctl(shm, 0, None)
libc.msgctl(queue, 0, None)
libc.semctl(sem, 0, 0)
libc.syscall(241, b'gantry-hostile')
";

pub const SOCKET_BUFFERS: &str = "
import os, socket, time
for _ in range(50):
    if os.fork() == 0:
        kept = []
        try:
            while True:
                one, two = socket.socketpair()
                kept += [one, two]
                one.setblocking(False)
                try:
                    while True:
                        one.send(b'x' * 65536)
                except BlockingIOError:
                    pass
        except OSError:
            time.sleep(1)
        os._exit(0)
for _ in range(50):
    os.wait()
";

pub const FILE_20_MIB: &str = "
with open('large', 'wb') as file:
    for _ in range(20):
        file.write(b'x' * (1 << 20))
";

/// 320 MiB: a slot has 256 MiB.
pub const FILL: &str = "
for n in range(40):
    with open(f'{n}', 'wb') as file:
        file.write(b'x' * (8 << 20))
print('done')
";

pub const FILL_QUIETLY: &str = "
import time
try:
    for n in range(1000):
        with open(f'/dev/shm/{n}', 'wb') as file:
            file.write(b'x' * (8 << 20))
except OSError:
    pass
time.sleep(0.5)
";

pub const MANY_FILES: &str = "
for n in range(1000000):
    open(f'/tmp/{n}', 'w').close()
";

/// More than the 16,384 that a slot has.
pub const MORE_FILES: &str = "
for n in range(20000):
    open(f'{n}', 'w').close()
print('done')
";

pub const DELETED_FILE: &str = "
import os, time
file = open('x', 'wb', buffering=0)
os.unlink('x')
try:
    for _ in range(320):
        file.write(b'x' * (1 << 20))
    print('done')
except OSError:
    time.sleep(60)
";

pub const DESCRIPTORS: &str = "
kept = []
try:
    while True:
        kept.append(open('/dev/null'))
except OSError:
    print('done')
";

/// Folders in each other. Looking up the way from each takes the kernel longer with each.
pub fn nested(depth: u32) -> String {
    format!(
        "
import os
for _ in range({depth}):
    os.mkdir('d')
    os.chdir('d')
print('done')
"
    )
}

/// Too far down for a path: a path may have 4,096 bytes.
pub const NESTED_FILE: &str = "
import os
for _ in range(500):
    os.mkdir('d' * 20)
    os.chdir('d' * 20)
with open('large', 'wb') as file:
    file.truncate(1 << 30)
";

pub const ODD_NAMES: &str = "
import os
for name in (b'new\\nline', b'\\xff\\xfe', b' ', b'-rf', b'\\x1b[2J', b'a' * 255, b'.moved-1'):
    os.mkdir(name)
    os.chdir(name)
    open(name, 'w').close()
    os.symlink(b'/etc', b'link')
    os.chdir('..')
    os.rename(name, name[:200] + b'!')
print('done')
";

pub const CLOSED_FOLDERS: &str = "
import os
for top in ('/workspace', '/tmp', '/dev/shm'):
    if not os.access(top, os.W_OK):
        continue
    os.makedirs(top + '/a/b/c')
    open(top + '/a/b/c/file', 'w').close()
    for folder in ('/a/b/c', '/a/b', '/a'):
        os.chmod(top + folder, 0)
    os.chmod(top, 0)
print('done')
";

/// 2 MiB to each of these descriptors.
pub fn flood(descriptors: &str) -> String {
    format!(
        "
import os
for _ in range(32):
    for fd in ({descriptors},):
        left = b'x' * 65536
        while left:
            left = left[os.write(fd, left):]
"
    )
}

pub const FLOOD_CHILDREN: &str = "
import os
for _ in range(8):
    if os.fork() == 0:
        break
while True:
    os.write(1, b'x' * 65536)
";

pub const NOT_TEXT: &str = r#"
import os
data = b'nul \0 bad \xff\xfe\xc3( ansi \x1b[31m\x1b]0;title\x07 cr \r\n{"level":"error"}\n'
os.write(1, data)
os.write(2, data)
"#;

pub const NOT_TEXT_BYTES: &[u8] =
    b"nul \0 bad \xff\xfe\xc3( ansi \x1b[31m\x1b]0;title\x07 cr \r\n{\"level\":\"error\"}\n";

/// What the runner and the server say to each other, on every descriptor there may be.
pub const OWN_FRAMES: &str = r#"
import os, struct, sys
body = bytes([1]) + bytes(17) + bytes([1, 1, 0, 0, 0, 0, 0, 0])
for fd in range(1, 512):
    for data in (struct.pack('<I', len(body)) + body, b'exit %d 0 0 0' % os.getpid(),
                 b'{"status":"tests_passed","exit_code":0}\n'):
        try:
            os.write(fd, data)
        except OSError:
            pass
sys.exit(3)
"#;

/// How many probes [`CALLS`] has.
pub const CALLS_COUNT: usize = 35;

/// Each probe is made so that it does no harm where it is allowed: its arguments are refused later.
/// Prints the ones that are not denied.
pub const CALLS: &str = "
import ctypes, os, platform
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
EPERM, ENOSYS = 1, 38
X86 = {
    'ptrace': (101, 99, 0, 0, 0), 'process_vm_readv': (310, os.getpid(), 0, 0, 0, 0, 0),
    'process_vm_writev': (311, os.getpid(), 0, 0, 0, 0, 0),
    'kcmp': (312, os.getpid(), os.getpid(), 1, 0, 0), 'pidfd_getfd': (438, -1, 0, 0),
    'add_key': (248, 0, 0, 0, 0, 0), 'request_key': (249, 0, 0, 0, 0), 'keyctl': (250, 9999, 0, 0, 0, 0),
    'io_uring_setup': (425, 0, 0), 'io_uring_enter': (426, -1, 0, 0, 0, 0, 0),
    'userfaultfd': (323, 0xffff), 'bpf': (321, 9999, 0, 0), 'perf_event_open': (298, 0, 0, 0, -1, 0),
    'mount': (165, 0, 0, 0, 0, 0), 'umount2': (166, 0, 0), 'pivot_root': (155, 0, 0),
    'fsopen': (430, 0, 0), 'open_tree': (428, -1, 0, 0), 'mount_setattr': (442, -1, 0, 0, 0, 0),
    'unshare': (272, 0), 'setns': (308, -1, 0), 'open_by_handle_at': (304, -1, 0, 0),
    'init_module': (175, 0, 0, 0), 'delete_module': (176, 0, 0), 'kexec_load': (246, 0, 99999, 0, 0),
    'swapon': (167, 0, 0), 'sethostname': (170, 0, -1), 'clock_settime': (227, 99, 0),
    'syslog': (103, 9999, 0, 0),
}
def result(*arguments):
    ctypes.set_errno(0)
    made = libc.syscall(*[ctypes.c_long(a) for a in arguments])
    return made, (ctypes.get_errno() if made < 0 else 0)
for name, call in X86.items():
    made, error = result(*call)
    if not (made < 0 and error == EPERM):
        print(name, made, error)
made, error = result(435, 0, 0)
if error != ENOSYS:
    print('clone3', made, error)
for name, flag in (('a user namespace', 0x10000000), ('a network namespace', 0x40000000)):
    made, error = result(56, flag | 17, 0, 0, 0, 0)
    if made == 0:
        os._exit(0)
    if error != EPERM:
        print('clone with', name, made, error)
AF_INET, AF_NETLINK, AF_PACKET, AF_VSOCK, RAW = 2, 16, 17, 40, 3
for name, domain, kind, protocol in (('raw', AF_INET, RAW, 1), ('packet', AF_PACKET, RAW, 0),
                                     ('vsock', AF_VSOCK, 1, 0)):
    made, error = result(41, domain, kind, protocol)
    if error != EPERM:
        print('socket', name, made, error)
";

/// The same kernel speaks two more dialects on this machine, with other numbers for the same calls.
pub const OTHER_CALLS: &str = "
import ctypes, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
made = libc.syscall(ctypes.c_long(0x40000000 | 39))
print('x32', 'denied' if made < 0 else made, flush=True)
# mov eax, 20 (getpid); int 0x80; ret
pid = os.fork()
if pid == 0:
    memory = mmap.mmap(-1, 4096, prot=7)
    memory.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')
    call = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
    os._exit(7 if call() == os.getpid() else 0)
status = os.waitpid(pid, 0)[1]
print('i386', 'made' if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 7 else 'denied')
";

/// Files of the kernel and of other processes that tell of the machine or change it.
pub const SWEEP: &str = "
import itertools, os
mine = {str(os.getpid()), 'self', 'thread-self'}
for entry in os.listdir('/proc'):
    if entry.isdigit() and entry not in mine:
        print('process', entry)
for path in ('/proc/1/environ', '/proc/1/mem', '/proc/1/maps', '/proc/1/fd', '/proc/1/root', '/proc/1/cwd',
             '/proc/kcore', '/proc/kmsg', '/sys/kernel', '/sys/fs/cgroup', '/sys/class/net', '/dev/mem', '/dev/kmsg',
             '/proc/%d/root/etc' % os.getppid()):
    try:
        os.listdir(path) if os.path.isdir(path) else os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        print('read', path)
    except OSError:
        pass
for path in ('/proc/sys/kernel/core_pattern', '/proc/sys/kernel/hostname', '/proc/sysrq-trigger', '/proc/self/oom_score_adj',
             '/proc/self/uid_map', '/sys/fs/cgroup/cgroup.procs', '/sys/fs/cgroup/memory/cgroup.procs'):
    try:
        open(path, 'ab').close()
        print('may write', path)
    except OSError:
        pass
def writable(top):
    for folder, _, names in os.walk(top):
        for path in [folder] + [os.path.join(folder, name) for name in names]:
            if not os.path.islink(path) and os.access(path, os.W_OK):
                yield path
for top in ('/etc', '/run', '/var', '/base', '/slots', '/scratch'):
    # One is one too many; on a machine there may be millions.
    for path in itertools.islice(writable(top), 100):
        print('may write', path)
";

/// `cargo test` sets variables that no run may see.
pub const ENVIRONMENTS: &str = "
import os
found = [name for name in os.environ if name.startswith(('CARGO', 'GANTRY', 'API_', 'AWS_', 'RUST'))]
for entry in os.listdir('/proc'):
    if entry.isdigit() or entry == 'self':
        try:
            text = open(f'/proc/{entry}/environ', 'rb').read()
        except OSError:
            continue
        found += [entry for word in (b'CARGO', b'API_KEY', b'TOKEN', b'AWS_') if word in text]
if found:
    print(found)
";

/// Programs that change who runs them, started: they must still be the slot's user.
pub const SETUID: &str = "
import ctypes, os, subprocess, time
libc = ctypes.CDLL(None)
for folder in ('/usr/bin', '/usr/sbin', '/bin', '/usr/lib'):
    for at, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(at, name)
            try:
                about = os.stat(path)
            except OSError:
                continue
            if about.st_mode & 0o6000 and os.statvfs(path).f_flag & 2 == 0:
                print('setuid works on', path)
# The control starts as root, which has nothing to gain.
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
def effective(pid):
    try:
        lines = open(f'/proc/{pid}/status').read().splitlines()
    except OSError:
        return 'hidden'
    return next(line.split()[2] for line in lines if line.startswith('Uid:'))
for path in ('/usr/bin/su', '/usr/bin/passwd'):
    if not os.path.exists(path):
        continue
    # It asks for a password, and so stays long enough to be looked at.
    asking = subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen = set()
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        seen.add(effective(asking.pid))
        time.sleep(0.005)
    # Not waited for: it takes its time over a password that is missing.
    asking.stdin.close()
    # The instant between fork and exec is this program's own.
    if seen - {str(os.getuid())}:
        print('gained by', path, seen)
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
if status['NoNewPrivs'].strip() != '1':
    print('may gain privileges')
for name in ('CapEff', 'CapPrm', 'CapInh', 'CapAmb'):
    if int(status[name], 16):
        print(name, status[name])
if 0 in os.getresuid() + os.getresgid() or os.getgroups():
    print('ids', os.getresuid(), os.getresgid(), os.getgroups())
for ids in (os.setuid, os.setgid):
    try:
        ids(0)
        print('became root')
    except OSError:
        pass
try:
    with open('copy', 'wb') as copy:
        copy.write(open('/bin/sh', 'rb').read())
    os.chmod('copy', 0o6755)
    out = subprocess.run(['./copy', '-p', '-c', 'id -u'], capture_output=True, text=True).stdout
    if out.strip() == '0':
        print('a copy is root')
except OSError:
    pass
try:
    os.chroot('/')
    print('chroot')
except OSError:
    pass
";

pub const DEVICES: &str = "
import os, stat, tempfile
folder = tempfile.mkdtemp()
for major, minor in ((1, 1), (1, 3), (8, 0)):
    path = f'{folder}/{major}-{minor}'
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
        print('made', path)
        os.unlink(path)
    except OSError:
        pass
os.rmdir(folder)
";

/// On the machine itself it is root that tries, and nothing is changed for good.
pub const WRITES: &str = "
import os
for folder in ('/', '/usr', '/usr/lib', '/etc', '/bin', '/run', '/run/gantry', '/var/tmp', '/dev', '/proc', '/proc/self', '/scratch', '/slots', '/base'):
    try:
        with open(folder + '/gantry-hostile', 'w'):
            print('wrote in', folder)
        os.unlink(folder + '/gantry-hostile')
    except OSError:
        pass
for path in ('/etc/passwd', '/run/gantry/sitecustomize.py', '/bin/sh'):
    changes = [lambda: open(path, 'a').close(), lambda: os.chmod(path, os.stat(path).st_mode & 0o7777)]
    if os.getuid() != 0:
        changes += [lambda: os.unlink(path), lambda: os.chmod(path, 0o777), lambda: os.rename(path, path + 'x')]
    for change in changes:
        try:
            change()
            print('changed', path)
        except OSError:
            pass
";

/// The test holds a key open in a way that survives an exec.
pub const LEFT_DESCRIPTORS: &str = "
import os
for fd in os.listdir('/proc/self/fd'):
    try:
        target = os.readlink('/proc/self/fd/' + fd)
    except OSError:
        continue
    if int(fd) > 2 and target != '/workspace/main.py' and not target.endswith('main.py'):
        print(fd, target)
";

/// Where clouds, clusters and neighbours are. Nothing here answers when it is blocked, so waits are
/// short; a host that is not there would show as a timeout, which is not an answer either.
pub const ADDRESSES: &str = "
import socket
for host, port in (('169.254.169.254', 80), ('fd00:ec2::254', 80), ('10.96.0.1', 443), ('172.17.0.1', 80),
                   ('192.168.0.1', 80), ('1.1.1.1', 53), ('2606:4700:4700::1111', 53), ('10.0.2.2', 22)):
    try:
        with socket.create_connection((host, port), 0.3):
            print('connected', host)
    except TimeoutError:
        print('connected?', host, 'has a route')
    except OSError:
        pass
for family in (socket.AF_INET, socket.AF_INET6):
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b'x', ('1.1.1.1' if family == socket.AF_INET else '2606:4700:4700::1111', 53))
            print('connected datagrams')
    except OSError:
        pass
";

/// What stands around the sandboxes in this test.
pub struct Surroundings {
    /// The platform's data folder, with a key in it.
    pub data: PathBuf,
    /// A port on the machine's loopback that listens.
    pub port: u16,
    /// An abstract unix socket of the machine that listens.
    pub name: String,
}

impl Surroundings {
    pub fn host_paths(&self) -> String {
        let data = self.data.display();
        format!(
            "
import os
for path in ('/etc/shadow', '/etc/machine-id', '/etc/ssh', '/root/.bashrc', '/root/.profile', '/home', '/var/log', '/boot', '/opt',
             '/var/lib', '/sys/kernel', '{data}', '{data}/keys', '{data}/sandboxes', '/base', '/slots', '/scratch'):
    try:
        os.listdir(path) if os.path.isdir(path) else open(path, 'rb').read(1)
        print(path)
    except OSError:
        pass
"
        )
    }

    pub fn connects_tcp(&self) -> String {
        format!(
            "
import socket
for host in ('127.0.0.1', 'localhost', '0.0.0.0', '::ffff:127.0.0.1'):
    try:
        with socket.create_connection((host, {}), 1):
            print('connected', host)
    except OSError:
        pass
",
            self.port
        )
    }

    pub fn connects_unix(&self) -> String {
        format!(
            "
import glob, os, socket
folder = '{}/sandboxes'
names = os.listdir(folder) if os.path.isdir(folder) else ['user-hostile-0', 'user-hostile-1']
for path in [f'{{folder}}/{{name}}/socket' for name in names] + ['/run/docker.sock', '/run/dbus/system_bus_socket']:
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(1)
            os.chdir(os.path.dirname(path))
            one.connect('socket')
            print('connected', path)
    except OSError:
        pass
",
            self.data.display()
        )
    }

    pub fn connects_abstract(&self) -> String {
        format!(
            "
import socket
try:
    with socket.socket(socket.AF_UNIX) as one:
        one.settimeout(1)
        one.connect('\\0{}')
        print('connected')
except OSError:
    pass
",
            self.name
        )
    }
}
