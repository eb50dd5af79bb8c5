//! A damaged journal opens: what cannot be read is named and set aside, and everything else is there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::super::frame::{self, HEADER, Payload};
use super::super::store::lock;
use super::*;

/// Flips of one bit, each in a copy of its own.
const FLIPS: u64 = 200;

/// Numbers that look random and are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % below
    }
}

/// What a whole journal holds.
struct Whole {
    ended: BTreeMap<SubmissionId, Vec<Record>>,
    waiting: BTreeMap<SubmissionId, Vec<Record>>,
}

const SMALL: u64 = 4096;

/// Submissions that ended and such that did not, in several segments.
async fn write(dir: &TempDir) -> Whole {
    let journal = Journal::open(dir.path(), options(SMALL, 1 << 30)).unwrap();
    let (mut ended, mut waiting) = (Vec::new(), Vec::new());
    let mut last = 0;
    for n in 0..40 {
        let id = SubmissionId::new();
        if n % 5 == 2 {
            journal.append(received(id)).await.unwrap();
            let input = Event::Input {
                data: format!("input of {n}\n"),
                eof: false,
            };
            last = journal.append(record(id, input)).await.unwrap().position;
            waiting.push(id);
        } else {
            last = submit(&journal, id, n % 4).await;
            ended.push(id);
        }
        if n % 3 == 0 {
            journal.durable(last).await.unwrap();
        }
    }
    journal.durable(last).await.unwrap();
    let mut read = BTreeMap::new();
    for id in ended.iter().chain(&waiting) {
        read.insert(*id, journal.read_submission(*id).await.unwrap());
    }
    journal.close().await.unwrap();
    assert!(segments(dir).len() > 3);
    let waits = |id: &SubmissionId| waiting.contains(id);
    let (waiting, ended) = read.into_iter().partition(|(id, _)| waits(id));
    Whole { ended, waiting }
}

fn copy(from: &TempDir) -> TempDir {
    let to = TempDir::new().unwrap();
    for entry in std::fs::read_dir(from.path()).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, to.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    to
}

fn reopen(dir: &TempDir) -> Journal {
    Journal::open(dir.path(), options(SMALL, 1 << 30)).unwrap()
}

/// Where the last batch begins.
fn last_mark(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let mut windows = bytes.windows(frame::MARK_MAGIC.len());
    let found = windows.rposition(|window| window == frame::MARK_MAGIC);
    found.unwrap() as u64
}

fn flip(path: &Path, offset: u64, bit: u64) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << bit;
    file.write_all_at(&byte, offset).unwrap();
}

/// Which submissions are not as they were.
async fn changed(journal: &Journal, whole: &Whole) -> BTreeSet<SubmissionId> {
    let mut changed = BTreeSet::new();
    for (id, records) in whole.ended.iter().chain(&whole.waiting) {
        if journal.read_submission(*id).await.ok().as_ref() != Some(records) {
            changed.insert(*id);
        }
    }
    changed
}

/// Answers what was set aside, as the pipeline does.
async fn answer(journal: &Journal) {
    for id in journal.recovery().set_aside.keys() {
        let outcome = Outcome::new(Status::Unavailable);
        let state = journal.submission(*id).unwrap();
        let reply = NewRecord {
            user_id: state.user_id,
            submission_id: Some(*id),
            repl_id: state.repl_id,
            event: Event::Reply(Box::new(outcome)),
        };
        let last = journal.append(reply).await.unwrap();
        journal.durable(last.position).await.unwrap();
        let told = followed(journal, *id, 0).await;
        assert!(matches!(told.last().unwrap().event, Event::Reply(_)));
        assert!(journal.submission(*id).unwrap().ended);
    }
}

#[tokio::test]
async fn a_flipped_bit_costs_at_most_what_it_is_in_and_is_named() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let mut numbers = Numbers(7);
    let (mut unnamed, mut aside) = (Vec::new(), 0);
    for flipped in 0..FLIPS {
        let damaged = copy(&dir);
        let paths = segments(&damaged);
        let path = &paths[numbers.next(paths.len() as u64) as usize];
        let offset = numbers.next(std::fs::metadata(path).unwrap().len());
        // Damage in the last batch looks like one that was torn by a crash, which nobody was told of.
        if Some(path) == paths.last() && offset >= last_mark(path) {
            continue;
        }
        flip(path, offset, numbers.next(8));
        if flipped % 2 == 0 {
            // Every segment is looked through.
            for path in &paths {
                let _ = std::fs::remove_file(path.with_extension("index"));
            }
        }
        let journal = reopen(&damaged);
        let place = format!("{} at {offset}", path.display());
        let changed = changed(&journal, &whole).await;
        assert!(changed.len() <= 1, "{place}: {changed:?}");
        let set_aside = &journal.recovery().set_aside;
        aside += set_aside.len();
        let unfinished: BTreeSet<_> = journal.unfinished().into_iter().collect();
        for id in &changed {
            if whole.waiting.contains_key(id) {
                // It is not run from half of its record: the start says so, or whoever reads it.
                let found = journal.read_submission(*id).await;
                assert!(
                    set_aside.contains_key(id) || found.is_err(),
                    "{place}: {id} {set_aside:?} {:?} {found:?}",
                    journal.damage()
                );
            }
        }
        for id in whole.ended.keys().filter(|id| unfinished.contains(id)) {
            // Its reply is lost: it does not run again.
            let found = journal.read_submission(*id).await;
            assert!(
                set_aside.contains_key(id) || found.is_err(),
                "{place}: {id}"
            );
        }
        for id in whole.waiting.keys() {
            assert!(
                journal.submission(*id).is_some(),
                "{place}: {id} is unknown"
            );
        }
        if journal.damage().is_empty() {
            unnamed.push((place.clone(), changed.len()));
        }
        answer(&journal).await;
        let next = SubmissionId::new();
        let last = submit(&journal, next, 1).await;
        journal.durable(last).await.unwrap();
        journal.close().await.unwrap();
        drop(journal);
        // What was covered is no damage any more, and nothing is set aside a second time.
        let journal = reopen(&damaged);
        assert!(journal.recovery().set_aside.is_empty(), "{place}");
        assert_eq!(journal.read_submission(next).await.unwrap().len(), 4);
    }
    // A flip in what a start with an index does not look at, and no submission is in: a mark.
    assert!(
        unnamed.iter().all(|(_, changed)| *changed == 0),
        "{unnamed:?}"
    );
    assert!(unnamed.len() < FLIPS as usize / 4, "{unnamed:?}");
    assert!(aside > 0);
}

/// Good data are not cut off, and users are not told where the data folder is.
#[tokio::test]
async fn what_is_said_of_damage_keeps_good_data_and_names_no_file_to_users() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let folder = dir.path().to_str().unwrap();
    // As it is in the file, where the end of the line is escaped.
    let input = br"input of 2\n";
    let found = segments(&dir).into_iter().find_map(|path| {
        let bytes = std::fs::read(&path).unwrap();
        let mut windows = bytes.windows(input.len());
        Some((windows.position(|window| window == input)?, path))
    });
    let (at, path) = found.unwrap();
    flip(&path, at as u64, 0);
    let journal = reopen(&dir);
    let changed = changed(&journal, &whole).await;
    assert_eq!(changed.len(), 1);
    for id in changed {
        let error = journal.read_submission(id).await.unwrap_err();
        let (operator, user) = (error.to_string(), error.told());
        assert!(!operator.contains("truncate"), "{operator}");
        assert!(operator.contains("restore the file from a backup"));
        assert!(operator.contains("the version that wrote it"));
        assert!(operator.contains(path.to_str().unwrap()), "{operator}");
        assert!(user.contains("damaged"), "{user}");
        assert!(!user.contains("truncate"), "{user}");
        assert!(!user.contains(folder), "{user}");
    }
    drop(journal);
    // A start that looks through every segment says it of what it sets aside.
    for path in segments(&dir) {
        let _ = std::fs::remove_file(path.with_extension("index"));
    }
    let journal = reopen(&dir);
    let set_aside = &journal.recovery().set_aside;
    assert_eq!(set_aside.len(), 1);
    for why in set_aside.values() {
        assert!(why.contains("not what was written"), "{why}");
        assert!(!why.contains("truncate"), "{why}");
        assert!(!why.contains(folder), "{why}");
    }
}

#[tokio::test]
async fn readers_of_the_whole_journal_pass_over_what_is_damaged() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let path = segments(&dir)[1].clone();
    flip(&path, std::fs::metadata(&path).unwrap().len() / 2, 3);
    let journal = reopen(&dir);
    assert!(journal.damage().is_empty(), "the index is believed");
    let all = journal.read_from(0, usize::MAX).await.unwrap();
    let records = whole.ended.values().chain(whole.waiting.values());
    let lost = records.map(Vec::len).sum::<usize>() - all.len();
    assert!(lost <= 1, "{lost}");
    assert_eq!(journal.damage().len(), 1);
    // Again, and it is counted once.
    journal.read_from(0, usize::MAX).await.unwrap();
    assert_eq!(journal.damage().len(), 1);
}

#[tokio::test]
async fn a_missing_segment_is_noticed_and_what_was_in_it_does_not_run() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let count = segments(&dir).len();
    for missing in 0..count {
        for indexed in [true, false] {
            let damaged = copy(&dir);
            let path = segments(&damaged)[missing].clone();
            std::fs::remove_file(&path).unwrap();
            if !indexed {
                let _ = std::fs::remove_file(path.with_extension("index"));
            }
            let journal = reopen(&damaged);
            let damage = journal.damage();
            assert_eq!(damage.len(), 1, "{missing}: {damage:?}");
            assert_eq!((&damage[0].file, damage[0].bytes), (&path, 0));
            let changed = changed(&journal, &whole).await;
            assert!(changed.len() < whole.ended.len() + whole.waiting.len());
            let unfinished = journal.unfinished();
            for id in unfinished {
                let lost = changed.contains(&id) || whole.ended.contains_key(&id);
                let aside = journal.recovery().set_aside.contains_key(&id);
                assert!(!lost || aside, "{missing}: {id}");
            }
            answer(&journal).await;
            // What the index of the missing file knows is not run when it is sent again.
            if indexed && missing + 1 < count {
                for id in &changed {
                    let again = journal.append(received(*id)).await;
                    assert!(
                        matches!(again, Err(JournalError::Duplicate)),
                        "{missing}: {again:?}"
                    );
                }
            }
            drop(journal);
            assert!(reopen(&damaged).damage().is_empty(), "it is told once");
        }
    }
}

#[tokio::test]
async fn segments_that_have_each_others_names_get_their_own_again() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let paths = segments(&dir);
    let aside = dir.path().join("aside");
    std::fs::rename(&paths[0], &aside).unwrap();
    std::fs::rename(&paths[1], &paths[0]).unwrap();
    std::fs::rename(&aside, &paths[1]).unwrap();
    let journal = reopen(&dir);
    assert_eq!(journal.damage().len(), 2, "{:?}", journal.damage());
    assert_eq!(changed(&journal, &whole).await, BTreeSet::new());
    assert!(journal.recovery().set_aside.is_empty());
}

#[tokio::test]
async fn a_segment_that_was_cut_is_noticed() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let path = segments(&dir)[1].clone();
    let len = std::fs::metadata(&path).unwrap().len();
    for cut in [len / 3, len / 2, len - 1] {
        let damaged = copy(&dir);
        let path = segments(&damaged)[1].clone();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(cut).unwrap();
        let journal = reopen(&damaged);
        assert!(!journal.damage().is_empty(), "{cut}");
        let changed = changed(&journal, &whole).await;
        assert!(!changed.is_empty());
        for id in changed
            .iter()
            .filter(|id| journal.unfinished().contains(id))
        {
            assert!(journal.recovery().set_aside.contains_key(id), "{cut}: {id}");
        }
    }
}

/// Adds a record as a newer version would.
fn append_unknown(dir: &TempDir, like: &Record, position: u64) {
    let path = segments(dir).pop().unwrap();
    let file = std::fs::File::options().append(true).open(&path).unwrap();
    let at = file.metadata().unwrap().len();
    let mut bytes = frame::mark(at).to_vec();
    let newer = Payload::raw(r#"{"kind":"entangled","with":"another"}"#);
    let unknown = Record {
        position,
        seq: None,
        event: Event::PutDown,
        ..like.clone()
    };
    frame::encode(&mut bytes, &unknown, newer);
    std::io::Write::write_all(&mut &file, &bytes).unwrap();
}

#[tokio::test]
async fn what_a_newer_version_wrote_is_no_damage_and_costs_its_submission_only() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let (id, records) = whole.waiting.first_key_value().unwrap();
    let last = reopen(&dir).read_from(0, usize::MAX).await.unwrap();
    let position = last.last().unwrap().position + 1;
    append_unknown(&dir, &records[0], position);
    let before = std::fs::read(segments(&dir).pop().unwrap()).unwrap();
    let journal = reopen(&dir);
    assert!(journal.recovery().damage.is_empty());
    assert!(journal.unfinished().contains(id));
    let error = journal.read_submission(*id).await.unwrap_err().to_string();
    assert!(error.contains("newer"), "{error}");
    assert_eq!(changed(&journal, &whole).await, BTreeSet::from([*id]));
    // Whoever reads everything goes on behind it.
    let error = journal.read_from(position, 1).await.unwrap_err();
    assert!(
        matches!(error, JournalError::Corrupt { resume: Some(resume), .. } if resume > position)
    );
    let next = submit(&journal, SubmissionId::new(), 1).await;
    journal.durable(next).await.unwrap();
    assert_eq!(journal.damage().len(), 1);
    journal.close().await.unwrap();
    // It is as it was: the newer version reads it again.
    let after = std::fs::read(segments(&dir).pop().unwrap()).unwrap();
    assert!(after.starts_with(&before) || after.len() < before.len());
}

#[tokio::test]
async fn a_record_whose_length_was_damaged_at_the_end_is_not_taken_for_a_torn_one() {
    let dir = TempDir::new().unwrap();
    let id = SubmissionId::new();
    let start = {
        let journal = open(&dir);
        let last = submit(&journal, id, 2).await;
        journal.durable(last).await.unwrap();
        let at = lock(&journal.0.shared.store).active.len;
        let last = submit(&journal, SubmissionId::new(), 0).await;
        journal.durable(last).await.unwrap();
        at
    };
    assert!(start > HEADER);
    let path = segments(&dir)[0].clone();
    let bytes = std::fs::read(&path).unwrap();
    // The last frame is a reply: find where it begins.
    let mut at = start as usize;
    let mut last = at;
    while at < bytes.len() {
        let len = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        (last, at) = (at, at + 8 + len);
    }
    for bit in 0..8 {
        let damaged = copy(&dir);
        flip(&segments(&damaged)[0], last as u64, bit);
        let journal = open(&damaged);
        assert_eq!(journal.recovery().torn, None, "{bit}");
        // It has ended, and its reply is lost: it does not run again.
        assert_eq!(journal.recovery().set_aside.len(), 1, "{bit}");
        assert_eq!(journal.read_submission(id).await.unwrap().len(), 5);
    }
}

/// Where the entries of an index file begin: behind its head.
fn entries_of(index: &Path) -> std::ops::Range<u64> {
    let bytes = std::fs::read(index).unwrap();
    let head = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
    16 + u64::from(head)..bytes.len() as u64
}

#[tokio::test]
async fn a_flip_in_an_entry_of_an_index_costs_nothing() {
    let dir = TempDir::new().unwrap();
    let whole = write(&dir).await;
    let indexes: Vec<_> = segments(&dir)
        .iter()
        .map(|path| path.with_extension("index"))
        .filter(|path| path.exists())
        .collect();
    let mut numbers = Numbers(3);
    for index in &indexes {
        for _ in 0..10 {
            let damaged = copy(&dir);
            let entries = entries_of(index);
            let at = entries.start + numbers.next(entries.end - entries.start);
            let index = damaged.path().join(index.file_name().unwrap());
            flip(&index, at, numbers.next(8));
            let journal = reopen(&damaged);
            assert_eq!(changed(&journal, &whole).await, BTreeSet::new());
            let unfinished: BTreeSet<_> = journal.unfinished().into_iter().collect();
            assert_eq!(unfinished, whole.waiting.keys().copied().collect());
            assert_eq!(journal.replaced(), std::slice::from_ref(&index));
            drop(journal);
            assert!(reopen(&damaged).replaced().is_empty(), "it is told once");
        }
    }
    assert!(indexes.len() > 2);
}

#[tokio::test]
async fn a_flip_in_an_index_does_not_stop_the_keeper() {
    let dir = TempDir::new().unwrap();
    let journal = Journal::open(dir.path(), options(4096, 20_000)).unwrap();
    let pinned = SubmissionId::new();
    journal.append(received(pinned)).await.unwrap();
    let mut last = 0;
    while segments(&dir).len() < 3 {
        last = submit(&journal, SubmissionId::new(), 2).await;
        journal.durable(last).await.unwrap();
    }
    // While the server runs, and in the one that the unfinished submission is in.
    let index = segments(&dir)[0].with_extension("index");
    for at in entries_of(&index).step_by(16) {
        flip(&index, at, 1);
    }
    for _ in 0..200 {
        last = submit(&journal, SubmissionId::new(), 2).await;
    }
    journal.durable(last).await.unwrap();
    eventually("the journal grows", || segments(&dir).len() <= 7).await;
    assert_eq!(journal.replaced(), [index]);
    assert_eq!(journal.read_submission(pinned).await.unwrap().len(), 1);
    assert_eq!(journal.unfinished(), [pinned]);
}

#[tokio::test]
async fn a_flip_in_a_small_file_costs_what_it_holds_and_is_named() {
    let dir = TempDir::new().unwrap();
    let (mut ids, mut last) = (Vec::new(), 0);
    let name = {
        let journal = Journal::open(dir.path(), options(4096, 20_000)).unwrap();
        for _ in 0..100 {
            ids.push(SubmissionId::new());
            last = submit(&journal, ids[ids.len() - 1], 2).await;
        }
        journal.durable(last).await.unwrap();
        eventually("nothing is deleted", || segments(&dir).len() <= 6).await;
        journal.close().await.unwrap();
        journal.identity().to_owned()
    };
    let remembered = |journal: &Journal| {
        let known = |id: &&SubmissionId| journal.submission(**id).is_some();
        ids.iter().filter(known).count()
    };
    let mut numbers = Numbers(11);
    let mut named = 0;
    for file in ["identity", "segments", "ended.sqlite"] {
        let bytes = std::fs::metadata(dir.path().join(file)).unwrap().len();
        for _ in 0..FLIPS / 4 {
            let damaged = copy(&dir);
            let path = damaged.path().join(file);
            let at = numbers.next(bytes);
            flip(&path, at, numbers.next(8));
            let journal = Journal::open(damaged.path(), options(4096, 20_000)).unwrap();
            let told = journal.replaced().contains(&path);
            named += usize::from(told);
            if !told {
                assert_eq!(journal.identity(), name, "{file} at {at}");
            }
            if !told && file != "ended.sqlite" {
                panic!("{file} at {at} is not named");
            }
            // Of a page that cannot be read its ids are lost, and no others.
            let found = remembered(&journal);
            assert!(
                found > ids.len() / 2,
                "{file} at {at}: {found} of {}",
                ids.len()
            );
            let next = submit(&journal, SubmissionId::new(), 1).await;
            journal.durable(next).await.unwrap();
        }
    }
    assert!(named > FLIPS as usize / 2, "{named}");
}
