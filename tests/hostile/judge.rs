//! What is asked of a case, on every platform: how its runs end, what its control shows.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, ensure};
use gantry::model::{Ending, Limits};
use gantry::platform::conformance::{Ended, finish, python};
use gantry::runner::client::{Piece, Session};
use gantry::runner::wire::Job;

use super::cases::{Case, Control};

/// Longest wait for a control on the machine itself.
const CONTROL_SECONDS: &str = "20";

/// A run is over this long after its wall-clock limit at the latest: the promise.
pub const KILLED_WITHIN: Duration = Duration::from_secs(1);

/// The same beside other hostile programs, which have their share of two cores while a full process
/// tree dies.
pub const KILLED_WITHIN_IN_COMPANY: Duration =
    KILLED_WITHIN.saturating_add(Duration::from_millis(1_500));

/// A run was over too late, and nothing else was wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("run {repeat} was ended {late:?} late")]
pub struct Late {
    repeat: usize,
    late: Duration,
}

/// Pieces that standard input is sent in.
const INPUT_PIECE: usize = 1 << 20;

/// Runs the case and its control. `repeats`: how often, when it has one ending; `killed_within`: how
/// late it may end. The error is [`Late`] when it was only that.
pub async fn check(
    session: &Session,
    case: &Case,
    repeats: usize,
    killed_within: Duration,
) -> anyhow::Result<()> {
    let mut first: Option<Ending> = None;
    let repeats = if case.endings.len() == 1 { repeats } else { 1 };
    for repeat in 0..repeats {
        let ended = run(session, case, case.limits).await?;
        let said = || {
            String::from_utf8_lossy(&ended.stderr)
                .chars()
                .take(400)
                .collect::<String>()
        };
        ensure!(
            case.endings.contains(&ended.report.ending),
            "run {repeat} ended with {:?}; expected {:?}; stderr: {}",
            ended.report,
            case.endings,
            said()
        );
        ensure!(
            *first.get_or_insert(ended.report.ending.clone()) == ended.report.ending,
            "run {repeat} ended with {:?} and not with {first:?}",
            ended.report.ending
        );
        let late = ended.report.duration_ms.saturating_sub(case.limits.wall_ms);
        let late = Duration::from_millis(late);
        if late > killed_within {
            return Err(Late { repeat, late }.into());
        }
        if let Some(output) = case.output {
            output(&ended.stdout, &ended.stderr)
                .map_err(|why| anyhow::anyhow!("run {repeat}: {why}; stderr: {}", said()))?;
        }
        check_report(case, &ended)?;
    }
    match &case.control {
        Control::None => Ok(()),
        Control::Limits(limits) => {
            let ended = run(session, case, *limits).await?;
            ensure!(
                ended.report.ending == Ending::Exited(0),
                "the control, with the guard off, ended with {:?}",
                ended.report
            );
            Ok(())
        }
        Control::Host(check) => {
            let said = on_the_machine(&case.code).await?;
            check(&said).map_err(|why| anyhow::anyhow!("the control on the machine: {why}"))
        }
    }
}

/// Shows how the case went, and keeps its failure.
pub fn tell(case: &Case, took: Duration, result: anyhow::Result<()>, failures: &mut Vec<String>) {
    let verdict = if result.is_ok() { "ok" } else { "FAILED" };
    println!("{verdict:6} {:6} ms  {}", took.as_millis(), case.name);
    if let Err(error) = result {
        println!("       {error:#}");
        failures.push(format!("- {}: {error:#}", case.name));
    }
}

/// A run that looks for traces of others.
pub async fn hello(session: &Session) -> anyhow::Result<()> {
    let code = "
import os, tempfile
seen = [sorted(os.listdir(f)) for f in (os.getcwd(), tempfile.gettempdir(), '/dev/shm') if f != '/dev/shm' or os.access(f, os.W_OK)]
print('hello', seen)
";
    let ended = finish(&mut session.start(python(code)))
        .await
        .context("hello")?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    ensure!(
        ended.report.ending == Ending::Exited(0) && said.starts_with("hello [['main.py'], []"),
        "the next hello: {:?} {said:?} {:?}",
        ended.report,
        String::from_utf8_lossy(&ended.stderr)
    );
    ensure!(!said.contains("[], ['"), "left in /dev/shm: {said}");
    Ok(())
}

/// Whether what was taken as the run's report may be that.
pub fn check_report(case: &Case, ended: &Ended) -> anyhow::Result<()> {
    let report = ended.report.test_report.as_deref().unwrap_or_default();
    ensure!(
        case.report.is_none_or(|may_be| may_be(report)),
        "{} bytes are taken as its report, which begin with {:?}",
        report.len(),
        report.get(..200).unwrap_or(report)
    );
    Ok(())
}

/// One run of the case within these limits.
pub async fn run(session: &Session, case: &Case, limits: Limits) -> anyhow::Result<Ended> {
    let mut job: Job = python(&case.code);
    if case.bash {
        job.files[0].0 = "main.sh".to_owned();
        job.argv = vec!["bash".to_owned(), "main.sh".to_owned()];
    }
    job.limits = limits;
    job.stdin_open = case.stdin > 0;
    job.report = case.report.is_some();
    let mut run = session.start(job);
    let handle = run.handle();
    for number in 0..case.stdin / INPUT_PIECE {
        handle.stdin(Piece {
            offset: (number * INPUT_PIECE) as u64,
            data: vec![b'x'; INPUT_PIECE].into(),
            eof: false,
        });
    }
    finish(&mut run).await
}

/// The same program, outside any sandbox.
async fn on_the_machine(code: &str) -> anyhow::Result<String> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("main.py"), code)?;
    let mut command = std::process::Command::new("timeout");
    command
        .args([CONTROL_SECONDS, "python3", "main.py"])
        .current_dir(folder.path())
        .stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await??;
    ensure!(output.status.code() != Some(124), "the control hangs");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr))
}
