//! Repls over HTTP, on the local platform: started from files that somebody else put into the code store.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use reqwest::header::{HOST, ORIGIN};
use serde_json::{Value, json};

use server::{PATIENCE, Server, client};

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
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let answer = server
        .get("/main.py")
        .header(HOST, host)
        .send()
        .await
        .unwrap();
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
            "known are python, node, bash",
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
    let (status, text) = page_with(&server, "script", "exit code 5").await;
    assert_eq!(status, 502);
    assert!(text.contains("from a shell\n3\n"), "{text}");
    let told = state(&server, "script", "exited(5)").await;
    assert!(
        told["last_error"].as_str().unwrap().contains("exit code 5"),
        "{told}"
    );
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
