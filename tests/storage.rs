//! The code stores, held to the contract of every code store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "storage/put.rs"]
mod put;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use gantry::model::{ReplId, SubmissionId};
use gantry::storage::conformance::{Found, Look, all};
use gantry::storage::{
    CodeStore, DirectoryStore, Manifest, S3Config, S3Store, hexadecimal, release_prefix,
};
use put::{client, put};
use sha2::{Digest, Sha256};

/// A name of this test's own in a store that others may use too.
fn repl() -> ReplId {
    let id = SubmissionId::new().to_string();
    format!("t-{}", &id[..36]).parse().unwrap()
}

struct Folder(PathBuf, DirectoryStore);

fn collect(top: &Path) -> Found {
    let mut found = Found::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
                found.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    found
}

#[async_trait]
impl Look for Folder {
    async fn release(&self, repl: &ReplId, submission: SubmissionId) -> anyhow::Result<Found> {
        Ok(collect(&self.1.release(repl, submission)))
    }

    async fn current(&self, repl: &ReplId) -> anyhow::Result<Found> {
        Ok(collect(&self.0.join("code").join(repl.as_str())))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_release_leaves_no_files_and_the_others_theirs() {
    let data = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(data.path().to_owned()).unwrap();
    let look = Folder(data.path().to_owned(), store.clone());
    let (repl, old, new) = (repl(), SubmissionId::new(), SubmissionId::new());
    let files = [("a/b.py".to_owned().try_into().unwrap(), "text".to_owned())];
    for submission in [old, new] {
        let files = files.clone().into();
        store.publish(&repl, submission, &files).await.unwrap();
    }
    for _ in 0..2 {
        store.forget(&repl, old).await.unwrap();
    }
    assert!(!store.release(&repl, old).exists());
    assert_eq!(look.release(&repl, new).await.unwrap().len(), 1);
    assert_eq!(look.current(&repl).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_directory_store_keeps_the_contract() {
    let data = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(data.path().to_owned()).unwrap();
    let look = Folder(data.path().to_owned(), store.clone());
    let repl = repl();
    all(Arc::new(store), &look, &repl).await.unwrap();
    let left = std::fs::read_dir(data.path().join("code")).unwrap().count();
    assert_eq!(left, 1, "staged folders were left behind");
}

struct Bucket(S3Store);

impl Bucket {
    async fn below(&self, prefix: &str) -> anyhow::Result<Found> {
        let mut found = Found::new();
        let config = S3Config::from_variables(|name| std::env::var(name).ok())?;
        let config = config.expect("S3_BUCKET names the bucket to test with");
        for object in self.0.list(prefix, 1_000).await? {
            let request = client(&config).get_object().bucket(&config.bucket);
            let body = request
                .key(&object.key)
                .send()
                .await?
                .body
                .collect()
                .await?;
            let text = String::from_utf8(body.to_vec())?;
            assert_eq!(object.bytes, text.len() as u64);
            found.insert(object.key[prefix.len()..].to_owned(), text);
        }
        Ok(found)
    }
}

#[async_trait]
impl Look for Bucket {
    async fn release(&self, repl: &ReplId, submission: SubmissionId) -> anyhow::Result<Found> {
        let prefix = release_prefix(repl, submission);
        let found = self.below(&prefix).await?;
        let manifest = self.0.manifest(&prefix).await?.unwrap();
        assert!(manifest.files.keys().eq(found.keys()), "{manifest:?}");
        for (path, file) in &manifest.files {
            let digest = hexadecimal(&Sha256::digest(found[path].as_bytes()));
            assert_eq!(file.sha256, digest, "{path}");
        }
        Ok(found)
    }

    async fn current(&self, repl: &ReplId) -> anyhow::Result<Found> {
        self.below(&format!("code/{repl}/")).await
    }
}

fn s3() -> S3Config {
    S3Config::from_variables(|name| std::env::var(name).ok())
        .unwrap()
        .expect("S3_BUCKET names the bucket to test with")
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn the_s3_store_keeps_the_contract() {
    let store = S3Store::open(s3());
    store.check().await.unwrap();
    let look = Bucket(S3Store::open(s3()));
    all(Arc::new(store), &look, &repl()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn a_release_without_its_manifest_is_made_whole_by_the_next_publisher() {
    let (config, repl, id) = (s3(), repl(), SubmissionId::new());
    let prefix = release_prefix(&repl, id);
    // What a publisher that was killed half-way leaves: files, one of them not of this release.
    put(&config, &format!("{prefix}main.py"), "half a fi").await;
    put(&config, &format!("{prefix}stray.txt"), "stray").await;
    let store = S3Store::open(config.clone());
    assert_eq!(store.manifest(&prefix).await.unwrap(), None);
    let path = "main.py".to_owned().try_into().unwrap();
    let files = [(path, "whole".to_owned())].into();
    store.publish(&repl, id, &files).await.unwrap();
    let found = Bucket(S3Store::open(config)).release(&repl, id).await;
    let whole = Found::from([("main.py".to_owned(), "whole".to_owned())]);
    assert_eq!(found.unwrap(), whole);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs an S3 server"]
async fn what_is_wrong_with_the_store_is_named() {
    let mut config = s3();
    config.bucket = "gantry-no-such-bucket".to_owned();
    let problem = S3Store::open(config.clone()).check().await.unwrap_err();
    assert!(
        problem.message.contains("gantry-no-such-bucket"),
        "{problem:?}"
    );
    let files = [("main.py".to_owned().try_into().unwrap(), String::new())].into();
    let store = S3Store::open(config);
    let problem = store.publish(&repl(), SubmissionId::new(), &files).await;
    let problem = problem.unwrap_err();
    assert!(problem.cause.contains("NoSuchBucket"), "{problem:?}");
    assert!(problem.remediation.contains("S3_BUCKET"), "{problem:?}");
    let mut config = s3();
    config.secret_access_key = "not-the-secret".to_owned().into();
    let store = S3Store::open(config);
    let problem = store.publish(&repl(), SubmissionId::new(), &files).await;
    let problem = problem.unwrap_err();
    assert!(
        problem.remediation.contains("AWS_SECRET_ACCESS_KEY"),
        "{problem:?}"
    );
    assert!(!format!("{problem:?} {store:?}").contains("not-the-secret"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_told_in_time() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let variables = |name: &str| match name {
        "S3_BUCKET" => Some("b".to_owned()),
        "AWS_ENDPOINT_URL" => Some(endpoint.clone()),
        "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" => Some("k".to_owned()),
        _ => None,
    };
    let config = S3Config::from_variables(variables).unwrap().unwrap();
    let started = Instant::now();
    let problem = S3Store::open(config).check().await.unwrap_err();
    println!("{problem:?} after {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(35));
    assert!(problem.message.contains(&endpoint), "{problem:?}");
    assert!(problem.cause.contains("refused"), "{problem:?}");
}

#[test]
fn a_bucket_without_a_key_is_refused_by_name() {
    let variables = |name: &str| (name == "S3_BUCKET").then(|| "b".to_owned());
    let problem = S3Config::from_variables(variables).unwrap_err();
    assert!(problem.cause.contains("AWS_ACCESS_KEY_ID"), "{problem:?}");
    assert!(S3Config::from_variables(|_| None).unwrap().is_none());
}

#[test]
fn the_manifest_stands_beside_the_release() {
    let id = SubmissionId::new();
    let prefix = release_prefix(&"r".parse().unwrap(), id);
    let key = Manifest::key(&prefix);
    assert_eq!(key, format!("releases/r/{id}.manifest.json"));
    assert!(!key.starts_with(&prefix));
}
