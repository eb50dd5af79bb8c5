//! Hostile programs against the local platform. Every case has to end as the table says, the same
//! each time, and leave nothing behind; every denial is proved by the same program with the one
//! guard off.
//!
//! `GANTRY_TEST_FULL=1`: every exit code, 20 repeats. `GANTRY_TEST_CASE=word`: the cases with this
//! word in their names.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

#[path = "hostile/cases.rs"]
mod cases;
#[path = "hostile/judge.rs"]
mod judge;
#[path = "hostile/neighbours.rs"]
mod neighbours;
#[path = "hostile/programs.rs"]
mod programs;
#[path = "hostile/sandbox.rs"]
mod sandbox;
#[path = "hostile/traces.rs"]
mod traces;

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use cases::Case;
use gantry::model::{DiskBounds, Limits, UserId};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::platform::{Finding, Platform, Sessions};
use gantry::runner::client::Session;
use gantry::storage::DirectoryStore;
use judge::{KILLED_WITHIN, KILLED_WITHIN_IN_COMPANY, Late, check, hello, tell};
use programs::Surroundings;
use sandbox::Sandbox;

/// Tests that measure, and the one that uses the whole machine, take turns.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// Cases at one time, each as a user of its own: one more than cores, since most of them wait.
const LANES: usize = 3;

/// Repeats of a case with one ending.
const REPEATS: usize = 3;
const FULL_REPEATS: usize = 20;

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
    let running: Vec<_> = (0..LANES)
        .map(|lane| tokio::spawn(lanes.clone().run(lane, KILLED_WITHIN_IN_COMPANY)))
        .collect();
    let mut failures = Vec::new();
    let mut late = Vec::new();
    for lane in running {
        let outcome = lane.await.unwrap();
        failures.extend(outcome.failures);
        late.extend(outcome.late);
    }
    if !late.is_empty() {
        // Whose doing it was shows when they are alone: here the promise itself has to hold.
        println!("Alone, since they were late in company:");
        *lanes.cases.lock().unwrap() = late;
        let outcome = lanes.run(LANES, KILLED_WITHIN).await;
        failures.extend(outcome.failures);
        failures.extend(
            outcome
                .late
                .iter()
                .map(|case| format!("- {}: late, also alone", case.name)),
        );
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
        packages: Default::default(),
        log_refused: false,
        drain: Duration::from_secs(10),
        sites: gantry::model::Sites::plain("apps.localhost:8000", "localhost:8000"),
        disk: DiskBounds::USUAL,
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

/// What came of a lane's cases.
#[derive(Default)]
struct Outcome {
    failures: Vec<String>,
    /// Those with nothing wrong but that they were ended late.
    late: Vec<Case>,
}

impl Lanes {
    /// Takes cases until there are none.
    async fn run(self, lane: usize, killed_within: Duration) -> Outcome {
        let user: UserId = format!("hostile-{lane}").parse().unwrap();
        let session = self.sessions.of(&user);
        let mut outcome = Outcome::default();
        let mut sandbox = match self.meet(&session, &user).await {
            Ok(sandbox) => sandbox,
            Err(error) => {
                outcome.failures.push(format!("lane {lane}: {error:#}"));
                return outcome;
            }
        };
        loop {
            let Some(case) = self.cases.lock().unwrap().pop() else {
                return outcome;
            };
            let started = Instant::now();
            let mut result = check(&session, &case, self.repeats, killed_within).await;
            if let Err(error) = self.nothing_is_left(&session, &sandbox).await {
                let log = sandbox.log();
                result = result.and(Err(error.context(format!("afterwards; runner.log: {log}"))));
                // What is broken now is not the next case's doing.
                if let Ok(met) = self.meet(&session, &user).await {
                    sandbox = met;
                }
            }
            match result {
                Err(error) if error.is::<Late>() => {
                    println!(
                        "late   {:6} ms  {}: {error}",
                        started.elapsed().as_millis(),
                        case.name
                    );
                    outcome.late.push(case);
                }
                result => tell(&case, started.elapsed(), result, &mut outcome.failures),
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

    /// What has to hold after every case.
    async fn nothing_is_left(&self, session: &Session, sandbox: &Sandbox) -> anyhow::Result<()> {
        let since = Instant::now();
        if self.isolated {
            let processes = &sandbox.processes;
            processes
                .is_empty_within(Duration::from_secs(1), since)
                .await?;
        }
        // Slots are used in turn: this looks into each of them.
        for _ in 0..self.slots() {
            hello(session).await?;
        }
        sandbox.is_the_same()?;
        if self.isolated {
            sandbox.processes.has_its_descriptors_back().await?;
        }
        Ok(())
    }
}
