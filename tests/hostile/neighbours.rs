//! What others notice of a hostile program: the user next door, the server's memory, a patient user.

use std::sync::Arc;
use std::time::Duration;

use gantry::model::{Ending, Limits, Reason, UserId};
use gantry::platform::conformance::{Ended, finish, python};
use gantry::platform::{Platform, Sessions};
use gantry::runner::client::{Run, RunEvent, Session};
use gantry::runner::wire::JobEvent;
use tokio::time::timeout;

use super::{ALONE, programs as code, start};

/// Runs next door that are measured, in pairs with and without.
const PAIRS: usize = 12;

/// The promise is 1.2. A loaded machine alone makes a ratio of 2 now and then; without shares of the
/// processor for each sandbox, 64 processes on two cores make one of 30.
const SLOWEST: f64 = 6.0;

/// Some 100 ms of work.
const WORK: &str = "
import time
n, started = 0, time.monotonic()
while n < 1_000_000:
    n += 1
print(time.monotonic() - started)
";

fn full() -> bool {
    std::env::var_os("GANTRY_TEST_FULL").is_some()
}

fn session(sessions: &Sessions, user: &str) -> Session {
    sessions.of(&user.parse::<UserId>().unwrap())
}

async fn work(session: &Session) -> f64 {
    let ended = finish(&mut session.start(python(WORK))).await.unwrap();
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
    String::from_utf8_lossy(&ended.stdout)
        .trim()
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_program_does_not_slow_its_neighbour() {
    let _alone = ALONE.lock().await;
    let data = tempfile::tempdir().unwrap();
    let platform = Arc::new(start(data.path()).await);
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    let neighbour = session(&sessions, "neighbour");
    let hostile = session(&sessions, "hostile");
    work(&neighbour).await;
    for (name, program) in [
        ("fork bomb", code::FORK_BOMB),
        ("memory in 50 children", code::TOUCH_IN_CHILDREN),
        ("flood from children", code::FLOOD_CHILDREN),
    ] {
        let mut ratios = Vec::new();
        for _ in 0..PAIRS {
            let alone = work(&neighbour).await;
            let mut job = python(program);
            job.limits.wall_ms = 3_000;
            job.limits.cpu_ms = 30_000;
            job.limits.memory_bytes = Limits::MAXIMUM.memory_bytes;
            job.limits.output_bytes = Limits::MAXIMUM.output_bytes;
            let mut attack = hostile.start(job);
            let handle = attack.handle();
            let attacked = tokio::spawn(async move { finish(&mut attack).await });
            // It is at its height after that.
            tokio::time::sleep(Duration::from_millis(100)).await;
            ratios.push(work(&neighbour).await / alone);
            handle.cancel();
            attacked.await.unwrap().unwrap();
        }
        ratios.sort_by(f64::total_cmp);
        let median = ratios[PAIRS / 2];
        println!("neighbour of a {name}: {median:.2} times the time it takes alone ({ratios:.2?})");
        assert!(median <= SLOWEST, "{name}: {ratios:.2?}");
    }
    platform.shutdown().await;
}

/// What one line without an end may add to the server's memory: the output that is kept, once on
/// its way and once in this test, and room for the allocator.
const MAX_GROWTH: u64 = 96 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn one_endless_line_ends_as_output_and_the_server_stays_small() {
    let _alone = ALONE.lock().await;
    let data = tempfile::tempdir().unwrap();
    let platform = Arc::new(start(data.path()).await);
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    let session = session(&sessions, "line");
    work(&session).await;
    let length: u64 = if full() { 1 << 30 } else { 64 << 20 };
    let line = format!("import os\nfor _ in range({length} >> 16): os.write(1, b'x' * 65536)");
    let before = peak_memory();
    for _ in 0..3 {
        let mut job = python(&line);
        job.limits.output_bytes = Limits::MAXIMUM.output_bytes;
        let ended = finish(&mut session.start(job)).await.unwrap();
        assert_eq!(ended.report.ending, Ending::Limit(Reason::Output));
        assert_eq!(ended.stdout.len() as u64, Limits::MAXIMUM.output_bytes);
    }
    let growth = peak_memory().saturating_sub(before);
    println!(
        "three lines of {} MiB: the server grew by {} MiB at most",
        length >> 20,
        growth >> 20
    );
    assert!(growth <= MAX_GROWTH, "{growth} bytes");
    platform.shutdown().await;
}

/// The most that this process, which is the server here, has had in memory.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = line
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    kib * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_silence_is_no_failure() {
    let data = tempfile::tempdir().unwrap();
    let platform = Arc::new(start(data.path()).await);
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    let seconds: u64 = if full() { 360 } else { 20 };
    let mut job = python(&format!(
        "import time\ntime.sleep({seconds})\nprint('done')"
    ));
    job.limits.wall_ms = (seconds + 60) * 1_000;
    let mut run = session(&sessions, "silent").start(job);
    let first = timeout(Duration::from_secs(seconds + 60), run.next());
    let ended = follow(first.await.expect("silence without an end"), &mut run).await;
    assert_eq!(ended.report.ending, Ending::Exited(0), "{ended:?}");
    assert_eq!(ended.stdout, b"done\n");
    assert!(ended.report.duration_ms >= seconds * 1_000, "{ended:?}");
    platform.shutdown().await;
}

/// The end of a run whose first words were these.
async fn follow(first: RunEvent, run: &mut Run) -> Ended {
    let RunEvent::Event {
        event: JobEvent::Output { data, .. },
        ..
    } = first
    else {
        panic!("it ended without a word: {first:?}");
    };
    let mut ended = finish(run).await.unwrap();
    ended.stdout.splice(0..0, data);
    ended
}
