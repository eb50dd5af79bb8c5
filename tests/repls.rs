//! Repls over HTTP, on the local platform: started from files that somebody else put into the code store.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "repls/dns.rs"]
mod dns;
#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use reqwest::header::{HOST, ORIGIN};
use serde_json::{Value, json};

use server::{PATIENCE, Server, client};

use dns::Dns;

/// A program that serves its own file.
const SERVER: &str = "
import http.server
http.server.test(http.server.SimpleHTTPRequestHandler, port=3000, bind='127.0.0.1')
";

/// Puts a file where another service would.
fn put(server: &Server, repl: &str, name: &str, content: impl AsRef<[u8]>) {
    let file = current(server, repl).join(name);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(file, content).unwrap();
}

fn current(server: &Server, repl: &str) -> PathBuf {
    server.data.path().join("store/code").join(repl)
}

async fn post(server: &Server, key: &str, path: &str, body: &Value) -> (u16, Value) {
    let request = server.post(path).header("x-api-key", key);
    let answer = request.json(body).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

/// The ticket in a terminal's URL is another one each time.
async fn start(server: &Server, body: Value) -> (u16, Value) {
    let (status, mut told) = post(server, &server.admin, "/start", &body).await;
    if let Some(url) = told["terminalUrl"].as_str() {
        let (url, ticket) = url.split_once("?ticket=").unwrap();
        assert!(ticket.len() > 64, "{ticket}");
        told["terminalUrl"] = format!("{url}?ticket=").into();
    }
    (status, told)
}

async fn stop(server: &Server, repl: &str) {
    let stopped = post(server, &server.admin, "/stop", &json!({ "replId": repl })).await;
    assert_eq!(stopped, (200, json!({ "success": true })));
}

async fn page(server: &Server, repl: &str) -> (u16, String) {
    page_at(server, repl, "/main.py").await
}

async fn page_at(server: &Server, repl: &str, path: &str) -> (u16, String) {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let answer = server.get(path).header(HOST, host).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

/// What is told of the repl, once it is in this state.
async fn state(server: &Server, repl: &str, state: &str) -> Value {
    let started = Instant::now();
    loop {
        let asked = server.get(&format!("/repls/{repl}"));
        let answer = asked
            .header("x-api-key", &server.admin)
            .send()
            .await
            .unwrap();
        let told: Value = answer.json().await.unwrap();
        if told["state"] == state {
            return told;
        }
        assert!(
            started.elapsed() < PATIENCE,
            "{repl} is never {state}: {told}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The repl's page, once it says so.
async fn page_with(server: &Server, repl: &str, says: &str) -> (u16, String) {
    let started = Instant::now();
    loop {
        let (status, text) = page(server, repl).await;
        if text.contains(says) {
            return (status, text);
        }
        assert!(
            started.elapsed() < PATIENCE,
            "{repl} does not say {says:?}: {text}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn start_and_stop_reply_as_the_contract_says() {
    let server = Server::start();
    put(&server, "shop", "main.py", SERVER);
    let port = server.address.port();
    let expected = |created: bool| {
        json!({
            "success": true, "podCreated": created, "message": "Resources created successfully",
            "replId": "shop", "namespace": "user-ann",
            "url": format!("http://shop.apps.localhost:{port}/"),
            "terminalUrl": format!("ws://shop.localhost:{port}/?ticket="),
        })
    };
    let by_user = json!({ "userId": "ann", "replId": "shop" });
    assert_eq!(start(&server, by_user.clone()).await, (200, expected(true)));
    let (status, text) = page_with(&server, "shop", "SimpleHTTPRequestHandler").await;
    assert_eq!((status, text.as_str()), (200, SERVER));
    assert_eq!(start(&server, by_user).await, (200, expected(false)));
    // The other form, of somebody who knows the repl's owner no more.
    let by_language = json!({ "replId": "shop", "language": "python" });
    assert_eq!(
        start(&server, by_language.clone()).await,
        (200, expected(false))
    );
    let told = state(&server, "shop", "running").await;
    assert_eq!(told["ready"], 1, "{told}");
    assert!(told.get("release").is_none(), "{told}");
    stop(&server, "shop").await;
    assert_eq!(page(&server, "shop").await.0, 404);
    stop(&server, "shop").await;
    stop(&server, "never-was").await;
    assert!(current(&server, "shop").join("main.py").exists());
    assert_eq!(start(&server, by_language).await, (200, expected(true)));
    page_with(&server, "shop", "SimpleHTTPRequestHandler").await;
}

#[tokio::test]
async fn what_is_wrong_with_a_request_is_said_by_field() {
    let server = Server::start();
    let cases = [
        (json!({}), "replId"),
        (json!({ "language": "python" }), "replId"),
        (json!({ "replId": null, "language": "python" }), "replId"),
        (
            json!({ "replId": "Not/a-label", "language": "python" }),
            "replId",
        ),
        (
            json!({ "replId": "x\nkind: Secret", "language": "python" }),
            "replId",
        ),
        (json!({ "replId": 7, "language": "python" }), "replId"),
        (json!({ "replId": "x" }), "language or userId"),
        (json!({ "replId": "x", "userId": "A" }), "userId"),
        (
            json!({ "replId": "x", "language": "cobol" }),
            "known are python, node, typescript, bash",
        ),
        (
            json!({ "replId": "x", "language": "python", "more": 1 }),
            "more",
        ),
        (json!([]), "object"),
    ];
    for (body, says) in cases {
        let (status, told) = start(&server, body.clone()).await;
        assert_eq!(status, 400, "{body}: {told}");
        assert_eq!(told["success"], false, "{told}");
        assert!(
            told["message"].is_string() && told.to_string().contains(says),
            "{body}: {told}"
        );
    }
    let without_key = server
        .post("/start")
        .json(&json!({ "replId": "x", "language": "python" }));
    assert_eq!(without_key.send().await.unwrap().status(), 401);
}

#[tokio::test]
async fn a_repl_of_another_user_is_as_if_reserved() {
    let server = Server::start();
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    put(&server, "shop", "main.py", SERVER);
    let body = json!({ "replId": "shop", "language": "python" });
    let (status, told) = post(&server, &ann, "/start", &body).await;
    assert_eq!((status, &told["namespace"]), (200, &json!("user-ann")));
    let (status, told) = post(&server, &bob, "/start", &body).await;
    assert_eq!((status, &told["success"]), (400, &json!(false)));
    assert_eq!(told["message"], "replId is not available; choose another");
    let as_ann = json!({ "replId": "other", "userId": "ann" });
    let (status, told) = post(&server, &bob, "/start", &as_ann).await;
    assert_eq!(status, 400);
    assert_eq!(told["message"], "userId is not one this key may act for");
    // Stopping what is not there is fine, and stops nobody else's.
    assert_eq!(post(&server, &bob, "/stop", &body_of("shop")).await.0, 200);
    page_with(&server, "shop", "SimpleHTTPRequestHandler").await;
}

fn body_of(repl: &str) -> Value {
    json!({ "replId": repl })
}

#[tokio::test]
async fn the_language_is_seen_by_the_files_and_a_failure_stays_to_be_looked_at() {
    let server = Server::start();
    put(
        &server,
        "script",
        "main.sh",
        "echo from a shell; cat data.bin | wc -c; exit 5",
    );
    put(&server, "script", "data.bin", [0xff, 0, 0xfe]);
    let (status, told) = start(&server, json!({ "replId": "script", "userId": "ann" })).await;
    assert_eq!(status, 200, "{told}");
    // Strangers are not shown what it wrote, and its owner is.
    let (status, text) = page_with(&server, "script", "not available").await;
    assert_eq!(status, 502);
    assert!(
        !text.contains("from a shell") && !text.contains("exit code"),
        "{text}"
    );
    let none = &json!({});
    let ticket = post(&server, &server.admin, "/repls/script/ticket", none).await;
    let path = format!("/?ticket={}", ticket.1["ticket"].as_str().unwrap());
    let (status, text) = page_at(&server, "script", &path).await;
    assert_eq!(status, 502);
    assert!(
        text.contains("from a shell\n3\n") && text.contains("exit code 5"),
        "{text}"
    );
    let told = state(&server, "script", "exited(5)").await;
    assert!(
        told["last_error"].as_str().unwrap().contains("exit code 5"),
        "{told}"
    );
}

#[tokio::test]
async fn what_a_submission_of_the_files_would_run_is_started() {
    let server = Server::start();
    let says = |text: &str| format!("console.log('from ' + '{text}')");
    let package =
        |start: &str| format!(r#"{{"scripts":{{"start":"node {start}"}},"main":"index.js"}}"#);
    type Case<'a> = (&'a str, &'a [(&'a str, String)], &'a str);
    let cases: &[Case] = &[
        ("index", &[("index.js", says("index"))], "from index"),
        (
            "server",
            &[("server.js", says("server")), ("lib/x.js", String::new())],
            "from server",
        ),
        (
            "main-of",
            &[
                ("package.json", r#"{"main":"./lib/start.js"}"#.to_owned()),
                ("lib/start.js", says("main")),
                ("index.js", says("index")),
            ],
            "from main",
        ),
        (
            "start-of",
            &[
                ("package.json", package("bin/www.js")),
                ("bin/www.js", says("scripts")),
                ("index.js", says("index")),
            ],
            "from scripts",
        ),
        (
            "app",
            &[
                ("app.py", "import util\nprint('from', util.NAME)".to_owned()),
                ("util.py", "NAME = 'app'".to_owned()),
                ("static/app.js", says("a page")),
            ],
            "from app",
        ),
        (
            "only",
            &[("hello.sh", "echo from the only file".to_owned())],
            "from the only file",
        ),
    ];
    for (name, files, expected) in cases {
        // "app" and "server" alone are reserved.
        let repl = &format!("{name}-start");
        for (name, text) in *files {
            put(&server, repl, name, text);
        }
        let (status, told) = start(&server, json!({ "replId": repl, "userId": "ann" })).await;
        assert_eq!(status, 200, "{repl}: {told}");
        let (_, text) = page_with(&server, repl, "exit code 0").await;
        assert!(text.contains(expected), "{repl}: {text}");
        stop(&server, repl).await;
    }
    // Named by the request, as the services that call it do.
    let body = json!({ "replId": "start-of-start", "language": "node" });
    assert_eq!(start(&server, body).await.0, 200);
    let (_, text) = page_with(&server, "start-of-start", "exit code 0").await;
    assert!(text.contains("from scripts"), "{text}");
}

#[tokio::test]
async fn a_start_without_files_takes_no_name() {
    let server = Server::start();
    let body = json!({ "replId": "nosuch", "userId": "ann" });
    for body in [
        body.clone(),
        json!({ "replId": "nosuch", "language": "node" }),
    ] {
        let (status, told) = start(&server, body).await;
        assert_eq!((status, &told["error"]["code"]), (500, &json!("no_files")));
    }
    let asked = server.get("/repls/nosuch");
    let answer = asked.header("x-api-key", &server.admin).send().await;
    assert_eq!(answer.unwrap().status(), 404);
    // It is anybody's still.
    let (_, bob) = server.user("bob").await;
    put(&server, "nosuch", "main.py", "print('mine')");
    let (status, told) = post(
        &server,
        &bob,
        "/start",
        &json!({ "replId": "nosuch", "language": "python" }),
    )
    .await;
    assert_eq!((status, &told["namespace"]), (200, &json!("user-bob")));
    // One that runs goes on, whatever became of its files in the store.
    std::fs::remove_dir_all(current(&server, "nosuch")).unwrap();
    let (status, told) = start(&server, json!({ "replId": "nosuch", "language": "python" })).await;
    assert_eq!((status, &told["podCreated"]), (200, &json!(false)));
}

async fn delete(server: &Server, key: &str, path: &str) -> (u16, Value) {
    let request = client().delete(server.url(path));
    let answer = request.header("x-api-key", key).send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap())
}

#[tokio::test]
async fn a_name_is_given_back_without_a_confirmation_only_when_nothing_is_kept_under_it() {
    let mut server = Server::start();
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    let full = json!({ "replId": "full", "language": "python", "files": { "main.py": SERVER } });
    assert_eq!(post(&server, &ann, "/start", &full).await.0, 200);
    // What a server leaves that ended after it took a name and before it stored anything.
    server.kill();
    let records = server.data.path().join("local/repls");
    let record = json!({ "user_id": "ann", "wanted": false, "releases": [], "since": "2026-01-01T00:00:00Z" });
    std::fs::write(records.join("empty.json"), record.to_string()).unwrap();
    server.start_again();

    assert_eq!(delete(&server, &bob, "/repls/empty/name").await.0, 404);
    let (status, told) = delete(&server, &ann, "/repls/empty/name").await;
    assert_eq!((status, &told["success"]), (200, &json!(true)), "{told}");
    assert!(!records.join("empty.json").exists());
    assert_eq!(delete(&server, &ann, "/repls/empty/name").await.0, 404);

    for path in ["/repls/full/name", "/repls/full/name?confirm=other"] {
        let (status, told) = delete(&server, &ann, path).await;
        let code = told["code"].as_str();
        assert_eq!((status, code), (409, Some("not_confirmed")), "{told}");
        assert_eq!(told["deletes"]["files"], 1, "{told}");
    }
    assert!(current(&server, "full").join("main.py").exists());
    let (status, told) = delete(&server, &ann, "/repls/full/name?confirm=full").await;
    assert_eq!((status, &told["success"]), (200, &json!(true)), "{told}");
    assert!(!current(&server, "full").exists());
}

#[tokio::test]
async fn a_repl_is_deleted_with_all_it_has_when_its_name_confirms_it() {
    let server = Server::start();
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    let mut socket = server.connect(&ann).await;
    let code = "import os\nif os.path.isdir('/data'): open('/data/kept', 'w').write('x' * 5000)\nprint('made')";
    let submission = json!({ "user_id": "ann", "repl_id": "shop", "code": code, "database": true });
    let reply = socket.ask(submission.to_string()).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let settings = json!({ "env": { "COLOUR": "red" } });
    assert_eq!(
        configure(&server, &ann, "/repls/shop/env", &settings)
            .await
            .0,
        200
    );
    let folders = || {
        let data = server.data.path();
        [
            "store/code/shop",
            "store/releases/shop",
            "local/databases/shop",
            "local/repls/shop.json",
        ]
        .map(|name| data.join(name).exists())
    };
    assert_eq!(folders(), [true; 4]);
    for path in [
        "/repls/shop",
        "/repls/shop?confirm=",
        "/repls/shop?confirm=other",
    ] {
        let (status, told) = delete(&server, &ann, path).await;
        assert_eq!(
            (status, &told["code"]),
            (409, &json!("not_confirmed")),
            "{told}"
        );
        let deletes = &told["deletes"];
        let counts = ["files", "releases", "variables"].map(|name| deletes[name].as_u64());
        assert_eq!(counts, [Some(1), Some(1), Some(1)], "{told}");
        assert!(
            deletes["data"]["bytes"].as_u64().unwrap() >= 5_000,
            "{told}"
        );
        assert!(
            told["cause"].as_str().unwrap().contains("bytes of data"),
            "{told}"
        );
    }
    assert_eq!(
        delete(&server, &bob, "/repls/shop?confirm=shop").await.0,
        404
    );
    assert_eq!(folders(), [true; 4]);
    let (status, told) = delete(&server, &ann, "/repls/shop?confirm=shop").await;
    assert_eq!((status, &told["success"]), (200, &json!(true)), "{told}");
    assert_eq!(folders(), [false; 4]);
    assert_eq!(page(&server, "shop").await.0, 404);
    assert_eq!(
        delete(&server, &ann, "/repls/shop?confirm=shop").await.0,
        404
    );
    // Its name is anybody's, and an admin deletes everybody's, also what runs.
    let mine = json!({ "replId": "shop", "language": "python", "files": { "main.py": SERVER } });
    assert_eq!(post(&server, &bob, "/start", &mine).await.0, 200);
    state(&server, "shop", "running").await;
    let deleted = delete(&server, &server.admin, "/repls/shop?confirm=shop").await;
    assert_eq!(deleted.0, 200, "{}", deleted.1);
    assert_eq!(folders(), [false; 4]);
}

/// Starts at once: more than the machine has processors for, so that everything comes late.
const SHORT_PROGRAMS: usize = 12;

#[tokio::test]
async fn what_a_short_program_wrote_is_on_its_page_however_busy_the_machine_is() {
    let server = Server::start();
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    for _ in 0..if full { 10 } else { 1 } {
        let names: Vec<String> = (0..SHORT_PROGRAMS).map(|n| format!("short-{n}")).collect();
        let all = names.iter().map(async |repl| {
            put(&server, repl, "main.py", "print('Hello')\n");
            let body = json!({ "replId": repl, "userId": "ann" });
            assert_eq!(start(&server, body).await.0, 200);
            let (status, text) = page_with(&server, repl, "exit code").await;
            assert_eq!(status, 200, "{text}");
            assert!(text.contains("<pre>Hello\n</pre>"), "{text}");
            stop(&server, repl).await;
        });
        futures_util::future::join_all(all).await;
    }
}

#[tokio::test]
async fn files_that_are_missing_or_lead_elsewhere_are_told() {
    let server = Server::start();
    let (status, told) = start(&server, json!({ "replId": "empty", "language": "python" })).await;
    assert_eq!(status, 500, "{told}");
    assert_eq!(
        (&told["success"], &told["message"]),
        (&json!(false), &json!("Failed to create resources"))
    );
    let cause = told["error"]["cause"].as_str().unwrap();
    assert!(cause.contains("code/empty is not there"), "{told}");
    put(&server, "linked", "main.py", "");
    std::os::unix::fs::symlink("/etc/passwd", current(&server, "linked").join("theirs")).unwrap();
    let (_, told) = start(&server, json!({ "replId": "linked", "language": "python" })).await;
    // The sandbox refuses it: nothing of the link is ever shown.
    let (_, text) = page(&server, "linked").await;
    assert!(!text.contains("root:"), "{told} {text}");
}

#[tokio::test]
async fn of_many_starts_at_once_one_makes_it() {
    let server = Server::start();
    put(&server, "race", "main.py", SERVER);
    let body = json!({ "replId": "race", "userId": "ann" });
    let all = (0..20).map(|_| start(&server, body.clone()));
    let all = futures_util::future::join_all(all).await;
    assert!(all.iter().all(|(status, _)| *status == 200), "{all:?}");
    let made = all.iter().filter(|(_, told)| told["podCreated"] == true);
    assert_eq!(made.count(), 1, "{all:?}");
    let sandboxes = || {
        let entries = std::fs::read_dir(server.data.path().join("local/sandboxes")).unwrap();
        entries.count()
    };
    assert_eq!(sandboxes(), 1);
    // Starts and stops that cross each other leave one thing or nothing, and never two.
    let crossed = (0..10).map(|_| async {
        start(&server, body.clone()).await;
        stop(&server, "race").await;
    });
    futures_util::future::join_all(crossed).await;
    stop(&server, "race").await;
    assert_eq!(sandboxes(), 0);
}

#[tokio::test]
async fn a_repl_comes_back_after_the_server_was_killed() {
    let mut server = Server::start();
    put(&server, "back", "main.py", SERVER);
    let body = json!({ "replId": "back", "userId": "ann" });
    assert_eq!(start(&server, body.clone()).await.0, 200);
    server.restart();
    page_with(&server, "back", "SimpleHTTPRequestHandler").await;
    let (status, told) = start(&server, body).await;
    assert_eq!((status, &told["podCreated"]), (200, &json!(false)));
    stop(&server, "back").await;
    server.restart();
    assert_eq!(
        page(&server, "back").await.0,
        404,
        "a stopped repl came back"
    );
}

/// Brought back one after the other, so that the last ones are not there yet when they are asked for.
#[tokio::test]
async fn a_repl_that_is_coming_back_is_waited_for() {
    let mut server = Server::start();
    let names: Vec<String> = (0..6).map(|n| format!("back-{n}")).collect();
    for name in &names {
        put(&server, name, "main.py", SERVER);
        let body = json!({ "replId": name, "userId": "ann" });
        assert_eq!(start(&server, body).await.0, 200);
    }
    server.restart();
    let (server, none) = (&server, &json!({}));
    let asked = names.iter().map(|name| async move {
        let path = format!("/repls/{name}/ticket");
        let (ticket, page) =
            tokio::join!(post(server, &server.admin, &path, none), page(server, name));
        // On a very busy machine it is "not yet"; it is never said to be gone.
        assert!([200, 503].contains(&ticket.0), "{name}: {ticket:?}");
        assert!([200, 503].contains(&page.0), "{name}: {page:?}");
        page_with(server, name, "SimpleHTTPRequestHandler").await;
    });
    futures_util::future::join_all(asked).await;
}

/// A program that serves what it was given, and what is beside it.
const GIVEN: &str = "
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = ('COLOUR', 'TOKEN', 'PORT')
        body = ' '.join(os.environ.get(name, 'none') for name in names).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(('127.0.0.1', 3000), Handler).serve_forever()
";

async fn configure(server: &Server, key: &str, path: &str, body: &Value) -> (u16, Value) {
    let method = if path.ends_with("/scale") {
        reqwest::Method::POST
    } else {
        reqwest::Method::PUT
    };
    let request = client().request(method, server.url(path));
    let request = request.header("x-api-key", key).json(body);
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test]
async fn a_repl_is_given_variables_and_its_secrets_are_never_told() {
    let mut server = Server::start();
    put(&server, "shop", "main.py", GIVEN);
    let admin = server.admin.clone();
    start(&server, json!({ "replId": "shop", "userId": "ann" })).await;
    page_with(&server, "shop", "none none 3000").await;
    let path = "/repls/shop/env";
    let both = json!({ "env": { "COLOUR": "red" }, "secrets": { "TOKEN": "hush-hush" } });
    let told = json!({ "replId": "shop", "env": { "COLOUR": "red" }, "secrets": ["TOKEN"] });
    let set = configure(&server, &admin, path, &both).await;
    assert_eq!(set, (200, told.clone()));
    page_with(&server, "shop", "red hush-hush 3000").await;
    let shown = server.get(path).header("x-api-key", &admin).send().await;
    assert_eq!(shown.unwrap().json::<Value>().await.unwrap(), told);
    let kept = json!({ "env": { "COLOUR": "blue" }, "secrets": { "TOKEN": null } });
    assert_eq!(configure(&server, &admin, path, &kept).await.0, 200);
    page_with(&server, "shop", "blue hush-hush").await;
    // They are there after a power cut, and after a stop.
    server.restart();
    page_with(&server, "shop", "blue hush-hush").await;
    stop(&server, "shop").await;
    let more = json!({ "env": { "COLOUR": "green" } });
    assert_eq!(configure(&server, &admin, path, &more).await.0, 200);
    start(&server, json!({ "replId": "shop", "userId": "ann" })).await;
    page_with(&server, "shop", "green hush-hush").await;
    // What is told of it, and what was logged, does not have the secret; its file is the server's alone.
    for path in ["/repls/shop", "/repls", "/logs?repl_id=shop"] {
        let answer = server.get(path).header("x-api-key", &admin).send().await;
        let text = answer.unwrap().text().await.unwrap();
        assert!(text.contains("shop") && !text.contains("hush"), "{text}");
    }
    let record = server.data.path().join("local/repls/shop.json");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(record).unwrap().permissions());
    assert_eq!(mode & 0o077, 0);
}

#[tokio::test]
async fn what_is_wrong_with_settings_is_said_and_nothing_changes() {
    let server = Server::start();
    let (_, bob) = server.user("bob").await;
    put(&server, "shop", "main.py", GIVEN);
    start(&server, json!({ "replId": "shop", "userId": "ann" })).await;
    page_with(&server, "shop", "none none").await;
    let admin = server.admin.clone();
    for (path, body, status, says) in [
        ("env", json!({ "env": { "A=B": "x" } }), 400, "A=B"),
        ("env", json!({ "env": { "PORT": "1" } }), 400, "PORT"),
        ("env", json!({ "env": { "A": 1 } }), 400, "env"),
        (
            "env",
            json!({ "secrets": { "OTHER": null } }),
            400,
            "secrets.OTHER",
        ),
        ("env", json!({ "more": {} }), 400, "more"),
        ("scale", json!({ "replicas": 0 }), 400, "replicas"),
        ("scale", json!({}), 400, "replicas"),
        (
            "scale",
            json!({ "replicas": 2 }),
            501,
            "GANTRY_PLATFORM=kubernetes",
        ),
        (
            "scale",
            json!({ "min": 1, "max": 5, "cpu_percent": 70 }),
            501,
            "one machine",
        ),
    ] {
        let at = format!("/repls/shop/{path}");
        let (found, told) = configure(&server, &admin, &at, &body).await;
        assert_eq!(found, status, "{body}: {told}");
        assert!(told.to_string().contains(says), "{body}: {told}");
    }
    let good = json!({ "env": { "COLOUR": "red" } });
    for path in ["/repls/shop/env", "/repls/nobodys/env"] {
        let theirs = configure(&server, &bob, path, &good).await;
        assert_eq!((theirs.0, &theirs.1["code"]), (404, &json!("not_found")));
    }
    let theirs = server.get("/repls/shop/env").header("x-api-key", &bob);
    assert_eq!(theirs.send().await.unwrap().status(), 404);
    let one = configure(
        &server,
        &admin,
        "/repls/shop/scale",
        &json!({ "replicas": 1 }),
    )
    .await;
    assert_eq!(one, (200, json!({ "replId": "shop", "replicas": 1 })));
    page_with(&server, "shop", "none none").await;
}

/// What a request for this host is answered.
async fn at(server: &Server, host: &str) -> (u16, String) {
    let answer = server
        .get("/main.py")
        .header(HOST, host)
        .send()
        .await
        .unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[tokio::test]
async fn a_domain_is_proved_before_it_is_used() {
    let dns = Dns::start().await;
    let nameserver = dns.address.to_string();
    let mut server = Server::start_as(0, &[("GANTRY_NAMESERVER", &nameserver)]);
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    for (key, repl) in [(&ann, "shop"), (&bob, "thief")] {
        put(&server, repl, "main.py", SERVER);
        let body = json!({ "replId": repl, "language": "python" });
        assert_eq!(post(&server, key, "/start", &body).await.0, 200);
    }
    page_with(&server, "shop", "SimpleHTTPRequestHandler").await;
    assert_eq!(at(&server, "shop.example.com").await.0, 403);
    let path = "/repls/shop/domains";
    let wanted = json!({ "domains": ["Shop.Example.com."] });
    let (status, told) = configure(&server, &ann, path, &wanted).await;
    assert_eq!(
        (status, &told["code"]),
        (409, &json!("domain_not_proved")),
        "{told}"
    );
    let proof = told["proofs"][0].clone();
    assert_eq!(proof["name"], "_gantry.shop.example.com");
    assert_eq!(proof["type"], "TXT");
    let value = proof["value"].as_str().unwrap();
    assert!(told["cause"].as_str().unwrap().contains(value));
    // Texts of others, and another's proof of the same domain, are none.
    let (_, theirs) = configure(&server, &bob, "/repls/thief/domains", &wanted).await;
    let theirs = theirs["proofs"][0]["value"].as_str().unwrap().to_owned();
    dns.set("_gantry.shop.example.com", &["v=spf1 -all", &theirs]);
    assert_eq!(configure(&server, &ann, path, &wanted).await.0, 409);
    assert_eq!(at(&server, "shop.example.com").await.0, 403);
    dns.set("_gantry.shop.example.com", &["v=spf1 -all", value]);
    let named = (
        200,
        json!({ "replId": "shop", "domains": ["shop.example.com"] }),
    );
    assert_eq!(configure(&server, &ann, path, &wanted).await, named);
    for host in [
        "shop.example.com",
        "SHOP.example.com:8443",
        "shop.example.com.",
    ] {
        let served = at(&server, host).await;
        assert_eq!(served, (200, SERVER.to_owned()), "{host}");
    }
    assert_eq!(at(&server, "other.shop.example.com").await.0, 403);
    // A program's host, and never one of the API's.
    let asked = server
        .get("/repls")
        .header(HOST, "shop.example.com")
        .header("x-api-key", &ann);
    assert_eq!(asked.send().await.unwrap().status(), 404);
    // Another cannot have it, with or without a proof.
    dns.set("_gantry.shop.example.com", &[value, &theirs]);
    let (status, told) = configure(&server, &bob, "/repls/thief/domains", &wanted).await;
    assert_eq!(
        (status, &told["code"]),
        (409, &json!("domain_taken")),
        "{told}"
    );
    // It was proved; it outlives a power cut, and its record in the DNS.
    dns.set("_gantry.shop.example.com", &[]);
    server.restart();
    page_with(&server, "shop", "SimpleHTTPRequestHandler").await;
    assert_eq!(at(&server, "shop.example.com").await.0, 200);
    assert_eq!(configure(&server, &ann, path, &wanted).await, named);
    assert_eq!(
        state(&server, "shop", "running").await["domains"],
        json!(["shop.example.com"])
    );
    let none = (200, json!({ "replId": "shop", "domains": [] }));
    assert_eq!(
        configure(&server, &ann, path, &json!({ "domains": [] })).await,
        none
    );
    assert_eq!(at(&server, "shop.example.com").await.0, 403);
}

#[tokio::test]
async fn a_domain_that_cannot_be_had_is_named_with_the_reason() {
    let dns = Dns::start().await;
    let nameserver = dns.address.to_string();
    let variables = [
        ("GANTRY_NAMESERVER", nameserver.as_str()),
        ("DOMAIN", "gantry.example"),
        ("APP_DOMAIN", "apps.gantry.example"),
    ];
    let server = Server::start_as(0, &variables);
    put(&server, "shop", "main.py", SERVER);
    let body = json!({ "replId": "shop", "userId": "ann" });
    assert_eq!(post(&server, &server.admin, "/start", &body).await.0, 200);
    let path = "/repls/shop/domains";
    for (domains, says) in [
        (
            json!(["ok.example.com", "x.apps.gantry.example"]),
            "domains[1]",
        ),
        (json!(["gantry.example"]), "own host names"),
        (json!(["*.example.com"]), "is not a host name"),
        (json!(["10.0.0.1"]), "is not a host name"),
        (json!(["localhost"]), "domains[0]"),
        (json!(["metadata.google.internal"]), "nobody owns"),
        (json!(["a.example.com\r\nX: y"]), "is not a host name"),
        (json!([7]), "domains"),
        (json!(null), "domains"),
        (json!(vec!["a.example.com"; 21]), "more than 20"),
    ] {
        let body = json!({ "domains": domains });
        let (status, told) = configure(&server, &server.admin, path, &body).await;
        assert_eq!(status, 400, "{body}: {told}");
        assert!(told.to_string().contains(says), "{body}: {told}");
    }
    // No answer is not the user's fault, and no proof.
    let silent = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let nameserver = silent.local_addr().unwrap().to_string();
    let server = Server::start_as(0, &[("GANTRY_NAMESERVER", &nameserver)]);
    put(&server, "shop", "main.py", SERVER);
    assert_eq!(post(&server, &server.admin, "/start", &body).await.0, 200);
    let body = json!({ "domains": ["shop.example.com"] });
    let (status, told) = configure(&server, &server.admin, path, &body).await;
    assert_eq!(
        (status, &told["code"]),
        (503, &json!("dns_unavailable")),
        "{told}"
    );
}

#[tokio::test]
async fn a_user_runs_as_many_repls_as_the_operator_allows() {
    let server = Server::start_as(0, &[("GANTRY_MAX_REPLS", "2")]);
    let names: Vec<String> = (0..6).map(|number| format!("one-{number}")).collect();
    for repl in &names {
        put(&server, repl, "main.py", "print('Hello')");
    }
    let body = |repl: &str, user: &str| json!({ "replId": repl, "userId": user });
    // All at once: as many as there is room for, and no more.
    let all = names.iter().map(|repl| start(&server, body(repl, "ann")));
    let all = futures_util::future::join_all(all).await;
    let made: Vec<&String> = names
        .iter()
        .zip(&all)
        .filter(|(_, (status, _))| *status == 200)
        .map(|(repl, _)| repl)
        .collect();
    assert_eq!(made.len(), 2, "{all:?}");
    for (status, told) in all.iter().filter(|(status, _)| *status != 200) {
        assert_eq!((*status, &told["success"]), (500, &json!(false)), "{told}");
        assert_eq!(told["error"]["code"], "quota_exceeded", "{told}");
        assert!(
            told["error"]["cause"]
                .as_str()
                .unwrap()
                .contains("GANTRY_MAX_REPLS")
        );
    }
    // Of another user's, and of one that runs, there is nothing to refuse.
    put(&server, "other", "main.py", "print('Hello')");
    assert_eq!(start(&server, body("other", "bob")).await.0, 200);
    assert_eq!(start(&server, body(made[0], "ann")).await.0, 200);
    let mut socket = server.connect(&server.admin).await;
    let code = json!({ "user_id": "ann", "code": "print('Hello')" }).to_string();
    let told = socket.ask(code.clone()).await;
    assert_eq!(told["status"], "invalid", "{told}");
    assert!(
        told["error"].to_string().contains("GANTRY_MAX_REPLS"),
        "{told}"
    );
    stop(&server, made[0]).await;
    let told = socket.ask(code).await;
    assert_eq!(told["status"], "deployed", "{told}");
}

#[tokio::test]
async fn stopping_and_starting_leaves_nothing() {
    let server = Server::start();
    put(&server, "often", "main.py", "print('Hello')");
    let rounds = if std::env::var_os("GANTRY_TEST_FULL").is_some() {
        100
    } else {
        10
    };
    for _ in 0..rounds {
        let (status, told) = start(&server, json!({ "replId": "often", "userId": "ann" })).await;
        assert_eq!((status, &told["podCreated"]), (200, &json!(true)));
        page_with(&server, "often", "Hello").await;
        stop(&server, "often").await;
    }
    let local = server.data.path().join("local");
    let count = |folder: &str| std::fs::read_dir(local.join(folder)).unwrap().count();
    assert_eq!((count("sandboxes"), count("repls")), (0, 1));
}

#[tokio::test]
async fn a_configured_origin_may_start_repls_from_a_browser() {
    let server = Server::start_as(0, &[("CORS_ORIGINS", "https://ide.example")]);
    let ask = |origin: &'static str| {
        client()
            .request(reqwest::Method::OPTIONS, server.url("/start"))
            .header(ORIGIN, origin)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "content-type,x-api-key")
            .send()
    };
    let allowed = ask("https://ide.example").await.unwrap();
    assert_eq!(allowed.status(), 204);
    assert_eq!(
        allowed.headers()["access-control-allow-origin"],
        "https://ide.example"
    );
    let headers = allowed.headers()["access-control-allow-headers"]
        .to_str()
        .unwrap();
    assert!(headers.contains("content-type") && headers.contains("x-api-key"));
    assert_eq!(ask("https://evil.example").await.unwrap().status(), 403);
    put(&server, "shop", "main.py", "print(1)");
    let body = json!({ "replId": "shop", "language": "python" });
    let request = server.post("/start").header("x-api-key", &server.admin);
    let answer = request
        .header(ORIGIN, "https://ide.example")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    assert_eq!(
        answer.headers()["access-control-allow-origin"],
        "https://ide.example"
    );
}
