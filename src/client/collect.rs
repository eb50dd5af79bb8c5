//! A folder's files, as a submission carries them: bounded, text only, nothing from outside it.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use super::failure::Failure;
use super::render;
use crate::model::{MAX_MESSAGE_BYTES, RelativePath};

/// Most files the server takes in one submission.
const MAX_FILES: usize = 1_000;
/// Folders that hold what tools made, never what a person wrote.
const SKIPPED_FOLDERS: [&str; 2] = ["node_modules", "__pycache__"];
/// How many of the largest files are named when all together are too big.
const LARGEST_SHOWN: usize = 5;

/// What a folder gave.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Folder {
    pub(super) files: BTreeMap<String, String>,
    /// What was left out that a person may have wanted, each with the reason.
    pub(super) left_out: Vec<String>,
}

/// A file that was found and not read yet.
#[derive(Debug)]
struct Found {
    name: String,
    path: PathBuf,
    bytes: u64,
}

/// Reads every file below `root`; hidden ones, `node_modules` and `__pycache__` excepted.
pub(super) fn folder(root: &Path) -> Result<Folder, Failure> {
    let root = root
        .canonicalize()
        .map_err(|error| unreadable(root, &error))?;
    let mut folder = Folder::default();
    let found = walk(&root, &mut folder.left_out)?;
    let total: u64 = found.iter().map(|file| file.bytes).sum();
    if total > MAX_MESSAGE_BYTES as u64 {
        return Err(too_big(total, &found));
    }
    for file in found {
        match text(&file.path)? {
            Some(text) => {
                folder.files.insert(file.name, text);
            }
            None => folder
                .left_out
                .push(format!("{}: is not UTF-8 text", file.name)),
        }
    }
    if folder.files.is_empty() {
        return Err(Failure::usage(
            format!("{} has no files to send", root.display()),
            "hidden files, node_modules, __pycache__ and files that are not text are left out",
            "Name a folder with the program's source in it.",
        ));
    }
    Ok(folder)
}

fn walk(root: &Path, left_out: &mut Vec<String>) -> Result<Vec<Found>, Failure> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| unreadable(&folder, &error))?;
        for entry in entries {
            let entry = entry.map_err(|error| unreadable(&folder, &error))?;
            let path = entry.path();
            if skipped(&path) {
                continue;
            }
            let kind = entry
                .file_type()
                .map_err(|error| unreadable(&path, &error))?;
            if kind.is_dir() {
                folders.push(path);
                continue;
            }
            if kind.is_symlink() {
                inside(root, &path)?;
            }
            let metadata = fs::metadata(&path).map_err(|error| unreadable(&path, &error))?;
            if metadata.is_dir() {
                return Err(Failure::usage(
                    format!("{} is a symbolic link to a folder", path.display()),
                    "only links to files are followed: links to folders can go in circles",
                    "Put the folder itself there, or remove the link.",
                ));
            }
            let name = relative_name(root, &path)?;
            if !metadata.is_file() {
                // Opening a pipe or a device may wait for ever.
                left_out.push(format!("{name}: is not a regular file"));
                continue;
            }
            if found.len() == MAX_FILES {
                return Err(Failure::usage(
                    format!("{} has more than {MAX_FILES} files", root.display()),
                    format!("a submission has at most {MAX_FILES} files"),
                    "Name the folder that holds the source alone; folders whose name starts with a dot are left out.",
                ));
            }
            found.push(Found {
                name,
                path,
                bytes: metadata.len(),
            });
        }
    }
    Ok(found)
}

fn skipped(path: &Path) -> bool {
    let Some(name) = path.file_name() else {
        return true;
    };
    name.as_encoded_bytes().starts_with(b".")
        || SKIPPED_FOLDERS.iter().any(|folder| name == *folder)
}

/// A link must not bring in what lies outside: `id_rsa` is one link away from being deployed.
fn inside(root: &Path, link: &Path) -> Result<(), Failure> {
    let target = link
        .canonicalize()
        .map_err(|error| unreadable(link, &error))?;
    if target.starts_with(root) {
        return Ok(());
    }
    Err(Failure::usage(
        format!(
            "{} is a symbolic link that leaves the folder",
            link.display()
        ),
        format!("it leads to {}", target.display()),
        "Copy the file into the folder, or remove the link.",
    ))
}

fn relative_name(root: &Path, path: &Path) -> Result<String, Failure> {
    let refuse = |why: String| {
        Failure::usage(
            format!("{} cannot be sent under its name", path.display()),
            why,
            "Rename it: names are UTF-8 text, without backslashes, at most 255 bytes a part.",
        )
    };
    let inner = path.strip_prefix(root).unwrap_or(path);
    let name = inner
        .to_str()
        .ok_or_else(|| refuse("its name is not UTF-8".to_owned()))?;
    let name = RelativePath::try_from(name.to_owned()).map_err(refuse)?;
    Ok(name.into())
}

/// A file's text; `None` when it is not UTF-8. Never reads more than a message can hold.
fn text(path: &Path) -> Result<Option<String>, Failure> {
    let file = fs::File::open(path).map_err(|error| unreadable(path, &error))?;
    read_text(path, file)
}

/// The same for a file that must be text.
pub(super) fn required_text(path: &Path) -> Result<String, Failure> {
    text(path)?.ok_or_else(|| not_text(path))
}

/// The same for what comes in on standard input.
pub(super) fn standard_input() -> Result<String, Failure> {
    let path = Path::new("standard input");
    read_text(path, std::io::stdin().lock())?.ok_or_else(|| not_text(path))
}

fn read_text(path: &Path, source: impl Read) -> Result<Option<String>, Failure> {
    let mut bytes = Vec::new();
    source
        .take(MAX_MESSAGE_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(path, &error))?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(Failure::usage(
            format!("{} is too big", path.display()),
            format!(
                "a submission is one message of at most {}",
                render::bytes(MAX_MESSAGE_BYTES as u64)
            ),
            "Make it smaller, or let the program fetch or make what it needs.",
        ));
    }
    Ok(String::from_utf8(bytes).ok())
}

fn not_text(path: &Path) -> Failure {
    Failure::usage(
        format!("{} is not UTF-8 text", path.display()),
        "a submission is sent as JSON, which holds text only",
        "Save it as UTF-8.",
    )
}

pub(super) fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let remediation = match error.kind() {
        ErrorKind::NotFound => "Check the path.",
        ErrorKind::PermissionDenied => "Check its permissions.",
        _ => "Check the path and what it leads to.",
    };
    Failure::usage(
        format!("{} cannot be read", path.display()),
        error.to_string(),
        remediation,
    )
}

fn too_big(total: u64, found: &[Found]) -> Failure {
    let mut largest: Vec<&Found> = found.iter().collect();
    largest.sort_by_key(|file| std::cmp::Reverse(file.bytes));
    let shown: Vec<String> = largest
        .iter()
        .take(LARGEST_SHOWN)
        .map(|file| {
            format!(
                "{} ({})",
                render::printable(&file.name),
                render::bytes(file.bytes)
            )
        })
        .collect();
    Failure::usage(
        format!("the files are {} together", render::bytes(total)),
        format!(
            "a submission is one message of at most {}; the largest are {}",
            render::bytes(MAX_MESSAGE_BYTES as u64),
            shown.join(", ")
        ),
        "Leave the big ones out: move them out of the folder, or into one whose name starts with a dot.",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::symlink;

    use super::*;

    fn put(root: &Path, name: &str, bytes: &[u8]) {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    #[test]
    fn a_folder_gives_its_source_and_nothing_tools_made() {
        let temp = tempfile::tempdir().unwrap();
        for name in [
            "main.py",
            "lib/a.py",
            ".git/config",
            ".env",
            "node_modules/x/i.js",
            "lib/__pycache__/a.pyc",
        ] {
            put(temp.path(), name, b"x");
        }
        let folder = folder(temp.path()).unwrap();
        assert_eq!(
            folder.files.keys().collect::<Vec<_>>(),
            ["lib/a.py", "main.py"]
        );
        assert!(folder.left_out.is_empty());
    }

    #[test]
    fn links_that_leave_the_folder_are_refused_and_others_followed() {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "secret", b"key");
        put(temp.path(), "project/main.py", b"x");
        let project = temp.path().join("project");
        symlink("main.py", project.join("again.py")).unwrap();
        assert_eq!(folder(&project).unwrap().files["again.py"], "x");

        symlink("../secret", project.join("stolen")).unwrap();
        let refused = folder(&project).unwrap_err();
        assert!(
            refused.problem.message.contains("leaves the folder"),
            "{refused:?}"
        );
        fs::remove_file(project.join("stolen")).unwrap();

        symlink(".", project.join("circle")).unwrap();
        let refused = folder(&project).unwrap_err();
        assert!(
            refused.problem.message.contains("link to a folder"),
            "{refused:?}"
        );
    }

    #[test]
    fn what_cannot_be_sent_is_named() {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "main.py", b"x");
        put(temp.path(), "logo.png", b"\x89PNG\xff");
        std::os::unix::net::UnixListener::bind(temp.path().join("socket")).unwrap();
        let folder = folder(temp.path()).unwrap();
        assert_eq!(folder.files.len(), 1);
        let mut left_out = folder.left_out;
        left_out.sort();
        assert_eq!(
            left_out,
            [
                "logo.png: is not UTF-8 text",
                "socket: is not a regular file"
            ]
        );
    }

    #[test]
    fn too_much_is_refused_with_the_largest_files() {
        let temp = tempfile::tempdir().unwrap();
        put(temp.path(), "main.py", b"x");
        put(temp.path(), "data/big.csv", &vec![b'1'; MAX_MESSAGE_BYTES]);
        let refused = folder(temp.path()).unwrap_err();
        assert!(
            refused.problem.cause.contains("data/big.csv (1.0 MiB)"),
            "{refused:?}"
        );
        assert!(folder(&temp.path().join("missing")).is_err());
        fs::create_dir(temp.path().join("empty")).unwrap();
        assert!(folder(&temp.path().join("empty")).is_err());
    }
}
