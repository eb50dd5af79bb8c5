//! The language table: what Gantry knows about each language it runs.

mod table;

pub use table::LANGUAGES;

use super::entry::{is_for_linux, main_class};
use super::{Install, PackageIndex};

/// The folder of a workspace that compiled output goes to: what is there afterwards is what runs and
/// what is released, beside the files that were sent.
pub const BUILD_FOLDER: &str = ".build";

/// The file of a release that holds [`BUILD_FOLDER`]; a tar archive, compressed with gzip.
pub const BUILD_ARCHIVE: &str = ".build.tar.gz";

/// A language's own runner for test files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestRunner {
    /// Its name, as people know it.
    pub name: &'static str,
    /// Command, which the test files follow; `{reporters}` is the folder with what reports each test.
    pub argv: &'static [&'static str],
    /// What a test file is to the runner: `{file}`, or what it was compiled to.
    pub file: &'static str,
    /// What to install when the command is missing.
    pub install: &'static str,
}

/// What a test command writes to stdout when it ran a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// Nothing: the exit code says it all.
    None,
    /// Anything, unless a line begins so: the test framework, where one is used, ran none.
    Unless(&'static [&'static str]),
    /// `--- PASS: `, as Go's does for each test.
    Go,
    /// `test result: ok. ` at the beginning of a line, with how many passed, as Rust's harness does.
    Rust,
}

impl Proof {
    /// Whether a test ran, as far as this tells.
    pub fn is_in(self, stdout: &str) -> bool {
        let mut lines = stdout.lines();
        match self {
            Proof::None => true,
            Proof::Unless(beginnings) => !lines.any(|line| {
                beginnings
                    .iter()
                    .any(|beginning| line.starts_with(beginning))
            }),
            // What the test wrote last may stand before it.
            Proof::Go => lines.any(|line| line.contains("--- PASS: ")),
            Proof::Rust => lines.any(|line| {
                let rest = line.strip_prefix("test result: ok. ");
                rest.is_some_and(|rest| !rest.starts_with("0 passed"))
            }),
        }
    }
}

/// A command that runs one test file, which passes with exit code 0.
#[derive(Debug, PartialEq, Eq)]
pub struct TestCommand {
    /// The convention's name, as people know it.
    pub name: &'static str,
    /// Command, in which `{file}`, `{stem}` and `{class}` are the test file's, and `{folder}` is its folder.
    pub argv: &'static [&'static str],
    /// Command where the language's project file is among the files.
    pub project: Option<&'static [&'static str]>,
    /// Whether the program's entrypoint is left out of `{sources}`: a test may have an entry of its own.
    pub has_own_entry: bool,
    /// It compiles the test first, and gets what compiling gets.
    pub compiles: bool,
    /// How it tells that a test ran.
    pub proof: Proof,
}

/// What a language's test files are run by.
#[derive(Debug, PartialEq, Eq)]
pub enum TestFiles {
    /// All by one command, which reports test by test.
    Runner(TestRunner),
    /// Each by a command of its own.
    Each(TestCommand),
}

/// A command that has to be there.
#[derive(Debug, PartialEq, Eq)]
pub struct Tool {
    /// Its name.
    pub command: &'static str,
    /// Arguments on which it prints the folder it lives in, where its name may lead to a launcher that
    /// does not work in a sandbox.
    pub home: &'static [&'static str],
    /// How to install it.
    pub install: &'static str,
}

/// How programs are compiled, before anything of them runs.
#[derive(Debug, PartialEq, Eq)]
pub struct Compile {
    /// Command. What it leaves in [`BUILD_FOLDER`], which is there, is kept.
    pub argv: &'static [&'static str],
    /// Command where the language's project file is among the files.
    pub project: Option<&'static [&'static str]>,
}

/// One language.
///
/// In its commands a word can stand for something:
///
/// | word | stands for |
/// |---|---|
/// | `{file}` | the entrypoint's path |
/// | `{stem}` | the same without its extension |
/// | `{class}` | the file's class with a `main`, or the stem's last part, below the package that the file names |
/// | `{script}` | what TypeScript makes of the file |
/// | `{sources}` | every file with one of the language's extensions, but those that [`TestCommand`] runs and other programs |
/// | `{beside}` | those of them that are in the file's folder |
/// | `{folder}` | the folder that the file is in, `.` where it is in none |
/// | `{target}` | arguments that name the program, or the test, of a project to its builder |
/// | `{memory}`, `{stack}` | bytes of memory that the run may use; the same in KiB |
#[derive(Debug, PartialEq, Eq)]
pub struct Language {
    /// The name a submission uses.
    pub name: &'static str,
    /// Other names for it.
    pub aliases: &'static [&'static str],
    /// The file that `code` becomes, and the default of `entrypoint`.
    pub entrypoint: &'static str,
    /// What the entrypoint may be called instead, where there is no file of that name.
    pub others: &'static [&'static str],
    /// Extensions of its files, the entrypoint's first.
    pub extensions: &'static [&'static str],
    /// Extensions of files in other languages that are compiled with its own.
    pub with: &'static [&'static str],
    /// The file that makes a folder a project of it.
    pub project: Option<&'static str>,
    /// Commands it takes to compile and to run.
    pub tools: &'static [Tool],
    /// Beginnings of the names below `/etc` that its commands read.
    pub settings: &'static [&'static str],
    /// Variables of its compiler, unless the submission has its own.
    pub env: &'static [(&'static str, &'static str)],
    /// How its packages are installed, where that is known.
    pub install: Option<Install>,
    /// The compile step, where it has one.
    pub compile: Option<Compile>,
    /// Command that runs a program; its arguments follow.
    pub run: &'static [&'static str],
    /// What runs test files.
    pub tests: TestFiles,
    /// Started ahead of time: a run then costs no interpreter start.
    pub warm: bool,
}

/// What the words in a language's commands stand for.
#[derive(Debug, Clone, Copy)]
pub struct Words<'a> {
    /// The entrypoint's path.
    pub entrypoint: &'a str,
    /// Every file's path.
    pub files: &'a [&'a str],
    /// The entrypoint's text, where it is known.
    pub text: &'a str,
    /// Bytes of memory that the run may use.
    pub memory_bytes: u64,
    /// Arguments that name the program, or the test, to the builder of its project.
    pub target: &'a [String],
}

impl TestFiles {
    /// The name of what runs them.
    pub fn name(&self) -> &'static str {
        match self {
            TestFiles::Runner(runner) => runner.name,
            TestFiles::Each(command) => command.name,
        }
    }
}

impl Language {
    /// The language of this name.
    pub fn named(name: &str) -> Option<&'static Language> {
        LANGUAGES
            .iter()
            .find(|language| language.name == name || language.aliases.contains(&name))
    }

    /// The language whose files have this extension.
    pub fn of_extension(extension: &str) -> Option<&'static Language> {
        LANGUAGES
            .iter()
            .find(|language| language.extensions.contains(&extension))
    }

    /// A command of this language's, its words replaced.
    pub fn fill(&self, command: &[&str], words: &Words<'_>) -> Vec<String> {
        let mut filled = Vec::with_capacity(command.len());
        for part in command {
            if matches!(*part, "{sources}" | "{beside}") {
                let sources = words.files.iter().filter(|path| self.is_compiled(path));
                let beside = |path: &&&str| {
                    *part == "{sources}"
                        || (folder(path) == folder(words.entrypoint) && is_for_linux(path, ""))
                };
                filled.extend(sources.filter(beside).map(|path| argument(path)));
            } else if *part == "{target}" {
                filled.extend(words.target.iter().cloned());
            } else if part.contains('{') {
                filled.push(self.replace(part, words));
            } else {
                filled.push((*part).to_owned());
            }
        }
        filled
    }

    /// The command that compiles these files.
    pub fn compile(&self, words: &Words<'_>) -> Option<Vec<String>> {
        let compile = self.compile.as_ref()?;
        let project = compile.project.filter(|_| self.is_project(words));
        Some(self.fill(project.unwrap_or(compile.argv), words))
    }

    /// The command that runs a test file, which is the words' file.
    pub fn test(&self, command: &TestCommand, words: &Words<'_>) -> Vec<String> {
        let project = command.project.filter(|_| self.is_project(words));
        self.fill(project.unwrap_or(command.argv), words)
    }

    fn is_project(&self, words: &Words<'_>) -> bool {
        self.project.is_some_and(|file| words.files.contains(&file))
    }

    /// What a test file is to the language's test runner.
    pub fn test_file(&self, runner: &TestRunner, path: &str) -> String {
        let words = Words {
            entrypoint: path,
            files: &[],
            text: "",
            memory_bytes: 0,
            target: &[],
        };
        self.replace(runner.file, &words)
    }

    /// The command that starts a project, whose files are in the workspace. `entrypoint` and `text`: the file that
    /// it is run by, and what is in that, as far as it is known. `own`: the project's own command, where it has one.
    /// `index`: where what it depends on may be installed from.
    pub fn start(
        &self,
        entrypoint: &str,
        text: &str,
        own: Option<Vec<String>>,
        index: Option<&PackageIndex>,
    ) -> Vec<String> {
        let words = Words {
            entrypoint,
            files: &[],
            text,
            memory_bytes: super::Limits::DEFAULT.memory_bytes,
            target: &[],
        };
        let run = own.unwrap_or_else(|| self.fill(self.run, &words));
        let install = self.install.as_ref().zip(index);
        let install = install.map(|(install, index)| install.in_shell(index));
        if install.is_none() && self.compile.is_none() {
            return run;
        }
        let run: Vec<String> = run.iter().map(|part| quoted(part)).collect();
        let script = format!(
            "{}{}exec {}",
            install.unwrap_or_default(),
            self.compile_in_shell(&words).unwrap_or_default(),
            run.join(" ")
        );
        ["sh", "-c", &script].map(str::to_owned).to_vec()
    }

    /// What compiles a project in its workspace, if anything does, for what comes after it in a shell.
    fn compile_in_shell(&self, words: &Words<'_>) -> Option<String> {
        let compile = self.compile.as_ref()?;
        let shell = |command: &[&str]| {
            let parts = command.iter().map(|part| match *part {
                "{sources}" | "{beside}" => self.sources_in_shell(),
                // A builder that is told of no program takes the one that its project declares.
                "{target}" => String::new(),
                part => quoted(&self.replace(part, words)),
            });
            parts.collect::<Vec<String>>().join(" ")
        };
        let mut build = shell(compile.argv);
        if let (Some(file), Some(project)) = (self.project, compile.project) {
            build = format!(
                "if [ -f {file} ]; then {}; else {build}; fi",
                shell(project)
            );
        }
        // A file's name may hold spaces, but hardly a line's end.
        Some(format!(
            "set -f; IFS='\n'; mkdir -p {BUILD_FOLDER} && {{ {build}; }} && "
        ))
    }

    /// Every name, for messages.
    pub fn names() -> String {
        let names: Vec<&str> = LANGUAGES.iter().map(|language| language.name).collect();
        names.join(", ")
    }

    /// Whether it is one of its sources.
    pub fn is_source(&self, path: &str) -> bool {
        path.rsplit_once('.')
            .is_some_and(|(_, extension)| self.extensions.contains(&extension))
    }

    /// Whether it is compiled with its sources.
    pub fn is_compiled(&self, path: &str) -> bool {
        let with = path.rsplit_once('.');
        self.is_source(path) || with.is_some_and(|(_, extension)| self.with.contains(&extension))
    }

    fn sources_in_shell(&self) -> String {
        let names = self
            .extensions
            .iter()
            .chain(self.with)
            .map(|extension| format!("-name '*.{extension}'"));
        let names = names.collect::<Vec<String>>().join(" -o ");
        let folders = self.install.as_ref().map_or(&[][..], |one| one.own);
        let installed = folders.iter().map(|folder| format!(" -o -path ./{folder}"));
        let installed: String = installed.collect();
        format!(
            "$(find . \\( -path './.*'{installed} \\) -prune -o -type f \\( {names} \\) -print)"
        )
    }

    fn replace(&self, part: &str, words: &Words<'_>) -> String {
        let stem = words.entrypoint.rsplit_once('.');
        let stem = stem.map_or(words.entrypoint, |(stem, _)| stem);
        let folder = match folder(words.entrypoint) {
            "" => ".",
            folder => folder,
        };
        part.replace("{file}", words.entrypoint)
            .replace("{folder}", folder)
            .replace("{stem}", stem)
            .replace("{script}", &script(words.entrypoint))
            .replace("{class}", &class(stem, words.text))
            .replace("{memory}", &words.memory_bytes.to_string())
            .replace("{stack}", &(words.memory_bytes >> 10).to_string())
    }
}

/// A path that no command takes for an option.
fn argument(path: &str) -> String {
    if path.starts_with('-') {
        format!("./{path}")
    } else {
        path.to_owned()
    }
}

/// The folder of a file, empty at the top.
fn folder(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}

/// What `tsc` makes of a file: an ending keeps its first letter.
fn script(path: &str) -> String {
    for (from, to) in [
        (".mts", ".mjs"),
        (".cts", ".cjs"),
        (".tsx", ".js"),
        (".ts", ".js"),
    ] {
        if let Some(stem) = path.strip_suffix(from) {
            return format!("{stem}{to}");
        }
    }
    path.to_owned()
}

/// A class's whole name: that of the one with a `main`, or the file's own, below the package that its text names.
fn class(stem: &str, text: &str) -> String {
    if let Some(class) = main_class(text) {
        return class;
    }
    let name = stem.rsplit_once('/').map_or(stem, |(_, name)| name);
    let package = text.lines().find_map(|line| {
        let rest = line.trim_start().strip_prefix("package ")?;
        let (package, _) = rest.split_once(';')?;
        Some(package.trim())
    });
    match package {
        Some(package) => format!("{package}.{name}"),
        None => name.to_owned(),
    }
}

/// A word of a shell's command, as it is.
pub(super) fn quoted(part: &str) -> String {
    format!("'{}'", part.replace('\'', "'\\''"))
}

impl serde::Serialize for &'static Language {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> serde::Deserialize<'de> for &'static Language {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        Language::named(&name).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "unknown language {:?}; known are {}",
                name.chars().take(40).collect::<String>(),
                Language::names()
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::HashSet;

    fn words<'a>(entrypoint: &'a str, files: &'a [&'a str], text: &'a str) -> Words<'a> {
        Words {
            entrypoint,
            files,
            text,
            memory_bytes: 64,
            target: &[],
        }
    }

    #[test]
    fn every_name_and_extension_is_one_languages() {
        let (mut names, mut extensions) = (HashSet::new(), HashSet::new());
        for language in LANGUAGES {
            for name in language.aliases.iter().chain([&language.name]) {
                assert!(names.insert(*name), "{name} is there twice");
            }
            for extension in language.extensions {
                assert!(extensions.insert(*extension), "{extension} is there twice");
            }
            let own = language.entrypoint.rsplit_once('.').unwrap().1;
            assert_eq!(Some(&own), language.extensions.first(), "{}", language.name);
            assert!(!language.tools.is_empty(), "{}", language.name);
        }
    }

    #[test]
    fn words_in_commands_stand_for_what_was_sent() {
        let c = Language::named("c").unwrap();
        let files = ["main.c", "lib/-a b.c", "lib/a.h", "-x.c"];
        let compile = c.compile(&words("main.c", &files, "")).unwrap();
        let sources = ["main.c", "lib/-a b.c", "./-x.c"];
        assert!(
            compile.windows(3).any(|part| part == sources),
            "{compile:?}"
        );
        assert!(!compile.contains(&"lib/a.h".to_owned()));
        let go = Language::named("golang").unwrap();
        let compile = |files: &[&str]| go.compile(&words("main.go", files, "")).unwrap();
        assert!(compile(&["main.go"]).contains(&"GO111MODULE=off".to_owned()));
        assert_eq!(compile(&["go.mod", "main.go"]).last().unwrap(), "./.");
        let app = words("cmd/app/main.go", &["go.mod"], "");
        assert_eq!(go.compile(&app).unwrap().last().unwrap(), "./cmd/app");
        let typescript = Language::named("typescript").unwrap();
        let run = typescript.fill(typescript.run, &words("src/a.b.mts", &[], ""));
        assert_eq!(run.last().unwrap(), ".build/src/a.b.mjs");
        let rust = Language::named("rust").unwrap();
        let target = ["--bin".to_owned(), "seed".to_owned()];
        let words_of = Words {
            target: &target,
            ..words("src/bin/seed.rs", &["Cargo.toml"], "")
        };
        let compile = rust.compile(&words_of).unwrap();
        assert!(compile.ends_with(&target), "{compile:?}");
        let java = Language::named("java").unwrap();
        let text = "// first\n  package org.example ;\nclass App {}";
        let run = java.fill(java.run, &words("src/App.java", &[], text));
        assert_eq!(run.last().unwrap(), "org.example.App");
        assert!(run.contains(&"-XX:MaxRAM=64".to_owned()), "{run:?}");
        let text = "class Shelf {}\nclass Shop { public static void main(String[] a) {} }";
        let run = java.fill(java.run, &words("src/App.java", &[], text));
        assert_eq!(run.last().unwrap(), "Shop");
        let python = Language::named("python").unwrap();
        let run = python.fill(python.run, &words("a/start.py", &[], ""));
        assert_eq!(run, ["python3", "a/start.py"]);
    }

    #[test]
    fn a_workspaces_start_compiles_what_has_to_be() {
        let start = |name: &str| {
            let language = Language::named(name).unwrap();
            language.start(language.entrypoint, "", None, None)
        };
        assert_eq!(start("python"), ["python3", "main.py"]);
        let go = start("go");
        assert_eq!(go[..2], ["sh", "-c"]);
        assert!(go[2].contains("if [ -f go.mod ]"), "{}", go[2]);
        assert!(go[2].contains("&& exec 'sh' '-c' "), "{}", go[2]);
        let python = Language::named("python").unwrap();
        let index = PackageIndex::new(python.install.unwrap().registry, None).unwrap();
        let start = python.start("main.py", "", None, Some(&index));
        assert!(
            start[2].contains("Installing what requirements.txt names."),
            "{start:?}"
        );
        assert!(start[2].ends_with("exec 'python3' 'main.py'"), "{start:?}");
        let java = Language::named("java").unwrap();
        let start = java.start("src/App.java", "package shop;", None, None);
        assert!(start[2].ends_with(" 'shop.App'"), "{start:?}");
        let own = ["node", ".", "--port 1"].map(str::to_owned).to_vec();
        let node = Language::named("node").unwrap();
        assert_eq!(node.start("index.js", "", Some(own.clone()), None), own);
        let index = PackageIndex::new(node.install.unwrap().registry, None).unwrap();
        let start = node.start("index.js", "", Some(own), Some(&index));
        assert!(
            start[2].ends_with("exec 'node' '.' '--port 1'"),
            "{start:?}"
        );
        let index = PackageIndex::new(python.install.unwrap().registry, None).unwrap();
        // A shell takes no name for more than a name.
        let start = python.start("it's \"mine\".py", "", None, Some(&index));
        assert!(start[2].ends_with("'it'\\''s \"mine\".py'"), "{start:?}");
    }
}
