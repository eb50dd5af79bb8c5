//! Which of a submission's files is run: the one that the message names, the one that the project's own file
//! declares, the one with the usual name, or the only one that can be meant. Where that is not one file, the
//! submission is refused with those that could be meant.

mod cargo;
mod declared;
mod scan;

use std::collections::BTreeMap;

pub use cargo::{Binary, has_own_harness, test_target};
pub use declared::{Start, start};
use scan::runs_as_module;
pub use scan::{folder, is_for_linux, is_program, main_class};

use super::{FieldError, Language, RelativePath};

/// The files of a submission.
pub type Files = BTreeMap<RelativePath, String>;

/// Most candidates that a refusal names.
const MAX_NAMED: usize = 8;

/// What a submission runs, once its files are known to be good.
#[derive(Debug)]
pub struct Choice<'a> {
    /// Its language.
    pub language: &'static Language,
    /// All its files, test files included.
    pub files: &'a Files,
    /// Which of them are test files.
    pub tests: &'a [RelativePath],
}

impl Choice<'_> {
    /// The file that is run; `None`: there are only a library and its tests. `named`: what the message names.
    pub fn entrypoint(
        &self,
        named: Option<RelativePath>,
    ) -> Result<Option<RelativePath>, FieldError> {
        if let Some(path) = named {
            return self.checked(path).map(Some);
        }
        match self.language.name {
            "rust" if self.has(cargo::MANIFEST) => self.of_cargo(),
            "go" if self.has("go.mod") => self.of_module(),
            _ => self.of_files(),
        }
    }

    fn has(&self, path: &str) -> bool {
        self.text(path).is_some()
    }

    fn text(&self, path: &str) -> Option<&str> {
        text(self.files, path)
    }

    /// The file that the message names, if it can be run.
    fn checked(&self, path: RelativePath) -> Result<RelativePath, FieldError> {
        if !self.files.contains_key(&path) {
            let why = format!("{path} is not one of the files");
            return Err(FieldError::new("entrypoint", why));
        }
        let names: Vec<String> = match self.language.name {
            "rust" if self.has(cargo::MANIFEST) => {
                let Some(project) = cargo::Project::of(self.files) else {
                    return Ok(path);
                };
                let binaries = project.binaries.into_iter();
                binaries.map(|binary| binary.path).collect()
            }
            "go" if self.has("go.mod") => {
                let below = scan::folder(path.as_str());
                let programs = self.programs();
                if programs
                    .iter()
                    .any(|one| scan::folder(one.as_str()) == below)
                {
                    return Ok(path);
                }
                programs.iter().map(ToString::to_string).collect()
            }
            _ => return Ok(path),
        };
        match names.iter().any(|name| name == path.as_str()) {
            true => Ok(path),
            false => Err(FieldError::new(
                "entrypoint",
                format!(
                    "{path} is no program of the project; its programs are {}",
                    listed(&names)
                ),
            )),
        }
    }

    /// Of a Cargo project: its `default-run`, or its only binary.
    fn of_cargo(&self) -> Result<Option<RelativePath>, FieldError> {
        let Some(project) = cargo::Project::of(self.files) else {
            // Cargo says what is wrong with the file.
            return self.of_files();
        };
        match project.chosen() {
            Some(binary) => Ok(RelativePath::try_from(binary.path.clone()).ok()),
            None if project.binaries.is_empty() => self.none("a binary"),
            None => {
                let names = project.binaries.iter().map(|one| one.path.clone());
                Err(ambiguous(
                    &names.collect::<Vec<_>>(),
                    "Cargo.toml has no default-run",
                ))
            }
        }
    }

    /// Of a Go module: its only folder with a program.
    fn of_module(&self) -> Result<Option<RelativePath>, FieldError> {
        let mut programs = self.programs();
        programs.dedup_by_key(|path| scan::folder(path.as_str()).to_owned());
        self.only(&programs, "package main and func main")
    }

    fn of_files(&self) -> Result<Option<RelativePath>, FieldError> {
        let own: Vec<&RelativePath> = self.own().collect();
        let declared = declared::entrypoint(self.language, self.files);
        // A start script that names no file is run as it is.
        if declared.is_none() && declared::start(self.language, self.files, None).is_some() {
            return Ok(None);
        }
        let compiles = scan::has_main_words(self.language.name);
        let usual = std::iter::once(&self.language.entrypoint).chain(self.language.others);
        let usual = usual.filter_map(|path| RelativePath::try_from((*path).to_owned()).ok());
        let mut known = declared.into_iter().chain(usual);
        if let Some(path) = known.find(|path| {
            let there = own.contains(&path);
            // The usual name is another program's where this one has no `main`.
            there && (!compiles || self.tests.is_empty() || self.is_main(path))
        }) {
            return Ok(Some(path));
        }
        match &own[..] {
            [] => return self.none("a program"),
            [only] if self.is_alone(only) => return Ok(Some((*only).clone())),
            _ => {}
        }
        if compiles {
            return self.only(&self.programs(), scan::has_main(self.language.name));
        }
        let sources: Vec<&RelativePath> = own
            .into_iter()
            .filter(|path| self.language.is_source(path.as_str()))
            .collect();
        self.only(
            &scan::nobodys(self.language.name, &sources, self.files),
            "no other file imports",
        )
    }

    /// Files that are no tests.
    fn own(&self) -> impl Iterator<Item = &RelativePath> {
        let files = self.files.keys();
        files.filter(|path| !self.tests.contains(path))
    }

    /// Whether the only file is the program, and not a library of which only tests make use.
    fn is_alone(&self, path: &RelativePath) -> bool {
        if self.tests.is_empty() {
            return true;
        }
        let text = self.text(path.as_str()).unwrap_or_default();
        match scan::has_main_words(self.language.name) {
            true => self.is_main(path),
            false => !scan::is_library(self.language.name, text),
        }
    }

    fn is_main(&self, path: &RelativePath) -> bool {
        let text = self.text(path.as_str()).unwrap_or_default();
        scan::is_program(self.language.name, path.as_str(), text)
    }

    /// Sources in which a program begins.
    fn programs(&self) -> Vec<RelativePath> {
        self.own()
            .filter(|path| self.language.is_source(path.as_str()) && self.is_main(path))
            .cloned()
            .collect()
    }

    fn only(
        &self,
        candidates: &[RelativePath],
        what: &str,
    ) -> Result<Option<RelativePath>, FieldError> {
        match candidates {
            [] => self.none(&format!("a file that has {what}")),
            [only] => Ok(Some(only.clone())),
            several => {
                let names: Vec<String> = several.iter().map(ToString::to_string).collect();
                Err(ambiguous(&names, "more than one file can be meant"))
            }
        }
    }

    /// Nothing can be run: right for a library with tests.
    fn none(&self, what: &str) -> Result<Option<RelativePath>, FieldError> {
        match self.tests.is_empty() {
            false => Ok(None),
            true => {
                let usual = self.language.entrypoint;
                let why = format!(
                    "{usual} is not one of the files, and none of them is {what}: name the file to run, or send tests"
                );
                Err(FieldError::new("entrypoint", why))
            }
        }
    }
}

fn ambiguous(names: &[String], why: &str) -> FieldError {
    FieldError::new(
        "entrypoint",
        format!(
            "is required: {why}; name one of {} as the entrypoint",
            listed(names)
        ),
    )
}

fn listed(names: &[String]) -> String {
    let shown = names.len().min(MAX_NAMED);
    let more = names.len() - shown;
    let list = names[..shown].join(", ");
    match (shown, more) {
        (0, _) => "none".to_owned(),
        (_, 0) => list,
        _ => format!("{list} and {more} more"),
    }
}

/// The command that runs the project's program, where that is not its language's own. `entrypoint`: the file that
/// was chosen.
pub fn command(
    language: &Language,
    files: &Files,
    entrypoint: Option<&RelativePath>,
) -> Option<Vec<String>> {
    if let Some(start) = start(language, files, entrypoint) {
        return Some(start.argv);
    }
    let path = entrypoint?;
    let text = files.get(path).map_or("", String::as_str);
    // Relative imports are those of a module of a package.
    runs_as_module(path.as_str(), text).then(|| {
        let module = path.as_str().trim_end_matches(".py").replace('/', ".");
        vec!["python3".to_owned(), "-m".to_owned(), module]
    })
}

/// Whether this file says what the project's program is.
pub fn declares(language: &Language, path: &str) -> bool {
    match language.name {
        "rust" => path == cargo::MANIFEST || path.ends_with("/Cargo.toml"),
        "node" | "typescript" => path == declared::PACKAGE,
        _ => false,
    }
}

/// A file's text.
pub fn text<'a>(files: &'a Files, path: &str) -> Option<&'a str> {
    let (_, text) = files.iter().find(|(known, _)| known.as_str() == path)?;
    Some(text)
}

/// The name of the file that a submission's `code` is.
pub fn name_of_code(language: &Language, code: &str) -> String {
    // A public class of Java is in a file of its name.
    let class = (language.name == "java")
        .then(|| scan::public_class(code))
        .flatten();
    class.map_or(language.entrypoint.to_owned(), |class| {
        format!("{class}.java")
    })
}

/// The binary of the Cargo project that this file is.
pub fn binary(files: &Files, entrypoint: &str) -> Option<Binary> {
    let project = cargo::Project::of(files)?;
    let mut binaries = project.binaries.into_iter();
    binaries.find(|binary| binary.path == entrypoint)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    pub(super) fn files(all: &[(&str, &str)]) -> Files {
        let owned = |(path, text): &(&str, &str)| {
            let path = RelativePath::try_from((*path).to_owned()).unwrap();
            (path, (*text).to_owned())
        };
        all.iter().map(owned).collect()
    }

    /// What is run of these files: a path, `none`, or why it cannot be told.
    fn chosen(language: &str, all: &[(&str, &str)], tests: &[&str]) -> String {
        named(language, all, tests, None)
    }

    fn named(
        language: &str,
        all: &[(&str, &str)],
        tests: &[&str],
        entrypoint: Option<&str>,
    ) -> String {
        let path = |path: &&str| RelativePath::try_from((*path).to_owned()).unwrap();
        let tests: Vec<RelativePath> = tests.iter().map(path).collect();
        let choice = Choice {
            language: Language::named(language).unwrap(),
            files: &files(all),
            tests: &tests,
        };
        match choice.entrypoint(entrypoint.map(|name| path(&name))) {
            Ok(Some(path)) => path.to_string(),
            Ok(None) => "none".to_owned(),
            Err(error) => error.to_string(),
        }
    }

    const PACKAGE: &str = "[package]\nname = \"shop\"\n";
    const MAIN: &str = "fn main() {}\n";

    #[test]
    fn a_cargo_projects_program_is_its_default_its_only_one_or_the_named_one() {
        let several = [
            ("Cargo.toml", PACKAGE),
            ("src/main.rs", MAIN),
            ("src/bin/seed.rs", MAIN),
            ("src/bin/migrate.rs", MAIN),
        ];
        let why = chosen("rust", &several, &[]);
        for candidate in ["src/main.rs", "src/bin/seed.rs", "src/bin/migrate.rs"] {
            assert!(why.contains(candidate), "{why}");
        }
        assert!(why.starts_with("entrypoint: is required"), "{why}");
        let seed = named("rust", &several, &[], Some("src/bin/seed.rs"));
        assert_eq!(seed, "src/bin/seed.rs");
        let other = named("rust", &several[..3], &[], Some("Cargo.toml"));
        assert!(other.contains("is no program of the project"), "{other}");
        let default = "[package]\nname = \"shop\"\ndefault-run = \"migrate\"\n";
        let mut declared = several;
        declared[0].1 = default;
        assert_eq!(chosen("rust", &declared, &[]), "src/bin/migrate.rs");
        assert_eq!(chosen("rust", &several[..2], &[]), "src/main.rs");
        let library = [
            ("Cargo.toml", PACKAGE),
            ("src/lib.rs", ""),
            ("tests/a.rs", ""),
        ];
        assert_eq!(chosen("rust", &library, &["tests/a.rs"]), "none");
        assert!(chosen("rust", &library, &[]).contains("or send tests"));
    }

    #[test]
    fn a_go_modules_program_is_its_only_one_or_the_named_one() {
        let main = "package main\n\nfunc main() {}\n";
        let app = [
            ("go.mod", "module a"),
            ("cmd/app/main.go", main),
            ("a.go", "package a"),
        ];
        assert_eq!(chosen("go", &app, &[]), "cmd/app/main.go");
        let two = [
            ("go.mod", "module a"),
            ("main.go", main),
            ("cmd/app/main.go", main),
        ];
        let why = chosen("go", &two, &[]);
        assert!(
            why.contains("main.go") && why.contains("cmd/app/main.go"),
            "{why}"
        );
        assert_eq!(
            named("go", &two, &[], Some("cmd/app/main.go")),
            "cmd/app/main.go"
        );
        let ignored = [
            ("go.mod", "module a"),
            ("main.go", main),
            (
                "gen.go",
                "//go:build ignore\n\npackage main\n\nfunc main() {}\n",
            ),
            ("main_windows.go", main),
            ("helper.go", "package main\n"),
        ];
        assert_eq!(chosen("go", &ignored, &[]), "main.go");
        let named = named("go", &app, &[], Some("a.go"));
        assert!(named.contains("cmd/app/main.go"), "{named}");
    }

    #[test]
    fn the_file_with_the_main_is_the_program() {
        let c = [
            ("notes.txt", "int main(void) {}"),
            (
                "prog.c",
                "#include \"util.h\"\nint\nmain(int argc, char **argv)\n{ return 0; }\n",
            ),
            (
                "util.c",
                "/* int main(void) { */ int twice(int n) { return n; } int main_loop(void) { return 0; }\n#ifdef TEST\nint main(void) { }\n#endif\nint main(void);",
            ),
            ("util.h", "int twice(int);"),
        ];
        assert_eq!(chosen("c", &c, &[]), "prog.c");
        let cpp = [
            (
                "main.cc",
                "extern \"C\" { int f(); }\nauto main() -> int { return f(); }",
            ),
            ("f.c", "int f(void) { return 0; }"),
        ];
        assert_eq!(chosen("cpp", &cpp, &[]), "main.cc");
        let java = [
            (
                "shop/App.java",
                "package shop;\n// class X { static void main(String[] a) {} }\npublic class App {\n  public static void main(String... args) {}\n}",
            ),
            (
                "shop/Cart.java",
                "package shop;\nclass Cart { void main() {} }",
            ),
        ];
        assert_eq!(chosen("java", &java, &[]), "shop/App.java");
        let two = [("a.c", "int main() {}"), ("b.c", "int main() {}")];
        assert!(chosen("c", &two, &[]).contains("a.c, b.c"));
        let library = [
            ("sum.c", "int sum(int a) { return a; }"),
            ("t.c", "int main() {}"),
        ];
        assert_eq!(chosen("c", &library, &["t.c"]), "none");
        assert_eq!(scan::main_class(java[0].1).as_deref(), Some("shop.App"));
        let inner = "class A { static class B { public static void main(String[] a) {} } }\nclass C { public static void main(String[] a) {} }";
        assert_eq!(scan::main_class(inner).as_deref(), Some("C"));
        let named = "import a.B;\n@Deprecated\npublic final class Hello { public class Inner {} }";
        assert_eq!(scan::public_class(named).as_deref(), Some("Hello"));
    }

    #[test]
    fn the_script_that_no_other_takes_in_is_the_program() {
        let python = [
            ("shop.py", "from cart import Cart\nimport lib.words\n"),
            ("cart.py", "class Cart: pass\n"),
            ("lib/words.py", "WORD = 1\n"),
            ("lib/__init__.py", ""),
            ("notes.md", "import this"),
        ];
        assert_eq!(chosen("python", &python, &[]), "shop.py");
        let two = [
            ("a.py", "print(1)\n"),
            ("b.py", "if __name__ == '__main__':\n    print(2)\n"),
        ];
        assert_eq!(chosen("python", &two, &[]), "b.py");
        let two = [("a.rb", "puts 1\n"), ("b.rb", "puts 2\n")];
        assert!(chosen("ruby", &two, &[]).contains("a.rb, b.rb"));
        let bash = [
            ("run.sh", ". ./lib.sh\nhello\n"),
            ("lib.sh", "hello() { :; }\n"),
        ];
        assert_eq!(chosen("bash", &bash, &[]), "run.sh");
        for (name, entry) in [
            ("node", "main.mjs"),
            ("cpp", "main.cc"),
            ("typescript", "main.mts"),
        ] {
            assert_eq!(chosen(name, &[(entry, ""), ("README.md", "")], &[]), entry);
        }
    }

    #[test]
    fn a_library_with_tests_has_no_program() {
        let test = ("test_calc.py", "from calc import add\n");
        let library = (
            "calc.py",
            "\"\"\"Adds.\n\nfor all\n\"\"\"\nimport math\n\nONE = 1\n\ndef add(a, b):\n    return a + b\n",
        );
        assert_eq!(
            chosen("python", &[library, test], &["test_calc.py"]),
            "none"
        );
        let program = (
            "calc.py",
            "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\n",
        );
        assert_eq!(
            chosen("python", &[program, test], &["test_calc.py"]),
            "calc.py"
        );
        let package = [("calc/__init__.py", "def add(): pass\n"), test];
        assert_eq!(chosen("python", &package, &["test_calc.py"]), "none");
        let node = [
            ("sum.js", "module.exports = (a, b) => a + b;\n"),
            ("sum.test.js", "require('./sum')"),
        ];
        assert_eq!(chosen("node", &node, &["sum.test.js"]), "none");
    }
}
