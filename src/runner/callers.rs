//! Who calls a released program: when somebody used it last, whose request it has not answered yet, and a
//! close frame for WebSockets whose program ended without one.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// A connection on which nothing came or went for so long, and whose last word was the program's, is between
/// two requests: proxies keep connections.
const BETWEEN_REQUESTS: Duration = Duration::from_secs(1);

/// A WebSocket close frame (RFC 6455 §5.5.1) with the code 1001, "going away".
const GOING_AWAY: [u8; 4] = [0x88, 0x02, 0x03, 0xE9];

/// Bytes of a request's head that are searched for what it wants to change to.
const MOST_HEAD: usize = 16 << 10;

/// Everybody who calls a program now.
pub(super) struct Callers {
    /// When somebody used the program last.
    used: Cell<Instant>,
    connected: RefCell<Vec<Weak<Talk>>>,
}

impl Callers {
    pub(super) fn new() -> Self {
        Self {
            used: Cell::new(Instant::now()),
            connected: RefCell::default(),
        }
    }

    /// Somebody uses it now.
    pub(super) fn notice(&self) {
        self.used.set(Instant::now());
    }

    /// For how long nobody has used it.
    pub(super) fn unused(&self) -> Duration {
        self.used.get().elapsed()
    }

    /// A new caller's connection.
    pub(super) fn connect<S>(&self, stream: S) -> Caller<'_, S> {
        let talk = Rc::new(Talk::new());
        let mut connected = self.connected.borrow_mut();
        connected.retain(|known| known.strong_count() > 0);
        connected.push(Rc::downgrade(&talk));
        Caller {
            stream,
            callers: self,
            talk,
            farewell: None,
        }
    }

    /// Whether the program owes somebody an answer, or is giving it.
    pub(super) fn wait_for_answers(&self) -> bool {
        let connected = self.connected.borrow();
        let mut talks = connected.iter().filter_map(Weak::upgrade);
        talks.any(|talk| talk.waits_for_answer())
    }

    /// Whether anybody is connected.
    pub(super) fn are_connected(&self) -> bool {
        let connected = self.connected.borrow();
        connected.iter().any(|known| known.strong_count() > 0)
    }
}

/// What was said on one connection.
struct Talk {
    last: Cell<Instant>,
    /// The last word was the caller's.
    asked: Cell<bool>,
    /// The caller's last request wants a WebSocket.
    wants_websocket: Cell<bool>,
    said: RefCell<Said>,
}

/// What the program says.
enum Said {
    /// Answers to requests.
    Http,
    /// The head of an answer that changes to a WebSocket: so many bytes of its end were seen.
    Switching(usize),
    /// Frames.
    Frames(Frames),
}

impl Talk {
    fn new() -> Self {
        Self {
            last: Cell::new(Instant::now()),
            asked: Cell::new(false),
            wants_websocket: Cell::new(false),
            said: RefCell::new(Said::Http),
        }
    }

    fn waits_for_answer(&self) -> bool {
        let http = matches!(*self.said.borrow(), Said::Http);
        http && (self.asked.get() || self.last.get().elapsed() < BETWEEN_REQUESTS)
    }

    fn caller_wrote(&self, data: &[u8]) {
        self.last.set(Instant::now());
        if !matches!(*self.said.borrow(), Said::Http) {
            return;
        }
        self.asked.set(true);
        if data.starts_with(b"GET ") {
            self.wants_websocket.set(wants_websocket(data));
        }
    }

    fn program_wrote(&self, data: &[u8]) {
        self.last.set(Instant::now());
        self.asked.set(false);
        let mut said = self.said.borrow_mut();
        if matches!(*said, Said::Http)
            && self.wants_websocket.get()
            && data.starts_with(b"HTTP/1.1 101")
        {
            *said = Said::Switching(0);
        }
        let mut rest = data;
        if let Said::Switching(seen) = &mut *said {
            const END: &[u8] = b"\r\n\r\n";
            while let Some((byte, after)) = rest.split_first() {
                rest = after;
                *seen = match END.get(*seen) == Some(byte) {
                    true => *seen + 1,
                    false => usize::from(*byte == b'\r'),
                };
                if *seen == END.len() {
                    *said = Said::Frames(Frames::default());
                    break;
                }
            }
        }
        if let Said::Frames(frames) = &mut *said {
            frames.pass(rest);
        }
    }

    /// What the caller is still to be told when the program says no more.
    fn farewell(&self) -> &'static [u8] {
        match &*self.said.borrow() {
            Said::Frames(frames) if frames.is_open() => &GOING_AWAY,
            _ => &[],
        }
    }
}

/// Whether a request's head asks to change to a WebSocket.
fn wants_websocket(head: &[u8]) -> bool {
    let head = String::from_utf8_lossy(&head[..head.len().min(MOST_HEAD)]).to_ascii_lowercase();
    let head = head.split("\r\n\r\n").next().unwrap_or_default();
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    fields.any(|(name, value)| name == "upgrade" && value.trim() == "websocket")
}

/// Where in its frames (RFC 6455 §5.2) one side of a WebSocket is.
#[derive(Debug, Default)]
struct Frames {
    /// The head of a frame, as far as it came.
    head: [u8; 14],
    seen: usize,
    /// Bytes of the frame's content that are still to come.
    content: u64,
    closed: bool,
}

impl Frames {
    /// Between two frames, and before the last.
    fn is_open(&self) -> bool {
        !self.closed && self.seen == 0 && self.content == 0
    }

    fn pass(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.content > 0 {
                let passed = data
                    .len()
                    .min(usize::try_from(self.content).unwrap_or(usize::MAX));
                self.content -= passed as u64;
                data = &data[passed..];
                continue;
            }
            self.head[self.seen] = data[0];
            self.seen += 1;
            data = &data[1..];
            let masked = usize::from(self.head[1] >> 7) * 4;
            let (extended, length) = match self.head[1] & 0x7f {
                126 => (
                    2,
                    u64::from(u16::from_be_bytes([self.head[2], self.head[3]])),
                ),
                127 => {
                    let mut length = [0; 8];
                    length.copy_from_slice(&self.head[2..10]);
                    (8, u64::from_be_bytes(length))
                }
                short => (0, u64::from(short)),
            };
            if self.seen >= 2 && self.seen == 2 + extended + masked {
                self.closed |= self.head[0] & 0x0f == 8;
                self.content = length;
                self.seen = 0;
            }
        }
    }
}

/// A caller's connection: what comes and goes on it is use. That it is open is not, since proxies keep
/// connections.
pub(super) struct Caller<'a, S> {
    stream: S,
    callers: &'a Callers,
    talk: Rc<Talk>,
    /// What is still to be written before the end.
    farewell: Option<&'static [u8]>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Caller<'_, S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.callers.notice();
            self.talk.caller_wrote(&buffer.filled()[before..]);
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Caller<'_, S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.callers.notice();
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, data))?;
        self.talk.program_wrote(&data[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut left = match self.farewell {
            Some(left) => left,
            None => self.talk.farewell(),
        };
        while !left.is_empty() {
            self.farewell = Some(left);
            let written = ready!(Pin::new(&mut self.stream).poll_write(context, left))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            left = &left[written..];
        }
        // Once is enough, however often it is ended.
        self.farewell = Some(left);
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    const ASKS: &[u8] = b"GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: WebSocket\r\n\r\n";
    const SWITCHES: &[u8] = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n";

    /// What a caller gets whose program says this, in pieces of this size, and ends.
    async fn told(request: &[u8], answer: &[u8], piece: usize) -> Vec<u8> {
        let callers = Callers::new();
        let (mut outside, inside) = duplex(1 << 20);
        let mut caller = callers.connect(inside);
        outside.write_all(request).await.unwrap();
        let mut asked = vec![0; request.len()];
        caller.read_exact(&mut asked).await.unwrap();
        for piece in answer.chunks(piece) {
            caller.write_all(piece).await.unwrap();
        }
        caller.shutdown().await.unwrap();
        caller.shutdown().await.unwrap();
        drop(caller);
        let mut told = Vec::new();
        outside.read_to_end(&mut told).await.unwrap();
        told.split_off(answer.len())
    }

    #[tokio::test]
    async fn a_websocket_whose_program_ends_gets_a_close_frame() {
        let hello = [&[0x81, 5][..], b"hello"].concat();
        let long = [&[0x82, 126, 1, 0][..], &[7; 256]].concat();
        let longest = [&[0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0][..], &[7; 65_536]].concat();
        let close = [0x88, 2, 0x03, 0xE8];
        let cases: [(&[&[u8]], &[u8]); 6] = [
            (&[], &GOING_AWAY),
            (&[&hello, &long, &hello], &GOING_AWAY),
            (&[&longest], &GOING_AWAY),
            // It closed itself.
            (&[&hello, &close], &[]),
            // Within a frame nothing can be said.
            (&[&hello[..4]], &[]),
            (&[&long[..3]], &[]),
        ];
        for (frames, expected) in cases {
            for piece in [1 << 20, 3, 1] {
                // The answer's first bytes come in one piece, as a head does.
                let piece = if frames.is_empty() {
                    1 << 20
                } else {
                    piece.max(12)
                };
                let answer = [SWITCHES, &frames.concat()].concat();
                assert_eq!(told(ASKS, &answer, piece).await, expected, "{frames:?}");
            }
        }
        let plain = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        assert!(told(plain, b"HTTP/1.1 200 OK\r\n\r\n", 9).await.is_empty());
        assert!(told(plain, SWITCHES, 99).await.is_empty());
    }

    #[tokio::test]
    async fn who_waits_for_an_answer_is_known() {
        let callers = Callers::new();
        let (mut outside, inside) = duplex(1_024);
        let mut caller = callers.connect(inside);
        assert!(callers.are_connected());
        outside.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut asked = [0; 18];
        caller.read_exact(&mut asked).await.unwrap();
        let long_ago = |callers: &Callers| {
            for talk in callers.connected.borrow().iter().filter_map(Weak::upgrade) {
                talk.last.set(Instant::now() - 2 * BETWEEN_REQUESTS);
            }
        };
        long_ago(&callers);
        assert!(callers.wait_for_answers());
        caller.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        assert!(callers.wait_for_answers(), "more of it may come");
        long_ago(&callers);
        assert!(!callers.wait_for_answers() && callers.are_connected());
        // A WebSocket has no end of its own.
        outside.write_all(ASKS).await.unwrap();
        let mut asked = vec![0; ASKS.len()];
        caller.read_exact(&mut asked).await.unwrap();
        caller.write_all(SWITCHES).await.unwrap();
        assert!(!callers.wait_for_answers());
        drop(caller);
        assert!(!callers.are_connected());
    }
}
