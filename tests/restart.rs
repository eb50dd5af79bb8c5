//! Power cuts: the real server is killed while it works, started again on the same data, and owes
//! every client the same as if nothing had happened.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

#[path = "restart/flips.rs"]
mod flips;
#[path = "restart/orders.rs"]
mod orders;

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use server::{PATIENCE, Server, client};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

/// Longest wait for one submission's reply, kills and all: its runs are seconds long, and each kill
/// costs a second or two.
const REPLY_PATIENCE: Duration = Duration::from_secs(90);

/// Kills under load; the whole test of a nightly run has more.
const KILLS: u32 = 8;
const KILLS_IN_FULL: u32 = 50;

const CLIENTS: usize = 8;

/// Submissions that end between two kills, so that all of them are not the first ones; and how long
/// a kill waits for that at most.
const ENDED_PER_KILL: usize = 4;
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// How to reach a server that is not always there.
#[derive(Clone)]
struct Way {
    address: SocketAddr,
    key: String,
}

type WebSocket =
    tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

impl Way {
    fn to(server: &Server) -> Self {
        Self {
            address: server.address,
            key: server.admin.clone(),
        }
    }

    async fn connect(&self) -> WebSocket {
        let asked = Instant::now();
        loop {
            let mut request = format!("ws://{}/ws/code", self.address)
                .into_client_request()
                .unwrap();
            request
                .headers_mut()
                .insert("x-api-key", self.key.parse().unwrap());
            if let Ok((socket, _)) = tokio_tungstenite::connect_async(request).await {
                return socket;
            }
            assert!(asked.elapsed() < PATIENCE, "the server does not come back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn get(&self, path: &str) -> Value {
        let request = client().get(format!("http://{}{path}", self.address));
        let answer = request.header("x-api-key", &self.key).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
        answer.json().await.unwrap()
    }
}

/// The next frame; `None` when the connection ended.
async fn frame(socket: &mut WebSocket) -> Option<Value> {
    loop {
        match tokio::time::timeout(PATIENCE, socket.next())
            .await
            .expect("no frame")
        {
            Some(Ok(Message::Text(text))) => return Some(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            _ => return None,
        }
    }
}

/// What a client has been told of its submission so far.
struct Told {
    id: String,
    message: Value,
    events: BTreeMap<u64, Value>,
    reply: Option<Value>,
    connections: u32,
}

impl Told {
    fn new(mut message: Value) -> Self {
        let id = uuid::Uuid::now_v7().to_string();
        message["submission_id"] = json!(id);
        Self {
            id,
            message,
            events: BTreeMap::new(),
            reply: None,
            connections: 0,
        }
    }

    fn last(&self) -> u64 {
        self.events.keys().last().copied().unwrap_or(0)
    }

    /// Takes a frame; the same number never means two things, and none is left out.
    fn take(&mut self, frame: Value) {
        assert_eq!(frame["submission_id"], self.id.as_str(), "{frame}");
        if frame.get("status").is_some() {
            assert!(
                self.reply.replace(frame).is_none(),
                "{}: a second reply",
                self.id
            );
            return;
        }
        let seq = frame["seq"].as_u64().unwrap();
        let next = self.last() + 1;
        assert!(seq <= next, "{}: event {seq} where {next} was due", self.id);
        if let Some(before) = self.events.insert(seq, frame.clone()) {
            assert_eq!(before, frame, "{}: event {seq} changed", self.id);
        }
    }

    /// Until the reply is there, over as many connections as it takes. Every second time the whole
    /// message is sent again, else it is resumed.
    async fn follow(&mut self, way: &Way) {
        let begun = Instant::now();
        while self.reply.is_none() {
            assert!(begun.elapsed() < REPLY_PATIENCE, "{}: no reply", self.id);
            let mut socket = way.connect().await;
            let resume = self.connections > 0 && self.connections % 2 == 1;
            self.connections += 1;
            let mut request = if resume {
                json!({ "resume": self.id, "after": self.last() })
            } else {
                self.message.clone()
            };
            loop {
                if socket
                    .send(Message::text(request.to_string()))
                    .await
                    .is_err()
                {
                    break;
                }
                let unknown = loop {
                    let Some(frame) = frame(&mut socket).await else {
                        break false;
                    };
                    if resume && frame["error"]["code"] == "not_found" {
                        // Killed before it was taken in: nothing of it may have been told.
                        assert!(self.events.is_empty(), "{}: forgotten", self.id);
                        break true;
                    }
                    self.take(frame);
                    if self.reply.is_some() {
                        return;
                    }
                };
                if !unknown {
                    break;
                }
                request = self.message.clone();
            }
        }
    }

    fn text(&self) -> String {
        let outputs = self
            .events
            .values()
            .filter(|event| event["stream"] == "stdout");
        outputs
            .map(|event| event["data"].as_str().unwrap())
            .collect()
    }

    /// Holds what was told against the journal and against itself.
    async fn check(&self, way: &Way) {
        let reply = self.reply.as_ref().unwrap();
        let stored = way.get(&format!("/submissions/{}", self.id)).await;
        let events: BTreeMap<u64, &Value> = stored["events"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|event| event.get("status").is_none())
            .map(|event| (event["seq"].as_u64().unwrap(), event))
            .collect();
        let last = reply["seq"].as_u64().unwrap();
        assert!(
            events.keys().copied().eq(1..last),
            "{}: {:?}",
            self.id,
            events.keys()
        );
        for (seq, event) in &self.events {
            assert_eq!(events[seq], event, "{}: event {seq}", self.id);
        }
        assert_eq!(&stored["reply"]["stdout"], &reply["stdout"], "{}", self.id);
        assert_eq!(&stored["reply"]["status"], &reply["status"], "{}", self.id);
        let outputs = events.values().filter(|event| event["stream"] == "stdout");
        let streamed: String = outputs
            .map(|event| event["data"].as_str().unwrap())
            .collect();
        assert_eq!(
            reply["stdout"], streamed,
            "{}: streamed and replied differ",
            self.id
        );
    }

    /// The number that a run draws once: the same everywhere, or it ran twice.
    fn nonce(&self) -> String {
        let stdout = self.reply.as_ref().unwrap()["stdout"].as_str().unwrap();
        let drawn: Vec<&str> = stdout
            .lines()
            .filter_map(|line| line.strip_prefix("nonce "))
            .collect();
        assert_eq!(drawn.len(), 1, "{}: {stdout}", self.id);
        drawn[0].to_owned()
    }
}

async fn restart(mut server: Server) -> Server {
    tokio::task::spawn_blocking(move || {
        server.restart();
        server
    })
    .await
    .unwrap()
}

const NONCE: &str = "print('nonce', open('/dev/urandom', 'rb').read(16).hex(), flush=True)\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_prints_while_the_server_is_killed_is_heard_in_full() {
    let mut server = Server::start();
    let way = Way::to(&server);
    // Each `ü` is written in two halves, so that a kill falls between them too.
    let code = format!(
        "{NONCE}import os, time\nfor i in range(40):\n    os.write(1, b'%d \\xc3' % i)\n    \
         time.sleep(0.1)\n    os.write(1, b'\\xbc\\n')\n"
    );
    let message = json!({ "user_id": "talk", "code": code, "deploy": false, "stream": true });
    let mut told = Told::new(message);
    let mut socket = way.connect().await;
    socket
        .send(Message::text(told.message.to_string()))
        .await
        .unwrap();
    let mut kills = 0;
    while told.reply.is_none() {
        let Some(next) = frame(&mut socket).await else {
            panic!("the connection ended before the server was killed");
        };
        told.take(next);
        let lines = told.text().lines().count();
        // A second kill would end it: what is under way when two servers die is given up.
        if kills < 1 && lines > 8 * (kills + 1) {
            kills += 1;
            server = restart(server).await;
            socket = way.connect().await;
            let resume = json!({ "resume": told.id, "after": told.last() });
            socket
                .send(Message::text(resume.to_string()))
                .await
                .unwrap();
        }
    }
    assert_eq!(kills, 1);
    let reply = told.reply.clone().unwrap();
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let whole: String = (0..40).map(|i| format!("{i} ü\n")).collect();
    assert_eq!(reply["stdout"], format!("nonce {}\n{whole}", told.nonce()));
    assert_eq!(reply["stdout"], told.text());
    told.check(&way).await;
    drop(server);
}

/// What client `number` sends as its `turn`-th submission.
fn load(number: usize, turn: usize) -> Value {
    let user = format!("load{}", number % 4);
    let serve = "import http.server, sys\nif sys.argv[1:]: sys.exit()\n\
        class H(http.server.BaseHTTPRequestHandler):\n    def do_GET(self):\n        \
        self.send_response(200); self.end_headers(); self.wfile.write(TURN)\n    \
        def log_message(self, *a): pass\n\
        http.server.HTTPServer(('127.0.0.1', 3000), H).serve_forever()\n";
    if number < 2 && turn.is_multiple_of(4) {
        let code = format!("{NONCE}TURN = b'{number}-{turn}'\n{serve}");
        return json!({
            "user_id": user, "repl_id": format!("load-{number}"), "code": code, "stream": true,
            "tests": [{ "name": "starts", "args": ["check"] }],
        });
    }
    let code = format!(
        "{NONCE}import time\nfor i in range({}):\n    print(i, 'ü', flush=True)\n    time.sleep(0.02)\n",
        5 + (number + turn) % 20
    );
    json!({ "user_id": user, "code": code, "deploy": false, "stream": !turn.is_multiple_of(3) })
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_under_load_lose_nothing_and_run_nothing_twice() {
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let kills = if full { KILLS_IN_FULL } else { KILLS };
    let mut server = Server::start();
    let way = Way::to(&server);
    let enough = Arc::new(AtomicBool::new(false));
    let ended = Arc::new(AtomicUsize::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (way, enough, ended) = (way.clone(), Arc::clone(&enough), Arc::clone(&ended));
            tokio::spawn(async move {
                let mut done = Vec::new();
                while !enough.load(Ordering::Relaxed) {
                    let mut told = Told::new(load(number, done.len()));
                    told.follow(&way).await;
                    done.push(told);
                    ended.fetch_add(1, Ordering::Relaxed);
                }
                done
            })
        })
        .collect();
    for kill in 0..kills {
        tokio::time::sleep(Duration::from_millis(400 + u64::from(kill * 137 % 600))).await;
        let asked = Instant::now();
        let due = kill as usize * ENDED_PER_KILL;
        while ended.load(Ordering::Relaxed) < due && asked.elapsed() < KILL_PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server = restart(server).await;
    }
    // Work is done without kills too.
    tokio::time::sleep(Duration::from_secs(1)).await;
    enough.store(true, Ordering::Relaxed);
    let mut told = Vec::new();
    for client in clients {
        told.extend(
            tokio::time::timeout(REPLY_PATIENCE, client)
                .await
                .unwrap()
                .unwrap(),
        );
    }
    let mut nonces = HashSet::new();
    let (mut events, mut given_up, mut deployed) = (0, 0, BTreeMap::new());
    for told in &told {
        let reply = told.reply.as_ref().unwrap();
        let deploys = told.message.get("deploy").is_none();
        let status = if deploys { "deployed" } else { "tests_passed" };
        if reply["error"]["code"] == "server_ended_twice" {
            assert_eq!(reply["status"], "unavailable", "{reply}");
            given_up += 1;
            continue;
        }
        assert_eq!(reply["status"], status, "{reply}");
        told.check(&way).await;
        assert!(
            nonces.insert(told.nonce()),
            "{}: a number was drawn twice",
            told.id
        );
        events += told.events.len();
        if deploys {
            let release = reply["release"].as_u64().unwrap();
            let latest = deployed
                .entry(told.message["repl_id"].as_str().unwrap())
                .or_insert(release);
            *latest = release.max(*latest);
        }
    }
    assert!(
        told.len() >= CLIENTS && deployed.len() == 2,
        "{} submissions",
        told.len()
    );
    for (repl, latest) in &deployed {
        let status = running(&way, repl).await;
        // One that was given up may have been released before.
        let newest = status["release"].as_u64().unwrap();
        assert!(
            newest == *latest || given_up > 0 && newest > *latest,
            "{status}"
        );
        let releases = way.get(&format!("/repls/{repl}/releases")).await;
        let releases = releases["releases"].as_array().unwrap();
        let current: Vec<_> = releases
            .iter()
            .filter(|r| r["state"] == "current")
            .collect();
        assert_eq!(current.len(), 1, "{releases:?}");
        let ids: HashSet<_> = releases
            .iter()
            .map(|r| r["submission_id"].as_str())
            .collect();
        assert_eq!(
            ids.len(),
            releases.len(),
            "a submission was released twice: {releases:?}"
        );
    }
    let reconnected: u32 = told.iter().map(|told| told.connections - 1).sum();
    println!(
        "{kills} kills, {} submissions, {events} events received, {reconnected} times connected again, \
         {given_up} given up, {} repls",
        told.len(),
        deployed.len()
    );
    drop(server);
}

/// The repl's state, once its program is running again.
async fn running(way: &Way, repl: &str) -> Value {
    let asked = Instant::now();
    loop {
        let status = way.get(&format!("/repls/{repl}")).await;
        if status["state"] == "running" || asked.elapsed() > PATIENCE {
            assert_eq!(status["state"], "running", "{status}");
            return status;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_submission_from_many_at_once_runs_once() {
    let server = Server::start();
    let way = Way::to(&server);
    let code = format!("{NONCE}import time; time.sleep(0.3)");
    let message = json!({ "user_id": "once", "code": code, "deploy": false, "stream": true });
    let id = Told::new(message.clone()).id;
    let mut clients = Vec::new();
    for _ in 0..8 {
        let mut told = Told::new(message.clone());
        told.message["submission_id"] = json!(id);
        told.id.clone_from(&id);
        let way = way.clone();
        clients.push(tokio::spawn(async move {
            told.follow(&way).await;
            told.check(&way).await;
            (told.nonce(), told.events, told.reply)
        }));
    }
    let mut seen = Vec::new();
    for client in clients {
        seen.push(client.await.unwrap());
    }
    assert!(seen.iter().all(|one| *one == seen[0]), "{seen:?}");
}

/// The journal's last file with something in it.
fn last_segment(server: &Server) -> PathBuf {
    let mut files: Vec<PathBuf> = Vec::new();
    let mut folders = vec![server.data.path().join("journal")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "journal")
            {
                files.push(path);
            } else if path.is_dir() {
                folders.push(path);
            }
        }
    }
    files.sort();
    files.pop().expect("no journal file")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_and_what_it_held_is_decided_again() {
    let mut server = Server::start();
    let way = Way::to(&server);
    let message = json!({ "user_id": "torn", "code": NONCE, "deploy": false, "stream": true });
    let mut first = Told::new(message.clone());
    first.follow(&way).await;
    // Half a record, as a power cut leaves it.
    let path = last_segment(&server);
    let before = std::fs::read(&path).unwrap();
    std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .write_all(&before[..before.len().min(37)])
        .unwrap();
    server = restart(server).await;
    first.check(&way).await;
    // The last record is the second's reply; without its end it was never written.
    let mut second = Told::new(message.clone());
    second.follow(&way).await;
    let path = last_segment(&server);
    let length = std::fs::metadata(&path).unwrap().len();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(length - 5).unwrap();
    server = restart(server).await;
    let mut again = Told::new(message.clone());
    again.id.clone_from(&second.id);
    again.message["submission_id"] = json!(second.id);
    again.follow(&way).await;
    assert_eq!(again.nonce(), second.nonce());
    assert_eq!(again.events, second.events);
    again.check(&way).await;
    let mut third = Told::new(message);
    third.follow(&way).await;
    third.check(&way).await;
    drop(server);
}
