//! `gantry-runner fetch [FOLDER]`: the init container of a released pod. Copies what is below
//! `s3://{S3_BUCKET}/{S3_PREFIX}` into a folder, which nothing in the bucket can make it leave.

use std::cell::Cell;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::time::{sleep, timeout};

use super::PROGRAM;
use crate::beneath::Folder;
use crate::model::{Problem, RelativePath};
use crate::storage::{Manifest, ManifestFile, Object, S3Config, S3Store, hexadecimal};

/// Where to, when nothing is said.
const DEFAULT_FOLDER: &str = "/workspace";

/// Most bytes of all files together: half of the volume that the template gives the workspace.
const MAX_BYTES: u64 = 256 << 20;

/// Most files. A submission brings far fewer; what somebody else put into the bucket may not.
const MAX_FILES: usize = 10_000;

/// Longest time for everything. A release has 60 s to come up, and its program needs some of it; a
/// store that is slower than this is told before that ends.
const PATIENCE: Duration = Duration::from_secs(45);

/// Below this are releases, each with its manifest; elsewhere anybody may have put files.
const RELEASES: &str = "releases/";

/// Files at one time.
const PARALLEL: usize = 16;

/// Tries of one file whose stream breaks off, and the pause after the first, which doubles.
const TRIES: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The code of a problem that another try may get over.
const CUT: &str = "fetch_cut";

/// What kept it from copying. Each has an exit code of its own, by which a cluster's events and
/// scripts can tell them apart.
enum Failure {
    /// The variables do not say where from, or say it wrongly.
    Configuration(Problem),
    /// The store did not give what it was asked for, in time or at all.
    Store(Problem),
    /// There is nothing there, or only a part of a release.
    Incomplete(Problem),
    /// What is there may not be copied: it would leave the folder, or is too much.
    Refused(Problem),
    /// The folder does not take it.
    Folder(Problem),
}

impl Failure {
    fn told(self) -> (u8, Problem) {
        match self {
            Failure::Configuration(problem) => (2, problem),
            Failure::Store(problem) => (3, problem),
            Failure::Incomplete(problem) => (4, problem),
            Failure::Refused(problem) => (5, problem),
            Failure::Folder(problem) => (6, problem),
        }
    }
}

/// `gantry-runner fetch [FOLDER]`.
pub fn main(folder: Option<String>) -> ExitCode {
    let folder = folder.unwrap_or_else(|| DEFAULT_FOLDER.to_owned());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(fetch(&folder)),
        Err(error) => Err(Failure::Folder(Problem::new(
            "fetch_failed",
            "The copy could not begin",
            error.to_string(),
            "Give the container more memory and processes.",
        ))),
    };
    match result {
        Ok((files, bytes)) => {
            eprintln!("{PROGRAM} fetch: {files} files, {bytes} bytes to {folder}");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let (code, problem) = failure.told();
            eprintln!(
                "{PROGRAM} fetch: {}: {}. {}",
                problem.message, problem.cause, problem.remediation
            );
            ExitCode::from(code)
        }
    }
}

async fn fetch(folder: &str) -> Result<(usize, u64), Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let config = S3Config::from_variables(variable).map_err(Failure::Configuration)?;
    let prefix = variable("S3_PREFIX").filter(|prefix| !prefix.trim_matches('/').is_empty());
    let (Some(config), Some(prefix)) = (config, prefix) else {
        return Err(Failure::Configuration(Problem::new(
            "fetch_config",
            "It is not said where to copy from",
            "S3_BUCKET or S3_PREFIX is not set",
            "Set both; a prefix looks like code/my-repl/ or releases/my-repl/ID/.",
        )));
    };
    // With the slash, so that code/my-repl is not code/my-repl-2 as well.
    let prefix = format!("{}/", prefix.trim_matches('/'));
    let place = format!("s3://{}/{prefix}", config.bucket);
    let top = open_folder(folder)?;
    let store = S3Store::open(config);
    let copied = timeout(PATIENCE, copy(&store, &prefix, &place, &top)).await;
    copied.unwrap_or_else(|_| {
        Err(Failure::Store(Problem::new(
            "fetch_timeout",
            format!("{place} was not copied in time"),
            format!("it took longer than {} s", PATIENCE.as_secs()),
            "Look at how the store and the way to it are doing.",
        )))
    })
}

/// What to copy: a release's manifest says, and otherwise the listing.
struct Wanted {
    path: RelativePath,
    key: String,
    expected: Option<ManifestFile>,
}

async fn copy(
    store: &S3Store,
    prefix: &str,
    place: &str,
    top: &Folder,
) -> Result<(usize, u64), Failure> {
    let manifest = match prefix.starts_with(RELEASES) {
        true => store.manifest(prefix).await.map_err(Failure::Store)?,
        false => None,
    };
    let objects =
        store
            .list(prefix, MAX_FILES)
            .await
            .map_err(|problem| match problem.code.as_str() {
                "store_too_many" => Failure::Refused(problem),
                _ => Failure::Store(problem),
            })?;
    let wanted = choose(prefix, place, manifest, &objects)?;
    let copied = Cell::new(0);
    let mut copies = Vec::with_capacity(wanted.len());
    for file in &wanted {
        copies.push(copy_surely(store, top, file, &copied));
    }
    stream::iter(copies)
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await?;
    Ok((wanted.len(), copied.get()))
}

fn choose(
    prefix: &str,
    place: &str,
    manifest: Option<Manifest>,
    objects: &[Object],
) -> Result<Vec<Wanted>, Failure> {
    let incomplete = |cause: String| {
        Failure::Incomplete(Problem::new(
            "fetch_incomplete",
            format!("There is no whole code at {place}"),
            cause,
            "Submit the code again; for code that another service puts there, check S3_BUCKET and S3_PREFIX.",
        ))
    };
    let released = prefix.starts_with(RELEASES);
    if released && manifest.is_none() {
        return Err(incomplete(format!(
            "{} is not there, without which a release is not whole",
            Manifest::key(prefix)
        )));
    }
    let paths: Vec<(String, Option<ManifestFile>)> = match manifest {
        Some(manifest) => manifest
            .files
            .into_iter()
            .map(|(path, file)| (path, Some(file)))
            .collect(),
        None => objects
            .iter()
            // Consoles show folders by empty objects with a slash at the end.
            .filter(|object| !object.key.ends_with('/'))
            .map(|object| (object.key[prefix.len()..].to_owned(), None))
            .collect(),
    };
    if paths.is_empty() && !released {
        return Err(incomplete("nothing is there".to_owned()));
    }
    if paths.len() > MAX_FILES {
        return Err(refused(place, format!("it is more than {MAX_FILES} files")));
    }
    let checked = |(path, expected): (String, Option<ManifestFile>)| {
        let path = RelativePath::try_from(path).map_err(|why| refused(place, why))?;
        let key = format!("{prefix}{}", path.as_str());
        Ok(Wanted {
            path,
            key,
            expected,
        })
    };
    paths.into_iter().map(checked).collect()
}

fn refused(place: &str, cause: String) -> Failure {
    Failure::Refused(Problem::new(
        "fetch_refused",
        format!("{place} is not copied"),
        cause,
        "Put only files with relative paths there, within the bounds.",
    ))
}

/// Copies one file, again when the stream breaks off; requests that fail are repeated below this.
async fn copy_surely(
    store: &S3Store,
    top: &Folder,
    file: &Wanted,
    copied: &Cell<u64>,
) -> Result<(), Failure> {
    let mut pause = FIRST_PAUSE;
    for _ in 1..TRIES {
        let before = copied.get();
        match copy_one(store, top, file, copied).await {
            Err(Failure::Store(problem)) if problem.code == CUT => {
                eprintln!("{PROGRAM} fetch: {problem}; again in {pause:?}");
                copied.set(before);
                sleep(pause).await;
                pause *= 2;
            }
            result => return result,
        }
    }
    copy_one(store, top, file, copied).await
}

async fn copy_one(
    store: &S3Store,
    top: &Folder,
    file: &Wanted,
    copied: &Cell<u64>,
) -> Result<(), Failure> {
    let mut target = create(top, &file.path)?;
    let mut body = store.read(&file.key).await.map_err(Failure::Store)?;
    let (mut digest, mut bytes) = (Sha256::new(), 0);
    while let Some(piece) = body.next().await {
        let piece = piece.map_err(|error| {
            Failure::Store(Problem::new(
                CUT,
                format!("{} broke off after {bytes} bytes", file.key),
                error.to_string(),
                "The pod tries again by itself.",
            ))
        })?;
        bytes += piece.len() as u64;
        copied.set(copied.get() + piece.len() as u64);
        if copied.get() > MAX_BYTES {
            let why = format!("it is more than {MAX_BYTES} bytes in all");
            return Err(refused(&file.key, why));
        }
        digest.update(&piece);
        let written = target.write_all(&piece);
        written.map_err(|error| cannot_write(file.path.as_str(), error.to_string()))?;
    }
    if let Some(expected) = &file.expected
        && (expected.bytes != bytes || expected.sha256 != hexadecimal(&digest.finalize()))
    {
        return Err(Failure::Incomplete(Problem::new(
            "fetch_changed",
            format!("{} is not what was tested", file.key),
            "its content is not the one in the release's manifest",
            "Somebody changed it in the bucket. Submit the code again.",
        )));
    }
    Ok(())
}

fn open_folder(folder: &str) -> Result<Folder, Failure> {
    Folder::open(Path::new(folder)).map_err(|error| cannot_write(folder, error.to_string()))
}

fn cannot_write(path: &str, cause: String) -> Failure {
    Failure::Folder(Problem::new(
        "fetch_folder",
        format!("{path} could not be written"),
        cause,
        "Mount a volume there that this user may write to and that is large enough.",
    ))
}

/// Makes the file and the folders above it. One that a first try of this container left is replaced.
fn create(top: &Folder, path: &RelativePath) -> Result<fs::File, Failure> {
    let path = path.as_str();
    let (folders, name) = path.rsplit_once('/').unwrap_or(("", path));
    let made = || {
        let above = top.make(folders, None)?;
        match above.remove(name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        above.create(name, 0o666)
    };
    made().map_err(|error| cannot_write(path, error.to_string()))
}
