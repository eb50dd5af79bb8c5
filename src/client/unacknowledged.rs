//! Input for the program that the server has not said it has on its disk: kept, so that a lost connection
//! or a restart of the server loses none of it; no I/O.

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::typed::{PIECE, Typed};
use crate::model::SubmissionId;

/// Most bytes that wait for the server's word: 16 pieces. At 10 ms for a write to its disk that lets 25 MB/s
/// through, more than the 16 MiB that one submission may be sent in a second.
const MOST_KEPT: usize = 16 * PIECE;

/// Everything that was typed and not acknowledged, in order.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    /// Each with the number of bytes that came before it.
    pieces: VecDeque<(u64, String)>,
    /// Bytes in `pieces`.
    kept: usize,
    /// Bytes that were typed.
    typed: u64,
    /// Nothing follows. The server says how many bytes it has, and nothing of the end: it is sent again on
    /// each connection, and passed over where it is known.
    end: bool,
    /// The server did not take something: what follows has no place without it.
    refused: bool,
}

impl Unacknowledged {
    /// Whether another piece may be taken in.
    pub(super) fn has_room(&self) -> bool {
        self.kept + PIECE <= MOST_KEPT
    }

    /// Keeps it. Gives the frames to send: its own, or all that wait where the server refused one of them.
    pub(super) fn add(&mut self, id: SubmissionId, typed: Typed) -> Vec<Value> {
        let offset = self.typed;
        let frame = match typed {
            Some(text) => {
                let frame = json!({"stdin": id, "data": text, "offset": offset});
                self.typed += text.len() as u64;
                self.kept += text.len();
                self.pieces.push_back((offset, text));
                frame
            }
            None => {
                self.end = true;
                end(id, offset)
            }
        };
        if std::mem::take(&mut self.refused) {
            return self.again(id);
        }
        vec![frame]
    }

    /// All of it, for a connection that has none of it.
    pub(super) fn again(&self, id: SubmissionId) -> Vec<Value> {
        let pieces = self.pieces.iter();
        let mut frames: Vec<Value> = pieces
            .map(|(offset, text)| json!({"stdin": id, "data": text, "offset": offset}))
            .collect();
        if self.end {
            frames.push(end(id, self.typed));
        }
        frames
    }

    /// The server has so many bytes on its disk.
    pub(super) fn received(&mut self, bytes: u64) {
        self.refused = false;
        let done = |(offset, text): &(u64, String)| offset + text.len() as u64 <= bytes;
        while self.pieces.front().is_some_and(done) {
            if let Some((_, text)) = self.pieces.pop_front() {
                self.kept -= text.len();
            }
        }
    }

    /// The server did not take something of it. Whether that is news: the frames behind it are refused as well.
    pub(super) fn refused(&mut self) -> bool {
        !std::mem::replace(&mut self.refused, true)
    }
}

fn end(id: SubmissionId, offset: u64) -> Value {
    json!({"stdin": id, "data": "", "offset": offset, "eof": true})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(text: &str) -> Typed {
        Some(text.to_owned())
    }

    /// Offsets and texts.
    fn told(frames: &[Value]) -> Vec<(u64, &str)> {
        let of = |frame: &Value| frame["offset"].as_u64().unwrap_or(u64::MAX);
        let text = |frame| -> &str { Value::as_str(frame).unwrap_or("no text") };
        let told = frames.iter().map(|frame| (of(frame), text(&frame["data"])));
        told.collect()
    }

    #[test]
    fn what_is_not_acknowledged_is_given_again_at_its_offset() {
        let (id, mut input) = (SubmissionId::new(), Unacknowledged::default());
        assert_eq!(told(&input.add(id, typed("ü\n"))), [(0, "ü\n")]);
        assert_eq!(told(&input.add(id, typed("two"))), [(3, "two")]);
        let ended = input.add(id, None);
        assert_eq!(
            (told(&ended), &ended[0]["eof"]),
            (vec![(6, "")], &true.into())
        );
        assert_eq!(told(&input.again(id)), [(0, "ü\n"), (3, "two"), (6, "")]);
        input.received(3);
        assert_eq!(told(&input.again(id)), [(3, "two"), (6, "")]);
        // The end is said again: nothing acknowledges it.
        input.received(6);
        assert_eq!(told(&input.again(id)), [(6, "")]);
    }

    #[test]
    fn behind_a_refused_piece_all_that_waits_is_sent() {
        let (id, mut input) = (SubmissionId::new(), Unacknowledged::default());
        input.add(id, typed("one"));
        input.add(id, typed("two"));
        assert!(input.refused() && !input.refused());
        let all = [(0, "one"), (3, "two"), (6, "three")];
        assert_eq!(told(&input.add(id, typed("three"))), all);
        assert_eq!(told(&input.add(id, typed("four"))), [(11, "four")]);
    }

    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let (id, mut input) = (SubmissionId::new(), Unacknowledged::default());
        let piece = "x".repeat(PIECE);
        while input.has_room() {
            input.add(id, typed(&piece));
        }
        assert_eq!(input.kept, MOST_KEPT);
        input.received(PIECE as u64);
        assert!(input.has_room());
    }
}
