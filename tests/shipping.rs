//! Real servers that ship to a real Elasticsearch while it, the way to it or the server itself fails: every
//! record is in the index, and once.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "shipping/between.rs"]
mod between;
#[path = "shipping/index.rs"]
mod index;
#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use between::{Between, Weather};
use gantry::journal::{Journal, JournalError, JournalOptions, NewRecord};
use gantry::model::{
    Event, Limits, Outcome, OutputStream, Status, SubmissionId, SubmissionRequest,
};
use index::Index;
use serde_json::json;
use server::Server;

/// Longest wait for one more record in the index once nothing fails any more: a few of the shipper's longest
/// pauses. How long all of them take is another test's to say.
const PATIENCE: Duration = Duration::from_secs(60);

/// Longest wait for the lock of a killed server's journal.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

fn full() -> bool {
    std::env::var_os("GANTRY_TEST_FULL").is_some()
}

/// Waits while what a killed server was just starting still holds the journal's lock.
fn open(data: &Path) -> Journal {
    let begin = Instant::now();
    let options = JournalOptions {
        backlog_bytes: 8 << 30,
        ..JournalOptions::default()
    };
    loop {
        match Journal::open(&data.join("journal"), options) {
            Err(JournalError::Locked { .. }) if begin.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            opened => return opened.unwrap(),
        }
    }
}

/// Appends the records of one submission that wrote this many lines.
async fn append(journal: &Journal, lines: usize) {
    let id = SubmissionId::new();
    let json = json!({"user_id": "ada", "submission_id": id, "code": "print(1)"});
    let request: SubmissionRequest = serde_json::from_value(json).unwrap();
    let mut events = vec![Event::Received {
        submission: Box::new(request.validate(&Limits::MAXIMUM).unwrap()),
        key: None,
    }];
    events.extend((0..lines).map(|line| Event::Output {
        stream: OutputStream::Stdout,
        data: format!(
            "worker-{} handled request {line} with status 200\n",
            line % 7
        ),
        run: 0,
        run_seq: line as u64 + 1,
    }));
    events.push(Event::Reply(Box::new(Outcome::new(Status::TestsPassed))));
    let mut last = 0;
    for event in events {
        let record = NewRecord {
            user_id: "ada".parse().unwrap(),
            submission_id: Some(id),
            repl_id: "ada-prod".parse().unwrap(),
            event,
        };
        last = journal.append(record).await.unwrap().position;
    }
    journal.durable(last).await.unwrap();
}

/// The id of every record in the journal, as it has to be in the index.
async fn expected(data: &Path) -> BTreeSet<String> {
    let journal = open(data);
    let (mut next, mut ids) = (0, BTreeSet::new());
    loop {
        let records = journal.read_from(next, 4 << 20).await.unwrap();
        let Some(last) = records.last() else {
            journal.close().await.unwrap();
            return ids;
        };
        next = last.position + 1;
        ids.extend(records.iter().map(|record| {
            let time = record.time.as_microsecond();
            format!("{}-{:016x}-{time:x}", journal.identity(), record.position)
        }));
    }
}

/// The ids in the index are those of the journal, none is missing and none is there twice.
async fn assert_all_there_once(index: &Index, data: &Path) {
    let expected = expected(data).await;
    let found = index.ids().await;
    let distinct: BTreeSet<String> = found.iter().cloned().collect();
    assert_eq!(found.len(), distinct.len(), "some are there twice");
    let lost: Vec<_> = expected.difference(&distinct).take(5).collect();
    let strange: Vec<_> = distinct.difference(&expected).take(5).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(strange.is_empty(), "from nowhere: {strange:?}");
    eprintln!("{} records: 0 lost, 0 twice", found.len());
}

async fn until_all_there(index: &Index, count: usize) {
    let (mut seen, mut since) = (0, Instant::now());
    while seen < count {
        let now = index.count().await;
        if now > seen {
            (seen, since) = (now, Instant::now());
        }
        assert!(
            since.elapsed() < PATIENCE,
            "{seen} of {count}, and no more come"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Elasticsearch"]
async fn kill_nine_while_shipping_loses_and_doubles_nothing() {
    let (kills, lines) = if full() { (200, 5_000) } else { (12, 3_000) };
    let index = Index::new();
    let between = Between::new(index.url()).await;
    let (host, prefix) = (between.url(), index.prefix().to_owned());
    let mut server = Server::start_as(
        0,
        &[
            ("ELASTICSEARCH_HOST", &host),
            ("ELASTICSEARCH_INDEX_PREFIX", &prefix),
        ],
    );
    let weathers = [
        Weather::Fine,
        Weather::BusyForSome,
        Weather::Fine,
        Weather::FailsAfterTaking,
        Weather::Fine,
        Weather::CutAfterTaking,
        Weather::Fine,
        Weather::Away,
    ];
    let (mut made, mut under_way) = (0, 0);
    for kill in 0..kills {
        server.kill();
        let journal = open(server.data.path());
        append(&journal, lines - 2).await;
        journal.close().await.unwrap();
        made += lines;
        between.set(weathers[kill % weathers.len()]);
        server.restart();
        // Any time from its first request to a good part of what is there; a fault has to be met first.
        let least = match weathers[kill % weathers.len()] {
            Weather::Fine => 20,
            _ => 300,
        };
        let pause = least + (kill as u64 * 37) % 400;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        under_way += usize::from(index.count().await < made);
    }
    server.kill();
    assert!(
        under_way * 2 > kills,
        "only {under_way} of {kills} kills came while it was shipping"
    );
    assert!(between.met_all(&weathers), "a fault was not met");
    between.set(Weather::Fine);
    let count = expected(server.data.path()).await.len();
    server.restart();
    until_all_there(&index, count).await;
    server.kill();
    assert_all_there_once(&index, server.data.path()).await;
    index.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Elasticsearch"]
async fn elasticsearch_away_for_long_costs_no_submission_and_no_record() {
    let away = Duration::from_secs(if full() { 600 } else { 8 });
    let index = Index::new();
    let between = Between::new(index.url()).await;
    let (host, prefix) = (between.url(), index.prefix().to_owned());
    let mut server = Server::start_as(
        0,
        &[
            ("ELASTICSEARCH_HOST", &host),
            ("ELASTICSEARCH_INDEX_PREFIX", &prefix),
        ],
    );
    let mut socket = server.connect(&server.admin.clone()).await;
    let submit = json!({
        "user_id": "ada", "deploy": false,
        "code": "for n in range(20): print('line', n)",
    });
    let begin = Instant::now();
    let mut count = 0;
    while begin.elapsed() < away + Duration::from_secs(4) {
        let since = begin.elapsed().saturating_sub(Duration::from_secs(2));
        between.set(match since {
            Duration::ZERO => Weather::Fine,
            _ if since < away => Weather::Away,
            _ => Weather::Fine,
        });
        let reply = socket.ask(submit.to_string()).await;
        assert_eq!(reply["status"], "tests_passed", "{reply}");
        count += 1;
        tokio::time::sleep(Duration::from_millis(if full() { 200 } else { 20 })).await;
    }
    // What has an answer is in the journal; so many records and more.
    until_all_there(&index, count * 8).await;
    let last = Instant::now();
    // Until nothing has come for longer than a batch waits.
    let mut seen = 0;
    while seen != index.count().await {
        assert!(last.elapsed() < PATIENCE, "records come without an end");
        seen = index.count().await;
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    server.kill();
    assert_all_there_once(&index, server.data.path()).await;
    eprintln!(
        "{count} submissions, {} s of them without Elasticsearch",
        away.as_secs()
    );
    index.remove().await;
}
