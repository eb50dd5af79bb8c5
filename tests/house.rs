//! The house keeps its shape: which room may use which.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Every edge that may be. `transport → pipeline → platform → runner/client` and
/// `pipeline → journal → logs`; `model` imports nothing of ours and everybody may import it.
const ALLOWED: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("journal", &["model"]),
    ("logs", &["model", "journal"]),
    ("storage", &["model"]),
    // `gantry-runner fetch` copies a release out of the store.
    ("runner", &["model", "storage"]),
    ("platform", &["model", "runner", "storage"]),
    (
        "pipeline",
        &["model", "platform", "runner", "journal", "storage"],
    ),
    ("auth", &["model"]),
    ("config", &["model", "telemetry"]),
    ("telemetry", &[]),
    ("shutdown", &[]),
    (
        "transport",
        &[
            "model", "pipeline", "platform", "journal", "logs", "auth", "config", "shutdown",
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
