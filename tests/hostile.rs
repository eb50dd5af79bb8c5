//! Hostile programs against the local platform. Every case has to end as the table says, the same
//! each time, and leave nothing behind; every denial is proved by the same program with the one
//! guard off.
//!
//! `GANTRY_TEST_FULL=1`: every exit code, 20 repeats. `GANTRY_TEST_CASE=word`: the cases with this
//! word in their names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "hostile/cases.rs"]
mod cases;
#[path = "hostile/neighbours.rs"]
mod neighbours;
#[path = "hostile/programs.rs"]
mod programs;
#[path = "hostile/traces.rs"]
mod traces;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use cases::{Case, Control};
use gantry::model::{Ending, Limits, UserId};
use gantry::platform::conformance::{Ended, finish, python};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::platform::{Finding, Platform, Sessions};
use gantry::runner::client::Session;
use gantry::runner::wire::Job;
use gantry::storage::DirectoryStore;
use programs::Surroundings;
use traces::Sandbox;

/// Tests that measure, and the one that uses the whole machine, take turns.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Cases at one time, each as a user of its own: one more than cores, since most of them wait.
const LANES: usize = 3;

/// Repeats of a case with one ending.
const REPEATS: usize = 3;
const FULL_REPEATS: usize = 20;

/// Longest wait for a control on the machine itself.
const CONTROL_SECONDS: &str = "20";

/// A run is over this long after its wall-clock limit at the latest. A second is the promise; here
/// the other lanes' programs, hostile too, have their share of two cores while a full process tree dies.
const KILLED_WITHIN_MS: u64 = 2_500;

/// Pieces that standard input is sent in.
const INPUT_PIECE: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn hostile_programs_end_as_they_should_and_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    let data = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(data.path().join("keys")).unwrap();
    std::fs::write(data.path().join("keys/admin"), "a key").unwrap();
    // Left open for whatever is started from here on, as a careless starter of the server might.
    let key = std::fs::File::open(data.path().join("keys/admin")).unwrap();
    rustix::io::fcntl_setfd(&key, rustix::io::FdFlags::empty()).unwrap();
    let platform = Arc::new(start(data.path()).await);
    let isolated = is_isolated(&platform);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let name = format!("gantry-hostile-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let _abstract = UnixListener::bind_addr(&address).unwrap();
    let surroundings = Surroundings {
        data: data.path().to_owned(),
        port: tcp.local_addr().unwrap().port(),
        name,
    };
    let full = std::env::var_os("GANTRY_TEST_FULL").is_some();
    let word = std::env::var("GANTRY_TEST_CASE").unwrap_or_default();
    let mut cases = cases::all(full, &surroundings);
    cases.retain(|case| case.name.contains(&word) && (isolated || !case.isolated));
    cases.reverse();
    let lanes = Lanes {
        cases: Arc::new(Mutex::new(cases)),
        sessions: Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>),
        repeats: if full { FULL_REPEATS } else { REPEATS },
        data: data.path().to_owned(),
        isolated,
    };
    let lanes: Vec<_> = (0..LANES)
        .map(|lane| tokio::spawn(lanes.clone().run(lane)))
        .collect();
    let mut failures = Vec::new();
    for lane in lanes {
        failures.extend(lane.await.unwrap());
    }
    platform.shutdown().await;
    assert!(
        failures.is_empty(),
        "{} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

async fn start(data: &Path) -> LocalPlatform {
    let store = DirectoryStore::open(data.join("store")).unwrap();
    let config = LocalConfig {
        data: data.to_owned(),
        runner: env!("CARGO_BIN_EXE_gantry-runner").into(),
        runs_per_user: 1,
        maximum: Limits::MAXIMUM,
        network: false,
        app_authority: "apps.localhost:8000".to_owned(),
    };
    LocalPlatform::start(config, store).await.unwrap()
}

/// Whether slots have user ids of their own. Where results count they must.
fn is_isolated(platform: &LocalPlatform) -> bool {
    let checks = platform.checks();
    let isolation = checks
        .iter()
        .find(|check| check.name == "isolation")
        .unwrap();
    if isolation.finding == Finding::Good {
        return true;
    }
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "the hostile suite proves too little here, start it as root: {isolation:?}"
    );
    println!("WEAKER: cases that need full isolation are left out: {isolation:?}");
    false
}

#[derive(Clone)]
struct Lanes {
    cases: Arc<Mutex<Vec<Case>>>,
    sessions: Sessions,
    repeats: usize,
    data: std::path::PathBuf,
    isolated: bool,
}

impl Lanes {
    /// Takes cases until there are none; what failed is returned.
    async fn run(self, lane: usize) -> Vec<String> {
        let user: UserId = format!("hostile-{lane}").parse().unwrap();
        let session = self.sessions.of(&user);
        let mut failures = Vec::new();
        let mut sandbox = match self.meet(&session, &user).await {
            Ok(sandbox) => sandbox,
            Err(error) => return vec![format!("lane {lane}: {error:#}")],
        };
        loop {
            let Some(case) = self.cases.lock().unwrap().pop() else {
                return failures;
            };
            let started = Instant::now();
            let mut result = self.check(&session, &case).await;
            if let Err(error) = self.nothing_is_left(&session, &sandbox).await {
                let log = sandbox.log();
                result = result.and(Err(error.context(format!("afterwards; runner.log: {log}"))));
                // What is broken now is not the next case's doing.
                if let Ok(met) = self.meet(&session, &user).await {
                    sandbox = met;
                }
            }
            let verdict = if result.is_ok() { "ok" } else { "FAILED" };
            println!(
                "{verdict:6} {:6} ms  {}",
                started.elapsed().as_millis(),
                case.name
            );
            if let Err(error) = result {
                println!("       {error:#}");
                failures.push(format!("- {}: {error:#}", case.name));
            }
        }
    }

    /// The lane's sandbox, after every slot has been used once.
    async fn meet(&self, session: &Session, user: &UserId) -> anyhow::Result<Sandbox> {
        for _ in 0..=self.slots() {
            hello(session).await?;
        }
        Sandbox::of(&self.data, user, self.slots())
    }

    /// Slots of one sandbox: the platform adds two to the runs of a user.
    fn slots(&self) -> usize {
        if self.isolated { 3 } else { 1 }
    }

    async fn check(&self, session: &Session, case: &Case) -> anyhow::Result<()> {
        let mut first: Option<Ending> = None;
        let repeats = if case.endings.len() == 1 {
            self.repeats
        } else {
            1
        };
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
            ensure!(
                late <= KILLED_WITHIN_MS,
                "run {repeat} was ended {late} ms late"
            );
            if let Some(output) = case.output {
                output(&ended.stdout, &ended.stderr)
                    .map_err(|why| anyhow::anyhow!("run {repeat}: {why}; stderr: {}", said()))?;
            }
            if let Some(expected) = case.report {
                let report = ended.report.test_report.as_deref();
                ensure!(
                    report == expected,
                    "run {repeat}: the report read is {report:?}"
                );
            }
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

    /// What has to hold after every case.
    async fn nothing_is_left(&self, session: &Session, sandbox: &Sandbox) -> anyhow::Result<()> {
        let since = Instant::now();
        if self.isolated {
            sandbox
                .is_empty_within(Duration::from_secs(1), since)
                .await?;
        }
        // Slots are used in turn: this looks into each of them.
        for _ in 0..self.slots() {
            hello(session).await?;
        }
        sandbox.is_the_same()?;
        if self.isolated {
            sandbox.has_its_descriptors_back().await?;
        }
        Ok(())
    }
}

/// A run that looks for traces of others.
async fn hello(session: &Session) -> anyhow::Result<()> {
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

async fn run(session: &Session, case: &Case, limits: Limits) -> anyhow::Result<Ended> {
    let mut job: Job = python(&case.code);
    if case.bash {
        job.files[0].0 = "main.sh".to_owned();
        job.argv = vec!["bash".to_owned(), "main.sh".to_owned()];
    }
    job.limits = limits;
    job.stdin_open = case.stdin > 0;
    job.report = case.report.map(|_| "report".to_owned());
    let mut run = session.start(job);
    let handle = run.handle();
    for _ in 0..case.stdin / INPUT_PIECE {
        handle.stdin(vec![b'x'; INPUT_PIECE], false);
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
