//! What stands in a workspace, as far as it is looked at: a program may have made any number of files, at any depth.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::CStr;
use std::io;

use super::files::{Entry, Kind};
use crate::beneath::{self, About, Folder};
use crate::model::{
    BUILD_ARCHIVE, BUILD_FOLDER, MAX_WORKSPACE_DEPTH, MAX_WORKSPACE_ENTRIES,
    MAX_WORKSPACE_FILE_BYTES, RelativePath, WORKSPACE_EXTRAS, stays_inside,
};

/// Most that is looked at. Of what is beyond it nothing is kept; enough of it is seen that this is told.
const MOST_SEEN: usize = 2 * MAX_WORKSPACE_ENTRIES;

/// Most bytes of all their paths and of what links hold: a list of them is sent in one answer.
const MOST_TEXT: usize = 8 << 20;

/// Most that is looked at in one folder, so that one alone does not hide all others.
const MOST_IN_FOLDER: usize = MAX_WORKSPACE_ENTRIES + 1;

/// What stands there.
pub struct Tree {
    /// Folders before what is in them.
    pub entries: Vec<Entry>,
    /// There is more.
    pub cut: bool,
    /// The folders in which there is more, as places in `entries`.
    pub unseen: Vec<usize>,
    /// Folders are deeper than is looked into.
    deep: bool,
    /// Bytes of text in the entries.
    text: usize,
}

impl Tree {
    /// All below this folder, but for what is in the folders `made`. Folders near the top are looked into first, and
    /// compiled output last.
    pub fn of(top: &Folder, made: &[&str]) -> io::Result<Self> {
        let mut tree = Self {
            entries: Vec::new(),
            cut: false,
            unseen: Vec::new(),
            deep: false,
            text: 0,
        };
        let mut waiting = VecDeque::from([(None, 0)]);
        let mut last = VecDeque::new();
        while let Some((at, depth)) = waiting.pop_front().or_else(|| last.pop_front()) {
            if tree.entries.len() == MOST_SEEN || tree.text > MOST_TEXT {
                tree.cut = true;
                let unseen = [at]
                    .into_iter()
                    .chain(waiting.drain(..).chain(last.drain(..)).map(|(at, _)| at));
                tree.unseen.extend(unseen.flatten());
                break;
            }
            let above = at.map_or(String::new(), |at: usize| tree.entries[at].path.clone());
            let begin = tree.entries.len();
            let opened = match &*above {
                "" => top.try_clone(),
                above => top.folder(above),
            };
            let looked = opened.and_then(|folder| tree.look(&folder, &above));
            if let (Ok(true), Some(at)) = (&looked, at) {
                tree.unseen.push(at);
            }
            if let Err(error) = looked {
                use io::ErrorKind::{NotADirectory, NotFound};
                match at {
                    None => return Err(error),
                    // It vanished.
                    Some(_) if [NotFound, NotADirectory].contains(&error.kind()) => {}
                    Some(at) => {
                        let entry = &mut tree.entries[at];
                        entry.closed = true;
                        entry.unkept = Some(format!("it cannot be looked into: {error}"));
                    }
                }
            }
            for at in begin..tree.entries.len() {
                let entry = &mut tree.entries[at];
                if entry.kind != Kind::Folder || entry.unkept.is_some() {
                    continue;
                }
                if made.contains(&&*entry.path) {
                    entry.made = true;
                } else if depth == MAX_WORKSPACE_DEPTH {
                    tree.deep = true;
                    entry.unkept = Some(format!("it is deeper than {MAX_WORKSPACE_DEPTH} folders"));
                } else if entry.path == BUILD_FOLDER || above.starts_with(BUILD_FOLDER) {
                    last.push_back((Some(at), depth + 1));
                } else {
                    waiting.push_back((Some(at), depth + 1));
                }
            }
        }
        Ok(tree)
    }

    /// Whether not all of it can be kept.
    pub fn is_too_much(&self) -> bool {
        self.cut || self.deep || self.entries.len() > MAX_WORKSPACE_ENTRIES
    }

    /// Adds those of these files that are there and were not seen.
    pub fn add(&mut self, top: &Folder, files: &BTreeSet<String>) {
        let seen: BTreeSet<&str> = self.entries.iter().map(|entry| &*entry.path).collect();
        let unseen: Vec<&String> = files
            .iter()
            .filter(|path| !seen.contains(path.as_str()))
            .collect();
        for path in unseen {
            if let Ok(about) = top.about_path(path)
                && about.kind == beneath::Kind::File
            {
                self.entries.push(entry(path.clone(), true, &about, None));
            }
        }
    }

    /// What is in this folder itself; whether there is more than is looked at.
    fn look(&mut self, folder: &Folder, above: &str) -> io::Result<bool> {
        let begin = self.entries.len();
        let room = (MOST_SEEN - begin).min(MOST_IN_FOLDER);
        let mut full = false;
        let looked = folder.each(|name, _| {
            full = self.entries.len() - begin == room || self.text > MOST_TEXT;
            if full {
                return Err(io::Error::other("there is more"));
            }
            // One that vanished is passed over.
            if let Ok(about) = folder.about(name) {
                let entry = found(folder, above, name, &about);
                self.text += entry.path.len() + entry.link.as_ref().map_or(0, String::len);
                self.entries.push(entry);
            }
            Ok(())
        });
        self.entries[begin..].sort_by(|a, b| a.path.cmp(&b.path));
        self.cut |= full;
        if full {
            return Ok(true);
        }
        looked.map(|()| false)
    }
}

fn found(folder: &Folder, above: &str, name: &CStr, about: &About) -> Entry {
    let text = name.to_string_lossy();
    let path = match above {
        "" => text.clone().into_owned(),
        above => format!("{above}/{text}"),
    };
    let link = match about.kind {
        beneath::Kind::Link => folder.link_content(name).ok(),
        _ => None,
    };
    let link = link.and_then(|content| content.into_string().ok());
    entry(path, name.to_str().is_ok(), about, link)
}

fn entry(path: String, is_text: bool, about: &About, link: Option<String>) -> Entry {
    let kind = match about.kind {
        // What has a name that is no text cannot be asked for.
        _ if !is_text => Kind::Other,
        beneath::Kind::File => Kind::File,
        beneath::Kind::Folder => Kind::Folder,
        beneath::Kind::Link | beneath::Kind::Other => Kind::Other,
    };
    Entry {
        unkept: why_unkept(&path, is_text, about, link.as_deref()),
        executable: kind == Kind::File && about.mode & 0o111 != 0,
        kind,
        size: about.size,
        modified: about.modified,
        made: false,
        closed: false,
        path,
        link,
    }
}

/// Why something is not kept whatever else there is.
fn why_unkept(path: &str, is_text: bool, about: &About, link: Option<&str>) -> Option<String> {
    let why = if !is_text {
        "its name is no UTF-8 text"
    } else if RelativePath::try_from(path.to_owned()).is_err() {
        "its path has a backslash or is longer than 1024 bytes"
    } else if [BUILD_ARCHIVE, WORKSPACE_EXTRAS].contains(&path) {
        "Gantry uses this name itself"
    } else {
        match about.kind {
            beneath::Kind::File if about.size > MAX_WORKSPACE_FILE_BYTES => {
                return Some(format!(
                    "it is larger than {MAX_WORKSPACE_FILE_BYTES} bytes"
                ));
            }
            beneath::Kind::File | beneath::Kind::Folder => return None,
            beneath::Kind::Link => match link {
                None => "the link holds no UTF-8 text",
                Some(target) if stays_inside(path, target) => return None,
                Some(_) => "the link leads out of the workspace",
            },
            beneath::Kind::Other => "it is a pipe, a socket or a device",
        }
    };
    Some(why.to_owned())
}
