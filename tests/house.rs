//! The house keeps its shape: which room may use which.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Every edge that may be. `transport → pipeline → platform → runner/client` and
/// `pipeline → journal → logs`; `model` imports nothing of ours and everybody may import it.
const ALLOWED: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("beneath", &[]),
    ("budget", &[]),
    ("kept", &[]),
    ("websocket", &[]),
    ("journal", &["model"]),
    ("logs", &["model", "journal"]),
    ("storage", &["model", "beneath"]),
    // `gantry-runner fetch` copies a release out of the store.
    ("runner", &["model", "beneath", "storage", "websocket"]),
    (
        "platform",
        &["model", "beneath", "kept", "runner", "storage"],
    ),
    (
        "pipeline",
        &[
            "model", "budget", "platform", "runner", "journal", "storage",
        ],
    ),
    ("auth", &["model", "kept"]),
    ("config", &["model", "telemetry"]),
    ("telemetry", &[]),
    ("shutdown", &[]),
    (
        "transport",
        &[
            "model",
            "budget",
            "pipeline",
            "platform",
            "journal",
            "logs",
            "auth",
            "config",
            "shutdown",
            "websocket",
        ],
    ),
    ("client", &["model"]),
];

/// Files that put the rest together, and may use all of it.
const COMPOSITION: &[&str] = &["app", "main", "bin", "lib"];

/// The only parts of the runner that the server shares with it.
const SHARED_RUNNER: &[&str] = &["wire", "client"];

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

/// `crate::room::inner…` as written in a source, group imports of `crate::{…}` included.
fn edges(text: &str) -> Vec<(String, String)> {
    let word = |text: &str| -> String {
        text.chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let paths: Vec<&str> = match rest.strip_prefix('{') {
            Some(group) => group
                .split('}')
                .next()
                .unwrap_or_default()
                .split(',')
                .collect(),
            None => vec![rest],
        };
        for path in paths {
            let path = path.trim();
            let room = word(path);
            let inner = path
                .strip_prefix(&format!("{room}::"))
                .map(word)
                .unwrap_or_default();
            found.push((room, inner));
        }
    }
    found
}

fn room_of(path: &Path) -> String {
    let inside = path.strip_prefix("src").unwrap();
    let first = inside
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_string_lossy()
        .into_owned();
    first.trim_end_matches(".rs").to_owned()
}

#[test]
fn no_room_uses_one_it_may_not() {
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    let mut files = Vec::new();
    sources(Path::new("src"), &mut files);
    let mut broken = BTreeSet::new();
    let mut seen = 0;
    for file in files {
        let room = room_of(&file);
        if COMPOSITION.contains(&room.as_str()) {
            continue;
        }
        let Some(may) = allowed.get(room.as_str()) else {
            broken.insert(format!("{} is in no known room", file.display()));
            continue;
        };
        for (target, inner) in edges(&std::fs::read_to_string(&file).unwrap()) {
            seen += 1;
            let known = allowed.contains_key(target.as_str());
            if target == room || !known {
                continue;
            }
            if !may.contains(&target.as_str()) {
                broken.insert(format!("{}: {room} → {target}", file.display()));
            }
            if room == "pipeline" && target == "runner" && !SHARED_RUNNER.contains(&inner.as_str())
            {
                broken.insert(format!("{}: pipeline → runner::{inner}", file.display()));
            }
        }
    }
    assert!(
        seen > 100,
        "only {seen} edges were seen: the reading is broken"
    );
    assert!(
        broken.is_empty(),
        "forbidden:\n{}",
        broken.into_iter().collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn a_forbidden_edge_is_seen() {
    let text =
        "use crate::{journal::Journal, model};\nuse crate::runner::job::Job; // crate::logs\n";
    let found = edges(text);
    assert!(found.contains(&("journal".to_owned(), "Journal".to_owned())));
    assert!(found.contains(&("runner".to_owned(), "job".to_owned())));
    assert!(!found.iter().any(|(room, _)| room == "logs"));
}

#[test]
fn only_the_house_stands_at_the_top() {
    let known = [
        "Cargo.toml",
        "Cargo.lock",
        "src",
        "runner-image",
        "infrastructure",
        "scripts",
        "compose.yaml",
        "docs",
        "tests",
        "README.md",
        "LICENSE",
        "target",
        "deny.toml",
        "clippy.toml",
        "rustfmt.toml",
        "typos.toml",
        "rust-toolchain.toml",
    ];
    for entry in std::fs::read_dir(".").unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(
            name.starts_with('.') || known.contains(&name.as_str()),
            "{name}"
        );
    }
}

/// Rooms that work in folders which user code can write to.
const WITH_USERS_FOLDERS: &[&str] = &["src/runner", "src/platform/local", "src/storage"];

/// Calls that reach a file by its path, which somebody may have replaced by a link. `fs::` covers those of
/// `std`, `tokio` and `rustix`.
const BY_PATH: &[&str] = &[
    "fs::",
    "File::open(",
    "File::create",
    "OpenOptions",
    ".symlink_metadata(",
    ".canonicalize(",
    ".read_dir(",
    ".exists(",
    ".unpack_in(",
    ".unpack(",
    "libc::open",
    "libc::chmod",
    "libc::chown",
    "libc::lchown",
];

/// Calls of `rustix::fs` that take a descriptor alone.
const BY_DESCRIPTOR: &[&str] = &[
    "fchown",
    "fchmod",
    "fstat",
    "futimens",
    "flistxattr",
    "fremovexattr",
    "ioctl_getflags",
    "ioctl_setflags",
];

/// Calls by path that may be there: to what no user can write to, or put a link above.
const TO_OWN_FILES: &[(&str, &[&str], &str)] = &[
    (
        "src/platform/local/cgroup.rs",
        &["*"],
        "the kernel's control groups",
    ),
    (
        "src/platform/local/launch.rs",
        &["*"],
        "/proc, and the folder a sandbox is made in",
    ),
    (
        "src/platform/local/hidden.rs",
        &["*"],
        "/proc, whose links to users' files are followed only to ask about them",
    ),
    (
        "src/platform/local/host.rs",
        &["*"],
        "the machine's programs",
    ),
    (
        "src/platform/local/modules.rs",
        &["*"],
        "records of modules",
    ),
    (
        "src/platform/local/modules/install.rs",
        &["*"],
        "the module server's own files, shown read-only",
    ),
    (
        "src/platform/local/modules/store.rs",
        &["*"],
        "packages that the server unpacked, shown read-only",
    ),
    (
        "src/platform/local/releases.rs",
        &["create_dir_all", "rename", "OpenOptions", "File::open("],
        "records of repls",
    ),
    (
        "src/platform/local/stored.rs",
        &["read_dir", "read", "rename"],
        "records of repls and modules",
    ),
    (
        "src/platform/local/sandboxes.rs",
        &[
            "create_dir_all",
            "read_dir",
            "read",
            "write",
            "remove_file",
            "open",
            "File::open(",
            "File::create",
            "canonicalize",
            "rename",
            ".exists(",
        ],
        "what is beside a sandbox's root",
    ),
    (
        "src/storage/directory.rs",
        &["*"],
        "the code store, shown read-only",
    ),
    (
        "src/runner/sandbox.rs",
        &["*"],
        "a sandbox's root, before user code is there",
    ),
    (
        "src/runner/shown.rs",
        &["*"],
        "the machine's programs, and a sandbox's root before user code is there",
    ),
    (
        "src/runner/slot.rs",
        &[
            "create_dir_all",
            "create_dir",
            "remove_dir",
            "open",
            "statfs",
            "metadata",
        ],
        "where a slot's folders are mounted or made, while none of its processes is alive",
    ),
    ("src/runner/network.rs", &["open", "write"], "/proc"),
    ("src/runner/process.rs", &["*"], "/proc and control groups"),
    (
        "src/runner/pod.rs",
        &["*"],
        "the runner's own folder and /proc",
    ),
    (
        "src/runner/pod/app.rs",
        &["access", "write"],
        "what the container's home is, and the kubelet's file for last words",
    ),
    ("src/runner/agent.rs", &["open"], "the root of slots' roots"),
    ("src/runner/line.rs", &["read_to_string"], "/proc/net"),
    ("src/runner/listening.rs", &["File::open("], "/proc/net"),
    ("src/runner/sockets.rs", &["File::open("], "/proc/net"),
    (
        "src/runner/workspace/terminal.rs",
        &["open"],
        "the device that makes terminals",
    ),
];

/// Calls by path in a source, but for its tests: `fs::read(` as `read`.
fn by_path(text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let mut found = Vec::new();
    for line in code
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
    {
        for pattern in BY_PATH {
            for (at, _) in line.match_indices(pattern) {
                let rest = &line[at + pattern.len()..];
                let word: String = rest
                    .chars()
                    .take_while(|c| c.is_alphanumeric() || *c == '_')
                    .collect();
                let call = word.starts_with(|c: char| c.is_lowercase())
                    && !line.trim_start().starts_with("use ")
                    && !BY_DESCRIPTOR.contains(&word.as_str());
                // A function that is imported by its name would not be seen where it is called.
                let import = line.trim_start().starts_with("use ")
                    && rest
                        .split(['{', '}', ',', ';', ' '])
                        .any(|name| name != "self" && name.starts_with(|c: char| c.is_lowercase()));
                match *pattern {
                    "fs::" if call || import => found.push(word),
                    "fs::" => {}
                    other => found.push(other.to_owned()),
                }
            }
        }
    }
    found
}

#[test]
fn users_folders_are_reached_by_descriptor() {
    let mut files = Vec::new();
    for room in WITH_USERS_FOLDERS {
        sources(Path::new(room), &mut files);
    }
    let mut broken = BTreeSet::new();
    for file in &files {
        let name = file.to_str().unwrap();
        let may = TO_OWN_FILES.iter().find(|(file, ..)| *file == name);
        let may = may.map_or(&[][..], |(_, calls, _)| *calls);
        for call in by_path(&std::fs::read_to_string(file).unwrap()) {
            if !may.contains(&"*") && !may.contains(&call.as_str()) {
                broken.insert(format!("{name}: {call}"));
            }
        }
    }
    assert!(files.len() > 30, "only {} files were seen", files.len());
    assert!(
        broken.is_empty(),
        "use gantry::beneath, or say in TO_OWN_FILES why no user can put a link there:\n{}",
        broken.into_iter().collect::<Vec<_>>().join("\n")
    );
}

#[test]
fn a_call_by_path_is_seen() {
    let text = "use std::fs::{self, File};\nuse std::os::unix::fs::{PermissionsExt, chown};\n\
        fs::set_permissions(path, mode)?; let f = File::open(path); // fs::read(path)\n\
        rustix::fs::chmodat(top, name); std::os::unix::fs::fchown(&file, uid, uid);\n\
        #[cfg(test)]\nfs::write(path, text)";
    assert_eq!(
        by_path(text),
        ["", "set_permissions", "File::open(", "chmodat"]
    );
}
