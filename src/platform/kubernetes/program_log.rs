//! The log of one life of a released program's container: read to its end through whatever breaks, each line once.

use std::sync::Arc;
use std::time::Duration;

use futures_util::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerState, Pod};
use kube::api::LogParams;
use kube::{Api, ResourceExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::programs::{LifeId, Programs, about, container_name, life, program, since};
use super::release::PROGRAM_CONTAINER;
use crate::model::{Event, Origin, OutputStream, whole_letters};
use crate::platform::ProgramEvent;

/// Pause before a log that broke off, or whose container does not say what became of it, is asked for again.
const FOLLOW_AGAIN: Duration = Duration::from_secs(2);

/// The same, when the container is known to be over.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Of a program that ran before this server began and that its journal does not know, so much is read again:
/// longer than a replica takes to be replaced.
const RECALL: SignedDuration = SignedDuration::from_mins(10);

/// How far the lines of one log may stand out of order: those of the two outputs are dated apart.
const DISORDER: SignedDuration = SignedDuration::from_millis(1);

/// How long a program is silent before its runner is asked what it does: it may have ended.
const QUIET: Duration = Duration::from_millis(500);

/// How often a silent program's runner is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(300);

/// Bytes of one piece of output in the journal; a longer line is cut into several.
const MAX_PIECE: usize = 32 << 10;

/// Longest line that is taken in one piece, with its time: it is held in memory until its end comes.
const MAX_LINE: usize = 1 << 20;

/// What of a container's log there is to read.
enum Source<L> {
    /// It runs: what it wrote and will write.
    Running(L),
    /// It ended: what is left.
    Ended(L),
    /// Nothing any more.
    Gone,
    /// The API server does not say.
    Unknown,
}

/// Reads the log of one life of a released program's container.
pub(super) struct ProgramLog {
    programs: Programs,
    api: Api<Pod>,
    pod: Arc<Pod>,
    life: LifeId,
    /// In records.
    container: String,
    passed: Passed,
    /// A line whose end has not come.
    rest: Vec<u8>,
}

impl ProgramLog {
    pub(super) fn new(programs: &Programs, pod: &Arc<Pod>, life: &LifeId) -> Self {
        let container = container_name(&life.1);
        let recorded = programs.recorded_of(&container);
        Self {
            programs: programs.clone(),
            api: programs.pods_of(pod),
            pod: Arc::clone(pod),
            life: life.clone(),
            passed: recorded.map_or_else(Passed::default, Passed::up_to),
            container,
            rest: Vec::new(),
        }
    }

    /// Passes on what the program writes for as long as its container lives, and then what is left.
    pub(super) async fn pass_on(mut self, over: &CancellationToken) {
        loop {
            let (log, last) = match self.open().await {
                Source::Running(log) => (Some(log), false),
                Source::Ended(log) => (Some(log), true),
                Source::Gone => break,
                Source::Unknown => (None, false),
            };
            if let Some(log) = log {
                self.passed.begin_again();
                // Half a line at a break comes again whole.
                self.rest.clear();
                match self.pass_on_lines(log).await {
                    Ok(true) if last => break,
                    Ok(_) => {}
                    // Nobody listens any more.
                    Err(_) => return,
                }
            }
            // A container that is over is looked at soon: its log goes with its pod.
            let pause = if over.is_cancelled() {
                LOOK_AGAIN
            } else {
                FOLLOW_AGAIN
            };
            tokio::time::sleep(pause).await;
        }
        // The last words of a program need no end of line. Nobody listens any more when this fails.
        let rest = std::mem::take(&mut self.rest);
        let _ = self.pass_on_line(&rest).await;
    }

    /// The log of this life. By its name the API server gives that of whatever container runs now: only when
    /// this life is still the one afterwards, it was the one that was given.
    async fn open(&self) -> Source<impl AsyncBufRead + Unpin + use<>> {
        let before = self.place().await;
        let (Place::Running | Place::Ended { .. }) = before else {
            return match before {
                Place::Gone => Source::Gone,
                _ => Source::Unknown,
            };
        };
        let lately = || {
            let began = self.programs.began();
            since(&self.pod).and_then(|at| (at < began).then_some(began - RECALL))
        };
        let params = LogParams {
            container: Some(PROGRAM_CONTAINER.to_owned()),
            follow: before == Place::Running,
            previous: before == Place::Ended { replaced: true },
            timestamps: true,
            since_time: self.passed.time().or_else(lately).map(whole_second),
            ..LogParams::default()
        };
        let Ok(log) = self.api.log_stream(&self.pod.name_any(), &params).await else {
            return Source::Unknown;
        };
        match (before, self.place().await) {
            (Place::Running, Place::Running) => Source::Running(log),
            (before, after) if before == after => Source::Ended(log),
            _ => Source::Unknown,
        }
    }

    /// Where this life is in what its pod says of itself.
    async fn place(&self) -> Place {
        let pod = match self.api.get_opt(&self.pod.name_any()).await {
            Ok(Some(pod)) if pod.uid() == self.pod.uid() => pod,
            Ok(_) => return Place::Gone,
            Err(_) => return Place::Unknown,
        };
        if life(&pod).as_ref() == Some(&self.life) {
            return Place::Running;
        }
        let ended = |state: Option<&ContainerState>| {
            let ended = state.and_then(|state| state.terminated.as_ref());
            ended.is_some_and(|ended| ended.container_id.as_ref() == Some(&self.life.1))
        };
        let Some(status) = program(&pod) else {
            return Place::Unknown;
        };
        if ended(status.state.as_ref()) {
            Place::Ended { replaced: false }
        } else if ended(status.last_state.as_ref()) {
            Place::Ended { replaced: true }
        } else {
            // Two lives later, what it wrote last is not there any more.
            Place::Gone
        }
    }

    /// Until the log ends or breaks. Whether it ended; an error: nobody listens any more. What is left has no end
    /// of line.
    async fn pass_on_lines(
        &mut self,
        mut log: impl AsyncBufRead + Unpin,
    ) -> Result<bool, mpsc::error::SendError<ProgramEvent>> {
        let mut ask_after = QUIET;
        loop {
            let room = MAX_LINE.saturating_sub(self.rest.len()) as u64;
            let mut bounded = (&mut log).take(room);
            // What was read before the time was up stays in `rest`.
            match timeout(ask_after, bounded.read_until(b'\n', &mut self.rest)).await {
                Ok(Ok(0)) => return Ok(true),
                Ok(Ok(_)) => {}
                Ok(Err(_)) => return Ok(false),
                Err(_) => {
                    self.programs.ask(&self.pod).await;
                    ask_after = ASK_AGAIN;
                    continue;
                }
            }
            if self.rest.ends_with(b"\n") || self.rest.len() >= MAX_LINE {
                ask_after = QUIET;
                // What is too long is cut between two letters.
                let rest = self.rest.split_off(whole_letters(&self.rest));
                let line = std::mem::replace(&mut self.rest, rest);
                self.pass_on_line(&line).await?;
            }
        }
    }

    async fn pass_on_line(
        &mut self,
        line: &[u8],
    ) -> Result<(), mpsc::error::SendError<ProgramEvent>> {
        let line = String::from_utf8_lossy(line);
        let Some(new) = self.passed.take(&line).filter(|new| !new.line.is_empty()) else {
            return Ok(());
        };
        for (part, data) in (0..).zip(pieces(new.line)).skip(new.recorded) {
            let origin = new.at.map(|(time, checksum)| Origin {
                container: self.container.clone(),
                time,
                checksum,
                part,
            });
            let output = |release| Event::ProgramOutput {
                release,
                stream: OutputStream::Stdout,
                data,
                origin,
            };
            if let Some(told) = about(&self.pod, output) {
                self.programs.tell(told).await?;
            }
        }
        Ok(())
    }
}

/// Where a life of a container is in its pod's status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Running,
    /// `replaced`: another one was started after it.
    Ended {
        replaced: bool,
    },
    Gone,
    Unknown,
}

/// How far a log was passed on. Asked for again, it comes from a whole second on: up to the line that was the
/// last one, it was passed on already.
#[derive(Debug, Default)]
struct Passed {
    /// Time and check sum.
    last: Option<(Timestamp, u32)>,
    /// Pieces of that line that were passed on, unless all of them were.
    pieces: Option<usize>,
    catching_up: bool,
}

/// A line to pass on.
#[derive(Debug, PartialEq, Eq)]
struct New<'a> {
    /// Without its time.
    line: &'a str,
    /// Its time and check sum, if it has a time.
    at: Option<(Timestamp, u32)>,
    /// So many of its pieces were passed on before.
    recorded: usize,
}

impl Passed {
    /// What was passed on to an earlier server's journal.
    fn up_to(last: &Origin) -> Self {
        Self {
            last: Some((last.time, last.checksum)),
            pieces: usize::try_from(last.part).ok().map(|part| part + 1),
            catching_up: true,
        }
    }

    /// The log is read again, from [`Passed::time`] on.
    fn begin_again(&mut self) {
        self.catching_up = self.last.is_some();
    }

    fn time(&self) -> Option<Timestamp> {
        self.last.map(|(time, _)| time)
    }

    /// The line, unless it was passed on before.
    fn take<'a>(&mut self, dated: &'a str) -> Option<New<'a>> {
        let (time, line) = dated.split_once(' ').unwrap_or((dated, ""));
        let Ok(time) = time.parse::<Timestamp>() else {
            // What the kubelet says itself has no time.
            return Some(New {
                line: dated,
                at: None,
                recorded: 0,
            });
        };
        let this = (time, crc32fast::hash(line.as_bytes()));
        if let (true, Some(last)) = (self.catching_up, self.last) {
            if this == last {
                self.catching_up = false;
                let recorded = self.pieces.take()?;
                return Some(New {
                    line,
                    at: Some(this),
                    recorded,
                });
            }
            // Later than the last one, which is not there any more: the log was cut in between.
            if time.duration_since(last.0) <= DISORDER {
                return None;
            }
            self.catching_up = false;
        }
        (self.last, self.pieces) = (Some(this), None);
        Some(New {
            line,
            at: Some(this),
            recorded: 0,
        })
    }
}

/// The whole second this time is in. A log is asked for from a whole second on, and the client would round to
/// the nearest one, which may be after the time.
fn whole_second(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

/// A line, in pieces that are not too long.
fn pieces(line: &str) -> Vec<String> {
    let mut rest = line.to_owned();
    let mut pieces = Vec::new();
    while rest.len() > MAX_PIECE {
        let mut at = MAX_PIECE;
        while !rest.is_char_boundary(at) {
            at -= 1;
        }
        let tail = rest.split_off(at);
        pieces.push(std::mem::replace(&mut rest, tail));
    }
    pieces.push(rest);
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_log_that_is_read_again_goes_on_where_it_was() {
        fn text(new: Option<New<'_>>) -> Option<&str> {
            new.map(|new| new.line)
        }
        let log: Vec<String> = [
            (1, "a"),
            (2, "b"),
            // Of the other output, and a little out of order.
            (4, "c"),
            (3, "d"),
            (3, "d"),
            (5_000_000, "e"),
            (6_000_000, ""),
        ]
        .iter()
        .map(|(nanosecond, text)| {
            let time = Timestamp::from_nanosecond(1_700_000_000_000_000_000 + nanosecond).unwrap();
            format!("{time} {text}")
        })
        .collect();
        let all = ["a", "b", "c", "d", "d", "e", ""];
        for cut in 0..=log.len() {
            let mut passed = Passed::default();
            let mut seen: Vec<&str> = log[..cut]
                .iter()
                .filter_map(|l| text(passed.take(l)))
                .collect();
            assert_eq!(seen, all[..cut]);
            passed.begin_again();
            seen.extend(log.iter().filter_map(|line| text(passed.take(line))));
            // Two lines of one moment and one text cannot be told apart.
            let expected = if cut == 5 { 8 } else { 7 };
            assert_eq!(seen.len(), expected, "cut at {cut}: {seen:?}");
        }
        // The last one is gone with a file that was put away.
        let mut passed = Passed::default();
        assert_eq!(text(passed.take(&log[0])), Some("a"));
        passed.begin_again();
        assert_eq!(text(passed.take(&log[5])), Some("e"));
        let words = "unable to retrieve container logs";
        assert_eq!(text(passed.take(words)), Some(words));
    }

    #[test]
    fn an_earlier_servers_record_says_what_is_new() {
        let line = |second: u32, text: &str| format!("2026-01-01T00:00:{second:02}.5Z {text}");
        let last = |text: &str, part| Origin {
            container: "c".to_owned(),
            time: "2026-01-01T00:00:02.5Z".parse().unwrap(),
            checksum: crc32fast::hash(text.as_bytes()),
            part,
        };
        // Its last piece was recorded, or only the second of more.
        for (part, new) in [(0, 1), (1, 2)] {
            let mut passed = Passed::up_to(&last("b", part));
            passed.begin_again();
            assert_eq!(passed.take(&line(1, "a")), None);
            assert_eq!(passed.take(&line(2, "b")).unwrap().recorded, new);
            assert_eq!(passed.take(&line(3, "c")).unwrap().recorded, 0);
            // A connection that breaks afterwards repeats nothing.
            passed.begin_again();
            assert_eq!(passed.take(&line(3, "c")), None);
        }
    }

    #[test]
    fn a_log_is_asked_for_from_a_whole_second() {
        let asked = |time: &str| whole_second(time.parse().unwrap()).to_string();
        assert_eq!(asked("2026-01-01T00:00:02.999Z"), "2026-01-01T00:00:02Z");
        assert_eq!(asked("2026-01-01T00:00:02Z"), "2026-01-01T00:00:02Z");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let cut = pieces(&"ü".repeat(MAX_PIECE));
        assert!(cut.len() > 1 && cut.iter().all(|piece| piece.len() <= MAX_PIECE));
        assert_eq!(cut.concat(), "ü".repeat(MAX_PIECE));
    }
}
