//! What a submission's runs are: jobs for the runner, in order.

use std::collections::BTreeMap;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::model::entry;
use crate::model::{
    BUILD_FOLDER, Install, Limits, PackageIndex, Packages, RelativePath, Submission, TestCommand,
    TestFiles, TestRunner, Tests, Words,
};
use crate::runner::wire::{Job, JobId};
use crate::storage::hexadecimal;

/// The command that runs the program with these arguments.
pub fn argv(submission: &Submission, args: &[String]) -> Vec<String> {
    let language = submission.language;
    let entrypoint = submission.entrypoint.as_ref();
    let own = entry::command(language, &submission.files, entrypoint);
    let mut argv =
        own.unwrap_or_else(|| with_words(submission, |words| language.fill(language.run, words)));
    argv.extend(args.iter().cloned());
    argv
}

/// A submission's runs: what installs comes first, then what compiles, then those that test.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    submission: &'a Submission,
    /// How what the program depends on is installed, where it depends on something.
    pub install: Option<&'static Install>,
    /// From where; `None`: it may not be.
    pub index: Option<&'a PackageIndex>,
    wall: Duration,
}

impl<'a> Plan<'a> {
    /// With what the operator allows to be installed.
    pub fn new(submission: &'a Submission, packages: &'a Packages) -> Self {
        let install = submission.language.install.as_ref();
        let install = install.filter(|install| {
            text(submission, install.file).is_some_and(|file| install.naming.names_any(file))
        });
        Self {
            submission,
            install,
            index: install.and_then(|install| packages.index(install)),
            wall: packages.wall,
        }
    }

    /// The job that installs what the program depends on, where that is allowed.
    pub fn install_job(&self) -> Option<Job> {
        let (install, index) = (self.install?, self.index?);
        let own = install.variables(index);
        let own = own.iter().map(|(name, value)| (*name, value.as_str()));
        let env = self.environment(self.submissions_own().chain(own));
        let limits = Limits {
            wall_ms: u64::try_from(self.wall.as_millis()).unwrap_or(u64::MAX),
            ..Limits::COMPILE
        };
        Some(Job {
            env,
            output: owned(install.folders),
            builds: true,
            limits,
            build: None,
            online: true,
            cache: Some(self.cache_key(install, index)),
            ..self.job(0, install.command(index))
        })
    }

    /// The same for whatever the installer would do the same for.
    fn cache_key(&self, install: &Install, index: &PackageIndex) -> String {
        let project = text(self.submission, install.file).unwrap_or_default();
        let whole = install.leads_elsewhere(project);
        let counts = |path: &RelativePath| {
            let path = path.as_str();
            whole || path == install.file || install.beside.contains(&path)
        };
        let mut digest = Sha256::new();
        let mut add = |part: &str| {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        };
        add(self.submission.language.name);
        add(&index.url);
        let files = self.submission.files.iter();
        for (path, text) in files.filter(|(path, _)| counts(path)) {
            add(path.as_str());
            add(text);
        }
        for (name, value) in &self.submission.env {
            add(name);
            add(value);
        }
        hexadecimal(&digest.finalize())
    }

    /// The job that compiles the program, where its language has such a step.
    pub fn compile_job(&self) -> Option<Job> {
        let language = self.submission.language;
        if !self.compiles() {
            return None;
        }
        let argv = with_words(self.submission, |words| language.compile(words))?;
        let installed = self.installed().and(self.install);
        let mut output = vec![BUILD_FOLDER.to_owned()];
        if let Some(install) = installed.filter(|install| install.needed_to_run) {
            output.extend(owned(install.folders));
        }
        Some(Job {
            env: self.environment(self.found().iter().copied().chain(self.submissions_own())),
            output,
            builds: true,
            limits: Limits::COMPILE,
            build: self.installed(),
            ..self.job(self.installs(), argv)
        })
    }

    /// Whether there is something to compile before tests: a library alone is compiled with each of its tests.
    fn compiles(&self) -> bool {
        let language = self.submission.language;
        let one_for_all = matches!(language.tests, TestFiles::Runner(_));
        language.compile.is_some() && (self.submission.entrypoint.is_some() || one_for_all)
    }

    /// The language's own variables and more; what comes later stands.
    fn environment<'v>(
        &self,
        more: impl Iterator<Item = (&'v str, &'v str)>,
    ) -> Vec<(String, String)> {
        let env = self.submission.language.env.iter().copied();
        let env: BTreeMap<&str, &str> = env.chain(more).collect();
        let words = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        env.into_iter().map(words).collect()
    }

    /// The compiler's variables for packages that were installed.
    fn found(&self) -> &'static [(&'static str, &'static str)] {
        let installed = self.installed().and(self.install);
        installed.map_or(&[], |install| install.compile_env)
    }

    fn submissions_own(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let env = self.submission.env.iter();
        env.map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Runs are counted whatever is allowed: an operator who changes their mind changes no number.
    fn installs(&self) -> u32 {
        u32::from(self.install.is_some())
    }

    fn id(&self, run: u32) -> JobId {
        JobId {
            submission: self.submission.id,
            run,
        }
    }

    /// The run that installed.
    fn installed(&self) -> Option<JobId> {
        self.index.map(|_| self.id(0))
    }

    /// The run that built what those that test need.
    pub fn build(&self) -> Option<JobId> {
        match self.compiles() {
            true => Some(self.id(self.installs())),
            false => self.installed(),
        }
    }

    /// The runs whose builds are kept until the submission is over.
    pub fn builds(&self) -> impl Iterator<Item = JobId> {
        let installed = self.installed();
        let other = self.build().filter(|build| Some(*build) != installed);
        installed.into_iter().chain(other)
    }

    /// A run of the program or of its tests; `number` is its own among those.
    fn test_job(&self, number: u32, argv: Vec<String>) -> Job {
        let compiles = u32::from(self.compiles());
        Job {
            build: self.build(),
            ..self.job(self.installs() + compiles + number, argv)
        }
    }

    fn job(&self, run: u32, argv: Vec<String>) -> Job {
        let files = self.submission.files.iter();
        let env = self.submission.env.iter();
        Job {
            id: self.id(run),
            files: files
                .map(|(path, text)| (path.to_string(), text.clone()))
                .collect(),
            argv,
            env: env
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect(),
            stdin: Vec::new(),
            stdin_open: false,
            limits: self.submission.limits,
            report: false,
            output: Vec::new(),
            builds: false,
            build: None,
            online: false,
            cache: None,
        }
    }

    /// The jobs that test, made as they are needed.
    pub fn test_jobs(self) -> Box<dyn Iterator<Item = Job> + Send + 'a> {
        let submission = self.submission;
        match &submission.tests {
            Tests::ExitCode => Box::new(std::iter::once(self.whole_program())),
            Tests::Cases(cases) => Box::new((0..).zip(cases).map(move |(number, case)| {
                let args = case.args.as_ref().unwrap_or(&submission.args);
                let mut job = self.test_job(number, argv(submission, args));
                let stdin = case.stdin.as_ref().or(submission.stdin.as_ref());
                job.stdin = stdin.cloned().unwrap_or_default().into_bytes();
                if let Some(wall_ms) = case.timeout_ms {
                    job.limits.wall_ms = wall_ms;
                }
                job
            })),
            Tests::Files(files) => match &submission.language.tests {
                TestFiles::Runner(runner) => {
                    Box::new(std::iter::once(self.runner_job(runner, files)))
                }
                TestFiles::Each(command) => Box::new(
                    (0..)
                        .zip(files)
                        .map(move |(number, file)| self.file_job(number, command, file)),
                ),
            },
        }
    }

    /// The one command that runs all test files.
    fn runner_job(&self, runner: &TestRunner, files: &[RelativePath]) -> Job {
        let command = runner.argv.iter().map(|part| (*part).to_owned());
        let language = self.submission.language;
        let files = files
            .iter()
            .map(|path| language.test_file(runner, path.as_str()));
        let mut job = self.test_job(0, command.chain(files).collect());
        job.report = true;
        job
    }

    /// The command that runs one test file.
    fn file_job(&self, number: u32, command: &TestCommand, file: &RelativePath) -> Job {
        let language = self.submission.language;
        let target = entry::test_target(&self.submission.files, file.as_str());
        let argv = with_words(self.submission, |words| {
            let beside = words.files.iter().copied();
            let own = |path: &&str| command.has_own_entry && *path == words.entrypoint;
            let beside: Vec<&str> = beside.filter(|path| !own(path)).collect();
            language.test(
                command,
                &Words {
                    entrypoint: file.as_str(),
                    files: &beside,
                    text: self.submission.files.get(file).map_or("", String::as_str),
                    memory_bytes: words.memory_bytes,
                    target: &target,
                },
            )
        });
        let job = self.test_job(number, argv);
        if !command.compiles {
            return job;
        }
        // What the compiler needs, not what it made of the program.
        let (build, output_bytes) = (self.installed(), job.limits.output_bytes);
        Job {
            env: self.environment(self.found().iter().copied().chain(self.submissions_own())),
            build,
            builds: true,
            limits: Limits {
                output_bytes,
                ..Limits::COMPILE
            },
            ..job
        }
    }

    /// Where the submission says so, input may come later in frames of its own, as from a terminal.
    fn whole_program(&self) -> Job {
        let mut job = self.test_job(0, argv(self.submission, &self.submission.args));
        let stdin = self.submission.stdin.clone();
        job.stdin = stdin.unwrap_or_default().into_bytes();
        job.stdin_open = self.submission.interactive;
        job
    }
}

fn owned(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn text<'a>(submission: &'a Submission, name: &str) -> Option<&'a str> {
    let mut files = submission.files.iter();
    let (_, text) = files.find(|(path, _)| path.as_str() == name)?;
    Some(text)
}

fn with_words<T>(submission: &Submission, act: impl FnOnce(&Words<'_>) -> T) -> T {
    let entrypoint = submission.entrypoint.as_ref();
    let path = entrypoint.map_or("", RelativePath::as_str);
    let binary = entry::binary(&submission.files, path);
    let text = entrypoint.and_then(|path| submission.files.get(path));
    act(&Words {
        entrypoint: path,
        files: &compiled(submission),
        text: text.map_or("", String::as_str),
        memory_bytes: submission.limits.memory_bytes,
        target: &binary.map_or(Vec::new(), |binary| binary.arguments()),
    })
}

/// The files of the program, for what compiles it.
fn compiled(submission: &Submission) -> Vec<&str> {
    let language = submission.language;
    if language.compile.is_none() {
        return Vec::new();
    }
    // A test file that is compiled by itself is no part of the program.
    let tests = match language.tests {
        TestFiles::Each(_) => submission.tests.files(),
        TestFiles::Runner(_) => &[],
    };
    // Nor is another program, where all that is compiled becomes one.
    let is_other = |path: &RelativePath, text: &str| {
        matches!(language.name, "c" | "cpp")
            && Some(path) != submission.entrypoint.as_ref()
            && language.is_compiled(path.as_str())
            && entry::is_program(language.name, path.as_str(), text)
    };
    let files = submission.files.iter();
    let files = files.filter(|(path, text)| !tests.contains(path) && !is_other(path, text));
    files.map(|(path, _)| path.as_str()).collect()
}
