//! What released programs do while the journal cannot be written: as much of it as their pipes would hold,
//! and how much more there was.

use std::collections::{HashMap, VecDeque};

use futures_util::future::BoxFuture;

use crate::journal::{JournalError, NewRecord};
use crate::model::{Event, Problem, ReplId, UserId};
use crate::platform::ProgramEvent;

/// Bytes kept of one repl: what a pipe holds.
const KEPT: usize = 64 << 10;

/// Bytes kept of all repls together.
const KEPT_IN_ALL: usize = 16 << 20;

/// What an event counts for beside its text.
const EVENT_COST: usize = 256;

/// Adds a record to the journal.
pub type Append<'a> =
    dyn Fn(NewRecord) -> BoxFuture<'static, Result<(), JournalError>> + Send + Sync + 'a;

/// What waits to be recorded.
#[derive(Debug, Default)]
pub struct Held {
    repls: HashMap<ReplId, OfRepl>,
    bytes: usize,
}

#[derive(Debug)]
struct OfRepl {
    user: UserId,
    events: VecDeque<Event>,
    bytes: usize,
    /// Bytes that came when there was no more room, and whose release they were of.
    lost: u64,
    release: Option<u64>,
}

impl Held {
    /// Whether something of this repl waits: what follows waits behind it.
    pub fn has(&self, repl: &ReplId) -> bool {
        self.repls.contains_key(repl)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.repls.is_empty()
    }

    /// Keeps it, or counts it.
    pub fn keep(&mut self, happened: ProgramEvent) {
        let ProgramEvent {
            user_id,
            repl_id,
            event,
        } = happened;
        let of_repl = self.repls.entry(repl_id).or_insert_with(|| OfRepl {
            user: user_id,
            events: VecDeque::new(),
            bytes: 0,
            lost: 0,
            release: None,
        });
        let (text, release) = match &event {
            Event::ProgramOutput { data, release, .. } => (data.len(), Some(*release)),
            _ => (0, None),
        };
        let cost = text + EVENT_COST;
        // What comes after something that was lost is not put before the word of it.
        let fits = of_repl.lost == 0 && of_repl.bytes + cost <= KEPT;
        if fits && self.bytes + cost <= KEPT_IN_ALL {
            of_repl.events.push_back(event);
            of_repl.bytes += cost;
            self.bytes += cost;
        } else {
            of_repl.lost += text as u64;
            of_repl.release = release.or(of_repl.release);
        }
    }

    /// Records what waits, in order, and then how much is missing. What cannot be recorded now waits on.
    pub async fn record(&mut self, append: &Append<'_>) {
        let repls: Vec<ReplId> = self.repls.keys().cloned().collect();
        for repl in repls {
            let Some(of_repl) = self.repls.get_mut(&repl) else {
                continue;
            };
            let user = of_repl.user.clone();
            let record = |event: Event| NewRecord {
                user_id: user.clone(),
                submission_id: None,
                repl_id: repl.clone(),
                event,
            };
            let gap = gap(of_repl.lost, of_repl.release);
            while let Some(event) = of_repl.events.front() {
                let recorded = append(record(event.clone())).await;
                if let Err(JournalError::Full | JournalError::Failing { .. }) = recorded {
                    return;
                }
                of_repl.events.pop_front();
            }
            if of_repl.lost > 0
                && let Err(JournalError::Full | JournalError::Failing { .. }) =
                    append(record(gap)).await
            {
                return;
            }
            self.bytes -= of_repl.bytes;
            self.repls.remove(&repl);
        }
    }
}

fn gap(bytes: u64, release: Option<u64>) -> Event {
    let message = format!("{bytes} bytes of the program's output are missing here");
    let problem = Problem::new(
        "output_lost",
        message.clone(),
        "the server's disk had no room for them",
        "The operator makes room on the data folder's disk; the program itself was not held up.",
    );
    Event::Repl {
        action: "repl.output_lost".to_owned(),
        message,
        release: release.filter(|release| *release > 0),
        error: Some(problem),
        origin: None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::OutputStream;
    use futures_util::FutureExt;
    use std::sync::{Arc, Mutex};

    fn output(repl: &str, data: String) -> ProgramEvent {
        ProgramEvent {
            user_id: "u".parse().unwrap(),
            repl_id: repl.parse().unwrap(),
            event: Event::ProgramOutput {
                release: 7,
                stream: OutputStream::Stdout,
                data,
                origin: None,
            },
        }
    }

    #[tokio::test]
    async fn what_a_pipe_holds_is_recorded_later_and_then_how_much_is_missing() {
        let mut held = Held::default();
        for line in 0..200 {
            held.keep(output("loud", format!("{line:04} {}\n", "x".repeat(994))));
        }
        held.keep(output("quiet", "one line\n".to_owned()));
        let journal = Arc::new(Mutex::new((3, Vec::new())));
        let append = |record: NewRecord| {
            let (room, recorded) = &mut *journal.lock().unwrap();
            let result = match *room {
                0 => Err(JournalError::Full),
                _ => {
                    *room -= 1;
                    recorded.push(record);
                    Ok(())
                }
            };
            std::future::ready(result).boxed()
        };
        held.record(&append).await;
        assert!(!held.is_empty());
        journal.lock().unwrap().0 = 1_000;
        held.record(&append).await;
        assert!(held.is_empty() && held.bytes == 0);
        let recorded = journal.lock().unwrap().1.clone();
        let of = |repl: &str| {
            let own = recorded.iter().filter(|r| r.repl_id.as_str() == repl);
            own.map(|r| r.event.clone()).collect::<Vec<_>>()
        };
        assert_eq!(of("quiet").len(), 1);
        let loud = of("loud");
        let (gap, lines) = loud.split_last().unwrap();
        let mut bytes = 0;
        for (number, line) in lines.iter().enumerate() {
            let Event::ProgramOutput { data, .. } = line else {
                panic!("{line:?}");
            };
            assert!(data.starts_with(&format!("{number:04} ")), "{data}");
            bytes += data.len();
        }
        assert!(bytes > KEPT / 2 && bytes <= KEPT);
        let Event::Repl {
            action, message, ..
        } = gap
        else {
            panic!("{gap:?}");
        };
        assert_eq!(action, "repl.output_lost");
        assert!(
            message.starts_with(&format!("{} bytes", 200_000 - bytes)),
            "{message}"
        );
    }
}
