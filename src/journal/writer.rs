//! The one thread that writes: takes all that is waiting, writes it, syncs once, tells everybody.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::chain;
use super::disk::{Disk, Sink, sync_folder};
use super::frame::{self, HEADER, MARK};
use super::front::{Batch, Ill, Shared};
use super::index::SealedIndex;
use super::segment::{Active, Sealed, segment_path};
use super::store::lock;

/// Pause between attempts while the disk refuses. Short enough that nobody waits long once there is
/// room, long enough that a full disk is not hammered.
const RETRY: Duration = Duration::from_millis(250);

/// Segments that may be sealed before the keeper has looked at the first of them: with segments of a sixteenth
/// of the journal, a quarter of it.
const MOST_BEHIND: u64 = 4;

/// Longest wait for the keeper: it reads and writes all of a journal of the usual size in less, and one that is
/// stuck must not stop everything.
const KEEPER_PATIENCE: Duration = Duration::from_secs(10);

/// The server is stopping and the disk still refuses.
struct GivenUp;

pub(super) struct Writer {
    shared: Arc<Shared>,
    sink: Option<Box<dyn Sink>>,
    path: PathBuf,
    /// Durable bytes of the active segment.
    len: u64,
    /// Whether the active segment holds a record.
    begun: bool,
    /// Wakes the keeper.
    full: mpsc::Sender<()>,
}

impl Writer {
    pub(super) fn new(shared: Arc<Shared>, full: mpsc::Sender<()>) -> Self {
        let (path, len, begun) = {
            let store = lock(&shared.store);
            let active = &store.active;
            (active.path.clone(), active.len, !active.index.is_empty())
        };
        Self {
            shared,
            sink: None,
            path,
            len,
            begun,
            full,
        }
    }

    /// Writes until the journal closes.
    pub(super) fn run(mut self) {
        while let Some(batch) = self.shared.take_batch() {
            if self.commit(batch).is_err() {
                tracing::error!(
                    "the journal stops with records that the disk did not take; none of them was acknowledged"
                );
                break;
            }
        }
        self.shared.finish();
    }

    fn commit(&mut self, mut batch: Batch) -> Result<(), GivenUp> {
        let limit = self.shared.options.segment_bytes;
        let mut done = 0;
        // The batch begins with room for one mark.
        let mut start = MARK;
        while done < batch.records.len() {
            let mut end = start;
            let mut last = done;
            while let Some((_, len)) = batch.records.get(last) {
                let full = self.len + (MARK + end - start + len) as u64 > limit;
                if full && (self.begun || last > done) {
                    break;
                }
                end += len;
                last += 1;
            }
            if last > done {
                // The bytes before `start` are written already, or are the room at the beginning.
                let from = start - MARK;
                batch.bytes[from..start].copy_from_slice(&frame::mark(self.len));
                self.write_durably(&batch.bytes[from..end])?;
                self.publish(&batch, done, last);
                self.len += (MARK + end - start) as u64;
                self.begun = true;
            }
            if let Some((record, _)) = batch.records.get(last) {
                self.rotate(record.position)?;
            }
            done = last;
            start = end;
        }
        self.shared.recycle(batch);
        Ok(())
    }

    /// Lets the keeper catch up: who writes faster than it deletes would leave the journal's bound behind.
    fn wait_for_keeper(&self) {
        let behind = lock(&self.shared.behind);
        let too_far =
            |behind: &mut super::front::Behind| behind.sealed - behind.looked_at > MOST_BEHIND;
        let waited = self
            .shared
            .looked
            .wait_timeout_while(behind, KEEPER_PATIENCE, too_far);
        if waited.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!("the journal grows faster than old records are deleted from it");
        }
    }

    fn publish(&self, batch: &Batch, from: usize, to: usize) {
        let records = &batch.records[from..to];
        let durable = {
            let mut store = lock(&self.shared.store);
            store.publish(records, self.len + MARK as u64);
            store.durable
        };
        self.shared.announce(durable, records);
    }

    /// Writes at the end of the active segment. While the disk refuses, nothing new is taken in, and
    /// this tries again.
    fn write_durably(&mut self, bytes: &[u8]) -> Result<(), GivenUp> {
        let mut clean = true;
        loop {
            let result = self.try_write(bytes, clean);
            match result {
                Ok(()) => {
                    self.shared.recover();
                    return Ok(());
                }
                Err(error) => {
                    // After a failed sync the kernel may call pages clean that never reached the
                    // disk, so a second sync proves nothing. Everything after the last durable byte
                    // is cut and written again through a new handle.
                    clean = false;
                    self.sink = None;
                    self.pause(&error)?;
                }
            }
        }
    }

    fn try_write(&mut self, bytes: &[u8], clean: bool) -> io::Result<()> {
        let sink = match &mut self.sink {
            Some(sink) => sink,
            none => none.insert(self.shared.disk.open(&self.path, false)?),
        };
        if !clean {
            sink.truncate(self.len)?;
        }
        sink.write_at(bytes, self.len)?;
        sink.sync()
    }

    /// Waits before another attempt.
    fn pause(&self, error: &io::Error) -> Result<(), GivenUp> {
        self.shared.fall_ill(Ill::from(error), &self.path);
        if self.shared.wait(RETRY) {
            return Err(GivenUp);
        }
        Ok(())
    }

    /// Begins a new segment and seals the last one.
    fn rotate(&mut self, base: u64) -> Result<(), GivenUp> {
        let path = segment_path(&self.shared.dir, base);
        let file = loop {
            match create(&*self.shared.disk, &self.shared.dir, &path, base) {
                Ok((sink, file)) => {
                    self.sink = Some(sink);
                    break file;
                }
                Err(error) => self.pause(&error)?,
            }
        };
        self.shared.recover();
        self.path = path.clone();
        self.len = HEADER;
        self.begun = false;
        let fresh = Active {
            base,
            path,
            file: Arc::new(file),
            len: HEADER,
            index: super::index::OpenIndex::default(),
        };
        seal(&self.shared, fresh);
        write_chain(&self.shared);
        lock(&self.shared.behind).sealed += 1;
        // Without a keeper nothing is deleted, and it has said why.
        if self.full.send(()).is_ok() {
            self.wait_for_keeper();
        }
        Ok(())
    }
}

/// Makes a segment file with its header, durable together with its name.
pub(super) fn create(
    disk: &dyn Disk,
    dir: &Path,
    path: &Path,
    base: u64,
) -> io::Result<(Box<dyn Sink>, std::fs::File)> {
    let sink = disk.open(path, true)?;
    sink.write_at(&frame::header(base), 0)?;
    sink.sync()?;
    sync_folder(dir)?;
    Ok((sink, std::fs::File::open(path)?))
}

/// Writes down which segments there are.
pub(super) fn write_chain(shared: &Shared) {
    let _one = lock(&shared.chaining);
    let bases: Vec<u64> = {
        let store = lock(&shared.store);
        let sealed = store.sealed.iter().map(|sealed| sealed.base);
        sealed.chain([store.active.base]).collect()
    };
    if let Err(error) = chain::write(&shared.dir, bases.into_iter()) {
        tracing::warn!(
            "which segments the journal has is not written down: {error}; one that is lost would not be noticed"
        );
    }
}

/// Puts `fresh` in the place of the active segment, which becomes a sealed one. Readers wait for the
/// few milliseconds it takes to write its index, once per segment.
fn seal(shared: &Shared, fresh: Active) {
    let mut store = lock(&shared.store);
    let old = std::mem::replace(&mut store.active, fresh);
    match SealedIndex::seal(&old.index, &store.unfinished, &old.path, old.len) {
        Ok(index) => store.sealed.push(Arc::new(Sealed {
            base: old.base,
            path: old.path,
            file: old.file,
            len: old.len,
            index,
        })),
        Err(error) => tracing::error!("{error}; its records are unreadable until a restart"),
    }
}
