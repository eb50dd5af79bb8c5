//! What a submission's runs are: jobs for the runner, in order.

use std::collections::BTreeMap;

use crate::model::{BUILD_FOLDER, Limits, RelativePath, Submission, Tests, Words};
use crate::runner::wire::{Job, JobId};

/// The report file a test runner writes, in the folder for temporary files.
const REPORT: &str = "gantry-report.xml";

/// The command that runs the program with these arguments.
pub fn argv(submission: &Submission, args: &[String]) -> Vec<String> {
    let language = submission.language;
    let mut argv = with_words(submission, |words| language.fill(language.run, words));
    argv.extend(args.iter().cloned());
    argv
}

/// The job that compiles the program, where its language has such a step.
pub fn compile(submission: &Submission) -> Option<Job> {
    let argv = with_words(submission, |words| submission.language.compile(words))?;
    let own = submission.env.iter();
    let own = own.map(|(name, value)| (name.as_str(), value.as_str()));
    // The submission's own come last, and stand.
    let env = submission.language.env.iter().copied().chain(own);
    let env: BTreeMap<&str, &str> = env.collect();
    let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    Some(Job {
        id: build(submission)?,
        env: env.into_iter().map(owned).collect(),
        output: Some(BUILD_FOLDER.to_owned()),
        limits: Limits::COMPILE,
        build: None,
        ..base(submission, 0, argv)
    })
}

/// The run that compiled, whose output the others need.
pub fn build(submission: &Submission) -> Option<JobId> {
    submission.language.compile.as_ref().map(|_| JobId {
        submission: submission.id,
        run: 0,
    })
}

fn with_words<T>(submission: &Submission, act: impl FnOnce(&Words<'_>) -> T) -> T {
    let compiles = submission.language.compile.is_some();
    let files: Vec<&str> = match compiles {
        true => submission.files.keys().map(RelativePath::as_str).collect(),
        false => Vec::new(),
    };
    let text = submission.files.get(&submission.entrypoint);
    act(&Words {
        entrypoint: submission.entrypoint.as_str(),
        files: &files,
        text: text.filter(|_| compiles).map_or("", String::as_str),
        memory_bytes: submission.limits.memory_bytes,
    })
}

/// The jobs of a submission, made as they are needed.
pub fn jobs(submission: &Submission) -> Box<dyn Iterator<Item = Job> + Send + '_> {
    match &submission.tests {
        Tests::ExitCode => Box::new(std::iter::once(whole_program(submission))),
        Tests::Cases(cases) => Box::new((0..).zip(cases).map(|(number, case)| {
            let args = case.args.as_ref().unwrap_or(&submission.args);
            let mut job = base(submission, number, argv(submission, args));
            let stdin = case.stdin.as_ref().or(submission.stdin.as_ref());
            job.stdin = stdin.cloned().unwrap_or_default().into_bytes();
            if let Some(wall_ms) = case.timeout_ms {
                job.limits.wall_ms = wall_ms;
            }
            job
        })),
        Tests::Files(files) => {
            Box::new(submission.language.test_runner.into_iter().map(|runner| {
                let report = format!("/tmp/{REPORT}");
                let command = runner
                    .argv
                    .iter()
                    .map(|part| part.replace("{report}", &report));
                let argv = command
                    .chain(
                        files
                            .iter()
                            .map(|path| submission.language.test_file(&runner, path.as_str())),
                    )
                    .collect();
                let mut job = base(submission, 0, argv);
                job.report = Some(REPORT.to_owned());
                job
            }))
        }
    }
}

/// Without `stdin` in the submission, input may come later in frames of its own, as from a terminal.
fn whole_program(submission: &Submission) -> Job {
    let mut job = base(submission, 0, argv(submission, &submission.args));
    match &submission.stdin {
        Some(text) => job.stdin = text.clone().into_bytes(),
        None => job.stdin_open = true,
    }
    job
}

/// `number` is the run's among those that test; compiling is a run before them.
fn base(submission: &Submission, number: u32, argv: Vec<String>) -> Job {
    let files = submission.files.iter();
    let env = submission.env.iter();
    let build = build(submission);
    let run = match build {
        Some(build) => build.run + 1 + number,
        None => number,
    };
    Job {
        id: JobId {
            submission: submission.id,
            run,
        },
        files: files
            .map(|(path, text)| (path.to_string(), text.clone()))
            .collect(),
        argv,
        env: env
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
        stdin: Vec::new(),
        stdin_open: false,
        limits: submission.limits,
        report: None,
        output: None,
        build,
    }
}
