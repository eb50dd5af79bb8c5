//! How fast, how soon and how large: figures of the shipper against the real server.
//!
//! Figures of an unoptimised build say nothing: `CARGO_PROFILE_DEV_OPT_LEVEL=3 cargo test --lib
//! logs::tests::load -- --ignored --nocapture --test-threads 1`.
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::Write;

use super::super::elasticsearch::{Method, Payload};
use super::super::shipper::{Batch, Origin};
use super::*;

/// Lines of one measurement: seconds of work.
const LINES: usize = 60_000;
/// Pairs of measurements, one of each side in turn: a machine whose speed drifts slows both.
const PAIRS: usize = 5;
/// Longest of all waits here: the slowest setting on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

fn line(n: usize) -> String {
    format!(
        "2026-01-31 12:00:00 worker-{} handled request {n} in {} ms with status {}",
        n % 7,
        n * 31 % 977,
        200 + n % 5
    )
}

/// A journal with this many lines of a program in it.
async fn journal_of(dir: &TempDir, lines: usize, text: impl Fn(usize) -> String) -> Journal {
    let journal = open_journal(dir);
    let mut last = 0;
    for start in (0..lines).step_by(1_000) {
        let id = SubmissionId::new();
        let mut events = vec![received("ada", id)];
        events.extend((start..lines.min(start + 1_000)).map(|n| output(&text(n))));
        events.push(Event::Reply(Box::new(Outcome::new(Status::TestsPassed))));
        for event in events {
            let record = NewRecord {
                user_id: "ada".parse().unwrap(),
                submission_id: Some(id),
                repl_id: "ada-prod".parse().unwrap(),
                event,
            };
            last = journal.append(record).await.unwrap().position;
        }
    }
    journal.durable(last).await.unwrap();
    journal
}

fn fresh() -> Elasticsearch {
    let prefix = format!("test-{}", SubmissionId::new());
    let settings = ElasticsearchSettings::from_variables(|name| match name {
        "ELASTICSEARCH_INDEX_PREFIX" => Some(prefix.clone()),
        _ => std::env::var(name).ok(),
    });
    Elasticsearch::new(&settings.unwrap().expect("ELASTICSEARCH_HOST is not set")).unwrap()
}

/// Bodies made beforehand, compressed: what the server takes when nothing else is to be done.
async fn bodies(journal: &Journal, elastic: &Elasticsearch, bytes: usize) -> Vec<bytes::Bytes> {
    let origin = Origin {
        journal: journal.identity().to_owned(),
        index: elastic.logs(),
    };
    let (mut next, mut made, mut batch) = (0, Vec::new(), Batch::default());
    let compress = |batch: &Batch| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(batch.body()).unwrap();
        bytes::Bytes::from(encoder.finish().unwrap())
    };
    loop {
        let records = journal.read_shared(next, 64 << 10).await.unwrap();
        let Some(last) = records.last() else { break };
        next = last.position + 1;
        for record in &records {
            batch.push(record, &origin, 1);
            if batch.body().len() >= bytes {
                made.push(compress(&std::mem::take(&mut batch)));
            }
        }
    }
    if !batch.is_empty() {
        made.push(compress(&batch));
    }
    made
}

/// Lines per second of a loader that only sends.
async fn raw_rate(journal: &Journal, bytes: usize, at_once: usize) -> f64 {
    let elastic = fresh();
    elastic.make_today().await.unwrap();
    let bodies = Arc::new(bodies(journal, &elastic, bytes).await);
    let next = Arc::new(AtomicUsize::new(0));
    let begin = Instant::now();
    let senders: Vec<_> = (0..at_once)
        .map(|_| {
            let (elastic, bodies, next) = (elastic.clone(), bodies.clone(), next.clone());
            tokio::spawn(async move {
                while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let lines = Payload::Lines(body.clone());
                    let query = [("filter_path", "errors")];
                    let sent = elastic.call(Method::Post, "/_bulk", &query, lines, PATIENCE);
                    assert_eq!(sent.await.unwrap()["errors"], false);
                }
            })
        })
        .collect();
    for sender in senders {
        sender.await.unwrap();
    }
    let rate = LINES as f64 / begin.elapsed().as_secs_f64();
    elastic.remove_all().await;
    rate
}

/// Lines per second of the shipper, from a journal that is full to an index that has all of it.
async fn shipped_rate(journal: &Journal) -> f64 {
    let elastic = fresh();
    elastic.make_today().await.unwrap();
    let folder = TempDir::new().unwrap();
    let options = ShipperOptions::in_folder(folder.path().to_owned());
    let shipper = Shipper::open(journal.clone(), elastic.clone(), options).unwrap();
    let (stop, begin) = (CancellationToken::new(), Instant::now());
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    let last = *journal.durable_position().borrow();
    assert!(shipper.reached(last, PATIENCE).await);
    let rate = LINES as f64 / begin.elapsed().as_secs_f64();
    stop.cancel();
    task.await.unwrap();
    elastic.remove_all().await;
    rate
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Elasticsearch"]
async fn the_shipper_is_nearly_as_fast_as_a_loader_that_only_sends() {
    let dir = TempDir::new().unwrap();
    let journal = journal_of(&dir, LINES, line).await;
    // The server's own compiler warms up.
    raw_rate(&journal, 2 << 20, 3).await;
    let (mut best, mut best_rate) = ((2 << 20, 3), 0_f64);
    for setting in [
        (1 << 20, 2),
        (2 << 20, 2),
        (2 << 20, 3),
        (5 << 20, 2),
        (5 << 20, 4),
    ] {
        let rate = raw_rate(&journal, setting.0, setting.1).await;
        println!(
            "raw loader, {} MiB x {}: {rate:.0} lines/s",
            setting.0 >> 20,
            setting.1
        );
        if rate > best_rate {
            (best, best_rate) = (setting, rate);
        }
    }
    let mut ratios = Vec::new();
    for _ in 0..PAIRS {
        let raw = raw_rate(&journal, best.0, best.1).await;
        let ours = shipped_rate(&journal).await;
        println!("raw loader at its best: {raw:.0} lines/s, shipper: {ours:.0} lines/s");
        ratios.push(ours / raw);
    }
    let ratio = quantile(&mut ratios, 0.5);
    println!("shipper / best raw loader, median of {PAIRS} pairs: {ratio:.2}");
    assert!(ratio >= 0.85);
}

fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * q) as usize]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Elasticsearch"]
async fn a_record_is_searchable_in_two_seconds_and_followed_at_once() {
    const RECORDS: usize = 1_000;
    let house = House::elasticsearch().await;
    let elastic = house.elastic.clone().unwrap();
    let mut live = house.search.follow(LogQuery {
        q: Some("tick".into()),
        ..LogQuery::default()
    });
    let followed = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.len() < RECORDS {
            live.next().await.unwrap().unwrap();
            seen.push(Instant::now());
        }
        seen
    });
    // Asks the index itself how far it is, without making it refresh.
    let path = format!("/{}*/_count", elastic.logs());
    let searched = tokio::spawn(async move {
        let mut seen: Vec<Instant> = Vec::new();
        while seen.len() < RECORDS {
            let body = json!({"query": {"match": {"message": "tick"}}});
            let answer = elastic
                .call(Method::Post, &path, &[], Payload::Json(body), PATIENCE)
                .await
                .unwrap();
            let count = answer["count"].as_u64().unwrap() as usize;
            seen.resize(count.max(seen.len()), Instant::now());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        seen
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    let id = SubmissionId::new();
    house.add("ada", id, received("ada", id)).await;
    let mut made = Vec::new();
    for n in 0..RECORDS {
        made.push(Instant::now());
        house.add("ada", id, output(&format!("tick {n}"))).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut figures = Vec::new();
    for (what, seen) in [("followed", followed), ("searchable", searched)] {
        let seen = tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
        let waits = made.iter().zip(seen);
        let mut waits: Vec<f64> = waits
            .map(|(made, seen)| (seen - *made).as_secs_f64())
            .collect();
        let (median, p99) = (quantile(&mut waits, 0.5), quantile(&mut waits, 0.99));
        println!(
            "{what}: median {:.0} ms, p99 {:.0} ms",
            median * 1e3,
            p99 * 1e3
        );
        figures.push(p99);
    }
    house.close().await;
    assert!(figures[0] <= 0.05 && figures[1] <= 2.0);
}

/// A figure of this process in KiB.
fn memory(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs Elasticsearch"]
async fn a_backlog_of_a_gigabyte_costs_little_memory() {
    let dir = TempDir::new().unwrap();
    // Lines of 2 KiB, so that the index has the least to do for a byte of journal.
    let journal = journal_of(&dir, 450_000, |n| format!("{n} {}", "word ".repeat(400))).await;
    let last = *journal.durable_position().borrow();
    let elastic = fresh();
    let folder = TempDir::new().unwrap();
    let options = ShipperOptions::in_folder(folder.path().to_owned());
    let shipper = Shipper::open(journal.clone(), elastic.clone(), options).unwrap();
    let rest = memory("VmRSS");
    // From here on the largest size is counted anew.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let (stop, begin) = (CancellationToken::new(), Instant::now());
    let task = tokio::spawn(shipper.clone().run(stop.clone()));
    assert!(shipper.reached(last, PATIENCE).await);
    let above = memory("VmHWM").saturating_sub(rest) >> 10;
    let size: u64 = std::fs::read_dir(dir.path().join("journal"))
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum();
    println!(
        "backlog of {} MiB shipped in {:.0} s; memory at rest {} MiB, at most {above} MiB more",
        size >> 20,
        begin.elapsed().as_secs_f64(),
        rest >> 10
    );
    stop.cancel();
    task.await.unwrap();
    elastic.remove_all().await;
    assert!(size > 900 << 20 && above <= 64);
}
