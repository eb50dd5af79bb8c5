//! What the journal does when the disk fails it.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;

use super::super::disk::{Disk, Sink};
use super::super::frame::MAX_FRAME;
use super::super::front::WRITE_BUFFER;
use super::super::store::lock;
use super::*;

/// A disk with a size limit, and with syncs that fail.
struct FaultyDisk {
    room: Arc<AtomicU64>,
    failing_syncs: Arc<AtomicUsize>,
    synced: Arc<Mutex<HashMap<PathBuf, u64>>>,
}

struct FaultyFile {
    file: std::fs::File,
    path: PathBuf,
    disk: FaultyDisk,
}

impl FaultyDisk {
    fn new(room: u64) -> Self {
        Self {
            room: Arc::new(AtomicU64::new(room)),
            failing_syncs: Arc::default(),
            synced: Arc::default(),
        }
    }

    fn share(&self) -> Self {
        Self {
            room: Arc::clone(&self.room),
            failing_syncs: Arc::clone(&self.failing_syncs),
            synced: Arc::clone(&self.synced),
        }
    }
}

impl Disk for FaultyDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Box<dyn Sink>> {
        let file = std::fs::File::options()
            .write(true)
            .create(create)
            .truncate(create)
            .open(path)?;
        Ok(Box::new(FaultyFile {
            file,
            path: path.to_owned(),
            disk: self.share(),
        }))
    }
}

impl Sink for FaultyFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let room = self.disk.room.load(Ordering::SeqCst).saturating_sub(offset);
        let fits = bytes.len().min(room as usize);
        self.file.write_all_at(&bytes[..fits], offset)?;
        if fits < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let failing =
            self.disk
                .failing_syncs
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
        if failing.is_ok() {
            // What a failed sync may leave behind: bytes that are not those that were written.
            let len = self.file.metadata()?.len();
            let durable = lock(&self.disk.synced)
                .get(&self.path)
                .copied()
                .unwrap_or(0);
            self.file
                .write_all_at(&vec![0; (len - durable) as usize], durable)?;
            return Err(io::Error::other("injected"));
        }
        let len = self.file.metadata()?.len();
        lock(&self.disk.synced).insert(self.path.clone(), len);
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

#[tokio::test]
async fn a_full_disk_stops_taking_in_loses_nothing_and_starts_again_by_itself() {
    let dir = TempDir::new().unwrap();
    let disk = FaultyDisk::new(6_000);
    let journal = Journal::open_on(
        dir.path(),
        JournalOptions::default(),
        Arc::new(disk.share()),
    )
    .unwrap();
    let id = SubmissionId::new();
    journal.append(received(id)).await.unwrap();
    let mut taken = Vec::new();
    let refused = loop {
        match journal.append(output(id, "z".repeat(100))).await {
            Ok(appended) => taken.push(appended),
            Err(error) => break error,
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    };
    assert!(matches!(refused, JournalError::Full), "{refused:?}");
    assert!(!journal.healthy());
    let last = taken.last().unwrap().position;
    assert!(*journal.durable_position().borrow() < last);
    // What is durable is whole, also for a copy made now.
    let copy = TempDir::new().unwrap();
    std::fs::copy(
        &segments(&dir)[0],
        copy.path().join(segments(&dir)[0].file_name().unwrap()),
    )
    .unwrap();
    assert!(open(&copy).read_submission(id).await.unwrap().len() > 10);

    disk.room.store(u64::MAX, Ordering::SeqCst);
    journal.durable(last).await.unwrap();
    journal.append(reply(id)).await.unwrap();
    assert!(journal.healthy());
    let all = followed(&journal, id, 0).await;
    assert_eq!(all.len(), taken.len() + 1);
    assert_gapless(&all, 0);
    drop(journal);
    let journal = open(&dir);
    assert_eq!(journal.recovery().torn, None);
    assert_eq!(
        journal.read_submission(id).await.unwrap().len(),
        taken.len() + 2
    );
}

#[tokio::test]
async fn after_a_failed_sync_the_bytes_are_written_again() {
    let dir = TempDir::new().unwrap();
    let disk = FaultyDisk::new(u64::MAX);
    let journal =
        Journal::open_on(dir.path(), options(4096, 1 << 30), Arc::new(disk.share())).unwrap();
    let mut ids = Vec::new();
    for n in 0..12 {
        if n % 4 == 1 {
            disk.failing_syncs.store(2, Ordering::SeqCst);
        }
        let id = SubmissionId::new();
        let mut queued = vec![
            received(id),
            record(id, Event::Queued),
            output(id, "w".repeat(600)),
            reply(id),
        ];
        queued.reverse();
        let mut last = 0;
        while let Some(next) = queued.pop() {
            match journal.append(next.clone()).await {
                Ok(appended) => last = appended.position,
                Err(JournalError::Failing { cause }) => {
                    assert_eq!(cause, "injected");
                    queued.push(next);
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
        journal.durable(last).await.unwrap();
        ids.push(id);
    }
    drop(journal);
    let journal = open(&dir);
    assert_eq!(journal.recovery().torn, None);
    for id in ids {
        assert_eq!(journal.read_submission(id).await.unwrap().len(), 4);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_durable_was_synced_before_it_was_shown() {
    let dir = TempDir::new().unwrap();
    let disk = FaultyDisk::new(u64::MAX);
    let journal = Journal::open_on(
        dir.path(),
        options(16 << 10, 1 << 30),
        Arc::new(disk.share()),
    )
    .unwrap();
    let mut watching = journal.durable_position();
    let writers: Vec<_> = (0..8)
        .map(|_| {
            let journal = journal.clone();
            tokio::spawn(async move {
                for _ in 0..20 {
                    let last = submit(&journal, SubmissionId::new(), 3).await;
                    journal.durable(last).await.unwrap();
                    assert!(*journal.durable_position().borrow() >= last);
                }
            })
        })
        .collect();
    let checker = {
        let (disk, shared) = (disk.share(), Arc::clone(&journal.0.shared));
        tokio::spawn(async move {
            let mut before = 0;
            while watching.changed().await.is_ok() {
                let now = *watching.borrow_and_update();
                assert!(now > before);
                before = now;
                let (path, len) = {
                    let store = lock(&shared.store);
                    (store.active.path.clone(), store.active.len)
                };
                assert!(lock(&disk.synced)[&path] >= len);
            }
        })
    };
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(
        journal.read_from(0, usize::MAX).await.unwrap().len(),
        8 * 20 * 6
    );
    journal.close().await.unwrap();
    drop(journal);
    checker.await.unwrap();
}

#[tokio::test]
async fn a_full_write_buffer_makes_append_wait() {
    let dir = TempDir::new().unwrap();
    let disk = FaultyDisk::new(u64::MAX);
    let journal = Journal::open_on(
        dir.path(),
        JournalOptions::default(),
        Arc::new(disk.share()),
    )
    .unwrap();
    let id = SubmissionId::new();
    journal.append(received(id)).await.unwrap();
    let mut last = 0;
    for _ in 0..64 {
        last = journal
            .append(output(id, "v".repeat(1 << 20)))
            .await
            .unwrap()
            .position;
        assert!(lock(&journal.0.shared.front).batch.bytes.len() <= WRITE_BUFFER + (2 << 20));
    }
    journal.durable(last).await.unwrap();
    let too_large = journal.append(output(id, "u".repeat(MAX_FRAME))).await;
    assert!(matches!(too_large, Err(JournalError::TooLarge { .. })));
    assert_eq!(journal.read_submission(id).await.unwrap().len(), 65);
}
