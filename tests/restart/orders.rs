//! Servers killed at random moments under load: no input is lost, what was cancelled ends, nothing runs twice,
//! and of several deployments of a repl the one that was sent last serves.

use super::*;

/// Kills and polite ends; a nightly run has more.
const ENDS: (u32, u32) = (6, 2);
const ENDS_IN_FULL: (u32, u32) = (300, 100);

/// Users at one time, each doing one thing after the other.
const USERS: usize = 6;

/// What a user does, one after the other: gives input, cancels, deploys.
const KINDS: usize = 3;

/// Of so many submissions one may be given up: two kills have to come within the seconds that it runs, and more do
/// on a machine that is slow. Seen: 11 of 44 on a busy one.
const GIVEN_UP_OF: usize = 3;

/// Lines of input that one program gets.
const LINES: u64 = 6;

/// One submission as its client sees it, over as many connections as it takes.
struct Sent {
    id: String,
    message: Value,
    /// What to send behind the message, each time there is a new connection.
    behind: fn(&Sent) -> Vec<Value>,
    /// Bytes of input that the server says it has.
    received: u64,
    /// Replies, with whatever they say.
    reply: Option<Value>,
}

impl Sent {
    fn new(mut message: Value, behind: fn(&Sent) -> Vec<Value>) -> Self {
        let id = uuid::Uuid::now_v7().to_string();
        message["submission_id"] = json!(id);
        message["stream"] = json!(true);
        Self {
            id,
            message,
            behind,
            received: 0,
            reply: None,
        }
    }

    fn take(&mut self, frame: &Value) {
        if frame["submission_id"] != self.id.as_str() {
            return;
        }
        if let Some(received) = frame["received"].as_u64() {
            assert!(received >= self.received, "{frame}");
            self.received = received;
        } else if frame.get("status").is_some() {
            assert_ne!(frame["error"]["code"], "not_found", "{frame}");
            self.reply = Some(frame.clone());
        } else {
            let refused = frame.get("error").is_some() && frame.get("event").is_none();
            // Input that comes when the program has ended is for nobody.
            assert!(
                !refused || frame["error"]["code"] == "not_running",
                "{frame}"
            );
        }
    }
}

/// Sends all of them, in this order, until each has its reply.
async fn follow(way: &Way, sent: &mut [Sent]) {
    let begun = Instant::now();
    while sent.iter().any(|one| one.reply.is_none()) {
        assert!(
            begun.elapsed() < REPLY_PATIENCE,
            "{:?}: no reply",
            sent[0].message
        );
        let mut socket = way.connect().await;
        let mut frames = Vec::new();
        for one in sent.iter().filter(|one| one.reply.is_none()) {
            frames.push(one.message.clone());
            frames.extend((one.behind)(one));
        }
        let mut alive = true;
        for frame in frames {
            alive &= socket.send(Message::text(frame.to_string())).await.is_ok();
        }
        while alive && sent.iter().any(|one| one.reply.is_none()) {
            match frame(&mut socket).await {
                Some(frame) => sent.iter_mut().for_each(|one| one.take(&frame)),
                None => alive = false,
            }
        }
    }
}

fn line(number: u64) -> String {
    format!("line {number} ü\n")
}

/// Input in frames, again from what the server has.
fn input(sent: &Sent) -> Vec<Value> {
    let mut offset = 0;
    let mut frames = Vec::new();
    for number in 0..LINES {
        let data = line(number);
        let end = offset + data.len() as u64;
        if end > sent.received || number + 1 == LINES {
            frames.push(json!({
                "stdin": sent.id, "data": data, "offset": offset, "eof": number + 1 == LINES,
            }));
        }
        offset = end;
    }
    frames
}

fn cancel(sent: &Sent) -> Vec<Value> {
    vec![json!({ "cancel": sent.id })]
}

fn nothing(_: &Sent) -> Vec<Value> {
    Vec::new()
}

const READER: &str = "import sys\nfor line in sys.stdin: print('got', line, end='', flush=True)\n";

fn server_that_says(turn: usize, slow: bool) -> String {
    let pause = if slow {
        "import time; time.sleep(1.5)\n"
    } else {
        ""
    };
    format!(
        "import http.server, sys\nif sys.argv[1:]:\n    {}sys.exit()\n\
         class H(http.server.BaseHTTPRequestHandler):\n    def do_GET(self):\n        \
         self.send_response(200); self.end_headers(); self.wfile.write(b'turn {turn}')\n    \
         def log_message(self, *a): pass\n\
         http.server.HTTPServer(('127.0.0.1', 3000), H).serve_forever()\n",
        pause.replace('\n', "\n    ")
    )
}

/// Kills of the server so far.
#[derive(Default)]
struct Kills {
    begun: AtomicUsize,
    over: AtomicUsize,
}

/// What users have seen.
#[derive(Default)]
struct Seen {
    nonces: Vec<String>,
    inputs: usize,
    cancels: usize,
    deploys: usize,
    superseded: usize,
    given_up: usize,
    kills: Arc<Kills>,
    /// The last that was sent of each repl and is not given up, and what it says.
    latest: BTreeMap<String, usize>,
}

impl Seen {
    /// Kills that what is sent now does not see any more.
    fn kills(&self) -> usize {
        self.kills.over.load(Ordering::Relaxed)
    }

    /// Whether it was given up, which takes two kills since it was sent.
    fn gave_up(&mut self, sent: &Sent, kills_before: usize) -> bool {
        let given_up = sent.reply.as_ref().unwrap()["error"]["code"] == "server_ended_twice";
        if given_up {
            let kills = self.kills.begun.load(Ordering::Relaxed) - kills_before;
            assert!(kills >= 2, "{} was given up after {kills} kills", sent.id);
            self.given_up += 1;
        }
        given_up
    }

    fn ran(&mut self, sent: &Sent) -> Vec<String> {
        let stdout = sent.reply.as_ref().unwrap()["stdout"].as_str().unwrap();
        let (nonces, rest): (Vec<_>, Vec<_>) = stdout
            .split_inclusive('\n')
            .partition(|line| line.starts_with("nonce "));
        assert_eq!(nonces.len(), 1, "{}: {stdout}", sent.id);
        self.nonces.push(nonces[0].to_owned());
        rest.into_iter().map(str::to_owned).collect()
    }
}

async fn give_input(way: &Way, user: &str, seen: &mut Seen) {
    let code = format!("{NONCE}{READER}");
    let message = json!({ "user_id": user, "code": code, "deploy": false, "interactive": true });
    let (mut sent, kills) = ([Sent::new(message, input)], seen.kills());
    follow(way, &mut sent).await;
    let [sent] = &sent;
    if seen.gave_up(sent, kills) {
        return;
    }
    let reply = sent.reply.as_ref().unwrap();
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let expected: Vec<String> = (0..LINES).map(|n| format!("got {}", line(n))).collect();
    assert_eq!(seen.ran(sent), expected, "{reply}");
    seen.inputs += 1;
}

async fn cancel_one(way: &Way, user: &str, seen: &mut Seen) {
    let code = format!("{NONCE}import time; time.sleep(25)");
    let limits = json!({ "wall_ms": 30_000 });
    let message = json!({ "user_id": user, "code": code, "deploy": false, "limits": limits });
    let (mut sent, kills) = ([Sent::new(message, cancel)], seen.kills());
    follow(way, &mut sent).await;
    if seen.gave_up(&sent[0], kills) {
        return;
    }
    let reply = sent[0].reply.as_ref().unwrap();
    assert_eq!(reply["status"], "cancelled", "{reply}");
    seen.cancels += 1;
}

async fn deploy_two(way: &Way, user: &str, turn: usize, seen: &mut Seen) {
    let repl = format!("{user}-app");
    let message = |turn: usize, slow: bool| {
        json!({
            "user_id": user, "repl_id": repl, "code": server_that_says(turn, slow), "database": false,
            "tests": [{ "name": "starts", "args": ["check"] }],
        })
    };
    let (first, second) = (2 * turn, 2 * turn + 1);
    let mut sent = [
        Sent::new(message(first, true), nothing),
        Sent::new(message(second, false), nothing),
    ];
    let kills = seen.kills();
    follow(way, &mut sent).await;
    for (one, turn) in sent.iter().zip([first, second]) {
        let reply = one.reply.as_ref().unwrap();
        if seen.gave_up(one, kills) {
            // It may have been released before.
            seen.latest.remove(&repl);
            continue;
        }
        match reply["status"].as_str().unwrap() {
            "deployed" => {
                seen.deploys += 1;
                seen.latest.insert(repl.clone(), turn);
            }
            // Only the one that was sent first may be.
            "superseded" if turn == first => seen.superseded += 1,
            _ => panic!("{reply}"),
        }
    }
}

/// What the repl answers, once it does.
async fn page(way: &Way, repl: &str) -> String {
    let asked = Instant::now();
    loop {
        let request = client().get(format!("http://{}/", way.address));
        let host = format!("{repl}.apps.localhost:{}", way.address.port());
        let answer = request.header("host", host).send().await;
        if let Ok(answer) = answer
            && answer.status() == 200
        {
            return answer.text().await.unwrap();
        }
        assert!(asked.elapsed() < PATIENCE, "{repl} does not answer");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ends_at_random_moments_lose_no_input_and_leave_the_latest_sent_serving() {
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let (kills, terms) = if full { ENDS_IN_FULL } else { ENDS };
    // Few at a time, so that many wait for their turn.
    let mut server = Server::start_as(0, &[("GANTRY_MAX_RUNS", "4")]);
    let way = Way::to(&server);
    let enough = Arc::new(AtomicBool::new(false));
    let killed = Arc::new(Kills::default());
    let users: Vec<_> = (0..USERS)
        .map(|number| {
            let (way, enough) = (way.clone(), Arc::clone(&enough));
            let mut seen = Seen {
                kills: Arc::clone(&killed),
                ..Seen::default()
            };
            tokio::spawn(async move {
                let user = format!("order{number}");
                for turn in 0.. {
                    // Everybody does everything.
                    if turn >= KINDS && enough.load(Ordering::Relaxed) {
                        break;
                    }
                    match (number + turn) % KINDS {
                        0 => give_input(&way, &user, &mut seen).await,
                        1 => cancel_one(&way, &user, &mut seen).await,
                        _ => deploy_two(&way, &user, turn, &mut seen).await,
                    }
                }
                seen
            })
        })
        .collect();
    let mut random = 12_345_u64;
    for end in 0..kills + terms {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        tokio::time::sleep(Duration::from_millis(300 + (random >> 33) % 1_500)).await;
        let politely = end % (kills / terms + 1) == kills / terms;
        if !politely {
            killed.begun.fetch_add(1, Ordering::Relaxed);
        }
        server = tokio::task::spawn_blocking(move || {
            if politely {
                server.terminate();
            }
            server.restart();
            server
        })
        .await
        .unwrap();
        if !politely {
            killed.over.fetch_add(1, Ordering::Relaxed);
        }
    }
    enough.store(true, Ordering::Relaxed);
    let mut all = Seen::default();
    for user in users {
        let seen = tokio::time::timeout(REPLY_PATIENCE, user)
            .await
            .unwrap()
            .unwrap();
        all.nonces.extend(seen.nonces);
        all.inputs += seen.inputs;
        all.cancels += seen.cancels;
        all.deploys += seen.deploys;
        all.superseded += seen.superseded;
        all.given_up += seen.given_up;
        all.latest.extend(seen.latest);
    }
    let distinct: HashSet<_> = all.nonces.iter().collect();
    assert_eq!(distinct.len(), all.nonces.len(), "a number was drawn twice");
    for (repl, turn) in &all.latest {
        assert_eq!(page(&way, repl).await, format!("turn {turn}"), "{repl}");
    }
    let sent = all.inputs + all.cancels + all.deploys + all.superseded + all.given_up;
    println!(
        "{kills} kills, {terms} polite ends: {} programs with input, {} cancelled, {} deployed, {} superseded, \
         {} given up, {} repls serve their latest",
        all.inputs,
        all.cancels,
        all.deploys,
        all.superseded,
        all.given_up,
        all.latest.len()
    );
    assert!(
        all.given_up * GIVEN_UP_OF <= sent,
        "{} of {sent} were given up",
        all.given_up
    );
    // Each user did each kind at least once, unless it was given up; of two that are sent together, the first has the
    // longer test.
    for (done, least, what) in [
        (all.inputs, USERS, "got their input"),
        (all.cancels, USERS, "were cancelled"),
        (all.deploys, USERS, "were deployed"),
        (all.superseded, 1, "were superseded"),
    ] {
        let given_up = all.given_up.min(least - 1);
        assert!(done + given_up >= least, "{done} {what} of {least}");
    }
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn input_and_cancellations_of_what_waits_survive_a_kill_and_a_polite_end() {
    for politely in [false, true] {
        let mut server = Server::start_as(0, &[("GANTRY_MAX_RUNS", "1")]);
        let way = Way::to(&server);
        let busy =
            json!({ "user_id": "busy", "code": "import time; time.sleep(3)", "deploy": false });
        let reader = json!({ "user_id": "reads", "code": format!("{NONCE}{READER}"), "deploy": false, "interactive": true });
        let sleeper =
            json!({ "user_id": "sleeps", "code": "import time; time.sleep(9)", "deploy": false });
        // Frames are read in their order: when the input is received, the cancellation was read.
        let mut sent = [
            Sent::new(busy, nothing),
            Sent::new(sleeper, cancel),
            Sent::new(reader, input),
        ];
        let mut socket = way.connect().await;
        for one in &sent {
            for frame in std::iter::once(one.message.clone()).chain((one.behind)(one)) {
                socket.send(Message::text(frame.to_string())).await.unwrap();
            }
        }
        let all: u64 = (0..LINES).map(|n| line(n).len() as u64).sum();
        let mut waits = false;
        while sent[2].received < all || !waits {
            let frame = frame(&mut socket).await.unwrap();
            waits |= frame["submission_id"] == sent[1].id.as_str();
            sent.iter_mut().for_each(|one| one.take(&frame));
        }
        server = tokio::task::spawn_blocking(move || {
            if politely {
                server.terminate();
            }
            server.restart();
            server
        })
        .await
        .unwrap();
        // Nothing is sent again but the question how it ended.
        for one in &mut sent {
            one.behind = nothing;
        }
        follow(&way, &mut sent).await;
        let statuses = sent
            .each_ref()
            .map(|one| one.reply.as_ref().unwrap()["status"].clone());
        assert_eq!(
            statuses,
            ["tests_passed", "cancelled", "tests_passed"],
            "{politely}"
        );
        let expected: Vec<String> = (0..LINES).map(|n| format!("got {}", line(n))).collect();
        assert_eq!(Seen::default().ran(&sent[2]), expected);
        drop(server);
    }
}

/// Until this step of the submission has begun.
async fn begun(socket: &mut WebSocket, step: &str) {
    loop {
        let event = frame(socket).await.unwrap();
        if event["name"] == step && event["state"] == "started" {
            break;
        }
    }
}

/// How long the release takes to listen that is gone back to: what is sent or ends meanwhile has some seconds for it.
const SLOW_TO_LISTEN: f64 = 4.0;

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_rollback_stands_against_what_was_sent_before_and_gives_way_to_what_is_sent_later() {
    let server = Server::start();
    let way = Way::to(&server);
    let message = |turn: usize, test: f64, listen: f64| {
        let code = format!(
            "import sys, time\ntime.sleep({test} if sys.argv[1:] else {listen})\n{}",
            server_that_says(turn, false)
        );
        json!({
            "user_id": "back", "repl_id": "back-app", "code": code, "database": false, "serves": true,
            "tests": [{ "name": "starts", "args": ["check"] }],
        })
    };
    let status = |sent: &Sent| sent.reply.as_ref().unwrap()["status"].clone();
    for (turn, listen) in [(0, SLOW_TO_LISTEN), (1, 0.0)] {
        let mut sent = [Sent::new(message(turn, 0.0, listen), nothing)];
        follow(&way, &mut sent).await;
        assert_eq!(status(&sent[0]), "deployed", "{:?}", sent[0].reply);
    }
    let rollback = || {
        let url = format!("http://{}/repls/back-app/rollback", way.address);
        let request = client().post(url).header("x-api-key", &way.key);
        let request = request.json(&json!({ "release": 1 })).send();
        tokio::spawn(async move {
            let begun = Instant::now();
            assert_eq!(request.await.unwrap().status(), 200);
            assert!(
                begun.elapsed().as_secs_f64() > SLOW_TO_LISTEN,
                "it is not slow"
            );
        })
    };
    // Sent before, its test ends while the rollback is made.
    let mut before = [Sent::new(message(2, 1.5, 0.0), nothing)];
    let mut socket = way.connect().await;
    let text = before[0].message.to_string();
    socket.send(Message::text(text)).await.unwrap();
    begun(&mut socket, "test").await;
    rollback().await.unwrap();
    follow(&way, &mut before).await;
    assert_eq!(status(&before[0]), "superseded", "{:?}", before[0].reply);
    let error = &before[0].reply.as_ref().unwrap()["error"];
    assert!(
        error["cause"].as_str().unwrap().contains("rolled back"),
        "{error}"
    );
    assert_eq!(page(&way, "back-app").await, "turn 0");
    // Sent a second after, its test goes on when the rollback is made.
    let back = rollback();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut later = [Sent::new(message(3, SLOW_TO_LISTEN, 0.0), nothing)];
    follow(&way, &mut later).await;
    assert_eq!(status(&later[0]), "deployed", "{:?}", later[0].reply);
    back.await.unwrap();
    assert_eq!(page(&way, "back-app").await, "turn 3");
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_during_a_test_is_not_undone_by_its_deployment() {
    let mut server = Server::start();
    let way = Way::to(&server);
    let message = |turn: usize, slow: bool| {
        json!({
            "user_id": "halts", "repl_id": "halts-app", "code": server_that_says(turn, slow),
            "database": false, "tests": [{ "name": "starts", "args": ["check"] }],
        })
    };
    let stop = async || {
        let request = client().post(format!("http://{}/stop", way.address));
        let request = request
            .header("x-api-key", &way.key)
            .json(&json!({ "replId": "halts-app" }));
        assert_eq!(request.send().await.unwrap().status(), 200);
    };
    let status = |sent: &Sent| sent.reply.as_ref().unwrap()["status"].clone();
    // Its name is nobody's yet; then it is, and serves, and the server dies after the stop.
    for (turn, killed) in [(0, false), (2, true)] {
        let mut sent = [Sent::new(message(turn, true), nothing)];
        let mut socket = way.connect().await;
        socket
            .send(Message::text(sent[0].message.to_string()))
            .await
            .unwrap();
        begun(&mut socket, "test").await;
        stop().await;
        if killed {
            server = restart(server).await;
        }
        follow(&way, &mut sent).await;
        assert_eq!(status(&sent[0]), "superseded", "{:?}", sent[0].reply);
        let error = &sent[0].reply.as_ref().unwrap()["error"];
        assert!(
            error["cause"].as_str().unwrap().contains("stopped"),
            "{error}"
        );
        let request = client().get(format!("http://{}/", way.address));
        let host = format!("halts-app.apps.localhost:{}", way.address.port());
        let answer = request.header("host", host).send().await.unwrap();
        assert_ne!(answer.status(), 200);
        // What is sent after it is deployed.
        let mut next = [Sent::new(message(turn + 1, false), nothing)];
        follow(&way, &mut next).await;
        assert_eq!(status(&next[0]), "deployed", "{:?}", next[0].reply);
        let said = page(&way, "halts-app").await;
        assert_eq!(said, format!("turn {}", turn + 1));
    }
    drop(server);
}
