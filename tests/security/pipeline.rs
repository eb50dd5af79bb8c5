//! Crashes, crash loops and queues that one user fills.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::server::{PATIENCE, Server, Socket, hello};

/// Longest time that a user whose neighbour attacks waits for `print('Hello')`.
const NEIGHBOURS_WAIT: Duration = Duration::from_secs(20);

/// The next reply of this submission.
async fn reply_of(socket: &mut Socket, id: &str) -> Value {
    loop {
        let frame = socket.next().await;
        if frame["submission_id"] == id && frame.get("status").is_some() {
            return frame;
        }
    }
}

/// Until a step of this submission has begun.
async fn until_step(socket: &mut Socket, id: &str, step: &str) {
    loop {
        let frame = socket.next().await;
        assert!(frame.get("status").is_none(), "it ended first: {frame}");
        if frame["submission_id"] == id && frame["name"] == step {
            return;
        }
    }
}

/// What the server has of it, once it has ended.
async fn ended(server: &Server, id: &str) -> Value {
    let asked = Instant::now();
    loop {
        let stored = server
            .get(&format!("/submissions/{id}"))
            .header("x-api-key", &server.admin)
            .send()
            .await
            .unwrap();
        let stored: Value = stored.json().await.unwrap();
        if !stored["reply"].is_null() {
            return stored["reply"].clone();
        }
        assert!(asked.elapsed() < 2 * PATIENCE, "{id} did not end");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A neighbour's submission is taken in, runs and passes.
async fn others_work(server: &Server) {
    let mut socket = server.connect(&server.admin).await;
    let asked = Instant::now();
    let reply = socket.ask(hello("neighbour")).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    assert!(asked.elapsed() < NEIGHBOURS_WAIT, "{:?}", asked.elapsed());
}

fn resident_kib(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn submission(id: &str, user: &str, code: &str) -> Value {
    json!({ "submission_id": id, "user_id": user, "code": code, "deploy": false, "stream": true })
}

fn new_id() -> String {
    Uuid::now_v7().to_string()
}

async fn restart(mut server: Server) -> Server {
    tokio::task::spawn_blocking(move || {
        server.restart();
        server
    })
    .await
    .unwrap()
}

/// Writes this text to everything that could be the test runner's report, and ends the test run with
/// exit code 0.
fn forged(text: &str) -> Value {
    let test = format!(
        "import os, sys\n\
         text = {text}\n\
         named = [a.split('=', 1)[1] for a in sys.argv if a.startswith('--junitxml=')]\n\
         for place in [*named, '/tmp/gantry-report.xml', *range(3, 20)]:\n    \
             try:\n        \
                 with open(place, 'w') as f: f.write(text)\n    \
             except OSError: pass\n\
         os._exit(0)\n"
    );
    json!({ "code": "", "tests": { "test_a.py": test }, "deploy": false })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_report_neither_crashes_nor_holds_the_server_nor_passes() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let passed = r#"'{"test":{"name":"a","outcome":"passed","ms":0}}\\n{"end":1}\\n'"#;
    let texts = [
        "'<a>' * 100000",
        "'<a ' + ' '.join('a%d=\"\"' % i for i in range(100000)) + '/>'",
        "'<testsuites><testsuite><testcase name=\"a\"/></testsuite></testsuites>'",
        "''",
        "'[' * 500000",
        "'{\"test\":' * 100000",
        "'\\0' * 3000000",
        passed,
    ];
    for text in texts {
        let mut message = forged(text);
        message["user_id"] = json!("forger");
        let asked = Instant::now();
        let reply = socket.ask(message.to_string()).await;
        let (status, reason, code) = (&reply["status"], &reply["reason"], &reply["error"]["code"]);
        assert_eq!(status, "tests_failed", "{text}");
        // The text also goes to the copy of the standard output that pytest keeps.
        assert!(!code.is_null() || reason == "output", "{text}: {reason}");
        assert!(asked.elapsed() < Duration::from_secs(15), "{text}");
    }
    others_work(&server).await;
}

/// Test runs that end early with exit code 0, and their honest twins.
#[tokio::test(flavor = "multi_thread")]
async fn a_test_run_in_which_no_test_ran_does_not_pass() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let cases = [
        (
            "python",
            "main.py",
            "X = 1",
            "import os; os._exit(0)",
            "test_a.py",
            "import main\ndef test_a(): assert main.X",
        ),
        (
            "python",
            "main.py",
            "def f(): pass",
            "def f():\n    import os; os._exit(0)",
            "test_a.py",
            "import main\ndef test_a(): main.f()",
        ),
        (
            "python",
            "main.py",
            "def f(): pass",
            "import pytest\ndef f(): pytest.exit('', returncode=0)",
            "test_a.py",
            "import main\ndef test_a(): main.f()\ndef test_b(): assert 0 < 1",
        ),
        (
            "node",
            "main.js",
            "exports.x = 1",
            "process.exit(0)",
            "a.test.js",
            "const m = require('./main'); require('node:test')('a', () => { if (!m.x) throw 1 })",
        ),
        (
            "go",
            "main.go",
            "package main\nfunc main() {}",
            "package main\nimport \"os\"\nfunc init() { os.Exit(0) }\nfunc main() {}",
            "a_test.go",
            "package main\nimport \"testing\"\nfunc TestA(t *testing.T) {}",
        ),
        (
            "rust",
            "main.rs",
            "fn main() {}",
            "fn main() { let _ = 1; }",
            "a.rs",
            "RUST",
        ),
        ("ruby", "main.rb", "X = 1", "X = 1", "a_test.rb", "RUBY"),
    ];
    for (language, entry, honest, wrong, test, text) in cases {
        if !there(language) {
            continue;
        }
        for (code, status) in [(honest, "tests_passed"), (wrong, "tests_failed")] {
            let text = match (text, status) {
                ("RUST", "tests_passed") => "#[test] fn a() { assert!(1 < 2) }",
                ("RUST", _) => "pub fn a() { assert!(1 < 2) }",
                ("RUBY", "tests_passed") => {
                    "require 'minitest/autorun'\nclass T < Minitest::Test\n  def test_a = assert(true)\nend"
                }
                ("RUBY", _) => "require 'minitest/autorun'\nclass T < Minitest::Test\nend",
                (text, _) => text,
            };
            let message = json!({
                "user_id": "early", "language": language, "deploy": false,
                "files": { entry: code }, "tests": { test: text },
                "limits": { "wall_ms": 60_000, "cpu_ms": 30_000, "memory_bytes": 512 << 20 },
            });
            let reply = socket.ask(message.to_string()).await;
            assert_eq!(reply["status"], status, "{language} {code:?}: {reply}");
        }
    }
    // Beside files whose tests hold, and where a test file is only run.
    for (language, entry, good, (name, empty)) in [
        (
            "python",
            "main.py",
            ("test_a.py", "def test_a(): pass"),
            ("test_b.py", "import main"),
        ),
        ("bash", "main.sh", ("a.sh", "true"), ("b.sh", "\n")),
        (
            "php",
            "main.php",
            ("a.php", "<?php assert(true);"),
            ("b.php", ""),
        ),
    ] {
        if !there(language) {
            continue;
        }
        let message = json!({
            "user_id": "early", "language": language, "deploy": false,
            "files": { entry: "" }, "tests": { good.0: good.1, name: empty },
        });
        let reply = socket.ask(message.to_string()).await;
        assert_eq!(reply["status"], "tests_failed", "{language}: {reply}");
        let tests = reply["tests"].as_array().unwrap();
        let failed = tests
            .iter()
            .find(|test| test["outcome"] == "failed")
            .unwrap();
        assert_eq!(failed["name"], name, "{reply}");
        assert!(
            failed["message"].as_str().unwrap().contains("no test ran"),
            "{reply}"
        );
    }
}

/// Whether this machine has the language.
fn there(language: &str) -> bool {
    let (program, argument) = match language {
        "python" => ("python3", "--version"),
        "rust" => ("rustc", "--version"),
        "go" => ("go", "version"),
        other => (other, "--version"),
    };
    let run = std::process::Command::new(program).arg(argument).output();
    run.is_ok_and(|output| output.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_that_are_cancelled_while_they_wait_cost_no_stack() {
    let variables = [("GANTRY_MAX_RUNS", "1"), ("GANTRY_MAX_WAITING", "10000")];
    let server = Server::start_as(0, &variables);
    let mut socket = server.connect(&server.admin).await;
    let first = new_id();
    let holds = submission(&first, "crowd", "import time; time.sleep(60)");
    let mut holds = holds;
    holds["limits"] = json!({ "wall_ms": 60_000 });
    socket.send(holds.to_string()).await;
    until_step(&mut socket, &first, "test").await;
    // A connection follows a thousand at most.
    let mut crowds = Vec::new();
    for _ in 0..6 {
        let mut crowd = server.connect(&server.admin).await;
        let ids: Vec<String> = (0..900).map(|_| new_id()).collect();
        for id in &ids {
            let mut message = submission(id, "crowd", "");
            message["stream"] = json!(false);
            crowd.send(message.to_string()).await;
        }
        crowds.push((crowd, ids));
    }
    for (crowd, ids) in &mut crowds {
        for id in ids.iter() {
            crowd.send(json!({ "cancel": id }).to_string()).await;
        }
    }
    for (crowd, ids) in &mut crowds {
        for _ in ids.iter() {
            let reply = crowd.next().await;
            assert_eq!(reply["status"], "cancelled", "{reply}");
        }
    }
    // Only now the place is free, and everybody who waited for it has stopped.
    socket.send(json!({ "cancel": first }).to_string()).await;
    let reply = reply_of(&mut socket, &first).await;
    assert_eq!(reply["status"], "cancelled", "{reply}");
    others_work(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_under_way_at_two_crashes_is_given_up_and_what_waits_is_not() {
    let mut server = Server::start_as(0, &[("GANTRY_MAX_RUNS", "1")]);
    let mut socket = server.connect(&server.admin).await;
    let (under_way, waiting) = (new_id(), new_id());
    let mut long = submission(&under_way, "looper", "import time; time.sleep(50)");
    long["limits"] = json!({ "wall_ms": 60_000 });
    socket.send(long.to_string()).await;
    until_step(&mut socket, &under_way, "test").await;
    let waits = submission(&waiting, "looper", "print('waited')");
    socket.send(waits.to_string()).await;
    until_step(&mut socket, &waiting, "receive").await;
    drop(socket);
    for _ in 0..2 {
        server = restart(server).await;
        // Long enough to be taken up.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let given_up = ended(&server, &under_way).await;
    assert_eq!(given_up["status"], "unavailable", "{given_up}");
    assert_eq!(given_up["error"]["code"], "server_ended_twice");
    let waited = ended(&server, &waiting).await;
    assert_eq!(waited["status"], "tests_passed", "{waited}");
    assert_eq!(waited["stdout"], "waited\n");
    others_work(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_users_waiting_submissions_are_bounded_and_nobody_elses() {
    const MOST: usize = 128;
    let variables = [("GANTRY_MAX_RUNS", "2"), ("GANTRY_MAX_WAITING", "128")];
    let mut server = Server::start_as(0, &variables);
    let mut socket = server.connect(&server.admin).await;
    let text = "#".repeat(1_000_000);
    let code = format!("import time; time.sleep(9) {text}");
    let before = resident_kib(&server);
    let mut refused = 0;
    for number in 0..300 {
        let id = new_id();
        // Large ones first: they meet the bound on bytes, the others that on their number.
        let code = if number < 100 {
            &code
        } else {
            "import time; time.sleep(9)"
        };
        socket
            .send(submission(&id, "greedy", code).to_string())
            .await;
        let frame = loop {
            let frame = socket.next().await;
            if frame["submission_id"] == id.as_str() {
                break frame;
            }
        };
        if frame["status"] == "unavailable" {
            assert_eq!(frame["error"]["code"], "queue_full", "{frame}");
            assert!(frame["error"].to_string().contains("greedy"), "{frame}");
            refused += 1;
        }
    }
    // Some may have ended meanwhile.
    assert!(refused >= 300 - MOST - 20, "{refused} were refused");
    assert!(refused < 300 - 16, "{refused} were refused");
    let grown = resident_kib(&server).saturating_sub(before);
    assert!(grown < 200 << 10, "{grown} KiB more");
    others_work(&server).await;
    drop(socket);
    server = restart(server).await;
    let grown = resident_kib(&server);
    assert!(grown < 300 << 10, "{grown} KiB after the restart");
    others_work(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn input_that_waits_is_bounded_for_its_user() {
    let server = Server::start_as(0, &[("GANTRY_MAX_RUNS", "1")]);
    let mut socket = server.connect(&server.admin).await;
    let ids: Vec<String> = (0..8).map(|_| new_id()).collect();
    let code = "import time; time.sleep(60)";
    for id in &ids {
        let mut message = submission(id, "writer", code);
        message["limits"] = json!({ "wall_ms": 60_000 });
        message["interactive"] = json!(true);
        socket.send(message.to_string()).await;
        until_step(&mut socket, id, "receive").await;
    }
    let data = "x".repeat(1_000_000);
    let before = resident_kib(&server);
    let mut sender = server.connect(&server.admin).await;
    for id in &ids[1..] {
        for _ in 0..15 {
            let frame = json!({ "stdin": id, "data": data });
            sender.send(frame.to_string()).await;
        }
    }
    // 105 MB were sent, and 32 MiB were taken.
    let refused = sender.next().await;
    assert!(refused.to_string().contains("stdin_too_large"), "{refused}");
    let mut answers = 1;
    while answers < 105 - 35 {
        assert!(sender.next().await.to_string().contains("stdin_too_large"));
        answers += 1;
    }
    let grown = resident_kib(&server).saturating_sub(before);
    assert!(grown < 120 << 10, "{grown} KiB more");
    for id in &ids {
        socket.send(json!({ "cancel": id }).to_string()).await;
    }
    others_work(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_a_key_cancels_what_was_sent_with_it() {
    let mut server = Server::start_as(0, &[("GANTRY_MAX_RUNS", "1")]);
    let (key_id, key) = server.user("mallory").await;
    let mut socket = server.connect(&key).await;
    let ids: Vec<String> = (0..12).map(|_| new_id()).collect();
    for id in &ids {
        let mut message = submission(id, "mallory", "import time; time.sleep(50)");
        message["limits"] = json!({ "wall_ms": 60_000 });
        socket.send(message.to_string()).await;
        until_step(&mut socket, id, "receive").await;
    }
    drop(socket);
    let revoked = server.key_command(&["revoke", &key_id]);
    assert!(revoked.status.success(), "{revoked:?}");
    for id in &ids {
        let reply = ended(&server, id).await;
        assert_eq!(reply["status"], "cancelled", "{reply}");
        assert_eq!(reply["error"]["code"], "key_revoked", "{reply}");
    }
    others_work(&server).await;
    // One that is revoked while no server runs is seen when its submissions' turn comes.
    let (key_id, key) = server.user("trent").await;
    let mut socket = server.connect(&key).await;
    let ids: Vec<String> = (0..3).map(|_| new_id()).collect();
    for id in &ids {
        let mut message = submission(id, "trent", "import time; time.sleep(50)");
        message["limits"] = json!({ "wall_ms": 60_000 });
        socket.send(message.to_string()).await;
        until_step(&mut socket, id, "receive").await;
    }
    drop(socket);
    server.kill();
    let revoked = server.key_command(&["revoke", &key_id]);
    assert!(revoked.status.success(), "{revoked:?}");
    server = restart(server).await;
    for id in &ids {
        let reply = ended(&server, id).await;
        assert_eq!(reply["error"]["code"], "key_revoked", "{reply}");
    }
    others_work(&server).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn output_of_many_users_takes_bounded_memory_and_none_of_it_is_lost() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let reply = socket.ask(hello("first")).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let before = resident_kib(&server);
    let ids: Vec<String> = (0..6).map(|_| new_id()).collect();
    for (number, id) in ids.iter().enumerate() {
        let cases: Vec<Value> = (0..4).map(|n| json!({ "name": n.to_string() })).collect();
        let message = json!({
            "submission_id": id, "user_id": format!("loud-{number}"), "deploy": false,
            "code": "import sys; sys.stdout.write('x' * (15 << 20))", "tests": cases,
            "stream": false,
            "limits": { "output_bytes": 16 << 20, "memory_bytes": 256 << 20, "wall_ms": 60_000 },
        });
        socket.send(message.to_string()).await;
    }
    for _ in &ids {
        let reply = socket.next().await;
        assert_eq!(reply["status"], "tests_passed", "{}", reply["error"]);
        // As much as a reply has room for.
        assert_eq!(reply["stdout"].as_str().unwrap().len(), 36 << 20);
        assert_eq!(reply["truncated"], true);
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    let most: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let grown = most.saturating_sub(before);
    // All six at once take more than 430 MiB; seen: 248 to 340.
    assert!(grown < 380 << 10, "{grown} KiB");
}
