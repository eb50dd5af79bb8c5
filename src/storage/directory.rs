//! The code store as a folder of this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{CodeStore, FILE_REFUSED, LANES, lane};
use crate::beneath::Folder;
use crate::model::{BUILD_ARCHIVE, Problem, RelativePath, ReplId, SubmissionId};

/// A folder with `releases/{repl}/{submission}/` (immutable) and `code/{repl}/` (current).
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    root: PathBuf,
    lanes: Arc<[Mutex<()>; LANES]>,
}

impl DirectoryStore {
    /// A store in this folder, made if it is not there.
    pub fn open(root: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(root.join("releases"))?;
        fs::create_dir_all(root.join("code"))?;
        let lanes = Arc::new(std::array::from_fn(|_| Mutex::new(())));
        Ok(Self { root, lanes })
    }

    /// Where a release's files are.
    pub fn release(&self, repl: &ReplId, submission: SubmissionId) -> PathBuf {
        self.root
            .join("releases")
            .join(repl.as_str())
            .join(submission.to_string())
    }

    /// Does this while nothing else changes the repl's files.
    async fn alone<T: Send + 'static>(
        &self,
        repl: &ReplId,
        act: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> Result<T, Problem> {
        let (lanes, lane) = (Arc::clone(&self.lanes), lane(repl));
        let act = move || {
            let _alone = lanes[lane].lock().unwrap_or_else(PoisonError::into_inner);
            act()
        };
        tokio::task::spawn_blocking(act)
            .await
            .map_err(io::Error::other)
            .flatten()
            .map_err(|error| failed(&error))
    }

    /// Where a repl's current files are.
    pub fn current(&self, repl: &ReplId) -> PathBuf {
        self.root.join("code").join(repl.as_str())
    }

    /// Bytes on the disk of all of a repl's releases and its current files.
    pub fn usage(&self, repl: &ReplId) -> io::Result<u64> {
        let releases = self.root.join("releases").join(repl.as_str());
        let mut bytes = 0;
        for folder in [releases, self.current(repl)] {
            match Folder::open(&folder) {
                Ok(folder) => bytes += folder.usage(u64::MAX).bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(bytes)
    }

    /// Removes a release's files; absent is fine. Nothing may need them any more.
    pub async fn forget(&self, repl: &ReplId, submission: SubmissionId) -> io::Result<()> {
        let release = self.release(repl, submission);
        tokio::task::spawn_blocking(move || remove(&release))
            .await
            .map_err(io::Error::other)
            .flatten()
    }
}

#[async_trait]
impl CodeStore for DirectoryStore {
    async fn publish_built(
        &self,
        repl: &ReplId,
        submission: SubmissionId,
        files: &BTreeMap<RelativePath, String>,
        build: Option<Vec<u8>>,
    ) -> Result<(), Problem> {
        let release = self.release(repl, submission);
        let code = self.current(repl);
        let files = files.clone();
        let write = move || {
            if !release.exists() {
                write_whole(&release, &files, build.as_deref())?;
            }
            write_whole(&code, &files, None)
        };
        self.alone(repl, write).await
    }

    async fn put_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        content: Vec<u8>,
    ) -> Result<(), Problem> {
        let (code, path) = (self.current(repl), path.clone());
        let put = self.alone(repl, move || Ok(write_one(&code, &path, &content)));
        let problem = match put.await? {
            Ok(()) => return Ok(()),
            Err(error) if is_files_own(&error) => Problem {
                code: FILE_REFUSED.to_owned(),
                ..failed(&error)
            },
            Err(error) => failed(&error),
        };
        Err(problem)
    }

    async fn remove_current(&self, repl: &ReplId, path: &RelativePath) -> Result<(), Problem> {
        let (code, path) = (self.current(repl), path.clone());
        self.alone(repl, move || remove_one(&code, &path)).await
    }

    async fn remove_repl(&self, repl: &ReplId) -> Result<(), Problem> {
        let code = DirectoryStore::current(self, repl);
        let releases = self.root.join("releases").join(repl.as_str());
        self.alone(repl, move || {
            remove(&code)?;
            remove(&releases)
        })
        .await
    }

    async fn has_current(&self, repl: &ReplId, path: &str) -> Result<bool, Problem> {
        let path = DirectoryStore::current(self, repl).join(path);
        // Not what a link leads to: that may be anywhere.
        Ok(tokio::fs::symlink_metadata(path)
            .await
            .is_ok_and(|about| about.is_file()))
    }

    async fn list_current(&self, repl: &ReplId) -> Result<BTreeMap<String, u64>, Problem> {
        let code = DirectoryStore::current(self, repl);
        self.alone(repl, move || {
            let mut found = BTreeMap::new();
            if fs::symlink_metadata(&code).is_ok_and(|about| about.is_dir()) {
                list(&code, "", &mut found)?;
            }
            Ok(found)
        })
        .await
    }

    async fn read_current(
        &self,
        repl: &ReplId,
        path: &RelativePath,
        most: u64,
    ) -> Result<Option<Vec<u8>>, Problem> {
        let (code, path) = (DirectoryStore::current(self, repl), path.clone());
        let read = move || {
            // Whatever somebody else put there, nothing is read through a link.
            let file = Folder::open(&code).and_then(|folder| folder.read(path.as_str()));
            let Ok(file) = file else { return Ok(None) };
            let mut content = Vec::new();
            file.take(most + 1).read_to_end(&mut content)?;
            Ok((content.len() as u64 <= most).then_some(content))
        };
        self.alone(repl, read).await
    }
}

/// Most files that are listed of one repl.
const MAX_LISTED: usize = 100_000;

/// Adds the files in this folder and in those below it.
fn list(folder: &Path, above: &str, found: &mut BTreeMap<String, u64>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = format!("{above}{}", entry.file_name().to_string_lossy());
        let about = entry.metadata()?;
        if about.is_dir() {
            list(&entry.path(), &format!("{path}/"), found)?;
        } else if about.is_file() && found.len() < MAX_LISTED {
            found.insert(path, about.len());
        }
    }
    Ok(())
}

fn failed(error: &io::Error) -> Problem {
    Problem::new(
        "store_failed",
        "The code could not be stored",
        error.to_string(),
        "Check that the data folder is writable and has room, then try again.",
    )
}

/// Whether it is this file that cannot be put where it belongs, and no fault of the disk's.
fn is_files_own(error: &io::Error) -> bool {
    use io::ErrorKind::{DirectoryNotEmpty, InvalidFilename, IsADirectory, NotADirectory};
    [
        DirectoryNotEmpty,
        InvalidFilename,
        IsADirectory,
        NotADirectory,
    ]
    .contains(&error.kind())
}

fn name_of(path: &RelativePath) -> &str {
    let path = path.as_str();
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// The folder that a file is in. Somebody else may have put a link there, which is not followed.
fn own_folder(code: &Path, path: &RelativePath, make: bool) -> io::Result<PathBuf> {
    let mut folder = code.to_owned();
    if make {
        fs::create_dir_all(&folder)?;
    }
    let (folders, _) = path.as_str().rsplit_once('/').unwrap_or_default();
    for part in folders.split('/').filter(|part| !part.is_empty()) {
        folder.push(part);
        match fs::symlink_metadata(&folder) {
            Ok(about) if about.is_dir() => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound && make => {
                fs::create_dir(&folder)?;
                // Its name is on the disk before anything is said to be in it.
                sync_folder(folder.parent().unwrap_or(code))?;
            }
            Ok(_) => {
                let why = format!("{} is no folder", folder.display());
                return Err(io::Error::new(io::ErrorKind::NotADirectory, why));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(folder)
}

/// Writes a file beside its place and moves it there.
fn write_one(code: &Path, path: &RelativePath, content: &[u8]) -> io::Result<()> {
    let folder = own_folder(code, path, true)?;
    // Beside the repl's folder: what is in there is the repl's.
    let staged = code.with_file_name(format!(".{}.one", file_name(code)));
    let mut file = File::create(&staged)?;
    file.write_all(content)?;
    file.sync_data()?;
    let target = folder.join(name_of(path));
    if fs::symlink_metadata(&target).is_ok_and(|about| about.is_dir()) {
        remove_folders(&target)?;
    }
    fs::rename(&staged, target)?;
    sync_folder(&folder)
}

/// Removes a file, and the folders above it that have nothing left in them.
fn remove_one(code: &Path, path: &RelativePath) -> io::Result<()> {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    // Where something else stands meanwhile, the file is gone as well.
    let is_gone =
        |error: &io::Error| [IsADirectory, NotADirectory, NotFound].contains(&error.kind());
    let folder = match own_folder(code, path, false) {
        Err(error) if is_gone(&error) => return Ok(()),
        folder => folder?,
    };
    match fs::remove_file(folder.join(name_of(path))) {
        Err(error) if !is_gone(&error) => return Err(error),
        _ => {}
    }
    for empty in folder.ancestors().take_while(|above| *above != code) {
        if fs::remove_dir(empty).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes folders that have no file in them; one with a file stays, with an error.
fn remove_folders(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            let why = format!("{} is a folder with files in it", folder.display());
            return Err(io::Error::new(io::ErrorKind::DirectoryNotEmpty, why));
        }
        remove_folders(&entry.path())?;
    }
    fs::remove_dir(folder)
}

/// Writes a folder beside its place and moves it there, so that it is seen whole or not at all.
fn write_whole(
    folder: &Path,
    files: &BTreeMap<RelativePath, String>,
    build: Option<&[u8]>,
) -> io::Result<()> {
    let parent = folder.parent().unwrap_or(folder);
    if !parent.is_dir() {
        fs::create_dir_all(parent)?;
        sync_folder(parent.parent().unwrap_or(parent))?;
    }
    let staged = parent.join(format!(".{}.new", file_name(folder)));
    let replaced = parent.join(format!(".{}.old", file_name(folder)));
    remove(&staged)?;
    fs::create_dir(&staged)?;
    let texts = files
        .iter()
        .map(|(path, text)| (path.as_str(), text.as_bytes()));
    let build = build.map(|archive| (BUILD_ARCHIVE, archive));
    let mut folders = BTreeSet::from([staged.clone()]);
    for (path, content) in texts.chain(build) {
        let target = staged.join(path);
        if let Some(folder) = target.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = File::create_new(&target)?;
        file.write_all(content)?;
        file.sync_data()?;
        let above = target.ancestors().skip(1);
        folders.extend(
            above
                .take_while(|above| above.starts_with(&staged))
                .map(Path::to_owned),
        );
    }
    // The names in each of them, too: what is said to be stored is found after a power cut.
    for folder in folders.iter().rev() {
        sync_folder(folder)?;
    }
    remove(&replaced)?;
    if folder.exists() {
        fs::rename(folder, &replaced)?;
    }
    fs::rename(&staged, folder)?;
    sync_folder(parent)?;
    remove(&replaced)
}

/// The names in a folder are on the disk when it returns.
fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
