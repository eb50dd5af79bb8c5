//! The binaries of a Cargo project, found as Cargo finds them.

use std::collections::BTreeSet;

use serde::Deserialize;

use super::{Files, text};

/// The project's file.
pub const MANIFEST: &str = "Cargo.toml";

/// One binary of a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// Its package.
    pub package: String,
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: String,
}

impl Binary {
    /// Arguments that name it to Cargo.
    pub fn arguments(&self) -> Vec<String> {
        ["--package", &self.package, "--bin", &self.name]
            .map(str::to_owned)
            .to_vec()
    }
}

/// What can be run of a project.
#[derive(Debug)]
pub struct Project {
    /// All that there is to choose from.
    pub binaries: Vec<Binary>,
    /// Names that packages have declared to be run.
    default: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Manifest {
    package: Option<Package>,
    bin: Vec<Target>,
    test: Vec<Target>,
    workspace: Option<Workspace>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Package {
    name: String,
    default_run: Option<String>,
    autobins: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Target {
    name: String,
    path: Option<String>,
    harness: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Workspace {
    members: Vec<String>,
    default_members: Vec<String>,
    exclude: Vec<String>,
}

impl Project {
    /// The one of the manifest at the top; `None`: it cannot be read.
    pub fn of(files: &Files) -> Option<Self> {
        let top: Manifest = toml::from_str(text(files, MANIFEST)?).ok()?;
        let mut project = Self {
            binaries: Vec::new(),
            default: Vec::new(),
        };
        // A package at the top is what Cargo runs there, unless the workspace says otherwise.
        let members = match (&top.package, &top.workspace) {
            (Some(_), Some(workspace)) if !workspace.default_members.is_empty() => {
                members(files, workspace)
            }
            (Some(_), _) => vec![String::new()],
            (None, Some(workspace)) => members(files, workspace),
            (None, None) => Vec::new(),
        };
        for folder in members {
            let manifest = text(files, &format!("{folder}{MANIFEST}"))?;
            project.add(files, &folder, toml::from_str(manifest).ok()?);
        }
        Some(project)
    }

    /// The one that Cargo runs without being told which.
    pub fn chosen(&self) -> Option<&Binary> {
        match (&self.default[..], &self.binaries[..]) {
            ([name], _) => self.binaries.iter().find(|one| one.name == *name),
            (_, [only]) => Some(only),
            _ => None,
        }
    }

    /// Adds a package's; its folder ends with a slash, but the top one.
    fn add(&mut self, files: &Files, folder: &str, manifest: Manifest) {
        let Some(package) = manifest.package else {
            return;
        };
        self.default.extend(package.default_run);
        let mut found = Vec::new();
        for target in manifest.bin {
            let path = target.path.unwrap_or_else(|| {
                let usual = [
                    format!("src/bin/{}.rs", target.name),
                    format!("src/bin/{}/main.rs", target.name),
                ];
                let there = |path: &&String| text(files, &format!("{folder}{path}")).is_some();
                let found = usual.iter().find(there);
                found.map_or("src/main.rs", String::as_str).to_owned()
            });
            found.push((target.name, normal(&format!("{folder}{path}"))));
        }
        if package.autobins != Some(false) {
            let main = format!("{folder}src/main.rs");
            if text(files, &main).is_some() {
                found.push((package.name.clone(), main));
            }
            let bins = format!("{folder}src/bin/");
            for path in files.keys() {
                let rest = path.as_str().strip_prefix(&bins);
                let name = rest.and_then(|rest| {
                    let file = rest.strip_suffix(".rs").filter(|name| !name.contains('/'));
                    file.or_else(|| {
                        rest.strip_suffix("/main.rs")
                            .filter(|name| !name.contains('/'))
                    })
                });
                if let Some(name) = name {
                    found.push((name.to_owned(), path.to_string()));
                }
            }
        }
        let (mut names, mut paths) = (BTreeSet::new(), BTreeSet::new());
        for (name, path) in found {
            // One that is declared stands for the one that would be found.
            if names.insert(name.clone()) & paths.insert(path.clone()) {
                self.binaries.push(Binary {
                    package: package.name.clone(),
                    name,
                    path,
                });
            }
        }
    }
}

/// The folder of the package that a file is in, and the path of the package's manifest.
fn package_of<'a>(files: &Files, path: &'a str) -> (&'a str, String) {
    let mut folder = super::folder(path);
    while !folder.is_empty() && text(files, &format!("{folder}/{MANIFEST}")).is_none() {
        folder = super::folder(folder);
    }
    let place = match folder {
        "" => MANIFEST.to_owned(),
        folder => format!("{folder}/{MANIFEST}"),
    };
    (folder, place)
}

/// The test that the package declares for this file, if it declares one.
fn declared_test(files: &Files, path: &str) -> Option<Target> {
    let (folder, place) = package_of(files, path);
    let manifest: Manifest = toml::from_str(text(files, &place)?).ok()?;
    let rest = path[folder.len()..].trim_start_matches('/');
    manifest.test.into_iter().find(|test| match &test.path {
        Some(path) => normal(path) == rest,
        None => [".rs", "/main.rs"]
            .iter()
            .any(|end| rest == format!("tests/{}{end}", test.name)),
    })
}

/// Whether this test file brings its own `main`, which prints what it likes: Cargo's harness is off.
pub fn has_own_harness(files: &Files, path: &str) -> bool {
    declared_test(files, path).is_some_and(|test| test.harness == Some(false))
}

/// Arguments by which Cargo tests what is in this file.
pub fn test_target(files: &Files, path: &str) -> Vec<String> {
    let (folder, place) = package_of(files, path);
    let rest = path[folder.len()..].trim_start_matches('/');
    let manifest = text(files, &place).and_then(|text| toml::from_str::<Manifest>(text).ok());
    let package = manifest.and_then(|manifest| manifest.package);
    let mut arguments = Vec::new();
    if let (Some(package), false) = (&package, folder.is_empty()) {
        arguments.extend(["--package".to_owned(), package.name.clone()]);
    }
    let mut project = Project {
        binaries: Vec::new(),
        default: Vec::new(),
    };
    if let Some(manifest) = text(files, &place).and_then(|text| toml::from_str(text).ok()) {
        let folder = place.strip_suffix(MANIFEST).unwrap_or_default().to_owned();
        project.add(files, &folder, manifest);
    }
    let binary = project.binaries.iter().find(|binary| binary.path == path);
    let has_library = text(files, &place.replace(MANIFEST, "src/lib.rs")).is_some();
    let stem = rest
        .strip_suffix("/main.rs")
        .or_else(|| rest.strip_suffix(".rs"));
    let stem = stem.unwrap_or(rest);
    let more = match (binary, rest.strip_prefix("src/")) {
        (Some(binary), _) => vec!["--bin".to_owned(), binary.name.clone()],
        (None, Some("lib.rs")) => vec!["--lib".to_owned()],
        // A module's own tests have its name before theirs.
        (None, Some(_)) => {
            let module = stem.trim_start_matches("src/").trim_end_matches("/mod");
            let whole = if has_library { "--lib" } else { "--bins" };
            vec![
                whole.to_owned(),
                "--".to_owned(),
                format!("{}::", module.replace('/', "::")),
            ]
        }
        (None, None) => {
            let name = stem.rsplit('/').next().unwrap_or(stem).to_owned();
            let declared = declared_test(files, path);
            vec!["--test".to_owned(), declared.map_or(name, |test| test.name)]
        }
    };
    arguments.extend(more);
    arguments
}

/// The folders of a workspace's packages that are run without being named, each with a slash at its end.
fn members(files: &Files, workspace: &Workspace) -> Vec<String> {
    let patterns = match workspace.default_members.is_empty() {
        true => &workspace.members,
        false => &workspace.default_members,
    };
    let paths = files.keys().map(|path| path.as_str());
    let folders = paths.filter_map(|path| {
        let folder = path.strip_suffix(MANIFEST)?;
        let name = folder.strip_suffix('/').unwrap_or(".");
        let named = patterns.iter().any(|pattern| fits(pattern, name));
        let excluded = workspace.exclude.iter().any(|pattern| fits(pattern, name));
        (named && !excluded).then(|| folder.to_owned())
    });
    folders.collect()
}

/// Whether a folder is meant by a workspace's pattern, in which a whole part may be `*`.
fn fits(pattern: &str, folder: &str) -> bool {
    let pattern = pattern.trim_start_matches("./").trim_end_matches('/');
    let (mut parts, mut own) = (pattern.split('/'), folder.split('/'));
    loop {
        match (parts.next(), own.next()) {
            (None, None) => return true,
            (Some(part), Some(own)) if part_fits(part, own) => {}
            _ => return false,
        }
    }
}

fn part_fits(part: &str, own: &str) -> bool {
    match part.split_once('*') {
        None => part == own,
        Some((before, after)) => {
            own.len() >= before.len() + after.len()
                && own.starts_with(before)
                && own.ends_with(after)
        }
    }
}

fn normal(path: &str) -> String {
    path.trim_start_matches("./").replace("/./", "/")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::files;
    use super::*;

    fn names(project: &Project) -> Vec<(&str, &str)> {
        let binaries = project.binaries.iter();
        binaries
            .map(|one| (one.name.as_str(), one.path.as_str()))
            .collect()
    }

    #[test]
    fn binaries_are_those_that_cargo_finds() {
        let manifest =
            "[package]\nname = \"app\"\n[[bin]]\nname = \"server\"\npath = \"./src/main.rs\"\n";
        let several = files(&[
            ("Cargo.toml", manifest),
            ("src/main.rs", ""),
            ("src/bin/seed.rs", ""),
            ("src/bin/migrate/main.rs", ""),
            ("src/bin/migrate/steps.rs", ""),
        ]);
        let project = Project::of(&several).unwrap();
        let expected = [
            ("server", "src/main.rs"),
            ("migrate", "src/bin/migrate/main.rs"),
            ("seed", "src/bin/seed.rs"),
        ];
        assert_eq!(names(&project), expected);
        assert_eq!(project.chosen(), None);
        let declared = manifest.replace("\"app\"", "\"app\"\ndefault-run = \"seed\"");
        let declared = files(&[("Cargo.toml", &declared), ("src/bin/seed.rs", "")]);
        let project = Project::of(&declared).unwrap();
        assert_eq!(project.chosen().unwrap().path, "src/bin/seed.rs");
        let closed = "[package]\nname = \"app\"\nautobins = false\n";
        let closed = files(&[("Cargo.toml", closed), ("src/main.rs", "")]);
        assert!(Project::of(&closed).unwrap().binaries.is_empty());
        assert!(Project::of(&files(&[("Cargo.toml", "[package")])).is_none());
    }

    #[test]
    fn a_test_file_is_the_target_that_it_is_in() {
        let project = files(&[
            (
                "Cargo.toml",
                "[package]\nname = \"app\"\n[workspace]\n[[test]]\nname = \"plain\"\nharness = false\n\
                 [[test]]\nname = \"far\"\npath = \"./checks/it.rs\"\n",
            ),
            ("src/lib.rs", ""),
            ("src/main.rs", ""),
            ("src/cart/mod.rs", ""),
            ("tests/whole.rs", ""),
            ("tests/other/main.rs", ""),
            ("tool/Cargo.toml", "[package]\nname = \"tool\"\n"),
            ("tool/tests/it.rs", ""),
        ]);
        for (path, arguments) in [
            ("src/lib.rs", "--lib"),
            ("src/main.rs", "--bin app"),
            ("src/cart/mod.rs", "--lib -- cart::"),
            ("tests/whole.rs", "--test whole"),
            ("tests/other/main.rs", "--test other"),
            ("tool/tests/it.rs", "--package tool --test it"),
            ("tests/plain.rs", "--test plain"),
            ("checks/it.rs", "--test far"),
        ] {
            assert_eq!(test_target(&project, path).join(" "), arguments, "{path}");
            assert_eq!(
                has_own_harness(&project, path),
                path == "tests/plain.rs",
                "{path}"
            );
        }
    }

    #[test]
    fn a_workspaces_packages_are_its_members() {
        let package = |name: &str| format!("[package]\nname = \"{name}\"\n");
        let workspace = files(&[
            (
                "Cargo.toml",
                "[workspace]\nmembers = [\"crates/*\", \"./tool\"]\nexclude = [\"crates/old\"]\n",
            ),
            ("crates/one/Cargo.toml", &package("one")),
            ("crates/one/src/main.rs", ""),
            ("crates/old/Cargo.toml", &package("old")),
            ("crates/old/src/main.rs", ""),
            ("crates/lib/Cargo.toml", &package("lib")),
            ("crates/lib/src/lib.rs", ""),
            ("tool/Cargo.toml", &package("tool")),
            ("tool/src/main.rs", ""),
        ]);
        let project = Project::of(&workspace).unwrap();
        let expected = [
            ("one", "crates/one/src/main.rs"),
            ("tool", "tool/src/main.rs"),
        ];
        assert_eq!(names(&project), expected);
        assert_eq!(
            project.binaries[1].arguments(),
            ["--package", "tool", "--bin", "tool"]
        );
    }
}
