//! What released programs do, for the journal. With several replicas of the server each sees all of it and one
//! records it; the others keep the last of it for the case that this one ends.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::held::Held;
use super::{Pipeline, Share};
use crate::journal::{Journal, JournalError, NewRecord};
use crate::model::{Event, ReplId};
use crate::platform::{ProgramEvent, Recorded};

/// How long what another replica should record is kept. That it ended is noticed in 4 s: the rest is for a
/// machine that is busy.
const KEPT: Duration = Duration::from_secs(30);

/// Bytes of output kept so, of all repls together; beyond them the oldest of the repl that writes goes.
const KEPT_BYTES: usize = 32 << 20;

/// How often it is looked at whether another replica's repls became this one's.
const LOOK: Duration = Duration::from_secs(1);

/// Bytes of journal read at once.
const READ_BYTES: usize = 1 << 20;

impl Pipeline {
    /// Records what released programs do, from where the journal ends.
    pub(super) async fn record_programs(&self) {
        let platform = &self.inner.platform;
        platform.follow_programs(recorded(self.inner.journal.clone()));
        let Share(mine) = &self.inner.share;
        let (mut standby, mut held) = (Standby::default(), Held::default());
        let mut look = interval(LOOK);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let happened = tokio::select! {
                happened = platform.next_program_event() => happened,
                _ = look.tick() => {
                    standby.forget_before(Instant::now() - KEPT);
                    for event in standby.take_over(|repl| mine(repl)) {
                        self.record_event(event, &mut held).await;
                    }
                    if self.inner.journal.healthy() && !held.is_empty() {
                        let journal = self.inner.journal.clone();
                        let append = |record| {
                            let journal = journal.clone();
                            async move { journal.append(record).await.map(drop) }.boxed()
                        };
                        held.record(&append).await;
                    }
                    continue;
                }
            };
            let Some(event) = happened else {
                return;
            };
            if mine(&event.repl_id) {
                for earlier in standby.take(&event.repl_id) {
                    self.record_event(earlier, &mut held).await;
                }
                self.record_event(event, &mut held).await;
            } else {
                standby.keep(Instant::now(), event);
            }
        }
    }

    async fn record_event(&self, happened: ProgramEvent, held: &mut Held) {
        if held.has(&happened.repl_id) {
            return held.keep(happened);
        }
        let record = NewRecord {
            user_id: happened.user_id.clone(),
            submission_id: None,
            repl_id: happened.repl_id.clone(),
            event: happened.event.clone(),
        };
        match self.inner.journal.append(record).await {
            Ok(_) => {}
            Err(JournalError::Full | JournalError::Failing { .. }) => held.keep(happened),
            Err(error) => tracing::warn!(%error, "a program's output was not recorded"),
        }
    }
}

/// What the journal has of released programs, when somebody asks for it.
fn recorded(journal: Journal) -> BoxFuture<'static, Recorded> {
    async move {
        let mut recorded = Recorded::default();
        if let Err(error) = read_recorded(&journal, &mut recorded).await {
            tracing::warn!(%error, "how far the output of released programs is recorded cannot be read; some of it may be recorded twice");
        }
        recorded
    }
    .boxed()
}

async fn read_recorded(journal: &Journal, recorded: &mut Recorded) -> Result<(), JournalError> {
    let end = *journal.durable_position().borrow();
    let mut next = journal.oldest_position();
    while next <= end {
        let records = match journal.read_shared(next, READ_BYTES).await {
            Err(JournalError::Corrupt {
                resume: Some(resume),
                ..
            }) if resume > next => {
                next = resume;
                continue;
            }
            records => records?,
        };
        let Some(last) = records.last() else {
            return Ok(());
        };
        next = last.position + 1;
        for record in &records {
            let Some(origin) = record.event.origin() else {
                continue;
            };
            if matches!(record.event, Event::ProgramOutput { .. }) {
                let container = origin.container.clone();
                recorded.output.insert(container, origin.clone());
            } else {
                recorded.events.insert(origin.clone());
            }
        }
        // A long journal must let others run.
        tokio::task::yield_now().await;
    }
    Ok(())
}

/// What happened lately to repls that another replica records.
#[derive(Debug, Default)]
struct Standby {
    events: HashMap<ReplId, VecDeque<(Instant, ProgramEvent)>>,
    bytes: usize,
}

impl Standby {
    fn keep(&mut self, now: Instant, event: ProgramEvent) {
        let size = size(&event);
        let of_repl = self.events.entry(event.repl_id.clone()).or_default();
        of_repl.push_back((now, event));
        self.bytes += size;
        while self.bytes > KEPT_BYTES
            && let Some((_, oldest)) = of_repl.pop_front()
        {
            self.bytes -= self::size(&oldest);
        }
    }

    fn forget_before(&mut self, time: Instant) {
        for events in self.events.values_mut() {
            let old = events.partition_point(|(at, _)| *at < time);
            let forgotten = events.drain(..old);
            self.bytes -= forgotten.map(|(_, event)| size(&event)).sum::<usize>();
        }
        self.events.retain(|_, events| !events.is_empty());
    }

    /// What happened to this repl, in order.
    fn take(&mut self, repl: &ReplId) -> Vec<ProgramEvent> {
        let events = self.events.remove(repl).unwrap_or_default();
        let events: Vec<ProgramEvent> = events.into_iter().map(|(_, event)| event).collect();
        self.bytes -= events.iter().map(size).sum::<usize>();
        events
    }

    /// What happened to repls that are this replica's now.
    fn take_over(&mut self, mine: impl Fn(&ReplId) -> bool) -> Vec<ProgramEvent> {
        let now_mine = self.events.keys().filter(|repl| mine(repl));
        let now_mine: Vec<ReplId> = now_mine.cloned().collect();
        now_mine.iter().flat_map(|repl| self.take(repl)).collect()
    }
}

/// About what an event takes in memory.
fn size(event: &ProgramEvent) -> usize {
    let data = match &event.event {
        Event::ProgramOutput { data, .. } => data.len(),
        _ => 0,
    };
    size_of::<ProgramEvent>() + data
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::journal::JournalOptions;
    use crate::model::{Origin, OutputStream};

    fn event(repl: &str, line: u32, data: String) -> ProgramEvent {
        ProgramEvent {
            user_id: "u".parse().unwrap(),
            repl_id: repl.parse().unwrap(),
            event: Event::ProgramOutput {
                release: 1,
                stream: OutputStream::Stdout,
                data,
                origin: Some(Origin {
                    container: repl.to_owned(),
                    time: jiff::Timestamp::UNIX_EPOCH,
                    checksum: line,
                    part: 0,
                }),
            },
        }
    }

    fn lines(events: &[ProgramEvent]) -> Vec<u32> {
        let origins = events.iter().map(|event| event.event.origin());
        origins.map(|origin| origin.unwrap().checksum).collect()
    }

    #[test]
    fn what_another_replica_records_is_kept_for_a_while() {
        let (begin, mut standby) = (Instant::now(), Standby::default());
        for line in 0..10 {
            let at = begin + Duration::from_secs(line.into());
            standby.keep(at, event("a", line, "x".to_owned()));
            standby.keep(at, event("b", line, "y".to_owned()));
        }
        standby.forget_before(begin + Duration::from_secs(4));
        let taken = standby.take_over(|repl| repl.as_str() == "a");
        assert_eq!(lines(&taken), [4, 5, 6, 7, 8, 9]);
        assert!(standby.take_over(|repl| repl.as_str() == "a").is_empty());
        assert_eq!(standby.take(&"b".parse().unwrap()).len(), 6);
        assert_eq!((standby.bytes, standby.events.len()), (0, 0));
    }

    #[test]
    fn a_program_that_writes_much_pushes_its_own_out() {
        let (now, mut standby) = (Instant::now(), Standby::default());
        standby.keep(now, event("quiet", 0, "x".to_owned()));
        for line in 0..2_000 {
            standby.keep(now, event("loud", line, "x".repeat(32 << 10)));
        }
        assert!(standby.bytes <= KEPT_BYTES);
        assert_eq!(standby.take(&"quiet".parse().unwrap()).len(), 1);
        let loud = lines(&standby.take(&"loud".parse().unwrap()));
        assert_eq!(loud.last(), Some(&1_999));
        assert_eq!(standby.bytes, 0);
    }

    #[tokio::test]
    async fn the_journal_tells_how_far_each_container_was_recorded() {
        let folder = tempfile::tempdir().unwrap();
        let journal = Journal::open(folder.path(), JournalOptions::default()).unwrap();
        let mut last = 0;
        for line in 0..100 {
            for repl in ["a", "b"] {
                let event = event(repl, line, "x".repeat(50_000));
                let record = NewRecord {
                    user_id: event.user_id,
                    submission_id: None,
                    repl_id: event.repl_id,
                    event: event.event,
                };
                last = journal.append(record).await.unwrap().position;
            }
        }
        journal.durable(last).await.unwrap();
        let recorded = recorded(journal.clone()).await;
        let last_of = |repl: &str| recorded.output.get(repl).unwrap().checksum;
        assert_eq!((last_of("a"), last_of("b")), (99, 99));
        assert!(recorded.events.is_empty());
    }
}
