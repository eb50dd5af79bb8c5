//! Agents and programs that are stopped, old, half dead or forgotten.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;

use gantry::model::{Ending, ReplId, UserId};
use gantry::platform::Sessions;
use gantry::platform::conformance::{Ended, finish, python};
use gantry::runner::wire::{FromRunner, Job, ToRunner, VERSION, frames};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

/// A program that serves until it is ended.
const SERVER: &str = "import http.server\nclass H(http.server.BaseHTTPRequestHandler):\n    \
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'here')\n    \
    def log_message(self, *a): pass\nhttp.server.HTTPServer(('127.0.0.1', 3000), H).serve_forever()\n";

struct Machine {
    platform: Arc<LocalPlatform>,
    store: DirectoryStore,
    sessions: Sessions,
    data: tempfile::TempDir,
}

impl Machine {
    async fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        let (platform, store) = platform(data.path()).await;
        Self::of(platform, store, data)
    }

    fn of(platform: Arc<LocalPlatform>, store: DirectoryStore, data: tempfile::TempDir) -> Self {
        Self {
            sessions: Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>),
            platform,
            store,
            data,
        }
    }

    async fn run(&self, user: &str, job: Job) -> Ended {
        let user: UserId = user.parse().unwrap();
        let mut run = self.sessions.of(&user).start(job);
        finish(&mut run).await.unwrap()
    }

    /// The folder of the sandbox whose name begins so.
    fn sandbox(&self, name: &str) -> PathBuf {
        let entries = std::fs::read_dir(self.data.path().join("sandboxes")).unwrap();
        let mut found = entries.flatten().map(|entry| entry.path()).filter(|path| {
            let own = path.file_name().unwrap().to_string_lossy().into_owned();
            own.starts_with(name) && path.join("process.json").exists()
        });
        found.next().unwrap_or_else(|| panic!("no sandbox {name}"))
    }

    fn first_process(&self, name: &str) -> i32 {
        let text = std::fs::read(self.sandbox(name).join("process.json")).unwrap();
        let recorded: serde_json::Value = serde_json::from_slice(&text).unwrap();
        i32::try_from(recorded["process"]["pid"].as_i64().unwrap()).unwrap()
    }

    async fn page(&self, repl: &ReplId) -> Option<String> {
        let mut stream = self.platform.dial(repl).await.ok()?;
        let request = b"GET / HTTP/1.0\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok()?;
        Some(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

/// Every process below this one.
fn descendants(of: i32) -> Vec<i32> {
    let mut all: Vec<(i32, i32)> = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((pid, rest)) = stat.split_once(" (") else {
            continue;
        };
        let parent = rest.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap();
        all.push((pid.parse().unwrap(), parent.parse().unwrap()));
    }
    let mut found = vec![of];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(
            all.iter()
                .filter(|(_, of)| *of == parent)
                .map(|(pid, _)| *pid),
        );
        next += 1;
    }
    found.split_off(1)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_agent_is_replaced_after_its_heartbeats_are_missed() {
    let machine = Machine::start().await;
    let user: UserId = "halted".parse().unwrap();
    drop(machine.platform.connect(&user).await.unwrap());
    let stopped = machine.first_process("user-halted");
    kill(stopped, rustix::process::Signal::STOP);
    let ended = machine.run("halted", python("print('again')")).await;
    assert_eq!(ended.report.ending, Ending::Exited(0));
    assert_ne!(machine.first_process("user-halted"), stopped);
    // Whoever adopted it may not have looked yet.
    let state = std::fs::read_to_string(format!("/proc/{stopped}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{state}");
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_version_is_replaced() {
    let machine = Machine::start().await;
    let user: UserId = "older".parse().unwrap();
    drop(machine.platform.connect(&user).await.unwrap());
    let before = machine.first_process("user-older");
    let socket = machine.sandbox("user-older").join("socket");
    std::fs::remove_file(&socket).unwrap();
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (_reader, mut writer) = frames(stream);
            let version = VERSION - 1;
            let _ = writer.send(&FromRunner::Hello { version }).await;
        }
    });
    let ended = machine.run("older", python("print('new')")).await;
    assert_eq!(ended.report.ending, Ending::Exited(0));
    assert_ne!(machine.first_process("user-older"), before);
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_waiting_interpreters_cost_no_run() {
    let machine = Machine::start().await;
    machine.run("parked", python("print(1)")).await;
    for round in 0..3 {
        let first = machine.first_process("user-parked");
        for pid in descendants(first) {
            kill(pid, rustix::process::Signal::KILL);
        }
        let ended = machine.run("parked", python("print('here')")).await;
        assert_eq!(ended.report.ending, Ending::Exited(0), "{round}");
        assert_eq!(ended.stdout, b"here\n");
    }
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_whose_supervisor_was_killed_comes_back() {
    let machine = Machine::start().await;
    let files = [("main.py".to_owned().try_into().unwrap(), SERVER.to_owned())].into();
    let spec = ReleaseSpec {
        user_id: "lasting".parse().unwrap(),
        repl_id: "lasting-prod".parse().unwrap(),
        submission_id: SubmissionId::new(),
        order: Order::now(),
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    let (repl, submission) = (&spec.repl_id, spec.submission_id);
    machine
        .store
        .publish(repl, submission, &files)
        .await
        .unwrap();
    machine.platform.ensure_release(&spec).await.unwrap();
    if machine
        .page(repl)
        .await
        .is_none_or(|page| !page.contains("here"))
    {
        println!("WEAKER: programs cannot listen here");
        return;
    }
    let before = machine.first_process("repl-lasting-prod");
    kill(before, rustix::process::Signal::KILL);
    let asked = Instant::now();
    let again = loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let page = machine.page(repl).await.unwrap_or_default();
        if page.contains("here") || asked.elapsed() > Duration::from_secs(20) {
            break page;
        }
    };
    assert!(again.contains("here"), "{again}");
    assert_eq!(machine.platform.releases(repl).await.unwrap().len(), 1);
    // What is stopped stays so.
    machine.platform.drop_repl(repl).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    assert!(machine.platform.dial(repl).await.is_err());
    machine.platform.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_of_a_repl_later_stands() {
    let machine = Machine::start().await;
    let files: BTreeMap<_, _> = [(
        "main.py".to_owned().try_into().unwrap(),
        "print(1)".to_owned(),
    )]
    .into();
    let repl: ReplId = "orders-prod".parse().unwrap();
    let spec = |order: Order| ReleaseSpec {
        user_id: "orders".parse().unwrap(),
        repl_id: repl.clone(),
        submission_id: SubmissionId::new(),
        order,
        tested: Tested::of(&files, &Tests::ExitCode),
        argv: vec!["python3".to_owned(), "main.py".to_owned()],
        env: BTreeMap::new(),
        database: false,
        serves: Serves::Unknown,
    };
    let release = async |spec: &ReleaseSpec| {
        let submission = spec.submission_id;
        machine
            .store
            .publish(&repl, submission, &files)
            .await
            .unwrap();
        machine.platform.ensure_release(spec).await
    };
    let [first, second, third, fourth] = std::array::from_fn(|n| {
        let time = jiff::Timestamp::UNIX_EPOCH;
        spec(Order::new(
            "journal",
            n as u64 + 1,
            time,
            format!("number {n}"),
        ))
    });
    release(&second).await.unwrap();
    let refused = release(&first).await.unwrap_err();
    assert_eq!(problem(&refused).code, "superseded", "{refused:?}");
    assert!(problem(&refused).cause.contains("number 1"), "{refused:?}");
    // Again what was made: it stays as it is.
    assert_eq!(release(&second).await.unwrap().release, 1);
    assert!(machine.platform.overtaken(&second).await.unwrap().is_none());
    let stop = Order::new(
        "journal",
        4,
        jiff::Timestamp::UNIX_EPOCH,
        "a stop".to_owned(),
    );
    machine.platform.ordered(&repl, &stop).await.unwrap();
    machine.platform.drop_repl(&repl).await.unwrap();
    assert!(machine.platform.overtaken(&third).await.unwrap().is_some());
    assert!(release(&third).await.is_err());
    // The record is on the disk.
    machine.platform.shutdown().await;
    let (platform, _) = platform(machine.data.path()).await;
    assert!(platform.ensure_release(&third).await.is_err());
    let later = spec(Order::new(
        "journal",
        5,
        jiff::Timestamp::UNIX_EPOCH,
        String::new(),
    ));
    assert!(platform.overtaken(&fourth).await.unwrap().is_none());
    let submission = later.submission_id;
    machine
        .store
        .publish(&repl, submission, &files)
        .await
        .unwrap();
    assert_eq!(platform.ensure_release(&later).await.unwrap().release, 2);
    // So does a rollback, and what was asked for before it is not made any more.
    let back = |position| {
        let time = jiff::Timestamp::UNIX_EPOCH;
        Order::new("journal", position, time, "a rollback".to_owned())
    };
    let refused = platform.rollback(&repl, None, &back(4)).await.unwrap_err();
    assert_eq!(problem(&refused).code, "superseded", "{refused:?}");
    let running = platform.rollback(&repl, None, &back(7)).await.unwrap();
    assert_eq!(running.release, 1);
    let between = spec(Order::new(
        "journal",
        6,
        jiff::Timestamp::UNIX_EPOCH,
        String::new(),
    ));
    let refused = platform.ensure_release(&between).await.unwrap_err();
    assert!(
        problem(&refused).cause.contains("a rollback"),
        "{refused:?}"
    );
    platform.shutdown().await;
}

fn problem(error: &gantry::platform::PlatformError) -> &gantry::model::Problem {
    match error {
        gantry::platform::PlatformError::NotReady(problem)
        | gantry::platform::PlatformError::Unavailable(problem) => problem,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_may_use_the_machines_network_where_that_is_allowed() {
    let data = tempfile::tempdir().unwrap();
    let (platform, store) = platform_with(data.path(), true).await;
    let machine = Machine::of(platform, store, data);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.write_all(b"from the machine").await;
        }
    });
    let code = format!(
        "import socket\ns = socket.create_connection(('127.0.0.1', {port}), 5)\nprint(s.makefile().read())\n\
         open('/etc/resolv.conf').read()\n"
    );
    let ended = machine.run("online", python(&code)).await;
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{said}");
    assert_eq!(ended.stdout, b"from the machine\n");
    machine.platform.shutdown().await;
}

/// The number under which a sandbox finds its listening socket.
const LISTENER: i32 = 3;

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_server_never_comes_back_ends_with_what_it_has_to_tell() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let scratch = folder.path().join("root/scratch");
    let agent = json!({
        "slots": 1, "first_uid": null, "ground": { "Folder": scratch }, "reach": [
            { "path": "/", "writable": true },
        ], "network": false, "networks": false, "secluded": false, "log_refused": false, "python": null,
        "path": "/usr/local/bin:/usr/bin:/bin", "peer": null, "idle_seconds": 1,
    });
    let spec = json!({
        "isolation": "None", "folder": folder.path().join("root"), "shown": [], "placed": [], "inside": [],
        "cgroups": [], "network": false, "role": { "Agent": agent },
    });
    let mut command = Command::new(env!("CARGO_BIN_EXE_gantry-runner"));
    let number = listener.as_raw_fd();
    command
        .arg("sandbox")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    // SAFETY: dup2 and fcntl are async-signal-safe, and the descriptor lives until the command is started.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(number, LISTENER) < 0 || libc::fcntl(LISTENER, libc::F_SETFD, 0) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    let text = serde_json::to_vec(&spec).unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &text).unwrap();
    let output = child.wait_with_output().unwrap();
    let made: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let pid = made["Pid"].as_i64().unwrap_or_else(|| panic!("{made}"));
    drop(listener);
    let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let (mut reader, mut writer) = frames(stream);
    writer
        .send(&ToRunner::Hello { version: VERSION })
        .await
        .unwrap();
    let job = python("print('nobody asks')");
    writer.send(&ToRunner::Start(Box::new(job))).await.unwrap();
    while !matches!(
        reader.next::<FromRunner>().await.unwrap(),
        FromRunner::Event {
            event: gantry::runner::wire::JobEvent::Ended(_),
            ..
        }
    ) {}
    // Nothing of it is acknowledged.
    drop((reader, writer));
    let asked = Instant::now();
    let is_there = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z")
    };
    while is_there() {
        assert!(asked.elapsed() < Duration::from_secs(5), "it stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
