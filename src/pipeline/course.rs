//! One submission's way to its terminal status. Every decision is made from what the journal holds,
//! so a server that starts again takes it up where the last one left it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::time::{sleep, timeout};

use super::Inner;
use super::claims::AWAY_PATIENCE;
use super::control::{Control, Recorded};
use super::line::{self, Lent};
use super::plan::{self, Plan};
use super::queue::Permit;
use super::text::TextDecoder;
use super::verdict::{
    FinishedRun, Verdict, decide, judge_case, judge_compile, judge_file, judge_install, show_output,
};
use crate::journal::{Appended, JournalError, NewRecord};
use crate::model::{
    Event, Order, Outcome, OutputStream, Problem, Reason, Record, ReplId, RunReport, SUPERSEDED,
    Serves, Status, Step, StepState, Submission, TestFiles, TestResult, Tested, Tests, superseded,
};
use crate::platform::{PlatformError, ReleaseSpec, RunningRelease};
use crate::runner::client::{Run, RunEvent, Session};
use crate::runner::wire::{Job, JobEvent, JobId, scratch_bytes};

/// How much longer than its wall-clock limit a run may be silent. The runner stops it at the limit;
/// a slot may have to be waited for, and a lost connection made anew, both within a minute.
const RUNNER_GRACE: Duration = Duration::from_secs(60);

/// Wait for what a runner may have said already.
const NEWS_PATIENCE: Duration = Duration::from_secs(5);

/// Most bytes that all runs of a submission write together; the one that passes it is stopped at its
/// output limit. A test case has at most a quarter of it, and everything is in memory at the verdict.
const MAX_OUTPUT_BYTES: u64 = 64 << 20;

/// Servers that may end while a submission is under way: it is taken up once, and not again.
const MAX_CRASHES: u32 = 2;

/// Output up to this many bytes stays in memory: a thousand submissions under way, as many as a user may have,
/// hold no more than 64 MiB of it. More is read back from the journal when it is needed.
const SMALL_OUTPUT: u64 = 64 << 10;

/// Between two tries to write to a journal whose disk is full or failing.
pub const JOURNAL_PAUSE: Duration = Duration::from_secs(1);

/// What an earlier server had recorded of the submission.
#[derive(Debug, Default)]
pub struct History {
    steps: HashSet<(Step, StepState)>,
    queued: bool,
    tests: usize,
    runs: Vec<RecordedRun>,
    received: Option<Timestamp>,
    /// The key that it was sent with.
    key: Option<String>,
    /// Whether it was under way when an earlier server ended.
    begun: bool,
    /// Servers that ended while it was under way without having been asked to.
    crashes: u32,
    /// Its place in the journal.
    position: u64,
    /// When it was sent.
    sent: Option<Timestamp>,
    /// What came in frames of its own.
    input: Vec<Recorded>,
    /// It was asked to end, and why.
    cancelled: Option<Option<Problem>>,
    /// What was asked of its repl later, and stands.
    overtaken: Option<String>,
}

#[derive(Debug, Default, Clone)]
struct RecordedRun {
    /// Up to here everything the program wrote is in the texts.
    last_seq: u64,
    /// Bytes of stdout's and stderr's text that came after it: a character was cut in two there, and
    /// its other half is not in the journal. They come again and are passed over.
    beyond: [usize; 2],
    report: Option<RunReport>,
    stdout: String,
    stderr: String,
}

impl History {
    /// Of a submission that was received just now, at this position.
    pub fn beginning(position: u64) -> Self {
        Self {
            position,
            sent: Some(Timestamp::now()),
            ..Self::default()
        }
    }

    /// Reads it back. The first record carries the submission itself.
    pub fn read(records: Vec<Record>) -> Option<(Submission, History)> {
        let mut history = History::default();
        let mut found = None;
        for record in records {
            match record.event {
                Event::Received { submission, key } => {
                    history.position = record.position;
                    history.received = Some(record.time);
                    history.sent = history.received;
                    history.key = key;
                    found = Some(*submission);
                }
                Event::Queued => history.queued = true,
                Event::Step { name, state, .. } => {
                    history.begun |= name == Step::Sandbox;
                    history.steps.insert((name, state));
                }
                // Its last server had it under way, unless it merely waited or was put down.
                Event::TakenUp => {
                    history.crashes += u32::from(history.begun);
                    history.begun = true;
                }
                Event::PutDown => history.begun = false,
                Event::Input { data, eof } => history.input.push((record.position, data, eof)),
                Event::Cancelled { why } => history.cancelled = Some(why),
                Event::Overtaken { by } => history.overtaken = Some(by),
                Event::Output {
                    stream,
                    data,
                    run,
                    run_seq,
                } => {
                    let run = history.run(run);
                    if run_seq > run.last_seq {
                        run.last_seq = run_seq;
                        run.beyond = [0; 2];
                    } else {
                        run.beyond[stream as usize] += data.len();
                    }
                    match stream {
                        OutputStream::Stdout => run.stdout.push_str(&data),
                        OutputStream::Stderr => run.stderr.push_str(&data),
                    }
                }
                Event::RunEnded { run, report } => history.run(run).report = Some(report),
                Event::Test(_) => history.tests += 1,
                Event::Reply(_) | Event::ProgramOutput { .. } | Event::Repl { .. } => {}
            }
        }
        found.map(|submission| (submission, history))
    }

    /// The key that it was sent with.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Takes what came in frames of its own.
    pub fn take_input(&mut self) -> Vec<Recorded> {
        std::mem::take(&mut self.input)
    }

    /// Whether it was asked to end, and why.
    pub fn cancelled(&self) -> Option<Option<Problem>> {
        self.cancelled.clone()
    }

    /// What was asked of its repl later, and stands.
    pub fn overtaken(&self) -> Option<&str> {
        self.overtaken.as_deref()
    }

    fn run(&mut self, number: u32) -> &mut RecordedRun {
        let index = number as usize;
        if self.runs.len() <= index {
            self.runs.resize(index + 1, RecordedRun::default());
        }
        &mut self.runs[index]
    }
}

/// One submission under way.
pub struct Course {
    inner: Arc<Inner>,
    submission: Submission,
    control: Arc<Control>,
    history: History,
    started: Instant,
    step_started: Instant,
    /// The place of its last record.
    recorded: AtomicU64,
    /// The numbers of its tests' runs whose output only the journal has, since it is much.
    let_go: Vec<u32>,
    /// These runs, once their output is all that their outcome lacks.
    lacking: Vec<FinishedRun>,
}

impl Course {
    /// Of a submission whose `Received` is in the journal.
    pub fn new(
        inner: Arc<Inner>,
        submission: Submission,
        control: Arc<Control>,
        history: History,
    ) -> Self {
        Self {
            inner,
            submission,
            control,
            history,
            started: Instant::now(),
            step_started: Instant::now(),
            recorded: AtomicU64::new(0),
            let_go: Vec::new(),
            lacking: Vec::new(),
        }
    }

    /// Takes it to its end. `permit`: its turn has come already.
    pub async fn run(mut self, permit: Option<Permit>) {
        let (journal, control) = (self.inner.journal.clone(), Arc::clone(&self.control));
        let ended = async {
            let mut outcome = self.steps(permit).await?;
            let status = outcome.status;
            let mut lacking = std::mem::take(&mut self.lacking);
            // Its JSON and its frame in the journal are copies of what the program wrote.
            let _alone = match lacking.is_empty() {
                false => self.inner.large_outputs.acquire().await.ok(),
                true => None,
            };
            if !lacking.is_empty() {
                self.read_output(&mut lacking).await?;
                show_output(&mut outcome, &lacking);
                drop(lacking);
            }
            self.append(Event::Reply(Box::new(outcome))).await?;
            Ok(status)
        };
        let ended = tokio::select! {
            ended = ended => ended,
            () = control.hand_over(&journal) => Err(JournalError::Closed),
        };
        let status = match ended {
            Ok(status) => status,
            Err(JournalError::Closed) => {
                tracing::info!(submission = %self.submission.id, "left to the next start");
                return;
            }
            Err(error) => {
                tracing::error!(submission = %self.submission.id, %error, "a submission cannot be recorded");
                // Nobody waits for its reply for ever: this one is small.
                let outcome = self.not_recorded(&error);
                let status = outcome.status;
                match self.append(Event::Reply(Box::new(outcome))).await {
                    Ok(_) => status,
                    // There is nowhere to put a reply.
                    Err(error) => {
                        tracing::error!(submission = %self.submission.id, %error, "a submission cannot be answered");
                        return;
                    }
                }
            }
        };
        metrics::counter!("gantry_submissions_total", "status" => status.as_str()).increment(1);
        metrics::histogram!("gantry_submission_seconds")
            .record(self.started.elapsed().as_secs_f64());
    }

    async fn steps(&mut self, permit: Option<Permit>) -> Result<Outcome, JournalError> {
        if self.history.crashes >= MAX_CRASHES {
            return Ok(self.given_up());
        }
        self.step(Step::Receive, StepState::Passed).await?;
        if !self.history.queued {
            self.append(Event::Queued).await?;
        }
        let inner = Arc::clone(&self.inner);
        if let Some(problem) = inner.platform.lacks(self.submission.language).await {
            return Ok(self.unavailable(problem));
        }
        let turn = async {
            match permit {
                Some(permit) => permit,
                None => inner.queue.turn(&self.submission.user_id).await,
            }
        };
        let permit = tokio::select! {
            biased;
            () = self.control.cancelled() => {
                self.end_run();
                return Ok(self.ended(Outcome::new(Status::Cancelled)));
            }
            permit = turn => permit,
        };
        let tested = self.test().await?;
        drop(permit);
        let has_run = tested.is_ok();
        let outcome = self.conclude(tested).await?;
        if has_run {
            for build in self.plan().builds() {
                inner.sessions.of(&self.submission.user_id).forget(build);
            }
        }
        Ok(outcome)
    }

    /// Reads back what these runs wrote that was let go. Whoever calls this is the only one.
    async fn read_output(&self, runs: &mut [FinishedRun]) -> Result<(), JournalError> {
        let journal = &self.inner.journal;
        journal
            .durable(self.recorded.load(Ordering::Relaxed))
            .await?;
        let records = journal.read_submission(self.submission.id).await?;
        let (_, mut history) = History::read(records).ok_or(JournalError::Unknown)?;
        for (run, number) in runs.iter_mut().zip(&self.let_go) {
            let recorded = std::mem::take(history.run(*number));
            (run.stdout, run.stderr) = (recorded.stdout, recorded.stderr);
        }
        Ok(())
    }

    /// What follows from the test.
    async fn conclude(&mut self, tested: Tried) -> Result<Outcome, JournalError> {
        let (verdict, runs) = match tested {
            Ok(tested) => tested,
            // Nothing has run yet.
            Err(_) if self.control.is_cancelled() => {
                return Ok(self.ended(Outcome::new(Status::Cancelled)));
            }
            Err(problem) => return Ok(self.unavailable(problem)),
        };
        let mut outcome = verdict.outcome(&runs);
        let listened = |run: &FinishedRun| run.report.as_ref().is_some_and(|r| r.listened);
        let has_listened = runs.iter().any(listened);
        // Until the reply, which a deploy may delay, only the outcome holds what they wrote, and nothing when it
        // is much.
        if !self.let_go.is_empty() && outcome.stdout.is_some() {
            self.lacking = runs;
        } else {
            drop(runs);
        }
        if verdict.status == Status::TestsFailed && outcome.error.is_none() {
            outcome.error = match outcome.reason {
                Some(Reason::Disk) => Some(self.too_large()),
                _ => self.not_installed(),
            };
        }
        if verdict.status == Status::TestsPassed && self.submission.deploy {
            let serves = Serves::of(self.submission.serves, has_listened);
            match self.control.close() {
                true => self.deploy(&mut outcome, serves).await?,
                false => outcome.status = Status::Cancelled,
            }
        }
        Ok(self.ended(outcome))
    }

    /// Runs what is to be run and decides. The inner error: Gantry's side failed.
    async fn test(&mut self) -> Result<Tried, JournalError> {
        self.step(Step::Sandbox, StepState::Started).await?;
        let session = self.inner.sessions.of(&self.submission.user_id);
        // It may take minutes while the platform is away; nobody who has changed their mind waits.
        let ready = tokio::select! {
            ready = session.ready() => ready,
            () = self.control.cancelled() => Err("the submission was cancelled".to_owned()),
        };
        if let Err(why) = ready {
            self.step(Step::Sandbox, StepState::Failed).await?;
            return Ok(Err(Problem::new(
                "sandbox_unavailable",
                "The sandbox is not available",
                why,
                "Try again; if it lasts, the operator finds the reason in the server's log.",
            )));
        }
        self.step(Step::Sandbox, StepState::Passed).await?;
        if let Some(ended) = self.install(&session).await? {
            return Ok(ended);
        }
        if let Some(job) = self.plan().compile_job()
            && let Some(ended) = self.compile(&session, job).await?
        {
            return Ok(Ok(ended));
        }
        self.step(Step::Test, StepState::Started).await?;
        let mut runs = Vec::new();
        let mut told = 0;
        let mut output_left = MAX_OUTPUT_BYTES;
        let mut numbers = Vec::new();
        let mut much = false;
        for (number, mut job) in self.plan().test_jobs().enumerate() {
            job.limits.output_bytes = job.limits.output_bytes.min(output_left);
            numbers.push(job.id.run);
            let mut run = self.one_run(&session, job).await?;
            run.read_tests().await;
            let written = run.stdout.len() + run.stderr.len();
            output_left = output_left.saturating_sub(written as u64);
            much |= MAX_OUTPUT_BYTES - output_left > SMALL_OUTPUT;
            let undecided = run.report.is_none() || self.control.is_cancelled();
            let result = match &self.submission.tests {
                Tests::Cases(cases) => cases.get(number).map(|case| judge_case(case, &run)),
                Tests::Files(files) => match &self.submission.language.tests {
                    TestFiles::Each(command) => files
                        .get(number)
                        .map(|file| judge_file(&self.submission, command, file, &run)),
                    TestFiles::Runner(_) => None,
                },
                Tests::ExitCode => None,
            };
            runs.push(run);
            if let Some(result) = result {
                self.tell_test(&mut told, result).await?;
            }
            if much {
                runs.iter_mut().for_each(FinishedRun::let_go);
            }
            if undecided {
                break;
            }
        }
        let verdict = if much {
            let large_outputs = &self.inner.large_outputs;
            let _alone = large_outputs.acquire().await.ok();
            self.let_go = numbers;
            self.read_output(&mut runs).await?;
            let verdict = decide(&self.submission, &runs);
            runs.iter_mut().for_each(FinishedRun::let_go);
            verdict
        } else {
            decide(&self.submission, &runs)
        };
        if matches!(self.submission.tests, Tests::Files(_)) && !self.each_by_itself() {
            for result in verdict.tests.clone() {
                self.tell_test(&mut told, result).await?;
            }
        }
        let state = match verdict.status {
            Status::TestsPassed => StepState::Passed,
            _ => StepState::Failed,
        };
        self.step(Step::Test, state).await?;
        Ok(Ok((verdict, runs)))
    }

    /// Whether each test file has a run of its own.
    fn each_by_itself(&self) -> bool {
        matches!(self.submission.language.tests, TestFiles::Each(_))
    }

    /// What its runs are.
    fn plan(&self) -> Plan<'_> {
        Plan::new(&self.submission, &self.inner.packages)
    }

    /// Installs what the program depends on. `Some`: that was its end.
    async fn install(&mut self, session: &Session) -> Result<Option<Tried>, JournalError> {
        let plan = self.plan();
        let (Some(install), Some(index), Some(job)) =
            (plan.install, plan.index, plan.install_job())
        else {
            return Ok(None);
        };
        let limits = job.limits;
        let lent = line::lend(
            &self.inner.platform,
            &self.submission.user_id,
            job.id,
            index.places.clone(),
            &self.inner.meters,
        );
        let before = (Step::Install, StepState::Started);
        let taken_up = self.history.steps.contains(&before);
        self.step(Step::Install, StepState::Started).await?;
        let run = self.one_run(session, job).await?;
        let verdict = judge_install(&run, install, &limits);
        let ended = verdict.map(|verdict| match not_its_own(&verdict, &lent, taken_up) {
            Some(problem) => Err(problem),
            None => Ok((verdict, vec![run])),
        });
        let state = match ended {
            None => StepState::Passed,
            Some(_) => StepState::Failed,
        };
        self.step(Step::Install, state).await?;
        Ok(ended)
    }

    /// Compiles the program. `Some`: that was its end.
    async fn compile(
        &mut self,
        session: &Session,
        job: Job,
    ) -> Result<Option<(Verdict, Vec<FinishedRun>)>, JournalError> {
        self.step(Step::Compile, StepState::Started).await?;
        let run = self.one_run(session, job).await?;
        let verdict = judge_compile(&run);
        let state = match verdict {
            None => StepState::Passed,
            Some(_) => StepState::Failed,
        };
        self.step(Step::Compile, state).await?;
        Ok(verdict.map(|verdict| (verdict, vec![run])))
    }

    /// What a program's files may take.
    fn too_large(&self) -> Problem {
        let scratch = scratch_bytes(&self.inner.maximum) >> 20;
        let file = self.submission.limits.file_bytes;
        Problem::new(
            "disk_limit",
            "The program's files became too large",
            format!(
                "they may take {scratch} MiB beside what was installed and built for it, and one of them {file} bytes"
            ),
            "Write less, or ask for larger files with limits.file_bytes.",
        )
    }

    /// What a program that failed may have lacked.
    fn not_installed(&self) -> Option<Problem> {
        let plan = self.plan();
        let install = plan.install.filter(|_| plan.index.is_none())?;
        Some(Problem::new(
            "packages_not_allowed",
            format!("What {} names was not installed", install.file),
            "this server is not set up to install packages; the program ran with those that are there",
            format!(
                "Do without, or ask the operator to start the server with GANTRY_ALLOW_PACKAGES=true, \
                 and {} where the packages come from an index of their own.",
                install.registry.variable
            ),
        ))
    }

    /// One run, from wherever it is to its end.
    async fn one_run(&self, session: &Session, job: Job) -> Result<FinishedRun, JournalError> {
        let (id, patience) = (job.id, job.limits.wall() + RUNNER_GRACE);
        let takes_input = job.stdin_open;
        let before = self.history.runs.get(id.run as usize);
        let before = before.cloned().unwrap_or_default();
        let mut finished = FinishedRun {
            report: before.report.clone(),
            lost: None,
            stdout: before.stdout.clone(),
            stderr: before.stderr.clone(),
            tests: None,
        };
        if before.report.is_some() {
            return Ok(finished);
        }
        let mut run = if before.last_seq == 0 && before.beyond == [0; 2] {
            session.start(job)
        } else {
            session.attach(id, before.last_seq)
        };
        match takes_input {
            true => self.control.open_run(run.handle()),
            false => self.control.closed_run(run.handle()),
        }
        let followed = self.follow(session, &mut run, patience, &mut finished, &before);
        let result = followed.await;
        self.control.not_running();
        let last = result?;
        // The runner may forget the run when its end is on the disk; the reply need not wait for
        // this, it waits for its own record.
        let journal = self.inner.journal.clone();
        tokio::spawn(async move {
            if let Some((position, seq)) = last
                && journal.durable(position).await.is_ok()
            {
                run.stored(seq);
            }
        });
        Ok(finished)
    }

    /// Records what the run does from after what is recorded `before`, but for the first bytes of text
    /// that are recorded already. `Some` with the place of its end, when there was one.
    async fn follow(
        &self,
        session: &Session,
        run: &mut Run,
        patience: Duration,
        finished: &mut FinishedRun,
        before: &RecordedRun,
    ) -> Result<Option<(u64, u64)>, JournalError> {
        let (mut covered, mut recorded) = (before.last_seq, before.beyond);
        let JobId { run: number, .. } = run.id();
        let mut decoders = [TextDecoder::default(), TextDecoder::default()];
        let (mut silent, mut wait) = (false, patience);
        loop {
            let (seq, event) = match timeout(wait, run.next()).await {
                Ok(RunEvent::Event { seq, event }) => {
                    (silent, wait) = (false, patience);
                    (seq, event)
                }
                Ok(RunEvent::Lost(why)) => {
                    finished.lost = Some(why);
                    return Ok(None);
                }
                // The session tries on for as long as there is hope, and says when there is none.
                Err(_) if !session.is_connected() => continue,
                // This server may have been stopped itself, with what it was told waiting to be read.
                Err(_) if !silent => {
                    (silent, wait) = (true, NEWS_PATIENCE);
                    continue;
                }
                Err(_) => {
                    finished.lost = Some(format!(
                        "the sandbox said nothing for {} s, which is longer than the run may last",
                        patience.as_secs()
                    ));
                    run.handle().cancel();
                    return Ok(None);
                }
            };
            match event {
                JobEvent::Output { stream, data } => {
                    let text = decoders[stream as usize].decode(&data);
                    let text = pass_over(text, &mut recorded[stream as usize]);
                    // Whoever reads it back takes the first record of a new place for the place's own.
                    if !text.is_empty() && decoders.iter().all(TextDecoder::is_empty) {
                        covered = seq;
                    }
                    self.output(finished, stream, text, number, covered).await?;
                }
                JobEvent::Ended(report) => {
                    for stream in [OutputStream::Stdout, OutputStream::Stderr] {
                        let rest = decoders[stream as usize].finish();
                        let rest = pass_over(rest, &mut recorded[stream as usize]);
                        self.output(finished, stream, rest, number, covered).await?;
                    }
                    finished.report = Some(report.clone());
                    let ended = Event::RunEnded {
                        run: number,
                        report,
                    };
                    let Appended { position, .. } = self.append(ended).await?;
                    return Ok(Some((position, seq)));
                }
            }
        }
    }

    async fn output(
        &self,
        finished: &mut FinishedRun,
        stream: OutputStream,
        data: String,
        run: u32,
        run_seq: u64,
    ) -> Result<(), JournalError> {
        if data.is_empty() {
            return Ok(());
        }
        match stream {
            OutputStream::Stdout => finished.stdout.push_str(&data),
            OutputStream::Stderr => finished.stderr.push_str(&data),
        }
        let output = Event::Output {
            stream,
            data,
            run,
            run_seq,
        };
        self.append(output).await.map(drop)
    }

    /// Publishes and releases what passed. Safe to do again: a release is found by its submission.
    async fn deploy(&mut self, outcome: &mut Outcome, serves: Serves) -> Result<(), JournalError> {
        let repl = self.submission.repl_id.clone();
        let inner = Arc::clone(&self.inner);
        let _turn = inner.deployments.turn(&repl).await;
        if let Some(by) = self.control.overtaken() {
            return self.overtaken(outcome, superseded(&by));
        }
        let spec = self.release_spec(serves);
        // Before its files become the repl's. One that cannot be asked is asked again by the release.
        if let Ok(Some(problem)) = inner.platform.overtaken(&spec).await {
            return self.overtaken(outcome, problem);
        }
        self.step(Step::Publish, StepState::Started).await?;
        // Before anything is stored under the name.
        let user = &self.submission.user_id;
        let claimed = self
            .inner
            .claim_name_patiently(user, &repl, AWAY_PATIENCE)
            .await;
        let fresh = match claimed {
            Ok(fresh) => fresh,
            Err(not) => {
                self.step(Step::Publish, StepState::Failed).await?;
                return self.deploy_failed(outcome, not.problem(&repl));
            }
        };
        // From here on whatever is asked of the repl is noted with it; before, there may have been none, or one that
        // was deleted since it was looked at.
        let overtaken = match self.control.overtaken() {
            Some(by) => Some(superseded(&by)),
            None if fresh => inner.platform.overtaken(&spec).await.ok().flatten(),
            None => None,
        };
        if let Some(problem) = overtaken {
            if fresh {
                inner.give_back(&repl).await;
            }
            self.step(Step::Publish, StepState::Failed).await?;
            return self.overtaken(outcome, problem);
        }
        // What somebody put there before the name was anybody's is not of this submission.
        let empty = fresh && self.stores_nothing(&repl).await;
        if let Err(problem) = self.publish().await {
            if empty {
                self.take_back(&repl).await;
            }
            self.step(Step::Publish, StepState::Failed).await?;
            return self.deploy_failed(outcome, problem);
        }
        self.step(Step::Publish, StepState::Passed).await?;
        self.step(Step::Deploy, StepState::Started).await?;
        let released = self.release(&spec).await;
        match released {
            Ok(running) => {
                self.step(Step::Deploy, StepState::Passed).await?;
                self.step(Step::Ready, StepState::Passed).await?;
                outcome.status = Status::Deployed;
                outcome.release = Some(running.release);
                outcome.url = Some(running.url);
                Ok(())
            }
            Err(PlatformError::NotReady(problem)) if problem.code == SUPERSEDED => {
                self.take_back_files().await;
                self.step(Step::Deploy, StepState::Failed).await?;
                self.overtaken(outcome, problem)
            }
            Err(error) => {
                let failed = match &error {
                    PlatformError::NotReady(_) => Step::Ready,
                    PlatformError::Unavailable(_) | PlatformError::NotFound(_) => Step::Deploy,
                };
                if failed == Step::Ready {
                    self.step(Step::Deploy, StepState::Passed).await?;
                }
                self.step(failed, StepState::Failed).await?;
                let problem = match error {
                    PlatformError::NotReady(problem) | PlatformError::Unavailable(problem) => {
                        problem
                    }
                    PlatformError::NotFound(what) => Problem::new(
                        "deploy_failed",
                        "The release could not be made",
                        format!("{what} does not exist"),
                        "Submit it again.",
                    ),
                };
                self.deploy_failed(outcome, problem)
            }
        }
    }

    /// What is to be released.
    fn release_spec(&self, serves: Serves) -> ReleaseSpec {
        let submission = &self.submission;
        let sent = self.history.sent.unwrap_or_else(Timestamp::now);
        let journal = self.inner.journal.identity();
        ReleaseSpec {
            user_id: submission.user_id.clone(),
            repl_id: submission.repl_id.clone(),
            submission_id: submission.id,
            order: Order::deployment(journal, self.history.position, sent, submission.id),
            tested: Tested::of(&submission.files, &submission.tests),
            argv: plan::argv(submission, &submission.args),
            env: submission.env.clone(),
            database: submission.database,
            serves,
        }
    }

    /// In a place of its user's, which is held until the release runs.
    async fn release(&self, spec: &ReleaseSpec) -> Result<RunningRelease, PlatformError> {
        let platform = &*self.inner.platform;
        let places = &self.inner.places;
        let _place = places.take(platform, &spec.user_id, &spec.repl_id).await?;
        platform.ensure_release(spec).await
    }

    /// Stores what passed, once: what an earlier server stored is there, and what was compiled for it may
    /// not be any more.
    async fn publish(&self) -> Result<(), Problem> {
        let Submission {
            id, repl_id, files, ..
        } = &self.submission;
        let published = (Step::Publish, StepState::Passed);
        if self.history.steps.contains(&published) {
            return Ok(());
        }
        let user = &self.submission.user_id;
        let bytes: u64 = files.values().map(|text| text.len() as u64).sum();
        let Some(build) = self.plan().build() else {
            // Once as a release and once as the current files.
            self.inner.platform.admit(user, repl_id, 2 * bytes).await?;
            return self.inner.store.publish(repl_id, *id, files).await;
        };
        let session = self.inner.sessions.of(&self.submission.user_id);
        let archive = session.build(build).await.map_err(|why| {
            Problem::new(
                "build_gone",
                "What was compiled and tested is not there any more",
                why,
                "Submit it again under a new submission_id.",
            )
        })?;
        let bytes = 2 * bytes + archive.len() as u64;
        self.inner.platform.admit(user, repl_id, bytes).await?;
        let store = &self.inner.store;
        store
            .publish_built(repl_id, *id, files, Some(archive))
            .await
    }

    /// Whether the repl has no current file. A store that cannot say fails to publish too, and cannot remove what
    /// it may have: then the name stays.
    async fn stores_nothing(&self, repl: &ReplId) -> bool {
        let listed = self.inner.store.list_current(repl).await;
        listed.is_ok_and(|files| files.is_empty())
    }

    /// Gives a new name back under which nothing came to be stored.
    async fn take_back(&self, repl: &ReplId) {
        match self.inner.store.remove_repl(repl).await {
            // The next who has the name finds nothing of this user's.
            Ok(()) => self.inner.give_back(repl).await,
            Err(problem) => tracing::warn!(%repl, %problem, "a name stays taken, with its files"),
        }
    }

    /// Another replica may have deleted the repl while files were stored here for its release: the next who has the
    /// name finds none of them.
    async fn take_back_files(&self) {
        let (user, repl) = (&self.submission.user_id, &self.submission.repl_id);
        // Only then is the name free, and nobody else's while they are removed.
        if matches!(self.inner.claim_name(user, repl).await, Ok(true)) {
            self.take_back(repl).await;
        }
    }

    fn deploy_failed(&self, outcome: &mut Outcome, problem: Problem) -> Result<(), JournalError> {
        outcome.status = Status::DeployFailed;
        outcome.error = Some(problem);
        Ok(())
    }

    fn overtaken(&self, outcome: &mut Outcome, problem: Problem) -> Result<(), JournalError> {
        outcome.status = Status::Superseded;
        outcome.error = Some(problem);
        Ok(())
    }

    /// Ends the run that an earlier server began, if it is still there.
    fn end_run(&self) {
        if !self.history.begun {
            return;
        }
        let runs = &self.history.runs;
        let ended = runs.iter().take_while(|run| run.report.is_some()).count();
        let job = JobId {
            submission: self.submission.id,
            run: u32::try_from(ended).unwrap_or(u32::MAX),
        };
        let session = self.inner.sessions.of(&self.submission.user_id);
        session.cancel(job);
    }

    /// It may be what ended the servers: a third one is not put at risk.
    fn given_up(&self) -> Outcome {
        let (id, user) = (self.submission.id, &self.submission.user_id);
        tracing::error!(
            submission = %id,
            %user,
            "the server ended {MAX_CRASHES} times while this submission was under way; it is not taken up again"
        );
        self.end_run();
        self.unavailable(Problem::new(
            "server_ended_twice",
            "The submission was not taken up again",
            format!("the server ended {MAX_CRASHES} times while it was under way"),
            "Submit it again under a new submission_id; if the server ends again, the operator finds this submission's id in the server's log.",
        ))
    }

    /// What happened to it cannot be recorded, so that it is not known how it ends.
    fn not_recorded(&self, error: &JournalError) -> Outcome {
        self.unavailable(Problem::new(
            "record_failed",
            "What the submission did could not be recorded",
            error.told(),
            "Submit it again under a new submission_id, with less output or fewer tests if it was too large.",
        ))
    }

    fn unavailable(&self, problem: Problem) -> Outcome {
        let mut outcome = Outcome::new(Status::Unavailable);
        outcome.error = Some(problem);
        self.ended(outcome)
    }

    /// What every reply has.
    fn ended(&self, mut outcome: Outcome) -> Outcome {
        let elapsed = match self.history.received {
            // Taken up after a restart: only the wall clock has seen all of it.
            Some(received) => Timestamp::now().duration_since(received).unsigned_abs(),
            None => self.started.elapsed(),
        };
        if outcome.status == Status::Cancelled {
            outcome.error = outcome.error.or_else(|| self.control.why());
        }
        outcome.namespace = Some(self.submission.user_id.namespace());
        outcome.submission_id = Some(self.submission.id);
        outcome.repl_id = Some(self.submission.repl_id.clone());
        outcome.duration_ms = Some(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
        outcome
    }

    async fn tell_test(&self, told: &mut usize, result: TestResult) -> Result<(), JournalError> {
        *told += 1;
        if *told > self.history.tests {
            self.append(Event::Test(result)).await?;
        }
        Ok(())
    }

    /// Records a step, unless an earlier server did.
    async fn step(&mut self, name: Step, state: StepState) -> Result<(), JournalError> {
        let duration_ms = match state {
            StepState::Started => {
                self.step_started = Instant::now();
                None
            }
            StepState::Passed | StepState::Failed => {
                let elapsed = self.step_started.elapsed();
                self.step_started = Instant::now();
                Some(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
            }
        };
        if self.history.steps.contains(&(name, state)) {
            return Ok(());
        }
        let step = Event::Step {
            name,
            state,
            duration_ms,
        };
        self.append(step).await.map(drop)
    }

    async fn append(&self, event: Event) -> Result<Appended, JournalError> {
        let record = NewRecord {
            user_id: self.submission.user_id.clone(),
            submission_id: Some(self.submission.id),
            repl_id: self.submission.repl_id.clone(),
            event,
        };
        loop {
            match self.inner.journal.append(record.clone()).await {
                // What runs goes on meanwhile; it is recorded when there is room again.
                Err(JournalError::Full | JournalError::Failing { .. }) => {
                    sleep(JOURNAL_PAUSE).await;
                }
                Ok(appended) => {
                    let place = appended.position;
                    self.recorded.fetch_max(place, Ordering::Relaxed);
                    return Ok(appended);
                }
                failed => return failed,
            }
        }
    }
}

/// What came of a test: a verdict with its runs, or why Gantry's side failed.
type Tried = Result<(Verdict, Vec<FinishedRun>), Problem>;

/// Why an installation that failed may not have failed by what was to be installed.
fn not_its_own(verdict: &Verdict, lent: &Lent, taken_up: bool) -> Option<Problem> {
    if verdict.status != Status::TestsFailed {
        return None;
    }
    if let Some(cause) = lent.trouble() {
        return Some(Problem::new(
            "package_index_unavailable",
            "The package index cannot be reached",
            cause,
            "Try again; if it lasts, the operator checks the index that the server is set up with.",
        ));
    }
    taken_up.then(|| {
        Problem::new(
            "install_interrupted",
            "The server was restarted while packages were being installed",
            "the installer's connections go through the server, and ended with it",
            "Submit it again under a new submission_id.",
        )
    })
}

/// What is left of the text when as much of it as is `recorded` already is taken away.
fn pass_over(text: String, recorded: &mut usize) -> String {
    let passed = text.len().min(*recorded);
    *recorded -= passed;
    // The same events give the same text, so this is where a character begins.
    text.get(passed..).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{Limits, SubmissionId, SubmissionRequest};

    fn records(outputs: &[(OutputStream, &str, u64)]) -> Vec<Record> {
        let request = r#"{"user_id":"t","code":""}"#;
        let request: SubmissionRequest = serde_json::from_str(request).unwrap();
        let submission = request.validate(&Limits::MAXIMUM).unwrap();
        let received = Event::Received {
            submission: Box::new(submission.clone()),
            key: None,
        };
        let outputs = outputs.iter().map(|(stream, data, run_seq)| Event::Output {
            stream: *stream,
            data: (*data).to_owned(),
            run: 0,
            run_seq: *run_seq,
        });
        (1..)
            .zip(std::iter::once(received).chain(outputs))
            .map(|(seq, event)| Record {
                position: seq,
                seq: Some(seq),
                time: Timestamp::now(),
                user_id: submission.user_id.clone(),
                submission_id: Some(SubmissionId::new()),
                repl_id: submission.repl_id.clone(),
                event,
            })
            .collect()
    }

    #[test]
    fn only_a_submission_that_was_under_way_at_two_crashes_is_given_up() {
        let begun = || Event::Step {
            name: Step::Sandbox,
            state: StepState::Started,
            duration_ms: None,
        };
        let crashes = |events: &[Event]| {
            let mut records = records(&[]);
            let like = records[0].clone();
            records.extend(events.iter().map(|event| Record {
                event: event.clone(),
                ..like.clone()
            }));
            History::read(records).unwrap().1.crashes
        };
        use Event::{PutDown, Queued, TakenUp};
        // It waited while servers ended.
        assert_eq!(crashes(&[Queued, TakenUp]), 0);
        assert_eq!(crashes(&[Queued, begun(), TakenUp]), 1);
        assert_eq!(crashes(&[Queued, begun(), TakenUp, TakenUp]), MAX_CRASHES);
        assert_eq!(crashes(&[Queued, TakenUp, TakenUp, TakenUp]), MAX_CRASHES);
        // Servers that were asked to end do not count.
        assert_eq!(crashes(&[begun(), PutDown, TakenUp, PutDown, TakenUp]), 0);
    }

    #[test]
    fn a_character_cut_in_two_is_taken_up_where_it_began() {
        use OutputStream::{Stderr, Stdout};
        let cut = [
            (Stdout, "ab", 4),
            (Stdout, "c", 4),
            (Stderr, "xyz", 4),
            (Stdout, "d", 4),
        ];
        let (_, history) = History::read(records(&cut)).unwrap();
        assert_eq!(
            (history.runs[0].last_seq, history.runs[0].beyond),
            (4, [2, 3])
        );
        let whole = [&cut[..], &[(Stdout, "e", 9)]].concat();
        let (_, history) = History::read(records(&whole)).unwrap();
        assert_eq!(
            (history.runs[0].last_seq, history.runs[0].beyond),
            (9, [0, 0])
        );
        let mut recorded = 3;
        assert_eq!(pass_over("ab".to_owned(), &mut recorded), "");
        assert_eq!(pass_over("cü".to_owned(), &mut recorded), "ü");
    }
}
