//! What every WebSocket that Gantry serves has in common: how much may wait in memory to be sent.
//!
//! Without a bound, a client that sends pings and reads nothing makes the answers to them pile up.

use tokio_tungstenite::tungstenite::Bytes;
use tokio_tungstenite::tungstenite::protocol::frame::Frame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

/// Longest frame that is sent; a longer message is sent in fragments.
const MAX_FRAME: usize = 256 << 10;

/// What may wait to be sent: one frame, and as much again of pongs.
const MAX_WAITING: usize = 2 * MAX_FRAME;

/// The settings of a WebSocket whose client may send messages of this size.
pub fn config(max_message: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        // Every frame is written at once.
        .write_buffer_size(0)
        .max_write_buffer_size(MAX_WAITING)
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message))
}

/// The message itself, or the fragments of one that is longer than a frame.
pub fn frames(message: Message) -> impl Iterator<Item = Message> {
    enum Rest {
        Whole(Message),
        Part(Data, Bytes),
    }
    let mut rest = Some(match message {
        Message::Text(text) if text.len() > MAX_FRAME => Rest::Part(Data::Text, text.into()),
        Message::Binary(data) if data.len() > MAX_FRAME => Rest::Part(Data::Binary, data),
        message => Rest::Whole(message),
    });
    std::iter::from_fn(move || match rest.take()? {
        Rest::Whole(message) => Some(message),
        Rest::Part(kind, mut payload) => {
            let piece = payload.split_to(payload.len().min(MAX_FRAME));
            let last = payload.is_empty();
            if !last {
                rest = Some(Rest::Part(Data::Continue, payload));
            }
            let frame = Frame::message(piece, OpCode::Data(kind), last);
            Some(Message::Frame(frame))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_sent_in_fragments() {
        let lengths = |length: usize| -> Vec<(usize, bool)> {
            let about = |message: Message| match message {
                Message::Frame(frame) => (frame.payload().len(), frame.header().is_final),
                whole => (whole.len(), true),
            };
            frames(Message::text("x".repeat(length)))
                .map(about)
                .collect()
        };
        assert_eq!(lengths(0), [(0, true)]);
        assert_eq!(lengths(MAX_FRAME), [(MAX_FRAME, true)]);
        assert_eq!(lengths(MAX_FRAME + 1), [(MAX_FRAME, false), (1, true)]);
    }
}
