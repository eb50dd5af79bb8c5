//! What is edited in a workspace goes back into the code store: now and then, when asked, and before the
//! workspace is stopped. The runner only tells; it never sees the store's keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde::Serialize;

use super::runner::{Runner, problem};
use super::{Pipeline, Share};
use crate::model::{BUILD_ARCHIVE, BUILD_FOLDER, Problem, RelativePath, ReplId, UserId};
use crate::platform::{Platform, PlatformError};
use crate::storage::CodeStore;

/// How often every workspace is saved: as much of somebody's work as a lost node may cost.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// Failures to keep packages after which the pause between two tries grows no more: ten minutes.
const MOST_FAILED: u32 = 5;

/// Workspaces saved at one time. One costs a connection and one file's memory.
const AT_ONCE: usize = 4;

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
        let platform = &*self.inner.platform;
        let owner = platform.owner(repl).await.map_err(NotSaved::Gone)?;
        let owner = owner
            .ok_or_else(|| NotSaved::Gone(PlatformError::NotFound(format!("the repl {repl}"))))?;
        let whose = Whose {
            platform,
            user: &owner,
            repl,
        };
        copy(&mut runner, &*self.inner.store, whose, &mut known).await
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
            let platform = &self.inner.platform;
            if let Some(user) = platform.owner(repl).await.map_err(NotSaved::Gone)? {
                let admitted = platform.admit(&user, repl, packages.len() as u64);
                admitted.await.map_err(NotSaved::Failed)?;
            }
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

/// Whose files are saved.
#[derive(Clone, Copy)]
struct Whose<'a> {
    platform: &'a dyn Platform,
    user: &'a UserId,
    repl: &'a ReplId,
}

async fn copy(
    runner: &mut Runner,
    store: &dyn CodeStore,
    whose: Whose<'_>,
    known: &mut Known,
) -> Result<Saved, NotSaved> {
    let repl = whose.repl;
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
            let admitted = whose.platform.admit(whose.user, repl, content.len() as u64);
            admitted.await.map_err(NotSaved::Failed)?;
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
