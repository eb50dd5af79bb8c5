//! The connection to a program: little is held of what either side does not take, and it ends with its exchange.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::upload::Sent;
use crate::platform::ByteStream;

/// Most bytes that are read from a connection at once: a piece of a body is no longer. A head is gathered from many.
const MOST_READ: usize = 8 << 10;

/// How long a program may go on to read a request that it has answered.
const LINGER: Duration = Duration::from_secs(10);

/// Reads a small piece: hyper's buffers do not grow then.
pub fn poll_read_piece(
    stream: &mut (impl AsyncRead + Unpin),
    context: &mut Context<'_>,
    buffer: &mut ReadBuf<'_>,
) -> Poll<io::Result<()>> {
    let most = buffer.remaining().min(MOST_READ);
    let mut piece = ReadBuf::new(buffer.initialize_unfilled_to(most));
    let polled = Pin::new(stream).poll_read(context, &mut piece);
    let read = piece.filled().len();
    buffer.advance(read);
    polled
}

/// The stream to a program. What it writes is noted, and it reads in small pieces.
pub struct Upstream {
    stream: Box<dyn ByteStream>,
    sent: Sent,
}

impl Upstream {
    /// A new one, for this request.
    pub fn new(stream: Box<dyn ByteStream>, sent: Sent) -> Self {
        Self { stream, sent }
    }
}

impl AsyncRead for Upstream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_read_piece(&mut self.stream, context, buffer)
    }
}

// Not vectored: hyper copies what it is to write then, and holds no other buffers.
impl AsyncWrite for Upstream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.sent.wrote(polled.is_ready());
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// How far the answer is.
#[derive(Debug, Default)]
struct Answered {
    /// When the last of it was passed on.
    last: Option<Instant>,
    /// The client has not asked for more since.
    unread: bool,
}

/// One request and its answer. The connection to the program ends soon after it.
#[derive(Debug, Clone)]
pub struct Exchange {
    sent: Sent,
    answered: Arc<Mutex<Answered>>,
    /// The whole answer was passed on.
    ended: CancellationToken,
    /// Nobody waits for the rest.
    gone: CancellationToken,
}

impl Exchange {
    /// Of this request.
    pub fn new(sent: Sent) -> Self {
        Self {
            sent,
            answered: Arc::default(),
            ended: CancellationToken::new(),
            gone: CancellationToken::new(),
        }
    }

    fn locked(&self) -> MutexGuard<'_, Answered> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when the connection to the program has to end: nobody waits for the answer, the answer ended a
    /// moment ago, or nothing moved for so long where something should.
    pub async fn over(&self, patience: Duration) {
        tokio::select! {
            () = self.gone.cancelled() => {}
            () = self.ended.cancelled() => tokio::time::sleep(LINGER).await,
            () = self.stalled(patience) => {}
        }
    }

    async fn stalled(&self, patience: Duration) {
        loop {
            tokio::time::sleep(patience / 4).await;
            let (last, unread) = {
                let answered = self.locked();
                (answered.last, answered.unread)
            };
            // Before that the answer itself is waited for, with a bound.
            let Some(last) = last else { continue };
            // An answer may pause as long as the program likes, once the request was sent.
            let moved = match (unread, self.sent.unfinished()) {
                (true, _) => last,
                (false, Some(sent)) => last.max(sent),
                (false, None) => continue,
            };
            if moved.elapsed() >= patience {
                return;
            }
        }
    }
}

/// Ends the exchange when it is dropped: with who waits for the answer, or with the answer.
#[derive(Debug)]
pub struct Waiting(pub Exchange);

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.0.ended.is_cancelled() {
            self.0.gone.cancel();
        }
    }
}

/// The body of an answer. Dropped before its end, it ends the connection to the program at once.
pub struct Answer {
    body: Incoming,
    waiting: Waiting,
}

impl Answer {
    /// Of this exchange.
    pub fn new(body: Incoming, waiting: Waiting) -> Self {
        waiting.0.locked().last = Some(Instant::now());
        Self { body, waiting }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        let exchange = &self.waiting.0;
        {
            let mut answered = exchange.locked();
            answered.unread = matches!(polled, Poll::Ready(Some(Ok(_))));
            if answered.unread {
                answered.last = Some(Instant::now());
            }
        }
        if matches!(polled, Poll::Ready(None)) {
            exchange.ended.cancel();
        }
        // A short piece would hold the whole buffer that it was read into.
        polled.map_ok(|frame| frame.map_data(|data| Bytes::copy_from_slice(&data)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if self.body.is_end_stream() {
            self.waiting.0.ended.cancel();
        }
    }
}
