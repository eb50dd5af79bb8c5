//! `gantry-runner fetch`: what an init container copies, and what it refuses to.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "storage/put.rs"]
mod put;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use gantry::model::{RelativePath, ReplId, SubmissionId};
use gantry::storage::{CodeStore, S3Config, S3Store, release_prefix};
use put::put;

const VARIABLES: [&str; 6] = [
    "S3_BUCKET",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
];

/// `gantry-runner fetch FOLDER` with these variables and no others.
fn fetch(folder: &Path, variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gantry-runner"))
        .arg("fetch")
        .arg(folder)
        .env_clear()
        .envs(variables.iter().copied())
        .output()
        .unwrap()
}

/// The same from the store that the environment names.
fn fetch_from_store(folder: &Path, prefix: &str) -> Output {
    let mut variables = vec![("S3_PREFIX".to_owned(), prefix.to_owned())];
    for name in VARIABLES {
        if let Ok(value) = std::env::var(name) {
            variables.push((name.to_owned(), value));
        }
    }
    let variables: Vec<(&str, &str)> = variables
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    fetch(folder, &variables)
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
        let output = fetch_from_store(folder.path(), &prefix);
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
        let output = fetch_from_store(folder.path(), &prefix);
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
        let output = fetch_from_store(folder.path(), &prefix);
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
    let output = fetch_from_store(folder.path(), &prefix);
    assert_eq!(output.status.code(), Some(4), "{}", said(&output));
    assert!(
        said(&output).contains("not what was tested"),
        "{}",
        said(&output)
    );
}

#[test]
fn a_target_that_cannot_be_written_to_has_a_code_of_its_own() {
    let variables = [
        ("S3_BUCKET", "b"),
        ("S3_PREFIX", "code/r/"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
    ];
    let output = fetch(Path::new("/nowhere/at/all"), &variables);
    assert_eq!(output.status.code(), Some(6), "{}", said(&output));
    assert!(
        said(&output).contains("/nowhere/at/all"),
        "{}",
        said(&output)
    );
}

#[test]
fn what_is_not_configured_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&[(&str, &str)], &str); 3] = [
        (&[], "S3_BUCKET"),
        (
            &[
                ("S3_BUCKET", "b"),
                ("AWS_ACCESS_KEY_ID", "k"),
                ("AWS_SECRET_ACCESS_KEY", "s"),
            ],
            "S3_PREFIX",
        ),
        (
            &[("S3_BUCKET", "b"), ("S3_PREFIX", "code/r/")],
            "AWS_ACCESS_KEY_ID",
        ),
    ];
    for (variables, expected) in cases {
        let output = fetch(folder.path(), variables);
        assert_eq!(output.status.code(), Some(2), "{}", said(&output));
        assert!(said(&output).contains(expected), "{}", said(&output));
    }
}

#[test]
fn a_store_that_is_away_is_given_up_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let folder = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let output = fetch(folder.path(), &variables_for(&endpoint));
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert!(said(&output).contains(&endpoint), "{}", said(&output));
    println!("{} after {:?}", said(&output), started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(50));
}

fn variables_for(endpoint: &str) -> [(&str, &str); 5] {
    [
        ("S3_BUCKET", "b"),
        ("S3_PREFIX", "code/r/"),
        ("AWS_ACCESS_KEY_ID", "k"),
        ("AWS_SECRET_ACCESS_KEY", "s"),
        ("AWS_ENDPOINT_URL", endpoint),
    ]
}

/// A server that answers as a bucket with these keys would, whatever is in them: a real one keeps
/// such keys out itself.
fn bucket(keys: Vec<String>, bytes_each: u64) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let keys = keys.clone();
            std::thread::spawn(move || answer(stream, &keys, bytes_each));
        }
    });
    endpoint
}

fn answer(mut stream: std::net::TcpStream, keys: &[String], bytes_each: u64) {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let target = head.split(' ').nth(1).unwrap_or_default().to_owned();
    let body = if target.contains("list-type=2") {
        let objects: String = keys
            .iter()
            .map(|key| format!("<Contents><Key>{key}</Key><Size>{bytes_each}</Size></Contents>"))
            .collect();
        let text = format!(
            "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{objects}</ListBucketResult>"
        );
        text.into_bytes()
    } else {
        vec![b'x'; usize::try_from(bytes_each).unwrap()]
    };
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let _ = stream.write_all(&body);
}

#[test]
fn nothing_in_the_bucket_leads_out_of_the_folder() {
    let outside = tempfile::tempdir().unwrap();
    let folder = outside.path().join("target");
    std::fs::create_dir(&folder).unwrap();
    // The control: a plain path is copied.
    let endpoint = bucket(
        vec!["code/r/a/plain.txt".to_owned(), "code/r/a/".to_owned()],
        3,
    );
    let output = fetch(&folder, &variables_for(&endpoint));
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
        let endpoint = bucket(vec![format!("code/r/{bad}")], 3);
        let output = fetch(&folder, &variables_for(&endpoint));
        let code = output.status.code();
        // A key that is the prefix itself is a folder's mark, and then nothing is there.
        let expected = if bad.is_empty() { 4 } else { 5 };
        assert_eq!(code, Some(expected), "{bad:?}: {}", said(&output));
    }
    let left: Vec<_> = std::fs::read_dir(outside.path())
        .unwrap()
        .flatten()
        .collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn too_many_files_and_too_many_bytes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let many = (0..10_001).map(|n| format!("code/r/{n}")).collect();
    let output = fetch(folder.path(), &variables_for(&bucket(many, 0)));
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("10000"), "{}", said(&output));
    let large = (0..5).map(|n| format!("code/r/{n}")).collect();
    let output = fetch(folder.path(), &variables_for(&bucket(large, 64 << 20)));
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(said(&output).contains("bytes"), "{}", said(&output));
}
