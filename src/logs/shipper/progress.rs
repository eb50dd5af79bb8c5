//! How far the journal was shipped: kept on disk, and in the order it was read although batches
//! arrive in any order.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A place in a journal up to which every record is in the index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Which journal.
    pub(super) journal: String,
    /// The last such position.
    pub(super) position: u64,
    /// The largest time up to there, in microseconds.
    pub(super) clock: i64,
}

impl Progress {
    fn beginning(journal: &str) -> Self {
        Self {
            journal: journal.to_owned(),
            position: 0,
            clock: 0,
        }
    }

    /// What the file says. Nothing there, something else or another journal's: the beginning. What is
    /// shipped a second time is in the index once.
    pub(super) fn load(path: &Path, journal: &str) -> Self {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Self::beginning(journal);
            }
            Err(error) => {
                tracing::warn!(
                    "{} cannot be read ({error}); the journal is shipped from its beginning, which doubles nothing",
                    path.display()
                );
                return Self::beginning(journal);
            }
        };
        match serde_json::from_slice::<Self>(&text) {
            Ok(progress) if progress.journal == journal => progress,
            Ok(_) => {
                tracing::info!("the journal is another one than was shipped before");
                Self::beginning(journal)
            }
            Err(error) => {
                tracing::warn!(
                    "{} is damaged ({error}); the journal is shipped from its beginning, which doubles nothing",
                    path.display()
                );
                Self::beginning(journal)
            }
        }
    }

    /// Writes it so that a crash leaves the old one or the new one.
    pub(super) fn store(&self, path: &Path) -> io::Result<()> {
        let fresh = path.with_extension("new");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        std::fs::rename(&fresh, path)
    }
}

/// A batch under way.
#[derive(Debug)]
struct UnderWay {
    ticket: u64,
    position: u64,
    clock: i64,
    arrived: bool,
}

/// Batches under way, oldest first.
#[derive(Debug, Default)]
pub(super) struct InOrder {
    batches: VecDeque<UnderWay>,
    next_ticket: u64,
}

impl InOrder {
    /// A batch that ends at this position sets out.
    pub(super) fn sets_out(&mut self, position: u64, clock: i64) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.batches.push_back(UnderWay {
            ticket,
            position,
            clock,
            arrived: false,
        });
        ticket
    }

    /// A batch arrived; how far everything has, when that changed.
    pub(super) fn arrives(&mut self, ticket: u64) -> Option<(u64, i64)> {
        if let Some(batch) = self.batches.iter_mut().find(|b| b.ticket == ticket) {
            batch.arrived = true;
        }
        let mut reached = None;
        while self.batches.front().is_some_and(|batch| batch.arrived) {
            reached = self.batches.pop_front().map(|b| (b.position, b.clock));
        }
        reached
    }

    /// Forgets what is under way: it is read again.
    pub(super) fn start_over(&mut self) {
        self.batches.clear();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn progress_moves_only_over_what_arrived_without_a_gap() {
        let mut order = InOrder::default();
        let tickets = [10, 20, 30, 40].map(|position| order.sets_out(position, position as i64));
        assert_eq!(order.arrives(tickets[2]), None);
        assert_eq!(order.arrives(tickets[1]), None);
        assert_eq!(order.arrives(tickets[0]), Some((30, 30)));
        assert_eq!(order.arrives(tickets[0]), None);
        order.start_over();
        // A late arrival of before counts for nothing.
        let again = order.sets_out(35, 35);
        assert_eq!(order.arrives(tickets[3]), None);
        assert_eq!(order.arrives(again), Some((35, 35)));
    }

    #[test]
    fn the_file_survives_damage_and_other_journals() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("shipped.json");
        assert_eq!(Progress::load(&path, "a").position, 0);
        let progress = Progress {
            journal: "a".to_owned(),
            position: 77,
            clock: 5,
        };
        progress.store(&path).unwrap();
        assert_eq!(Progress::load(&path, "a"), progress);
        assert_eq!(Progress::load(&path, "b").position, 0);
        // A crash in the middle of writing leaves the old one.
        std::fs::write(path.with_extension("new"), "{").unwrap();
        assert_eq!(Progress::load(&path, "a"), progress);
        std::fs::write(&path, "{\"journal\":").unwrap();
        assert_eq!(Progress::load(&path, "a").position, 0);
    }
}
