//! The journal's promises.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod damage;
mod faults;
mod shares;

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use tempfile::TempDir;

use super::frame::MARK;
use super::*;
use crate::model::{Limits, Outcome, OutputStream, Status, SubmissionRequest};

fn options(segment_bytes: u64, retain_bytes: u64) -> JournalOptions {
    JournalOptions {
        segment_bytes,
        retain_bytes,
        backlog_bytes: retain_bytes,
        ..JournalOptions::default()
    }
}

/// Until the keeper has done its work.
async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..500 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}");
}

fn open(dir: &TempDir) -> Journal {
    Journal::open(dir.path(), JournalOptions::default()).unwrap()
}

fn record(id: SubmissionId, event: Event) -> NewRecord {
    NewRecord {
        user_id: "test".parse().unwrap(),
        submission_id: Some(id),
        repl_id: "test-prod".parse().unwrap(),
        event,
    }
}

fn received(id: SubmissionId) -> NewRecord {
    let json = format!(r#"{{"user_id":"test","submission_id":"{id}","code":"print(1)"}}"#);
    let request: SubmissionRequest = serde_json::from_str(&json).unwrap();
    let submission = Box::new(request.validate(&Limits::MAXIMUM).unwrap());
    record(
        id,
        Event::Received {
            submission,
            key: None,
        },
    )
}

fn output(id: SubmissionId, data: String) -> NewRecord {
    record(
        id,
        Event::Output {
            stream: OutputStream::Stdout,
            data,
            run: 0,
            run_seq: 1,
        },
    )
}

fn reply(id: SubmissionId) -> NewRecord {
    record(
        id,
        Event::Reply(Box::new(Outcome::new(Status::TestsPassed))),
    )
}

/// A whole submission with `outputs` lines; returns the position of its reply.
async fn submit(journal: &Journal, id: SubmissionId, outputs: usize) -> u64 {
    journal.append(received(id)).await.unwrap();
    journal.append(record(id, Event::Queued)).await.unwrap();
    for n in 0..outputs {
        journal
            .append(output(id, format!("line {n}")))
            .await
            .unwrap();
    }
    journal.append(reply(id)).await.unwrap().position
}

fn whole(item: Item) -> Record {
    match item {
        Item::Record(record) => *record,
        Item::Large(reply) => panic!("{reply:?}"),
    }
}

async fn followed(journal: &Journal, id: SubmissionId, after: u64) -> Vec<Record> {
    let stream = journal.follow_submission(id, after);
    stream.map(|item| whole(item.unwrap())).collect().await
}

fn assert_gapless(records: &[Record], after: u64) {
    for (index, record) in records.iter().enumerate() {
        assert_eq!(record.seq, Some(after + 1 + index as u64));
    }
    assert!(matches!(records.last().unwrap().event, Event::Reply(_)));
}

fn segments(dir: &TempDir) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path());
    let mut paths: Vec<_> = entries
        .filter(|p| p.extension().is_some_and(|e| e == "journal"))
        .collect();
    paths.sort();
    paths
}

#[tokio::test]
async fn what_is_appended_is_read_back_the_same() {
    let dir = TempDir::new().unwrap();
    let id = SubmissionId::new();
    let before = {
        let journal = open(&dir);
        let last = submit(&journal, id, 3).await;
        journal.durable(last).await.unwrap();
        let live = journal.read_submission(id).await.unwrap();
        assert_eq!(live.len(), 6);
        assert_eq!(live, journal.read_from(0, usize::MAX).await.unwrap());
        live
    };
    let journal = open(&dir);
    assert_eq!(journal.recovery(), &Recovery::default());
    assert_eq!(before, journal.read_submission(id).await.unwrap());
    assert_eq!(before, journal.read_from(0, usize::MAX).await.unwrap());
    assert_eq!(
        before[2..3],
        journal.read_from(before[2].position, 1).await.unwrap()
    );
    let Event::Reply(outcome) = &before[5].event else {
        panic!()
    };
    assert_eq!(outcome.seq, Some(5));
    assert_gapless(&followed(&journal, id, 2).await, 2);
    let state = journal.submission(id).unwrap();
    assert!(state.ended && state.last_seq == 5 && state.user_id.as_str() == "test");
}

#[tokio::test]
async fn a_submission_is_received_once_and_nothing_follows_its_reply() {
    let dir = TempDir::new().unwrap();
    let journal = open(&dir);
    let id = SubmissionId::new();
    let early = journal.append(record(id, Event::Queued)).await;
    assert!(matches!(early, Err(JournalError::Unknown)), "{early:?}");
    journal.append(received(id)).await.unwrap();
    assert!(journal.submission(id).is_some_and(|s| !s.ended));
    assert_eq!(journal.unfinished(), [id]);
    let again = journal.append(received(id)).await;
    assert!(matches!(again, Err(JournalError::Duplicate)), "{again:?}");
    let last = journal.append(reply(id)).await.unwrap();
    assert_eq!(journal.unfinished(), []);
    for durable in [false, true] {
        if durable {
            journal.durable(last.position).await.unwrap();
        }
        let after = journal.append(record(id, Event::Queued)).await;
        assert!(matches!(after, Err(JournalError::Ended)), "{after:?}");
        let again = journal.append(received(id)).await;
        assert!(matches!(again, Err(JournalError::Duplicate)), "{again:?}");
    }
    drop(journal);
    let journal = open(&dir);
    let again = journal.append(received(id)).await;
    assert!(matches!(again, Err(JournalError::Duplicate)), "{again:?}");
}

#[tokio::test]
async fn torn_tail_is_cut_at_the_last_whole_record() {
    let dir = TempDir::new().unwrap();
    let (id, last_start, positions);
    {
        let journal = open(&dir);
        id = SubmissionId::new();
        journal.append(received(id)).await.unwrap();
        let first = journal.append(record(id, Event::Queued)).await.unwrap();
        journal.durable(first.position).await.unwrap();
        last_start = std::fs::metadata(&segments(&dir)[0]).unwrap().len();
        positions = first.position;
        journal.append(output(id, "x".repeat(40))).await.unwrap();
    }
    let whole = std::fs::read(&segments(&dir)[0]).unwrap();
    for cut in last_start as usize..whole.len() {
        let torn = TempDir::new().unwrap();
        let path = torn.path().join(segments(&dir)[0].file_name().unwrap());
        std::fs::write(&path, &whole[..cut]).unwrap();
        let journal = open(&torn);
        // A whole mark without its record stays; it says nothing wrong.
        let kept = if cut < last_start as usize + MARK {
            last_start as usize
        } else {
            last_start as usize + MARK
        };
        let expected = (cut > kept).then(|| TornTail {
            file: path.clone(),
            offset: kept as u64,
            bytes: (cut - kept) as u64,
        });
        assert_eq!(journal.recovery().torn, expected, "cut at {cut}");
        assert_eq!(journal.unfinished(), [id]);
        assert_eq!(journal.submission(id).unwrap().last_seq, 1);
        let next = journal.append(output(id, "again".into())).await.unwrap();
        assert!(next.position > positions + 1 && next.seq == Some(2));
        journal.durable(next.position).await.unwrap();
        drop(journal);
        let journal = open(&torn);
        assert_eq!(journal.recovery().torn, None);
        assert_eq!(journal.read_submission(id).await.unwrap().len(), 3);
    }
}

#[tokio::test]
async fn garbage_after_the_last_batch_is_cut_and_every_truncation_opens() {
    let dir = TempDir::new().unwrap();
    {
        let journal = open(&dir);
        for _ in 0..3 {
            let last = submit(&journal, SubmissionId::new(), 1).await;
            journal.durable(last).await.unwrap();
        }
    }
    let name = segments(&dir)[0].file_name().unwrap().to_owned();
    let whole = std::fs::read(&segments(&dir)[0]).unwrap();
    let variants = (0..whole.len()).step_by(7).map(|cut| whole[..cut].to_vec());
    let zeros = [whole.clone(), vec![0; 5000]].concat();
    let noise = [whole.clone(), (0..=255).cycle().take(3000).collect()].concat();
    for bytes in variants.chain([zeros, noise]) {
        let torn = TempDir::new().unwrap();
        std::fs::write(torn.path().join(&name), &bytes).unwrap();
        let journal = open(&torn);
        let id = SubmissionId::new();
        let last = submit(&journal, id, 0).await;
        journal.durable(last).await.unwrap();
        assert_eq!(journal.read_submission(id).await.unwrap().len(), 3);
    }
}

#[tokio::test]
async fn a_second_server_is_refused_by_name() {
    let dir = TempDir::new().unwrap();
    let journal = open(&dir);
    let error = Journal::open(dir.path(), JournalOptions::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    journal.close().await.unwrap();
    assert!(matches!(
        journal.append(received(SubmissionId::new())).await,
        Err(JournalError::Closed)
    ));
    open(&dir);
}

#[tokio::test]
async fn positions_increase_over_every_reopening() {
    let dir = TempDir::new().unwrap();
    let mut last = 0;
    for _ in 0..5 {
        let journal = open(&dir);
        for _ in 0..3 {
            let id = SubmissionId::new();
            let first = journal.append(received(id)).await.unwrap().position;
            assert!(first > last);
            last = journal.append(reply(id)).await.unwrap().position;
            assert_eq!(last, first + 1);
        }
    }
    let all = open(&dir).read_from(0, usize::MAX).await.unwrap();
    assert_eq!(all.len(), 30);
    assert!(all.is_sorted_by(|a, b| a.position < b.position));
    assert_eq!(segments(&dir).len(), 1);
}

#[tokio::test]
async fn segments_rotate_and_every_submission_is_found_with_and_without_its_index() {
    let dir = TempDir::new().unwrap();
    let small = options(4096, 1 << 30);
    let mut ids = Vec::new();
    let long = SubmissionId::new();
    {
        let journal = Journal::open(dir.path(), small).unwrap();
        journal.append(received(long)).await.unwrap();
        for n in 0..60 {
            let id = SubmissionId::new();
            let last = submit(&journal, id, n % 4).await;
            journal.append(output(long, format!("{n}"))).await.unwrap();
            ids.push((id, n % 4 + 3));
            if n % 5 == 0 {
                journal.durable(last).await.unwrap();
            }
        }
    }
    let count = segments(&dir).len();
    assert!(count > 5, "{count}");
    for rebuilt in [false, true] {
        if rebuilt {
            for path in segments(&dir) {
                let _ = std::fs::remove_file(path.with_extension("index"));
            }
        }
        let journal = Journal::open(dir.path(), small).unwrap();
        assert_eq!(
            journal.recovery().rebuilt_indexes,
            if rebuilt { count - 1 } else { 0 }
        );
        assert_eq!(journal.unfinished(), [long]);
        assert_eq!(journal.submission(long).unwrap().last_seq, 60);
        assert_eq!(journal.read_submission(long).await.unwrap().len(), 61);
        for (id, len) in &ids {
            assert_eq!(journal.read_submission(*id).await.unwrap().len(), *len);
            assert_gapless(&followed(&journal, *id, 1).await, 1);
            assert!(journal.submission(*id).unwrap().ended);
            assert!(matches!(
                journal.append(received(*id)).await,
                Err(JournalError::Duplicate)
            ));
        }
        let all = journal.read_from(0, usize::MAX).await.unwrap();
        assert_eq!(
            all.len(),
            61 + ids.iter().map(|(_, len)| len).sum::<usize>()
        );
        for record in all.iter().step_by(17) {
            let one = journal.read_from(record.position, 1).await.unwrap();
            assert_eq!(one, std::slice::from_ref(record));
        }
    }
    let journal = Journal::open(dir.path(), small).unwrap();
    journal.append(reply(long)).await.unwrap();
    let all = followed(&journal, long, 0).await;
    assert_eq!(all.len(), 61);
    assert_gapless(&all, 0);
}

#[tokio::test]
async fn a_damaged_index_is_rebuilt() {
    let dir = TempDir::new().unwrap();
    let small = options(4096, 1 << 30);
    let id = SubmissionId::new();
    {
        let journal = Journal::open(dir.path(), small).unwrap();
        submit(&journal, id, 2).await;
        for _ in 0..20 {
            submit(&journal, SubmissionId::new(), 2).await;
        }
    }
    let index = segments(&dir)[0].with_extension("index");
    let file = std::fs::File::options().write(true).open(&index).unwrap();
    file.write_all_at(&[0xff; 3], 40).unwrap();
    let journal = Journal::open(dir.path(), small).unwrap();
    assert_eq!(journal.recovery().rebuilt_indexes, 1);
    assert_eq!(journal.read_submission(id).await.unwrap().len(), 5);
}

#[tokio::test]
async fn old_segments_go_but_never_those_of_an_unfinished_submission() {
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path(), options(4096, 20_000)).unwrap();
    let early = SubmissionId::new();
    submit(&journal, early, 1).await;
    for _ in 0..100 {
        submit(&journal, SubmissionId::new(), 2).await;
    }
    let last = submit(&journal, SubmissionId::new(), 1).await;
    journal.durable(last).await.unwrap();
    eventually("old segments stay", || segments(&dir).len() <= 6).await;
    assert!(journal.submission(early).unwrap().ended);
    assert!(matches!(
        journal.read_submission(early).await,
        Err(JournalError::Gone { .. })
    ));
    let gone = journal
        .follow_submission(early, 0)
        .collect::<Vec<_>>()
        .await;
    assert!(matches!(gone[..], [Err(JournalError::Gone { .. })]));
    assert!(journal.read_from(0, 1).await.unwrap()[0].position > 1);

    let pinned = SubmissionId::new();
    journal.append(received(pinned)).await.unwrap();
    for _ in 0..100 {
        submit(&journal, SubmissionId::new(), 2).await;
    }
    let last = journal
        .append(output(pinned, "still here".into()))
        .await
        .unwrap()
        .position;
    journal.durable(last).await.unwrap();
    assert_eq!(journal.read_submission(pinned).await.unwrap().len(), 2);
    assert_eq!(journal.unfinished(), [pinned]);
    journal.append(reply(pinned)).await.unwrap();
    for _ in 0..30 {
        submit(&journal, SubmissionId::new(), 2).await;
    }
    journal.close().await.unwrap();
    assert!(segments(&dir).len() <= 6);
}

#[tokio::test]
async fn what_a_reader_still_needs_is_kept_up_to_the_backlogs_size() {
    let dir = TempDir::new().unwrap();
    let options = JournalOptions {
        backlog_bytes: 80_000,
        ..options(4096, 20_000)
    };
    let journal = Journal::open(dir.path(), options).unwrap();
    let fill = async |count: usize| {
        for _ in 0..count {
            submit(&journal, SubmissionId::new(), 2).await;
        }
        let last = submit(&journal, SubmissionId::new(), 1).await;
        journal.durable(last).await.unwrap();
    };
    journal.keep_from(1);
    fill(60).await;
    assert_eq!(journal.oldest_position(), 1);
    assert!(segments(&dir).len() > 6);
    // Past the backlog's size the oldest go all the same.
    fill(200).await;
    eventually("nothing was deleted", || journal.oldest_position() > 1).await;
    let oldest = journal.oldest_position();
    eventually("the backlog grows past its bound", || {
        segments(&dir).len() <= 21
    })
    .await;
    assert!(segments(&dir).len() > 12);
    assert!(journal.read_from(1, 1).await.unwrap()[0].position >= oldest);
    // What was read is kept no longer than usual.
    journal.keep_from(u64::MAX);
    fill(10).await;
    eventually("what was read stays", || segments(&dir).len() <= 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_makes_the_journal_little_larger_than_its_bound() {
    const SEGMENT: u64 = 64 << 10;
    const BOUND: u64 = 16 * SEGMENT;
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path(), options(SEGMENT, BOUND)).unwrap();
    let mut most = 0;
    for n in 0..1_500 {
        let id = SubmissionId::new();
        journal.append(received(id)).await.unwrap();
        let text = "x".repeat(16 << 10);
        journal.append(output(id, text)).await.unwrap();
        journal.append(reply(id)).await.unwrap();
        if n % 5 == 0 {
            let files = segments(&dir);
            let bytes = files.iter().filter_map(|path| path.metadata().ok());
            most = most.max(bytes.map(|about| about.len()).sum());
        }
    }
    // What is sealed meanwhile, what is written, and a new file that takes an old one's place.
    assert!(most <= BOUND + 8 * SEGMENT, "{most} bytes");
}

#[test]
fn a_journal_keeps_its_name_and_no_other_has_it() {
    let (one, two) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let name = open(&one).identity().to_owned();
    assert_eq!(open(&one).identity(), name);
    assert_ne!(open(&two).identity(), name);
    std::fs::write(one.path().join("identity"), "not a name").unwrap();
    let replaced = open(&one).identity().to_owned();
    assert_ne!(replaced, name);
    assert_eq!(open(&one).identity(), replaced);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_followers_joining_at_any_time_see_the_same_stream() {
    let dir = TempDir::new().unwrap();
    // Small segments, so that followers cross from disk to memory and over rotations.
    let journal = Journal::open(dir.path(), options(32 << 10, 1 << 30)).unwrap();
    let id = SubmissionId::new();
    journal.append(received(id)).await.unwrap();
    let mut followers = Vec::new();
    for n in 0..400_u64 {
        if n % 4 == 0 {
            let (journal, after) = (journal.clone(), n % 7);
            followers.push(tokio::spawn(async move {
                (after, followed(&journal, id, after).await)
            }));
        }
        journal
            .append(output(
                id,
                format!("{n} {}", "x".repeat(n as usize * 13 % 700)),
            ))
            .await
            .unwrap();
        // Others' records lie in between.
        submit(&journal, SubmissionId::new(), 1).await;
        if n % 16 == 0 {
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    }
    journal.append(reply(id)).await.unwrap();
    // Joined before the reply is durable, and again after.
    let whole = followed(&journal, id, 0).await;
    assert_eq!(whole.len(), 401);
    assert_gapless(&whole, 0);
    for follower in followers {
        let (after, seen) = follower.await.unwrap();
        assert!(seen == whole[after as usize..]);
    }
    assert_eq!(journal.follow_submission(id, 401).count().await, 0);
    assert_eq!(journal.follow_submission(id, u64::MAX).count().await, 0);
}

#[tokio::test]
async fn a_slow_follower_misses_nothing_that_left_memory() {
    let dir = TempDir::new().unwrap();
    let journal = open(&dir);
    let id = SubmissionId::new();
    journal.append(received(id)).await.unwrap();
    let first = journal.append(record(id, Event::Queued)).await.unwrap();
    journal.durable(first.position).await.unwrap();
    let mut stream = Box::pin(journal.follow_submission(id, 0));
    assert_eq!(whole(stream.next().await.unwrap().unwrap()).seq, Some(1));
    for _ in 0..200 {
        journal
            .append(output(id, "y".repeat(64 << 10)))
            .await
            .unwrap();
    }
    let last = journal.append(reply(id)).await.unwrap();
    journal.durable(last.position).await.unwrap();
    let rest: Vec<_> = stream.map(|r| whole(r.unwrap())).collect().await;
    assert_eq!(rest.len(), 201);
    assert_gapless(&rest, 1);
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(24))]
    /// Any interleaving of submissions, segment sizes and restarts replays as it was appended.
    #[test]
    fn any_history_replays_as_it_was_appended(
        steps in proptest::collection::vec((0_usize..6, 0_usize..5, 0_usize..300), 1..120),
        segment in 600_u64..6000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(history(&steps, segment));
    }
}

/// An event that is recorded and not streamed.
fn unstreamed() -> Event {
    Event::RunEnded {
        run: 0,
        report: crate::model::RunReport {
            ending: crate::model::Ending::Exited(0),
            duration_ms: 0,
            usage: crate::model::Usage::default(),
            truncated: false,
            test_report: None,
            listened: false,
        },
    }
}

async fn history(steps: &[(usize, usize, usize)], segment: u64) {
    let dir = TempDir::new().unwrap();
    let mut journal = Journal::open(dir.path(), options(segment, u64::MAX)).unwrap();
    let mut ids: Vec<SubmissionId> = (0..6).map(|_| SubmissionId::new()).collect();
    let mut expected: HashMap<SubmissionId, Vec<Event>> = HashMap::new();
    for (which, action, size) in steps {
        let id = ids[*which];
        let new = !expected.contains_key(&id);
        let next = match action {
            _ if new => received(id),
            0 => reply(id),
            1 => record(id, unstreamed()),
            2 if *size < 30 => {
                drop(journal);
                journal = Journal::open(dir.path(), options(segment, u64::MAX)).unwrap();
                continue;
            }
            _ => output(id, "t".repeat(*size)),
        };
        expected.entry(id).or_default().push(next.event.clone());
        if matches!(next.event, Event::Reply(_)) {
            ids[*which] = SubmissionId::new();
        }
        journal.append(next).await.unwrap();
    }
    drop(journal);
    let journal = Journal::open(dir.path(), options(segment, u64::MAX)).unwrap();
    for (id, events) in expected {
        let mut seq = 0;
        let mut found = journal.read_submission(id).await.unwrap();
        for record in &mut found {
            if record.event.streamed() {
                seq += 1;
                assert_eq!(record.seq, Some(seq));
            }
            if let Event::Reply(outcome) = &mut record.event {
                assert_eq!(outcome.seq.take(), Some(seq));
            }
        }
        let found: Vec<Event> = found.into_iter().map(|r| r.event).collect();
        assert!(found == events);
    }
}
