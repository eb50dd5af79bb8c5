//! The language table: what Gantry knows about each language it runs.

/// How a language's own test runner reports, test by test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportFormat {
    /// JUnit XML, one `testcase` element per test.
    JUnit,
}

/// A language's own runner for test files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestRunner {
    /// Its name, as people know it.
    pub name: &'static str,
    /// Command; `{report}` is replaced by the report file's path, and the test files follow.
    pub argv: &'static [&'static str],
    /// What the report file holds.
    pub format: ReportFormat,
    /// What to install when the command is missing.
    pub install: &'static str,
}

/// One language.
#[derive(Debug, PartialEq, Eq)]
pub struct Language {
    /// The name a submission uses.
    pub name: &'static str,
    /// The file that `code` becomes, and the default of `entrypoint`.
    pub entrypoint: &'static str,
    /// Command that runs a program; the entrypoint and its arguments follow.
    pub argv: &'static [&'static str],
    /// The runner for test files, where the language has one.
    pub test_runner: Option<TestRunner>,
    /// Started ahead of time: a run then costs no interpreter start.
    pub warm: bool,
}

/// Every language, in the order the page lists them.
pub static LANGUAGES: &[Language] = &[
    Language {
        name: "python",
        entrypoint: "main.py",
        argv: &["python3"],
        test_runner: Some(TestRunner {
            name: "pytest",
            argv: &[
                "python3",
                "-m",
                "pytest",
                "-q",
                "-p",
                "no:cacheprovider",
                "--junitxml={report}",
            ],
            format: ReportFormat::JUnit,
            install: "pip install pytest",
        }),
        warm: true,
    },
    Language {
        name: "node",
        entrypoint: "main.js",
        argv: &["node"],
        test_runner: Some(TestRunner {
            name: "node --test",
            argv: &[
                "node",
                "--test",
                "--test-reporter=spec",
                "--test-reporter-destination=stdout",
                "--test-reporter=junit",
                "--test-reporter-destination={report}",
            ],
            format: ReportFormat::JUnit,
            install: "Node.js 20 or later",
        }),
        warm: false,
    },
    Language {
        name: "bash",
        entrypoint: "main.sh",
        argv: &["bash"],
        test_runner: None,
        warm: false,
    },
];

impl Language {
    /// The language of this name.
    pub fn named(name: &str) -> Option<&'static Language> {
        LANGUAGES.iter().find(|language| language.name == name)
    }

    /// The command that runs this file.
    pub fn command(&self, entrypoint: &str) -> Vec<String> {
        let command = self.argv.iter().map(|part| (*part).to_owned());
        command.chain([entrypoint.to_owned()]).collect()
    }

    /// The command that starts a project, whose files are in the workspace.
    pub fn start(&self) -> Vec<String> {
        self.command(self.entrypoint)
    }

    /// Every name, for messages.
    pub fn names() -> String {
        let names: Vec<&str> = LANGUAGES.iter().map(|language| language.name).collect();
        names.join(", ")
    }
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
