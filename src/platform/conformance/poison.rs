//! What one run may not do to those that follow it.

use anyhow::{Context, ensure};

use super::{Ended, Subject, finish, python, user};
use crate::model::Ending;
use crate::platform::Sessions;

/// As many runs as may be needed to meet each of a sandbox's slots again.
const FOLLOWING: usize = 12;

/// Attaches to its own folders what keeps everybody out, their owner too, and a word for the next.
const ATTACHES: &str = "
import os, struct, tempfile
NONE = 0xffffffff
entries = [(1, 0, NONE), (2, 7, 12345), (4, 0, NONE), (16, 0, NONE), (32, 0, NONE)]
rules = struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *entry) for entry in entries)
for folder in (os.getcwd(), tempfile.gettempdir(), '/dev/shm'):
    for name, value in (
        ('user.word', b'for the next'),
        ('system.posix_acl_default', rules),
        ('system.posix_acl_access', rules),
    ):
        try:
            os.setxattr(folder, name, value)
        except OSError:
            pass
    try:
        os.utime(folder, (1, 1))
        os.chmod(folder, 0)
    except OSError:
        pass
";

/// What is attached to its folders, beside what it may do in them.
const LOOKS: &str = "
import os, tempfile
found = []
for folder in (os.getcwd(), tempfile.gettempdir(), '/dev/shm'):
    if folder == '/dev/shm' and not os.access(folder, os.W_OK):
        continue
    try:
        found += os.listxattr(folder)
    except OSError:
        pass
    if os.stat(folder).st_atime == 1:
        found.append('a time')
    with open(os.path.join(folder, 'own'), 'w') as file:
        file.write('x')
    with open(os.path.join(folder, 'own')) as file:
        file.read()
print([name for name in found if not name.startswith('security.')])
";

/// Stops what it can, and takes the processor and the processor time of its parent.
const STOPS: &str = "
import os, resource, signal
for pid in (os.getppid(), 1):
    for act in (
        lambda: os.kill(pid, signal.SIGSTOP),
        lambda: os.kill(pid, signal.SIGTERM),
        lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGSTOP),
        lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (0, 0)),
        lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, 3)),
        lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
    ):
        try:
            act()
            print('done to', pid, act.__code__.co_names)
        except (OSError, ValueError):
            pass
";

/// Leaves ports of connections that have just ended, and a listener in the hands of a process that
/// nobody waits for.
const LEAVES_PORTS: &str = "
import os, socket
for port in range(3000, 3010):
    server = socket.socket()
    server.bind(('127.0.0.1', port))
    server.listen()
    caller = socket.create_connection(('127.0.0.1', port))
    taken, _ = server.accept()
    # The side that closes first keeps the port, for a minute.
    taken.close()
    caller.close()
if os.fork() == 0:
    os.setsid()
    while True:
        server.accept()
";

/// Takes the same ports, without a word about those that were just used.
const TAKES_PORTS: &str = "
import socket
for port in range(3000, 3010):
    server = socket.socket()
    server.bind(('127.0.0.1', port))
    server.listen()
print('taken')
";

async fn run(subject: &Subject, who: &str, code: &str) -> anyhow::Result<Ended> {
    let sessions = Sessions::new(subject.platform.clone());
    finish(&mut sessions.of(&user(who)).start(python(code))).await
}

/// The runs after `first` all write `expected`.
async fn follows(
    subject: &Subject,
    who: &str,
    first: &str,
    next: &str,
    expected: &str,
) -> anyhow::Result<()> {
    for number in 0..FOLLOWING {
        let attack = run(subject, who, first).await?;
        ensure!(attack.stdout.is_empty(), "run {number}: {attack:?}");
        let ended = run(subject, who, next).await.context("the next run")?;
        ensure!(
            ended.report.ending == Ending::Exited(0) && ended.stdout == expected.as_bytes(),
            "run {number} after it: {:?} {:?} {:?}",
            ended.report,
            String::from_utf8_lossy(&ended.stdout),
            String::from_utf8_lossy(&ended.stderr)
        );
    }
    Ok(())
}

pub async fn a_run_finds_its_folders_as_new(subject: &Subject) -> anyhow::Result<()> {
    follows(subject, "conform-attach", ATTACHES, LOOKS, "[]\n").await
}

pub async fn a_run_cannot_stop_the_next(subject: &Subject) -> anyhow::Result<()> {
    follows(subject, "conform-stop", STOPS, "print('next')", "next\n").await
}

pub async fn a_run_leaves_no_ports(subject: &Subject) -> anyhow::Result<()> {
    follows(
        subject,
        "conform-ports",
        LEAVES_PORTS,
        TAKES_PORTS,
        "taken\n",
    )
    .await
}
