//! The runner as first process of a container: the agent of a test pod, a released program, the copy
//! of a release. No cluster is needed; root is, to make something like a container.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "hostile/cases.rs"]
// Controls on the machine itself are the hostile suite's to make.
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod cases;
#[path = "runner_pod/container.rs"]
mod container;
#[path = "hostile/judge.rs"]
#[allow(dead_code, reason = "what else a pod's container shows is judged here")]
mod judge;
#[path = "hostile/programs.rs"]
mod programs;

use std::fs::File;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use cases::{Case, Control};
use container::{Attach, CAPABILITIES, Container, Privileges};
use gantry::model::{Ending, TicketKey};
use gantry::platform::conformance::{Ended, a_runs_memory_is_its_own, finish, python};
use gantry::runner::client::{RunEvent, Session};
use programs::Surroundings;

/// Longest wait for what takes milliseconds.
const SOON: Duration = Duration::from_secs(5);

/// Whether containers can be made here. Where results count they must.
fn can_make_containers() -> bool {
    if rustix::process::getuid().is_root() {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "start these tests as root: without it they prove nothing"
    );
    println!("WEAKER: left out, since only root can make containers");
    false
}

fn agent(variables: &[(&str, &str)]) -> Arc<Container> {
    let agent = Container::start("agent", &Privileges::agent(), variables, "").unwrap();
    assert!(agent.says("python:", SOON), "{}", agent.log());
    Arc::new(agent)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

async fn run(session: &Session, code: &str) -> Ended {
    finish(&mut session.start(python(code))).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_look_as_they_do_on_the_local_platform() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    println!("{}", agent.log());
    let session = Session::open(Attach(Arc::clone(&agent)));
    let code = "
import os, resource, sys
print(os.getcwd(), sys.argv, os.environ['HOME'], os.environ['TMPDIR'], sorted(os.environ))
print(resource.getrlimit(resource.RLIMIT_NPROC), resource.getrlimit(resource.RLIMIT_NOFILE))
for folder in ('/workspace', '/tmp', '/dev/shm'):
    open(folder + '/mine', 'w').write('x')
raise SystemExit(1 / 0)
";
    for round in 0..3 {
        let ended = run(&session, code).await;
        assert_eq!(ended.report.ending, Ending::Exited(1), "{ended:?}");
        let (out, err) = (text(&ended.stdout), text(&ended.stderr));
        let first = "/workspace ['main.py'] /workspace /tmp ['HOME', 'LANG', 'PATH', 'TMPDIR']\n";
        assert_eq!(
            out,
            format!("{first}(64, 64) (512, 512)\n"),
            "round {round}"
        );
        assert!(err.contains("File \"/workspace/main.py\", line 7"), "{err}");
    }
    assert!(!agent.log().contains("WEAKER"), "{}", agent.log());
    let mut job = python("");
    job.files[0] = ("main.sh".to_owned(), "id -u; echo $0; exit 7".to_owned());
    job.argv = vec!["bash".to_owned(), "main.sh".to_owned()];
    let ended = finish(&mut session.start(job)).await.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(7), "{ended:?}");
    let uid: u32 = text(&ended.stdout).lines().next().unwrap().parse().unwrap();
    assert!(uid >= 0x7800_0000, "user code is user {uid}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_opens_its_own_streams_by_name() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    // The links in /dev are for the container's runtime to make.
    let mut job = python(
        "base = '/proc/self/fd/'\nprint(open(base + '0').read(), flush=True)\nprint('out', file=open(base + '1', 'w'))\nprint('err', file=open(base + '2', 'w'))",
    );
    job.stdin = b"given".to_vec();
    let ended = finish(&mut session.start(job.clone())).await.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
    assert_eq!(text(&ended.stdout), "given\nout\n");
    assert_eq!(text(&ended.stderr), "err\n");
    job.id.run += 1;
    job.argv = [
        "bash",
        "-c",
        "cat /proc/self/fd/0 >/proc/self/fd/1; echo err >/proc/self/fd/2",
    ]
    .map(str::to_owned)
    .to_vec();
    let ended = finish(&mut session.start(job)).await.unwrap();
    assert_eq!(text(&ended.stdout), "given", "{ended:?}");
    assert_eq!(text(&ended.stderr), "err\n");
}

/// What user code would try against the runner. Each line it prints is a success.
const AGAINST_THE_RUNNER: &str = r#"
import ctypes, os, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
def attempt(name, act):
    try:
        act()
        print(name)
    except OSError:
        pass
def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), 'failed')
attempt('connects', lambda: socket.socket(socket.AF_UNIX).connect('/run/gantry/agent/socket'))
attempt('lists its folder', lambda: os.listdir('/run/gantry/agent'))
attempt('reads its environment', lambda: open('/proc/1/environ', 'rb').read())
attempt('reads its memory map', lambda: open('/proc/1/maps', 'rb').read())
attempt('opens its memory', lambda: open('/proc/1/mem', 'rb'))
attempt('lists its descriptors', lambda: os.listdir('/proc/1/fd'))
attempt('goes through its root', lambda: os.listdir('/proc/1/root/run/gantry/agent'))
attempt('signals it', lambda: os.kill(1, signal.SIGCONT))
attempt('traces it', lambda: check(libc.ptrace(16, 1, 0, 0)))
attempt('writes beside it', lambda: open('/run/new', 'w'))
attempt('changes the interpreter in waiting', lambda: open('/run/gantry/hook/sitecustomize.py', 'a'))
attempt('writes to the image', lambda: open('/usr/new', 'w'))
attempt('lowers its own place in the queue for memory', lambda: open('/proc/self/oom_score_adj', 'w').write('0'))
attempt('becomes root', lambda: os.setuid(0))
attempt('puts a socket in its place', lambda: os.rename('/run/gantry/agent', '/run/gantry/old'))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn user_code_cannot_reach_the_runner() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    for _ in 0..2 {
        let ended = run(&session, AGAINST_THE_RUNNER).await;
        assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
        assert_eq!(text(&ended.stdout), "", "{ended:?}");
    }
    // The control: with root's power, in the same place, all of it succeeds but writing to the
    // image, which nobody can.
    let said = agent
        .as_root(&["python3", "-c", AGAINST_THE_RUNNER])
        .output()
        .unwrap();
    let said = text(&said.stdout);
    for attempt in [
        "connects",
        "lists its folder",
        "puts a socket in its place",
        "reads its environment",
        "reads its memory map",
        "opens its memory",
        "lists its descriptors",
        "goes through its root",
        "signals it",
        "traces it",
        "writes beside it",
        "changes the interpreter in waiting",
        "lowers its own place",
        "becomes root",
    ] {
        assert!(said.contains(attempt), "not even root {attempt}: {said}");
    }
}

/// Puts a file into its home that a Python which starts reads before all else, waits, and prints which
/// users' waiting interpreters have read it; with `control`, after one of its own did.
const HOME_TRAP: &str = r#"
import os, subprocess, sys, time
os.umask(0)
os.chmod('/workspace', 0o777)
packages = '.local/lib/python%d.%d/site-packages' % sys.version_info[:2]
os.makedirs(packages)
with open(packages + '/trap.pth', 'w') as trap:
    trap.write("import os; 'GANTRY_WARM_FD' in os.environ and open('/workspace/who', 'a').write('%d ' % os.getuid())\n")
if 'control' in sys.argv:
    subprocess.run([sys.executable, '-c', ''], env={**os.environ, 'GANTRY_WARM_FD': '-1'})
if 'wait' in sys.argv:
    time.sleep(0.3)
print(open('who').read() if os.path.exists('who') else 'nobody')
"#;

#[tokio::test(flavor = "multi_thread")]
async fn no_interpreter_of_the_runners_reads_what_is_in_a_runs_home() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let ask = async |argument: &str| {
        let mut job = python(HOME_TRAP);
        job.argv.push(argument.to_owned());
        let ended = finish(&mut session.start(job)).await.unwrap();
        assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
        text(&ended.stdout)
    };
    let own = ask("control").await;
    assert!(own.trim().parse::<u32>().unwrap() > 0, "{own}");
    // An interpreter is replaced after 256 forks.
    for number in 0..270 {
        let who = ask(if number > 240 { "wait" } else { "" }).await;
        assert_eq!(who, "nobody\n", "in run {number}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runs_memory_is_not_the_agents() {
    if can_make_containers() {
        let session = Session::open(Attach(agent(&[])));
        a_runs_memory_is_its_own(&session).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_ends_while_the_agent_is_stopped_is_not_out_of_time() {
    use rustix::process::{Pid, Signal, kill_process};
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let mut job = python("import time; print('up', flush=True); time.sleep(1)");
    job.limits.wall_ms = 2_000;
    let mut run = session.start(job);
    let up = tokio::time::timeout(SOON, run.next()).await;
    assert!(matches!(up, Ok(RunEvent::Event { .. })), "{up:?}");
    let runner = Pid::from_raw(agent.runner).unwrap();
    kill_process(runner, Signal::STOP).unwrap();
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    kill_process(runner, Signal::CONT).unwrap();
    let ended = finish(&mut run).await.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_runners_own_user_may_attach() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    // Even where the folder is opened, the agent looks at who calls.
    let open = ["chmod", "755", "/run/gantry/agent"];
    assert!(agent.as_root(&open).status().unwrap().success());
    let open = ["chmod", "777", "/run/gantry/agent/socket"];
    assert!(agent.as_root(&open).status().unwrap().success());
    let probe = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('/run/gantry/agent/socket')\ns.settimeout(5)\nprint(len(s.recv(100)) > 0)";
    let as_user = |id: &str| {
        let user = ["setpriv", "--reuid", id, "--regid", id, "--clear-groups"];
        let command = [&user[..], &["python3", "-c", probe]].concat();
        text(&agent.as_root(&command).output().unwrap().stdout)
    };
    assert_eq!(as_user("1234"), "False\n", "the agent greets anybody");
    assert_eq!(as_user("0"), "True\n", "the control: root is not greeted");
    assert!(agent.says("another user", SOON), "{}", agent.log());
}

#[test]
fn the_agent_needs_each_of_its_capabilities_and_says_which_is_missing() {
    if !can_make_containers() {
        return;
    }
    for missing in CAPABILITIES {
        let mut privileges = Privileges::agent();
        privileges.capabilities.retain(|name| name != missing);
        let mut agent = Container::start("agent", &privileges, &[], "").unwrap();
        assert_eq!(
            agent.ended(SOON),
            Some(1),
            "without {missing}: {}",
            agent.log()
        );
        assert!(
            agent.log().contains(&missing.to_uppercase()),
            "{}",
            agent.log()
        );
    }
    let mut agent = Container::start("agent", &Privileges::nothing(), &[], "").unwrap();
    assert_eq!(agent.ended(SOON), Some(1), "{}", agent.log());
    assert!(agent.log().contains("runAsUser: 0"), "{}", agent.log());
}

#[test]
fn what_the_agent_cannot_work_with_is_named() {
    if !can_make_containers() {
        return;
    }
    let wrong = [
        ("GANTRY_ALLOW_NETWORK", "perhaps", "true or false"),
        ("GANTRY_SLOT_UID", "0", "must not be root"),
        ("GANTRY_SCRATCH_FILES", "many", "a number of files"),
    ];
    for (name, value, expected) in wrong {
        let variables = [(name, value)];
        let mut agent = Container::start("agent", &Privileges::agent(), &variables, "").unwrap();
        assert_eq!(agent.ended(SOON), Some(1), "{}", agent.log());
        let log = agent.log();
        assert!(log.contains(name) && log.contains(expected), "{log}");
    }
    let unmounted = "umount /workspace";
    let mut agent = Container::start("agent", &Privileges::agent(), &[], unmounted).unwrap();
    assert_eq!(agent.ended(SOON), Some(1), "{}", agent.log());
    assert!(agent.log().contains("/workspace") && agent.log().contains("emptyDir"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_is_a_good_first_process() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    // Orphans of orphans, which only the first process can collect.
    let code = "
import os
for _ in range(20):
    if os.fork() == 0:
        for _ in range(2):
            if os.fork() == 0:
                os._exit(0)
        os._exit(0)
print('done')
";
    assert_eq!(run(&session, code).await.stdout, b"done\n");
    assert_eq!(run(&session, "print(1)").await.stdout, b"1\n");
    let zombies = || {
        let output = agent
            .as_root(&["sh", "-c", "cat /proc/[0-9]*/stat"])
            .output();
        let stat = text(&output.unwrap().stdout);
        stat.lines().filter(|line| line.contains(") Z ")).count()
    };
    assert_eq!(zombies(), 0);
    let mut sleeper = session.start(python(
        "print('up', flush=True)\nimport time\ntime.sleep(60)",
    ));
    sleeper.next().await;
    let (mut attached, _stdin, _stdout) = agent.attach().unwrap();
    let asked = Instant::now();
    // SAFETY: a signal to the process that this test has started.
    unsafe { libc::kill(agent.runner, libc::SIGTERM) };
    let there = format!("/proc/{}", agent.runner);
    while std::path::Path::new(&there).exists() {
        assert!(asked.elapsed() < SOON, "{}", agent.log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    println!("ended after {:?}", asked.elapsed());
    assert!(attached.wait().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn attach_ends_with_either_side_and_stops_nothing() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let mut counting = session.start(python(
        "import time\nfor i in range(10):\n    print(i, flush=True)\n    time.sleep(0.1)",
    ));
    for half in ["stdin", "stdout"] {
        let (mut child, stdin, stdout) = agent.attach().unwrap();
        let started = Instant::now();
        if half == "stdin" {
            drop(stdin);
            assert!(child.wait().unwrap().success());
            drop(stdout);
        } else {
            drop(stdout);
            // It meets the closed pipe when it has something to say: the greeting.
            assert!(child.wait().unwrap().success());
            drop(stdin);
        }
        assert!(started.elapsed() < SOON, "{half}: {:?}", started.elapsed());
    }
    let ended = finish(&mut counting).await.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
    assert_eq!(text(&ended.stdout).lines().count(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_survives_the_end_of_its_stream() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let code = "import time\nfor i in range(40):\n    print(i, flush=True)\n    time.sleep(0.05)";
    let mut counting = session.start(python(code));
    let cutter = tokio::task::spawn_blocking({
        let agent = Arc::clone(&agent);
        move || {
            (0..3)
                .map(|_| {
                    std::thread::sleep(Duration::from_millis(400));
                    let cut = "for p in /proc/[0-9]*; do grep -qz '^attach$' $p/cmdline && kill -9 ${p#/proc/} && echo cut; done";
                    text(&agent.as_root(&["bash", "-c", cut]).output().unwrap().stdout)
                })
                .collect::<String>()
        }
    });
    let ended = finish(&mut counting).await.unwrap();
    let expected: String = (0..40).map(|i| format!("{i}\n")).collect();
    assert_eq!(text(&ended.stdout), expected);
    assert_eq!(cutter.await.unwrap(), "cut\n".repeat(3));
}

#[tokio::test(flavor = "multi_thread")]
async fn folders_of_any_mode_are_cleared() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    // Only its owner may remove something from a folder with the sticky bit, whoever may write to it.
    let code = "
import os
for top in ('/workspace', '/tmp', '/dev/shm'):
    os.makedirs(top + '/a/b/c')
    open(top + '/a/b/c/file', 'w').close()
    for folder in ('/a/b/c', '/a/b', '/a'):
        os.chmod(top + folder, 0o1000)
    os.chmod(top, 0o1000)
";
    for _ in 0..2 {
        let ended = run(&session, code).await;
        assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
        nothing_is_left(&session, &agent).await.unwrap();
    }
}

#[test]
fn attach_without_an_agent_says_so_in_time() {
    if !can_make_containers() {
        return;
    }
    let variables = [("GANTRY_APP_ARGV", r#"["sleep", "60"]"#)];
    let other = Container::start("app", &Privileges::nothing(), &variables, "").unwrap();
    let started = Instant::now();
    let attach = other
        .as_root(&["/srv/gantry-runner", "attach"])
        .output()
        .unwrap();
    println!("{} after {:?}", text(&attach.stderr), started.elapsed());
    assert!(!attach.status.success());
    assert!(started.elapsed() < Duration::from_secs(15));
    let said = text(&attach.stderr);
    assert!(
        said.contains("no agent listens") && said.contains("log"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn setuid_programs_gain_nothing() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let own = run(&session, "import os\nprint(os.getuid())").await;
    let code = "import subprocess\nsubprocess.run(['/srv/id-as-root', '-u'])";
    let ended = run(&session, code).await;
    assert_eq!(text(&ended.stdout), text(&own.stdout), "{ended:?}");
    // The control: the same program for another user who may gain privileges.
    let user = [
        "setpriv",
        "--reuid",
        "1234",
        "--regid",
        "1234",
        "--clear-groups",
    ];
    let command = [&user[..], &["/srv/id-as-root", "-u"]].concat();
    let said = agent.as_root(&command).output().unwrap();
    assert_eq!(text(&said.stdout), "0\n");
}

/// A case that says of the local platform's mounts what a container does otherwise; see
/// [`setuid_programs_gain_nothing`].
const ANOTHER_WAY: &str = "setuid programs";

#[tokio::test(flavor = "multi_thread")]
async fn hostile_programs_end_as_they_should() {
    if !can_make_containers() {
        return;
    }
    let agent = agent(&[]);
    let session = Session::open(Attach(Arc::clone(&agent)));
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("gantry-runner-pod-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let data = tempfile::tempdir().unwrap();
    let surroundings = Surroundings {
        data: data.path().to_owned(),
        port: tcp.local_addr().unwrap().port(),
        name,
    };
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let word = std::env::var("GANTRY_TEST_CASE").unwrap_or_default();
    let mut failures = Vec::new();
    let runner = agent.runner;
    for case in cases::all(full, &surroundings) {
        if !case.name.contains(&word) || case.name == ANOTHER_WAY {
            continue;
        }
        let started = Instant::now();
        let mut result = check(&session, &case).await;
        if result.is_ok() {
            result = nothing_is_left(&session, &agent).await;
        }
        judge::tell(&case, started.elapsed(), result, &mut failures);
    }
    let alive = std::path::Path::new(&format!("/proc/{runner}")).exists();
    assert!(alive, "the runner ended: {}", agent.log());
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{}\n{}",
        failures.len(),
        failures.join("\n"),
        agent.log()
    );
}

async fn check(session: &Session, case: &Case) -> anyhow::Result<()> {
    let ended = judge::run(session, case, case.limits).await?;
    let said = text(&ended.stderr).chars().take(800).collect::<String>();
    // Internet sockets cannot even be made.
    let no_sockets = case.name == "metadata and other addresses"
        && ended.report.ending == Ending::Exited(1)
        && said.contains("PermissionError");
    ensure!(
        no_sockets || case.endings.contains(&ended.report.ending),
        "ended with {:?}; expected {:?}; stderr: {said}",
        ended.report,
        case.endings
    );
    // Other processes are there to be seen in a container, and nothing in them to be read.
    let stdout = match case.name.as_str() {
        "sweep of /proc and /sys" => text(&ended.stdout)
            .lines()
            .filter(|line| !line.starts_with("process "))
            .map(|line| format!("{line}\n"))
            .collect::<String>()
            .into_bytes(),
        _ => ended.stdout.clone(),
    };
    if let Some(output) = case.output {
        output(&stdout, &ended.stderr).map_err(|why| anyhow::anyhow!("{why}; stderr: {said}"))?;
    }
    judge::check_report(case, &ended)?;
    if let Control::Limits(limits) = &case.control {
        let ended = judge::run(session, case, *limits).await?;
        ensure!(
            ended.report.ending == Ending::Exited(0),
            "the control, with the guard off, ended with {:?}",
            ended.report
        );
    }
    Ok(())
}

async fn nothing_is_left(session: &Session, agent: &Container) -> anyhow::Result<()> {
    let code = "
import os
print('hello', [sorted(os.listdir(f)) for f in ('/workspace', '/tmp', '/dev/shm')])
";
    let ended = finish(&mut session.start(python(code))).await?;
    let said = text(&ended.stdout);
    ensure!(
        ended.report.ending == Ending::Exited(0) && said == "hello [['main.py'], [], []]\n",
        "the next hello: {:?} {said} {}",
        ended.report,
        text(&ended.stderr)
    );
    ensure!(!agent.log().contains("given up"), "{}", agent.log());
    Ok(())
}

/// A program's release: the container of a released pod.
fn released(code: &str, variables: &[(&str, &str)]) -> Container {
    prepared(code, variables, "")
}

/// The same, after these commands of a shell.
fn prepared(code: &str, variables: &[(&str, &str)], commands: &str) -> Container {
    let prepare = format!(
        "cat > /workspace/main.py <<'END'\n{code}\nEND\nip link set lo up\nip addr add 198.18.0.7/32 dev lo\n{commands}"
    );
    let argv = ("GANTRY_APP_ARGV", r#"["python3", "main.py"]"#);
    let variables = [&[argv], variables].concat();
    Container::start("app", &Privileges::nothing(), &variables, &prepare).unwrap()
}

/// What `GET path` on this address of the container answers: the status line and the body.
fn get(container: &Container, address: &str, path: &str) -> (String, String) {
    let code = format!(
        "import http.client\nc = http.client.HTTPConnection('{address}', timeout=5)\nc.request('GET', '{path}')\nr = c.getresponse()\nprint(r.status)\nprint(r.read().decode())"
    );
    let output = container
        .as_root(&["python3", "-c", &code])
        .output()
        .unwrap();
    let said = text(&output.stdout);
    let (status, body) = said.split_once('\n').unwrap_or(("", ""));
    (status.to_owned(), body.trim_end().to_owned())
}

fn comes_to(container: &Container, address: &str, path: &str, status: &str) -> String {
    let deadline = Instant::now() + 2 * SOON;
    loop {
        let (found, body) = get(container, address, path);
        if found == status {
            return body;
        }
        assert!(
            Instant::now() < deadline,
            "{address}{path} is {found:?} {body}: {}",
            container.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

const SERVER: &str = r#"
import http.server, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/crash':
            os._exit(9)
        if self.path == '/runner':
            found = [os.environ.get('SECRET', '')] + [n for n in os.environ if n.startswith(('AWS_', 'GANTRY_', 'S3_'))]
            for name in ('environ', 'maps', 'mem'):
                try:
                    open('/proc/1/' + name, 'rb').read(1)
                    found.append(name)
                except OSError:
                    pass
            body = repr(found).encode()
        else:
            body = b'served'
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
def stop(*args):
    print('asked to stop')
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print('starting up')
http.server.HTTPServer((ADDRESS, 3000), Handler).serve_forever()
"#;

#[test]
fn a_released_program_gets_the_port_and_its_pod_says_how_it_is() {
    if !can_make_containers() {
        return;
    }
    let secret = [
        ("SECRET", "mine"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("S3_BUCKET", "x"),
    ];
    let mut pod = released(&format!("ADDRESS = '0.0.0.0'{SERVER}"), &secret);
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    assert_eq!(get(&pod, "198.18.0.7:3000", "/").1, "served");
    let state = get(&pod, "127.0.0.1:3001", "/state").1;
    assert!(state.contains(r#""state":"serving""#), "{state}");
    assert_eq!(get(&pod, "127.0.0.1:3001", "/live").0, "200");
    // The rest of this port is for whoever has a ticket, and this pod was given no key for any.
    for path in ["/else", "/", "/files", "/files/main.py"] {
        assert_eq!(get(&pod, "127.0.0.1:3001", path).0, "401", "{path}");
    }
    assert_eq!(get(&pod, "198.18.0.7:3002", "/").1, "served");
    assert_eq!(get(&pod, "127.0.0.1:3000", "/runner").1, "['mine']");
    // It crashes after it served: the page, then again.
    get(&pod, "127.0.0.1:3000", "/crash");
    let page = comes_to(&pod, "198.18.0.7:3000", "/", "502");
    assert!(
        !page.contains("exit code") && !page.contains("starting up"),
        "{page}"
    );
    assert_eq!(get(&pod, "198.18.0.7:3002", "/").0, "502");
    assert_eq!(get(&pod, "127.0.0.1:3001", "/ready").0, "503");
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    assert_eq!(get(&pod, "198.18.0.7:3000", "/").1, "served");
    let state = get(&pod, "127.0.0.1:3001", "/state").1;
    assert!(state.contains(r#""restarts":1"#), "{state}");
    assert!(pod.log().contains("starting up"), "{}", pod.log());
    // SAFETY: a signal to the process that this test has started.
    unsafe { libc::kill(pod.runner, libc::SIGTERM) };
    let asked = Instant::now();
    assert_eq!(pod.ended(SOON), Some(0), "{}", pod.log());
    println!("ended after {:?}", asked.elapsed());
    assert!(pod.log().contains("asked to stop"), "{}", pod.log());
}

#[test]
fn a_program_on_loopback_is_reached_from_outside() {
    if !can_make_containers() {
        return;
    }
    // An address that is the pod's own: what a route to somewhere else starts from.
    let pod = released(&format!("ADDRESS = '127.0.0.1'{SERVER}"), &[]);
    let link = "ip link add name eth0 type veth peer name eth1 && ip addr add 198.18.0.8/24 dev eth0 && ip link set eth0 up && ip link set eth1 up && ip route add default via 198.18.0.1";
    assert!(pod.as_root(&["sh", "-c", link]).status().unwrap().success());
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    assert_eq!(comes_to(&pod, "198.18.0.8:3000", "/", "200"), "served");
    // The control: the program itself does not listen there.
    assert_eq!(get(&pod, "198.18.0.7:3000", "/").0, "");
}

#[test]
fn a_program_that_ends_is_shown_and_one_that_fails_ends_its_pod() {
    if !can_make_containers() {
        return;
    }
    let pod = released("print('Hello & <goodbye>')", &[]);
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    let page = comes_to(&pod, "198.18.0.7:3000", "/", "200");
    assert!(page.contains("Hello &amp; &lt;goodbye&gt;"), "{page}");
    let state = get(&pod, "127.0.0.1:3001", "/state").1;
    assert!(
        state.contains(r#""state":"ended","exit_code":0"#),
        "{state}"
    );
    for (code, expected) in [
        ("import sys\nsys.exit('no good')", 1),
        ("raise SystemExit(7)", 7),
        ("import os\nos.kill(os.getpid(), 9)", 137),
    ] {
        let mut pod = released(code, &[]);
        assert_eq!(pod.ended(2 * SOON), Some(expected), "{}", pod.log());
    }
    let said = |code: &str| {
        let mut pod = released(&format!("import sys, time\ntime.sleep(0.5)\n{code}"), &[]);
        let log = File::open(pod.path("/dev/termination-log")).unwrap();
        pod.ended(2 * SOON);
        std::io::read_to_string(log).unwrap()
    };
    let word = said("sys.exit('no good')");
    assert!(
        word.contains("ended with exit code 1") && word.contains("no good"),
        "{word}"
    );
}

#[test]
fn the_owner_of_a_failed_program_sees_what_it_wrote() {
    if !can_make_containers() {
        return;
    }
    let key = TicketKey::new([7; 32]);
    let repl = "shop".parse().unwrap();
    let word = key.text();
    let secret = [
        ("GANTRY_REPL", "shop"),
        ("GANTRY_RUNNER_KEY", word.as_str()),
    ];
    let pod = released(&format!("ADDRESS = '0.0.0.0'{SERVER}"), &secret);
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    get(&pod, "127.0.0.1:3000", "/crash");
    let owners = format!("/?ticket={}", key.issue(&repl, u64::MAX));
    let page = comes_to(&pod, "198.18.0.7:3002", &owners, "502");
    assert!(
        page.contains("exit code 9") && page.contains("starting up"),
        "{page}"
    );
}

#[test]
fn a_program_that_has_to_listen_serves_when_it_does() {
    if !can_make_containers() {
        return;
    }
    let declared = |serves| [("GANTRY_SERVES", serves)];
    let begun = Instant::now();
    let slow = format!("import time\ntime.sleep(6)\nADDRESS = '0.0.0.0'{SERVER}");
    let pods = ["yes", "unknown"].map(|serves| released(&slow, &declared(serves)));
    let worker = released("import time\ntime.sleep(600)", &declared("no"));
    let elsewhere = SERVER.replace("3000", "5000");
    let mut elsewhere = released(
        &format!("ADDRESS = '127.0.0.1'{elsewhere}"),
        &declared("yes"),
    );
    let log = File::open(elsewhere.path("/dev/termination-log")).unwrap();
    while begun.elapsed() < Duration::from_millis(5_500) {
        for pod in &pods {
            assert_ne!(get(pod, "127.0.0.1:3001", "/ready").0, "200");
        }
    }
    for pod in &pods {
        comes_to(pod, "127.0.0.1:3001", "/ready", "200");
        assert_eq!(get(pod, "198.18.0.7:3002", "/").1, "served");
    }
    comes_to(&worker, "127.0.0.1:3001", "/ready", "200");
    assert_eq!(elsewhere.ended(6 * SOON), Some(124), "{}", elsewhere.log());
    let words = std::io::read_to_string(log).unwrap();
    assert!(words.contains("it listens on 127.0.0.1:5000"), "{words}");
}

#[test]
fn a_program_on_any_local_address_is_reached() {
    if !can_make_containers() {
        return;
    }
    for address in ["'::1'", "'198.18.0.7'"] {
        let family = "import http.server, socket\nhttp.server.HTTPServer.address_family = socket.AF_INET6 if ':' in ADDRESS else socket.AF_INET";
        let pod = released(&format!("ADDRESS = {address}\n{family}{SERVER}"), &[]);
        comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
        assert_eq!(get(&pod, "127.0.0.1:3002", "/").1, "served", "{address}");
    }
}

#[test]
fn a_released_pod_answers_what_it_was_asked_before_it_ends() {
    if !can_make_containers() {
        return;
    }
    let slow = SERVER.replace(
        "            body = b'served'",
        "            import time; time.sleep(2); body = b'served'",
    );
    let mut pod = released(&format!("ADDRESS = '0.0.0.0'{slow}"), &[]);
    comes_to(&pod, "127.0.0.1:3001", "/ready", "200");
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| get(&pod, "198.18.0.7:3002", "/"));
        std::thread::sleep(Duration::from_millis(800));
        // SAFETY: a signal to the process that this test has started.
        unsafe { libc::kill(pod.runner, libc::SIGTERM) };
        assert_eq!(asked.join().unwrap().1, "served");
    });
    assert_eq!(pod.ended(2 * SOON), Some(0), "{}", pod.log());
    assert!(pod.log().contains("asked to stop"), "{}", pod.log());
}

/// The container's output is a pipe that is full, which nobody reads: as a busy node's log.
const FULL: &str =
    "mkfifo -m 666 /run/log\nexec 3<>/run/log\nhead -c 65536 /dev/zero >&3\nexec >&3 3>&-";

#[test]
fn a_workspaces_links_empty_folders_and_execute_bits_are_put_back_once() {
    if !can_make_containers() {
        return;
    }
    let code = "import os\nprint(os.readlink('inside'), os.access('bin/run', os.X_OK), os.path.isdir('empty/deep'), sorted(os.listdir()))";
    let extras = r#"{"folders":["empty/deep"],"links":{"inside":"bin/run","outside":"/etc"},"executable":["bin/run"]}"#;
    let commands = format!(
        "mkdir /workspace/bin\necho > /workspace/bin/run\necho '{extras}' > /workspace/.gantry-workspace.json\nchown -R 1000 /workspace"
    );
    let stays = [("GANTRY_WORKSPACE", "1")];
    let pod = prepared(code, &stays, &commands);
    let page = comes_to(&pod, "198.18.0.7:3002", "/", "200");
    let expected = "bin/run True True ['bin', 'empty', 'inside', 'main.py']";
    assert!(
        page.replace("&#x27;", "'").contains(expected),
        "{page} {}",
        pod.log()
    );
    assert!(pod.log().contains("outside"), "{}", pod.log());
    // Of a release these are no more than files that nobody asked for.
    let pod = prepared("import os\nprint(os.listdir('.'))", &[], &commands);
    let page = comes_to(&pod, "198.18.0.7:3002", "/", "200");
    assert!(page.contains("bin") && !page.contains("inside"), "{page}");
    assert!(!page.contains("gantry-workspace"), "{page}");
}

#[test]
fn what_a_program_wrote_is_shown_however_late_its_log_is_taken() {
    if !can_make_containers() {
        return;
    }
    let pod = prepared("print('Hello')", &[], FULL);
    let log = pod.path("/run/log");
    let reader = std::thread::spawn(move || {
        // The program has ended long ago.
        std::thread::sleep(Duration::from_secs(1));
        let mut taken = vec![0; (64 << 10) + "Hello\n".len()];
        std::io::Read::read_exact(&mut File::open(log).unwrap(), &mut taken).unwrap();
        taken
    });
    let page = comes_to(&pod, "198.18.0.7:3000", "/", "200");
    assert!(page.contains("<pre>Hello"), "{page}");
    assert!(reader.join().unwrap().ends_with(b"Hello\n"));
}

#[test]
fn a_program_that_ignores_the_request_to_end_is_made_to() {
    if !can_make_containers() {
        return;
    }
    let code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up')\ntime.sleep(600)";
    let mut pod = released(code, &[]);
    assert!(pod.says("up", SOON), "{}", pod.log());
    // SAFETY: a signal to the process that this test has started.
    unsafe { libc::kill(pod.runner, libc::SIGTERM) };
    let asked = Instant::now();
    assert_eq!(pod.ended(2 * SOON), Some(0), "{}", pod.log());
    println!("ended after {:?}", asked.elapsed());
    assert!(asked.elapsed() > Duration::from_secs(5) && asked.elapsed() < Duration::from_secs(8));
}

#[test]
fn a_released_pod_without_a_program_says_what_is_expected() {
    if !can_make_containers() {
        return;
    }
    for (value, expected) in [
        ("", "not set"),
        ("python3 main.py", "JSON list"),
        ("[]", "JSON list"),
    ] {
        let variables = [("GANTRY_APP_ARGV", value)];
        let mut pod = Container::start("app", &Privileges::nothing(), &variables, "").unwrap();
        assert_eq!(pod.ended(SOON), Some(1), "{}", pod.log());
        assert!(
            pod.log().contains("GANTRY_APP_ARGV") && pod.log().contains(expected),
            "{}",
            pod.log()
        );
    }
    let variables = [("GANTRY_APP_ARGV", r#"["no-such-program"]"#)];
    let mut pod = Container::start("app", &Privileges::nothing(), &variables, "").unwrap();
    assert_eq!(pod.ended(SOON), Some(127), "{}", pod.log());
    assert!(pod.log().contains("no-such-program"), "{}", pod.log());
}
