//! What the runs of a submission mean. Pure: made from the runner's reports alone, so that it comes
//! out the same after a restart.

use super::compare::difference;
use super::fit::{MAX_ACTUAL, MAX_SAID, cut, cut_outputs, end_within};
use super::report::{self, Defect, Report};
use crate::model::entry::has_own_harness;
use crate::model::{
    self, Case, Ending, INDEX_FAILED, Install, Limits, NO_INSTALLER, Outcome, Problem, Proof,
    Reason, RelativePath, RunReport, Status, Submission, TestCommand, TestCounts, TestFiles,
    TestOutcome, TestResult, TestRunner, Tests, Usage,
};
use crate::runner::wire::{BUILD_SCRATCH_BYTES, DISK_SAID, MAX_BUILD_BYTES, MAX_UNPACKED_BYTES};

/// One run that is over: what the runner said and what the program wrote.
#[derive(Debug, Clone, Default)]
pub struct FinishedRun {
    /// What the runner saw. `None`: the outcome is unknown.
    pub report: Option<RunReport>,
    /// Why it is unknown.
    pub lost: Option<String>,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
    /// What the test runner reported, where there was a report.
    pub tests: Option<Report>,
}

impl FinishedRun {
    /// Lets go of what it wrote, which the journal has.
    pub fn let_go(&mut self) {
        (self.stdout, self.stderr) = (String::new(), String::new());
    }

    /// Reads the test runner's report. The program may have written it, so that no other
    /// submission waits while it is read; as many are read at a time as there are runs.
    pub async fn read_tests(&mut self) {
        let report = self.report.as_mut();
        let Some(text) = report.and_then(|report| report.test_report.take()) else {
            return;
        };
        let read = tokio::task::spawn_blocking(move || report::parse(&text));
        let failed = |error: tokio::task::JoinError| Defect::Unread(error.to_string());
        let read = read.await.map_err(failed);
        self.tests = Some(read.unwrap_or_else(Report::broken));
    }
}

/// What was decided.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// [`Status::TestsPassed`], or how it ended instead.
    pub status: Status,
    /// How the program failed.
    pub reason: Option<Reason>,
    /// The tests' results.
    pub tests: Vec<TestResult>,
    /// How many ended how.
    pub counts: TestCounts,
    /// For [`Status::Unavailable`].
    pub error: Option<Problem>,
    /// The run whose exit code and signal the reply shows.
    shown: usize,
}

/// Decides. `runs` are in order, and stop after the one that ended the test.
pub fn decide(submission: &Submission, runs: &[FinishedRun]) -> Verdict {
    let mut verdict = Verdict {
        status: Status::TestsPassed,
        reason: None,
        tests: Vec::new(),
        counts: TestCounts::default(),
        error: None,
        shown: runs.len().saturating_sub(1),
    };
    for (index, run) in runs.iter().enumerate() {
        if let Some((status, error)) = not_decided(run) {
            verdict.status = status;
            verdict.error = error;
            verdict.shown = index;
            return verdict;
        }
    }
    match (&submission.tests, runs) {
        (Tests::Cases(cases), _) => {
            let results = cases.iter().zip(runs);
            let results = results.map(|(case, run)| judge_case(case, run)).collect();
            judge_tests(results, &mut verdict);
        }
        (Tests::Files(files), [first, ..]) => match &submission.language.tests {
            TestFiles::Runner(runner) => judge_files(runner, first, &mut verdict),
            TestFiles::Each(command) => {
                let results = files.iter().zip(runs);
                let results = results.map(|(file, run)| judge_file(submission, command, file, run));
                let results = results.collect();
                judge_tests(results, &mut verdict);
            }
        },
        (Tests::ExitCode, [run, ..]) => {
            if let Some(reason) = run.report.as_ref().and_then(|r| reason_of(&r.ending)) {
                verdict.status = Status::TestsFailed;
                verdict.reason = Some(reason);
            }
        }
        (_, []) => verdict.status = Status::Unavailable,
    }
    verdict
}

/// Endings that are not the program's: cancelled, never started, unknown.
fn not_decided(run: &FinishedRun) -> Option<(Status, Option<Problem>)> {
    let Some(report) = &run.report else {
        let why = run
            .lost
            .clone()
            .unwrap_or_else(|| "it was not started".to_owned());
        let problem = Problem::new(
            "outcome_unknown",
            "The outcome of the run is unknown",
            why,
            "Submit it again under a new submission_id.",
        );
        return Some((Status::Unavailable, Some(problem)));
    };
    match &report.ending {
        Ending::Cancelled => Some((Status::Cancelled, None)),
        Ending::Starved { waited_ms } => {
            let problem = Problem::new(
                "machine_busy",
                "The machine was too busy to run the program",
                format!(
                    "it took {} ms, for {waited_ms} of which it waited for a processor",
                    report.duration_ms
                ),
                "Submit it again under a new submission_id; if this happens often, ask the operator for \
                 more processors or fewer runs at one time (GANTRY_MAX_RUNS).",
            );
            Some((Status::Unavailable, Some(problem)))
        }
        Ending::NotStarted(why) => {
            let problem = Problem::new(
                "run_not_started",
                "The program could not be started",
                why.clone(),
                "Check that its interpreter is installed where the server runs, then submit again.",
            );
            Some((Status::Unavailable, Some(problem)))
        }
        _ => None,
    }
}

/// What follows from a compiler's run; `None`: the program is there.
pub fn judge_compile(run: &FinishedRun) -> Option<Verdict> {
    let mut verdict = judge_build(run)?;
    if let Some(limit) = limit_of(run) {
        let (cause, remedy) = match limit {
            Reason::Disk => (
                too_large(run),
                "Depend on fewer packages, or on fewer of their features.",
            ),
            _ => (
                String::new(),
                "Send less code, or leave out what takes the compiler so long.",
            ),
        };
        verdict.error = Some(Problem::new(
            "compile_limit",
            format!("The compiler was stopped at its {} limit", limit.as_str()),
            format!("{cause}compiling {}", allowance(&Limits::COMPILE)),
            remedy,
        ));
    }
    Some(verdict)
}

/// What follows from an installer's run; `None`: the packages are there.
pub fn judge_install(run: &FinishedRun, install: &Install, limits: &Limits) -> Option<Verdict> {
    let mut verdict = judge_build(run)?;
    if verdict.status != Status::TestsFailed {
        return Some(verdict);
    }
    let (name, file) = (install.name, install.file);
    if let Some(cause) = index_failed(run) {
        verdict.status = Status::Unavailable;
        verdict.reason = None;
        verdict.error = Some(Problem::new(
            "package_index_unavailable",
            "The package index failed",
            cause,
            "Try again; if it lasts, the operator checks the index that the server is set up with.",
        ));
        return Some(verdict);
    }
    verdict.error = Some(match limit_of(run) {
        Some(limit) => Problem::new(
            "install_limit",
            format!("{name} was stopped at its {} limit", limit.as_str()),
            format!("{}installing {}", too_large(run), allowance(limits)),
            format!("Name fewer or smaller packages in {file}."),
        ),
        None if is_absent(name, run) => {
            verdict.status = Status::Unavailable;
            verdict.reason = None;
            Problem::new(
                "installer_missing",
                format!("{name} is not installed where programs run"),
                run.stderr.trim(),
                format!("Install it there ({}).", install.install),
            )
        }
        None => Problem::new(
            "packages_not_installed",
            format!("What {file} names could not be installed"),
            last_words(run),
            format!(
                "Check the names and versions in {file}; {name}'s whole output is in stdout and stderr."
            ),
        ),
    });
    Some(verdict)
}

/// Which bound on its files a build met, for what follows it in a sentence.
fn too_large(run: &FinishedRun) -> String {
    let mut lines = run.stderr.lines().rev();
    let said = lines.find_map(|line| line.strip_prefix(DISK_SAID));
    said.map_or(String::new(), |said| format!("{said}; "))
}

/// How the index failed, if that is what an installer ended by.
fn index_failed(run: &FinishedRun) -> Option<String> {
    let ending = &run.report.as_ref()?.ending;
    if *ending != Ending::Exited(INDEX_FAILED) {
        return None;
    }
    Some(cut(model::index_failed(&run.stderr)?, MAX_LINE).to_owned())
}

/// What follows from a run that builds; `None`: it is there.
fn judge_build(run: &FinishedRun) -> Option<Verdict> {
    let mut verdict = Verdict {
        status: Status::TestsFailed,
        reason: Some(Reason::Compile),
        tests: Vec::new(),
        counts: TestCounts::default(),
        error: None,
        // A compiler's exit code is not the program's.
        shown: usize::MAX,
    };
    if let Some((status, error)) = not_decided(run) {
        verdict.status = status;
        verdict.reason = None;
        verdict.error = error;
        return Some(verdict);
    }
    let ending = run.report.as_ref().map(|report| &report.ending);
    (ending != Some(&Ending::Exited(0))).then_some(verdict)
}

fn limit_of(run: &FinishedRun) -> Option<Reason> {
    match run.report.as_ref()?.ending {
        Ending::Limit(reason) => Some(reason),
        _ => None,
    }
}

fn allowance(most: &Limits) -> String {
    format!(
        "may take {} s, {} s of processor time, {} MiB of memory and {} MiB of scratch space, write {} KiB, and leave \
         {} MiB, compressed, or {} MiB",
        most.wall_ms / 1_000,
        most.cpu_ms / 1_000,
        most.memory_bytes >> 20,
        BUILD_SCRATCH_BYTES >> 20,
        most.output_bytes >> 10,
        MAX_BUILD_BYTES >> 20,
        MAX_UNPACKED_BYTES >> 20,
    )
}

/// Lines of an installer's that say why it failed.
const LAST_LINES: usize = 6;

/// Longest such line; the whole is in the output.
const MAX_LINE: usize = 500;

fn last_words(run: &FinishedRun) -> String {
    let said = if run.stderr.trim().is_empty() {
        &run.stdout
    } else {
        &run.stderr
    };
    let lines = said.lines().filter(|line| !line.trim().is_empty());
    let lines: Vec<&str> = lines.map(|line| cut(line, MAX_LINE)).collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

/// Whether there is no such command, or module of Python's, in the words of who was told to run it.
fn is_absent(module: &str, run: &FinishedRun) -> bool {
    let words = format!("No module named {module}");
    let said = run.stderr.trim_end();
    run.stdout.is_empty() && (said.ends_with(&words) || said.starts_with(NO_INSTALLER))
}

fn reason_of(ending: &Ending) -> Option<Reason> {
    match ending {
        Ending::Exited(0) | Ending::Cancelled | Ending::NotStarted(_) | Ending::Starved { .. } => {
            None
        }
        Ending::Exited(_) => Some(Reason::ExitCode),
        Ending::Signalled(_) => Some(Reason::Signal),
        Ending::Limit(reason) => Some(*reason),
    }
}

/// Of tests that had a run each: the first that failed says why.
fn judge_tests(results: Vec<TestResult>, verdict: &mut Verdict) {
    verdict.counts = TestCounts::of(&results);
    if let Some(index) = results.iter().position(TestResult::failed) {
        verdict.status = Status::TestsFailed;
        verdict.shown = index;
        verdict.reason = results[index].reason;
    }
    verdict.tests = results;
}

/// What the result of a test says of the run that it had by itself.
fn of_run(name: impl Into<String>, failed: Option<Reason>, run: &FinishedRun) -> TestResult {
    let outcome = match failed {
        Some(_) => TestOutcome::Failed,
        None => TestOutcome::Passed,
    };
    let report = run.report.as_ref();
    let ending = report.map(|report| &report.ending);
    TestResult {
        reason: failed,
        exit_code: match ending {
            Some(Ending::Exited(code)) => Some(*code),
            _ => None,
        },
        signal: match ending {
            Some(Ending::Signalled(signal)) => Some(signal_name(*signal)),
            _ => None,
        },
        usage: report.map(|report| report.usage),
        ..TestResult::new(name, outcome, report.map_or(0, |report| report.duration_ms))
    }
}

/// One case's result.
pub fn judge_case(case: &Case, run: &FinishedRun) -> TestResult {
    let ending = run.report.as_ref().map(|report| &report.ending);
    let expected = case.expected_stdout.as_deref();
    let differs = expected.and_then(|expected| difference(case.compare, expected, &run.stdout));
    let failed = match ending {
        Some(Ending::Exited(0)) => differs.as_ref().map(|_| Reason::Tests),
        Some(ending) => Some(reason_of(ending).unwrap_or(Reason::Tests)),
        None => Some(Reason::Tests),
    };
    let mut result = of_run(case.name.clone(), failed, run);
    if failed.is_none() {
        return result;
    }
    match (ending, differs) {
        (Some(Ending::Exited(0)), Some(difference)) => {
            let actual = cut(&run.stdout, MAX_ACTUAL);
            let shown = if actual.len() < run.stdout.len() {
                "; its beginning is shown"
            } else {
                ""
            };
            result.truncated = actual.len() < run.stdout.len();
            result.message = Some(format!("{difference}{shown}"));
            result.expected = Some(expected.unwrap_or_default().to_owned());
            result.actual = Some(actual.to_owned());
        }
        (ending, _) => {
            result.message = Some(in_words(ending));
            result.stdout = said(&run.stdout, &mut result.truncated);
        }
    }
    result.stderr = said(&run.stderr, &mut result.truncated);
    result
}

/// The end of what a run wrote; nothing where it wrote nothing.
fn said(text: &str, truncated: &mut bool) -> Option<String> {
    let end = end_within(text, MAX_SAID);
    *truncated |= end.len() < text.len();
    (!end.is_empty()).then(|| end.to_owned())
}

/// Most of a failed test file's output that its message has; the reply has more.
const MAX_LAST_WORDS: usize = 4 << 10;

/// One test file's result, where each has a run of its own.
pub fn judge_file(
    submission: &Submission,
    command: &TestCommand,
    file: &RelativePath,
    run: &FinishedRun,
) -> TestResult {
    let proof = match command.proof {
        Proof::Rust if has_own_harness(&submission.files, file.as_str()) => Proof::None,
        proof => proof,
    };
    let text = submission.files.get(file);
    let ran = proof.is_in(&run.stdout) && text.is_none_or(|text| !text.trim().is_empty());
    let ending = run.report.as_ref().map(|report| &report.ending);
    let ended_well = ending == Some(&Ending::Exited(0));
    let failed = match ending {
        _ if ended_well && ran => None,
        // An assertion that does not hold ends a test so.
        None | Some(Ending::Exited(_) | Ending::Signalled(libc::SIGABRT)) => Some(Reason::Tests),
        Some(ending) => Some(reason_of(ending).unwrap_or(Reason::Tests)),
    };
    let mut result = of_run(file.to_string(), failed, run);
    result.message = failed.map(|_| {
        let words = match ended_well {
            true => "no test ran: the file holds none, or the program ended the process first"
                .to_owned(),
            false => in_words(ending),
        };
        let said = [&run.stdout, &run.stderr].map(|text| end_of(text.trim_end(), MAX_LAST_WORDS));
        let said = said.into_iter().filter(|text| !text.is_empty());
        said.fold(words, |all, text| format!("{all}\n{text}"))
    });
    result
}

/// The last whole characters of a text.
fn end_of(text: &str, most: usize) -> &str {
    let from = text.len().saturating_sub(most);
    let from = (from..=text.len()).find(|at| text.is_char_boundary(*at));
    &text[from.unwrap_or(text.len())..]
}

fn in_words(ending: Option<&Ending>) -> String {
    let Some(ending) = ending else {
        return "its outcome is unknown".to_owned();
    };
    match ending {
        Ending::Exited(code) => format!("ended with exit code {code}"),
        Ending::Signalled(signal) => format!("was ended by {}", signal_name(*signal)),
        Ending::Limit(reason) => format!("was stopped at its {} limit", reason.as_str()),
        Ending::Cancelled => "was cancelled".to_owned(),
        Ending::NotStarted(why) => format!("could not be started: {why}"),
        Ending::Starved { .. } => "was stopped, since the machine was too busy for it".to_owned(),
    }
}

fn judge_files(runner: &TestRunner, run: &FinishedRun, verdict: &mut Verdict) {
    let Some(report) = &run.report else {
        return;
    };
    let none = Report::default();
    let tests = run.tests.as_ref().unwrap_or(&none);
    verdict.tests.clone_from(&tests.tests);
    verdict.counts = tests.counts;
    let (failed, defect) = (tests.counts.failed > 0, tests.defect.as_ref());
    let damaged = || defect.map(|defect| damaged(runner, defect));
    match reason_of(&report.ending) {
        // Exit code 0 alone proves nothing: the program may have ended the test run from inside.
        None if failed => {
            fail(verdict, Reason::Tests);
            verdict.error = damaged();
        }
        None if tests.counts.passed > 0 && defect.is_none() => {}
        None => {
            fail(verdict, Reason::Tests);
            verdict.error = Some(match &run.tests {
                None => no_report(runner),
                Some(tests) => damaged().unwrap_or_else(|| no_test_ran(runner, tests.counts)),
            });
        }
        Some(Reason::ExitCode) if is_absent(runner.name, run) => {
            let (name, install) = (runner.name, runner.install);
            verdict.status = Status::Unavailable;
            verdict.error = Some(Problem::new(
                "test_runner_missing",
                format!("{name} is not installed where the tests run"),
                run.stderr.trim().to_owned(),
                format!("Install it on the server ({install}), or send tests as cases."),
            ));
        }
        Some(Reason::ExitCode) if failed => {
            fail(verdict, Reason::Tests);
            verdict.error = damaged();
        }
        Some(Reason::ExitCode) => {
            fail(verdict, Reason::ExitCode);
            verdict.error = match &run.tests {
                None => None,
                Some(tests) if defect.is_none() && tests.counts.passed == 0 => {
                    verdict.reason = Some(Reason::Tests);
                    Some(no_test_ran(runner, tests.counts))
                }
                Some(_) => damaged().or_else(|| Some(failed_otherwise(runner, &report.ending))),
            };
        }
        // It was ended from outside, and its report with it.
        Some(reason) => fail(verdict, reason),
    }
}

fn no_test_ran(runner: &TestRunner, counts: TestCounts) -> Problem {
    let name = runner.name;
    let TestCounts { skipped, todo, .. } = counts;
    let cause = match (skipped, todo) {
        (0, 0) => format!("{name} found no test"),
        (skipped, 0) => format!("{name} skipped all {skipped} tests"),
        (0, todo) => format!("all {todo} tests are marked as todo"),
        (skipped, todo) => {
            format!("{name} skipped {skipped} tests, and {todo} are marked as todo")
        }
    };
    Problem::new(
        "no_test_ran",
        "No test ran",
        cause,
        "Check that the test files hold tests and that the program does not end while they load it.",
    )
}

/// What is wrong with a report of which something may have been read.
fn damaged(runner: &TestRunner, defect: &Defect) -> Problem {
    Problem::new(
        "test_report_invalid",
        format!("{}'s report is not whole", runner.name),
        defect.to_string(),
        "Check that neither the program nor its tests end the process, as os._exit does, or write to the report. The tests that could be read are listed.",
    )
}

fn no_report(runner: &TestRunner) -> Problem {
    Problem::new(
        "test_report_missing",
        format!("{} ended without a report", runner.name),
        "exit code 0 without a report: something ended the test run before its tests were over",
        "Check that neither the program nor its tests end the process, as os._exit does.",
    )
}

/// Every test that it lists held.
fn failed_otherwise(runner: &TestRunner, ending: &Ending) -> Problem {
    let name = runner.name;
    Problem::new(
        "test_run_failed",
        format!("{name} failed, and none of its tests did"),
        format!("it {}", in_words(Some(ending))),
        format!("Look at {name}'s output in stdout and stderr: what failed is outside the tests."),
    )
}

fn fail(verdict: &mut Verdict, reason: Reason) {
    verdict.status = Status::TestsFailed;
    verdict.reason = Some(reason);
}

impl Verdict {
    /// The part of the reply that the test step decides.
    pub fn outcome(&self, runs: &[FinishedRun]) -> Outcome {
        let mut outcome = Outcome::new(self.status);
        outcome.reason = self.reason;
        outcome.tests.clone_from(&self.tests);
        outcome.test_counts = (self.counts.all() > 0).then_some(self.counts);
        outcome.error.clone_from(&self.error);
        let reports = || runs.iter().filter_map(|run| run.report.as_ref());
        outcome.truncated = reports().any(|report| report.truncated);
        if reports().next().is_some() {
            show_output(&mut outcome, runs);
            outcome.usage = Some(Usage {
                cpu_ms: reports().map(|report| report.usage.cpu_ms).sum(),
                memory_bytes: reports()
                    .map(|report| report.usage.memory_bytes)
                    .max()
                    .unwrap_or(0),
            });
        }
        let shown = runs.get(self.shown).and_then(|run| run.report.as_ref());
        match shown.map(|report| &report.ending) {
            Some(Ending::Exited(code)) => outcome.exit_code = Some(*code),
            Some(Ending::Signalled(signal)) => outcome.signal = Some(signal_name(*signal)),
            _ => {}
        }
        outcome
    }
}

/// Puts what the runs wrote into the outcome, as much as a reply has room for.
pub fn show_output(outcome: &mut Outcome, runs: &[FinishedRun]) {
    let mut stdout = runs.iter().map(|run| run.stdout.as_str()).collect();
    let mut stderr = runs.iter().map(|run| run.stderr.as_str()).collect();
    outcome.truncated |= cut_outputs(&mut stdout, &mut stderr);
    outcome.stdout = Some(stdout);
    outcome.stderr = Some(stderr);
}

/// The name of a signal's number on Linux.
pub fn signal_name(signal: i32) -> String {
    let known = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    let index = usize::try_from(signal - 1).ok();
    match index.and_then(|index| known.get(index)) {
        Some(name) => format!("SIG{name}"),
        None => format!("SIGRT{signal}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{INDEX_SAID, Limits, SubmissionRequest};

    fn submission(json: &str) -> Submission {
        let request: SubmissionRequest = serde_json::from_str(json).unwrap();
        request.validate(&Limits::MAXIMUM).unwrap()
    }

    fn run(ending: Ending, stdout: &str) -> FinishedRun {
        FinishedRun {
            report: Some(RunReport {
                ending,
                duration_ms: 1,
                usage: Usage::default(),
                truncated: false,
                test_report: None,
                listened: false,
            }),
            stdout: stdout.to_owned(),
            ..FinishedRun::default()
        }
    }

    #[test]
    fn only_exit_code_0_passes() {
        let s = submission(r#"{"user_id":"t","code":""}"#);
        let decided = |ending| {
            let verdict = decide(&s, &[run(ending, "")]);
            (verdict.status, verdict.reason)
        };
        assert_eq!(decided(Ending::Exited(0)), (Status::TestsPassed, None));
        assert_eq!(
            decided(Ending::Exited(137)),
            (Status::TestsFailed, Some(Reason::ExitCode))
        );
        assert_eq!(
            decided(Ending::Signalled(11)),
            (Status::TestsFailed, Some(Reason::Signal))
        );
        assert_eq!(
            decided(Ending::Limit(Reason::Timeout)),
            (Status::TestsFailed, Some(Reason::Timeout))
        );
        assert_eq!(decided(Ending::Cancelled), (Status::Cancelled, None));
        assert_eq!(
            decided(Ending::NotStarted(String::new())),
            (Status::Unavailable, None)
        );
        assert_eq!(
            decided(Ending::Starved { waited_ms: 1 }),
            (Status::Unavailable, None)
        );
        assert_eq!(
            decide(&s, &[FinishedRun::default()]).status,
            Status::Unavailable
        );
    }

    #[test]
    fn what_does_not_compile_is_the_programs_failure_and_a_lost_compiler_is_not() {
        let judged = |run: FinishedRun| {
            let verdict = judge_compile(&run)?;
            let code = verdict.error.as_ref().map(|error| error.code.clone());
            assert_eq!(verdict.outcome(&[run]).exit_code, None);
            Some((verdict.status, verdict.reason, code))
        };
        let compile = Some(Reason::Compile);
        assert_eq!(judged(run(Ending::Exited(0), "warning")), None);
        assert_eq!(
            judged(run(Ending::Exited(1), "error")),
            Some((Status::TestsFailed, compile, None))
        );
        let limit = judged(run(Ending::Limit(Reason::Memory), ""));
        let code = Some("compile_limit".to_owned());
        assert_eq!(limit, Some((Status::TestsFailed, compile, code)));
        let (status, reason, _) = judged(run(Ending::Cancelled, "")).unwrap();
        assert_eq!((status, reason), (Status::Cancelled, None));
        let (status, reason, _) = judged(FinishedRun::default()).unwrap();
        assert_eq!((status, reason), (Status::Unavailable, None));
    }

    #[test]
    fn an_index_that_failed_is_not_the_programs_fault() {
        let pip = crate::model::Packages::python().unwrap();
        let judged = |ending: Ending, said: &str| {
            let mut run = run(ending, "");
            run.stderr = format!("ERROR: No matching distribution found\n{said}\n");
            let verdict = judge_install(&run, pip, &Limits::COMPILE).unwrap();
            (verdict.status, verdict.reason, verdict.error.unwrap().code)
        };
        let failed = format!("{INDEX_SAID}503 Service Unavailable");
        let expected = (
            Status::Unavailable,
            None,
            "package_index_unavailable".to_owned(),
        );
        assert_eq!(judged(Ending::Exited(INDEX_FAILED), &failed), expected);
        // Neither the words nor the code alone say so.
        let own = Some(Reason::Compile);
        let expected = (
            Status::TestsFailed,
            own,
            "packages_not_installed".to_owned(),
        );
        assert_eq!(judged(Ending::Exited(1), &failed), expected);
        assert_eq!(judged(Ending::Exited(INDEX_FAILED), ""), expected);
    }

    #[test]
    fn a_case_compares_what_came_out() {
        let s = submission(
            r#"{"user_id":"t","code":"","tests":[{"name":"a","expected_stdout":"1\n"},{"name":"b"}]}"#,
        );
        let decided = |out: &str| {
            decide(
                &s,
                &[run(Ending::Exited(0), out), run(Ending::Exited(0), "?")],
            )
        };
        for good in ["1\n", "1", "1 \r\n"] {
            assert_eq!(decided(good).status, Status::TestsPassed, "{good:?}");
        }
        let bad = decided("2\n");
        assert_eq!(
            (bad.status, bad.reason),
            (Status::TestsFailed, Some(Reason::Tests))
        );
        assert_eq!(bad.tests[0].actual.as_deref(), Some("2\n"));
        let said = bad.tests[0].message.as_deref().unwrap();
        assert!(said.contains("line 1, column 1"), "{said}");
        let exact = submission(
            r#"{"user_id":"t","code":"","tests":[{"name":"a","expected_stdout":"1\n","compare":"exact"}]}"#,
        );
        let verdict = decide(&exact, &[run(Ending::Exited(0), "1")]);
        assert_eq!(verdict.status, Status::TestsFailed);
    }

    #[test]
    fn a_case_keeps_its_reason_and_the_first_that_failed_gives_the_replys() {
        let cases = |count: usize| {
            let cases: Vec<String> = (0..count).map(|n| format!(r#"{{"name":"{n}"}}"#)).collect();
            let cases = cases.join(",");
            submission(&format!(r#"{{"user_id":"t","code":"","tests":[{cases}]}}"#))
        };
        let endings = [
            (Ending::Exited(0), None, None, None),
            (Ending::Exited(3), Some(Reason::ExitCode), Some(3), None),
            (
                Ending::Signalled(11),
                Some(Reason::Signal),
                None,
                Some("SIGSEGV"),
            ),
            (
                Ending::Limit(Reason::Memory),
                Some(Reason::Memory),
                None,
                None,
            ),
        ];
        let runs: Vec<FinishedRun> = endings
            .iter()
            .map(|(ending, ..)| FinishedRun {
                stderr: format!("{}end", "x".repeat(9_000)),
                ..run(ending.clone(), "out")
            })
            .collect();
        let verdict = decide(&cases(4), &runs);
        assert_eq!(verdict.reason, Some(Reason::ExitCode));
        let outcome = verdict.outcome(&runs);
        assert_eq!((outcome.exit_code, outcome.signal), (Some(3), None));
        for (test, (_, reason, exit_code, signal)) in verdict.tests.iter().zip(&endings) {
            assert_eq!(&test.reason, reason);
            assert_eq!(&test.signal.as_deref(), signal);
            assert_eq!(test.exit_code, exit_code.or(reason.is_none().then_some(0)));
            assert!(test.usage.is_some());
            let said = test.stderr.as_deref().unwrap_or_default();
            assert_eq!(
                said.ends_with("end") && said.len() <= MAX_SAID,
                reason.is_some()
            );
            assert_eq!(test.truncated, reason.is_some());
        }
        let counts = TestCounts {
            passed: 1,
            failed: 3,
            ..TestCounts::default()
        };
        assert_eq!(outcome.test_counts, Some(counts));
        let signalled = decide(&cases(2), &runs[2..]);
        assert_eq!(signalled.reason, Some(Reason::Signal));
    }

    #[test]
    fn a_test_run_without_a_whole_report_never_passes() {
        let s = submission(r#"{"user_id":"t","code":"","tests":{"test_a.py":""}}"#);
        let verdict = |report: Option<&str>, ending| {
            let mut run = run(ending, "");
            run.tests = report.map(report::parse);
            let verdict = decide(&s, &[run]);
            let error = verdict.error.map(|error| error.code);
            (verdict.status, verdict.reason, error, verdict.tests.len())
        };
        let ended = |report: &str| verdict(Some(report), Ending::Exited(0));
        let failed = |code: &str, tests| {
            let code = Some(code.to_owned());
            (Status::TestsFailed, Some(Reason::Tests), code, tests)
        };
        assert_eq!(
            verdict(None, Ending::Exited(0)),
            failed("test_report_missing", 0)
        );
        assert_eq!(ended("{"), failed("test_report_invalid", 0));
        assert_eq!(ended("{\"end\":0}"), failed("no_test_ran", 0));
        let one = |outcome: &str| {
            format!("{{\"test\":{{\"name\":\"b\",\"outcome\":\"{outcome}\",\"ms\":0}}}}\n")
        };
        let whole = |outcome: &str| one(outcome) + "{\"end\":1}";
        for left_out in ["skipped", "todo"] {
            assert_eq!(ended(&whole(left_out)), failed("no_test_ran", 1));
            let ended = verdict(Some(&whole(left_out)), Ending::Exited(5));
            assert_eq!(ended, failed("no_test_ran", 1));
        }
        let passed = ended(&whole("passed"));
        assert_eq!(passed, (Status::TestsPassed, None, None, 1));
        let empty = ended(&whole("empty"));
        assert_eq!(empty, (Status::TestsFailed, Some(Reason::Tests), None, 1));
        // What can be read of it is listed, whatever the exit code is.
        let damaged = one("passed") + "x";
        assert_eq!(ended(&damaged), failed("test_report_invalid", 1));
        let (status, reason, code, tests) = verdict(Some(&damaged), Ending::Exited(1));
        assert_eq!((status, tests), (Status::TestsFailed, 1));
        assert_eq!(
            (reason, code.as_deref()),
            (Some(Reason::ExitCode), Some("test_report_invalid"))
        );
        let damaged = one("failed") + "x";
        for code in [0, 1] {
            let ended = verdict(Some(&damaged), Ending::Exited(code));
            assert_eq!(ended, failed("test_report_invalid", 1));
        }
        // Nobody but the limit ended it early.
        let timeout = verdict(Some(&one("passed")), Ending::Limit(Reason::Timeout));
        assert_eq!(
            timeout,
            (Status::TestsFailed, Some(Reason::Timeout), None, 1)
        );
        let (_, reason, code, _) = verdict(Some(&whole("passed")), Ending::Exited(1));
        assert_eq!(
            (reason, code.as_deref()),
            (Some(Reason::ExitCode), Some("test_run_failed"))
        );
    }

    #[test]
    fn signals_have_their_names() {
        for (number, name) in [
            (1, "SIGHUP"),
            (9, "SIGKILL"),
            (11, "SIGSEGV"),
            (15, "SIGTERM"),
            (24, "SIGXCPU"),
            (31, "SIGSYS"),
            (34, "SIGRT34"),
        ] {
            assert_eq!(signal_name(number), name);
        }
    }
}
