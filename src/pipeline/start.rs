//! What a repl's current files are started by: the same file as in a submission of them.

use std::collections::BTreeMap;

use futures_util::{StreamExt, TryStreamExt, stream};

use super::claims::CLAIM_PATIENCE;
use super::{NotYours, Pipeline};
use crate::model::entry::{self, Choice};
use crate::model::{
    FieldError, LANGUAGES, Language, MAX_CODE_BYTES, Order, Problem, RelativePath, ReplId, UserId,
    is_gantrys,
};
use crate::platform::{AWAY, Opened, PlatformError, WorkspaceSpec};

/// Most files that are read to find the program: as many as a submission could have.
const MOST_READ: usize = 1_000;

/// Files that are read at one time: a store in a bucket takes a while for each.
const READ_AT_ONCE: usize = 8;

/// What is started, and how.
struct Program {
    language: &'static Language,
    /// Empty where the project's own command names no file.
    entrypoint: String,
    /// What is in that file.
    text: String,
    /// The project's own command, where it has one.
    own: Option<Vec<String>>,
    /// What it is, for its user.
    told: String,
}

/// What a start came to.
struct Started {
    opened: Opened,
    was_idle: bool,
    /// What is recorded of it.
    message: String,
}

impl Pipeline {
    /// Starts the user's repl from its current files, having put these there that it does not have yet. Without a
    /// language it is the one whose entrypoint or project file is among them. What does not start leaves no new name
    /// and no new file of it.
    pub async fn start(
        &self,
        user: &UserId,
        repl: &ReplId,
        language: Option<&'static Language>,
        files: BTreeMap<RelativePath, String>,
    ) -> Result<Opened, NotYours> {
        let asked = self.asked(repl, |owner| owner == user, "it was started".to_owned());
        let fresh = match files.is_empty() {
            true => None,
            false => self.bring(user, repl, files).await?,
        };
        let order = asked.order.clone();
        let opened = self.open(user, repl, language, order).await;
        match (&opened, fresh) {
            // It may come up yet.
            (Err(NotYours::Failed(PlatformError::Unavailable(problem))), _)
                if problem.code == AWAY => {}
            (Err(_), Some(put)) => self.take_back(repl, &put).await,
            _ => {}
        }
        let started = opened?;
        if started.opened.created {
            // One that comes back from being idle is what it was.
            if !started.was_idle {
                self.overtake(asked).await;
            }
            self.note(user, repl, "repl.opened", started.message, None)
                .await;
        }
        Ok(started.opened)
    }

    /// Puts files into the code store for a repl that does not have them yet. Its name becomes the user's; when it
    /// was nobody's before, says which files are there now.
    async fn bring(
        &self,
        user: &UserId,
        repl: &ReplId,
        files: BTreeMap<RelativePath, String>,
    ) -> Result<Option<Vec<RelativePath>>, NotYours> {
        let platform = &self.inner.platform;
        let _place = self.inner.places.take(&**platform, user, repl).await?;
        let claimed = self.inner.claim_name_patiently(user, repl, CLAIM_PATIENCE);
        let fresh = claimed.await?;
        let mut put = Vec::new();
        let brought = self.put_new(user, repl, files, &mut put).await;
        if fresh && brought.is_err() {
            self.take_back(repl, &put).await;
        }
        brought?;
        Ok(fresh.then_some(put))
    }

    /// Puts the files that are not there yet, and says which those were.
    async fn put_new(
        &self,
        user: &UserId,
        repl: &ReplId,
        files: BTreeMap<RelativePath, String>,
        new: &mut Vec<RelativePath>,
    ) -> Result<(), PlatformError> {
        let store = &self.inner.store;
        for (path, text) in files {
            let has = store.has_current(repl, path.as_str()).await;
            if !has.map_err(PlatformError::Unavailable)? {
                let admitted = self.inner.platform.admit(user, repl, text.len() as u64);
                admitted.await.map_err(PlatformError::NotReady)?;
                let put = store.put_current(repl, &path, text.into_bytes()).await;
                put.map_err(PlatformError::Unavailable)?;
                new.push(path);
            }
        }
        Ok(())
    }

    /// Gives a new name back that nothing came of.
    async fn take_back(&self, repl: &ReplId, put: &[RelativePath]) {
        let mut removed = Ok(());
        for path in put {
            let one = self.inner.store.remove_current(repl, path).await;
            removed = removed.and(one);
        }
        match removed {
            // The next who has the name finds nothing of this user's.
            Ok(()) => self.inner.give_back(repl).await,
            Err(problem) => tracing::warn!(%repl, %problem, "a name stays taken, with its files"),
        }
    }

    async fn open(
        &self,
        user: &UserId,
        repl: &ReplId,
        language: Option<&'static Language>,
        order: Order,
    ) -> Result<Started, NotYours> {
        let program = self.program_of(repl, language).await?;
        let language = program.language;
        let platform = &self.inner.platform;
        if let Some(problem) = platform.lacks(language).await {
            return Err(PlatformError::NotReady(problem).into());
        }
        let _place = self.inner.places.take(&**platform, user, repl).await?;
        let claimed = self.inner.claim_name_patiently(user, repl, CLAIM_PATIENCE);
        let fresh = claimed.await?;
        platform.used(user);
        let install = language.install.as_ref();
        let index = install.and_then(|install| self.inner.packages.index(install));
        let spec = WorkspaceSpec {
            user_id: user.clone(),
            repl_id: repl.clone(),
            order,
            argv: language.start(&program.entrypoint, &program.text, program.own, index),
        };
        let was_idle = platform.is_idle(repl);
        let opened = platform.open_workspace(&spec).await;
        if fresh && opened.is_err() {
            self.inner.give_back(repl).await;
        }
        let opened = opened?;
        self.inner.opened.notify_one();
        let message = match was_idle {
            true => "Started again as it was before it was idle".to_owned(),
            false => format!(
                "Started from its current files, as {}: {}",
                language.name, program.told
            ),
        };
        Ok(Started {
            opened,
            was_idle,
            message,
        })
    }

    /// What the repl's current files are started by. When there are none there is nothing to start, unless it
    /// runs, or is idle: then it goes on as what it is.
    async fn program_of(
        &self,
        repl: &ReplId,
        language: Option<&'static Language>,
    ) -> Result<Program, PlatformError> {
        let store = &self.inner.store;
        let listed = store.list_current(repl).await;
        let listed = listed.map_err(PlatformError::Unavailable)?;
        let sizes: BTreeMap<RelativePath, u64> = listed
            .into_iter()
            .filter(|(path, _)| !is_gantrys(path))
            .filter_map(|(path, size)| Some((RelativePath::try_from(path).ok()?, size)))
            .collect();
        if sizes.is_empty() && !self.is_there(repl).await? {
            return Err(PlatformError::NotReady(no_files(repl)));
        }
        let language = language.unwrap_or_else(|| language_of(sizes.keys()));
        let mut files = own_files(language, &sizes);
        let first = unread(&sizes, &files, |path| entry::declares(language, path));
        self.read_texts(repl, first, &mut files).await?;
        let mut chosen = choice(language, &files);
        if chosen.is_err() {
            // Which of them is meant is then seen by what is in them.
            let sources = unread(&sizes, &files, |path| language.is_compiled(path));
            self.read_texts(repl, sources, &mut files).await?;
            chosen = choice(language, &files);
        }
        let (entrypoint, told) = match chosen {
            Ok(Some(path)) => (path.to_string(), path.to_string()),
            Ok(None) => (String::new(), "its start script".to_owned()),
            // Where the usual file is missing its start says so; its user can add it then.
            Err(error) => {
                let usual = language.entrypoint;
                let told = format!("{usual} (the entrypoint {})", error.reason);
                (usual.to_owned(), told)
            }
        };
        let path = RelativePath::try_from(entrypoint.clone()).ok();
        let program = unread(&sizes, &files, |path| path == entrypoint);
        self.read_texts(repl, program, &mut files).await?;
        let text = path.as_ref().and_then(|path| files.get(path));
        Ok(Program {
            language,
            text: text.cloned().unwrap_or_default(),
            own: entry::command(language, &files, path.as_ref()),
            entrypoint,
            told,
        })
    }

    /// Reads these of the files.
    async fn read_texts(
        &self,
        repl: &ReplId,
        paths: Vec<RelativePath>,
        files: &mut BTreeMap<RelativePath, String>,
    ) -> Result<(), PlatformError> {
        let reading = paths.into_iter().map(|path| async move {
            let text = self.text_of(repl, &path).await?;
            Ok::<_, PlatformError>((path, text))
        });
        let read: Vec<(RelativePath, String)> = stream::iter(reading)
            .buffer_unordered(READ_AT_ONCE)
            .try_collect()
            .await?;
        files.extend(read);
        Ok(())
    }

    /// Whether something of the repl runs, or is to run as soon as somebody comes.
    async fn is_there(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        let platform = &self.inner.platform;
        if platform.is_idle(repl) {
            return Ok(true);
        }
        let repls = platform.repls().await?;
        let mut on = repls.iter().filter(|one| one.state.is_on());
        Ok(on.any(|one| one.repl_id == *repl))
    }

    /// The text of a current file, as far as a submission could have it.
    async fn text_of(&self, repl: &ReplId, path: &RelativePath) -> Result<String, PlatformError> {
        let store = &self.inner.store;
        let content = store.read_current(repl, path, MAX_CODE_BYTES as u64).await;
        let content = content.map_err(PlatformError::Unavailable)?;
        Ok(String::from_utf8_lossy(&content.unwrap_or_default()).into_owned())
    }
}

/// The file that these are run by, as in a submission that names none.
fn choice(
    language: &'static Language,
    files: &BTreeMap<RelativePath, String>,
) -> Result<Option<RelativePath>, FieldError> {
    let choice = Choice {
        language,
        files,
        tests: &[],
    };
    choice.entrypoint(None)
}

/// The project's own files; what is in them is still to be read.
fn own_files(
    language: &Language,
    sizes: &BTreeMap<RelativePath, u64>,
) -> BTreeMap<RelativePath, String> {
    let own = sizes.keys().filter(|path| is_own(language, path));
    own.map(|path| (path.clone(), String::new())).collect()
}

/// Those of the files that are wanted and were not read yet, as far as a submission could have them: those near the
/// top first.
fn unread(
    sizes: &BTreeMap<RelativePath, u64>,
    files: &BTreeMap<RelativePath, String>,
    wanted: impl Fn(&str) -> bool,
) -> Vec<RelativePath> {
    let unread = |path: &RelativePath| files.get(path).is_some_and(String::is_empty);
    let mut paths: Vec<(&RelativePath, u64)> = sizes
        .iter()
        .filter(|(path, _)| wanted(path.as_str()) && unread(path))
        .map(|(path, size)| (path, *size))
        .collect();
    paths.sort_by_key(|(path, _)| path.as_str().matches('/').count());
    let mut room = MAX_CODE_BYTES as u64;
    paths.retain(|(_, size)| {
        let fits = *size <= room;
        room -= if fits { *size } else { 0 };
        fits
    });
    paths.truncate(MOST_READ);
    paths.into_iter().map(|(path, _)| path.clone()).collect()
}

/// Whether it is a file of the project's own, and nothing that was installed or that a tool keeps there.
fn is_own(language: &Language, path: &RelativePath) -> bool {
    let installed = language.install.as_ref().map_or(&[][..], |one| one.own);
    !path.as_str().starts_with('.') && !installed.iter().any(|folder| path.is_below(folder))
}

/// The language of these files: an entrypoint says more than a project's file, and that more than extensions.
fn language_of<'a>(files: impl Iterator<Item = &'a RelativePath> + Clone) -> &'static Language {
    let has = |file: &str| files.clone().any(|path| path.as_str() == file);
    let find = |fits: &dyn Fn(&Language) -> bool| LANGUAGES.iter().find(|one| fits(one));
    let extensions = || {
        let extension = |path: &RelativePath| {
            let (_, extension) = path.as_str().rsplit_once('.')?;
            Language::of_extension(extension)
        };
        let mut found = files.clone().filter_map(extension);
        let first = found.next()?;
        found.all(|other| other == first).then_some(first)
    };
    find(&|one| has(one.entrypoint))
        .or_else(|| find(&|one| one.others.iter().any(|other| has(other))))
        .or_else(|| find(&|one| one.project.is_some_and(has)))
        .or_else(extensions)
        // Its start command says that the file is missing; its user can add it then.
        .unwrap_or(&LANGUAGES[0])
}

fn no_files(repl: &ReplId) -> Problem {
    Problem::new(
        "no_files",
        "The repl could not be started",
        format!(
            "there are no files of the repl: code/{repl} is not there, or empty, in the code store"
        ),
        "Send files with the request, submit code, or put files there; check how the repl's name is written.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_are_of_the_language_that_their_names_say() {
        let language = |names: &[&str]| {
            let file = |name: &&str| RelativePath::try_from((*name).to_owned()).unwrap();
            let files: Vec<RelativePath> = names.iter().map(file).collect();
            language_of(files.iter()).name
        };
        for (names, expected) in [
            (&["main.sh", "package.json"][..], "bash"),
            (&["index.js", "package.json"], "node"),
            (&["index.ts", "package.json", "tsconfig.json"], "typescript"),
            (&["app.py", "static/app.js"], "python"),
            (&["server.js"], "node"),
            (&["package.json", "bin/www"], "node"),
            (&["src/main.rs", "Cargo.toml"], "rust"),
            (&["index.php", "style.css"], "php"),
            (&["hello.rb", "readme.txt"], "ruby"),
            (&["a.lua", "b.pl"], "python"),
            (&["data.bin"], "python"),
        ] {
            assert_eq!(language(names), expected, "{names:?}");
        }
    }
}
