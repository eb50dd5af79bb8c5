//! Large messages of module pods: each is taken out of its user's budget before it is read, so that many
//! large results at one time wait for each other instead of filling the server's memory.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Frame;
use tonic::Status;
use tonic::body::Body;
use tower::Service;

use crate::budget::{Budgets, Spent};
use crate::model::UserId;

/// Messages up to this many bytes are not counted; a user has some 64 calls at a time.
const SMALL_BYTES: usize = 256 << 10;

/// A message's head: a flag and the length (gRPC over HTTP/2, "Length-Prefixed-Message").
const HEAD_BYTES: usize = 5;

/// What a call's last message takes of its user's budget, until the last copy of this is dropped.
#[derive(Debug, Clone, Default)]
pub struct Held(Arc<Mutex<Option<Spent>>>);

impl Held {
    fn set(&self, spent: Option<Spent>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = spent;
    }
}

/// Whose budget it is, and where it is kept.
#[derive(Debug, Clone)]
pub struct Account {
    /// All users'.
    pub budgets: Arc<Budgets<UserId>>,
    /// Whose.
    pub user: UserId,
    /// What the call holds of it.
    pub held: Held,
}

/// A channel whose answers are counted.
#[derive(Debug, Clone)]
pub struct Counted<S> {
    /// The channel.
    pub inner: S,
    /// Who pays.
    pub account: Account,
}

impl<S> Service<hyper::Request<Body>> for Counted<S>
where
    S: Service<hyper::Request<Body>, Response = hyper::Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = hyper::Response<CountedBody>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: hyper::Request<Body>) -> Self::Future {
        let account = self.account.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| CountedBody::new(body, account)))
        })
    }
}

type Taking = Pin<Box<dyn Future<Output = Spent> + Send>>;

/// An answer whose large messages wait for room.
pub struct CountedBody {
    inner: UnsyncBoxBody<Bytes, Status>,
    account: Account,
    heads: Heads,
    /// What came and has to wait for room.
    waiting: Option<(Frame<Bytes>, Taking)>,
}

impl CountedBody {
    fn new(body: Body, account: Account) -> Self {
        Self {
            inner: body.boxed_unsync(),
            account,
            heads: Heads::default(),
            waiting: None,
        }
    }
}

impl hyper::body::Body for CountedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.waiting.is_none() {
            let frame = match ready!(Pin::new(&mut this.inner).poll_frame(context)) {
                Some(Ok(frame)) => frame,
                other => return Poll::Ready(other),
            };
            let largest = frame.data_ref().and_then(|data| this.heads.read(data));
            let Some(largest) = largest else {
                return Poll::Ready(Some(Ok(frame)));
            };
            // The message before was taken over by whoever reads this one.
            this.account.held.set(None);
            if largest <= SMALL_BYTES {
                return Poll::Ready(Some(Ok(frame)));
            }
            let (budgets, user) = (Arc::clone(&this.account.budgets), this.account.user.clone());
            let taking = Box::pin(async move { budgets.take(user, largest).await });
            this.waiting = Some((frame, taking));
        }
        if let Some((_, taking)) = &mut this.waiting {
            let spent = ready!(taking.as_mut().poll(context));
            this.account.held.set(Some(spent));
        }
        let frame = this.waiting.take().map(|(frame, _)| Ok(frame));
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.waiting.is_none() && self.inner.is_end_stream()
    }
}

/// Finds the heads of messages in a stream that comes in pieces.
#[derive(Debug, Default)]
struct Heads {
    head: Vec<u8>,
    /// Bytes of the message that are still to come.
    rest: usize,
}

impl Heads {
    /// The length of the largest message that begins in this piece, if one does.
    fn read(&mut self, mut piece: &[u8]) -> Option<usize> {
        let mut largest = None;
        while !piece.is_empty() {
            if self.rest > 0 {
                let taken = self.rest.min(piece.len());
                self.rest -= taken;
                piece = piece.get(taken..).unwrap_or_default();
                continue;
            }
            let missing = HEAD_BYTES - self.head.len();
            let (begin, after) = piece.split_at(missing.min(piece.len()));
            self.head.extend_from_slice(begin);
            piece = after;
            if let [_, length @ ..] = self.head.as_slice()
                && let Ok(length) = <[u8; 4]>::try_from(length)
            {
                self.rest = u32::from_be_bytes(length) as usize;
                self.head.clear();
                largest = largest.max(Some(self.rest));
            }
        }
        largest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend_from_slice(&u32::try_from(length).unwrap_or_default().to_be_bytes());
        bytes.resize(HEAD_BYTES + length, b'x');
        bytes
    }

    #[test]
    fn heads_are_found_wherever_the_stream_is_cut() {
        let lengths = [3, 0, 700, 12];
        let stream: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
        for size in 1..40 {
            let mut heads = Heads::default();
            let found = stream.chunks(size).filter_map(|piece| heads.read(piece));
            assert_eq!(found.max(), Some(700), "pieces of {size}");
            assert_eq!((heads.rest, heads.head.len()), (0, 0));
        }
        let mut heads = Heads::default();
        assert_eq!(heads.read(&stream), Some(700));
        assert_eq!(heads.read(&message(0)), Some(0));
    }
}
