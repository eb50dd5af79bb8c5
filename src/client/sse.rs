//! Server-sent events, read piece by piece (the WHATWG rules, what Gantry needs of them).

/// Longest event taken; a log record is far smaller, and a server that sends more is not ours.
const MAX_EVENT_BYTES: usize = 32 << 20;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SseEvent {
    /// Its kind; empty is `message`.
    pub(super) name: String,
    /// Where to go on after a lost connection: the last id seen so far.
    pub(super) id: Option<String>,
    /// Its text.
    pub(super) data: String,
}

/// The stream was not one Gantry sends.
#[derive(Debug, thiserror::Error)]
#[error("an event is larger than {MAX_EVENT_BYTES} bytes")]
pub(super) struct TooLarge;

/// Takes bytes, gives events.
#[derive(Debug, Default)]
pub(super) struct SseReader {
    line: Vec<u8>,
    event: SseEvent,
    has_data: bool,
    last_was_cr: bool,
}

impl SseReader {
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Vec<SseEvent>, TooLarge> {
        let mut events = Vec::new();
        for &byte in bytes {
            let after_cr = std::mem::replace(&mut self.last_was_cr, byte == b'\r');
            match byte {
                b'\n' if after_cr => {}
                b'\n' | b'\r' => events.extend(self.end_line()),
                _ if self.line.len() + self.event.data.len() >= MAX_EVENT_BYTES => {
                    return Err(TooLarge);
                }
                _ => self.line.push(byte),
            }
        }
        Ok(events)
    }

    fn end_line(&mut self) -> Option<SseEvent> {
        let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
        if line.is_empty() {
            return self.dispatch();
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "id" => self.event.id = Some(value.to_owned()),
            "data" => {
                if self.has_data {
                    self.event.data.push('\n');
                }
                self.has_data = true;
                self.event.data.push_str(value);
            }
            // A comment (keep-alive) has an empty field name; `retry` is ours to choose.
            _ => {}
        }
        None
    }

    fn dispatch(&mut self) -> Option<SseEvent> {
        let id = self.event.id.clone();
        let event = std::mem::replace(
            &mut self.event,
            SseEvent {
                id,
                ..SseEvent::default()
            },
        );
        std::mem::take(&mut self.has_data).then_some(event)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const STREAM: &[u8] =
        b": keep-alive\n\nid: 7\ndata: {\"a\":1}\n\r\nevent: end\r\ndata:x\r\ndata: y\r\n\r\nid: 9\n\n";

    #[test]
    fn events_come_out_the_same_however_the_bytes_are_cut() {
        let whole = SseReader::default().push(STREAM).unwrap();
        assert_eq!(whole.len(), 2);
        assert_eq!(whole[0].data, "{\"a\":1}");
        assert_eq!(whole[0].id.as_deref(), Some("7"));
        assert_eq!(
            (whole[1].name.as_str(), whole[1].data.as_str()),
            ("end", "x\ny")
        );
        assert_eq!(whole[1].id.as_deref(), Some("7"), "the last id stays");
        for cut in 1..STREAM.len() {
            let mut reader = SseReader::default();
            let mut events = reader.push(&STREAM[..cut]).unwrap();
            events.extend(reader.push(&STREAM[cut..]).unwrap());
            assert_eq!(events, whole, "cut at {cut}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut reader = SseReader::default();
        let piece = vec![b'x'; 1 << 20];
        let refused = (0..64).any(|_| reader.push(&piece).is_err());
        assert!(refused);
    }
}
