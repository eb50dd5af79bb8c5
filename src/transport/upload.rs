//! How far a request is on its way to a program: its answer is waited for once it was sent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
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

/// How far the body is.
#[derive(Debug, Clone, Copy)]
struct Progress {
    /// When the last piece of it was passed on.
    last: Instant,
    /// More was asked for, and the client has not sent it yet.
    wanted: bool,
}

/// How far a body is, for who waits for the answer.
#[derive(Debug, Clone)]
pub struct Sent(Arc<Mutex<Progress>>);

impl Sent {
    fn now(&self) -> Progress {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, wanted: bool) {
        let mut progress = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        progress.wanted = wanted;
        if !wanted {
            progress.last = Instant::now();
        }
    }
}

/// The request, and how far it is.
pub fn watched(request: Request) -> (Request, Sent) {
    let sent = Sent(Arc::new(Mutex::new(Progress {
        last: Instant::now(),
        wanted: false,
    })));
    // What has no body keeps it so: hyper looks at that.
    if request.body().is_end_stream() {
        return (request, sent);
    }
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
        let looked_at = sent.now();
        match timeout_at(looked_at.last + patience, &mut answer).await {
            Ok(answer) => return Ok(answer),
            Err(_) if sent.now().last > looked_at.last => {}
            Err(_) if sent.now().wanted => return Err(Unanswered::Unsent),
            Err(_) => return Err(Unanswered::Late),
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
        let polled = Pin::new(&mut self.body).poll_frame(context);
        self.sent.set(polled.is_pending());
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures_util::{StreamExt, stream};

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

    #[tokio::test]
    async fn a_client_that_stops_sending_is_not_waited_for() {
        let stopped = passed_on(slow(3, false), true).await;
        assert_eq!(stopped, Err(Unanswered::Unsent));
    }
}
