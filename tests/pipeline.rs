//! What a submission comes to, through the real server: tests, limits, turns, releases.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

#[path = "pipeline/client.rs"]
mod client;

use std::process::Command;
use std::time::{Duration, Instant};

use client::{Client, message, with};
use serde_json::{Value, json};
use server::{PATIENCE, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn has(program: &str, args: &[&str]) -> bool {
    let there = Command::new(program)
        .args(args)
        .output()
        .is_ok_and(|o| o.status.success());
    if !there {
        assert!(
            std::env::var_os("CI").is_none(),
            "{program} {args:?} is needed"
        );
        eprintln!("SKIPPED, NOT TESTED: {program} {args:?} is not on this machine");
    }
    there
}

#[tokio::test]
async fn cases_are_held_against_what_the_program_wrote() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code =
        "import sys; print(sys.argv[1:], sys.stdin.read())\nif 'bad' in sys.argv: sys.exit(3)";
    let good = json!({ "name": "good", "stdin": "in ü", "args": ["a b"], "expected_stdout": "['a b'] in ü\n" });
    let wrong = json!({ "name": "wrong", "expected_stdout": "else\n" });
    let fails = json!({ "name": "fails", "args": ["bad"] });
    let passed = client
        .ask(with(message("cases", code), json!({ "tests": [good] })))
        .await;
    assert_eq!(passed["status"], "tests_passed", "{passed}");
    assert_eq!(passed["tests"][0]["passed"], true);
    let tests = json!({ "tests": [wrong, good, fails] });
    let id = client.send(with(message("cases", code), tests)).await;
    let failed = client.reply(&id).await;
    assert_eq!(
        (&failed["status"], &failed["reason"]),
        (&json!("tests_failed"), &json!("tests"))
    );
    assert_eq!(
        failed["test_counts"],
        json!({ "passed": 1, "failed": 2, "skipped": 0, "todo": 0 })
    );
    let tests = failed["tests"].as_array().unwrap();
    let held: Vec<_> = tests
        .iter()
        .map(|test| test["passed"].as_bool().unwrap())
        .collect();
    assert_eq!(held, [false, true, false]);
    assert_eq!(
        (&tests[0]["expected"], &tests[0]["actual"]),
        (&json!("else\n"), &json!("[] \n"))
    );
    assert!(
        tests[2]["message"]
            .as_str()
            .unwrap()
            .contains("exit code 3"),
        "{failed}"
    );
    assert_eq!(
        (
            &tests[0]["reason"],
            &tests[2]["reason"],
            &tests[2]["exit_code"]
        ),
        (&json!("tests"), &json!("exit_code"), &json!(3))
    );
    assert_eq!(tests[2]["stdout"], "['bad'] \n", "{failed}");
    assert!(tests[1]["usage"]["memory_bytes"].as_u64() > Some(0));
    let told = client.frames[&id]
        .iter()
        .filter(|frame| frame["event"] == "test")
        .count();
    assert_eq!(told, 3);
    let slow = json!({ "tests": [{ "name": "slow", "timeout_ms": 200 }] });
    let slow = client
        .ask(with(message("cases", "import time; time.sleep(20)"), slow))
        .await;
    assert_eq!(slow["reason"], "timeout", "{slow}");
}

/// As DOMjudge's own programs that check a judge: each is a run error and no wrong answer.
#[tokio::test]
async fn a_case_in_which_the_program_fails_is_no_wrong_answer() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for (code, reason, exit_code, signal) in [
        ("print(1 // 0)", "exit_code", json!(1), Value::Null),
        (
            "import sys; print(1); sys.exit(42)",
            "exit_code",
            json!(42),
            Value::Null,
        ),
        (
            "import os; os.kill(os.getpid(), 11)",
            "signal",
            Value::Null,
            json!("SIGSEGV"),
        ),
        (
            "import os; os.abort()",
            "signal",
            Value::Null,
            json!("SIGABRT"),
        ),
        ("print(2)", "tests", json!(0), Value::Null),
    ] {
        let tests = json!([{ "name": "one", "expected_stdout": "1\n" }]);
        let asked = with(message("judged", code), json!({ "tests": tests }));
        let reply = client.ask(asked).await;
        let test = &reply["tests"][0];
        for told in [&reply, test] {
            let found = (&told["reason"], &told["exit_code"], &told["signal"]);
            assert_eq!(found, (&json!(reason), &exit_code, &signal), "{reply}");
        }
        assert_eq!(test["outcome"], "failed");
    }
}

#[tokio::test]
async fn how_outputs_are_compared_is_the_cases_own() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "print('1.0000001  2 \\r')";
    let case = |name: &str, expected: &str, compare: Value| {
        let mut case = json!({ "name": name, "expected_stdout": expected });
        if !compare.is_null() {
            case["compare"] = compare;
        }
        case
    };
    let tests = json!([
        case("usual", "1.0000001  2", Value::Null),
        case("tokens", "1.0000001 2", json!("tokens")),
        case("floats", "1 2.0", json!({ "floats": 1e-6 })),
        case("exact", "1.0000001  2 \r\n", json!("exact")),
        case("not exact", "1.0000001  2", json!("exact")),
        case("not the same", "1.0000001 2", json!("trailing")),
    ]);
    let reply = client
        .ask(with(message("compared", code), json!({ "tests": tests })))
        .await;
    let tests = reply["tests"].as_array().unwrap();
    let held: Vec<bool> = tests.iter().map(|test| test["passed"] == true).collect();
    assert_eq!(held, [true, true, true, true, false, false], "{reply}");
    assert_eq!(
        tests[4]["message"],
        r#"stdout differs at line 1, column 13: expected the end of the output, found " \r\n""#
    );
    assert_eq!(
        tests[5]["message"],
        r#"stdout differs at line 1, column 11: expected "2", found " 2""#
    );
    let wrong = json!({ "tests": [case("x", "", json!("roughly"))] });
    let reply = client.ask(with(message("compared", code), wrong)).await;
    assert_eq!(reply["status"], "invalid", "{reply}");
}

#[tokio::test]
async fn a_case_gets_the_submissions_input_and_arguments_where_it_has_none_of_its_own() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "import sys; print(sys.argv[1:], sys.stdin.read())";
    let tests = json!([
        { "name": "none", "expected_stdout": "['given'] shared\n" },
        { "name": "own", "stdin": "own", "args": [], "expected_stdout": "[] own\n" },
    ]);
    let extra = json!({ "stdin": "shared", "args": ["given"], "tests": tests });
    let reply = client.ask(with(message("shared", code), extra)).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
}

/// Six bytes of JSON for each of the program's: more than a record can hold, and all it may write.
#[tokio::test]
async fn a_reply_that_no_record_could_hold_is_cut() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "import sys; sys.stdout.write('\\x01' * (15 << 20)); sys.stderr.write('last words')";
    let limits = json!({ "output_bytes": 16 << 20, "memory_bytes": 256 << 20 });
    let reply = client
        .ask(with(message("flood", code), json!({ "limits": limits })))
        .await;
    assert_eq!(reply["status"], "tests_passed");
    assert_eq!(reply["truncated"], true);
    let shown = reply["stdout"].as_str().unwrap().len();
    assert!(shown > 5 << 20 && shown <= 6 << 20, "{shown}");
    assert_eq!(reply["stderr"], "last words");
}

#[tokio::test]
async fn all_runs_of_a_submission_together_have_an_output_limit() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "import sys; sys.stdout.write('x' * (15 << 20))";
    let cases: Vec<Value> = (0..6).map(|n| json!({ "name": n.to_string() })).collect();
    let limits = json!({ "output_bytes": 16 << 20, "memory_bytes": 256 << 20 });
    let more = json!({ "limits": limits, "tests": cases });
    let reply = client.ask(with(message("flood", code), more)).await;
    assert_eq!(
        (&reply["status"], &reply["reason"]),
        (&json!("tests_failed"), &json!("output"))
    );
    let tests = reply["tests"].as_array().unwrap();
    let held: Vec<_> = tests.iter().map(|test| test["passed"] == true).collect();
    assert_eq!(held, [true, true, true, true, false, false]);
    assert_eq!(reply["truncated"], true);
    assert_eq!(reply["stdout"].as_str().unwrap().len(), 36 << 20);
}

/// What a disk without room does to the server: its files cannot grow.
fn may_grow(server: &Server, grow: bool) {
    use rustix::process::{Pid, Resource, Rlimit, prlimit};
    let pid = Pid::from_raw(i32::try_from(server.pid()).unwrap());
    let limit = Rlimit {
        current: (!grow).then_some(0),
        maximum: None,
    };
    prlimit(pid, Resource::Fsize, limit).unwrap();
}

#[tokio::test]
async fn a_submission_under_way_waits_for_room_on_the_disk() {
    // SAFETY: nothing runs at the signal. The server inherits that it is ignored: the write fails.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let id = client
        .send(interactive("patient", "print(input()); print('end')"))
        .await;
    client
        .until(&id, |frame| {
            frame["name"] == "test" && frame["state"] == "started"
        })
        .await;
    may_grow(&server, false);
    client.tell(json!({ "stdin": id, "data": "over\n" })).await;
    while server.get("/readyz").send().await.unwrap().status() != 503 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let refused = client.ask(message("patient", "pass")).await;
    assert_eq!(
        (&refused["status"], &refused["error"]["code"]),
        (&json!("unavailable"), &json!("journal_unavailable"))
    );
    may_grow(&server, true);
    let reply = client.reply(&id).await;
    assert_eq!(
        (&reply["status"], &reply["stdout"]),
        (&json!("tests_passed"), &json!("over\nend\n"))
    );
    let frames = client.frames[&id].iter();
    let seqs: Vec<u64> = frames.map(|frame| frame["seq"].as_u64().unwrap()).collect();
    let whole: Vec<u64> = (1..=seqs.len() as u64).collect();
    assert_eq!(seqs, whole);
    let after = client.ask(message("patient", "pass")).await;
    assert_eq!(after["status"], "tests_passed", "{after}");
}

#[tokio::test]
async fn test_files_are_reported_test_by_test() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    if has("python3", &["-m", "pytest", "--version"]) {
        let file = "import pytest\nfrom main import double\n\
            def test_good():\n    assert double(2) == 4\n\
            def test_bad():\n    assert double(2) == 5\n\
            @pytest.fixture\ndef broken():\n    raise RuntimeError('no fixture')\n\
            def test_error(broken):\n    pass\n";
        let code = "def double(x):\n    return 2 * x\n";
        let tests = json!({ "tests": { "test_double.py": file } });
        let reply = client.ask(with(message("files", code), tests)).await;
        assert_eq!(
            (&reply["status"], &reply["reason"]),
            (&json!("tests_failed"), &json!("tests"))
        );
        let tests = reply["tests"].as_array().unwrap();
        let held: Vec<_> = tests
            .iter()
            .map(|t| (t["name"].as_str().unwrap(), t["passed"] == true))
            .collect();
        assert_eq!(
            held,
            [
                ("test_double::test_good", true),
                ("test_double::test_bad", false),
                ("test_double::test_error", false)
            ]
        );
        assert!(
            tests[1]["message"]
                .as_str()
                .unwrap()
                .contains("assert 4 == 5"),
            "{reply}"
        );
        assert!(
            tests[2]["message"].as_str().unwrap().contains("no fixture"),
            "{reply}"
        );
        let good = json!({ "tests": { "test_double.py": "from main import double\ndef test_it():\n    assert double(1) == 2\n" } });
        let reply = client.ask(with(message("files", code), good)).await;
        assert_eq!(reply["status"], "tests_passed", "{reply}");
        // A program that ends the test runner early has not passed.
        let early =
            json!({ "tests": { "test_early.py": "import os\ndef test_it():\n    os._exit(0)\n" } });
        let reply = client.ask(with(message("files", code), early)).await;
        assert_eq!(reply["status"], "tests_failed", "{reply}");
        let broken = json!({ "tests": { "test_broken.py": "import nothing_there\n" } });
        let reply = client.ask(with(message("files", code), broken)).await;
        assert_eq!(reply["status"], "tests_failed", "{reply}");
        assert!(reply.to_string().contains("nothing_there"), "{reply}");
    }
    if has("node", &["--version"]) {
        let file = "const test = require('node:test'); const assert = require('node:assert');\n\
            test('adds', () => assert.strictEqual(1 + 1, 2));\n\
            test('fails', () => assert.strictEqual(require('./main.js').two, 3));\n";
        let tests = json!({ "language": "node", "tests": { "main.test.js": file } });
        let reply = client
            .ask(with(
                message("files", "module.exports = { two: 2 };"),
                tests,
            ))
            .await;
        assert_eq!(
            (&reply["status"], &reply["reason"]),
            (&json!("tests_failed"), &json!("tests")),
            "{reply}"
        );
        let tests = reply["tests"].as_array().unwrap();
        let held: Vec<_> = tests
            .iter()
            .map(|t| (t["name"].as_str().unwrap(), t["passed"] == true))
            .collect();
        assert_eq!(held, [("adds", true), ("fails", false)]);
    }
}

/// Names, outcomes and the error of a submission of test files.
async fn outcomes(client: &mut Client, more: Value) -> (Value, Vec<(String, String)>) {
    let limits =
        json!({ "limits": { "wall_ms": 60_000, "cpu_ms": 30_000, "memory_bytes": 512 << 20 } });
    let reply = client
        .ask(with(with(message("files", ""), limits), more))
        .await;
    let tests = reply["tests"].as_array().cloned().unwrap_or_default();
    let word = |test: &Value, field: &str| test[field].as_str().unwrap().to_owned();
    let tests = tests
        .iter()
        .map(|test| (word(test, "name"), word(test, "outcome")));
    let tests = tests.collect();
    (reply, tests)
}

#[tokio::test]
async fn what_nodes_runner_tells_is_told_whole() {
    if !has("node", &["--version"]) {
        return;
    }
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let node = |files: Value| json!({ "language": "node", "tests": files });
    let begin = "const { test, describe, it, after } = require('node:test');\n";
    let good = format!(
        "{begin}test('control \\x01 \\x1b', () => {{}});\n\
         test('later', {{ todo: true }}, () => {{ throw new Error('not yet') }});\n\
         test('left out', {{ skip: true }}, () => {{ throw new Error('no') }});\n\
         describe('outer', () => describe('inner', () => it('deep', () => {{}})));"
    );
    let (reply, tests) = outcomes(&mut client, node(json!({ "a.test.js": good }))).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let told: Vec<(&str, &str)> = tests
        .iter()
        .map(|(n, o)| (n.as_str(), o.as_str()))
        .collect();
    let expected = [
        ("control \u{1} \u{1b}", "passed"),
        ("later", "todo"),
        ("left out", "skipped"),
        ("outer > inner > deep", "passed"),
    ];
    assert_eq!(told, expected);
    let bad = format!(
        "{begin}test('parent', async (t) => {{ await t.test('child', () => {{}}); throw new Error('itself') }});\n\
         describe('hooked', () => {{ after(() => {{ throw new Error('hook') }}); it('fine', () => {{}}) }});"
    );
    let files = json!({ "a.test.js": bad, "b.test.js": "console.log('nothing')" });
    let (reply, tests) = outcomes(&mut client, node(files)).await;
    assert_eq!(reply["reason"], "tests", "{reply}");
    let failed: Vec<&str> = tests
        .iter()
        .filter(|(_, o)| o == "failed")
        .map(|(n, _)| n.as_str())
        .collect();
    let expected = ["a.test.js > parent", "a.test.js > hooked", "b.test.js"];
    assert_eq!(failed, expected, "{reply}");
    // Marked as todo or left out, all of them: nothing has been tested.
    let nothing = format!("{begin}test('later', {{ todo: true }}, () => {{}});");
    let (reply, _) = outcomes(&mut client, node(json!({ "a.test.js": nothing }))).await;
    assert_eq!(reply["error"]["code"], "no_test_ran", "{reply}");
}

#[tokio::test]
async fn very_many_tests_are_counted_and_those_that_failed_are_listed_first() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let counts = |passed: u64, failed: u64| json!({ "passed": passed, "failed": failed, "skipped": 0, "todo": 0 });
    if has("python3", &["-m", "pytest", "--version"]) {
        let many = "import pytest\n@pytest.mark.parametrize('x', ['y' * 240 + str(i) for i in range(4500)])\n\
            def test_many(x): pass\n";
        let tests = json!({ "tests": { "test_many.py": many } });
        let (reply, _) = outcomes(&mut client, tests).await;
        assert_eq!(reply["status"], "tests_passed", "{}", reply["error"]);
        assert_eq!(reply["test_counts"], counts(4_500, 0));
        let last =
            json!({ "tests": { "test_many.py": format!("{many}def test_last(): assert 0\n") } });
        let (reply, tests) = outcomes(&mut client, last).await;
        assert_eq!(reply["reason"], "tests", "{}", reply["error"]);
        assert_eq!(
            tests[0],
            ("test_many::test_last".to_owned(), "failed".to_owned())
        );
        assert_eq!(reply["test_counts"], counts(4_500, 1));
        let none = json!({ "tests": { "test_none.py": "X = 1\n" } });
        let (reply, _) = outcomes(&mut client, none).await;
        assert_eq!(reply["error"]["code"], "no_test_ran", "{reply}");
    }
    if has("node", &["--version"]) {
        let many = "const { test } = require('node:test');\n\
            for (let i = 0; i < 3000; i += 1) test('y'.repeat(240) + i, () => {});\n\
            test('last', () => { throw new Error('x') });";
        let node = json!({ "language": "node", "tests": { "many.test.js": many } });
        let (reply, tests) = outcomes(&mut client, node).await;
        assert_eq!(tests[0], ("last".to_owned(), "failed".to_owned()));
        assert_eq!(reply["test_counts"], counts(3_000, 1));
    }
}

#[tokio::test]
async fn programs_get_what_a_shell_would_give_them() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "import os, sys\nsys.path.insert(0, os.path.dirname(__file__))\nimport help.words\n\
        print(help.words.TEXT, sys.argv, os.environ['GREETING'], sys.stdin.read(), os.getcwd())";
    let reply = client
        .ask(json!({
            "user_id": "shell", "deploy": false, "entrypoint": "app/start.py", "args": ["-x", "two words"],
            "files": { "app/start.py": code, "app/help/__init__.py": "", "app/help/words.py": "TEXT = 'ü'" },
            "env": { "GREETING": "hello" }, "stdin": "input",
        }))
        .await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    assert_eq!(
        reply["stdout"],
        "ü ['app/start.py', '-x', 'two words'] hello input /workspace\n"
    );
    let bash = json!({ "language": "bash", "args": ["a"], "stdin": "line\n" });
    let bash = client
        .ask(with(
            message("shell", "read x; echo \"$0 $1 $x\" >&2; exit 4"),
            bash,
        ))
        .await;
    assert_eq!(
        (&bash["status"], &bash["exit_code"]),
        (&json!("tests_failed"), &json!(4)),
        "{bash}"
    );
    assert_eq!(
        (&bash["stderr"], &bash["reason"]),
        (&json!("main.sh a line\n"), &json!("exit_code"))
    );
    if has("node", &["--version"]) {
        let node = with(
            message("shell", "console.log(process.argv.slice(2), 'ü')"),
            json!({ "language": "node", "args": ["b"] }),
        );
        let node = client.ask(node).await;
        assert_eq!(node["stdout"], "[ 'b' ] ü\n", "{node}");
    }
    // Input in frames, some of it before the program runs.
    let id = client
        .send(interactive(
            "shell",
            "import sys\nfor line in sys.stdin: print('got', line.strip(), flush=True)",
        ))
        .await;
    client.tell(json!({ "stdin": id, "data": "one\n" })).await;
    client
        .until(&id, |frame| frame["data"] == "got one\n")
        .await;
    client
        .tell(json!({ "stdin": id, "data": "two ü\n", "eof": true }))
        .await;
    let reply = client.reply(&id).await;
    assert_eq!(reply["stdout"], "got one\ngot two ü\n", "{reply}");
}

fn interactive(user: &str, code: &str) -> Value {
    with(message(user, code), json!({ "interactive": true }))
}

#[tokio::test]
async fn input_ends_at_once_unless_the_submission_says_that_more_comes() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let begun = Instant::now();
    let reply = client.ask(message("quiet", "print(input())")).await;
    assert_eq!(reply["reason"], "exit_code", "{reply}");
    assert!(
        reply["stderr"].as_str().unwrap().contains("EOFError"),
        "{reply}"
    );
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    // Frames for it are refused, and say what to do.
    let id = client
        .send(message(
            "quiet",
            "import time; print('up', flush=True); time.sleep(1)",
        ))
        .await;
    client.until(&id, |frame| frame["data"] == "up\n").await;
    client.tell(json!({ "stdin": id, "data": "x" })).await;
    let refused = client
        .until(&id, |frame| frame.get("error").is_some())
        .await;
    assert_eq!(refused["error"]["code"], "not_interactive", "{refused}");
    assert_eq!(client.reply(&id).await["status"], "tests_passed");
    // What is sent along comes first.
    let code = "print(input(), input())";
    let both = with(interactive("quiet", code), json!({ "stdin": "one\n" }));
    let id = client.send(both).await;
    client
        .tell(json!({ "stdin": id, "data": "two\n", "eof": true }))
        .await;
    assert_eq!(client.reply(&id).await["stdout"], "one two\n");
    let cases = json!({ "tests": [{ "name": "a" }] });
    let reply = client.ask(with(interactive("quiet", code), cases)).await;
    assert_eq!(reply["status"], "invalid", "{reply}");
}

#[tokio::test]
async fn limits_over_the_maximum_are_invalid_and_those_given_hold() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for (limit, value) in [
        ("wall_ms", 60_001_u64),
        ("cpu_ms", 30_001),
        ("memory_bytes", (512 << 20) + 1),
        ("processes", 257),
        ("file_bytes", (64 << 20) + 1),
        ("output_bytes", (16 << 20) + 1),
        ("wall_ms", 0),
    ] {
        let asked = json!({ "limits": { limit: value } });
        let reply = client.ask(with(message("limits", "1"), asked)).await;
        assert_eq!(reply["status"], "invalid", "{reply}");
        assert!(
            reply["error"]["message"].as_str().unwrap().contains(limit),
            "{reply}"
        );
    }
    for (limits, code, reason) in [
        (
            json!({ "wall_ms": 300 }),
            "import time; time.sleep(20)",
            "timeout",
        ),
        (json!({ "cpu_ms": 200 }), "while True: pass", "cpu"),
        (
            json!({ "output_bytes": 100 }),
            "print('x' * 1000)",
            "output",
        ),
        (
            json!({ "memory_bytes": 32 << 20 }),
            "import time\nx = b'x' * (200 << 20)\ntime.sleep(5)",
            "memory",
        ),
    ] {
        let reply = client
            .ask(with(message("limits", code), json!({ "limits": limits })))
            .await;
        assert_eq!(
            (&reply["status"], &reply["reason"]),
            (&json!("tests_failed"), &json!(reason)),
            "{reply}"
        );
        if reason == "output" {
            assert_eq!(
                (&reply["truncated"], reply["stdout"].as_str().unwrap().len()),
                (&json!(true), 100)
            );
        }
    }
    let killed = client
        .ask(message("limits", "import os; os.kill(os.getpid(), 11)"))
        .await;
    assert_eq!(
        (&killed["reason"], &killed["signal"]),
        (&json!("signal"), &json!("SIGSEGV")),
        "{killed}"
    );
}

const SLEEP: &str = "import time; print('up', flush=True); time.sleep(9)";

#[tokio::test]
async fn cancelling_ends_what_runs_and_what_waits() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let running = client.send(message("cancel", SLEEP)).await;
    client
        .until(&running, |frame| frame["data"] == "up\n")
        .await;
    let asked = Instant::now();
    client.tell(json!({ "cancel": running })).await;
    let reply = client.reply(&running).await;
    assert_eq!(
        (&reply["status"], &reply["stdout"]),
        (&json!("cancelled"), &json!("up\n")),
        "{reply}"
    );
    assert!(
        asked.elapsed() < Duration::from_secs(3),
        "{:?}",
        asked.elapsed()
    );
    // Far more than run at one time.
    let mut ids = Vec::new();
    for _ in 0..100 {
        ids.push(client.send(message("cancel", SLEEP)).await);
    }
    let last = ids.last().unwrap().clone();
    client
        .until(&last, |frame| frame["event"] == "queued")
        .await;
    client.tell(json!({ "cancel": last })).await;
    let reply = client.reply(&last).await;
    assert_eq!(reply["status"], "cancelled", "{reply}");
    assert!(
        !client
            .steps(&last)
            .iter()
            .any(|step| step.starts_with("test")),
        "{:?}",
        client.steps(&last)
    );
    for id in &ids {
        client.tell(json!({ "cancel": id })).await;
    }
    let begun = Instant::now();
    let cancelled = |client: &Client| {
        let frames = ids.iter().filter_map(|id| client.frames.get(id)?.last());
        frames
            .filter(|frame| frame["status"] == "cancelled")
            .count()
    };
    while cancelled(&client) < ids.len() {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} of {}",
            cancelled(&client),
            ids.len()
        );
        client.next().await;
    }
    let after = client.ask(message("cancel", "print('fine')")).await;
    assert_eq!(after["stdout"], "fine\n", "{after}");
}

#[tokio::test]
async fn a_run_cancelled_while_its_place_is_made_takes_nothing_from_the_next() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for round in 0..16 {
        // Each round has a sandbox of its own, whose places are made when they are first needed.
        let user = format!("place{round}");
        client.ask(message(&user, "1")).await;
        let mut cancelled = Vec::new();
        for _ in 0..8 {
            cancelled.push(client.send(message(&user, SLEEP)).await);
        }
        // Making a place takes some milliseconds: the rounds cover them.
        tokio::time::sleep(Duration::from_millis(2 * round)).await;
        for id in &cancelled {
            client.tell(json!({ "cancel": id })).await;
        }
        for id in &cancelled {
            assert_eq!(client.reply(id).await["status"], "cancelled");
        }
        let mut ids = Vec::new();
        for number in 0..8 {
            let code = format!("print({number})");
            ids.push(client.send(message(&user, &code)).await);
        }
        for (number, id) in ids.iter().enumerate() {
            let reply = client.reply(id).await;
            assert_eq!(reply["stdout"], format!("{number}\n"), "{reply}");
        }
    }
}

#[tokio::test]
async fn a_user_with_many_submissions_does_not_keep_another_waiting() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    // Both sandboxes are there before it is measured.
    for user in ["many", "few"] {
        client.ask(message(user, "1")).await;
    }
    let code = "import time; time.sleep(0.2)";
    let mut many = Vec::new();
    for _ in 0..40 {
        many.push(client.send(message("many", code)).await);
    }
    client
        .until(&many[39], |frame| frame["event"] == "queued")
        .await;
    let mut few = Vec::new();
    for _ in 0..2 {
        few.push(client.send(message("few", code)).await);
    }
    let (mut order, begun) = (Vec::new(), Instant::now());
    while order.len() < 42 && begun.elapsed() < PATIENCE {
        let frame = client.next().await;
        if let Some(status) = frame.get("status") {
            assert_eq!(status, "tests_passed", "{frame}");
            order.push(frame["submission_id"].as_str().unwrap().to_owned());
        }
        let ended = |ids: &[String]| {
            let last = ids.iter().filter_map(|id| client.frames.get(id)?.last());
            last.filter(|frame| frame.get("status").is_some()).count()
        };
        if ended(&many) + ended(&few) == 42 {
            break;
        }
    }
    let place = |id: &String| order.iter().position(|one| one == id).unwrap();
    let (first, second) = (place(&few[0]), place(&few[1]));
    println!("42 submissions; the other user's, sent last, ended at places {first} and {second}");
    // Sent last of all, ended among the first: at most two rounds of all places before them.
    assert!(
        order.len() - first.max(second) > 15,
        "{first}, {second} of {}",
        order.len()
    );
}

/// A program that serves, with `WORD` to tell releases apart. It does so only where it is released.
const SERVE: &str = r#"
import base64, hashlib, http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.headers.get('upgrade') == 'websocket':
            return self.echo()
        body = (WORD + ' ' + self.path + ' ' + self.headers['host']).encode()
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def echo(self):
        key = self.headers['sec-websocket-key'] + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.wfile.write(b'HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n'
                         b'sec-websocket-accept: ' + accept.encode() + b'\r\n\r\n')
        while data := self.connection.recv(4096):
            self.connection.sendall(data[::-1])
        self.close_connection = True
    def log_message(self, *args):
        pass
def main():
    http.server.ThreadingHTTPServer(('127.0.0.1', int(os.environ['PORT'])), Handler).serve_forever()
if os.environ.get('PORT') and __name__ == '__main__':
    main()
"#;

/// Sends a request to the repl's own host and reads until the answer holds `what`.
async fn fetch(server: &Server, repl: &str, path: &str, what: &str) -> String {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let asked = Instant::now();
    loop {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer))
            .await
            .unwrap()
            .unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        if answer.contains(what) {
            return answer;
        }
        assert!(asked.elapsed() < PATIENCE, "{what:?} is not in {answer}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn post(server: &Server, path: &str, body: Value) -> (u16, Value) {
    let request = server
        .post(path)
        .header("x-api-key", &server.admin)
        .body(body.to_string());
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn repl(server: &Server, id: &str) -> Value {
    let request = server
        .get(&format!("/repls/{id}"))
        .header("x-api-key", &server.admin);
    request.send().await.unwrap().json().await.unwrap()
}

fn serving(word: &str) -> Value {
    json!({ "user_id": "web", "code": format!("WORD = '{word}'\n{SERVE}") })
}

#[tokio::test]
async fn what_passes_its_tests_is_served_until_something_better_is() {
    let mut server = Server::start();
    let mut client = Client::of(&server).await;
    let mut first = serving("one");
    if has("python3", &["-m", "pytest", "--version"]) {
        first = with(
            first,
            json!({ "tests": { "test_main.py": "from main import WORD\ndef test_word():\n    assert WORD == 'one'\n" } }),
        );
    }
    let id = client.send(first).await;
    let one = client.reply(&id).await;
    assert_eq!(
        (&one["status"], &one["release"]),
        (&json!("deployed"), &json!(1)),
        "{one}"
    );
    assert_eq!(
        client.steps(&id),
        [
            "receive passed",
            "sandbox started",
            "sandbox passed",
            "test started",
            "test passed",
            "publish started",
            "publish passed",
            "deploy started",
            "deploy passed",
            "ready passed",
        ]
    );
    let host = format!("web-prod.apps.localhost:{}", server.address.port());
    fetch(&server, "web-prod", "/a?b=1", &format!("one /a?b=1 {host}")).await;
    echo_through_an_upgrade(&server, &host).await;
    // Tests that fail never reach the release; a release that does not come up leaves the last one.
    let failing = with(
        serving("two"),
        json!({ "tests": [{ "name": "no", "expected_stdout": "?" }] }),
    );
    assert_eq!(client.ask(failing).await["status"], "tests_failed");
    let crashing = "import os, sys\nif os.environ.get('PORT'):\n    print('the last words', flush=True); sys.exit('no ü')";
    let crashing = client
        .ask(json!({ "user_id": "web", "code": crashing }))
        .await;
    assert_eq!(crashing["status"], "deploy_failed", "{crashing}");
    let error = crashing["error"].to_string();
    assert!(
        error.contains("the last words") && error.contains("no ü"),
        "{crashing}"
    );
    fetch(&server, "web-prod", "/", "one /").await;
    let three = client.ask(serving("three")).await;
    assert_eq!(three["status"], "deployed", "{three}");
    fetch(&server, "web-prod", "/", "three /").await;
    let (status, back) = post(&server, "/repls/web-prod/rollback", json!({})).await;
    assert_eq!((status, &back["release"]), (200, &json!(1)), "{back}");
    fetch(&server, "web-prod", "/", "one /").await;
    let (status, on) = post(
        &server,
        "/repls/web-prod/rollback",
        json!({ "release": three["release"] }),
    )
    .await;
    assert_eq!((status, &on["release"]), (200, &three["release"]), "{on}");
    // The release comes back with the server.
    drop(client);
    assert!(server.terminate().success());
    server.restart();
    fetch(&server, "web-prod", "/", "three /").await;
    assert_eq!(repl(&server, "web-prod").await["release"], three["release"]);
    let (status, _) = post(&server, "/stop", json!({ "replId": "web-prod" })).await;
    assert_eq!(
        (status, &repl(&server, "web-prod").await["state"]),
        (200, &json!("stopped"))
    );
}

async fn echo_through_an_upgrade(server: &Server, host: &str) {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = format!(
        "GET /ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read_until = async |stream: &mut TcpStream, answer: &mut Vec<u8>, end: &[u8]| {
        while !answer.windows(end.len()).any(|window| window == end) {
            let read = tokio::time::timeout(PATIENCE, stream.read_buf(answer))
                .await
                .unwrap();
            assert!(read.unwrap() > 0, "{}", String::from_utf8_lossy(answer));
        }
    };
    read_until(&mut stream, &mut answer, b"\r\n\r\n").await;
    let head = String::from_utf8_lossy(&answer).to_lowercase();
    assert!(
        head.starts_with("http/1.1 101") && head.contains("s3pplmbitxaq9kygzzhzrbk+xoo="),
        "{head}"
    );
    for word in ["hello", "again"] {
        stream.write_all(word.as_bytes()).await.unwrap();
        let reversed: String = word.chars().rev().collect();
        read_until(&mut stream, &mut answer, reversed.as_bytes()).await;
    }
}

#[tokio::test]
async fn a_database_outlives_its_releases() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = |word: &str| {
        format!(
            "import os, sqlite3\nurl = os.environ.get('DATABASE_URL')\nif url:\n    \
             scheme, _, path = url.partition(':///')\n    db = sqlite3.connect('/' + path.lstrip('/'))\n    \
             db.execute('create table if not exists t(w)')\n    db.execute(\"insert into t values ('{word}')\")\n    \
             db.commit()\n    print(scheme, [w for w, in db.execute('select w from t order by rowid')], flush=True)\n"
        )
    };
    for (word, words) in [
        ("a", "sqlite [&#39;a&#39;]"),
        ("b", "sqlite [&#39;a&#39;, &#39;b&#39;]"),
    ] {
        let reply = client
            .ask(json!({ "user_id": "data", "code": code(word) }))
            .await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert_eq!(reply["stdout"], "", "a test run has no database");
        let page = fetch(&server, "data-prod", "/", "sqlite").await;
        assert!(
            page.contains(words) || page.contains(&words.replace("&#39;", "'")),
            "{page}"
        );
    }
    let without = json!({ "user_id": "data", "code": "import os; print(os.environ.get('DATABASE_URL'), 'none')", "database": false });
    assert_eq!(client.ask(without).await["status"], "deployed");
    fetch(&server, "data-prod", "/", "None none").await;
}
