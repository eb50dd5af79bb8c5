//! How far a request is on its way to a program: its answer is waited for once it was sent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::Request;
use hyper::body::{Frame, SizeHint};
use tokio::time::{Instant, timeout_at};

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unanswered {
    /// The client sent nothing more of its request.
    Unsent,
    /// The program took nothing more of it, or said nothing.
    Late,
}

/// Bytes of a request that are given to the connection to the program before they have to be written.
const MOST_UNWRITTEN: usize = 16 << 10;

/// How far the request is.
#[derive(Debug)]
struct Progress {
    /// When the last piece of it was passed on, or written.
    last: Instant,
    /// More was asked for, and the client has not sent it yet.
    wanted: bool,
    /// There is more of the body.
    open: bool,
    /// Bytes that were given to the connection since it wrote last.
    given: usize,
    /// The program takes nothing now, since then.
    blocked: Option<Instant>,
    /// Who waits until something was written.
    waiting: Option<Waker>,
}

/// How far a request is, for who waits for the answer.
#[derive(Debug, Clone)]
pub struct Sent(Arc<Mutex<Progress>>);

impl Sent {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Progress {
            last: Instant::now(),
            wanted: false,
            open: false,
            given: 0,
            blocked: None,
            waiting: None,
        })))
    }

    fn locked(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the last of it was passed on, and whether the client is waited for.
    fn now(&self) -> (Instant, bool) {
        let progress = self.locked();
        (progress.last, progress.wanted)
    }

    /// Since when nothing of it moved; `None`: all of it was sent.
    pub fn unfinished(&self) -> Option<Instant> {
        let progress = self.locked();
        let unfinished = progress.open || progress.blocked.is_some();
        unfinished.then_some(progress.last)
    }

    /// Since when the program takes nothing of what it is sent.
    pub fn blocked(&self) -> Option<Instant> {
        self.locked().blocked
    }

    /// The connection to the program wrote something, or could not.
    pub fn wrote(&self, some: bool) {
        let waiting = {
            let mut progress = self.locked();
            if !some {
                progress.blocked.get_or_insert_with(Instant::now);
                return;
            }
            progress.last = Instant::now();
            progress.blocked = None;
            progress.given = 0;
            progress.waiting.take()
        };
        if let Some(waiting) = waiting {
            waiting.wake();
        }
    }

    /// Whether the connection to the program may have more; if not, it is woken once it may.
    fn may_have_more(&self, context: &Context<'_>) -> bool {
        let mut progress = self.locked();
        let may = progress.blocked.is_none() && progress.given < MOST_UNWRITTEN;
        if !may {
            progress.wanted = false;
            progress.waiting = Some(context.waker().clone());
        }
        may
    }

    /// What the client had of it when more was asked for; `None`: nothing yet.
    fn passed(&self, bytes: Option<usize>) {
        let mut progress = self.locked();
        progress.wanted = bytes.is_none();
        if let Some(bytes) = bytes {
            progress.last = Instant::now();
            // With what a chunk has around it. Nothing is written of an empty one.
            progress.given += bytes + 16 * usize::from(bytes > 0);
        }
    }
}

/// The request, and how far it is.
pub fn watched(request: Request) -> (Request, Sent) {
    let sent = Sent::new();
    // What has no body keeps it so: hyper looks at that.
    if request.body().is_end_stream() {
        return (request, sent);
    }
    sent.locked().open = true;
    let watching = sent.clone();
    let request = request.map(|body| {
        Body::new(Watched {
            body,
            sent: watching,
        })
    });
    (request, sent)
}

/// The answer, if it comes within `patience` of the last piece of the request.
pub async fn answered<T>(
    answer: impl Future<Output = T>,
    sent: &Sent,
    patience: Duration,
) -> Result<T, Unanswered> {
    tokio::pin!(answer);
    loop {
        let (looked_at, _) = sent.now();
        if let Ok(answer) = timeout_at(looked_at + patience, &mut answer).await {
            return Ok(answer);
        }
        match sent.now() {
            (last, _) if last > looked_at => {}
            (_, true) => return Err(Unanswered::Unsent),
            (_, false) => return Err(Unanswered::Late),
        }
    }
}

/// See [`watched`].
struct Watched {
    body: Body,
    sent: Sent,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if !self.sent.may_have_more(context) {
            return Poll::Pending;
        }
        let polled = Pin::new(&mut self.body).poll_frame(context);
        let bytes = match &polled {
            Poll::Pending => None,
            Poll::Ready(Some(Ok(frame))) => Some(frame.data_ref().map_or(0, Bytes::len)),
            Poll::Ready(_) => Some(0),
        };
        self.sent.passed(bytes);
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.sent.locked().open = false;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::BodyExt;

    /// Much longer than a busy machine delays anything here.
    const PATIENCE: Duration = Duration::from_secs(2);

    /// A request whose body comes in pieces with pauses that are patient ones only each by itself, and then stops
    /// or ends.
    fn slow(pieces: usize, ends: bool) -> Request {
        let pieces = stream::iter(0..pieces).then(|_| async {
            tokio::time::sleep(PATIENCE / 4).await;
            Ok::<_, std::io::Error>("piece")
        });
        Request::new(match ends {
            true => Body::from_stream(pieces),
            false => Body::from_stream(pieces.chain(stream::pending())),
        })
    }

    /// What becomes of it with a program that reads it all, and then answers or does not.
    async fn passed_on(request: Request, answers: bool) -> Result<usize, Unanswered> {
        let (request, sent) = watched(request);
        let answer = async move {
            let body = axum::body::to_bytes(request.into_body(), 1 << 20).await;
            if !answers {
                std::future::pending::<()>().await;
            }
            body.unwrap().len()
        };
        answered(answer, &sent, PATIENCE).await
    }

    #[tokio::test]
    async fn an_upload_takes_as_long_as_it_takes() {
        assert_eq!(passed_on(slow(6, true), true).await, Ok(30));
        assert_eq!(passed_on(Request::new(Body::empty()), true).await, Ok(0));
    }

    #[tokio::test]
    async fn the_program_has_its_time_from_then_on() {
        let began = Instant::now();
        let (_unread, sent) = watched(slow(3, true));
        let never = std::future::pending::<usize>();
        let all = tokio::join!(
            passed_on(slow(3, true), false),
            passed_on(Request::new(Body::empty()), false),
            // It does not even read.
            answered(never, &sent, PATIENCE),
        );
        let late = Err(Unanswered::Late);
        assert_eq!(all, (late, late, late));
        assert!(began.elapsed() >= PATIENCE + PATIENCE / 4 * 3);
    }

    #[test]
    fn no_more_is_taken_than_is_written() {
        let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(vec![0; 8 << 10]));
        let (request, sent) = watched(Request::new(Body::from_stream(endless)));
        let mut body = request.into_body();
        let mut taken = || {
            let next = || body.frame().now_or_never();
            std::iter::from_fn(next).take(100).count()
        };
        assert_eq!(taken(), 2);
        sent.wrote(true);
        assert_eq!(taken(), 2);
        sent.wrote(true);
        sent.wrote(false);
        assert!(sent.blocked().is_some() && sent.unfinished().is_some());
        assert_eq!(taken(), 0);
        sent.wrote(true);
        assert!(sent.blocked().is_none());
        assert_eq!(taken(), 2);
        drop(body);
        assert!(sent.unfinished().is_none());
    }

    #[tokio::test]
    async fn a_client_that_stops_sending_is_not_waited_for() {
        let stopped = passed_on(slow(3, false), true).await;
        assert_eq!(stopped, Err(Unanswered::Unsent));
    }
}
