//! What passes between a program and its callers, byte by byte: the program and the clients here write HTTP themselves.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::server::{PATIENCE, Server};

/// Answers in forms that few programs use, and shows what it got.
const PROGRAM: &str = r#"
import os, socket, threading

def answer(path, head, body):
    if path == '/many':
        return 'HTTP/1.1 200 OK\r\n' + ''.join(f'x-{n}: {n}\r\n' for n in range(500)) + 'content-length: 2\r\n\r\nok'
    if path == '/trailers':
        return ('HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum, x-other\r\n\r\n'
                '5\r\nhello\r\n0\r\nx-sum: 5d41\r\nx-other: 1\r\n\r\n')
    if path == '/both':
        return ('HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n'
                '5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n')
    if path == '/old':
        return 'HTTP/1.0 203 As it was\r\ncontent-type: text/plain\r\n\r\nuntil the end'
    shown = head + '\r\n\r\n' + body
    return f'HTTP/1.1 200 OK\r\ncontent-length: {len(shown)}\r\n\r\n{shown}'

def serve(client):
    data = b''
    while b'\r\n\r\n' not in data:
        data += client.recv(65536)
    head, body = data.split(b'\r\n\r\n', 1)
    if b' /flood ' in head:
        # Answers a lot and never reads the body.
        try:
            client.sendall(b'HTTP/1.1 200 OK\r\ncontent-length: 31457280\r\n\r\n' + bytes(30 << 20))
        finally:
            client.close()
        return
    if b'transfer-encoding: chunked' in head.lower():
        while not body.endswith(b'\r\n\r\n'):
            body += client.recv(65536)
    head, body = head.decode(), body.decode()
    client.sendall(answer(head.split(' ')[1], head, body).encode())
    client.close()

if os.environ.get('PORT'):
    listener = socket.socket()
    listener.bind(('127.0.0.1', int(os.environ['PORT'])))
    listener.listen(64)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"#;

/// Deploys it; the reply, and the `Host` that leads to it.
async fn deployed(server: &Server) -> (Value, String) {
    let mut socket = server.connect(&server.admin).await;
    let message = json!({ "user_id": "web", "code": PROGRAM, "limits": { "wall_ms": 60_000 } });
    let reply = socket.ask(message.to_string()).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let host = format!("web-prod.apps.localhost:{}", server.address.port());
    (reply, host)
}

/// What comes back for these bytes, until the connection ends.
async fn exchange(server: &Server, request: &str) -> String {
    let talk = async {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(PATIENCE, talk).await;
    answer.unwrap_or_else(|_| panic!("no end of the answer to {request}"))
}

fn get(host: &str, path: &str, more: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{more}\r\n")
}

#[tokio::test]
async fn every_form_of_an_answer_reaches_the_client() {
    let server = Server::start();
    let (_, host) = deployed(&server).await;
    let ask = async |path: &str, more: &str| exchange(&server, &get(&host, path, more)).await;

    let many = ask("/many", "").await;
    assert!(many.starts_with("HTTP/1.1 200 OK\r\n"), "{many}");
    assert_eq!(many.matches("\r\nx-").count(), 500);
    assert!(many.ends_with("\r\n\r\nok"), "{many}");

    let trailers = ask("/trailers", "TE: trailers\r\n").await;
    assert!(
        trailers.contains("\r\ntrailer: x-sum, x-other\r\n"),
        "{trailers}"
    );
    let (_, end) = trailers.split_once("5\r\nhello\r\n0\r\n").unwrap();
    for field in ["x-sum: 5d41\r\n", "x-other: 1\r\n"] {
        assert!(end.contains(field), "{trailers}");
    }

    let both = ask("/both", "").await;
    assert!(!both.contains("content-length"), "{both}");
    let (_, body) = both.split_once("\r\n\r\n").unwrap();
    assert_eq!(body, "5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", "{both}");

    let old = ask("/old", "").await;
    assert!(old.starts_with("HTTP/1.1 203 As it was\r\n"), "{old}");
    let (head, body) = old.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("transfer-encoding: chunked"), "{old}");
    assert_eq!(body, "D\r\nuntil the end\r\n0\r\n\r\n", "{old}");
    // A client of that time gets what it knows.
    let request = get(&host, "/old", "").replace("HTTP/1.1", "HTTP/1.0");
    let old = exchange(&server, &request).await;
    assert!(old.starts_with("HTTP/1.0 203 As it was\r\n"), "{old}");
    assert!(old.ends_with("\r\n\r\nuntil the end"), "{old}");
}

#[tokio::test]
async fn every_form_of_a_request_reaches_the_program() {
    let server = Server::start();
    let (_, host) = deployed(&server).await;
    for method in ["POST", "GET"] {
        let request = format!(
            "{method} /raw HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\
             Content-Length: 3\r\nTrailer: x-sum\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 5d41\r\n\r\n"
        );
        let answer = exchange(&server, &request).await;
        let (_, got) = answer.split_once("\r\n\r\n").unwrap();
        assert!(
            got.starts_with(&format!("{method} /raw HTTP/1.1\r\n")),
            "{got}"
        );
        let (head, body) = got.split_once("\r\n\r\n").unwrap();
        assert!(!head.contains("content-length"), "{got}");
        assert!(head.contains("trailer: x-sum"), "{got}");
        assert_eq!(body, "5\r\nhello\r\n0\r\nx-sum: 5d41\r\n\r\n", "{got}");
    }
    // Nobody here is a trusted proxy.
    let said = "X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: bank.example\r\n\
                X-Forwarded-Port: 443\r\nX-Real-IP: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n";
    let got = exchange(&server, &get(&host, "/head", said)).await;
    let own = [
        "x-forwarded-for: 127.0.0.1\r\n".to_owned(),
        "x-forwarded-proto: http\r\n".to_owned(),
        format!("x-forwarded-host: {host}\r\n"),
    ];
    for line in own {
        assert!(got.contains(&line), "{got}");
    }
    for strange in ["6.6.6.6", "bank.example", "x-forwarded-port"] {
        assert!(!got.contains(strange), "{got}");
    }
}

#[tokio::test]
async fn behind_tls_every_url_says_so_and_a_trusted_proxy_is_believed() {
    let variables = [
        ("PUBLIC_URL", "https://gantry.example"),
        ("GANTRY_TRUSTED_PROXIES", "127.0.0.0/8"),
    ];
    let server = Server::start_as(0, &variables);
    let (reply, host) = deployed(&server).await;
    assert_eq!(reply["url"], "https://web-prod.apps.localhost/");
    let said = "X-Forwarded-For: 6.6.6.6, 203.0.113.7\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: shop.example\r\n\
                X-Forwarded-Port: 443\r\n";
    let got = exchange(&server, &get(&host, "/head", said)).await;
    for line in [
        "x-forwarded-for: 203.0.113.7\r\n",
        "x-forwarded-proto: https\r\n",
        "x-forwarded-host: shop.example\r\n",
        "x-forwarded-port: 443\r\n",
    ] {
        assert!(got.contains(line), "{got}");
    }
    let ask = async |request: reqwest::RequestBuilder| {
        let answer = request.header("x-api-key", &server.admin).send().await;
        answer.unwrap().json::<Value>().await.unwrap()
    };
    let repls = ask(server.get("/repls")).await;
    assert_eq!(repls["repls"][0]["url"], reply["url"], "{repls}");
    let body = json!({ "userId": "web", "replId": "desk", "language": "python",
        "files": { "main.py": "print('here')" } });
    let started = ask(server.post("/start").json(&body)).await;
    assert_eq!(started["url"], "https://desk.apps.localhost/", "{started}");
    let terminal = started["terminalUrl"].as_str().unwrap();
    assert!(
        terminal.starts_with("wss://desk.gantry.example/"),
        "{started}"
    );
    assert_eq!(server.sign_in_url, "https://gantry.example/");
}

/// Sends a large body to a program that does not read it, until no more is taken, and reads the answer's head only.
async fn unread(server: &Server, host: &str) -> TcpStream {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let head = format!("POST /flood HTTP/1.1\r\nHost: {host}\r\nContent-Length: 100000000\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let piece = vec![b'x'; 1 << 20];
    let mut sent = 0;
    while let Ok(wrote) = tokio::time::timeout(Duration::from_secs(1), stream.write(&piece)).await {
        sent += wrote.unwrap();
    }
    assert!(sent < 100_000_000, "the program read {sent} bytes");
    let mut answer = [0; 15];
    let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut answer)).await;
    read.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200 OK");
    stream
}

#[tokio::test]
async fn places_of_clients_that_left_come_back() {
    let server = Server::start_as(0, &[("GANTRY_MAX_CONNECTIONS_PER_REPL", "8")]);
    let (_, host) = deployed(&server).await;
    let clients = (0..8).map(|_| unread(&server, &host));
    let clients = futures_util::future::join_all(clients).await;
    let ask = async || exchange(&server, &get(&host, "/old", "")).await;
    let full = ask().await;
    assert!(full.starts_with("HTTP/1.1 503 "), "{full}");
    drop(clients);
    let back = async {
        while ask().await.starts_with("HTTP/1.1 503 ") {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let back = tokio::time::timeout(Duration::from_secs(15), back).await;
    back.expect("the places of clients that left were not given back");
}
