//! Every language of the table, through the real server: a program that passes, one that fails, one that
//! serves on port 3000, and, where there is a compiler, one that it does not take.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

#[allow(dead_code, reason = "shared with the tests of the pipeline")]
#[path = "pipeline/client.rs"]
mod client;

use std::path::Path;
use std::time::{Duration, Instant};

use client::{Client, message, with};
use gantry::model::{LANGUAGES, Language};
use serde_json::{Value, json};
use server::{PATIENCE, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The language's example of this kind.
fn example(language: &Language, kind: &str) -> String {
    let name = format!("{kind}.{}", language.extensions[0]);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/languages");
    let path = folder.join(language.name).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn in_language(language: &Language, user: &str, code: &str) -> Value {
    let language = json!({ "language": language.name });
    with(message(user, code), language)
}

/// Whether this machine has it. Where it does not, that is said, with what to install.
fn is_there(language: &Language, reply: &Value) -> bool {
    if reply["error"]["code"] != "language_unavailable" {
        return true;
    }
    assert_eq!(reply["status"], "unavailable", "{reply}");
    let told = reply["error"].to_string();
    let tools = language.tools.iter();
    let named = tools.filter(|tool| told.contains(tool.command) && told.contains(tool.install));
    assert!(named.count() > 0, "{reply}");
    assert!(
        std::env::var_os("CI").is_none(),
        "{} is needed",
        language.name
    );
    eprintln!("SKIPPED, NOT TESTED: {}", language.name);
    false
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_language_runs_fails_is_tested_and_serves() {
    let server = Server::start();
    for language in LANGUAGES {
        let mut client = Client::of(&server).await;
        if passes(language, &mut client).await {
            fails(language, &mut client).await;
            tests(language, &mut client).await;
            serves(language, &mut client, &server).await;
        }
    }
}

async fn passes(language: &Language, client: &mut Client) -> bool {
    let begun = Instant::now();
    let input = json!({ "stdin": "Gantry\n", "args": ["2", "3"] });
    let passing = in_language(language, "languages", &example(language, "passes"));
    let id = client.send(with(passing, input)).await;
    let reply = client.reply(&id).await;
    if !is_there(language, &reply) {
        return false;
    }
    assert_eq!(
        reply["status"], "tests_passed",
        "{}: {reply}",
        language.name
    );
    assert_eq!(reply["stdout"], "Hello Gantry 5\n", "{}", language.name);
    let compiled = client.steps(&id).contains(&"compile passed".to_owned());
    assert_eq!(compiled, language.compile.is_some(), "{}", language.name);
    println!("{}: {:?}", language.name, begun.elapsed());
    true
}

async fn fails(language: &Language, client: &mut Client) {
    let failing = in_language(language, "languages", &example(language, "fails"));
    let reply = client.ask(failing).await;
    let outcome = json!([reply["status"], reply["reason"], reply["exit_code"]]);
    assert_eq!(outcome, json!(["tests_failed", "exit_code", 3]), "{reply}");
    assert_eq!(reply["stderr"], "about to fail\n", "{reply}");
    if language.compile.is_none() {
        return;
    }
    let broken = in_language(language, "languages", &example(language, "broken"));
    let id = client.send(broken).await;
    let reply = client.reply(&id).await;
    let outcome = json!([reply["status"], reply["reason"], reply.get("exit_code")]);
    assert_eq!(outcome, json!(["tests_failed", "compile", null]), "{reply}");
    let said = format!("{}{}", reply["stdout"], reply["stderr"]);
    assert!(said.contains(language.entrypoint), "{reply}");
    let steps = client.steps(&id);
    assert_eq!(steps.last().unwrap(), "compile failed", "{steps:?}");
}

/// Where a language wants a test file to be.
fn test_path(language: &Language) -> String {
    match language.name {
        "java" => "SumTest.java".to_owned(),
        _ => format!("sum_test.{}", language.extensions[0]),
    }
}

/// A test file that passes, one that fails, and that both are told of by themselves.
async fn tests(language: &Language, client: &mut Client) {
    let template = example(language, "tests");
    let of = |four: &str| {
        let path = test_path(language);
        let text = template.replace("FOUR", four);
        let program = in_language(language, "languages", &example(language, "passes"));
        with(program, json!({ "tests": { path: text } }))
    };
    let id = client.send(of("4")).await;
    let reply = client.reply(&id).await;
    assert_eq!(
        reply["status"], "tests_passed",
        "{}: {reply}",
        language.name
    );
    assert_eq!(reply["tests"].as_array().unwrap().len(), 1, "{reply}");
    assert_eq!(reply["tests"][0]["passed"], true, "{reply}");
    let told = client.frames[&id].iter();
    let told = told.filter(|frame| frame["event"] == "test");
    assert_eq!(told.count(), 1, "{}", language.name);
    let reply = client.ask(of("5")).await;
    let outcome = json!([reply["status"], reply["reason"]]);
    assert_eq!(
        outcome,
        json!(["tests_failed", "tests"]),
        "{}: {reply}",
        language.name
    );
    assert_eq!(reply["tests"][0]["passed"], false, "{reply}");
    let message = reply["tests"][0]["message"].as_str().unwrap();
    assert!(message.contains("not 5"), "{}: {message}", language.name);
}

async fn serves(language: &Language, client: &mut Client, server: &Server) {
    let repl = format!("{}-serves", language.name);
    // A server does not end by itself: what is tested is its other side.
    let check = json!({ "name": "check", "args": ["check"], "expected_stdout": "ok\n" });
    let serving = in_language(language, "languages", &example(language, "serves"));
    let more = json!({ "deploy": true, "database": false, "repl_id": repl, "tests": [check] });
    let reply = client.ask(with(serving, more)).await;
    assert_eq!(reply["status"], "deployed", "{}: {reply}", language.name);
    let answer = get(server, &repl, "/some/path").await;
    assert!(
        // Of unknown length, it comes in pieces.
        answer.contains("served /some/path"),
        "{}: {answer}",
        language.name
    );
    let stopped = server
        .post("/stop")
        .header("x-api-key", &server.admin)
        .body(json!({ "replId": repl }).to_string());
    assert_eq!(stopped.send().await.unwrap().status(), 200);
}

/// What the repl answers.
async fn get(server: &Server, repl: &str, path: &str) -> String {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer));
    read.await.unwrap().unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

/// The rest needs one compiler, the one that every machine with Rust on it has.
fn c(user: &str, code: &str) -> Value {
    in_language(Language::named("c").unwrap(), user, code)
}

#[tokio::test]
async fn a_program_of_several_files_is_compiled_once_for_all_its_tests() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let main = "#include <stdio.h>\n#include \"lib/twice.h\"\n\
        int main(void) { int n; scanf(\"%d\", &n); printf(\"%d\\n\", twice(n)); }";
    let case = |n: i32| json!({ "name": n.to_string(), "stdin": n.to_string(), "expected_stdout": format!("{}\n", 2 * n) });
    let id = client
        .send(json!({
            "user_id": "files", "language": "c", "deploy": false, "tests": [case(1), case(2), case(3)],
            "files": {
                "main.c": main, "lib/twice.h": "int twice(int);",
                "lib/twice two.c": "#include \"twice.h\"\nint twice(int n) { return 2 * n; }",
            },
        }))
        .await;
    let reply = client.reply(&id).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    assert_eq!(reply["tests"].as_array().unwrap().len(), 3);
    let steps = client.steps(&id);
    let compiles = steps.iter().filter(|step| step.starts_with("compile"));
    assert_eq!(compiles.count(), 2, "{steps:?}");
}

#[tokio::test]
async fn what_is_typed_while_it_compiles_is_the_programs_and_warnings_are_not_its_output() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let code = "#include <stdio.h>\n#warning careful\n\
        int main(void) { char word[9]; while (scanf(\"%8s\", word) == 1) puts(word); }";
    let typed = with(c("typing", code), json!({ "interactive": true }));
    let id = client.send(typed).await;
    client.tell(json!({ "stdin": id, "data": "early\n" })).await;
    client
        .until(&id, |frame| {
            frame["name"] == "test" && frame["state"] == "started"
        })
        .await;
    let late = json!({ "stdin": id, "data": "late\n", "eof": true });
    client.tell(late).await;
    let reply = client.reply(&id).await;
    assert_eq!(reply["stdout"], "early\nlate\n", "{reply}");
    assert_eq!(reply["stderr"], "", "{reply}");
    let warned = client.frames[&id].iter().any(|frame| {
        frame["event"] == "output" && frame["data"].as_str().unwrap().contains("careful")
    });
    assert!(warned, "{:?}", client.frames[&id]);
}

#[tokio::test]
async fn compiling_can_be_cancelled_and_has_limits_of_its_own() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    // A compiler that waits for more of a file.
    let endless = "#include \"/proc/self/fd/0\"\n";
    let id = client.send(c("endless", endless)).await;
    let reply = client.reply(&id).await;
    assert_eq!(reply["reason"], "compile", "its input is empty: {reply}");
    let slow = "constexpr long sum() {\n  long sum = 0;\n  for (int i = 0; i < 200000; i++)\n    \
        for (int j = 0; j < 200; j++) sum += j;\n  return sum;\n}\n\
        constexpr long value = sum();\nint main() { return value & 1; }\n";
    let slow = in_language(Language::named("cpp").unwrap(), "endless", slow);
    let id = client.send(slow).await;
    client
        .until(&id, |frame| {
            frame["name"] == "compile" && frame["state"] == "started"
        })
        .await;
    // By now it is at work; how far does not matter.
    tokio::time::sleep(Duration::from_millis(300)).await;
    client.tell(json!({ "cancel": id })).await;
    let asked = Instant::now();
    let reply = client.reply(&id).await;
    assert_eq!(reply["status"], "cancelled", "{reply}");
    assert!(asked.elapsed() < Duration::from_secs(5));
    // What was compiled is no file of the program's.
    let limits = json!({ "limits": { "file_bytes": 1_000, "processes": 1, "wall_ms": 5_000 } });
    let small = with(c("endless", "int main(void) { return 0; }"), limits.clone());
    let reply = client.ask(small).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let noisy = "#warning no\n".repeat(30_000) + "int main(void) { return 0; }";
    let reply = client.ask(with(c("endless", &noisy), limits)).await;
    assert_eq!(
        json!([reply["status"], reply["reason"], reply["error"]["code"]]),
        json!(["tests_failed", "compile", "compile_limit"]),
        "{reply}"
    );
}

#[tokio::test]
async fn a_test_is_compiled_with_the_program_but_its_entry_and_each_is_told_of() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let test = |n: i32| {
        format!(
            "#include <assert.h>\n#include \"twice.h\"\nint main(void) {{ assert(twice(2) == {n}); }}"
        )
    };
    let program = json!({ "user_id": "tests", "language": "c", "deploy": false, "files": {
        "main.c": "#include \"twice.h\"\nint main(void) { return twice(0); }",
        "twice.h": "int twice(int);",
        "twice.c": "int twice(int n) { return 2 * n; }",
    } });
    let tests = json!({ "tests": {
        "tests/good.c": test(4), "tests/other.c": test(4), "tests/wrong.c": test(5),
        "tests/zz_broken.c": "int main(void) { return nothing; }",
    } });
    let reply = client.ask(with(program.clone(), tests)).await;
    assert_eq!(reply["reason"], "tests", "{reply}");
    let told: Vec<Value> = reply["tests"].as_array().unwrap().clone();
    let told: Vec<Value> = told
        .iter()
        .map(|one| json!([one["name"], one["passed"]]))
        .collect();
    let expected = json!([
        ["tests/good.c", true],
        ["tests/other.c", true],
        ["tests/wrong.c", false],
        ["tests/zz_broken.c", false]
    ]);
    assert_eq!(json!(told), expected, "{reply}");
    let message = |at: usize| reply["tests"][at]["message"].as_str().unwrap();
    assert!(
        message(2).contains("SIGABRT") && message(2).contains("twice(2) == 5"),
        "{reply}"
    );
    assert!(
        message(3).contains("exit code 1") && message(3).contains("nothing"),
        "{reply}"
    );
    // A test that does not end is stopped, and the others have their say.
    let endless = json!({ "language": "bash", "limits": { "wall_ms": 1_000 }, "files": { "main.sh": "" },
        "tests": { "a.sh": "sleep 60", "b.sh": "exit 0" } });
    let reply = client.ask(with(program, endless)).await;
    assert_eq!(reply["reason"], "timeout", "{reply}");
    assert_eq!(reply["tests"][1]["passed"], true, "{reply}");
}

#[tokio::test]
async fn a_release_that_was_compiled_comes_back_with_the_server() {
    let mut server = Server::start();
    let mut client = Client::of(&server).await;
    let serving = c("back", &example(Language::named("c").unwrap(), "serves"));
    let check = json!({ "name": "check", "args": ["check"], "expected_stdout": "ok\n" });
    let more = json!({ "deploy": true, "tests": [check] });
    let reply = client.ask(with(serving, more)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    server.restart();
    let since = Instant::now();
    while !get(&server, "back-prod", "/again")
        .await
        .ends_with("served /again")
    {
        assert!(since.elapsed() < PATIENCE, "it did not come back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn the_place_of_compiled_output_is_not_anybodys() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    for (language, path) in [
        ("c", ".build/main"),
        ("c", ".build"),
        ("python", ".build.tar.gz"),
    ] {
        let reply = client
            .ask(
                json!({ "user_id": "reserved", "language": language, "entrypoint": "main.c",
                "files": { "main.c": "int main(void) {}", path: "#!/bin/sh\necho mine" } }),
            )
            .await;
        assert_eq!(reply["status"], "invalid", "{path}: {reply}");
        assert!(reply.to_string().contains("Gantry uses itself"), "{reply}");
    }
}

#[tokio::test]
async fn a_projects_own_file_says_how_it_is_built_and_run() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let project = |language: &str, files: Value| json!({ "user_id": "project", "language": language, "deploy": false, "files": files });
    let cases = [
        project(
            "node",
            json!({
                "package.json": r#"{"type":"module","scripts":{"start":"node ./src/app.js"}}"#,
                "src/app.js": "import { word } from './word.js'; console.log(word);",
                "src/word.js": "export const word = 'project';",
            }),
        ),
        project(
            "go",
            json!({
                "go.mod": "module example.org/project\n\ngo 1.19\n",
                "main.go": "package main\n\nimport \"example.org/project/word\"\n\nfunc main() { println(word.Word); print(\"\") }\n",
                "word/word.go": "package word\n\nconst Word = \"project\"\n",
            }),
        ),
        project(
            "rust",
            json!({
                "Cargo.toml": "[package]\nname = \"named\"\nversion = \"1.0.0\"\nedition = \"2021\"\n",
                "src/main.rs": "mod word;\nfn main() { println!(\"{}\", word::WORD); }",
                "src/word.rs": "pub const WORD: &str = \"project\";",
            }),
        ),
    ];
    for message in cases {
        let language = Language::named(message["language"].as_str().unwrap()).unwrap();
        let reply = client.ask(message).await;
        if is_there(language, &reply) {
            assert_eq!(
                reply["status"], "tests_passed",
                "{}: {reply}",
                language.name
            );
            let said = format!("{}{}", reply["stdout"], reply["stderr"]);
            assert!(said.contains("project"), "{reply}");
        }
    }
}
