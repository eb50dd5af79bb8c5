//! The server's edge, against the real program: who gets in, what is refused and how, what is
//! bounded. Every refusal has a control beside it that passes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "protocol/proxy.rs"]
mod proxy;
#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use server::{PATIENCE, Server, Socket, client, hello};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};

const MIB: usize = 1 << 20;

/// Sends bytes as they are and reads the answer's head.
async fn raw(server: &Server, request: &str) -> String {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = vec![0; 16 << 10];
    let mut length = 0;
    while length < answer.len() {
        let read = stream.read(&mut answer[length..]);
        let read = tokio::time::timeout(Duration::from_secs(2), read).await;
        match read {
            Ok(Ok(more)) if more > 0 => length += more,
            _ => break,
        }
        if answer[..length].windows(4).any(|w| w == b"\r\n\r\n") {
            break;
        }
    }
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

fn status_of(head: &str) -> u16 {
    head.split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .unwrap_or(0)
}

fn field_named(reply: &Value, field: &str) -> bool {
    reply["error"]["message"]
        .as_str()
        .is_some_and(|message| message.contains(field))
}

async fn assert_problem(response: reqwest::Response, status: u16) -> Value {
    assert_eq!(response.status().as_u16(), status);
    assert_eq!(
        response.headers()["content-type"],
        "application/problem+json"
    );
    let body: Value = response.json().await.unwrap();
    for member in ["type", "title", "detail", "code", "cause", "remediation"] {
        assert!(body[member].is_string(), "{member} in {body}");
    }
    assert_eq!(body["status"], status);
    body
}

#[tokio::test]
async fn only_a_known_key_in_a_header_opens_the_socket() {
    let server = Server::start();
    let admin = server.admin.clone();
    let bearer = format!("Bearer {admin}");
    let open = |path: &'static str, headers: Vec<(&'static str, String)>| {
        let server = &server;
        async move {
            let headers: Vec<_> = headers.iter().map(|(n, v)| (*n, v.as_str())).collect();
            Socket::open(server, path, &headers).await.err()
        }
    };
    assert_eq!(
        open("/ws/code", vec![("x-api-key", admin.clone())]).await,
        None
    );
    assert_eq!(
        open("/ws/code", vec![("authorization", bearer)]).await,
        None
    );
    assert_eq!(open("/ws/code", vec![]).await, Some(401));
    assert_eq!(
        open("/ws/code", vec![("x-api-key", "gtk_wrong".into())]).await,
        Some(401)
    );
    assert_eq!(
        open("/ws/code", vec![("authorization", "Basic eDp5".into())]).await,
        Some(401)
    );
    assert_eq!(open("/ws/code?ticket=nope", vec![]).await, Some(401));
    let in_url = format!("/ws/code?api_key={admin}");
    assert_eq!(Socket::open(&server, &in_url, &[]).await.err(), Some(401));
}

#[tokio::test]
async fn every_route_but_health_and_the_page_needs_a_key() {
    let server = Server::start();
    let open = ["/", "/healthz", "/readyz", "/openapi.json", "/docs/"];
    for path in open {
        assert_eq!(
            server.get(path).send().await.unwrap().status(),
            200,
            "{path}"
        );
    }
    let api: Value = server
        .get("/openapi.json")
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let mut checked = 0;
    for (path, methods) in api["paths"].as_object().unwrap() {
        for method in methods.as_object().unwrap().keys() {
            if open.contains(&path.as_str()) || (path == "/session" && method != "get") {
                continue;
            }
            let method = reqwest::Method::from_bytes(method.to_uppercase().as_bytes()).unwrap();
            let url = server.url(&path.replace("{id}", "x"));
            let answer = client().request(method, url).send().await.unwrap();
            let body = assert_problem(answer, 401).await;
            assert_eq!(body["code"], "unauthorized", "{path}");
            checked += 1;
        }
    }
    assert!(checked >= 10, "only {checked} routes");
    for path in [
        "/session",
        "/languages",
        "/repls",
        "/submissions",
        "/logs",
        "/metrics",
    ] {
        let answer = server
            .get(path)
            .header("x-api-key", &server.admin)
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused() {
    let server = Server::start();
    let port = server.address.port();
    for (host, status) in [
        (format!("127.0.0.1:{port}"), 200),
        (format!("localhost:{port}"), 200),
        ("evil.example".to_owned(), 403),
        (format!("evil.example:{port}"), 403),
        (format!("a.b.localhost:{port}"), 403),
        (format!("not_a_repl.localhost:{port}"), 403),
        // The host of a repl's runner, and no way to the API.
        (format!("no-such-repl.localhost:{port}"), 404),
        (String::new(), 403),
        (format!("no-such-repl.apps.localhost:{port}"), 404),
    ] {
        let head = raw(
            &server,
            &format!("GET /healthz HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        )
        .await;
        assert_eq!(status_of(&head), status, "{host}: {head}");
    }
    let own = format!("http://{}", server.address);
    let headers = |origin| [("x-api-key", server.admin.as_str()), ("origin", origin)];
    assert!(
        Socket::open(&server, "/ws/code", &headers(&own))
            .await
            .is_ok()
    );
    for foreign in [
        "http://evil.example",
        "null",
        "http://localhost:1",
        "http://a.apps.localhost",
    ] {
        let refused = Socket::open(&server, "/ws/code", &headers(foreign))
            .await
            .err();
        assert_eq!(refused, Some(403), "{foreign}");
        let answer = server.post("/stop").header("x-api-key", &server.admin);
        assert_problem(answer.header("origin", foreign).send().await.unwrap(), 403).await;
    }
}

#[tokio::test]
async fn a_programs_host_never_shows_the_api() {
    let server = Server::start();
    for path in ["/healthz", "/session", "/openapi.json", "/"] {
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: nobody-prod.apps.localhost\r\nX-API-Key: {}\r\n\r\n",
            server.admin
        );
        let head = raw(&server, &request).await;
        assert_eq!(status_of(&head), 404, "{path}");
        assert!(head.to_lowercase().contains("text/html"), "{head}");
    }
}

#[tokio::test]
async fn a_key_in_a_url_is_refused_with_the_way_to_do_it() {
    let server = Server::start();
    for name in ["api_key", "key", "token"] {
        let path = format!("/languages?{name}={}", server.admin);
        let answer = server
            .get(&path)
            .header("x-api-key", &server.admin)
            .send()
            .await
            .unwrap();
        let body = assert_problem(answer, 401).await;
        assert!(
            body["cause"].as_str().unwrap().contains("X-API-Key"),
            "{body}"
        );
    }
}

#[tokio::test]
async fn a_ticket_opens_one_socket() {
    let server = Server::start();
    let made = server
        .post("/ws/ticket")
        .header("x-api-key", &server.admin)
        .send()
        .await
        .unwrap();
    let made: Value = made.json().await.unwrap();
    let path = format!("/ws/code?ticket={}", made["ticket"].as_str().unwrap());
    let mut socket = Socket::open(&server, &path, &[]).await.unwrap();
    assert_eq!(socket.ask("{}").await["status"], "invalid");
    assert_eq!(Socket::open(&server, &path, &[]).await.err(), Some(401));
}

async fn sign_in(server: &Server, body: Value) -> reqwest::Response {
    server.post("/session").json(&body).send().await.unwrap()
}

fn cookie_of(response: &reqwest::Response) -> String {
    let cookie = response.headers()["set-cookie"].to_str().unwrap();
    for attribute in ["HttpOnly", "SameSite=Strict", "Path=/"] {
        assert!(cookie.contains(attribute), "{cookie}");
    }
    cookie.split(';').next().unwrap().to_owned()
}

#[tokio::test]
async fn a_sign_in_link_works_once_and_its_session_survives_a_restart() {
    let mut server = Server::start();
    let token = json!({ "token": server.sign_in });
    let signed_in = sign_in(&server, token.clone()).await;
    assert_eq!(signed_in.status(), 204);
    let cookie = cookie_of(&signed_in);
    assert_problem(sign_in(&server, token).await, 401).await;
    server.restart();
    let session = server
        .get("/session")
        .header("cookie", &cookie)
        .send()
        .await
        .unwrap();
    assert_eq!(session.status(), 200);
    assert_eq!(session.json::<Value>().await.unwrap()["role"], "admin");
    let signed_out = client()
        .delete(server.url("/session"))
        .header("cookie", &cookie);
    assert_eq!(signed_out.send().await.unwrap().status(), 204);
    let session = server
        .get("/session")
        .header("cookie", &cookie)
        .send()
        .await
        .unwrap();
    assert_problem(session, 401).await;
}

#[tokio::test]
async fn places_on_a_connection_are_free_again_when_their_submissions_end() {
    const PLACES: usize = 1_000;
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let id = uuid::Uuid::now_v7();
    let waiting = json!({ "user_id": "ann", "code": "input()", "deploy": false, "interactive": true, "submission_id": id });
    socket.send(waiting.to_string()).await;
    let resume = json!({ "resume": id, "after": 1_000_000 }).to_string();
    for _ in 1..PLACES {
        socket.send(resume.clone()).await;
    }
    socket.send(resume.clone()).await;
    // Those that asked before its first events were written are shown them.
    let mut refused = socket.next().await;
    while refused.get("event").is_some() {
        refused = socket.next().await;
    }
    assert_eq!(refused["error"]["code"], "too_many_in_flight", "{refused}");
    socket.send(json!({ "cancel": id }).to_string()).await;
    let mut replies = 0;
    while replies < PLACES {
        let frame = socket.next().await;
        replies += usize::from(frame["status"] == "cancelled");
    }
    let after = socket.ask(resume).await;
    assert_eq!(after["status"], "cancelled", "{after}");
}

#[tokio::test]
async fn revoking_a_key_ends_its_sockets_sessions_and_tickets_within_five_seconds() {
    let server = Server::start();
    let (id, key) = server.user("ann").await;
    let mut socket = server.connect(&key).await;
    let mut other = server.connect(&server.admin).await;
    let cookie = cookie_of(&sign_in(&server, json!({ "key": key })).await);
    let ticket = server
        .post("/ws/ticket")
        .header("cookie", &cookie)
        .send()
        .await
        .unwrap();
    let ticket: Value = ticket.json().await.unwrap();
    assert!(server.key_command(&["revoke", &id]).status.success());
    let revoked = Instant::now();
    let frame = socket.closed(Duration::from_secs(5)).await.unwrap();
    assert_eq!(frame.code, CloseCode::Policy);
    assert!(revoked.elapsed() < Duration::from_secs(5));
    let path = format!("/ws/code?ticket={}", ticket["ticket"].as_str().unwrap());
    assert_eq!(Socket::open(&server, &path, &[]).await.err(), Some(401));
    assert_eq!(
        Socket::open(&server, "/ws/code", &[("x-api-key", &key)])
            .await
            .err(),
        Some(401)
    );
    let session = server
        .get("/session")
        .header("cookie", &cookie)
        .send()
        .await
        .unwrap();
    assert_problem(session, 401).await;
    assert_eq!(other.ask("{}").await["status"], "invalid");
}

#[tokio::test]
async fn a_wrong_message_is_invalid_by_field_and_the_connection_stays() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let deep = format!(r#"{{"user_id":"t","code":{}"#, "[".repeat(100_000));
    for (message, field) in [
        ("", "JSON"),
        ("nonsense", "JSON"),
        ("[1]", "object"),
        ("{}", "user_id"),
        (r#"{"user_id":"t"}"#, "code"),
        (r#"{"user_id":"T!","code":""}"#, "user_id"),
        (r#"{"user_id":"t","code":"","bogus":1}"#, "bogus"),
        (r#"{"user_id":"t","code":"a","code":"b"}"#, "code"),
        (r#"{"user_id":"t","files":{"a":"1","a":"2"}}"#, "files.a"),
        (
            r#"{"user_id":"t","code":"","language":"cobol"}"#,
            "language",
        ),
        (r#"{"user_id":"t","files":{"../x":""}}"#, "files"),
        (r#"{"user_id":"t","files":{"/etc/x":""}}"#, "files"),
        (
            r#"{"user_id":"t","code":"","limits":{"wall_ms":600000}}"#,
            "limits.wall_ms",
        ),
        (
            r#"{"user_id":"t","code":"","submission_id":"7"}"#,
            "submission_id",
        ),
        (
            r#"{"user_id":"t","code":"","repl_id":"a: b\n---"}"#,
            "repl_id",
        ),
        (deep.as_str(), "recursion"),
    ] {
        let reply = socket.ask(message).await;
        assert_eq!(reply["status"], "invalid", "{message:.60}");
        assert!(field_named(&reply, field), "{field} in {reply}");
        for member in ["code", "message", "cause", "remediation"] {
            assert!(reply["error"][member].is_string(), "{member} in {reply}");
        }
    }
    socket.0.send(Message::binary(vec![1])).await.unwrap();
    assert_eq!(socket.next().await["status"], "invalid");
    assert_eq!(socket.ask(hello("t")).await["status"], "tests_passed");
}

#[tokio::test]
async fn a_message_of_one_mib_is_taken_and_one_byte_more_closes_with_1009() {
    let server = Server::start();
    let padded = |size: usize| {
        let start = r#"{"user_id":"t","bogus":""#;
        format!("{start}{}\"}}", "x".repeat(size - start.len() - 2))
    };
    let mut socket = server.connect(&server.admin).await;
    assert!(field_named(&socket.ask(padded(MIB)).await, "bogus"));
    // The server may hang up before all of it is sent.
    let _ = socket.0.send(Message::text(padded(MIB + 1))).await;
    assert_eq!(socket.closed(PATIENCE).await.unwrap().code, CloseCode::Size);
    // In fragments too.
    let mut socket = server.connect(&server.admin).await;
    let half = vec![b' '; MIB / 2 + 1];
    for (opcode, last) in [(Data::Text, false), (Data::Continue, true)] {
        let frame = Frame::message(half.clone(), OpCode::Data(opcode), last);
        let _ = socket.0.send(Message::Frame(frame)).await;
    }
    assert_eq!(socket.closed(PATIENCE).await.unwrap().code, CloseCode::Size);
}

#[tokio::test]
async fn a_million_fragments_of_one_byte_cost_no_memory() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let before = resident_kib(server.pid());
    let fragment =
        |opcode, last| Message::Frame(Frame::message(vec![b' '], OpCode::Data(opcode), last));
    socket.0.feed(fragment(Data::Text, false)).await.unwrap();
    for sent in 1..1_000_000 {
        socket
            .0
            .feed(fragment(Data::Continue, false))
            .await
            .unwrap();
        if sent % 10_000 == 0 {
            socket.0.flush().await.unwrap();
        }
    }
    socket.0.send(fragment(Data::Continue, true)).await.unwrap();
    assert_eq!(socket.next().await["status"], "invalid");
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 16 << 10, "{grown} KiB more");
}

#[tokio::test]
async fn a_client_that_sends_its_headers_slowly_is_dropped() {
    let server = Server::start();
    let mut slow = TcpStream::connect(server.address).await.unwrap();
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        .await
        .unwrap();
    let begun = Instant::now();
    let mut answer = Vec::new();
    let dripped = async {
        loop {
            tokio::select! {
                read = slow.read_buf(&mut answer) => if matches!(read, Ok(0) | Err(_)) { return },
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
            // Each byte is early enough; all of them together are not.
            if slow.write_all(b"x").await.is_err() {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), dripped)
        .await
        .expect("it was kept");
    assert!(begun.elapsed() > Duration::from_secs(5));
    assert_eq!(server.get("/healthz").send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn things_of_another_user_do_not_exist() {
    let server = Server::start();
    let (_, ann) = server.user("ann").await;
    let (_, bob) = server.user("bob").await;
    let mut of_ann = server.connect(&ann).await;
    let mut of_bob = server.connect(&bob).await;
    let done = of_ann.ask(hello("ann")).await;
    assert_eq!(done["status"], "tests_passed", "{done}");
    let id = done["submission_id"].as_str().unwrap();
    let unknown = "01900000-0000-7000-8000-000000000000";

    assert!(field_named(&of_bob.ask(hello("ann")).await, "user_id"));
    for kind in ["resume", "cancel", "stdin"] {
        let theirs = of_bob.ask(format!(r#"{{"{kind}":"{id}"}}"#)).await;
        let nobodys = of_bob.ask(format!(r#"{{"{kind}":"{unknown}"}}"#)).await;
        assert_eq!(theirs["error"]["code"], "not_found", "{theirs}");
        assert_eq!(theirs.to_string().replace(id, unknown), nobodys.to_string());
    }
    let own = of_ann
        .ask(format!(r#"{{"resume":"{id}","after":999}}"#))
        .await;
    assert_eq!(own["status"], "tests_passed");
    let taken = format!(r#"{{"user_id":"bob","code":"","submission_id":"{id}"}}"#);
    assert!(field_named(&of_bob.ask(taken).await, "submission_id"));

    let body = |key: String, path: String| {
        let request = server.get(&path).header("x-api-key", key);
        async move {
            let answer = request.send().await.unwrap();
            (answer.status().as_u16(), answer.text().await.unwrap())
        }
    };
    let path = format!("/submissions/{id}");
    assert_eq!(body(ann.clone(), path.clone()).await.0, 200);
    assert_eq!(body(server.admin.clone(), path.clone()).await.0, 200);
    let theirs = body(bob.clone(), path).await;
    assert_eq!(theirs.0, 404);
    assert_eq!(
        theirs,
        body(bob.clone(), format!("/submissions/{unknown}")).await
    );
    for path in ["/repls/ann-prod", "/repls/ann-prod/releases"] {
        let nobodys = path.replace("ann", "nobody");
        let theirs = body(bob.clone(), path.to_owned()).await;
        assert_eq!(theirs.0, 404);
        assert_eq!(theirs, body(bob.clone(), nobodys).await);
    }
}

#[tokio::test]
async fn the_same_submission_twice_runs_once_and_replies_to_both() {
    let server = Server::start();
    let mut first = server.connect(&server.admin).await;
    let mut second = server.connect(&server.admin).await;
    let message = r#"{"user_id":"t","code":"print(1)","deploy":false,"stream":true,
        "submission_id":"01900000-0000-7000-8000-00000000000a"}"#;
    first.send(message).await;
    second.send(message).await;
    let mut streams = Vec::new();
    for socket in [&mut first, &mut second] {
        let mut frames = Vec::new();
        loop {
            let frame = socket.next().await;
            let is_reply = frame.get("status").is_some();
            frames.push(frame);
            if is_reply {
                break;
            }
        }
        for (index, frame) in frames.iter().enumerate() {
            assert_eq!(frame["seq"], index + 1, "{frames:?}");
        }
        streams.push(frames);
    }
    assert_eq!(streams[0], streams[1]);
    assert!(streams[0].len() > 1);
}

#[tokio::test]
async fn hundreds_in_flight_are_each_answered_once_and_another_user_does_not_wait_for_them() {
    const MANY: usize = 600;
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    for _ in 0..MANY {
        socket.send(hello("many")).await;
    }
    socket.send(hello("one")).await;
    let mut ids = std::collections::HashSet::new();
    let mut before_the_other = None;
    while ids.len() <= MANY {
        let reply = socket.next().await;
        assert_eq!(reply["status"], "tests_passed", "{reply}");
        if reply["namespace"] == "user-one" {
            before_the_other = Some(ids.len());
        }
        let id = reply["submission_id"].as_str().unwrap().to_owned();
        assert!(ids.insert(id), "answered twice: {reply}");
    }
    // By its turn it is among the next few; while all were being sent, some had ended already.
    let before_the_other = before_the_other.expect("the other user was answered");
    assert!(
        before_the_other < MANY / 2,
        "the other user was answered after {before_the_other}"
    );
}

#[tokio::test]
async fn a_submission_can_be_resumed_after_the_server_was_killed() {
    let mut server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let done = socket.ask(hello("t")).await;
    assert_eq!(done["status"], "tests_passed", "{done}");
    server.restart();
    let mut socket = server.connect(&server.admin).await;
    let id = done["submission_id"].as_str().unwrap();
    let mut last = socket
        .ask(format!(r#"{{"resume":"{id}","after":0}}"#))
        .await;
    let mut seq = 0;
    while last.get("status").is_none() {
        seq += 1;
        assert_eq!(last["seq"], seq);
        last = socket.next().await;
    }
    assert_eq!(last, done);
    assert_eq!(socket.ask(hello("t")).await["status"], "tests_passed");
}

#[tokio::test]
async fn a_client_that_never_reads_costs_no_memory_and_stops_nobody() {
    let server = Server::start();
    let mut deaf = server.connect(&server.admin).await;
    let before = resident_kib(server.pid());
    // A hundred times 1 MB of output, streamed and replied: 200 MB for this connection.
    for _ in 0..100 {
        deaf.send(
            r#"{"user_id":"deaf","stream":true,"deploy":false,
                "code":"import sys\nsys.stdout.write('x'*1000000)"}"#,
        )
        .await;
    }
    let mut other = server.connect(&server.admin).await;
    assert_eq!(other.ask(hello("other")).await["status"], "tests_passed");
    // They all end although nobody reads them.
    for _ in 0..600 {
        let path = "/submissions?user_id=deaf&status=tests_passed&limit=200";
        let page = server
            .get(path)
            .header("x-api-key", &server.admin)
            .send()
            .await
            .unwrap();
        let page: Value = page.json().await.unwrap();
        if page["submissions"].as_array().unwrap().len() == 100 {
            let grown = resident_kib(server.pid()).saturating_sub(before);
            assert!(grown < 64 << 10, "{grown} KiB more");
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("the submissions of a client that does not read did not end");
}

#[tokio::test]
async fn a_deployed_program_is_served_at_its_own_host_without_gantrys_cookie() {
    const PROGRAM: &str = r#"
import http.server, os
class Echo(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['content-length']))
        text = f"{self.path}|{self.headers['host']}|{self.headers['cookie']}|{body.decode()}"
        self.send_response(200)
        self.send_header('set-cookie', 'gantry_session=stolen')
        self.send_header('set-cookie', 'mine=1')
        self.send_header('content-length', str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
port = int(os.environ.get('PORT', '3000'))
if os.environ.get('PORT'):
    http.server.HTTPServer(('127.0.0.1', port), Echo).serve_forever()
"#;
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let message = json!({ "user_id": "web", "code": PROGRAM, "limits": { "wall_ms": 60000 } });
    let reply = socket.ask(message.to_string()).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let host = format!("web-prod.apps.localhost:{}", server.address.port());
    assert_eq!(reply["url"], format!("http://{host}/"));
    let request = server
        .post("/a?b=c&key=its-own")
        .header("host", &host)
        .header("origin", "http://elsewhere.example")
        .header("cookie", "gantry_session=secret; own=1")
        .body("hello");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let cookies: Vec<_> = answer
        .headers()
        .get_all("set-cookie")
        .iter()
        .cloned()
        .collect();
    assert_eq!(cookies, ["mine=1"]);
    assert!(!answer.headers().contains_key("content-security-policy"));
    assert_eq!(
        answer.text().await.unwrap(),
        format!("/a?b=c&key=its-own|{host}|own=1|hello")
    );
    let stopped = server.post("/stop").header("x-api-key", &server.admin);
    let stopped = stopped
        .body(r#"{"replId":"web-prod"}"#)
        .send()
        .await
        .unwrap();
    assert_eq!(stopped.status(), 200);
    let gone = server.get("/").header("host", &host).send().await.unwrap();
    assert!(
        [404, 503].contains(&gone.status().as_u16()),
        "{}",
        gone.status()
    );
}

#[tokio::test]
async fn errors_are_problems_with_cause_and_remedy() {
    let server = Server::start();
    assert_problem(server.get("/no/such/route").send().await.unwrap(), 404).await;
    let wrong_method = server.post("/healthz").send().await.unwrap();
    assert_eq!(wrong_method.headers()["allow"], "GET,HEAD");
    assert_problem(wrong_method, 405).await;
    let post = |path: &str, body: String| {
        let request = server
            .post(path)
            .header("x-api-key", &server.admin)
            .body(body);
        async move { request.send().await.unwrap() }
    };
    assert_problem(post("/stop", "x".repeat(100 << 10)).await, 413).await;
    for body in [
        "nonsense",
        "{}",
        r#"{"replId":"A/B"}"#,
        r#"{"replId":"a","replId":"b"}"#,
    ] {
        let problem = assert_problem(post("/stop", body.to_owned()).await, 400).await;
        assert_eq!(problem["success"], false);
        assert!(problem["message"].is_string(), "{problem}");
    }
    let fine = post("/stop", r#"{"replId":"nothing-there"}"#.to_owned()).await;
    assert_eq!(fine.status(), 200);
    assert_eq!(
        fine.json::<Value>().await.unwrap(),
        json!({ "success": true })
    );
    let upgrade = server
        .get("/ws/code")
        .header("x-api-key", &server.admin)
        .send()
        .await
        .unwrap();
    assert_problem(upgrade, 426).await;
}

#[tokio::test]
async fn without_a_cluster_every_route_of_services_says_how_to_get_one() {
    let server = Server::start();
    let (_, user) = server.user("ada").await;
    let body = json!({ "services": [{ "serviceName": "shop", "replicas": 3,
        "container": { "name": "shop", "image": "nginx" } }] });
    for key in [&server.admin, &user] {
        let mut answers = vec![
            server.post("/service").json(&body),
            server.post("/service").body("nonsense"),
            client().delete(server.url("/service/shop")),
        ];
        for path in [
            "/service/shop/events",
            "/state",
            "/node_state",
            "/container_state",
            "/service_state",
        ] {
            answers.push(server.get(path));
        }
        for request in answers {
            let answer = request.header("x-api-key", key).send().await.unwrap();
            let problem = assert_problem(answer, 501).await;
            assert_eq!(problem["code"], "services_need_kubernetes");
            let remedy = problem["remediation"].as_str().unwrap();
            assert!(remedy.contains("GANTRY_PLATFORM=kubernetes"), "{problem}");
        }
    }
    assert_problem(server.get("/state").send().await.unwrap(), 401).await;
}

#[tokio::test]
async fn answers_carry_the_headers_that_keep_a_browser_safe() {
    let server = Server::start();
    let page = server.get("/").send().await.unwrap();
    let header = |name: &str| page.headers()[name].to_str().unwrap().to_owned();
    assert!(header("content-type").starts_with("text/html"));
    assert_eq!(header("x-content-type-options"), "nosniff");
    for rule in [
        "default-src 'self'",
        "frame-ancestors 'none'",
        "http://*.apps.localhost:*",
    ] {
        assert!(header("content-security-policy").contains(rule), "{rule}");
    }
    let again = server
        .get("/")
        .header("if-none-match", header("etag"))
        .send()
        .await
        .unwrap();
    assert_eq!(again.status(), 304);
    assert_eq!(
        server.get("/assets/main.js").send().await.unwrap().status(),
        200
    );
    for outside in [
        "/assets/../Cargo.toml",
        "/assets/%2e%2e/%2e%2e/Cargo.toml",
        "/assets/nope",
    ] {
        let request = format!("GET {outside} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(status_of(&raw(&server, &request).await), 404, "{outside}");
    }
}

#[tokio::test]
async fn stopping_the_server_tells_its_sockets() {
    let mut server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let stopped = tokio::task::spawn_blocking(move || server.terminate().success());
    let frame = socket.closed(PATIENCE).await.unwrap();
    assert_eq!(frame.code, CloseCode::Away);
    assert!(stopped.await.unwrap());
}

#[tokio::test]
async fn two_servers_cannot_share_a_data_folder() {
    let server = Server::start();
    let second = std::process::Command::new(env!("CARGO_BIN_EXE_gantry"))
        .args(["--port", "0"])
        .env("GANTRY_DATA_DIR", server.data.path())
        .env_remove("API_KEY")
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("used by another server"), "{said}");
}

#[tokio::test]
async fn pings_are_answered_and_many_sockets_live_side_by_side() {
    let server = Server::start();
    let mut sockets = Vec::new();
    for _ in 0..50 {
        sockets.push(server.connect(&server.admin).await);
    }
    for socket in &mut sockets {
        socket.0.send(Message::Ping("x".into())).await.unwrap();
    }
    for socket in &mut sockets {
        let answer = tokio::time::timeout(PATIENCE, socket.0.next())
            .await
            .unwrap();
        assert_eq!(answer.unwrap().unwrap(), Message::Pong("x".into()));
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}
