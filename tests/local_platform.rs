//! The local platform, held to the contract of every platform, in each of its degrees of isolation.
//!
//! The weaker ones are what a server gets on a machine that gives it less. So the test starts itself
//! once more with less: as another user, or behind a filter that forbids namespaces.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "local_platform/agents.rs"]
mod agents;

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use gantry::model::{
    DiskBounds, Ending, Limits, Order, Reason, Serves, SubmissionId, Tested, Tests,
};
use gantry::platform::conformance::{Subject, all, finish, python};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::platform::{Finding, Platform, ReleaseSpec, Sessions};
use gantry::runner::client::RunEvent;
use gantry::storage::{CodeStore, DirectoryStore};

/// The test that a child process runs.
const SUITE: &str = "the_local_platform_keeps_the_contract";

/// Tells a child process where its copy of the runner is, which user it is to be, and what it is to
/// find out about isolation.
const RUNNER: &str = "GANTRY_TEST_RUNNER";
const EXPECTED: &str = "GANTRY_TEST_ISOLATION";

/// A user that owns nothing.
const NOBODY: u32 = 65_534;

/// The suite takes a few seconds; a minute for each of its promises is what a hung one may take.
const CHILD_PATIENCE: Duration = Duration::from_secs(300);

async fn platform(data: &Path) -> (Arc<LocalPlatform>, DirectoryStore) {
    platform_with(data, false).await
}

async fn platform_with(data: &Path, network: bool) -> (Arc<LocalPlatform>, DirectoryStore) {
    let store = DirectoryStore::open(data.join("store")).unwrap();
    let config = LocalConfig {
        data: data.to_owned(),
        runner: std::env::var_os(RUNNER)
            .unwrap_or_else(|| env!("CARGO_BIN_EXE_gantry-runner").into())
            .into(),
        runs_per_user: 4,
        maximum: Limits::MAXIMUM,
        network,
        packages: Default::default(),
        log_refused: false,
        drain: Duration::from_secs(10),
        sites: gantry::model::Sites::plain("apps.localhost:8000", "localhost:8000"),
        disk: DiskBounds::USUAL,
    };
    (
        Arc::new(LocalPlatform::start(config, store.clone()).await.unwrap()),
        store,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_platform_keeps_the_contract() {
    let data = tempfile::tempdir().unwrap();
    let (platform, store) = platform(data.path()).await;
    let checks = platform.checks();
    for check in &checks {
        println!("{check:?}");
    }
    if let Ok(expected) = std::env::var(EXPECTED) {
        let isolation = checks.iter().find(|check| check.name == "isolation");
        let found = format!("{:?}", isolation.unwrap().finding);
        assert_eq!(found, expected, "{checks:?}");
    }
    let subject = Subject {
        platform: Arc::clone(&platform) as Arc<dyn Platform>,
        store: Arc::new(store),
    };
    let result = all(&subject).await;
    if result.is_err() {
        for entry in std::fs::read_dir(data.path().join("sandboxes"))
            .unwrap()
            .flatten()
        {
            let log = std::fs::read_to_string(entry.path().join("runner.log")).unwrap_or_default();
            println!("--- {:?}\n{log}", entry.path());
        }
    }
    platform.shutdown().await;
    result.unwrap();
    let left = below(data.path());
    assert!(left.is_empty(), "processes are left behind: {left:?}");
}

/// Who is stopped while a program goes on, or does not.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Stopped {
    /// The processes that supervise it.
    Supervisor,
    /// All, as by a machine that sleeps.
    Everything,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ended_while_its_supervisor_was_stopped_is_not_out_of_time() {
    let data = tempfile::tempdir().unwrap();
    let (platform, _) = platform(data.path()).await;
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    for stopped in [Stopped::Supervisor, Stopped::Everything] {
        let session = sessions.of(&"paused".parse().unwrap());
        // One forked from the waiting interpreter, one started by itself, and one that has no end.
        let mut jobs = [
            python("import time; print('up', flush=True); time.sleep(1)"),
            python(""),
            python(""),
        ];
        for (job, code) in jobs[1..].iter_mut().zip(["sleep 1", "sleep 60"]) {
            job.files[0] = ("main.sh".to_owned(), format!("echo up; {code}"));
            job.argv = vec!["bash".to_owned(), "main.sh".to_owned()];
        }
        let mut runs = Vec::new();
        for mut job in jobs {
            job.limits.wall_ms = 2_000;
            runs.push(session.start(job));
        }
        for run in &mut runs {
            let up = tokio::time::timeout(Duration::from_secs(20), run.next()).await;
            assert!(matches!(up, Ok(RunEvent::Event { .. })), "{up:?}");
        }
        let these = those(stopped, data.path());
        assert!(!these.is_empty());
        let send = |signal| {
            for pid in &these {
                let _ = rustix::process::kill_process(*pid, signal);
            }
        };
        send(rustix::process::Signal::STOP);
        tokio::time::sleep(Duration::from_millis(2_500)).await;
        send(rustix::process::Signal::CONT);
        let mut endings = Vec::new();
        for mut run in runs {
            endings.push(finish(&mut run).await.unwrap().report.ending);
        }
        let expected = [
            Ending::Exited(0),
            Ending::Exited(0),
            Ending::Limit(Reason::Timeout),
        ];
        assert_eq!(endings, expected, "{stopped:?}");
    }
    platform.shutdown().await;
}

/// The processes of this folder's sandboxes that are to be stopped: their runners, which write to a log there.
fn those(stopped: Stopped, folder: &Path) -> Vec<rustix::process::Pid> {
    let all: Vec<(i32, i32)> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let (_, rest) = stat.rsplit_once(") ")?;
            Some((pid, rest.split(' ').nth(1)?.parse().ok()?))
        })
        .collect();
    let logs = |pid: &i32| {
        let stderr = std::fs::read_link(format!("/proc/{pid}/fd/2"));
        stderr.is_ok_and(|file| file.starts_with(folder))
    };
    let mut found: Vec<i32> = all.iter().map(|(pid, _)| *pid).filter(logs).collect();
    let mut next = if stopped == Stopped::Everything {
        0
    } else {
        found.len()
    };
    while let Some(parent) = found.get(next).copied() {
        let children = all.iter().filter(|(_, above)| *above == parent);
        let children: Vec<i32> = children.map(|(pid, _)| *pid).collect();
        found.extend(
            children
                .iter()
                .filter(|pid| !found.contains(pid))
                .collect::<Vec<_>>(),
        );
        next += 1;
    }
    let pids = found.into_iter();
    pids.filter_map(rustix::process::Pid::from_raw).collect()
}

/// One thread: what the start leaves to a task of its own runs after the submission is back.
#[tokio::test]
async fn a_submission_that_is_back_before_its_release_is_released_once() {
    let data = tempfile::tempdir().unwrap();
    let files = [(
        "main.py".to_owned().try_into().unwrap(),
        "print(1)".to_owned(),
    )]
    .into();
    let spec = ReleaseSpec {
        user_id: "back".parse().unwrap(),
        repl_id: "back-prod".parse().unwrap(),
        submission_id: SubmissionId::new(),
        order: Order::now(),
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    for _ in 0..2 {
        let (platform, store) = platform(data.path()).await;
        let (repl, submission) = (&spec.repl_id, spec.submission_id);
        store.publish(repl, submission, &files).await.unwrap();
        let running = platform.ensure_release(&spec).await.unwrap();
        assert_eq!(running.release, 1);
        assert_eq!(platform.releases(repl).await.unwrap().len(), 1);
        platform.dial(repl).await.unwrap();
        platform.shutdown().await;
    }
}

/// What listened while it was tested has to listen when it is released.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_listens_is_seen_to() {
    let data = tempfile::tempdir().unwrap();
    let (platform, _) = platform(data.path()).await;
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    let session = sessions.of(&"listens".parse().unwrap());
    for (does, expected) in [("listen()", true), ("getsockname()", false)] {
        let code = format!(
            "import socket, time\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.{does}\ntime.sleep(0.5)"
        );
        let ended = finish(&mut session.start(python(&code))).await.unwrap();
        assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
        // Without a network of its own a run cannot listen, and what does is not its.
        assert_eq!(ended.report.listened, expected, "{does}");
    }
    platform.shutdown().await;
}

#[test]
fn a_server_without_root_keeps_the_contract() {
    if !rustix::process::getuid().is_root() {
        println!("this test's user is not root: {SUITE} is this test already");
        return;
    }
    if !may_make_namespaces() {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "users other than root may not make namespaces here: kernel.apparmor_restrict_unprivileged_userns=0"
        );
        println!("WEAKER: users other than root may not make namespaces here");
        return;
    }
    Child::new().user(NOBODY).run(Finding::Weaker);
}

#[test]
fn a_server_without_namespaces_keeps_the_contract() {
    let child = Child::new().without_namespaces();
    match rustix::process::getuid().is_root() {
        true => child.user(NOBODY),
        false => child,
    }
    .run(Finding::Missing);
}

#[test]
fn a_server_with_root_and_without_namespaces_keeps_the_contract() {
    if rustix::process::getuid().is_root() {
        Child::new().without_namespaces().run(Finding::Missing);
    }
}

/// This test's program, about to run the suite as somebody with less power.
struct Child {
    folder: tempfile::TempDir,
    command: Command,
}

impl Child {
    fn new() -> Child {
        let folder = tempfile::tempdir().unwrap();
        let [program, runner, data] = ["suite", "runner", "data"].map(|n| folder.path().join(n));
        // Copies: where these programs are built may be closed to others.
        std::fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_gantry-runner"), &runner).unwrap();
        std::fs::create_dir(&data).unwrap();
        for path in [folder.path(), &program, &runner] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let mut command = Command::new(program);
        command
            .args(["--exact", SUITE, "--nocapture"])
            .env(RUNNER, runner)
            .env("TMPDIR", &data)
            .env("HOME", &data)
            .current_dir(&data)
            .stdin(Stdio::null());
        Child { folder, command }
    }

    fn user(mut self, id: u32) -> Child {
        chown(self.folder.path().join("data"), Some(id), Some(id)).unwrap();
        self.command.uid(id).gid(id);
        self
    }

    /// What container engines do to their containers by default.
    fn without_namespaces(mut self) -> Child {
        let filter = no_namespaces();
        // SAFETY: the closure makes system calls on values made before the fork.
        unsafe {
            self.command.pre_exec(move || {
                if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                seccompiler::apply_filter(&filter).map_err(|_| std::io::ErrorKind::Other.into())
            });
        }
        self
    }

    fn run(mut self, expected: Finding) {
        let out = std::fs::File::create(self.folder.path().join("out")).unwrap();
        self.command
            .env(EXPECTED, format!("{expected:?}"))
            .stdout(out.try_clone().unwrap())
            .stderr(out);
        let mut child = self.command.spawn().unwrap();
        let started = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break Some(status);
            }
            if started.elapsed() > CHILD_PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let said = std::fs::read(self.folder.path().join("out")).unwrap();
        let said = String::from_utf8_lossy(&said);
        let ran = said.contains("1 passed");
        assert!(
            ran && status.is_some_and(|status| status.success()),
            "the suite ended with {status:?}:\n{said}"
        );
        println!("{said}");
    }
}

fn no_namespaces() -> seccompiler::BpfProgram {
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    };
    let flag = u64::from(libc::CLONE_NEWUSER.unsigned_abs());
    let condition = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(flag),
        flag,
    );
    let rules = [
        (
            libc::SYS_clone,
            vec![SeccompRule::new(vec![condition.unwrap()]).unwrap()],
        ),
        (libc::SYS_unshare, Vec::new()),
        (libc::SYS_setns, Vec::new()),
        (libc::SYS_mount, Vec::new()),
    ];
    let eperm = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        eperm,
        arch,
    )
    .unwrap()
    .try_into()
    .unwrap()
}

/// Whether a user other than root may.
fn may_make_namespaces() -> bool {
    let mut command = Command::new("unshare");
    command.args(["--user", "--map-root-user", "--net", "true"]);
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    command.status().is_ok_and(|status| status.success())
}

/// Processes that work somewhere below this folder.
fn below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| {
            let cwd = std::fs::read_link(entry.path().join("cwd"));
            cwd.is_ok_and(|cwd| cwd.starts_with(folder))
        })
        .map(|entry| entry.path())
        .collect()
}
