//! Whose turn it is to make a repl serve something: one server's at a time, however many replicas there are.
//!
//! The turn is in the repl's record, and the API server refuses a change of a record that is not the newest:
//! whoever lost the turn cannot record that its release serves. A server that died keeps its turn for
//! [`LASTS`] after its last sign of life.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Failure, PlatformError, Problem, Releases, random};
use crate::model::{Order, ReplId};
use crate::platform::kubernetes::record::{Making, Record};

/// How long a turn lasts after its holder was last heard of.
const LASTS: Duration = Duration::from_secs(20);

/// Between two signs of life.
const BEAT: Duration = Duration::from_secs(4);

/// Between two looks whether it is free.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// The code of a problem that means: another server has the turn now, and this one begins again.
const LOST: &str = "turn_lost";

/// A turn that this server has, by a name that no other has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn(pub String);

impl Record {
    /// Takes the turn, unless another has it who was seen to live.
    pub fn take_turn(&mut self, turn: &Turn, dead: Option<&Making>) -> Result<(), Making> {
        match &self.making {
            Some(making) if Some(making) != dead => Err(making.clone()),
            _ => {
                self.making = Some(Making {
                    by: turn.0.clone(),
                    beat: 0,
                });
                Ok(())
            }
        }
    }

    /// Whether it is this one's turn.
    pub fn is_turn_of(&self, turn: &Turn) -> bool {
        let making = self.making.as_ref();
        making.is_some_and(|making| making.by == turn.0)
    }
}

/// Another server has the turn.
pub fn lost() -> PlatformError {
    PlatformError::Unavailable(Problem::new(
        LOST,
        "The repl could not be changed",
        "another replica of the server was making a release of it at the same time",
        "Send it again.",
    ))
}

/// Whether this means that another server has the turn.
pub fn is_lost(error: &PlatformError) -> bool {
    matches!(error, PlatformError::Unavailable(problem) if problem.code == LOST)
}

impl Releases {
    /// Waits for the turn, and tells what the record is then; the error says why what was asked for is not to be made
    /// any more.
    pub(super) async fn take_turn(
        &self,
        repl: &ReplId,
        order: Option<&Order>,
    ) -> Result<(Turn, Record), PlatformError> {
        let failed =
            |failure: Failure| failure.unavailable("The repl's record could not be changed");
        let random: [u8; 12] = random().map_err(failed)?;
        let turn = Turn(random.iter().map(|byte| format!("{byte:02x}")).collect());
        // The last sign of life of another, and when it was seen here: clocks of two machines differ.
        let mut seen: Option<(Making, Instant)> = None;
        loop {
            let dead = seen.as_ref().filter(|(_, at)| at.elapsed() >= LASTS);
            let dead = dead.map(|(making, _)| making.clone());
            let taken = self.records.change(repl, |record| {
                if let Some(problem) = order.and_then(|order| record.order.supersedes(order)) {
                    return Err(Some(problem));
                }
                let taken = record.take_turn(&turn, dead.as_ref());
                taken.map_err(|making| {
                    if seen.as_ref().is_none_or(|(known, _)| *known != making) {
                        seen = Some((making, Instant::now()));
                    }
                    None
                })?;
                Ok(record.clone())
            });
            match taken.await.map_err(failed)? {
                Some(Ok(record)) => return Ok((turn, record)),
                Some(Err(Some(problem))) => return Err(PlatformError::NotReady(problem)),
                Some(Err(None)) => sleep(LOOK_AGAIN).await,
                None => return Err(PlatformError::NotFound(format!("the repl {repl}"))),
            }
        }
    }

    /// Does this for as long as the turn is this server's, and lets the next one have it then.
    pub(super) async fn during<T, E: From<PlatformError>>(
        &self,
        repl: &ReplId,
        turn: &Turn,
        act: impl Future<Output = Result<T, E>> + Send,
    ) -> Result<T, E> {
        let done = tokio::select! {
            done = act => done,
            () = self.keep_turn(repl, turn) => Err(lost().into()),
        };
        self.end_turn(repl, turn).await;
        done
    }

    /// Gives signs of life, and resolves when the turn is lost, or may be.
    async fn keep_turn(&self, repl: &ReplId, turn: &Turn) {
        let mut kept = Instant::now();
        while kept.elapsed() < LASTS {
            sleep(BEAT).await;
            let began = Instant::now();
            let beaten = self.records.change(repl, |record| {
                let own = record.is_turn_of(turn);
                if let Some(making) = record.making.as_mut().filter(|_| own) {
                    making.beat += 1;
                }
                own
            });
            match beaten.await {
                Ok(Some(true)) => kept = began,
                Ok(Some(false) | None) => return,
                Err(failure) => tracing::debug!(%repl, %failure, "a sign of life was not given"),
            }
        }
    }

    /// Lets the next one have the turn.
    async fn end_turn(&self, repl: &ReplId, turn: &Turn) {
        let ended = self.records.change(repl, |record| {
            if record.is_turn_of(turn) {
                record.making = None;
            }
        });
        if let Err(failure) = ended.await {
            tracing::debug!(%repl, %failure, "a turn is left to run out");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn one_has_the_turn_until_it_ends_or_is_seen_to_be_dead() {
        let mut record = Record::new(&"u".parse().unwrap());
        let (one, other) = (Turn("one".to_owned()), Turn("other".to_owned()));
        record.take_turn(&one, None).unwrap();
        let seen = record.take_turn(&other, None).unwrap_err();
        record.making.as_mut().unwrap().beat += 1;
        // It gave a sign of life since.
        let seen = record.take_turn(&other, Some(&seen)).unwrap_err();
        record.take_turn(&other, Some(&seen)).unwrap();
        assert!(record.is_turn_of(&other) && !record.is_turn_of(&one));
    }
}
