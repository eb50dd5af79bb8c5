//! Repls that nobody uses, on the local platform: stopped after a while, and started again by the next request.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use reqwest::header::{ACCEPT, HOST};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use server::{PATIENCE, Server, Socket};

/// Short enough for a test, and longer than a start takes on a busy machine.
const IDLE: &[(&str, &str)] = &[("GANTRY_IDLE_STOP", "3s")];

/// Comes up late enough that somebody sees it come up, and answers with how often it was started.
const COUNTING: &str = "
import http.server, os, time
print('warming up', flush=True)
time.sleep(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'served ' + self.headers.get('X-Test', '').encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
# As many as ask at once: the usual 5 would make the others wait for seconds until they try again.
http.server.ThreadingHTTPServer.request_queue_size = 64
http.server.ThreadingHTTPServer(('127.0.0.1', 3000), Handler).serve_forever()
";

fn store(server: &Server, repl: &str) -> PathBuf {
    server.data.path().join("store/code").join(repl)
}

async fn post(server: &Server, path: &str, body: Value) -> Value {
    let request = server.post(path).header("x-api-key", &server.admin);
    let answer = request.json(&body).send().await.unwrap();
    let status = answer.status();
    let told: Value = answer.json().await.unwrap();
    assert_eq!(status, 200, "{path}: {told}");
    told
}

async fn opened(server: &Server, repl: &str, code: &str) {
    std::fs::create_dir_all(store(server, repl)).unwrap();
    std::fs::write(store(server, repl).join("main.py"), code).unwrap();
    post(server, "/start", json!({ "replId": repl, "userId": "ann" })).await;
}

fn visit(server: &Server, repl: &str) -> reqwest::RequestBuilder {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    server.get("/").header(HOST, host)
}

async fn told(server: &Server, repl: &str) -> Value {
    let asked = server.get(&format!("/repls/{repl}"));
    let asked = asked.header("x-api-key", &server.admin);
    asked.send().await.unwrap().json().await.unwrap()
}

/// What is told of the repl, once it is in this state.
async fn state(server: &Server, repl: &str, state: &str) -> Value {
    let started = Instant::now();
    loop {
        let told = told(server, repl).await;
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

/// How often the repl's log tells of this.
async fn happened(server: &Server, repl: &str, action: &str) -> usize {
    let asked = server.get(&format!("/logs?repl_id={repl}&limit=1000"));
    let asked = asked.header("x-api-key", &server.admin);
    let found: Value = asked.send().await.unwrap().json().await.unwrap();
    let records = found["records"].as_array().unwrap().iter();
    records
        .filter(|record| record.to_string().contains(&format!("\"{action}\"")))
        .count()
}

/// What is recorded is found a moment later.
async fn happened_once(server: &Server, repl: &str, action: &str) {
    let started = Instant::now();
    while happened(server, repl, action).await == 0 {
        assert!(started.elapsed() < PATIENCE, "{action} is not recorded");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(happened(server, repl, action).await, 1, "{action}");
}

#[tokio::test]
async fn a_request_wakes_an_idle_repl_once_and_is_answered_by_it() {
    let server = Server::start_as(0, IDLE);
    opened(&server, "shop", COUNTING).await;
    let idle = state(&server, "shop", "idle").await;
    let cause = idle["cause"].as_str().unwrap();
    assert!(cause.starts_with("stopped: idle since "), "{idle}");
    assert_eq!((&idle["ready"], &idle["replicas"]), (&json!(0), &json!(0)));
    happened_once(&server, "shop", "repl.idle").await;
    // It stays so: nobody has asked.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(told(&server, "shop").await["state"], "idle");
    assert_eq!(happened(&server, "shop", "repl.woken").await, 0);
    // Many programs at once: each is held and gets its own answer, and there is one start.
    let asked = (0..50).map(async |n: usize| {
        let answer = visit(&server, "shop").header("x-test", n.to_string());
        let answer = answer.send().await.unwrap();
        let (status, text) = (answer.status(), answer.text().await.unwrap());
        assert_eq!((status.as_u16(), text), (200, format!("served {n}")));
    });
    join_all(asked).await;
    happened_once(&server, "shop", "repl.woken").await;
    // A request with a body is held whole.
    state(&server, "shop", "idle").await;
    let host = format!("shop.apps.localhost:{}", server.address.port());
    let body = "x".repeat(100_000);
    let request = server.post("/").header(HOST, host).body(body.clone());
    let answer = request.send().await.unwrap();
    assert_eq!(answer.text().await.unwrap(), body);
    // Its user's stop is another thing: nothing wakes it.
    state(&server, "shop", "idle").await;
    post(&server, "/stop", json!({ "replId": "shop" })).await;
    assert_eq!(visit(&server, "shop").send().await.unwrap().status(), 404);
    assert!(told(&server, "shop").await.get("cause").is_none());
}

#[tokio::test]
async fn a_browser_sees_an_idle_repl_start() {
    let server = Server::start_as(0, IDLE);
    opened(&server, "shop", COUNTING).await;
    state(&server, "shop", "idle").await;
    let (mut at_once, started) = (false, Instant::now());
    loop {
        let asked = Instant::now();
        let page = visit(&server, "shop").header(ACCEPT, "text/html,*/*;q=0.8");
        let page = page.send().await.unwrap();
        let (status, again) = (page.status(), page.headers().contains_key("retry-after"));
        let text = page.text().await.unwrap();
        if status == 200 {
            assert_eq!(text, "served ");
            break;
        }
        assert_eq!(status, 503, "{text}");
        assert!(text.contains("The program is starting") && again, "{text}");
        assert!(text.contains("refresh"), "it does not look again: {text}");
        // It never waits for the program, which takes a second.
        at_once |= asked.elapsed() < Duration::from_millis(900);
        // Its log is its owner's.
        assert!(!text.contains("warming up"), "{text}");
        assert!(started.elapsed() < PATIENCE, "{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(at_once, "it was not shown at once");
}

#[tokio::test]
async fn a_stranger_wakes_nothing() {
    let server = Server::start_as(0, IDLE);
    opened(&server, "shop", COUNTING).await;
    state(&server, "shop", "idle").await;
    let port = server.address.port();
    for (host, status) in [
        (format!("shopp.apps.localhost:{port}"), 404),
        (format!("shop.shop.apps.localhost:{port}"), 404),
        ("shop.example.com".to_owned(), 403),
        // The runner's door: without a ticket there is nothing behind it.
        (format!("shop.localhost:{port}"), 503),
    ] {
        let answer = server.get("/").header(HOST, &host).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), status, "{host}");
    }
    let asked = server
        .post("/repls/shop/ticket")
        .header("x-api-key", "gtk_wrong");
    assert_eq!(asked.send().await.unwrap().status(), 401);
    assert_eq!(told(&server, "shop").await["state"], "idle");
    // Positive control: a ticket for who may have one does.
    post(&server, "/repls/shop/ticket", json!({})).await;
    assert_ne!(told(&server, "shop").await["state"], "idle");
}

#[tokio::test]
async fn files_are_kept_and_a_terminal_or_a_request_keeps_it_awake() {
    let mut server = Server::start_as(0, IDLE);
    opened(&server, "shop", "print('Hello')").await;
    let headers = [("x-api-key", server.admin.as_str())];
    let opened = Socket::open(&server, "/repls/shop/terminal", &headers).await;
    let mut socket = opened.expect("no connection").0;
    let edit = json!({ "id": 1, "op": "files.write", "path": "edited.txt", "text": "kept" });
    socket.send(Message::text(edit.to_string())).await.unwrap();
    while !matches!(socket.next().await, Some(Ok(Message::Text(text))) if text.contains("\"ok\":true"))
    {
    }
    // Twice as long as it takes: somebody is there.
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(6) {
        assert_ne!(told(&server, "shop").await["state"], "idle");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    drop(socket);
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(6) {
        assert_eq!(visit(&server, "shop").send().await.unwrap().status(), 200);
        assert_ne!(told(&server, "shop").await["state"], "idle");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    state(&server, "shop", "idle").await;
    let kept = std::fs::read_to_string(store(&server, "shop").join("edited.txt"));
    assert_eq!(kept.unwrap(), "kept");
    // Another server knows that it is idle, and starts it no sooner.
    server.restart();
    assert_eq!(told(&server, "shop").await["state"], "idle");
    let answer = visit(&server, "shop").send().await.unwrap();
    assert!(answer.text().await.unwrap().contains("Hello"));
}

#[tokio::test]
async fn a_release_is_woken_as_that_and_what_cannot_be_woken_says_why() {
    let server = Server::start_as(0, &[IDLE[0], ("GANTRY_MAX_REPLS", "1")]);
    let mut socket = server.connect(&server.admin).await;
    let submission = json!({
        "user_id": "ann", "repl_id": "shop", "code": "print('released')", "database": false,
    });
    assert_eq!(
        socket.ask(submission.to_string()).await["status"],
        "deployed"
    );
    assert_eq!(state(&server, "shop", "idle").await["release"], 1);
    // An idle repl takes no place of its user's.
    opened(&server, "other", "import time\ntime.sleep(1000)").await;
    let answer = visit(&server, "shop").send().await.unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    let text = answer.text().await.unwrap();
    assert!(text.contains("GANTRY_MAX_REPLS"), "{text}");
    assert_eq!(told(&server, "shop").await["state"], "idle");
    post(&server, "/stop", json!({ "replId": "other" })).await;
    let started = Instant::now();
    loop {
        let text = visit(&server, "shop")
            .send()
            .await
            .unwrap()
            .text()
            .await
            .unwrap();
        if text.contains("released") {
            break;
        }
        assert!(started.elapsed() < PATIENCE, "{text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(told(&server, "shop").await["release"], 1);
}
