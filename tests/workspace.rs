//! The runner's port of a repl, on the local platform: terminals, files, the program's switch, saving.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use server::{PATIENCE, Server, Socket};

fn store(server: &Server, repl: &str) -> PathBuf {
    server.data.path().join("store/code").join(repl)
}

/// A repl with this program, started.
async fn opened(server: &Server, repl: &str, code: &str) -> Value {
    std::fs::create_dir_all(store(server, repl)).unwrap();
    std::fs::write(store(server, repl).join("main.py"), code).unwrap();
    start(server, repl).await
}

async fn post(server: &Server, path: &str, body: Value) -> Value {
    let request = server.post(path).header("x-api-key", &server.admin);
    // Ten thousand files are saved in one of these, each of them synced.
    let request = request.timeout(Duration::from_secs(150));
    let answer = request.json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    answer.json().await.unwrap()
}

async fn start(server: &Server, repl: &str) -> Value {
    post(server, "/start", json!({ "replId": repl, "userId": "ann" })).await
}

async fn stop(server: &Server, repl: &str) {
    post(server, "/stop", json!({ "replId": repl })).await;
}

/// A client of a runner.
struct Client {
    socket: Socket,
    last: u64,
    /// What terminals showed, and what else was told.
    shown: Vec<u8>,
    told: Vec<Value>,
}

impl Client {
    async fn by_key(server: &Server, repl: &str) -> Self {
        let path = format!("/repls/{repl}/terminal");
        let socket = Socket::open(server, &path, &[("x-api-key", &server.admin)]).await;
        Self::new(socket.expect("no connection"))
    }

    fn new(socket: Socket) -> Self {
        Self {
            socket,
            last: 0,
            shown: Vec::new(),
            told: Vec::new(),
        }
    }

    async fn hear(&mut self) {
        let next = tokio::time::timeout(PATIENCE, self.socket.0.next());
        match next.await.expect("nothing is heard") {
            Some(Ok(Message::Binary(data))) => {
                let length = usize::from(data[0]);
                self.shown.extend(&data[1 + length..]);
            }
            Some(Ok(Message::Text(text))) => self.told.push(serde_json::from_str(&text).unwrap()),
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            other => panic!("the connection ended: {other:?}"),
        }
    }

    /// Answers pings, until it is dropped.
    async fn listens(&mut self) {
        while let Some(Ok(_)) = self.socket.0.next().await {}
        std::future::pending().await
    }

    /// The answer to a request.
    async fn ask(&mut self, op: &str, mut body: Value) -> Value {
        self.last += 1;
        (body["op"], body["id"]) = (op.into(), self.last.into());
        let text = Message::text(body.to_string());
        self.socket.0.send(text).await.unwrap();
        loop {
            let own = |told: &Value| told["id"] == self.last;
            if let Some(at) = self.told.iter().position(own) {
                return self.told.remove(at);
            }
            self.hear().await;
        }
    }

    async fn done(&mut self, op: &str, body: Value) {
        let answer = self.ask(op, body.clone()).await;
        assert_eq!(answer["ok"], true, "{op} {body}: {answer}");
    }

    async fn refused(&mut self, op: &str, body: Value) -> String {
        let answer = self.ask(op, body.clone()).await;
        let cause = answer["error"]["cause"].as_str();
        cause
            .unwrap_or_else(|| panic!("{op} {body} was done: {answer}"))
            .to_owned()
    }

    async fn open(&mut self, terminal: &str) -> bool {
        let size = json!({ "terminal": terminal, "cols": 100, "rows": 30 });
        let answer = self.ask("terminal.open", size).await;
        answer["created"]
            .as_bool()
            .unwrap_or_else(|| panic!("{answer}"))
    }

    async fn type_in(&mut self, terminal: &str, text: &str) {
        let mut frame = vec![u8::try_from(terminal.len()).unwrap()];
        frame.extend(terminal.as_bytes());
        frame.extend(text.as_bytes());
        self.socket.0.send(Message::binary(frame)).await.unwrap();
    }

    /// Until the terminal has shown this, not long ago.
    async fn sees(&mut self, text: &str) {
        let recent = |shown: &[u8]| {
            let from = shown.len().saturating_sub(64 << 10);
            String::from_utf8_lossy(&shown[from..]).contains(text)
        };
        while !recent(&self.shown) {
            self.hear().await;
        }
    }

    /// Until this was told.
    async fn hears(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        loop {
            if let Some(at) = self.told.iter().position(&is_it) {
                return self.told.remove(at);
            }
            self.hear().await;
        }
    }
}

/// Within which a revoked key closes what it opened, and a margin for a busy machine.
const REVOKED: Duration = Duration::from_secs(10);

const QUIET: &str = "import time\ntime.sleep(1000)\n";

#[tokio::test]
async fn terminals_are_resized_speak_utf_8_and_outlive_a_connection() {
    let server = Server::start();
    let started = opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    assert!(client.open("one").await);
    client
        .type_in(
            "one",
            "echo $((6*7)) grüße 😀; stty size; tty; id -u; pwd\n",
        )
        .await;
    client.sees("42 grüße 😀").await;
    client.sees("30 100").await;
    client.sees("/dev/pts/").await;
    client.sees("/workspace").await;
    let size = json!({ "terminal": "one", "cols": 120, "rows": 40 });
    client.done("terminal.resize", size).await;
    client.type_in("one", "stty size\n").await;
    client.sees("40 120").await;
    // Control keys reach the foreground program.
    let waiting = "sh -c \"echo go''ing; exec sleep 999\"\n";
    client.type_in("one", waiting).await;
    client.sees("going").await;
    client.type_in("one", "\u{3}").await;
    client.type_in("one", "echo interrupted-$?\n").await;
    client.sees("interrupted-130").await;
    // A second one, at the same time.
    assert!(client.open("two").await);
    client.type_in("two", "echo sec'ond'\n").await;
    client.sees("second").await;
    let list = client.ask("terminal.list", json!({})).await;
    assert_eq!(list["terminals"], json!(["one", "two"]));
    client
        .type_in("one", "(sleep 0.5; echo while-a'way') &\n")
        .await;
    drop(client);
    // Back by the URL that the start gave, past the API.
    let url = started["terminalUrl"].as_str().unwrap();
    let (host, path) = url.strip_prefix("ws://").unwrap().split_once('/').unwrap();
    let socket = Socket::open(&server, &format!("/{path}"), &[("host", host)]).await;
    let mut back = Client::new(socket.expect("the ticket does not open it"));
    assert!(!back.open("one").await, "the terminal was lost");
    back.sees("42 grüße 😀").await;
    back.sees("while-away").await;
    back.type_in("one", "exit 7\n").await;
    let ended = back.hears(|told| told["event"] == "ended").await;
    assert_eq!(
        (&ended["terminal"], &ended["exit_code"]),
        (&json!("one"), &json!(7))
    );
    let list = back.ask("terminal.list", json!({})).await;
    assert_eq!(list["terminals"], json!(["two"]));
    assert!(back.open("one").await, "an ended terminal is made anew");
    assert!(
        back.refused("terminal.open", json!({ "terminal": "../x" }))
            .await
            .contains("name")
    );
}

#[tokio::test]
async fn a_stranger_gets_nothing() {
    let server = Server::start();
    let started = opened(&server, "shop", QUIET).await;
    opened(&server, "other", QUIET).await;
    let (_, bob) = server.user("bob").await;
    let ticket = started["terminalUrl"].as_str().unwrap();
    let ticket = ticket.split_once("ticket=").unwrap().1.to_owned();
    let port = server.address.port();
    let at = |repl: &str| format!("{repl}.localhost:{port}");
    let open = async |host: String, path: String| {
        Socket::open(&server, &path, &[("host", &host)]).await.err()
    };
    assert_eq!(open(at("shop"), format!("/?ticket={ticket}")).await, None);
    for (host, path) in [
        (at("other"), format!("/?ticket={ticket}")),
        (at("shop"), "/".to_owned()),
        (at("shop"), "/?ticket=".to_owned()),
        (at("shop"), "/?ticket=1.00".to_owned()),
        (at("shop"), format!("/?ticket=9{ticket}")),
    ] {
        assert_eq!(
            open(host.clone(), path.clone()).await,
            Some(401),
            "{host}{path}"
        );
    }
    for path in ["/files", "/files/main.py", "/anything"] {
        let answer = server
            .get(path)
            .header("host", at("shop"))
            .send()
            .await
            .unwrap();
        assert_eq!(answer.status(), 401, "{path}");
        assert!(!answer.text().await.unwrap().contains("time.sleep"));
    }
    assert_eq!(open(at("nobody"), "/".to_owned()).await, Some(404));
    // By the server: as if it did not exist.
    let by = async |key: &str| {
        let headers = [("x-api-key", key)];
        Socket::open(&server, "/repls/shop/terminal", &headers)
            .await
            .err()
    };
    // Its own user's key opens it, for as long as it is good.
    let (id, ann) = server.user("ann").await;
    let headers = [("x-api-key", ann.as_str())];
    let opened = Socket::open(&server, "/repls/shop/terminal", &headers).await;
    let mut client = Client::new(opened.expect("no connection"));
    assert!(client.open("hers").await);
    assert!(server.key_command(&["revoke", &id]).status.success());
    let ended = async { while let Some(Ok(_)) = client.socket.0.next().await {} };
    let ended = tokio::time::timeout(REVOKED, ended).await;
    assert!(ended.is_ok(), "a terminal outlives the key that opened it");
    assert_eq!(by(&ann).await, Some(401));
    assert_eq!(by(&bob).await, Some(404));
    assert_eq!(by("gtk_wrong").await, Some(401));
    for path in ["/repls/shop/ticket", "/repls/shop/save"] {
        let theirs = server
            .post(path)
            .header("x-api-key", &bob)
            .send()
            .await
            .unwrap();
        assert_eq!(theirs.status(), 404, "{path}");
    }
}

#[tokio::test]
async fn files_are_edited_watched_and_kept() {
    let server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    client.done("files.watch", json!({ "on": true })).await;
    client
        .done(
            "files.write",
            json!({ "path": "a/é.txt", "text": "eins\n" }),
        )
        .await;
    let changed = client.hears(|told| told["event"] == "changed").await;
    assert!(
        changed["paths"].to_string().contains("a/é.txt"),
        "{changed}"
    );
    let read = client.ask("files.read", json!({ "path": "a/é.txt" })).await;
    assert_eq!(
        (&read["text"], &read["size"], &read["more"]),
        (&json!("eins\n"), &json!(5), &json!(false))
    );
    // An upload in pieces, of bytes that are no text.
    let piece = "/wD+".repeat(100_000);
    for (number, more) in [(0, true), (1, true), (2, false)] {
        let body =
            json!({ "path": "big.bin", "base64": piece, "offset": number * 300_000, "more": more });
        client.done("files.write", body).await;
    }
    let read = client
        .ask(
            "files.read",
            json!({ "path": "big.bin", "offset": 600_000 }),
        )
        .await;
    assert_eq!(
        (&read["base64"], &read["size"]),
        (&json!(piece), &json!(900_000))
    );
    let huge = json!({ "path": "huge", "text": "x", "offset": 1_u64 << 40 });
    assert!(client.refused("files.write", huge).await.contains("larger"));
    client
        .done("files.rename", json!({ "path": "a", "to": "b/c" }))
        .await;
    client.done("files.make", json!({ "path": "empty" })).await;
    for path in ["../x", "/etc/passwd", "a/../../x", "", "a\u{0}b"] {
        let body = json!({ "path": path, "text": "x" });
        let refused = client.ask("files.write", body).await;
        assert!(refused["error"].is_object(), "{path}: {refused}");
    }
    // What a program makes, a person can change, and the other way round.
    client.open("one").await;
    client
        .type_in(
            "one",
            "ln -s /etc/passwd link; echo more >> b/c/é.txt; mkfifo pipe; echo do'ne'\n",
        )
        .await;
    client.sees("done").await;
    for path in ["link", "pipe"] {
        client.refused("files.read", json!({ "path": path })).await;
    }
    client
        .done("files.delete", json!({ "path": "empty" }))
        .await;
    let tree = client.ask("files.tree", json!({})).await;
    let mut paths: Vec<&str> = tree["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| f["path"].as_str().unwrap())
        .collect();
    paths.sort_unstable();
    assert_eq!(
        paths,
        [
            "b",
            "b/c",
            "b/c/é.txt",
            "big.bin",
            "link",
            "main.py",
            "pipe"
        ]
    );
    let saved = post(&server, "/repls/shop/save", json!({})).await;
    let unsaved = json!([
        { "path": "link", "reason": "the link leads out of the workspace" },
        { "path": "pipe", "reason": "it is a pipe, a socket or a device" },
    ]);
    assert_eq!(
        saved,
        json!({ "written": 3, "removed": 0, "unsaved": unsaved })
    );
    client
        .done("files.delete", json!({ "path": "big.bin" }))
        .await;
    let saved = post(&server, "/repls/shop/save", json!({})).await;
    assert_eq!(
        (&saved["written"], &saved["removed"]),
        (&json!(0), &json!(1))
    );
    client
        .done(
            "files.write",
            json!({ "path": "last.txt", "text": "unsaved" }),
        )
        .await;
    stop(&server, "shop").await;
    let kept = |name: &str| std::fs::read_to_string(store(&server, "shop").join(name)).ok();
    assert_eq!(kept("b/c/é.txt").as_deref(), Some("eins\nmore\n"));
    assert_eq!(kept("last.txt").as_deref(), Some("unsaved"));
    assert_eq!(kept("main.py").as_deref(), Some(QUIET));
    assert!(kept("big.bin").is_none() && kept("link").is_none());
}

/// Types commands, and waits until they are done.
async fn does(client: &mut Client, commands: &str) {
    client.open("one").await;
    // What was shown before is shown again.
    let mark = client.last;
    let typed = format!("{commands}; echo do'ne'-{mark}\n");
    client.type_in("one", &typed).await;
    client.sees(&format!("done-{mark}")).await;
}

/// What was left out, by its path: why.
fn unsaved(answer: &Value) -> std::collections::BTreeMap<&str, &str> {
    let all = answer["unsaved"].as_array().into_iter().flatten();
    all.map(|one| {
        (
            one["path"].as_str().unwrap(),
            one["reason"].as_str().unwrap(),
        )
    })
    .collect()
}

#[tokio::test]
async fn what_is_legal_is_kept_over_a_stop_and_the_rest_is_named() {
    let server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    let made = "mkdir -p empty/deep bin; printf 'echo r''an\\n' > bin/run; chmod +x bin/run; \
                ln -s bin/run inside; ln -s /etc/passwd outside; head -c 73400320 /dev/zero > seventy; \
                truncate -s 200M large; mkfifo pipe";
    does(&mut client, made).await;
    // It may take longer than the server waits for an answer to its pings.
    let saved = tokio::select! {
        saved = post(&server, "/repls/shop/save", json!({})) => saved,
        () = client.listens() => unreachable!(),
    };
    let left = unsaved(&saved);
    assert_eq!(
        left.keys().collect::<Vec<_>>(),
        [&"large", &"outside", &"pipe"],
        "{saved}"
    );
    assert!(left["large"].contains("larger than"), "{saved}");
    let tree = client.ask("files.tree", json!({})).await;
    let entry = |path: &str| {
        let mut files = tree["files"].as_array().unwrap().iter();
        files.find(|entry| entry["path"] == path).unwrap().clone()
    };
    assert!(entry("outside")["unkept"].as_str().unwrap().contains("out"));
    assert!(entry("inside").get("unkept").is_none());
    assert_eq!(entry("bin/run")["executable"], true);
    let stopped = post(&server, "/stop", json!({ "replId": "shop" })).await;
    assert_eq!(stopped["success"], true);
    assert_eq!(unsaved(&stopped), left);
    start(&server, "shop").await;
    let mut client = Client::by_key(&server, "shop").await;
    client.open("one").await;
    let look = "./inside; readlink inside; test -d empty/deep && echo emp''ty; stat -c s''ize=%s seventy; \
                ls .gantry-workspace.json outside large; echo loo''ked\n";
    client.type_in("one", look).await;
    for shown in ["ran", "bin/run", "empty", "size=73400320", "looked"] {
        client.sees(shown).await;
    }
    // What is taken away stays away.
    does(
        &mut client,
        "rm inside seventy; rmdir empty/deep; chmod -x bin/run",
    )
    .await;
    stop(&server, "shop").await;
    start(&server, "shop").await;
    let mut client = Client::by_key(&server, "shop").await;
    let tree = client.ask("files.tree", json!({})).await;
    let paths: Vec<&str> = tree["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["path"].as_str().unwrap())
        .collect();
    let mut paths = paths;
    paths.sort_unstable();
    assert_eq!(paths, ["bin", "bin/run", "empty", "main.py"]);
    assert!(!tree.to_string().contains("executable"), "{tree}");
}

#[tokio::test]
async fn a_workspace_with_too_much_is_saved_without_it_and_stopped() {
    let server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    does(
        &mut client,
        "mkdir many; touch many/$(seq -s ' many/' 10050); mkdir -p $(printf 'd/%.0s' $(seq 80)); echo mine > own.txt",
    )
    .await;
    let saved = post(&server, "/repls/shop/save", json!({})).await;
    let left = saved["unsaved_more"].as_u64().unwrap_or(0) + unsaved(&saved).len() as u64;
    assert!(
        unsaved(&saved)["many"].contains("the rest of it"),
        "{saved}"
    );
    assert!((1..300).contains(&left), "{left}: {saved}");
    assert!(saved.to_string().contains("at most 10000 files"));
    let tree = client.ask("files.tree", json!({})).await;
    assert!(tree.to_string().contains("deeper than 64"));
    client
        .done("files.write", json!({ "path": "own.txt", "text": "later" }))
        .await;
    let stopped = tokio::select! {
        stopped = post(&server, "/stop", json!({ "replId": "shop" })) => stopped,
        () = client.listens() => unreachable!(),
    };
    assert_eq!(stopped["success"], true);
    assert!(stopped["unsaved"].is_array() && stopped.get("saveError").is_none());
    let kept = store(&server, "shop");
    assert_eq!(
        std::fs::read_to_string(kept.join("own.txt")).unwrap(),
        "later"
    );
    start(&server, "shop").await;
    let mut client = Client::by_key(&server, "shop").await;
    let read = client.ask("files.read", json!({ "path": "own.txt" })).await;
    assert_eq!(read["text"], "later");
}

#[tokio::test]
async fn a_file_becomes_a_folder_and_a_folder_a_file() {
    let server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    let kept = |name: &str| std::fs::read_to_string(store(&server, "shop").join(name)).ok();
    does(
        &mut client,
        "echo 1 > was-file; mkdir -p was/folder; echo 2 > was/folder/x",
    )
    .await;
    post(&server, "/repls/shop/save", json!({})).await;
    assert_eq!(kept("was/folder/x").as_deref(), Some("2\n"));
    let turn = "rm -r was-file was; mkdir -p was-file/deep; echo 3 > was-file/deep/y; echo 4 > was";
    does(&mut client, turn).await;
    let saved = post(&server, "/repls/shop/save", json!({})).await;
    assert!(saved.get("unsaved").is_none(), "{saved}");
    assert_eq!(kept("was-file/deep/y").as_deref(), Some("3\n"));
    assert_eq!(kept("was").as_deref(), Some("4\n"));
    // Nothing is left of folders that have no file any more.
    does(&mut client, "rm -r was-file").await;
    stop(&server, "shop").await;
    assert!(!store(&server, "shop").join("was-file").exists());
}

#[tokio::test]
async fn a_store_that_takes_nothing_keeps_no_workspace_running() {
    let server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    let edit = json!({ "path": "edited.txt", "text": "lost" });
    client.done("files.write", edit).await;
    let staged = store(&server, "shop").with_file_name(".shop.one");
    std::os::unix::fs::symlink("/nonexistent/file", staged).unwrap();
    let request = server.post("/repls/shop/save");
    let request = request.header("x-api-key", &server.admin);
    assert_eq!(request.send().await.unwrap().status(), 503);
    let stopped = post(&server, "/stop", json!({ "replId": "shop" })).await;
    assert_eq!(stopped["success"], true);
    assert_eq!(stopped["saveError"]["code"], "store_failed", "{stopped}");
    let request = server.get("/repls/shop").header("x-api-key", &server.admin);
    let told: Value = request.send().await.unwrap().json().await.unwrap();
    assert_eq!(told["state"], "stopped");
}

#[tokio::test]
async fn a_new_repl_begins_with_the_files_it_is_given_and_keeps_those_it_has() {
    let server = Server::start();
    let begin = |repl: &str, text: &str| json!({ "replId": repl, "userId": "ann", "language": "python", "files": { "main.py": text } });
    post(&server, "/start", begin("fresh", "print('new')")).await;
    let kept = || std::fs::read_to_string(store(&server, "fresh").join("main.py")).unwrap();
    assert_eq!(kept(), "print('new')");
    stop(&server, "fresh").await;
    post(&server, "/start", begin("fresh", "print('other')")).await;
    assert_eq!(kept(), "print('new')");
    // Not into another's, and nowhere outside.
    let (_, bob) = server.user("bob").await;
    let refused = async |body: Value| {
        let request = server.post("/start").header("x-api-key", &bob).json(&body);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.status(), 400, "{body}");
    };
    let mut theirs =
        json!({ "replId": "fresh", "language": "python", "files": { "theirs.py": "" } });
    refused(theirs.clone()).await;
    assert!(!store(&server, "fresh").join("theirs.py").exists());
    theirs["replId"] = "bobs".into();
    theirs["files"] = json!({ "../outside.py": "" });
    refused(theirs).await;
    assert!(!server.data.path().join("store/code/outside.py").exists());
}

#[tokio::test]
async fn no_edit_is_lost_over_many_stops() {
    let server = Server::start();
    opened(&server, "often", "print('Hello')").await;
    let rounds = if std::env::var_os("GANTRY_TEST_FULL").is_some() {
        100
    } else {
        10
    };
    for round in 0..rounds {
        let mut client = Client::by_key(&server, "often").await;
        let body = json!({ "path": format!("edits/{round}"), "text": round.to_string() });
        client.done("files.write", body).await;
        stop(&server, "often").await;
        start(&server, "often").await;
    }
    let mut client = Client::by_key(&server, "often").await;
    for round in 0..rounds {
        let read = client
            .ask("files.read", json!({ "path": format!("edits/{round}") }))
            .await;
        assert_eq!(read["text"], round.to_string(), "{read}");
    }
}

#[tokio::test]
async fn what_was_done_last_before_a_restart_of_the_server_stays_done() {
    let mut server = Server::start();
    opened(&server, "shop", QUIET).await;
    let mut client = Client::by_key(&server, "shop").await;
    let write = |name: &str| json!({ "path": name, "text": name });
    client.done("files.write", write("unwanted.txt")).await;
    post(&server, "/repls/shop/save", json!({})).await;
    let kept = |server: &Server, name: &str| store(server, "shop").join(name).exists();
    assert!(kept(&server, "unwanted.txt"));
    let unwanted = json!({ "path": "unwanted.txt" });
    client.done("files.delete", unwanted).await;
    client.done("files.write", write("last.txt")).await;
    drop(client);
    assert!(server.terminate().success());
    assert!(kept(&server, "last.txt") && !kept(&server, "unwanted.txt"));
    server.restart();
    start(&server, "shop").await;
    let mut client = Client::by_key(&server, "shop").await;
    let read = client
        .ask("files.read", json!({ "path": "last.txt" }))
        .await;
    assert_eq!(read["text"], "last.txt");
    client
        .refused("files.read", json!({ "path": "unwanted.txt" }))
        .await;
}

#[tokio::test]
async fn a_rollback_saves_what_was_edited_before_the_release_takes_over() {
    let server = Server::start();
    let mut socket = server.connect(&server.admin).await;
    let submission = json!({
        "user_id": "ann", "repl_id": "shop", "code": "print('released')", "database": false,
    });
    assert_eq!(
        socket.ask(submission.to_string()).await["status"],
        "deployed"
    );
    stop(&server, "shop").await;
    start(&server, "shop").await;
    let mut client = Client::by_key(&server, "shop").await;
    let edit = json!({ "path": "edited.txt", "text": "unsaved" });
    client.done("files.write", edit).await;
    let rolled_back = post(&server, "/repls/shop/rollback", json!({})).await;
    assert_eq!(rolled_back["release"], 1);
    let kept = std::fs::read_to_string(store(&server, "shop").join("edited.txt"));
    assert_eq!(kept.ok().as_deref(), Some("unsaved"));
}

#[tokio::test]
async fn a_program_is_stopped_edited_and_run_beside_its_terminals() {
    let server = Server::start();
    opened(
        &server,
        "shop",
        "print('one', flush=True)\nraise SystemExit(3)",
    )
    .await;
    let mut client = Client::by_key(&server, "shop").await;
    client.open("one").await;
    client.type_in("one", "echo he'llo'; sleep 1000 &\n").await;
    client.sees("hello").await;
    let asked = Instant::now();
    while client.ask("program.state", json!({})).await["exit_code"] != 3 {
        assert!(asked.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let serving = "import http.server\nprint('two', flush=True)\nhttp.server.test(port=3000)";
    client
        .done("files.write", json!({ "path": "main.py", "text": serving }))
        .await;
    client.done("program.run", json!({})).await;
    client
        .hears(|told| told["event"] == "output" && told["data"].to_string().contains("two"))
        .await;
    client.hears(|told| told["state"] == "serving").await;
    assert!(
        client
            .refused("program.run", json!({}))
            .await
            .contains("runs already")
    );
    client.done("program.restart", json!({})).await;
    client.hears(|told| told["state"] == "serving").await;
    client.done("program.stop", json!({})).await;
    client.hears(|told| told["state"] == "ended").await;
    // Who comes later is told what was printed.
    let mut late = Client::by_key(&server, "shop").await;
    let state = late.ask("program.state", json!({})).await;
    let output = state["output"].as_str().unwrap();
    assert!(output.starts_with("two\n"), "{state}");
    // Whatever the program did, the terminal and what runs in it are there.
    client.type_in("one", "jobs; echo still-the're'\n").await;
    client.sees("Running").await;
    client.sees("still-there").await;
}

#[tokio::test]
async fn a_flood_on_a_terminal_waits_for_who_looks_at_it() {
    let server = Server::start();
    opened(&server, "flood", QUIET).await;
    let mut client = Client::by_key(&server, "flood").await;
    client.open("one").await;
    let before = resident_kib(server.pid());
    client
        .type_in("one", "yes abcdefghijklmnopqrstuvwxyz\n")
        .await;
    // Nobody reads, for less than it takes to be let go.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 16 << 10, "the server grew by {grown} KiB");
    client.type_in("one", "\u{3}").await;
    client.type_in("one", "echo over-$((1+1))\n").await;
    client.sees("over-2").await;
    // Input for a program that reads nothing is bounded, too.
    client.type_in("one", "stty raw -echo; sleep 1000\n").await;
    let page = "x".repeat(512 << 10);
    for _ in 0..100 {
        client.type_in("one", &page).await;
    }
    client.hears(|told| told["event"] == "error").await;
    let grown = resident_kib(server.pid()).saturating_sub(before);
    assert!(grown < 32 << 10, "the server grew by {grown} KiB");
    // Nor does the wait for it keep a processor busy.
    let sandboxes = std::fs::read_dir(server.data.path().join("local/sandboxes")).unwrap();
    let own = sandboxes.map(|entry| entry.unwrap().path().join("process.json"));
    let own = own
        .filter_map(|path| std::fs::read(path).ok())
        .collect::<Vec<_>>();
    let agent: Value = serde_json::from_slice(&own[0]).unwrap();
    let stat = format!("/proc/{}/stat", agent["process"]["pid"]);
    let ticks = || {
        let stat = std::fs::read_to_string(&stat).unwrap();
        let fields = stat.rsplit(')').next().unwrap().split_whitespace();
        // utime and stime, in hundredths of a second.
        fields
            .skip(11)
            .take(2)
            .map(|text| text.parse::<u64>().unwrap())
            .sum::<u64>()
    };
    let before = ticks();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(ticks() - before < 60, "{} of 300", ticks() - before);
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}
