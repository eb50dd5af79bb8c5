//! One user against all through the journal, large answers and log searches.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::server::{Server, client, hello};

const ID: &str = "01900000-0000-7000-8000-0000000000";

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let mut lines = status.lines();
    let line = lines.find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A submission that prints so many MiB.
fn loud(user: &str, id: &str, mib: usize) -> String {
    let code =
        format!("import sys\nfor _ in range({mib} * 16): sys.stdout.write('x' * 65535 + '\\n')");
    json!({
        "user_id": user, "submission_id": id, "code": code, "deploy": false,
        "limits": {"output_bytes": 16 << 20, "wall_ms": 60_000, "cpu_ms": 30_000},
    })
    .to_string()
}

async fn run(server: &Server, key: &str, message: String) -> Value {
    server.connect(key).await.ask(message).await
}

async fn record_of(server: &Server, key: &str, id: &str) -> (u16, Value) {
    let asked = server.get(&format!("/submissions/{id}"));
    let answer = asked.header("x-api-key", key).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_answers_to_clients_that_do_not_read_cost_no_memory() {
    let server = Server::start();
    let (_, key) = server.user("ann").await;
    let id = format!("{ID}01");
    let reply = run(&server, &key, loud("ann", &id, 12)).await;
    assert_eq!(reply["status"], "tests_passed", "{}", reply["error"]);
    let output = reply["stdout"].as_str().unwrap();
    assert_eq!(output.len(), 12 << 20);
    let before = resident_kib(server.pid());
    let mut unread = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let request = format!(
            "GET /submissions/{id} HTTP/1.1\r\nHost: {}\r\nX-API-Key: {key}\r\n\r\n",
            server.address
        );
        stream.write_all(request.as_bytes()).unwrap();
        // Its head comes: it is being answered.
        stream.read_exact(&mut [0; 12]).unwrap();
        unread.push(stream);
        let mut socket = server.connect(&key).await;
        socket
            .send(json!({"resume": id, "after": 0}).to_string())
            .await;
        sockets.push(socket);
    }
    let mut most = 0;
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        most = most.max(resident_kib(server.pid()));
    }
    let grown = most.saturating_sub(before);
    assert!(grown < 64 << 10, "{before} KiB before, {grown} KiB more");
    // Who reads gets all of it.
    let (status, whole) = record_of(&server, &key, &id).await;
    assert_eq!(status, 200);
    assert_eq!(whole["reply"], reply);
    assert_eq!(whole["submission"]["user_id"], "ann");
    let events = whole["events"].as_array().unwrap();
    let printed = events.iter().filter_map(|event| event["data"].as_str());
    assert!(printed.collect::<String>() == output);
    for (n, event) in events.iter().enumerate() {
        assert_eq!(event["seq"], n + 1);
    }
    let again = run(
        &server,
        &key,
        json!({"resume": id, "after": 1_000_000}).to_string(),
    )
    .await;
    assert_eq!(again, reply);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_output_erases_nobody_elses_history_and_no_id_runs_twice() {
    let mut server = Server::start_as(0, &[("GANTRY_JOURNAL_BYTES", "16777216")]);
    let (_, quiet) = server.user("quiet").await;
    let (_, flood) = server.user("flood").await;
    let kept = run(&server, &quiet, hello("quiet")).await;
    let kept_id = kept["submission_id"].as_str().unwrap().to_owned();
    let first = format!("{ID}10");
    for n in 10..18 {
        let reply = run(&server, &flood, loud("flood", &format!("{ID}{n}"), 4)).await;
        assert_eq!(reply["status"], "tests_passed", "{}", reply["error"]);
    }
    let began = Instant::now();
    while record_of(&server, &flood, &first).await.0 == 200 {
        assert!(began.elapsed() < Duration::from_secs(20), "nothing goes");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for restarted in [false, true] {
        if restarted {
            server.restart();
        }
        let (status, whole) = record_of(&server, &quiet, &kept_id).await;
        assert_eq!((status, &whole["reply"]), (200, &kept), "{restarted}");
        let (status, problem) = record_of(&server, &flood, &first).await;
        assert_eq!((status, &problem["code"]), (410, &json!("gone")));
        let cause = problem["cause"].as_str().unwrap();
        assert!(cause.contains("tests_passed"), "{cause}");
        // Another user learns nothing of it.
        assert_eq!(record_of(&server, &quiet, &first).await.0, 404);
        for message in [
            loud("flood", &first, 4),
            json!({"resume": first, "after": 0}).to_string(),
        ] {
            let reply = run(&server, &flood, message).await;
            assert_eq!(reply["error"]["code"], "gone", "{reply}");
            assert_eq!(reply["status"], "unavailable");
        }
        let stolen = run(&server, &quiet, loud("quiet", &first, 1)).await;
        assert_eq!(stolen["status"], "invalid");
        let fresh = run(&server, &quiet, hello("quiet")).await;
        assert_eq!(fresh["status"], "tests_passed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_to_a_damaged_submission_names_no_file_and_cuts_nothing_off() {
    let mut server = Server::start();
    let (_, ann) = server.user("ann").await;
    let id = format!("{ID}30");
    let marker = "of-the-submission-that-is-damaged";
    let code = format!(
        "import time # {marker}\nfor n in range(600): print(n, flush=True); time.sleep(0.1)"
    );
    let message = json!({
        "user_id": "ann", "submission_id": id, "code": code, "deploy": false, "stream": true,
        "limits": {"wall_ms": 60_000},
    });
    let mut socket = server.connect(&ann).await;
    socket.send(message.to_string()).await;
    // Records lie behind its first one: it is not the end that a crash may tear off.
    loop {
        let frame = socket.next().await;
        if frame["data"]
            .as_str()
            .is_some_and(|data| data.contains("9\n"))
        {
            break;
        }
    }
    server.kill();
    let folder = server.data.path().join("journal");
    let mut damaged = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let Ok(mut bytes) = std::fs::read(&path) else {
            continue;
        };
        let mut windows = bytes.windows(marker.len());
        if let Some(at) = windows.position(|window| window == marker.as_bytes()) {
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert_eq!(damaged, 1);
    server.start_again();
    // Nothing but the reply.
    let resume = json!({"resume": id, "after": 1_000_000}).to_string();
    let reply = run(&server, &ann, resume).await;
    assert_eq!(reply["status"], "unavailable", "{reply}");
    assert_eq!(reply["error"]["code"], "record_unreadable", "{reply}");
    let told = reply.to_string();
    assert!(!told.contains("truncate"), "{told}");
    assert!(
        !told.contains(server.data.path().to_str().unwrap()),
        "{told}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn searches_and_followers_of_one_user_are_bounded() {
    let server = Server::start();
    let (_, busy) = server.user("busy").await;
    let (_, quiet) = server.user("quiet").await;
    run(&server, &busy, loud("busy", &format!("{ID}20"), 4)).await;
    let search = |key: &str| {
        let asked = server.get("/logs?q=x*&limit=1000").header("x-api-key", key);
        // Read to the end: what is not read counts.
        async move {
            let answer = asked.send().await.unwrap();
            let again = answer.headers().contains_key("retry-after");
            let status = answer.status().as_u16();
            (status, again, answer.json::<Value>().await.unwrap())
        }
    };
    let many = futures_util::future::join_all((0..48).map(|_| search(&busy)));
    let (answers, neighbour) = tokio::join!(many, async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        let (status, ..) = search(&quiet).await;
        (status, began.elapsed())
    });
    let mut refused = 0;
    for (status, again, problem) in answers {
        match status {
            200 => {}
            429 => {
                assert!(again);
                assert_eq!(problem["code"], "too_many_searches");
                refused += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert!(refused >= 20, "{refused}");
    assert_eq!(neighbour.0, 200);
    assert!(neighbour.1 < Duration::from_secs(3), "{:?}", neighbour.1);

    let follow = || {
        let asked = client().get(server.url("/logs"));
        let asked = asked.header("accept", "text/event-stream");
        asked.header("x-api-key", &busy).send()
    };
    let mut followers = Vec::new();
    for _ in 0..16 {
        let answer = follow().await.unwrap();
        assert_eq!(answer.status(), 200);
        followers.push(answer);
    }
    assert_eq!(follow().await.unwrap().status(), 429);
    followers.clear();
    let began = Instant::now();
    while follow().await.unwrap().status() != 200 {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
