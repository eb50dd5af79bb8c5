//! One user's records cost that user only, and an id that ended never runs again.

use std::collections::HashSet;

use super::*;

fn by(user: &str, id: SubmissionId, event: Event) -> NewRecord {
    NewRecord {
        user_id: user.parse().unwrap(),
        repl_id: format!("{user}-prod").parse().unwrap(),
        ..record(id, event)
    }
}

/// A whole submission of this user, with about as many bytes of output.
async fn submit_as(journal: &Journal, user: &str, bytes: usize) -> SubmissionId {
    let id = SubmissionId::new();
    let events = [received(id).event, output(id, "x".repeat(bytes)).event];
    for event in events {
        journal.append(by(user, id, event)).await.unwrap();
    }
    let last = journal.append(by(user, id, reply(id).event)).await.unwrap();
    journal.durable(last.position).await.unwrap();
    id
}

fn bytes(dir: &TempDir) -> u64 {
    // One that is deleted meanwhile has none.
    let lengths = segments(dir).into_iter();
    lengths
        .filter_map(|p| Some(std::fs::metadata(p).ok()?.len()))
        .sum()
}

async fn is_gone(journal: &Journal, id: SubmissionId) -> bool {
    matches!(
        journal.read_submission(id).await,
        Err(JournalError::Gone {
            status: Status::TestsPassed,
            ..
        })
    )
}

#[tokio::test]
async fn a_flood_costs_the_user_who_sent_it_and_nobody_else() {
    let dir = TempDir::new().unwrap();
    let small = options(8 << 10, 64 << 10);
    let journal = Journal::open(dir.path(), small).unwrap();
    let (mut quiet, mut loud) = (Vec::new(), Vec::new());
    for n in 0..400 {
        if n % 40 == 0 {
            quiet.push(submit_as(&journal, "quiet", 300).await);
        }
        loud.push(submit_as(&journal, "loud", 1_000).await);
    }
    eventually("the journal stays too large", || bytes(&dir) <= 80 << 10).await;
    let check = async |journal: &Journal| {
        for id in &quiet {
            assert_eq!(journal.read_submission(*id).await.unwrap().len(), 3);
            assert_gapless(&followed(journal, *id, 0).await, 0);
        }
        let mut gone = 0;
        for id in &loud {
            gone += usize::from(is_gone(journal, *id).await);
            let state = journal.submission(*id).unwrap();
            assert!(state.ended && state.user_id.as_str() == "loud");
            let again = journal.append(by("loud", *id, received(*id).event)).await;
            assert!(matches!(again, Err(JournalError::Duplicate)), "{again:?}");
        }
        assert!(gone > 300 && gone < 390, "{gone}");
        assert!(!is_gone(journal, loud[399]).await);
        let other: UserId = "quiet".parse().unwrap();
        assert!(journal.complete_from(Some(&other)) <= journal.complete_from(None));
    };
    check(&journal).await;
    assert!(segments(&dir).len() <= 14, "{}", segments(&dir).len());
    drop(journal);
    let journal = Journal::open(dir.path(), small).unwrap();
    assert_eq!(journal.recovery(), &Recovery::default());
    assert_eq!(journal.unfinished(), []);
    check(&journal).await;
    drop(journal);
    // The same without any index.
    for path in segments(&dir) {
        let _ = std::fs::remove_file(path.with_extension("index"));
    }
    let journal = Journal::open(dir.path(), small).unwrap();
    assert_eq!(journal.unfinished(), []);
    check(&journal).await;
    let all = journal.read_from(0, usize::MAX).await.unwrap();
    assert!(all.is_sorted_by(|a, b| a.position < b.position));
}

#[tokio::test]
async fn many_small_segments_become_few() {
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path(), options(8 << 10, 64 << 10)).unwrap();
    let mut quiet = Vec::new();
    for _ in 0..20 {
        quiet.push(submit_as(&journal, "quiet", 10).await);
        for _ in 0..20 {
            submit_as(&journal, "loud", 1_000).await;
        }
    }
    eventually("many segments stay", || segments(&dir).len() <= 20).await;
    for id in quiet {
        assert_eq!(journal.read_submission(id).await.unwrap().len(), 3);
    }
}

#[tokio::test]
async fn an_unfinished_submission_stays_whole_while_its_user_floods() {
    let dir = TempDir::new().unwrap();
    let small = options(4 << 10, 32 << 10);
    let journal = Journal::open(dir.path(), small).unwrap();
    let id = SubmissionId::new();
    let append = async |event: Event| journal.append(by("loud", id, event)).await.unwrap();
    append(received(id).event).await;
    for n in 0..200 {
        append(output(id, format!("{n}")).event).await;
        submit_as(&journal, "loud", 500).await;
    }
    eventually("nothing was deleted", || bytes(&dir) < 90 << 10).await;
    assert_eq!(journal.unfinished(), [id]);
    assert_eq!(journal.read_submission(id).await.unwrap().len(), 201);
    append(reply(id).event).await;
    assert_gapless(&followed(&journal, id, 0).await, 0);
    drop(journal);
    let journal = Journal::open(dir.path(), small).unwrap();
    assert_eq!(followed(&journal, id, 0).await.len(), 201);
}

/// Whatever the keeper had done when the power went, no submission comes back to life, none is read
/// in part and none is there twice.
#[tokio::test]
async fn a_crash_of_the_keeper_leaves_whole_submissions() {
    let dir = TempDir::new().unwrap();
    let small = options(4 << 10, 32 << 10);
    let mut ids = Vec::new();
    let large = options(4 << 10, 1 << 30);
    {
        let journal = Journal::open(dir.path(), large).unwrap();
        let long = SubmissionId::new();
        let loud = async |event: Event| journal.append(by("loud", long, event)).await.unwrap();
        loud(received(long).event).await;
        ids.push(long);
        for n in 0..60 {
            ids.push(submit_as(&journal, "quiet", 10).await);
            ids.push(submit_as(&journal, "loud", 800).await);
            loud(output(long, "y".repeat(100)).event).await;
            if n == 20 {
                loud(reply(long).event).await;
                break;
            }
        }
        for _ in 0..60 {
            ids.push(submit_as(&journal, "loud", 800).await);
        }
    }
    let before: Vec<_> = segments(&dir)
        .into_iter()
        .map(|path| {
            (
                path.file_name().unwrap().to_owned(),
                std::fs::read(path).unwrap(),
            )
        })
        .collect();
    {
        let journal = Journal::open(dir.path(), small).unwrap();
        for _ in 0..10 {
            submit_as(&journal, "loud", 800).await;
        }
        journal.close().await.unwrap();
    }
    let after: HashSet<_> = segments(&dir)
        .iter()
        .map(|path| path.file_name().unwrap().to_owned())
        .collect();
    let removed: Vec<_> = before
        .iter()
        .filter(|(name, _)| !after.contains(name))
        .collect();
    assert!(removed.len() > 3, "{}", removed.len());
    // The old segments from the n-th on are still there, as they were.
    for n in 0..before.len() {
        let crashed = TempDir::new().unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, crashed.path().join(path.file_name().unwrap())).unwrap();
        }
        for (name, bytes) in &before[n..] {
            let path = crashed.path().join(name);
            std::fs::write(path.with_extension("rewritten"), "half of it").unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        let journal = Journal::open(crashed.path(), small).unwrap();
        assert_eq!(journal.unfinished(), [], "{n}");
        let all = journal.read_from(0, usize::MAX).await.unwrap();
        assert!(all.is_sorted_by(|a, b| a.position < b.position), "{n}");
        for id in &ids {
            assert!(journal.submission(*id).unwrap().ended);
            match journal.read_submission(*id).await {
                Ok(records) => {
                    assert!(matches!(records[0].event, Event::Received { .. }), "{n}");
                    assert_gapless(&records[1..], 0);
                }
                Err(error) => assert!(matches!(error, JournalError::Gone { .. }), "{n} {error}"),
            }
        }
    }
}

#[tokio::test]
async fn the_hash_that_is_remembered_is_that_of_the_reply_as_it_was_sent() {
    use sha2::{Digest, Sha256};
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path(), options(4 << 10, 16 << 10)).unwrap();
    let id = submit_as(&journal, "loud", 100).await;
    let records = journal.read_submission(id).await.unwrap();
    let Event::Reply(outcome) = &records[2].event else {
        panic!("no reply")
    };
    let sent = serde_json::to_string(outcome).unwrap();
    let digest = Sha256::digest(sent.as_bytes());
    let hex: String = digest[..16].iter().map(|b| format!("{b:02x}")).collect();
    for _ in 0..60 {
        submit_as(&journal, "loud", 800).await;
    }
    journal.close().await.unwrap();
    match journal.read_submission(id).await {
        Err(JournalError::Gone { reply, .. }) => assert_eq!(reply, hex),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn ids_are_remembered_for_their_time_and_a_user_with_too_many_loses_own_ones() {
    let dir = TempDir::new().unwrap();
    let small = JournalOptions {
        remembered_ids: 100,
        ..options(4 << 10, 16 << 10)
    };
    let (first, quiet);
    {
        let journal = Journal::open(dir.path(), small).unwrap();
        first = submit_as(&journal, "loud", 800).await;
        quiet = submit_as(&journal, "quiet", 4_000).await;
        submit_as(&journal, "quiet", 8_000).await;
        for _ in 0..200 {
            submit_as(&journal, "loud", 800).await;
        }
        journal.close().await.unwrap();
        assert!(is_gone(&journal, quiet).await);
        assert_eq!(journal.submission(first), None);
    }
    let late = JournalOptions {
        remember: Duration::ZERO,
        ..small
    };
    let journal = Journal::open(dir.path(), late).unwrap();
    assert_eq!(journal.submission(quiet), None);
}

#[test]
fn who_has_less_than_the_share_keeps_it() {
    use super::keeper::level;
    assert_eq!(level([10, 20, 30].into_iter(), 60), u64::MAX);
    assert_eq!(level([10, 20, 30].into_iter(), 50), 20);
    assert_eq!(level([1_000, 5, 5].into_iter(), 100), 90);
    assert_eq!(level([1_000, 1_000, 4].into_iter(), 104), 50);
    assert_eq!(level([7].into_iter(), 0), 0);
    assert_eq!(level([].into_iter(), 0), u64::MAX);
}
