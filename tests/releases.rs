//! Releases on the local platform: when one takes over, how one ends, and who sees what it wrote.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use reqwest::header::HOST;
use serde_json::{Value, json};
use server::{PATIENCE, Server};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

/// It ends well when it is tested, and is a server when it is released: at ADDRESS, after DELAY seconds.
const SERVES: &str = r"
import http.server, os, signal, socket, sys, time
if 'PORT' not in os.environ:
    sys.exit()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/slow':
            time.sleep(6)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(WORD.encode())
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6 if ':' in ADDRESS[0] else socket.AF_INET
time.sleep(DELAY)
";
const FOREVER: &str = "Server(ADDRESS, Handler).serve_forever()\n";

fn serving(word: &str, delay: u32, address: &str) -> String {
    format!("WORD, DELAY, ADDRESS = '{word}', {delay}, {address}\n{SERVES}{FOREVER}")
}

fn with(mut message: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    message.as_object_mut().unwrap().extend(more);
    message
}

const USUAL: &str = "('', 3000)";

fn release(repl: &str, code: &str) -> Value {
    json!({ "user_id": "ann", "repl_id": repl, "code": code, "database": false })
}

async fn submit(server: &Server, message: Value) -> Value {
    let mut socket = server.connect(&server.admin).await;
    socket.send(message.to_string()).await;
    // A release may take longer than the usual patience.
    let reply = async {
        loop {
            if let Message::Text(text) = socket.0.next().await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    };
    timeout(3 * PATIENCE, reply).await.unwrap()
}

async fn page(server: &Server, repl: &str, path: &str) -> (u16, String) {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let answer = server.get(path).header(HOST, host).send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

async fn post(server: &Server, path: &str, body: Value) -> Value {
    let request = server.post(path).header("x-api-key", &server.admin);
    let answer = request.json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

/// What the repl's log has of what its program wrote, once it has this.
async fn log_with(server: &Server, repl: &str, says: &str) -> String {
    let started = Instant::now();
    loop {
        let asked = server.get(&format!("/logs?repl_id={repl}&limit=1000"));
        let asked = asked.header("x-api-key", &server.admin);
        let found: Value = asked.send().await.unwrap().json().await.unwrap();
        let log = found.to_string();
        if log.contains(says) {
            return log;
        }
        assert!(started.elapsed() < PATIENCE, "{says:?} is not in {log}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Looks again and again whether the repl still serves this, until it is dropped.
async fn always(server: &Server, repl: &str, words: &[&str]) {
    loop {
        let (status, text) = page(server, repl, "/").await;
        assert!(
            status == 200 && words.contains(&text.as_str()),
            "{repl}: {status} {text}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_takes_over_when_it_listens_and_not_before() {
    let server = Server::start();
    for repl in ["slow", "failing", "elsewhere"] {
        let first = submit(&server, release(repl, &serving("one", 0, USUAL))).await;
        assert_eq!(first["status"], "deployed", "{first}");
    }
    let slow = async {
        let started = Instant::now();
        let reply = tokio::select! {
            reply = submit(&server, release("slow", &serving("two", 7, USUAL))) => reply,
            () = always(&server, "slow", &["one", "two"]) => unreachable!(),
        };
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert!(started.elapsed() > Duration::from_secs(7));
        assert_eq!(page(&server, "slow", "/").await, (200, "two".to_owned()));
    };
    let failing = async {
        let code = "import os, time\nif 'PORT' in os.environ:\n    time.sleep(7)\n    raise SystemExit('no such colour')";
        let reply = tokio::select! {
            reply = submit(&server, release("failing", code)) => reply,
            () = always(&server, "failing", &["one"]) => unreachable!(),
        };
        assert_eq!(reply["status"], "deploy_failed", "{reply}");
        assert!(
            reply["error"].to_string().contains("no such colour"),
            "{reply}"
        );
        assert_eq!(page(&server, "failing", "/").await.1, "one");
    };
    let elsewhere = async {
        let code = serving("two", 0, "('127.0.0.1', 5000)");
        let reply = tokio::select! {
            reply = submit(&server, release("elsewhere", &code)) => reply,
            () = always(&server, "elsewhere", &["one"]) => unreachable!(),
        };
        assert_eq!(reply["status"], "deploy_failed", "{reply}");
        let (cause, help) = (&reply["error"]["cause"], &reply["error"]["remediation"]);
        assert!(cause.to_string().contains("127.0.0.1:5000"), "{reply}");
        assert!(
            help.to_string().contains("3000") && help.to_string().contains("serves"),
            "{reply}"
        );
    };
    // Wherever in its sandbox it listens on the port.
    let local = async {
        for (repl, address) in [("six", "('::1', 3000)"), ("named", "('127.0.0.2', 3000)")] {
            let reply = submit(&server, release(repl, &serving("local", 0, address))).await;
            assert_eq!(reply["status"], "deployed", "{reply}");
            assert_eq!(page(&server, repl, "/").await.1, "local", "{repl}");
        }
    };
    let works = "import os, time\nwhile 'PORT' in os.environ: time.sleep(1)";
    let declared = async {
        let started = Instant::now();
        let worker = with(release("worker", works), json!({ "serves": false }));
        let reply = submit(&server, worker).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert!(started.elapsed() < Duration::from_secs(20));
    };
    // Nothing is known of it: it has the time that a server would take to come up.
    let unknown = async {
        let started = Instant::now();
        let reply = submit(&server, release("unknown", works)).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert!(started.elapsed() > Duration::from_secs(25));
    };
    tokio::join!(slow, failing, elsewhere, local, declared, unknown);
}

/// Answers to what it is asked when it is asked to end, says so, and ends.
const GOOD_END: &str = r"
def end(*_):
    print('asked to end', flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
";

/// Changes every connection to a WebSocket that says nothing.
const WEBSOCKET: &str = r"
import os, socket, sys, time
if 'PORT' not in os.environ:
    sys.exit()
listener = socket.create_server(('', 3000))
held = []
while True:
    caller, _ = listener.accept()
    if caller.recv(4096):
        caller.sendall(b'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x05hello')
    held.append(caller)
";

#[tokio::test(flavor = "multi_thread")]
async fn a_program_is_asked_to_end_and_its_callers_are_answered() {
    let server = Server::start();
    let one = serving("one", 0, USUAL).replace(FOREVER, &format!("{GOOD_END}{FOREVER}"));
    let reply = submit(&server, release("shop", &one)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    // What is under way when the next release takes over is still answered.
    let slow = page(&server, "shop", "/slow");
    let next = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        submit(&server, release("shop", &serving("two", 0, USUAL))).await
    };
    let ((status, text), reply) = tokio::join!(slow, next);
    assert_eq!(reply["status"], "deployed", "{reply}");
    assert_eq!((status, text.as_str()), (200, "one"));
    log_with(&server, "shop", "asked to end").await;
    // A stop asks, too.
    let reply = submit(&server, release("stopped", &one)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    post(&server, "/stop", json!({ "replId": "stopped" })).await;
    log_with(&server, "stopped", "asked to end").await;
    let log = log_with(&server, "stopped", "after it was asked to end").await;
    assert!(!log.contains("program_failed"), "{log}");

    let reply = submit(&server, release("chat", WEBSOCKET)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let mut caller = TcpStream::connect(server.address).await.unwrap();
    let host = format!("chat.apps.localhost:{}", server.address.port());
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    );
    caller.write_all(request.as_bytes()).await.unwrap();
    let mut told = Vec::new();
    let hello = async {
        while !told.ends_with(b"hello") {
            assert!(caller.read_buf(&mut told).await.unwrap() > 0, "{told:?}");
        }
    };
    timeout(PATIENCE, hello).await.unwrap();
    let (rest, _) = tokio::join!(
        async {
            let mut rest = Vec::new();
            let read = caller.read_to_end(&mut rest);
            timeout(PATIENCE, read).await.unwrap().unwrap();
            rest
        },
        post(&server, "/stop", json!({ "replId": "chat" })),
    );
    // A close frame with 1001, "going away".
    assert_eq!(rest, [0x88, 2, 0x03, 0xE9]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_program_wrote_is_its_owners_alone() {
    let server = Server::start();
    let secret = "print('token=geheim', flush=True)\n";
    let dies = r"
import threading
def die():
    time.sleep(1)
    print('token=geheim', flush=True)
    os._exit(3)
threading.Thread(target=die, daemon=True).start()
";
    let code = serving("one", 0, USUAL).replace(FOREVER, &format!("{dies}{FOREVER}"));
    let reply = submit(&server, release("dies", &code)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let ticket = post(&server, "/repls/dies/ticket", json!({})).await;
    let ticket = format!("/?ticket={}", ticket["ticket"].as_str().unwrap());
    let started = Instant::now();
    // It is started again after each end: the pauses between are when its page is shown.
    let (mut strangers, mut owners) = (0, 0);
    while strangers < 3 || owners == 0 {
        let (status, text) = page(&server, "dies", "/").await;
        assert!(!text.contains("geheim"), "{text}");
        strangers += u32::from(status == 502 && text.contains("not available"));
        let (status, text) = page(&server, "dies", &ticket).await;
        owners += u32::from(status == 502 && text.contains("geheim"));
        assert!(started.elapsed() < PATIENCE, "{strangers} {owners} {text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // A script that ended well has nothing else to show.
    let reply = submit(&server, release("script", secret)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let (status, text) = page(&server, "script", "/").await;
    assert!(status == 200 && text.contains("geheim"), "{text}");
}

/// Adds a line to a file deep in its data, and tells what is there.
const KEEPS: &str = r"
import os, subprocess
if not os.path.isdir('/data'):
    raise SystemExit
os.makedirs('/data/a/b', exist_ok=True)
for place in ('/data/a/b/file', '/data/a/file', '/data/file'):
    new = not os.path.exists(place)
    with open(place, 'a') as file:
        file.write('x')
    if new:
        os.chmod(place, 0o600)
tool = '/data/a/tool'
if not os.path.exists(tool):
    with open(tool, 'w') as file:
        file.write('#!/bin/sh\necho works\n')
    os.chmod(tool, 0o700)
    os.chmod('/data/a/b', 0o700)
print(len(open('/data/a/b/file').read()), subprocess.check_output([tool]).decode())
";

#[tokio::test(flavor = "multi_thread")]
async fn the_next_release_can_change_what_is_deep_in_the_data() {
    let server = Server::start();
    for number in 1..=3 {
        let release = with(release("keeps", KEEPS), json!({ "database": true }));
        let reply = submit(&server, release).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        let (_, text) = page(&server, "keeps", "/").await;
        assert!(text.contains(&format!("{number} works")), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_line_is_logged_with_all_of_its_letters() {
    let server = Server::start();
    let code = "print('語' * 24_000 + 'end', flush=True)";
    let reply = submit(&server, release("long", code)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let log = log_with(&server, "long", "end").await;
    assert!(!log.contains('\u{fffd}'), "letters are broken");
    let (_, text) = page(&server, "long", "/").await;
    assert!(!text.contains('\u{fffd}') && text.contains("語"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_can_open_its_own_streams_by_name() {
    let server = Server::start();
    let python = "
import sys
print(open('/dev/stdin').read(), end='', flush=True)
for place in ('/dev/stdout', '/proc/self/fd/1'):
    print('by name', file=open(place, 'w'))
print('an error', file=open('/dev/stderr', 'w'))
";
    let bash = "cat /dev/stdin; cat /proc/self/fd/0; echo by name > /dev/stdout; echo by name > /proc/self/fd/1; echo an error > /dev/stderr";
    // The first is forked from a waiting interpreter, the second is started.
    for (language, code) in [("python", python), ("bash", bash)] {
        let message = json!({ "user_id": "ann", "repl_id": language, "language": language,
            "code": code, "stdin": "given\n", "database": false });
        let reply = submit(&server, message).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert_eq!(reply["stdout"], "given\nby name\nby name\n", "{reply}");
        assert_eq!(reply["stderr"], "an error\n", "{reply}");
        // The release, which nothing is given to read.
        let (status, text) = page(&server, language, "/").await;
        assert!(status == 200 && text.contains("by name"), "{text}");
    }
}

/// Asks for a change and leaves before the answer.
async fn ask_and_leave(server: &Server, path: &str, body: Value) {
    let request = server.post(path).header("x-api-key", &server.admin);
    let left = request.json(&body).timeout(Duration::from_millis(700));
    assert!(left.send().await.unwrap_err().is_timeout(), "{path}");
}

async fn repl(server: &Server, name: &str) -> Value {
    let asked = server.get(&format!("/repls/{name}"));
    let asked = asked.header("x-api-key", &server.admin);
    asked.send().await.unwrap().json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_client_leaves_is_made_whole() {
    let mut server = Server::start();
    let first = submit(&server, release("left", &serving("one", 4, USUAL))).await;
    assert_eq!(first["status"], "deployed", "{first}");
    // It is asked to end and goes on for some seconds.
    let stubborn = format!(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{}",
        serving("two", 0, USUAL)
    );
    let second = submit(&server, release("left", &stubborn)).await;
    assert_eq!(second["status"], "deployed", "{second}");
    ask_and_leave(&server, "/repls/left/rollback", json!({})).await;
    let begun = Instant::now();
    while page(&server, "left", "/").await.1 != "one" {
        assert!(
            begun.elapsed() < PATIENCE,
            "{}",
            repl(&server, "left").await
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let sandboxes = || {
        let entries = std::fs::read_dir(server.data.path().join("local/sandboxes")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("repl-")).count()
    };
    while sandboxes() != 1 || repl(&server, "left").await["release"] != first["release"] {
        assert!(
            begun.elapsed() < PATIENCE,
            "{} programs, {}",
            sandboxes(),
            repl(&server, "left").await
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let ahead = json!({ "release": second["release"] });
    assert_eq!(
        post(&server, "/repls/left/rollback", ahead).await["release"],
        second["release"]
    );
    ask_and_leave(&server, "/stop", json!({ "replId": "left" })).await;
    server.kill();
    server.restart();
    assert_eq!(repl(&server, "left").await["state"], "stopped");
}
