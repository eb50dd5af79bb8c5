//! One user against all through keys, sessions, names, cookies and connections.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use axum::http::header::{COOKIE, HOST, SET_COOKIE};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::server::{PATIENCE, Server, Socket, client};

/// Health is answered within this, on a machine that is busy with other tests too.
const SOON: Duration = Duration::from_secs(3);

/// A connection from 127.0.0.`last`, as one of several clients has it.
async fn connect_from(last: u8, port: u16) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, last], 0).into()).unwrap();
    let connected = socket.connect(([127, 0, 0, 1], port).into());
    timeout(PATIENCE, connected).await.unwrap().unwrap()
}

/// What one raw request is answered with, until the server closes or is silent for a while.
async fn raw(mut stream: TcpStream, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let (mut answer, mut buffer) = (Vec::new(), [0; 4_096]);
    while let Ok(Ok(read @ 1..)) = timeout(SOON, stream.read(&mut buffer)).await {
        answer.extend_from_slice(&buffer[..read]);
        if answer.windows(4).any(|end| end == b"\r\n\r\n") {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

async fn status(stream: TcpStream, path: &str) -> u16 {
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let answer = raw(stream, &request).await;
    let status = answer.split(' ').nth(1).unwrap_or_default();
    status.parse().unwrap_or_default()
}

async fn is_closed(stream: &mut TcpStream) -> bool {
    let read = timeout(Duration::from_millis(500), stream.read(&mut [0; 1])).await;
    matches!(read, Ok(Ok(0) | Err(_)))
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse().unwrap()
}

async fn post(server: &Server, key: &str, path: &str, body: Value) -> (u16, Value) {
    let request = server.post(path).header("x-api-key", key).json(&body);
    let answer = request.send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json().await.unwrap_or_default())
}

/// The session cookie of a sign-in with the key, as `Set-Cookie` has it.
async fn sign_in(server: &Server, key: &str) -> Result<String, u16> {
    let request = server.post("/session").json(&json!({ "key": key }));
    let answer = request.send().await.unwrap();
    match answer.status().as_u16() {
        204 => Ok(answer.headers()[SET_COOKIE].to_str().unwrap().to_owned()),
        status => Err(status),
    }
}

fn pair(set_cookie: &str) -> &str {
    set_cookie.split(';').next().unwrap()
}

async fn with_cookie(server: &Server, cookie: &str) -> u16 {
    let request = server.get("/session").header(COOKIE, cookie);
    request.send().await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_thousand_sign_ins_sign_nobody_else_out() {
    let server = Server::start();
    let (_, ann) = server.user("ann").await;
    let admin = sign_in(&server, &server.admin).await.unwrap();
    let first = sign_in(&server, &ann).await.unwrap();
    let mut refused = None;
    for _ in 0..1_010 {
        if let Err(status) = sign_in(&server, &ann).await {
            refused = Some(status);
            break;
        }
    }
    assert_eq!(with_cookie(&server, pair(&admin)).await, 200);
    assert_eq!(refused, Some(429), "sign-ins with one key have a rate");
    assert_eq!(with_cookie(&server, pair(&first)).await, 401);
    assert!(sign_in(&server, &server.admin).await.is_ok());
}

#[tokio::test]
async fn wrong_cookies_are_limited_as_wrong_keys_are() {
    let server = Server::start();
    let mut refused = 0;
    for number in 0..150 {
        let status = with_cookie(&server, &format!("gantry_session={number:048x}")).await;
        refused += u32::from(status == 429);
    }
    // Every answer that refuses one comes after a pause, in which half of another one is earned.
    assert!(refused > 20, "{refused}");
    let own = server.get("/session").header("x-api-key", &server.admin);
    assert_eq!(own.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn the_last_valid_cookie_counts() {
    let server = Server::start();
    let set = sign_in(&server, &server.admin).await.unwrap();
    let own = pair(&set);
    for cookie in [
        format!("gantry_session=planted; {own}"),
        format!("{own}; gantry_session=planted"),
        format!("gantry_session=; {own}; gantry_session=x; other=1"),
    ] {
        assert_eq!(with_cookie(&server, &cookie).await, 200, "{cookie}");
    }
}

#[tokio::test]
async fn behind_tls_the_cookie_is_this_hosts_alone() {
    let server = Server::start_as(0, &[("PUBLIC_URL", "https://localhost")]);
    let set = sign_in(&server, &server.admin).await.unwrap();
    assert!(set.starts_with("__Host-gantry_session="), "{set}");
    for attribute in ["; Secure", "; HttpOnly", "; SameSite=Strict", "; Path=/"] {
        assert!(set.contains(attribute), "{attribute}: {set}");
    }
    assert!(!set.to_ascii_lowercase().contains("domain"), "{set}");
    assert_eq!(with_cookie(&server, pair(&set)).await, 200);
    // A neighbour can set the plain name.
    let plain = pair(&set).trim_start_matches("__Host-");
    assert_eq!(with_cookie(&server, plain).await, 401);
}

#[tokio::test]
async fn an_absolute_url_cannot_name_another_host() {
    let server = Server::start();
    let port = server.address.port();
    let ask = async |url: &str, host: &str| {
        let request = format!("GET {url} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        let answer = raw(connect_from(1, port).await, &request).await;
        answer.split(' ').nth(1).unwrap_or_default().to_owned()
    };
    let own = format!("http://localhost:{port}/healthz");
    assert_eq!(ask(&own, &format!("localhost:{port}")).await, "200");
    for host in ["evil.example", "ann-prod.apps.localhost"] {
        assert_eq!(ask(&own, host).await, "403", "{host}");
    }
    let foreign = "http://evil.example/healthz";
    assert_eq!(ask(foreign, &format!("localhost:{port}")).await, "403");
}

#[tokio::test]
async fn a_name_is_its_users_and_a_failed_run_takes_none() {
    let server = Server::start_as(0, &[("GANTRY_MAX_NAMES", "2")]);
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    let start = async |key: &str, repl: &str, code: &str| {
        let files = json!({ "main.py": code });
        let body = json!({ "replId": repl, "language": "python", "files": files });
        post(&server, key, "/start", body).await
    };
    let submit = async |key: &str, user: &str, repl: &str, code: &str| {
        let mut socket = server.connect(key).await;
        let message = json!({ "user_id": user, "repl_id": repl, "code": code });
        socket.ask(message.to_string()).await
    };
    // Another's, and nobody's.
    for repl in ["bob-prod", "kibana", "api", "www", "localhost"] {
        let reply = submit(&ann, "ann", repl, "print(1)").await;
        assert_eq!(reply["status"], "invalid", "{repl}: {reply}");
        assert_eq!(start(&ann, repl, "").await.0, 400, "{repl}");
    }
    let sleep = "import time; time.sleep(600)";
    assert_eq!(start(&bob, "bob-prod", sleep).await.0, 200);

    // A run that fails, and one whose program cannot start, take nothing.
    for number in 0..4 {
        let name = format!("taken-{number}");
        let reply = submit(&ann, "ann", &name, "raise SystemExit(1)").await;
        assert_eq!(reply["status"], "tests_failed", "{reply}");
    }
    assert_eq!(start(&bob, "taken-0", "print('of bob')").await.0, 200);

    // Two names, and no third.
    assert_eq!(start(&ann, "one", "print('of ann')").await.0, 200);
    assert_eq!(start(&ann, "two", "").await.0, 200);
    let (status, told) = start(&ann, "three", "").await;
    assert_eq!(status, 400, "{told}");
    assert!(told.to_string().contains("GANTRY_MAX_NAMES"), "{told}");
    assert_eq!(start(&ann, "one", "").await.0, 200);

    // A name that was released is the next one's, who finds nothing in it.
    let release = async |key: &str, repl: &str| {
        let url = server.url(&format!("/repls/{repl}/name?confirm={repl}"));
        let request = client().delete(url).header("x-api-key", key);
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(release(&bob, "one").await, 404);
    assert_eq!(release(&server.admin, "taken-0").await, 200);
    let by_command = Command::new(env!("CARGO_BIN_EXE_gantry"))
        .args(["repl", "release", "one", "--yes"])
        .env("API_KEY", &server.admin)
        .env("GANTRY_SERVER", server.url(""))
        .output()
        .unwrap();
    assert!(by_command.status.success(), "{by_command:?}");
    assert!(!server.data.path().join("store/code/one").exists());
    assert_eq!(start(&bob, "one", "print('of bob')").await.0, 200);
    let file = server.data.path().join("store/code/one/main.py");
    assert_eq!(std::fs::read_to_string(file).unwrap(), "print('of bob')");
    assert_eq!(start(&ann, "three", "").await.0, 200);
}

#[tokio::test]
async fn idle_connections_of_one_address_give_way() {
    let server = Server::start_as(0, &[("GANTRY_MAX_CONNECTIONS_PER_ADDRESS", "20")]);
    let port = server.address.port();
    let began = Instant::now();
    let mut idle = Vec::new();
    for _ in 0..60 {
        idle.push(connect_from(2, port).await);
    }
    assert_eq!(status(connect_from(2, port).await, "/healthz").await, 200);
    assert_eq!(status(connect_from(3, port).await, "/healthz").await, 200);
    assert!(is_closed(&mut idle[0]).await, "the oldest is closed first");
    assert!(began.elapsed() < Duration::from_secs(9), "by no time limit");

    // Busy ones are not closed, and take the share of their own address only.
    let mut busy = Vec::new();
    for _ in 0..20 {
        let mut stream = connect_from(4, port).await;
        let body = "POST /session HTTP/1.1\r\nHost: localhost\r\ncontent-length: 9\r\n\r\n";
        stream.write_all(body.as_bytes()).await.unwrap();
        busy.push(stream);
    }
    sleep(Duration::from_millis(500)).await;
    assert_eq!(status(connect_from(4, port).await, "/").await, 503);
    assert_eq!(status(connect_from(4, port).await, "/healthz").await, 200);
    assert_eq!(status(connect_from(4, port).await, "/readyz").await, 200);
    assert_eq!(status(connect_from(5, port).await, "/").await, 200);
    assert!(!is_closed(&mut busy[0]).await);
}

#[tokio::test]
async fn one_key_has_its_share_of_connections() {
    let server = Server::start_as(0, &[("GANTRY_MAX_CONNECTIONS_PER_KEY", "8")]);
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    let open = |key: String| {
        let server = &server;
        async move { Socket::open(server, "/ws/code", &[("x-api-key", &key)]).await }
    };
    let mut sockets = Vec::new();
    let mut refused = None;
    for _ in 0..64 {
        match open(ann.clone()).await {
            Ok(socket) => sockets.push(socket),
            Err(status) => refused = Some(status),
        }
    }
    assert_eq!(refused, Some(429));
    assert!(sockets.len() <= 8, "{}", sockets.len());
    assert!(open(bob).await.is_ok());
    assert!(open(server.admin.clone()).await.is_ok());
    drop(sockets);
    let began = Instant::now();
    while open(ann.clone()).await.is_err() {
        assert!(began.elapsed() < PATIENCE, "places are never given back");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hanging_up_makes_no_room_for_more_changes() {
    let server = Server::start_as(0, &[("GANTRY_MAX_CONNECTIONS_PER_KEY", "4")]);
    let (_, ann) = server.user("ann").await;
    let mut socket = server.connect(&server.admin).await;
    for delay in [5, 0] {
        let code = format!(
            "import http.server, os, sys, time\nif 'PORT' not in os.environ: sys.exit()\ntime.sleep({delay})\n\
             http.server.HTTPServer(('', 3000), http.server.SimpleHTTPRequestHandler).serve_forever()\n"
        );
        let message =
            json!({ "user_id": "ann", "repl_id": "shop", "code": code, "database": false });
        let reply = socket.ask(message.to_string()).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
    }
    // Each waits for those before it, and the first for a program that takes its time.
    let (mut left, mut refused) = (0, 0);
    for _ in 0..8 {
        let request = server
            .post("/repls/shop/rollback")
            .header("x-api-key", &ann);
        let asked = request
            .json(&json!({ "release": 1 }))
            .timeout(Duration::from_millis(300));
        match asked.send().await {
            Err(error) => left += u32::from(error.is_timeout()),
            Ok(answer) => refused += u32::from(answer.status() == 429),
        }
    }
    assert_eq!((left, refused), (4, 4));
    let began = Instant::now();
    let asked = || server.get("/session").header("x-api-key", &ann).send();
    while asked().await.unwrap().status() != 200 {
        assert!(began.elapsed() < PATIENCE, "places are never given back");
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_whose_answers_are_not_read_cost_no_memory() {
    const FLOOD: usize = 64 << 20;
    let server = Server::start();
    let (_, key) = server.user("ann").await;
    let mut socket = server.connect(&key).await;
    let before = resident_kib(server.pid());
    // A ping of the longest kind, masked with zeros.
    let mut ping = vec![0x89, 0x80 | 125, 0, 0, 0, 0];
    ping.resize(6 + 125, b'x');
    let pings = ping.repeat(500);
    let stream = socket.0.get_mut();
    let flood = async {
        for _ in 0..FLOOD / pings.len() {
            stream.write_all(&pings).await?;
        }
        std::io::Result::Ok(())
    };
    // The server may end the connection before.
    let _ = timeout(PATIENCE, flood).await.unwrap();
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 24 << 10, "{grown} KiB for one client");
    // Longer than what is sent may wait to be taken.
    let began = Instant::now();
    while stream.write_all(&ping).await.is_ok() {
        assert!(began.elapsed() < Duration::from_secs(45), "it stays open");
        sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn an_error_repeats_little_of_what_was_sent() {
    const MOST: usize = 4 << 10;
    let server = Server::start();
    let (_, key) = server.user("ann").await;
    let mut socket = server.connect(&key).await;
    let long = "x".repeat(1_000_000);
    for message in [
        format!(r#"{{"user_id":"ann","{long}":1}}"#),
        format!(r#"{{"user_id":"ann","limits":{{"{long}":1}}}}"#),
        format!(r#"{{"user_id":"ann","files":{{"{long}":"","{long}":""}}}}"#)
            .replace(&long, &long[..400_000]),
        format!(r#"{{"user_id":"ann","files":{{"{long}":1}}}}"#),
        format!(r#"{{"user_id":"{long}","code":""}}"#),
        format!(r#"{{"user_id":"ann","code":"","language":"{long}"}}"#),
        format!(r#"{{"user_id":"ann","code":"","args":"{long}"}}"#),
        format!(r#"{{"resume":"{long}"}}"#),
    ] {
        let reply = socket.ask(message.as_str()).await;
        assert_eq!(reply["status"], "invalid", "{}", &message[..30]);
        let length = reply.to_string().len();
        assert!(length < MOST, "{length} bytes for {}", &message[..30]);
    }
    let short = &long[..60_000];
    for body in [json!({ short: 1 }), json!({ "replId": short })] {
        let (status, answer) = post(&server, &key, "/start", body).await;
        assert_eq!(status, 400);
        let length = answer.to_string().len();
        assert!(length < MOST, "{length} bytes");
    }
}

#[tokio::test]
async fn a_request_ends_with_its_key() {
    let server = Server::start();
    let (id, key) = server.user("ann").await;
    let body = r#"{"replId":"nothing-here"}"#;
    let (head, rest) = body.split_at(5);
    let mut stream = connect_from(1, server.address.port()).await;
    let begun = format!(
        "POST /stop HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{head}",
        body.len()
    );
    stream.write_all(begun.as_bytes()).await.unwrap();
    sleep(Duration::from_millis(300)).await;
    let revoked = server.key_command(&["revoke", &id]);
    assert!(revoked.status.success(), "{revoked:?}");
    let began = Instant::now();
    loop {
        let asked = server.get("/session").header("x-api-key", &key);
        if asked.send().await.unwrap().status() == 401 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "the key still works");
        sleep(Duration::from_millis(100)).await;
    }
    let answer = raw(stream, rest).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
}

#[tokio::test]
async fn a_call_that_cannot_be_is_refused_before_its_arguments_come() {
    let server = Server::start();
    let (_, key) = server.user("ann").await;
    let stream = connect_from(1, server.address.port()).await;
    let begun = format!(
        "POST /run_module?module_name=nothing&method_name=f HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nContent-Type: application/json\r\nContent-Length: 8000000\r\n\r\n"
    );
    let answer = raw(stream, &begun).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
}

/// The server with few files, as a machine with the usual limits gives it.
struct Small {
    child: std::process::Child,
    port: u16,
    _data: tempfile::TempDir,
}

impl Small {
    fn start(health: u16) -> Self {
        use std::io::{BufRead, BufReader};
        let data = tempfile::tempdir().unwrap();
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -n 900; exec \"$0\" serve --port 0"])
            .arg(env!("CARGO_BIN_EXE_gantry"))
            .env_remove("API_KEY")
            .env_remove("HOST")
            .env_remove("PORT")
            .env("GANTRY_DATA_DIR", data.path())
            .env("GANTRY_LOG", "error")
            .env("GANTRY_HEALTH_LISTEN", format!("127.0.0.1:{health}"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines.map(Result::unwrap).find_map(|line| {
            let (_, rest) = line.split_once(" is at http://127.0.0.1:")?;
            rest.trim_end_matches('/').parse().ok()
        });
        Self {
            child,
            port: port.expect("no address"),
            _data: data,
        }
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let id = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(id).unwrap();
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn health_is_answered_while_every_connection_is_taken() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let health = free.local_addr().unwrap().port();
    drop(free);
    let server = Small::start(health);
    let mut idle = Vec::new();
    for last in 10..16 {
        for _ in 0..100 {
            idle.push(connect_from(last, server.port).await);
        }
    }
    for path in ["/healthz", "/readyz"] {
        let began = Instant::now();
        assert_eq!(status(connect_from(2, server.port).await, path).await, 200);
        assert!(began.elapsed() < SOON, "{path}: {:?}", began.elapsed());
    }
    // The address for health has as many as it wants, too, and answers nothing else.
    let mut stalled = Vec::new();
    for _ in 0..100 {
        let mut stream = connect_from(3, health).await;
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\n")
            .await
            .unwrap();
        stalled.push(stream);
    }
    for path in ["/healthz", "/readyz"] {
        let began = Instant::now();
        assert_eq!(status(connect_from(2, health).await, path).await, 200);
        assert!(began.elapsed() < SOON, "{path}: {:?}", began.elapsed());
    }
    assert_eq!(status(connect_from(2, health).await, "/docs").await, 503);
}

/// Answers each request by what it asks for; `/slow` keeps the connection.
const PROGRAM: &str = "
import http.server, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == '/slow':
            time.sleep(30)
        body = repr(sorted((k.lower(), v) for k, v in self.headers.items())).encode()
        self.send_response(200)
        self.send_header('Set-Cookie', '=gantry_session=planted')
        self.send_header('Set-Cookie', 'gantry_session')
        self.send_header('Set-Cookie', '__Host-gantry_session=planted; Secure; Path=/')
        self.send_header('Set-Cookie', 'mine=1')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.ThreadingHTTPServer(('127.0.0.1', 3000), Handler).serve_forever()
";

#[tokio::test]
async fn a_program_sets_no_cookie_of_gantrys_and_holds_its_own_connections_only() {
    let server = Server::start_as(0, &[("GANTRY_MAX_CONNECTIONS_PER_REPL", "4")]);
    let (_, ann) = server.user("ann").await;
    let body = json!({ "replId": "echo", "language": "python", "files": { "main.py": PROGRAM } });
    assert_eq!(post(&server, &ann, "/start", body).await.0, 200);
    let port = server.address.port();
    let host = format!("echo.apps.localhost:{port}");
    let began = Instant::now();
    let answer = loop {
        let asked = server.get("/").header(HOST, &host);
        let answer = asked.send().await.unwrap();
        if answer.status() == 200 {
            break answer;
        }
        assert!(began.elapsed() < PATIENCE, "{}", answer.status());
        sleep(Duration::from_millis(100)).await;
    };
    let set: Vec<_> = answer.headers().get_all(SET_COOKIE).iter().collect();
    assert_eq!(set, ["mine=1"]);

    let listed = format!(
        "GET / HTTP/1.1\r\nHost: {host}\r\nCookie: own=1\r\nConnection: close, host, cookie, x-forwarded-for, x-mine\r\nX-Mine: 1\r\n\r\n"
    );
    let mut stream = connect_from(1, port).await;
    stream.write_all(listed.as_bytes()).await.unwrap();
    let mut seen = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut seen))
        .await
        .unwrap()
        .unwrap();
    let forwarded = format!("('x-forwarded-host', '{host}')");
    for kept in [
        &format!("('host', '{host}')"),
        "('cookie', 'own=1')",
        "('x-forwarded-for', '127.0.0.1')",
        &forwarded,
    ] {
        assert!(seen.contains(kept), "{kept}: {seen}");
    }
    assert!(!seen.contains("x-mine"), "{seen}");

    let slow = format!("GET /slow HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut stream = connect_from(1, port).await;
        stream.write_all(slow.as_bytes()).await.unwrap();
        held.push(stream);
    }
    sleep(Duration::from_millis(500)).await;
    let asked = server.get("/").header(HOST, &host).send().await.unwrap();
    assert_eq!(asked.status(), 503);
    drop(held);
    let began = Instant::now();
    loop {
        let asked = server.get("/").header(HOST, &host).send().await.unwrap();
        if asked.status() == 200 {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "a share is never given back");
        sleep(Duration::from_millis(100)).await;
    }
}

#[test]
fn a_short_key_is_refused_unless_it_is_allowed() {
    let data = tempfile::tempdir().unwrap();
    let serve = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gantry"));
        command
            .args(["serve", "--port", "0"])
            .args(more)
            .env("API_KEY", "short-and-weak!")
            .env("GANTRY_DATA_DIR", data.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    };
    // One that is allowed would serve: it is told to listen where it cannot.
    let refused = serve(&["--host", "203.0.113.1"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("API_KEY") && said.contains("--allow-weak-key"));
    assert!(!said.contains("short-and-weak!"), "{said}");
    let allowed = serve(&["--host", "203.0.113.1", "--allow-weak-key"]);
    let said = { allowed }.output().unwrap().stderr;
    assert!(String::from_utf8_lossy(&said).contains("cannot listen"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_takes_no_name() {
    let server = Server::start();
    let (_, one) = server.user("one").await;
    let (_, two) = server.user("two").await;
    let start =
        |repl: &str, files: Value| json!({ "replId": repl, "language": "python", "files": files });
    // A file cannot stand where a folder has to.
    let wrong = json!({ "a": "x", "a/b": "y" });
    let (status, answer) = post(&server, &one, "/start", start("left", wrong)).await;
    assert!(status >= 400, "{status} {answer}");
    let fine = json!({ "main.py": "print('mine')" });
    let (status, answer) = post(&server, &two, "/start", start("left", fine.clone())).await;
    assert_eq!(status, 200, "{answer}");
    // Nothing of the first one's is there.
    let tree = server.data.path().join("store/code/left");
    assert!(!tree.join("a").exists());
    // The control: a start that succeeds takes it.
    let (status, answer) = post(&server, &one, "/start", start("left", fine)).await;
    assert_eq!(status, 400, "{answer}");
}

/// A WebSocket of this key, of which only the connection is left.
async fn bare_websocket(port: u16, key: &str) -> TcpStream {
    let mut stream = connect_from(1, port).await;
    let request = format!(
        "GET /ws/code HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\nUpgrade: websocket\r\n\
         Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        let byte = timeout(PATIENCE, stream.read_u8()).await.unwrap().unwrap();
        answer.push(byte);
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{answer:?}");
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_messages_of_one_key_take_little_memory() {
    let server = Server::start();
    let (_, ann) = server.user("ann").await;
    let port = server.address.port();
    let before = resident_kib(server.pid());
    // The head of a text of 1 MiB under a mask of zeroes, and nearly all of the text.
    let mut message = vec![0x81, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0];
    message.resize(message.len() + 1_000_000, b' ');
    let mut unfinished = Vec::new();
    for _ in 0..120 {
        let mut stream = bare_websocket(port, &ann).await;
        // What the server does not take stays on the way.
        let _ = timeout(SOON, stream.write_all(&message)).await;
        unfinished.push(stream);
    }
    let mut most = 0;
    for _ in 0..20 {
        sleep(Duration::from_millis(100)).await;
        most = most.max(resident_kib(server.pid()));
    }
    let grown = most.saturating_sub(before);
    assert!(grown < 80 << 10, "{grown} KiB");
    // Small ones of the same key and long ones of others come through.
    let hello = json!({"user_id": "ann", "code": "print(1)", "deploy": false});
    let reply = server.connect(&ann).await.ask(hello.to_string()).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let long = format!("print(1)\n#{}", "x".repeat(500_000));
    let long = json!({"user_id": "bob", "code": long, "deploy": false}).to_string();
    let reply = server.connect(&server.admin).await.ask(long.clone()).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    // Whose place is given back when their connections end.
    drop(unfinished);
    let reply = server
        .connect(&ann)
        .await
        .ask(long.replace("bob", "ann"))
        .await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_without_a_key_has_a_rate_and_nobody_else_waits() {
    let server = Server::start();
    let port = server.address.port();
    let ask = |key: Option<&str>| {
        let request = server.get("/session");
        let request = match key {
            Some(key) => request.header("x-api-key", key),
            None => request,
        };
        async move { request.send().await.unwrap().status().as_u16() }
    };
    let mut refused = 0;
    for _ in 0..30 {
        let asked = futures_util::future::join_all((0..60).map(|_| ask(None))).await;
        refused += asked.iter().filter(|status| **status == 429).count();
    }
    assert!(refused > 100, "{refused}");
    let asked = Instant::now();
    assert_eq!(ask(Some(&server.admin)).await, 200);
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert_eq!(status(connect_from(2, port).await, "/session").await, 401);
    assert_eq!(status(connect_from(1, port).await, "/healthz").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_that_cannot_be_stored_takes_no_name() {
    let server = Server::start();
    let (_, one) = server.user("one").await;
    let (_, two) = server.user("two").await;
    let submit = async |key: &str, user: &str, text: &str| {
        let mut socket = server.connect(key).await;
        let code = format!("print({text:?})");
        let message = json!({ "user_id": user, "repl_id": "left", "code": code });
        socket.ask(message.to_string()).await
    };
    // A file where the store lays a repl's new files down: the release is stored, they are not.
    let store = server.data.path().join("store");
    let in_the_way = store.join("code/.left.new");
    std::fs::write(&in_the_way, "").unwrap();
    let reply = submit(&one, "one", "of one").await;
    assert_eq!(reply["status"], "deploy_failed", "{reply}");
    assert!(!store.join("releases/left").exists());
    std::fs::remove_file(in_the_way).unwrap();
    let reply = submit(&two, "two", "of two").await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let releases = std::fs::read_dir(store.join("releases/left")).unwrap();
    assert_eq!(releases.count(), 1);
    // The control: a deploy that succeeds takes it.
    let reply = submit(&one, "one", "of one").await;
    assert_eq!(reply["status"], "invalid", "{reply}");
}
