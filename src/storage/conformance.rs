//! The suite that holds every code store to the contract on [`CodeStore`]. A store's test calls
//! [`all`] with a way to look into it.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, ensure};
use async_trait::async_trait;

use super::{CodeStore, FILE_REFUSED};
use crate::model::{BUILD_ARCHIVE, RelativePath, ReplId, SubmissionId};

/// Paths and texts, as they were found.
pub type Found = BTreeMap<String, String>;

/// A look into the store, past the trait.
#[async_trait]
pub trait Look: Send + Sync {
    /// The files of a release.
    async fn release(&self, repl: &ReplId, submission: SubmissionId) -> anyhow::Result<Found>;

    /// The current files of a repl.
    async fn current(&self, repl: &ReplId) -> anyhow::Result<Found>;
}

/// Every promise, one after the other. `repl` is a name that nobody else uses meanwhile.
pub async fn all(store: Arc<dyn CodeStore>, look: &dyn Look, repl: &ReplId) -> anyhow::Result<()> {
    what_is_published_is_there_to_the_byte(&*store, look, repl)
        .await
        .context("promise broken: what is published is there, to the byte")?;
    what_was_built_is_the_releases_alone(&*store, look, repl)
        .await
        .context("promise broken: what was built is in the release, and no current file")?;
    a_release_is_immutable(&*store, look, repl)
        .await
        .context("promise broken: a release is immutable")?;
    current_code_is_the_last_published(&*store, look, repl)
        .await
        .context("promise broken: current code is what was published last, and nothing else")?;
    the_same_at_the_same_time_is_once(store, look, repl)
        .await
        .context("promise broken: publishing the same twice at once is publishing it once")
}

fn files(entries: &[(&str, &str)]) -> anyhow::Result<BTreeMap<RelativePath, String>> {
    let entry = |(path, text): &(&str, &str)| {
        let path = RelativePath::try_from((*path).to_owned()).map_err(anyhow::Error::msg)?;
        Ok((path, (*text).to_owned()))
    };
    entries.iter().map(entry).collect()
}

fn found(entries: &[(&str, &str)]) -> Found {
    let entry = |(path, text): &(&str, &str)| ((*path).to_owned(), (*text).to_owned());
    entries.iter().map(entry).collect()
}

/// Names and texts that are easily spoilt on the way.
const AWKWARD: &[(&str, &str)] = &[
    ("main.py", "print('Grüße, \u{1f600}')\r\n\0"),
    ("a folder/with + and %2F & ü?.txt", "x"),
    ("deep/er/and/deeper/file", "no newline"),
    ("empty", ""),
];

async fn what_is_published_is_there_to_the_byte(
    store: &dyn CodeStore,
    look: &dyn Look,
    repl: &ReplId,
) -> anyhow::Result<()> {
    let id = SubmissionId::new();
    store.publish(repl, id, &files(AWKWARD)?).await?;
    let release = look.release(repl, id).await?;
    ensure!(release == found(AWKWARD), "the release is {release:?}");
    let current = look.current(repl).await?;
    ensure!(current == found(AWKWARD), "current is {current:?}");
    Ok(())
}

async fn what_was_built_is_the_releases_alone(
    store: &dyn CodeStore,
    look: &dyn Look,
    repl: &ReplId,
) -> anyhow::Result<()> {
    let id = SubmissionId::new();
    let sent = [("main.c", "int main;")];
    for archive in ["first", "again"] {
        let archive = Some(archive.as_bytes().to_vec());
        let sent = files(&sent)?;
        store.publish_built(repl, id, &sent, archive).await?;
    }
    let release = look.release(repl, id).await?;
    let whole = [("main.c", "int main;"), (BUILD_ARCHIVE, "first")];
    ensure!(release == found(&whole), "the release is {release:?}");
    let current = look.current(repl).await?;
    ensure!(current == found(&sent), "current is {current:?}");
    Ok(())
}

async fn a_release_is_immutable(
    store: &dyn CodeStore,
    look: &dyn Look,
    repl: &ReplId,
) -> anyhow::Result<()> {
    let id = SubmissionId::new();
    let first = [("main.py", "1"), ("only-in-the-first", "1")];
    store.publish(repl, id, &files(&first)?).await?;
    store
        .publish(repl, id, &files(&[("main.py", "2"), ("more", "2")])?)
        .await?;
    let release = look.release(repl, id).await?;
    ensure!(release == found(&first), "the release became {release:?}");
    Ok(())
}

async fn current_code_is_the_last_published(
    store: &dyn CodeStore,
    look: &dyn Look,
    repl: &ReplId,
) -> anyhow::Result<()> {
    let mut many: Vec<(String, String)> = Vec::new();
    for n in 0..50 {
        many.push((format!("files/{n}.txt"), n.to_string()));
    }
    let many: Vec<(&str, &str)> = many.iter().map(|(p, t)| (p.as_str(), t.as_str())).collect();
    store
        .publish(repl, SubmissionId::new(), &files(&many)?)
        .await?;
    ensure!(look.current(repl).await? == found(&many));
    let next = [("files/7.txt", "seven"), ("main.py", "")];
    store
        .publish(repl, SubmissionId::new(), &files(&next)?)
        .await?;
    let current = look.current(repl).await?;
    ensure!(current == found(&next), "current is {current:?}");
    let has = |path| store.has_current(repl, path);
    ensure!(has("main.py").await? && has("files/7.txt").await?);
    ensure!(!has("files/8.txt").await? && !has("files").await?);
    let listed = store.list_current(repl).await?;
    let sizes = BTreeMap::from([("files/7.txt".to_owned(), 5), ("main.py".to_owned(), 0)]);
    ensure!(listed == sizes, "listed are {listed:?}");
    let path = |text: &str| RelativePath::try_from(text.to_owned()).map_err(anyhow::Error::msg);
    let seven = path("files/7.txt")?;
    let read = |most| store.read_current(repl, &seven, most);
    ensure!(read(5).await?.as_deref() == Some(&b"seven"[..]));
    ensure!(read(4).await?.is_none(), "it is larger than that");
    for missing in ["files/8.txt", "files"] {
        let read = store.read_current(repl, &path(missing)?, 9).await?;
        ensure!(read.is_none(), "{missing} is {read:?}");
    }
    let edited = [("a/new/file é", "1"), ("main.py", "edited")];
    for (name, text) in edited {
        store.put_current(repl, &path(name)?, text.into()).await?;
    }
    for gone in ["files/7.txt", "never/was"] {
        store.remove_current(repl, &path(gone)?).await?;
    }
    let current = look.current(repl).await?;
    ensure!(current == found(&edited), "edited it is {current:?}");
    // What was a folder becomes a file, and a folder again.
    for (gone, name) in [("a/new/file é", "a"), ("a", "a/b/c"), ("a/b/c", "a/b")] {
        store.remove_current(repl, &path(gone)?).await?;
        store.put_current(repl, &path(name)?, name.into()).await?;
        let current = look.current(repl).await?;
        let expected = [(name, name), ("main.py", "edited")];
        ensure!(current == found(&expected), "turned it is {current:?}");
    }
    let long = path(&format!("{}/{}", vec!["d"; 380].join("/"), "n".repeat(255)))?;
    match store.put_current(repl, &long, Vec::new()).await {
        Ok(()) => store.remove_current(repl, &long).await?,
        Err(problem) => ensure!(problem.code == FILE_REFUSED, "{problem}"),
    }
    Ok(())
}

async fn the_same_at_the_same_time_is_once(
    store: Arc<dyn CodeStore>,
    look: &dyn Look,
    repl: &ReplId,
) -> anyhow::Result<()> {
    let id = SubmissionId::new();
    let published = files(AWKWARD)?;
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let (store, repl, published) = (Arc::clone(&store), repl.clone(), published.clone());
        tasks.spawn(async move { store.publish(&repl, id, &published).await });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    ensure!(look.release(repl, id).await? == found(AWKWARD));
    ensure!(look.current(repl).await? == found(AWKWARD));
    Ok(())
}
