//! Two replicas side by side: real servers, each with its own data, that know each other.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::{Value, json};
use server::{PATIENCE, Server, Socket, hello};

const PEER_KEY: &str = "a secret of both replicas, long enough";

/// Two replicas; `names`: of the first and of the second.
fn pair(names: [&str; 2]) -> [Server; 2] {
    pair_with(names, &[])
}

fn pair_with(names: [&str; 2], variables: &[(&str, &str)]) -> [Server; 2] {
    let ports = free_ports();
    let peers = ports.map(|port| format!("127.0.0.1:{port}")).join(",");
    [0, 1].map(|index| {
        let own = [
            ("GANTRY_REPLICA", names[index]),
            ("GANTRY_PEERS", &peers),
            ("GANTRY_PEER_KEY", PEER_KEY),
        ];
        Server::start_as(ports[index], &[&own, variables].concat())
    })
}

fn free_ports() -> [u16; 2] {
    let sockets = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap().port())
}

/// Until the second replica knows the first one's keys.
async fn acquainted(servers: &[Server; 2]) {
    for [one, other] in [[0, 1], [1, 0]] {
        let asked = std::time::Instant::now();
        loop {
            let request = servers[other].get("/session");
            let request = request.header("x-api-key", &servers[one].admin);
            if request.send().await.unwrap().status() == 200 {
                break;
            }
            assert!(asked.elapsed() < PATIENCE, "a replica's key never counts");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

fn new_id() -> String {
    uuid::Uuid::now_v7().to_string()
}

fn message(id: &str, code: &str) -> Value {
    json!({ "user_id": "ada", "code": code, "deploy": false, "submission_id": id, "stream": true })
}

/// Frames up to the reply.
async fn to_the_reply(socket: &mut Socket) -> Vec<Value> {
    let mut frames = Vec::new();
    loop {
        let frame = socket.next().await;
        let ended = frame.get("status").is_some();
        frames.push(frame);
        if ended {
            return frames;
        }
    }
}

/// Waits until the program has written.
async fn started(socket: &mut Socket) {
    while socket.next().await["event"] != "output" {}
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_replica_answers_all_the_same() {
    let servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let [one, other] = &servers;
    let key = one.admin.as_str();
    let mut first = one.connect(key).await;
    let ended = first.ask(hello("ada")).await;
    assert_eq!(ended["status"], "tests_passed");
    let id = ended["submission_id"].as_str().unwrap();

    // The record.
    let path = format!("/submissions/{id}");
    let record = |server: &Server| server.get(&path).header("x-api-key", key).send();
    let here: Value = record(one).await.unwrap().json().await.unwrap();
    let there: Value = record(other).await.unwrap().json().await.unwrap();
    assert_eq!(here, there);
    assert_eq!(here["reply"]["stdout"], "Hello\n");

    // Following it again, and sending it again.
    let mut second = other.connect(key).await;
    let resume = json!({ "resume": id, "after": 0 }).to_string();
    first.send(resume.clone()).await;
    second.send(resume).await;
    assert_eq!(
        to_the_reply(&mut first).await,
        to_the_reply(&mut second).await
    );
    let again = second
        .ask(message(id, "print('another')").to_string())
        .await;
    let again = if again.get("status").is_some() {
        again
    } else {
        to_the_reply(&mut second).await.pop().unwrap()
    };
    assert_eq!(again["stdout"], "Hello\n");

    // What is at neither is at neither.
    let nowhere = new_id();
    let unknown = second.ask(json!({ "resume": nowhere }).to_string()).await;
    assert_eq!(unknown["status"], "invalid", "{unknown}");
    let path = format!("/submissions/{nowhere}");
    let unknown = other.get(&path).header("x-api-key", key).send().await;
    assert_eq!(unknown.unwrap().status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn input_and_cancelling_reach_the_replica_that_runs_it() {
    let servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let [one, other] = &servers;
    let mut first = one.connect(&one.admin).await;
    let mut second = other.connect(&one.admin).await;
    let (asking, sleeping) = (new_id(), new_id());
    let code = "print('name?', flush=True); print('hello', input())";
    let mut asks = message(&asking, code);
    asks["interactive"] = json!(true);
    first.send(asks.to_string()).await;
    started(&mut first).await;
    let input = json!({ "stdin": asking, "data": "Ada\n", "eof": true });
    second.send(input.to_string()).await;
    let ended = to_the_reply(&mut first).await.pop().unwrap();
    assert_eq!(ended["stdout"], "name?\nhello Ada\n", "{ended}");

    let code = "import time; print('.', flush=True); time.sleep(30)";
    let sleeps = message(&sleeping, code);
    first.send(sleeps.to_string()).await;
    started(&mut first).await;
    second.send(json!({ "cancel": sleeping }).to_string()).await;
    let ended = to_the_reply(&mut first).await.pop().unwrap();
    assert_eq!(ended["status"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_id_at_both_at_once_runs_once() {
    // Either may be the one whose name counts.
    for names in [["a", "b"], ["b", "a"]] {
        let servers = pair(names);
        acquainted(&servers).await;
        let key = &servers[0].admin;
        let mut first = servers[0].connect(key).await;
        let mut second = servers[1].connect(key).await;
        for _ in 0..20 {
            let id = new_id();
            let code = "import random; print(random.random())";
            let text = message(&id, code).to_string();
            tokio::join!(first.send(text.clone()), second.send(text));
            let (one, other) = tokio::join!(to_the_reply(&mut first), to_the_reply(&mut second));
            assert_eq!(one.last().unwrap()["status"], "tests_passed");
            assert_eq!(one, other, "it ran twice");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_replica_may_have_is_not_known_and_not_run_again() {
    let mut servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let key = servers[0].admin.clone();
    let id = new_id();
    let text = message(&id, "print('once')").to_string();
    let mut first = servers[0].connect(&key).await;
    first.send(text.clone()).await;
    let whole = to_the_reply(&mut first).await;
    let mut second = servers[1].connect(&key).await;
    second.send(json!({ "resume": id }).to_string()).await;
    to_the_reply(&mut second).await;
    servers[0].kill();
    // The client that followed there is told to come again.
    let closed = second.closed(PATIENCE).await.unwrap();
    assert_eq!(u16::from(closed.code), 1012);
    let mut second = servers[1].connect(&key).await;
    for ask in [json!({ "resume": id }).to_string(), text.clone()] {
        let told = second.ask(ask).await;
        assert_eq!(told["status"], "unavailable", "{told}");
        assert_eq!(told["error"]["code"], "replica_away");
    }
    let record = servers[1].get(&format!("/submissions/{id}"));
    let record = record.header("x-api-key", &key).send().await.unwrap();
    assert_eq!(record.status(), 503);
    // The one that is left serves on, also under an id of the server's own.
    let ended = second.ask(hello("ada")).await;
    assert_eq!(ended["status"], "tests_passed", "{ended}");

    // Back with its disk: no record is lost.
    servers[0].restart();
    let asked = std::time::Instant::now();
    let told = loop {
        second
            .send(json!({ "resume": id, "after": 0 }).to_string())
            .await;
        let told = to_the_reply(&mut second).await;
        if told.last().unwrap()["status"] != "unavailable" {
            break told;
        }
        assert!(asked.elapsed() < PATIENCE, "it is not seen to be back");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    assert_eq!(told, whole);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_sessions_and_tickets_of_one_count_on_both() {
    let servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let [one, other] = &servers;
    // One that was made at the first is known to the second at once, though neither has seen it before.
    let (id, key) = one.user_key("ada");
    let asked = other.get("/session").header("x-api-key", &key).send();
    assert_eq!(asked.await.unwrap().status(), 200);
    let signed = one.post("/session").json(&json!({ "key": key })).send();
    let cookie = signed.await.unwrap().headers()["set-cookie"]
        .to_str()
        .unwrap()
        .to_owned();
    let cookie = cookie.split(';').next().unwrap();
    let who = other.get("/session").header("cookie", cookie).send().await;
    assert_eq!(who.unwrap().status(), 200);
    let ticket = one.post("/ws/ticket").header("x-api-key", &key).send();
    let ticket: Value = ticket.await.unwrap().json().await.unwrap();
    let path = format!("/ws/code?ticket={}", ticket["ticket"].as_str().unwrap());
    let mut socket = Socket::open(other, &path, &[]).await.unwrap();
    assert_eq!(
        Socket::open(one, &path, &[]).await.err(),
        Some(401),
        "it works once"
    );
    // Revoked on the first, it ends on the second.
    assert!(one.key_command(&["revoke", &id]).status.success());
    let closed = socket.closed(Duration::from_secs(5)).await.unwrap();
    assert_eq!(u16::from(closed.code), 1008);
    let who = other.get("/session").header("cookie", cookie).send().await;
    assert_eq!(who.unwrap().status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_is_taken_for_a_replica() {
    let servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let one = &servers[0];
    let question = json!({ "replica": "x", "keys": "" });
    let ask = |key: &str| {
        let request = one.post("/peer/hello").header("x-gantry-peer-key", key);
        request.json(&question).send()
    };
    assert_eq!(
        ask("not the secret of both replicas!!!!!!")
            .await
            .unwrap()
            .status(),
        401
    );
    // Positive control.
    let greeted = ask(PEER_KEY).await.unwrap();
    assert_eq!(greeted.status(), 200);
    let mut list = one.get("/submissions").header("x-gantry-caller", "env-0");
    list = list.header("x-gantry-peer-key", "wrong");
    assert_eq!(list.send().await.unwrap().status(), 401);
    let text = greeted.text().await.unwrap();
    assert!(!text.contains(&one.admin), "a key's text is passed on");
}

/// A program that takes this long to test, and says so as a release.
fn slow_to_test(user: &str, repl: &str, seconds: u32) -> Value {
    let code = format!(
        "import sys, time\nif sys.argv[1:]: time.sleep({seconds})\nprint('released by {user}')"
    );
    json!({
        "user_id": user, "repl_id": repl, "code": code, "database": false, "stream": true,
        "submission_id": new_id(), "tests": [{ "name": "runs", "args": ["check"] }],
    })
}

/// Long enough to ask for something at the other replica meanwhile.
const SLOW_TEST: u32 = 4;

#[tokio::test(flavor = "multi_thread")]
async fn what_one_tests_is_not_deployed_when_the_other_stopped_or_deleted_its_repl_since() {
    let servers = pair(["a", "b"]);
    acquainted(&servers).await;
    let [one, other] = &servers;
    let mut first = one.connect(&one.admin).await;
    let mut second = other.connect(&one.admin).await;
    for (repl, deleted) in [("never-deployed", false), ("deleted", true)] {
        if deleted {
            // Each replica of this test has a platform of its own: it is deleted where it is.
            second.send(slow_to_test("ada", repl, 0).to_string()).await;
            let ended = to_the_reply(&mut second).await.pop().unwrap();
            assert_eq!(ended["status"], "deployed", "{ended}");
        }
        first
            .send(slow_to_test("ada", repl, SLOW_TEST).to_string())
            .await;
        loop {
            let event = first.next().await;
            if event["name"] == "test" && event["state"] == "started" {
                break;
            }
        }
        let asked = match deleted {
            true => other.delete(&format!("/repls/{repl}?confirm={repl}")),
            false => other.post("/stop").json(&json!({ "replId": repl })),
        };
        let answer = asked.header("x-api-key", &one.admin).send().await.unwrap();
        assert_eq!(answer.status(), 200, "{repl}");
        let ended = to_the_reply(&mut first).await.pop().unwrap();
        assert_eq!(ended["status"], "superseded", "{ended}");
        let cause = ended["error"]["cause"].as_str().unwrap();
        let why = if deleted { "deleted" } else { "stopped" };
        assert!(cause.contains(why), "{ended}");
        // Its name is free at both.
        for socket in [&mut first, &mut second] {
            socket.send(slow_to_test("bob", repl, 0).to_string()).await;
            let ended = to_the_reply(socket).await.pop().unwrap();
            assert_eq!(ended["status"], "deployed", "{repl}: {ended}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_says_when_a_replica_that_may_deploy_the_repl_yet_cannot_be_told() {
    let mut servers = pair(["a", "b"]);
    acquainted(&servers).await;
    servers[0].kill();
    let asked = servers[1].post("/stop").json(&json!({ "replId": "maybe" }));
    let asked = asked.header("x-api-key", &servers[1].admin);
    let answer = asked.send().await.unwrap();
    assert_eq!(answer.status(), 500);
    let told: Value = answer.json().await.unwrap();
    assert_eq!(told["success"], false, "{told}");
    assert_eq!(told["error"]["code"], "replica_away", "{told}");
}

/// What a live follower may wait for a record of any replica, half of the times and nearly always; the rest
/// of the machine is busy with other tests.
const LIVE_MEDIAN: Duration = Duration::from_millis(50);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Elasticsearch"]
async fn a_follower_at_one_sees_at_once_what_happens_at_the_other() {
    let elastic = std::env::var("ELASTICSEARCH_HOST").expect("ELASTICSEARCH_HOST is not set");
    let prefix = format!("test-{}", new_id());
    let search = [
        ("ELASTICSEARCH_HOST", elastic.as_str()),
        ("ELASTICSEARCH_INDEX_PREFIX", prefix.as_str()),
    ];
    let servers = pair_with(["a", "b"], &search);
    acquainted(&servers).await;
    let [one, other] = &servers;
    let key = one.admin.as_str();
    let request = one.get("/logs?q=tick").header("x-api-key", key);
    let request = request.header("accept", "text/event-stream");
    let mut events = request.send().await.unwrap().bytes_stream();
    let mut socket = other.connect(key).await;
    let code = "import time\nfor n in range(40): print('tick', n, flush=True); time.sleep(0.1)";
    socket
        .send(json!({ "user_id": "ada", "code": code, "deploy": false }).to_string())
        .await;
    let (mut text, mut waits, mut seen) = (String::new(), Vec::new(), Vec::new());
    while seen.len() < 40 {
        let piece = tokio::time::timeout(PATIENCE, events.next()).await;
        let piece = piece.expect("a record never comes").unwrap().unwrap();
        text.push_str(std::str::from_utf8(&piece).unwrap());
        while let Some((event, rest)) = text.split_once("\n\n") {
            let data = event.lines().find_map(|line| line.strip_prefix("data: "));
            if let Some(data) = data {
                let record: Value = serde_json::from_str(data).unwrap();
                let made: jiff::Timestamp = record["@timestamp"].as_str().unwrap().parse().unwrap();
                waits.push(jiff::Timestamp::now().duration_since(made));
                seen.push(record["message"].as_str().unwrap().trim().to_owned());
            }
            text = rest.to_owned();
        }
    }
    let expected: Vec<String> = (0..40).map(|n| format!("tick {n}")).collect();
    assert_eq!(seen, expected);
    waits.sort();
    eprintln!(
        "made at one replica → seen at the other: median {} ms, most {} ms",
        waits[20].as_millis(),
        waits[39].as_millis()
    );
    assert!(waits[20].unsigned_abs() <= LIVE_MEDIAN, "{waits:?}");
    drop(events);
    drop(servers);
    remove_indices(&elastic, &prefix).await;
}

async fn remove_indices(elastic: &str, prefix: &str) {
    let client = reqwest::Client::new();
    let list = client.get(format!("{elastic}/_cat/indices/{prefix}-*?h=index"));
    let names = list.send().await.unwrap().text().await.unwrap();
    let templates = ["logs", "journals"].map(|name| format!("_index_template/{prefix}-{name}"));
    for path in names.lines().map(str::to_owned).chain(templates) {
        let removed = client.delete(format!("{elastic}/{path}")).send().await;
        assert!(removed.unwrap().status().is_success(), "{path}");
    }
}
