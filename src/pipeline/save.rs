//! What is edited in a workspace goes back into the code store: now and then, when asked, and before the
//! workspace is stopped. The runner only tells; it never sees the store's keys.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde::Serialize;

use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::runner::{Listed, Read, Runner, problem};
use super::{Pipeline, Share};
use crate::model::{
    BUILD_ARCHIVE, Extras, MAX_EXTRAS_BYTES, Problem, RelativePath, ReplId, Unsaved, UserId,
    WORKSPACE_EXTRAS, is_gantrys,
};
use crate::platform::{Platform, PlatformError};
use crate::storage::{CodeStore, FILE_REFUSED};

/// How often every workspace is saved: as much of somebody's work as a lost node may cost.
const SAVE_EVERY: Duration = Duration::from_secs(20);

/// Failures to keep packages after which the pause between two tries grows no more: ten minutes.
const MOST_FAILED: u32 = 5;

/// Workspaces saved at one time. One costs a connection and one file's memory.
const AT_ONCE: usize = 4;

/// MiB of files that all saves together have in memory: two of the largest files.
const IN_MEMORY: u32 = 260;

/// Longest that a workspace which is stopped is saved. A store that hangs must not keep it running.
const LAST_SAVE: Duration = Duration::from_secs(60);

/// What is named of what a save left out. The rest is counted.
const MOST_NAMED: usize = 100;

/// Files that are refused for want of room before the rest is left out without asking: each answer may count
/// all that its user has.
const MOST_REFUSED: usize = 10;

/// What a save came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Saved {
    /// Files written to the store.
    pub written: usize,
    /// Files removed from it.
    pub removed: usize,
    /// What was left out.
    #[serde(flatten)]
    pub left: Left,
}

/// What cannot be kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Left {
    /// The first of it, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unsaved: Vec<Unsaved>,
    /// How much more of it there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unsaved_more: Option<usize>,
}

impl Left {
    fn note(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        if self.unsaved.len() == MOST_NAMED {
            *self.unsaved_more.get_or_insert(0) += 1;
            return;
        }
        self.unsaved.push(Unsaved {
            path: path.into(),
            reason: reason.into(),
        });
    }

    /// What is recorded of it, after what happened; nothing if nothing was left out.
    fn told(&self) -> String {
        /// Named in a record.
        const FEW: usize = 5;
        let all = self.unsaved.len() + self.unsaved_more.unwrap_or(0);
        if all == 0 {
            return String::new();
        }
        let named = self.unsaved.iter().take(FEW);
        let named: Vec<String> = named
            .map(|one| format!("{} ({})", one.path, one.reason))
            .collect();
        let more = match all.saturating_sub(FEW) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("; not kept: {}{more}", named.join(", "))
    }
}

/// What the last save of a workspace came to that does not run any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LastSave {
    /// What was left out.
    #[serde(flatten)]
    pub left: Left,
    /// Why the last changes were not saved.
    #[serde(rename = "saveError", skip_serializing_if = "Option::is_none")]
    pub problem: Option<Problem>,
}

impl LastSave {
    /// What is recorded of it, after what happened.
    pub(super) fn told(&self) -> String {
        let problem = self.problem.as_ref();
        let problem =
            problem.map(|problem| format!("; the last changes were not saved: {problem}"));
        self.left.told() + &problem.unwrap_or_default()
    }
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
pub struct Known {
    files: BTreeMap<RelativePath, (u64, i64)>,
    /// What is not in files.
    extras: Option<Extras>,
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
#[derive(Debug)]
pub struct Saves {
    known: Mutex<HashMap<ReplId, Arc<tokio::sync::Mutex<Known>>>>,
    /// See [`IN_MEMORY`].
    room: Semaphore,
}

impl Default for Saves {
    fn default() -> Self {
        Self {
            known: Mutex::default(),
            room: Semaphore::new(IN_MEMORY as usize),
        }
    }
}

impl Saves {
    pub(super) fn of(&self, repl: &ReplId) -> Arc<tokio::sync::Mutex<Known>> {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(all.entry(repl.clone()).or_default())
    }

    /// Forgets what was known of a workspace that was stopped.
    pub fn forget(&self, repl: &ReplId) {
        let mut all = self.known.lock().unwrap_or_else(PoisonError::into_inner);
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
        let save = Save {
            runner: &mut runner,
            store: &*self.inner.store,
            room: &self.inner.saves.room,
            platform,
            user: &owner,
            repl,
            saved: Saved::default(),
            refused: Vec::new(),
        };
        save.run(&mut known).await
    }

    /// The last save of a workspace before something takes its place. What cannot be kept does not keep it there.
    pub(super) async fn save_before(&self, repl: &ReplId) -> Result<LastSave, Problem> {
        match self.save(repl).await {
            Ok(saved) => Ok(LastSave {
                left: saved.left,
                problem: None,
            }),
            // What is not there has nothing left to save.
            Err(NotSaved::Gone(PlatformError::NotFound(_))) => Ok(LastSave::default()),
            Err(NotSaved::Gone(
                PlatformError::Unavailable(problem) | PlatformError::NotReady(problem),
            )) => Ok(LastSave {
                problem: Some(problem),
                ..LastSave::default()
            }),
            Err(NotSaved::Failed(problem)) => Err(problem),
        }
    }

    /// The same before it is stopped, which nothing prevents.
    pub(super) async fn save_at_last(&self, repl: &ReplId) -> LastSave {
        let saved = timeout(LAST_SAVE, self.save_before(repl)).await;
        let late = |_| {
            Err(problem(&format!(
                "it took longer than {} s",
                LAST_SAVE.as_secs()
            )))
        };
        saved.unwrap_or_else(late).unwrap_or_else(|problem| {
            tracing::warn!(%repl, %problem, "a workspace was stopped that could not be saved");
            LastSave {
                problem: Some(problem),
                ..LastSave::default()
            }
        })
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

/// One save of a workspace.
struct Save<'a> {
    runner: &'a mut Runner,
    store: &'a dyn CodeStore,
    room: &'a Semaphore,
    platform: &'a dyn Platform,
    user: &'a UserId,
    repl: &'a ReplId,
    saved: Saved,
    /// Sizes of files that there was no room for, and why.
    refused: Vec<(u64, String)>,
}

/// What a workspace has.
#[derive(Default)]
struct Found {
    files: BTreeMap<RelativePath, (u64, i64)>,
    extras: Extras,
    /// What was there and is not any more.
    gone: BTreeSet<RelativePath>,
    /// Folders whose files are not listed.
    hidden: Vec<RelativePath>,
}

impl Found {
    fn of(listed: Vec<Listed>, left: &mut Left) -> Self {
        let mut found = Found::default();
        let mut folders = BTreeSet::new();
        for one in listed {
            let path = match RelativePath::try_from(one.path.clone()) {
                Ok(path) if is_gantrys(path.as_str()) && one.unkept.is_none() => continue,
                Ok(path) => path,
                Err(why) => {
                    left.note(one.path, one.unkept.unwrap_or(why));
                    continue;
                }
            };
            if one.made || one.closed {
                found.hidden.push(path.clone());
            }
            match (one.unkept, one.kind.as_str(), one.link) {
                (Some(why), ..) => left.note(path, why),
                _ if one.made => {}
                (None, "file", _) => {
                    if one.executable {
                        found.extras.executable.insert(path.clone());
                    }
                    found.files.insert(path, (one.size, one.modified));
                }
                (None, "folder", _) => drop(folders.insert(path)),
                (None, "other", Some(link)) => drop(found.extras.links.insert(path, link)),
                // What an earlier server saved, or the workspace began with.
                (None, "gone", _) => drop(found.gone.insert(path)),
                // Of an image that tells no more of it.
                (None, "other", None) => {
                    left.note(path, "it is a link, a pipe, a socket or a device")
                }
                _ => {}
            }
        }
        let mut above: BTreeSet<String> = BTreeSet::new();
        let inside = found.files.keys().chain(found.extras.links.keys());
        for path in inside.chain(&folders).chain(&found.hidden) {
            let path = path.as_str();
            let folders = path
                .match_indices('/')
                .map(|(end, _)| path[..end].to_owned());
            above.extend(folders);
        }
        folders.retain(|path| !above.contains(path.as_str()));
        found.extras.folders = folders;
        found
    }

    fn is_hidden(&self, path: &RelativePath) -> bool {
        let mut hidden = self.hidden.iter();
        hidden.any(|folder| path.is_below(folder.as_str()))
    }
}

impl Save<'_> {
    async fn run(mut self, known: &mut Known) -> Result<Saved, NotSaved> {
        let (listed, number) = self.runner.list(known.done).await?;
        let found = Found::of(listed, &mut self.saved.left);
        // First: a folder may be where a file was, or the other way round.
        self.remove(&found, known).await?;
        for (path, about) in &found.files {
            if known.files.get(path) != Some(about) && self.put(path, about.0).await? {
                known.files.insert(path.clone(), *about);
                self.saved.written += 1;
            }
        }
        if known.extras.as_ref() != Some(&found.extras) && self.put_extras(&found.extras).await? {
            known.extras = Some(found.extras);
        }
        known.done = number;
        Ok(self.saved)
    }

    /// Removes what is gone, and was seen here before: what others have put there meanwhile is theirs.
    async fn remove(&mut self, found: &Found, known: &mut Known) -> Result<(), NotSaved> {
        let mut gone: BTreeSet<RelativePath> = known.files.keys().cloned().collect();
        gone.extend(found.gone.iter().cloned());
        gone.retain(|path| !found.files.contains_key(path) && !found.is_hidden(path));
        for path in gone {
            let removed = self.store.remove_current(self.repl, &path);
            removed.await.map_err(NotSaved::Failed)?;
            known.files.remove(&path);
            self.saved.removed += 1;
        }
        Ok(())
    }

    /// Whether the store has the file now.
    async fn put(&mut self, path: &RelativePath, size: u64) -> Result<bool, NotSaved> {
        let room = u32::try_from((size >> 20) + 1).unwrap_or(IN_MEMORY);
        let room = self.room.acquire_many(room.min(IN_MEMORY)).await;
        let _room = room.map_err(|error| NotSaved::Failed(problem(&error.to_string())))?;
        match self.runner.read(path).await? {
            Read::Whole(content) => self.keep(path, content).await,
            // The next list says so.
            Read::Gone => Ok(false),
            Read::Refused(why) => {
                self.saved
                    .left
                    .note(path.as_str(), format!("it cannot be read: {why}"));
                Ok(false)
            }
        }
    }

    async fn keep(&mut self, path: &RelativePath, content: Vec<u8>) -> Result<bool, NotSaved> {
        let why = match self.no_room(content.len() as u64).await {
            Some(why) => why,
            None => match self.store.put_current(self.repl, path, content).await {
                Ok(()) => return Ok(true),
                Err(problem) if problem.code == FILE_REFUSED => problem.to_string(),
                Err(problem) => return Err(NotSaved::Failed(problem)),
            },
        };
        self.saved.left.note(path.as_str(), why);
        Ok(false)
    }

    /// Why the user's code may not take so many bytes more.
    async fn no_room(&mut self, bytes: u64) -> Option<String> {
        let mut refused = self.refused.iter();
        let known = refused.find(|(size, _)| bytes >= *size || self.refused.len() >= MOST_REFUSED);
        if let Some((_, why)) = known {
            return Some(why.clone());
        }
        let problem = self
            .platform
            .admit(self.user, self.repl, bytes)
            .await
            .err()?;
        self.refused.push((bytes, problem.to_string()));
        Some(problem.to_string())
    }

    /// Whether the store has it now.
    async fn put_extras(&mut self, extras: &Extras) -> Result<bool, NotSaved> {
        let failed = |why: String| NotSaved::Failed(problem(&why));
        let path = RelativePath::try_from(WORKSPACE_EXTRAS.to_owned()).map_err(failed)?;
        let text = serde_json::to_vec(extras).map_err(|error| failed(error.to_string()))?;
        if extras.is_empty() || text.len() > MAX_EXTRAS_BYTES {
            if !extras.is_empty() {
                let why = format!(
                    "the names of links and empty folders take more than {MAX_EXTRAS_BYTES} bytes"
                );
                self.saved.left.note(WORKSPACE_EXTRAS, why);
            }
            let removed = self.store.remove_current(self.repl, &path);
            removed.await.map_err(NotSaved::Failed)?;
            return Ok(extras.is_empty());
        }
        self.keep(&path, text).await
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::{Value, json};

    fn listed(entries: Value) -> (Found, Left) {
        let mut left = Left::default();
        let listed: Vec<Listed> = serde_json::from_value(entries).unwrap();
        (Found::of(listed, &mut left), left)
    }

    fn entry(path: &str, kind: &str, more: Value) -> Value {
        let mut entry = json!({ "path": path, "kind": kind, "size": 1, "modified": 2 });
        entry
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        entry
    }

    #[test]
    fn what_is_listed_is_kept_or_named() {
        let (found, left) = listed(json!([
            entry("a", "folder", json!({})),
            entry("a/empty", "folder", json!({})),
            entry("a/run", "file", json!({ "executable": true })),
            entry("a/link", "other", json!({ "link": "run" })),
            entry("old", "gone", json!({})),
            entry(".build/x", "file", json!({})),
            entry("node_modules", "folder", json!({ "made": true })),
            entry(
                "closed",
                "folder",
                json!({ "closed": true, "unkept": "it is closed" })
            ),
            entry("large", "file", json!({ "unkept": "it is too large" })),
            entry("of-an-older-image", "other", json!({})),
            entry(
                "back\\slash",
                "file",
                json!({ "unkept": "it has a backslash" })
            ),
        ]));
        let names = |paths: &BTreeSet<RelativePath>| {
            let names = paths.iter().map(RelativePath::as_str);
            names.collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            found
                .files
                .keys()
                .map(RelativePath::as_str)
                .collect::<Vec<_>>(),
            ["a/run"]
        );
        assert_eq!(names(&found.extras.folders), "a/empty");
        assert_eq!(names(&found.extras.executable), "a/run");
        assert_eq!(found.extras.links.len(), 1);
        assert_eq!(names(&found.gone), "old");
        let hidden = |path: &str| found.is_hidden(&path.to_owned().try_into().unwrap());
        assert!(hidden("closed/b") && hidden("node_modules/a/b") && !hidden("a/run"));
        let left: Vec<(&str, &str)> = left
            .unsaved
            .iter()
            .map(|one| (&*one.path, &*one.reason))
            .collect();
        assert_eq!(left.len(), 4, "{left:?}");
        assert_eq!(
            left[..2],
            [("closed", "it is closed"), ("large", "it is too large")]
        );
        assert_eq!(left[3], ("back\\slash", "it has a backslash"));
    }

    #[test]
    fn what_is_named_is_bounded_and_told_in_a_record() {
        let mut left = Left::default();
        assert_eq!(left.told(), "");
        left.note("a", "it is large");
        assert_eq!(left.told(), "; not kept: a (it is large)");
        for number in 0..MOST_NAMED + 6 {
            left.note(number.to_string(), "why");
        }
        assert_eq!(
            (left.unsaved.len(), left.unsaved_more),
            (MOST_NAMED, Some(7))
        );
        assert!(
            left.told().ends_with("3 (why) and 102 more"),
            "{}",
            left.told()
        );
    }
}
