//! What a submission's runs are: jobs for the runner, in order.

use crate::model::{Submission, Tests};
use crate::runner::wire::{Job, JobId};

/// The report file a test runner writes, in the folder for temporary files.
const REPORT: &str = "gantry-report.xml";

/// The command that runs the program with these arguments.
pub fn argv(submission: &Submission, args: &[String]) -> Vec<String> {
    let command = submission.language.command(submission.entrypoint.as_str());
    command.into_iter().chain(args.iter().cloned()).collect()
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
                    .chain(files.iter().map(ToString::to_string))
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

fn base(submission: &Submission, run: u32, argv: Vec<String>) -> Job {
    let files = submission.files.iter();
    let env = submission.env.iter();
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
    }
}
