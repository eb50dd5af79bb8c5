//! The command line against a real server: the programs as they are built, a data folder of their
//! own, a free port.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

const KEY: &str = "an-admin-key-for-the-command-line-tests";
/// Longest life of one command; a deploy on a busy machine takes a few seconds.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest start of the server on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest stop of the server before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// A server of this test's own.
struct Server {
    folder: TempDir,
    port: u16,
    child: Child,
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let child = spawn_server(folder.path(), port);
        let server = Self {
            folder,
            port,
            child,
        };
        server.wait_until_ready();
        server
    }

    fn wait_until_ready(&self) {
        let begun = Instant::now();
        while !self.answers() {
            if begun.elapsed() > START_TIMEOUT {
                let log = fs::read_to_string(self.folder.path().join("server.log"));
                panic!("the server does not start: {}", log.unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether `/readyz` says so.
    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else {
            return false;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let request = format!(
            "GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: close\r\n\r\n",
            self.port
        );
        let mut line = String::new();
        stream.write_all(request.as_bytes()).is_ok()
            && BufReader::new(stream).read_line(&mut line).is_ok()
            && line.contains(" 200 ")
    }

    /// kill -9, and a new server on the same data folder and port.
    fn crash_and_restart(&mut self, away: Duration) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::thread::sleep(away);
        self.child = spawn_server(self.folder.path(), self.port);
        self.wait_until_ready();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
        command
            .args(args)
            .env("GANTRY_SERVER", format!("http://127.0.0.1:{}", self.port))
            .env("GANTRY_DATA_DIR", self.folder.path().join("data"))
            .env("GANTRY_USER", "test")
            .env("API_KEY", KEY)
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Ran {
        finish(start(&mut self.command(args)))
    }

    /// The same without `GANTRY_USER`.
    fn run_as(&self, key: &str, args: &[&str]) -> Ran {
        finish(start(
            self.command(args)
                .env("API_KEY", key)
                .env_remove("GANTRY_USER"),
        ))
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.folder.path().join("work").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Asked first: only the server itself can end what runs in its sandboxes.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < STOP_TIMEOUT {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn_server(folder: &Path, port: u16) -> Child {
    let log = File::options()
        .create(true)
        .append(true)
        .open(folder.join("server.log"))
        .unwrap();
    Command::new(env!("CARGO_BIN_EXE_gantry"))
        .arg("serve")
        .env("HOST", "127.0.0.1")
        .env("PORT", port.to_string())
        .env("GANTRY_DATA_DIR", folder.join("data"))
        .env("GANTRY_RUNNER", env!("CARGO_BIN_EXE_gantry-runner"))
        .env("API_KEY", KEY)
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// How a command ended.
#[derive(Debug)]
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    fn json_lines(&self) -> Vec<Value> {
        self.stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }
}

fn start(command: &mut Command) -> Child {
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for the end, which comes after [`COMMAND_TIMEOUT`] at the latest.
fn finish(child: Child) -> Ran {
    let pid = Pid::from_child(&child);
    let (ended, watch) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if watch.recv_timeout(COMMAND_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            let _ = kill_process(pid, Signal::KILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    watchdog.join().unwrap();
    Ran {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Waits for the first line that says this, and gives all that came before it.
fn wait_for_line(reader: &mut impl BufRead, what: &str) -> String {
    let mut text = String::new();
    while !text.contains(what) {
        assert_ne!(
            reader.read_line(&mut text).unwrap(),
            0,
            "ended before {what:?}: {text}"
        );
    }
    text
}

#[test]
fn bad_code_exits_1_with_its_traceback_on_standard_error() {
    let server = Server::start();
    let bad = server.file("bad.py", "print('before')\nraise ValueError('bad code')\n");
    let ran = server.run(&["submit", &bad]).exits(1);
    assert_eq!(ran.stdout, "before\n");
    assert!(
        ran.stderr.contains("Traceback (most recent call last)"),
        "{ran:#?}"
    );
    assert!(ran.stderr.contains("ValueError: bad code"), "{ran:#?}");
    assert!(ran.stderr.contains("tests failed: exit code 1"), "{ran:#?}");
    assert!(
        !ran.stderr.contains('\x1b'),
        "colours only on a terminal: {ran:#?}"
    );

    let forever = server.file("forever.py", "while True: pass\n");
    let ran = server.run(&["submit", &forever, "--cpu", "1s"]).exits(1);
    assert!(
        ran.stderr.contains("more than 1.00 s of processor (--cpu"),
        "{ran:#?}"
    );

    let ran = server.run(&["submit", &forever, "--wall", "10m"]).exits(1);
    assert!(
        ran.stderr.contains("invalid") && ran.stderr.contains("wall_ms"),
        "{ran:#?}"
    );
}

#[test]
fn good_code_is_deployed_listed_and_rolled_back() {
    let server = Server::start();
    let url = format!("http://test-prod.apps.localhost:{}/", server.port);
    let one = server.file("one.py", "print('Hello')\n");
    let ran = server.run(&["submit", &one]).exits(0);
    assert_eq!(ran.stdout, "Hello\n");
    assert!(ran.stderr.contains(&url), "{ran:#?}");
    for step in ["receive", "test", "publish", "deploy", "ready"] {
        assert!(
            ran.stderr.contains(&format!("✓ {step}")),
            "no {step}: {ran:#?}"
        );
    }
    let two = server.file("two.py", "print('Bye')\n");
    server.run(&["submit", &two]).exits(0);

    let ran = server.run(&["ps"]).exits(0);
    let row: Vec<&str> = ran
        .stdout
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(row[..2], ["test-prod", "test"], "{ran:#?}");
    assert!(
        ran.stdout.contains("exited(0)") && ran.stdout.contains(&url),
        "{ran:#?}"
    );
    let repls: Value = serde_json::from_str(&server.run(&["ps", "-o", "json"]).stdout).unwrap();
    assert_eq!(repls[0]["release"], 2);

    let ran = server.run(&["rollback", "test-prod"]).exits(0);
    assert_eq!(ran.stdout, format!("{url}\n"));
    assert!(ran.stderr.contains("release 1"), "{ran:#?}");
    server.run(&["rollback", "test-prod", "2"]).exits(0);
    let ran = server.run(&["rollback", "test-prod", "99"]).exits(1);
    assert!(ran.stderr.contains("no such release"), "{ran:#?}");
    let ran = server.run(&["rollback", "nobodys"]).exits(1);
    assert!(ran.stderr.contains("no such repl"), "{ran:#?}");

    let token = server.file("token", "hush\n");
    let secret = format!("TOKEN={token}");
    let env = ["repl", "env", "test-prod"];
    let set = [
        &env[..],
        &[
            "--set",
            "COLOUR=red",
            "--set",
            "SIZE=2",
            "--secret",
            &secret,
        ],
    ]
    .concat();
    let ran = server.run(&set).exits(0);
    assert_eq!(ran.stdout, "COLOUR=red\nSIZE=2\nTOKEN (secret)\n");
    let ran = server
        .run(&[&env[..], &["--unset", "SIZE"]].concat())
        .exits(0);
    assert_eq!(ran.stdout, "COLOUR=red\nTOKEN (secret)\n");
    assert_eq!(server.run(&env).exits(0).stdout, ran.stdout);
    let ran = server
        .run(&[&env[..], &["--set", "PORT=1"]].concat())
        .exits(1);
    assert!(ran.stderr.contains("PORT is set by Gantry"), "{ran:#?}");
    let ran = server
        .run(&["repl", "domains", "test-prod", "--add", "x.apps.localhost"])
        .exits(1);
    assert!(ran.stderr.contains("domains[0]"), "{ran:#?}");
    assert_eq!(
        server
            .run(&["repl", "domains", "test-prod"])
            .exits(0)
            .stdout,
        ""
    );
    server.run(&["repl", "scale", "test-prod", "1"]).exits(0);
    // A machine alone has one of each; the answer says where more can be had.
    let more = [
        "repl",
        "scale",
        "test-prod",
        "--max",
        "5",
        "--cpu-percent",
        "70",
    ];
    let ran = server.run(&more).exits(3);
    assert!(ran.stderr.contains("one replica here"), "{ran:#?}");
    server.run(&["repl", "scale", "test-prod"]).exits(2);
}

#[test]
fn json_is_every_frame_in_order_and_the_reply_last() {
    let server = Server::start();
    let app = server.file(
        "app.py",
        "print('a')\nimport sys\nprint('b', file=sys.stderr)\n",
    );
    let ran = server
        .run(&["submit", &app, "--no-deploy", "--json"])
        .exits(0);
    let frames = ran.json_lines();
    let seqs: Vec<u64> = frames
        .iter()
        .map(|frame| frame["seq"].as_u64().unwrap())
        .collect();
    assert_eq!(seqs, (1..=frames.len() as u64).collect::<Vec<_>>());
    let (reply, events) = frames.split_last().unwrap();
    assert!(
        events.iter().all(|event| event["event"].is_string()),
        "{ran:#?}"
    );
    assert_eq!(reply["status"], "tests_passed");
    assert_eq!(reply["namespace"], "user-test");
    assert_eq!(
        (&reply["stdout"], &reply["stderr"]),
        (&"a\n".into(), &"b\n".into())
    );
    assert_eq!(ran.stderr, "");
}

#[test]
fn code_comes_from_a_folder_or_standard_input_with_arguments_input_and_variables() {
    let server = Server::start();
    server.file(
        "shop/main.py",
        "from lib import prices\nprint(prices.TOTAL)\n",
    );
    server.file("shop/lib/prices.py", "TOTAL = 42\n");
    server.file("shop/.git/config", "not sent");
    let folder = server.folder.path().join("work/shop");
    let ran = server
        .run(&["submit", folder.to_str().unwrap(), "--no-deploy"])
        .exits(0);
    assert_eq!(ran.stdout, "42\n");
    assert!(ran.stderr.contains("tests passed"), "{ran:#?}");

    let mut child = start(
        server
            .command(&["submit", "-", "--no-deploy"])
            .stdin(Stdio::piped()),
    );
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"print('piped')")
        .unwrap();
    assert_eq!(finish(child).exits(0).stdout, "piped\n");

    let echo = server.file(
        "echo.sh",
        "read -r line\necho \"$1 $COLOUR $line\"\nread -r more || echo 'no more'\n",
    );
    let input = server.file("input.txt", "from a file\n");
    let line = [
        "submit",
        &echo,
        "--no-deploy",
        "--arg",
        "-x",
        "--env",
        "COLOUR=red",
        "--stdin",
        &input,
    ];
    assert_eq!(
        server.run(&line).exits(0).stdout,
        "-x red from a file\nno more\n"
    );
}

#[test]
fn what_is_typed_while_a_program_runs_reaches_it() {
    let server = Server::start();
    let greet = server.file(
        "greet.py",
        "print('name?', flush=True)\nprint('hello', input(), flush=True)\nimport sys\nprint(repr(sys.stdin.read()))\n",
    );
    let mut child = start(
        server
            .command(&["submit", &greet, "--no-deploy", "--interactive"])
            .stdin(Stdio::piped()),
    );
    let mut output = BufReader::new(child.stdout.take().unwrap());
    wait_for_line(&mut output, "name?");
    let mut input = child.stdin.take().unwrap();
    input.write_all("Zoë\n".as_bytes()).unwrap();
    wait_for_line(&mut output, "hello Zoë");
    input.write_all(b"rest").unwrap();
    drop(input);
    wait_for_line(&mut output, "'rest'");
    finish(child).exits(0);
    // Without it nothing is waited for, as nobody is there to type.
    let child = start(
        server
            .command(&["submit", &greet, "--no-deploy"])
            .stdin(Stdio::piped()),
    );
    let ran = finish(child).exits(1);
    assert!(ran.stderr.contains("EOFError"), "{ran:#?}");
}

#[test]
fn tests_are_cases_or_files_and_failures_are_shown() {
    let server = Server::start();
    let app = server.file("app.py", "print(sum(map(int, input().split())))\n");
    let cases = server.file(
        "cases.json",
        r#"[{"name":"adds","stdin":"1 2\n","expected_stdout":"3\n"},
            {"name":"adds more","stdin":"1 2 3\n","expected_stdout":"7\n"}]"#,
    );
    let ran = server
        .run(&["submit", &app, "--no-deploy", "--tests", &cases])
        .exits(1);
    assert!(ran.stderr.contains("✓ adds "), "{ran:#?}");
    assert!(ran.stderr.contains("✗ adds more"), "{ran:#?}");
    assert!(
        ran.stderr
            .contains("expected \"7\\n\"\n    actual   \"6\\n\""),
        "{ran:#?}"
    );
    assert!(ran.stderr.contains("1 of 2 tests"), "{ran:#?}");

    let library = server.file("double.py", "def double(x):\n    return x * 2\n");
    let good = server.file(
        "test_double.py",
        "import double\ndef test_two():\n    assert double.double(1) == 2\n",
    );
    let ran = server
        .run(&["submit", &library, "--no-deploy", "--tests", &good])
        .exits(0);
    assert!(ran.stderr.contains("test_two"), "{ran:#?}");
    let bad = server.file(
        "test_wrong.py",
        "import double\ndef test_three():\n    assert double.double(1) == 3\n",
    );
    let ran = server
        .run(&[
            "submit",
            &library,
            "--no-deploy",
            "--tests",
            &good,
            "--tests",
            &bad,
        ])
        .exits(1);
    assert!(
        ran.stderr.contains("test_three") && ran.stderr.contains("1 of 2 tests"),
        "{ran:#?}"
    );
}

#[test]
fn a_run_outlives_the_server_and_nothing_is_shown_twice() {
    let mut server = Server::start();
    let counting =
        "import time\nfor i in range(30):\n    print(i, flush=True)\n    time.sleep(0.1)\n";
    let app = server.file("count.py", counting);
    let mut child = start(&mut server.command(&["submit", &app, "--no-deploy"]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut shown = wait_for_line(&mut stdout, "5\n");
    server.crash_and_restart(Duration::from_millis(500));
    std::io::Read::read_to_string(&mut stdout, &mut shown).unwrap();
    let ran = finish(child).exits(0);
    let expected: String = (0..30).map(|i| format!("{i}\n")).collect();
    assert_eq!(shown, expected);
    assert!(ran.stderr.contains("connection lost"), "{ran:#?}");
    assert!(ran.stderr.contains("tests passed"), "{ran:#?}");
}

#[test]
fn what_was_typed_into_a_server_that_died_reaches_the_program() {
    let mut server = Server::start();
    let app = server.file(
        "lines.py",
        "import sys\nprint('up', flush=True)\nfor line in sys.stdin: print('got', line, end='', flush=True)\nprint('end')\n",
    );
    let mut child = start(
        server
            .command(&[
                "submit",
                &app,
                "--no-deploy",
                "--interactive",
                "--wall",
                "60s",
            ])
            .stdin(Stdio::piped()),
    );
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut input = child.stdin.take().unwrap();
    wait_for_line(&mut output, "up");
    input.write_all(b"one\n").unwrap();
    let mut shown = wait_for_line(&mut output, "got one\n");
    // A server that stands still reads nothing of what the connection takes.
    kill_process(Pid::from_child(&server.child), Signal::STOP).unwrap();
    input.write_all("zwölf\n".as_bytes()).unwrap();
    drop(input);
    // Long enough for the command to read both and send them.
    std::thread::sleep(Duration::from_secs(1));
    server.crash_and_restart(Duration::from_millis(500));
    output.read_to_string(&mut shown).unwrap();
    let ran = finish(child).exits(0);
    assert_eq!(shown, "got one\ngot zwölf\nend\n", "{ran:#?}");
    assert!(ran.stderr.contains("connection lost"), "{ran:#?}");
}

#[test]
fn ctrl_c_cancels_the_submission() {
    let server = Server::start();
    let app = server.file(
        "sleep.py",
        "import time\nprint('on', flush=True)\ntime.sleep(50)\n",
    );
    let mut child = start(&mut server.command(&["submit", &app, "--wall", "60s"]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    wait_for_line(&mut stdout, "on\n");
    let pressed = Instant::now();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ran = finish(child).exits(130);
    assert!(
        pressed.elapsed() < Duration::from_secs(5),
        "{:?}",
        pressed.elapsed()
    );
    assert!(ran.stderr.contains("cancelled"), "{ran:#?}");
}

#[test]
fn a_repl_is_started_entered_and_stopped() {
    let mut server = Server::start();
    let files = server.folder.path().join("data/store/code/shop");
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("main.py"), "print('Hello')").unwrap();
    let ran = server.run(&["start", "shop"]).exits(0);
    assert!(
        ran.stdout.starts_with("http://shop.apps.localhost"),
        "{ran:?}"
    );
    assert!(ran.stderr.contains("is started"), "{ran:?}");
    let ran = server.run(&["start", "shop", "--language", "python"]);
    assert!(ran.exits(0).stderr.contains("was running"));
    let ran = server.run(&["start", "shop", "--language", "cobol"]);
    assert!(ran.exits(1).stderr.contains("python"));
    let ran = server.run(&["shell", "shop"]).exits(2);
    assert!(ran.stderr.contains("terminal"), "{ran:?}");

    let mut window = Window::open(&server, &["shell", "shop"]);
    window.types("echo $((6*7)) grüße; stty size\n");
    window.shows("42 grüße");
    window.shows("33 99");
    window.types("\u{1d}");
    assert_eq!(window.ended(), Some(0));
    assert!(window.seen().contains("comes back"), "{}", window.seen());
    // Taken up where it was left.
    let mut window = Window::open(&server, &["shell", "shop"]);
    window.shows("42 grüße");
    // Waited for while the server is away; what ran in it went with the server.
    server.crash_and_restart(Duration::from_millis(500));
    window.shows("connection lost");
    window.types_until("echo ba'ck'\n", "back");
    window.types("exit 7\n");
    assert_eq!(window.ended(), Some(7));
    server.run(&["restart", "shop"]).exits(0);
    server.run(&["stop", "shop"]).exits(0);
    let ran = server.run(&["ps"]).exits(0);
    assert!(ran.stdout.contains("stopped"), "{ran:?}");
    let mut window = Window::open(&server, &["shell", "shop"]);
    assert_eq!(window.ended(), Some(1));
    assert!(
        window.seen().contains("gantry start shop"),
        "{}",
        window.seen()
    );
}

#[test]
fn a_repl_is_deleted_when_its_name_is_typed() {
    let server = Server::start();
    let files = server.folder.path().join("data/store/code/shop");
    fs::create_dir_all(&files).unwrap();
    fs::write(files.join("main.py"), "print('Hello')").unwrap();
    server.run(&["start", "shop"]).exits(0);
    let answer = |typed: &str| {
        let mut command = server.command(&["repl", "delete", "shop"]);
        let mut child = start(command.stdin(Stdio::piped()));
        child
            .stdin
            .take()
            .unwrap()
            .write_all(typed.as_bytes())
            .unwrap();
        finish(child)
    };
    let ran = answer("shopp\n").exits(2);
    assert!(ran.stderr.contains("1 file, 0 releases"), "{ran:?}");
    assert!(files.exists());
    answer("shop\n").exits(0);
    assert!(!files.exists());
    let ran = server.run(&["start", "shop"]).exits(3);
    assert!(ran.stderr.contains("no files"), "{ran:?}");
    let ran = server.run(&["ps"]).exits(0);
    assert!(!ran.stdout.contains("shop"), "{ran:?}");
    let ran = server.run(&["repl", "delete", "shop", "--yes"]).exits(1);
    assert!(ran.stderr.contains("repl"), "{ran:?}");
}

/// A command in a terminal of 99 columns and 33 rows.
struct Window {
    child: Child,
    master: File,
    seen: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Window {
    fn open(server: &Server, args: &[&str]) -> Self {
        let size = libc::winsize {
            ws_row: 33,
            ws_col: 99,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let (mut master, mut slave) = (0, 0);
        let none = std::ptr::null_mut();
        // SAFETY: both descriptors are written by the call, and owned by nobody else.
        let (master, slave) = unsafe {
            let opened = libc::openpty(&mut master, &mut slave, none, none.cast(), &raw const size);
            assert_eq!(opened, 0);
            (File::from_raw_fd(master), File::from_raw_fd(slave))
        };
        // Only the command holds its side: its end is seen.
        rustix::io::fcntl_setfd(&master, rustix::io::FdFlags::CLOEXEC).unwrap();
        let mut command = server.command(args);
        let child = command
            .stdin(slave.try_clone().unwrap())
            .stdout(slave.try_clone().unwrap())
            .stderr(slave)
            .spawn()
            .unwrap();
        drop(command);
        let seen: std::sync::Arc<std::sync::Mutex<Vec<u8>>> = std::sync::Arc::default();
        let (mut reader, kept) = (master.try_clone().unwrap(), std::sync::Arc::clone(&seen));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                let mut kept = kept.lock().unwrap();
                kept.extend_from_slice(&buffer[..length]);
            }
        });
        Self {
            child,
            master,
            seen,
        }
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen.lock().unwrap()).into_owned()
    }

    fn types(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    #[track_caller]
    fn shows(&self, text: &str) {
        let begun = Instant::now();
        while !self.seen().contains(text) {
            assert!(
                begun.elapsed() < START_TIMEOUT,
                "no {text:?}: {}",
                self.seen()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types it again and again: what is typed while there is no connection goes nowhere.
    #[track_caller]
    fn types_until(&mut self, typed: &str, shown: &str) {
        let begun = Instant::now();
        while !self.seen().contains(shown) {
            assert!(
                begun.elapsed() < START_TIMEOUT,
                "no {shown:?}: {}",
                self.seen()
            );
            self.types(typed);
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    fn ended(&mut self) -> Option<i32> {
        let begun = Instant::now();
        while begun.elapsed() < COMMAND_TIMEOUT {
            if let Some(status) = self.child.try_wait().unwrap() {
                // What it said last is still on its way.
                std::thread::sleep(Duration::from_millis(100));
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("it does not end: {}", self.seen());
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn logs_are_searched_followed_and_piped() {
    let server = Server::start();
    let app = server.file("app.py", "print('a needle in here')\n");
    let frames = server
        .run(&["submit", &app, "--no-deploy", "--json"])
        .exits(0)
        .json_lines();
    let id = frames.last().unwrap()["submission_id"]
        .as_str()
        .unwrap()
        .to_owned();
    // Records are searchable a moment after they are on disk.
    let begun = Instant::now();
    let ran = loop {
        let ran = server
            .run(&["logs", "-q", "needle", "--since", "5m"])
            .exits(0);
        if ran.stdout.contains("a needle in here") || begun.elapsed() > Duration::from_secs(10) {
            break ran;
        }
    };
    assert!(
        ran.stdout.contains("output.stdout") && ran.stdout.contains(&id),
        "{ran:#?}"
    );
    assert_eq!(server.run(&["logs", "-q", "haystack"]).exits(0).stdout, "");
    let ran = server
        .run(&["logs", "--submission", &id, "-o", "json"])
        .exits(0);
    let records = ran.json_lines();
    assert!(records.len() > 3, "{ran:#?}");
    assert!(
        records
            .iter()
            .all(|record| record["gantry.submission_id"] == id.as_str()),
        "{ran:#?}"
    );
    let ran = server.run(&["logs", "-n", "2", "-o", "json"]).exits(0);
    assert_eq!(ran.json_lines().len(), 2);
    assert_eq!(
        ran.json_lines()[1]["event.action"],
        records.last().unwrap()["event.action"]
    );

    let mut child = start(&mut server.command(&["logs", "-f", "-n", "1"]));
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let app = server.file("later.py", "print('something later')\n");
    server.run(&["submit", &app, "--no-deploy"]).exits(0);
    wait_for_line(&mut stdout, "something later");
    // Nobody reads any more: it ends by itself, quietly, at the next record.
    drop(stdout);
    server.run(&["submit", &app, "--no-deploy"]).exits(0);
    assert_eq!(finish(child).exits(0).stderr, "");
}

#[test]
fn keys_open_what_they_are_for_until_they_are_revoked() {
    let server = Server::start();
    let app = server.file("app.py", "print('Hello')\n");
    let made = server
        .run(&["key", "create", "--user", "ada", "-o", "json"])
        .exits(0);
    let made: Value = serde_json::from_str(&made.stdout).unwrap();
    let (id, key) = (made["id"].as_str().unwrap(), made["key"].as_str().unwrap());
    let submit = ["submit", &app, "--no-deploy", "--json"];
    // The running server reads the key store once a second.
    let begun = Instant::now();
    let ran = loop {
        let ran = server.run_as(key, &submit);
        if ran.code == Some(0) || begun.elapsed() > Duration::from_secs(10) {
            break ran.exits(0);
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(
        ran.json_lines().last().unwrap()["namespace"],
        "user-ada",
        "the key's own user"
    );
    let other = server
        .run_as(key, &["submit", &app, "--user", "bob"])
        .exits(1);
    assert!(other.stderr.contains("user_id"), "{other:#?}");
    let listed = server.run(&["key", "list"]).exits(0);
    assert!(
        listed.stdout.contains(id) && !listed.stdout.contains(key),
        "{listed:#?}"
    );

    let key_file = server.file("key", &format!("{key}\n"));
    server
        .run_as(
            "",
            &["submit", &app, "--no-deploy", "--key-file", &key_file],
        )
        .exits(0);

    server.run(&["key", "revoke", id]).exits(0);
    let begun = Instant::now();
    while server.run_as(key, &["ps"]).code != Some(3) {
        assert!(
            begun.elapsed() < Duration::from_secs(10),
            "the key still works"
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn what_cannot_work_is_said_with_a_remedy() {
    let server = Server::start();
    let app = server.file("app.py", "print('Hello')\n");
    for args in [
        &["submit", &app][..],
        &["submit", &app, "--user", "test"],
        &["ps"],
        &["logs"],
    ] {
        let ran = server.run_as("a-key-that-is-wrong", args).exits(3);
        assert!(
            ran.stderr.contains("key") && ran.stderr.contains("API_KEY"),
            "{ran:#?}"
        );
        assert_eq!(ran.stdout, "");
    }
    let ran = server.run_as("", &["ps"]).exits(2);
    assert!(ran.stderr.contains("there is no key"), "{ran:#?}");
    let ran = server
        .run(&["submit", &app, "--server", "http://127.0.0.1:1"])
        .exits(3);
    assert!(ran.stderr.contains("cannot be reached"), "{ran:#?}");
    for wrong in [
        &["submit", "/nowhere/app.py"][..],
        &["submit", &app, "--server", "ftp://x"],
        &["submit", &app, "--language", "cobol"],
        &["submit", &app, "--memory", "lots"],
        &["logs", "--since", "yesterday"],
    ] {
        let ran = server.run(wrong).exits(2);
        assert!(!ran.stderr.is_empty(), "{ran:#?}");
    }
    let big = server.file("big.py", &"#".repeat(2 << 20));
    assert!(
        server
            .run(&["submit", &big])
            .exits(2)
            .stderr
            .contains("too big")
    );
}

#[test]
fn the_backend_check_passes_here_and_fails_without_a_server() {
    let server = Server::start();
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts/test_backend.py");
    let check = |port: u16| {
        let mut command = Command::new("python3");
        command
            .arg(&script)
            .arg("--url")
            .arg(format!("ws://127.0.0.1:{port}/ws/code"));
        finish(start(command.env("API_KEY", KEY)))
    };
    let ran = check(server.port).exits(0);
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let reply = |line: &str, start: &str| -> Value {
        serde_json::from_str(line.strip_prefix(start).unwrap()).unwrap()
    };
    assert_eq!(
        reply(lines[0], "Bad code response: ")["status"],
        "tests_failed"
    );
    assert_eq!(
        reply(lines[1], "Good code response: ")["status"],
        "deployed"
    );
    assert!(
        check(1)
            .exits(1)
            .stderr
            .contains("Check that the server runs")
    );
}
