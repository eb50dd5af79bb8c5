//! What is edited in a workspace goes back into the code store: now and then, when asked, and before the
//! workspace is stopped. The runner only tells; it never sees the store's keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::{StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::http::request;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::{Pipeline, Share};
use crate::model::{BUILD_ARCHIVE, BUILD_FOLDER, Problem, RelativePath, ReplId};
use crate::platform::{ByteStream, Platform, PlatformError};
use crate::runner::wire::{
    Activity, INSTALLED, LINE, LINE_PROTOCOL, LISTING, MAX_BUILD_BYTES, PACKAGES,
};
use crate::storage::CodeStore;

/// How often every workspace is saved: as much of somebody's work as a lost node may cost.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// Failures to keep packages after which the pause between two tries grows no more: ten minutes.
const MOST_FAILED: u32 = 5;

/// Workspaces saved at one time. One costs a connection and one file's memory.
const AT_ONCE: usize = 4;

/// Longest wait for one answer of a runner, which has files at hand: the largest on a slow network.
const ANSWER: Duration = Duration::from_secs(30);

/// Largest list of files: as many as a workspace may have, with long names.
const MOST_LIST: usize = 16 << 20;

/// Largest answer about its use.
const MOST_ACTIVITY: usize = 1 << 10;

/// Largest file, as the runner has it.
const MOST_FILE: usize = 64 << 20;

/// How long a ticket of the server's own lasts: one save.
const TICKET_SECONDS: u64 = 600;

/// What stays as it is in a URL's path.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'.')
    .remove(b'-')
    .remove(b'_');

/// What a save came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Files written to the store.
    pub written: usize,
    /// Files removed from it.
    pub removed: usize,
}

/// Why a workspace was not saved.
#[derive(Debug, thiserror::Error)]
pub enum NotSaved {
    /// It cannot be asked: it is not there any more, or never was.
    #[error(transparent)]
    Gone(PlatformError),
    /// What it has cannot be kept.
    #[error(transparent)]
    Failed(Problem),
}

/// A file as the runner lists it.
#[derive(Debug, Deserialize)]
struct Listed {
    path: String,
    kind: String,
    size: u64,
    modified: i64,
    /// What is in the folder is nobody's work, and not listed.
    #[serde(default)]
    made: bool,
}

/// What was saved last of a workspace.
#[derive(Debug, Default)]
struct Known {
    files: BTreeMap<RelativePath, (u64, i64)>,
    /// The number of the runner's last list that was seen to.
    done: u64,
}

/// What was kept last of what a workspace has installed.
#[derive(Debug, Default)]
struct Kept {
    /// When it was installed.
    installed: u64,
    /// How often it could not be kept since, and rounds to leave out before it is tried again.
    failed: u32,
    pause: u32,
}

/// What was saved last of every workspace; the lock of each is held while it is saved.
#[derive(Debug, Default)]
pub struct Saves(Mutex<HashMap<ReplId, Arc<tokio::sync::Mutex<Known>>>>);

impl Saves {
    fn of(&self, repl: &ReplId) -> Arc<tokio::sync::Mutex<Known>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(repl.clone()).or_default())
    }

    /// Forgets what was known of a workspace that was stopped.
    pub fn forget(&self, repl: &ReplId) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(repl);
    }
}

impl Pipeline {
    /// Puts what was edited in the repl's workspace into the code store. A release is not edited: what
    /// was tested is there already.
    pub async fn save(&self, repl: &ReplId) -> Result<Saved, NotSaved> {
        if !is_open(&*self.inner.platform, repl)
            .await
            .map_err(NotSaved::Gone)?
        {
            return Ok(Saved::default());
        }
        let known = self.inner.saves.of(repl);
        let mut known = known.lock().await;
        let mut runner = Runner::dial(&*self.inner.platform, repl).await?;
        copy(&mut runner, &*self.inner.store, repl, &mut known).await
    }

    /// Saves every workspace now and then, until the server ends.
    pub(super) async fn keep_saving(self) {
        loop {
            tokio::time::sleep(SAVE_EVERY).await;
            self.save_all().await;
        }
    }

    /// Keeps what workspaces have installed, now and then, until the server ends. Beside the saves, which do not
    /// wait for it: packing takes a while, and what is not kept is installed again.
    pub(super) async fn keep_packages(self) {
        let this = &self;
        let mut kept: HashMap<ReplId, Kept> = HashMap::new();
        loop {
            tokio::time::sleep(SAVE_EVERY).await;
            let Ok(open) = self.open_workspaces().await else {
                continue;
            };
            kept.retain(|repl, _| open.contains(repl));
            for repl in open {
                kept.entry(repl).or_default();
            }
            stream::iter(&mut kept)
                .for_each_concurrent(AT_ONCE, |(repl, kept)| async move {
                    if kept.pause > 0 {
                        kept.pause -= 1;
                        return;
                    }
                    match this.keep_packages_of(repl, kept.installed).await {
                        Ok(installed) => {
                            *kept = Kept {
                                installed,
                                ..Kept::default()
                            }
                        }
                        Err(error) => {
                            tracing::debug!(%repl, %error, "what is installed is not kept yet");
                            kept.failed = (kept.failed + 1).min(MOST_FAILED);
                            kept.pause = 1 << kept.failed;
                        }
                    }
                })
                .await;
        }
    }

    /// Puts what was installed into the code store, for the next start, and says when it was installed. `done`: when
    /// that was installed which is there.
    async fn keep_packages_of(&self, repl: &ReplId, done: u64) -> Result<u64, NotSaved> {
        let mut runner = Runner::dial(&*self.inner.platform, repl).await?;
        let Some((installed, packages)) = runner.packages(done).await? else {
            return Ok(done);
        };
        if !packages.is_empty() {
            let archive = RelativePath::try_from(BUILD_ARCHIVE.to_owned());
            let archive = archive.map_err(|why| NotSaved::Failed(problem(&why)))?;
            let put = self
                .inner
                .store
                .put_current(repl, &archive, packages.into());
            put.await.map_err(NotSaved::Failed)?;
        }
        Ok(installed)
    }

    /// Saves every workspace that is this server's to save.
    pub async fn save_all(&self) {
        let Ok(open) = self.open_workspaces().await else {
            return;
        };
        stream::iter(open)
            .for_each_concurrent(AT_ONCE, |repl| async move {
                if let Err(NotSaved::Failed(problem)) = self.save(&repl).await {
                    tracing::warn!(%repl, %problem, "a workspace was not saved");
                }
            })
            .await;
    }

    /// Every workspace that is open, and this server's to see to.
    pub(super) async fn open_workspaces(&self) -> Result<BTreeSet<ReplId>, PlatformError> {
        let repls = self.inner.platform.repls().await?;
        let Share(mine) = &self.inner.share;
        let open = repls
            .into_iter()
            .filter(|repl| repl.release.is_none() && repl.state.is_on() && mine(&repl.repl_id));
        Ok(open.map(|repl| repl.repl_id).collect())
    }
}

async fn is_open(platform: &dyn Platform, repl: &ReplId) -> Result<bool, PlatformError> {
    let repls = platform.repls().await?;
    let found = repls.iter().find(|one| one.repl_id == *repl);
    Ok(found.is_some_and(|one| one.release.is_none() && one.state.is_on()))
}

async fn copy(
    runner: &mut Runner,
    store: &dyn CodeStore,
    repl: &ReplId,
    known: &mut Known,
) -> Result<Saved, NotSaved> {
    let mut saved = Saved::default();
    let (mut now, mut gone, mut made) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
    let (listed, number) = runner.list(known.done).await?;
    for file in listed {
        let Ok(path) = RelativePath::try_from(file.path) else {
            continue;
        };
        // What was compiled is compiled again at the next start; the archive is no file of the workspace's.
        if path.is_below(BUILD_FOLDER) || path.as_str() == BUILD_ARCHIVE {
            continue;
        }
        match file.kind.as_str() {
            _ if file.made => made.push(path),
            "file" => drop(now.insert(path, (file.size, file.modified))),
            // What an earlier server saved, or the workspace began with.
            "gone" => drop(gone.insert(path)),
            _ => {}
        }
    }
    for (path, about) in &now {
        if known.files.get(path) == Some(about) {
            continue;
        }
        // One that has just vanished is seen to be gone the next time.
        if let Some(content) = runner.read(path).await? {
            let put = store.put_current(repl, path, content);
            put.await.map_err(NotSaved::Failed)?;
            known.files.insert(path.clone(), *about);
            saved.written += 1;
        }
    }
    // Only what was seen here before: what others have put there meanwhile is theirs.
    gone.extend(known.files.keys().cloned());
    let is_made = |path: &RelativePath| made.iter().any(|folder| path.is_below(folder.as_str()));
    gone.retain(|path| !now.contains_key(path) && !is_made(path));
    for path in gone {
        let removed = store.remove_current(repl, &path);
        removed.await.map_err(NotSaved::Failed)?;
        known.files.remove(&path);
        saved.removed += 1;
    }
    known.done = number;
    Ok(saved)
}

/// A connection to a workspace's runner.
pub(super) struct Runner {
    send: SendRequest<Empty<Bytes>>,
    ticket: String,
}

impl Runner {
    pub(super) async fn dial(platform: &dyn Platform, repl: &ReplId) -> Result<Self, NotSaved> {
        let stream = platform.dial_runner(repl).await.map_err(NotSaved::Gone)?;
        Self::over(platform, repl, stream).await
    }

    /// Over this connection.
    pub(super) async fn over(
        platform: &dyn Platform,
        repl: &ReplId,
        stream: Box<dyn ByteStream>,
    ) -> Result<Self, NotSaved> {
        let key = platform.ticket_key(repl).await.map_err(NotSaved::Gone)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let until = now.map_or(0, |now| now.as_secs()) + TICKET_SECONDS;
        let (send, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| cut(&error))?;
        // Its error comes out at the request.
        tokio::spawn(connection.with_upgrades());
        let ticket = key.issue(repl, until);
        Ok(Self { send, ticket })
    }

    /// Lends its program's installer a line: this connection.
    pub(super) async fn lend(mut self) -> anyhow::Result<Box<dyn ByteStream>> {
        let request = self
            .request(LINE)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, LINE_PROTOCOL);
        let request = request.body(Empty::new())?;
        self.send.ready().await?;
        let answer = self.send.send_request(request).await?;
        let status = answer.status();
        anyhow::ensure!(
            status == StatusCode::SWITCHING_PROTOCOLS,
            "it answers {status}"
        );
        let line = hyper::upgrade::on(answer).await?;
        Ok(Box::new(TokioIo::new(line)))
    }

    fn request(&self, path: &str) -> request::Builder {
        Request::get(path)
            .header(header::HOST, "runner")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.ticket))
    }

    /// What there is, and what is gone since the list of the number `done`; and this list's number. A
    /// runner of an image from before lists were numbered tells of nothing that is gone.
    async fn list(&mut self, done: u64) -> Result<(Vec<Listed>, u64), NotSaved> {
        let answer = self.get(&format!("/files?done={done}"), MOST_LIST).await?;
        let (headers, body) = answer.ok_or_else(|| cut(&"it lists no files"))?;
        let listed = serde_json::from_slice(&body).map_err(|error| cut(&error))?;
        Ok((listed, number(&headers, LISTING)))
    }

    /// Since when it was not used, and whether its program is up.
    pub(super) async fn activity(&mut self) -> Result<Activity, NotSaved> {
        let answer = self.get("/activity", MOST_ACTIVITY).await?;
        let (_, body) = answer.ok_or_else(|| cut(&"it is of an image that does not tell"))?;
        serde_json::from_slice(&body).map_err(|error| cut(&error))
    }

    /// What was installed in the workspace and when, unless that is what was installed `done`.
    async fn packages(&mut self, done: u64) -> Result<Option<(u64, Bytes)>, NotSaved> {
        let path = format!("{PACKAGES}?done={done}");
        let answer = self.get(&path, MAX_BUILD_BYTES).await?;
        Ok(answer.map(|(headers, body)| (number(&headers, INSTALLED), body)))
    }

    async fn read(&mut self, path: &RelativePath) -> Result<Option<Vec<u8>>, NotSaved> {
        let path = utf8_percent_encode(path.as_str(), PLAIN);
        let answer = self.get(&format!("/files/{path}"), MOST_FILE).await?;
        Ok(answer.map(|(_, body)| Vec::from(body)))
    }

    async fn get(
        &mut self,
        path: &str,
        most: usize,
    ) -> Result<Option<(HeaderMap, Bytes)>, NotSaved> {
        let request = self
            .request(path)
            .body(Empty::new())
            .map_err(|error| cut(&error))?;
        let answer = async {
            self.send.ready().await.map_err(|error| cut(&error))?;
            let answer = self.send.send_request(request).await;
            let answer = answer.map_err(|error| cut(&error))?;
            let (status, headers) = (answer.status(), answer.headers().clone());
            let body = Limited::new(answer.into_body(), most).collect().await;
            let body = body.map_err(|error| cut(&error))?.to_bytes();
            match status {
                StatusCode::OK => Ok(Some((headers, body))),
                StatusCode::NOT_FOUND => Ok(None),
                _ => Err(NotSaved::Failed(problem(&String::from_utf8_lossy(&body)))),
            }
        };
        let answered = timeout(ANSWER, answer).await;
        answered.unwrap_or_else(|_| Err(cut(&"it did not answer in time")))
    }
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    let text = headers.get(name).and_then(|value| value.to_str().ok());
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The runner went away in the middle.
fn cut(error: &impl ToString) -> NotSaved {
    NotSaved::Gone(PlatformError::Unavailable(problem(&error.to_string())))
}

fn problem(cause: &str) -> Problem {
    Problem::new(
        "not_saved",
        "The workspace could not be saved",
        cause,
        "Look at the repl's state and at the server's log; it is tried again by itself.",
    )
}
