//! `gantry-runner fetch`: what an init container copies, and what it refuses to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "storage/put.rs"]
mod put;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use gantry::model::{Problem, RelativePath, ReplId, SubmissionId};
use gantry::storage::{
    CodeStore, FETCH_GREETING, FETCH_TAKEN, GrantedFile, INCOMPLETE, Offer, S3Config, S3Store,
    release_prefix,
};
use put::put;

/// A port that nobody uses now.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// `gantry-runner fetch FOLDER PORT` without any variable.
fn start(folder: &Path, port: u16) -> Child {
    Command::new(env!("CARGO_BIN_EXE_gantry-runner"))
        .arg("fetch")
        .arg(folder)
        .arg(port.to_string())
        .env_clear()
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// A connection to it, greeted.
fn connect(port: u16) -> TcpStream {
    let began = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(("127.0.0.1", port)) {
            Ok(stream) => break stream,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut greeting = [0; FETCH_GREETING.len()];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, FETCH_GREETING.as_bytes());
    stream
}

/// What `fetch` makes of this line of the server's.
fn fetch_line(folder: &Path, line: &str) -> Output {
    let port = free_port();
    let child = start(folder, port);
    let mut stream = connect(port);
    stream.write_all(line.as_bytes()).unwrap();
    let mut taken = [0; FETCH_TAKEN.len()];
    stream.read_exact(&mut taken).unwrap();
    assert_eq!(taken, FETCH_TAKEN.as_bytes());
    child.wait_with_output().unwrap()
}

fn fetch(folder: &Path, offer: &Offer) -> Output {
    fetch_line(
        folder,
        &format!("{}\n", serde_json::to_string(offer).unwrap()),
    )
}

/// The same from the store that the environment names, as the server offers it.
async fn fetch_from_store(folder: &Path, prefix: &str) -> Output {
    let offer = store().grant(prefix).await.unwrap_or_else(Offer::Refused);
    fetch(folder, &offer)
}

/// Files with these paths at these URLs.
fn offer(files: &[(&str, &str)]) -> Offer {
    let file = |(path, url): &(&str, &str)| GrantedFile {
        path: (*path).to_owned(),
        url: (*url).to_owned(),
        expected: None,
    };
    Offer::Files {
        place: "s3://b/code/r/".to_owned(),
        files: files.iter().map(file).collect(),
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn config() -> S3Config {
    let config = S3Config::from_variables(|name| std::env::var(name).ok()).unwrap();
    config.expect("S3_BUCKET names the bucket to test with")
}

fn store() -> S3Store {
    S3Store::open(config())
}

fn names() -> (ReplId, SubmissionId) {
    let id = SubmissionId::new();
    (format!("f-{id}").parse().unwrap(), id)
}

fn files(entries: &[(&str, &str)]) -> BTreeMap<RelativePath, String> {
    let entry = |(path, text): &(&str, &str)| {
        let path = RelativePath::try_from((*path).to_owned()).unwrap();
        (path, (*text).to_owned())
    };
    entries.iter().map(entry).collect()
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn a_release_and_current_code_are_copied_whole() {
    let ((repl, id), store) = (names(), store());
    let release = [
        ("main.py", "print('ü')\n"),
        ("a b/ü+%20.txt", ""),
        ("d/e/f", "x"),
    ];
    store.publish(&repl, id, &files(&release)).await.unwrap();
    for prefix in [release_prefix(&repl, id), format!("code/{repl}")] {
        let folder = tempfile::tempdir().unwrap();
        // What a first try left, and what it must not go through.
        std::fs::write(folder.path().join("main.py"), "half").unwrap();
        let outside = tempfile::tempdir().unwrap();
        let kept = outside.path().join("f");
        std::fs::write(&kept, "kept").unwrap();
        std::fs::create_dir_all(folder.path().join("d/e")).unwrap();
        std::os::unix::fs::symlink(&kept, folder.path().join("d/e/f")).unwrap();
        let output = fetch_from_store(folder.path(), &prefix).await;
        assert!(output.status.success(), "{}", said(&output));
        for (path, text) in release {
            let read = std::fs::read_to_string(folder.path().join(path)).unwrap();
            assert_eq!(read, text, "{path}");
        }
        assert_eq!(std::fs::read_to_string(&kept).unwrap(), "kept");
        assert!(said(&output).contains("3 files"), "{}", said(&output));
        // A folder that is a link is not gone through.
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.path().join("d")).unwrap();
        let output = fetch_from_store(folder.path(), &prefix).await;
        assert_eq!(output.status.code(), Some(6), "{}", said(&output));
        assert!(!outside.path().join("e").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn what_is_not_whole_is_not_copied() {
    let ((repl, id), store) = (names(), store());
    let folder = tempfile::tempdir().unwrap();
    for prefix in [release_prefix(&repl, id), format!("code/{repl}/")] {
        let output = fetch_from_store(folder.path(), &prefix).await;
        assert_eq!(output.status.code(), Some(4), "{}", said(&output));
        assert!(
            said(&output).contains("Submit the code again"),
            "{}",
            said(&output)
        );
    }
    store
        .publish(&repl, id, &files(&[("main.py", "tested")]))
        .await
        .unwrap();
    // Somebody changes a file of the release in the bucket.
    let prefix = release_prefix(&repl, id);
    put(&config(), &format!("{prefix}main.py"), "changed").await;
    let output = fetch_from_store(folder.path(), &prefix).await;
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    assert!(
        said(&output).contains("not what was tested"),
        "{}",
        said(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn a_url_reads_its_file_and_nothing_else() {
    let ((repl, id), store, http) = (names(), store(), reqwest::Client::new());
    let code = files(&[("main.py", "mine"), ("other.py", "others")]);
    store.publish(&repl, id, &code).await.unwrap();
    let Offer::Files { files, .. } = store.grant(&release_prefix(&repl, id)).await.unwrap() else {
        panic!("no files are offered");
    };
    let url = &files.iter().find(|f| f.path == "main.py").unwrap().url;
    let read = http.get(url).send().await.unwrap();
    assert_eq!(read.text().await.unwrap(), "mine");
    for (method, other) in [
        (reqwest::Method::GET, url.replace("main.py?", "other.py?")),
        (
            reqwest::Method::GET,
            url.replace("/main.py?", ".manifest.json?"),
        ),
        (
            reqwest::Method::GET,
            url.replace("X-Amz-Expires=300", "X-Amz-Expires=3000"),
        ),
        (reqwest::Method::PUT, url.clone()),
        (reqwest::Method::DELETE, url.clone()),
    ] {
        let answer = http.request(method.clone(), &other).send().await.unwrap();
        assert_eq!(answer.status(), 403, "{method} {other}");
    }
    assert!(url.contains("X-Amz-Expires=300"), "{url}");
    let control = http.get(url).send().await.unwrap();
    assert_eq!(control.text().await.unwrap(), "mine");
}

#[test]
fn a_target_that_cannot_be_written_to_has_a_code_of_its_own() {
    let output = start(Path::new("/nowhere/at/all"), free_port());
    let output = output.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    assert!(
        said(&output).contains("/nowhere/at/all"),
        "{}",
        said(&output)
    );
}

#[test]
fn a_port_that_is_taken_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let output = start(folder.path(), port).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert!(
        said(&output).contains(&port.to_string()),
        "{}",
        said(&output)
    );
}

#[test]
fn a_list_that_breaks_off_or_makes_no_sense_is_waited_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let port = free_port();
    let child = start(folder.path(), port);
    drop(connect(port));
    connect(port).write_all(b"{\"files\": {\"place\"").unwrap();
    connect(port).write_all(b"null\n").unwrap();
    let mut stream = connect(port);
    let good = serde_json::to_string(&offer(&[])).unwrap();
    stream.write_all(format!("{good}\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("0 files"), "{}", said(&output));
}

#[test]
fn why_there_are_no_files_is_passed_on() {
    let folder = tempfile::tempdir().unwrap();
    for (code, exit) in [(INCOMPLETE, 4), ("store_too_many", 5), ("store_failed", 3)] {
        let problem = Problem::new(
            code,
            "No files",
            "the bucket at s3.example is away",
            "Wait.",
        );
        let output = fetch(folder.path(), &Offer::Refused(problem));
        assert_eq!(output.status.code(), Some(exit), "{}", said(&output));
        assert!(said(&output).contains("s3.example"), "{}", said(&output));
    }
}

#[test]
fn a_store_that_is_away_is_given_up_in_time_and_no_url_is_told() {
    let url = format!("http://127.0.0.1:{}/f?X-Amz-Signature=secret", free_port());
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = fetch(folder.path(), &offer(&[("main.py", &url)]));
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains("main.py"), "{}", said(&output));
    assert!(!said(&output).contains("secret"), "{}", said(&output));
    assert!(started.elapsed() < Duration::from_secs(50));
}

/// A server that gives every object this many bytes.
fn bucket(bytes_each: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}/f", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream, bytes_each));
        }
    });
    endpoint
}

fn answer(mut stream: TcpStream, bytes_each: u64) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let body = vec![b'x'; usize::try_from(bytes_each).unwrap()];
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body);
}

#[test]
fn nothing_in_the_list_leads_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("target");
    std::fs::create_dir(&folder).unwrap();
    let url = bucket(3);
    // The control: a plain path is copied.
    let output = fetch(&folder, &offer(&[("a/plain.txt", &url)]));
    assert!(output.status.success(), "{}", said(&output));
    assert_eq!(
        std::fs::read_to_string(folder.join("a/plain.txt")).unwrap(),
        "xxx"
    );
    for bad in [
        "../out",
        "a/../../out",
        "/out",
        "a//b",
        "./a",
        "a/.",
        "..",
        "a\\b",
        "",
    ] {
        let output = fetch(&folder, &offer(&[(bad, &url)]));
        assert_eq!(output.status.code(), Some(5), "{bad:?}: {}", said(&output));
    }
    let left: Vec<_> = std::fs::read_dir(outside.path())
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn too_many_bytes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let url = bucket(64 << 20);
    let large: Vec<String> = (0..5).map(|n| n.to_string()).collect();
    let large: Vec<(&str, &str)> = large.iter().map(|n| (n.as_str(), url.as_str())).collect();
    let output = fetch(folder.path(), &offer(&large));
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("bytes"), "{}", said(&output));
}
