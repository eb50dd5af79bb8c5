//! One flipped bit, in any file of the data folder: the server starts, says which file it is, and has the rest.

use std::path::Path;

use super::*;

/// Flips, each followed by a start, which takes a second; a nightly run has more.
const FLIPS: u64 = 10;
const FLIPS_IN_FULL: u64 = 200;

/// The smallest journal there can be: its files have a MiB, so that some are full.
const JOURNAL: (&str, &str) = ("GANTRY_JOURNAL_BYTES", "16777216");

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// Every file of a data folder and what is in it, but for what is made anew at each start: what is left of sandboxes,
/// and the server's own log.
fn snapshot(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![data.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let kind = entry.file_type().unwrap();
            let inside = path.strip_prefix(data).unwrap();
            if ["local/sandboxes", "local/trial", "log"]
                .map(Path::new)
                .contains(&inside)
            {
                continue;
            }
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_file() {
                found.insert(path.clone(), std::fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Makes the files what they were.
fn restore(data: &Path, files: &BTreeMap<PathBuf, Vec<u8>>) {
    for path in snapshot(data)
        .keys()
        .filter(|path| !files.contains_key(*path))
    {
        std::fs::remove_file(path).unwrap();
    }
    for (path, bytes) in files {
        if std::fs::read(path).ok().as_ref() != Some(bytes) {
            std::fs::write(path, bytes).unwrap();
        }
    }
}

/// A server that had releases, a module, submissions that ended and one that did not; it is killed. With the ids of
/// those that ended, and of the other.
async fn lived() -> (Server, Vec<String>, String) {
    let server = Server::start_as(0, &[JOURNAL]);
    let way = Way::to(&server);
    let mut ended = Vec::new();
    let serves = "import http.server, os, sys\nif 'PORT' not in os.environ: sys.exit()\nhttp.server.HTTPServer(('127.0.0.1', 3000), \
        http.server.SimpleHTTPRequestHandler).serve_forever()\n";
    for repl in ["shop", "blog"] {
        let message = json!({
            "user_id": "ann", "repl_id": repl, "code": serves, "database": false,
        });
        let mut told = Told::new(message);
        told.follow(&way).await;
        let reply = told.reply.take().unwrap();
        assert_eq!(reply["status"], "deployed", "{reply}");
        ended.push(told.id);
    }
    for _ in 0..3 {
        // Two of them fill a file of the journal.
        let code = "for i in range(600): print(str(i) * 300)";
        let mut told = Told::new(json!({ "user_id": "ann", "code": code, "deploy": false }));
        told.follow(&way).await;
        assert_eq!(told.reply.as_ref().unwrap()["status"], "tests_passed");
        ended.push(told.id);
    }
    let told = Told::new(json!({
        "user_id": "ann", "code": "import time; print('up', flush=True); time.sleep(600)",
        "deploy": false, "stream": true, "limits": { "wall_ms": 60_000 },
    }));
    let mut socket = way.connect().await;
    socket
        .send(Message::text(told.message.to_string()))
        .await
        .unwrap();
    loop {
        let next = frame(&mut socket).await.unwrap();
        assert!(next.get("status").is_none(), "{next}");
        if next["stream"] == "stdout" {
            break;
        }
    }
    (server, ended, told.id)
}

async fn details(server: &Server) -> Vec<String> {
    let asked = server.get("/readyz").send().await.unwrap();
    assert_eq!(asked.status(), 200);
    let told: Value = asked.json().await.unwrap();
    let details = told["details"].as_array().cloned().unwrap_or_default();
    details
        .iter()
        .map(|one| one.as_str().unwrap().to_owned())
        .collect()
}

/// What is asked of a server: by a name, the status and the answer.
async fn answers(
    server: &Server,
    ended: &[String],
    unfinished: &str,
) -> BTreeMap<String, (u16, Value)> {
    let mut found = BTreeMap::new();
    let submissions = ended.iter().map(|id| format!("/submissions/{id}"));
    let others = ["/repls/shop/releases", "/repls/blog/releases", "/modules"];
    for path in submissions.chain(others.map(str::to_owned)) {
        let asked = server.get(&path).header("x-api-key", &server.admin);
        let answer = asked.send().await.unwrap();
        let status = answer.status().as_u16();
        // An answer that comes in pieces ends early where a record cannot be read.
        let answer = answer.json().await;
        let answer = answer.unwrap_or_else(|error| json!(error.to_string()));
        found.insert(path, (status, answer));
    }
    let path = format!("/submissions/{unfinished}");
    let asked = server.get(&path).header("x-api-key", &server.admin);
    let status = asked.send().await.unwrap().status().as_u16();
    found.insert(path, (status, Value::Null));
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_in_any_file_of_the_data_folder_is_named_and_costs_that_file() {
    let (mut server, ended, unfinished) = lived().await;
    server.kill();
    let data = server.data.path().to_owned();
    let module = json!({
        "user_id": "ann", "module": "numpy", "packages": ["numpy==2.0.0"], "replicas": 1,
        "since": "2026-01-01T00:00:00Z", "stopped": true,
    });
    let records = data.join("local/modules/records");
    std::fs::create_dir_all(&records).unwrap();
    let module = gantry::kept::seal(&module).unwrap();
    std::fs::write(records.join("ann.numpy.json"), module).unwrap();
    let files = snapshot(&data);
    server = restart(server).await;
    let expected = answers(&server, &ended, &unfinished).await;
    assert!(
        details(&server).await.is_empty(),
        "{:?}",
        details(&server).await
    );
    for (path, (status, answer)) in &expected {
        assert_eq!(*status, 200, "{path}: {answer}");
    }
    // Users' own bytes have no checksum, the index of the search is made of the journal, what stands beside a
    // database is SQLite's, the lock has nothing in it, and a store of keys that cannot be read stops the start:
    // see the tests of keys.
    let own = [
        "store/",
        "local/databases/",
        "search.sqlite",
        "keys.",
        "journal/lock",
        "journal/ended.sqlite-",
    ];
    let flipped: Vec<&PathBuf> = files
        .iter()
        .filter(|(path, bytes)| {
            let inside = path.strip_prefix(&data).unwrap().to_str().unwrap();
            !bytes.is_empty() && !own.iter().any(|own| inside.starts_with(own))
        })
        .map(|(path, _)| path)
        .collect();
    for name in [
        "shop.json",
        "ann.numpy.json",
        "identity",
        "segments",
        "ended.sqlite",
        ".index",
    ] {
        let there = flipped
            .iter()
            .any(|path| path.to_str().unwrap().ends_with(name));
        assert!(there, "{name} is not in {flipped:?}");
    }
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let flips = if full { FLIPS_IN_FULL } else { FLIPS };
    let mut numbers = Numbers(5);
    let (mut named, mut silent) = (0, Vec::new());
    for number in 0..flips {
        server.kill();
        restore(&data, &files);
        let path = flipped[number as usize % flipped.len()];
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let mut bytes = files[path].clone();
        let at = numbers.next(bytes.len() as u64) as usize;
        bytes[at] ^= 1 << numbers.next(8);
        std::fs::write(path, bytes).unwrap();
        let place = format!("{} at {at}", path.display());
        println!("{place}");
        server = restart(server).await;
        let told = details(&server).await;
        let found = answers(&server, &ended, &unfinished).await;
        let lost: Vec<_> = expected
            .iter()
            .filter(|(path, answer)| found[*path] != **answer)
            .collect();
        let is_named = told.iter().any(|one| one.contains(&name));
        named += u64::from(is_named);
        if !is_named {
            silent.push(place.clone());
        }
        // What is in the last file of the journal, behind its last mark, looks like what a crash cut off.
        let may_be_torn = name.ends_with(".journal");
        assert!(
            is_named || lost.is_empty() || may_be_torn,
            "{place}: {told:?} {lost:?}"
        );
        // These are read whole at each start.
        let read_whole = name.ends_with(".json") || ["identity", "segments"].contains(&&*name);
        assert!(is_named || !read_whole, "{place}: {told:?}");
        assert!(lost.len() <= 1, "{place}: {lost:?}");
        for (path, _) in lost {
            let repl = name.trim_end_matches(".json");
            let own = path.contains(repl) || name.starts_with("ann.numpy") && path == "/modules";
            assert!(own || may_be_torn, "{place}: {path}");
            if path.starts_with("/repls/") {
                let (status, problem) = &found[path];
                let code = (*status, problem["code"].as_str());
                assert_eq!(code, (503, Some("repl_record_unreadable")), "{problem}");
                // Nobody else gets its name meanwhile.
                let mut told = Told::new(json!({
                    "user_id": "eve", "repl_id": repl, "code": "print(1)",
                }));
                told.follow(&Way::to(&server)).await;
                let reply = told.reply.unwrap();
                assert_ne!(reply["status"], "deployed", "{reply}");
            }
        }
    }
    println!("{flips} flips, {named} named, without a word: {silent:?}");
    assert!(named > 0, "{silent:?}");
}

#[test]
fn a_damaged_store_of_keys_stops_a_start_and_is_named() {
    let mut server = Server::start();
    server.kill();
    let path = server.data.path().join("keys.json");
    let mut text = std::fs::read(&path).unwrap();
    let at = text.windows(6).position(|six| six == b"sha256").unwrap() + 12;
    text[at] ^= 1;
    std::fs::write(&path, text).unwrap();
    let made = server.key_command(&["list"]);
    let said = String::from_utf8_lossy(&made.stderr).into_owned();
    assert!(
        !made.status.success() && said.contains("keys.json"),
        "{said}"
    );
}
