//! One WebSocket: one task that reads frames and writes frames.
//!
//! Nothing is queued for a slow client. A submission is followed by a stream over the journal,
//! polled only when the socket takes the next frame, so a client that never reads costs the memory
//! of one frame, and the submission runs on regardless.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, SelectAll, SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt, future};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError};
use tokio_tungstenite::tungstenite::protocol::frame::Frame as WsFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{CloseCode, Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, Role};
use tokio_tungstenite::tungstenite::{Bytes, Utf8Bytes};

use super::Edge;
use super::connections::Taken;
use super::peers::{Found, Peer, Settled};
use super::wire::{self, Frame};
use crate::auth::Caller;
use crate::budget::Spent;
use crate::journal::{Item, JournalError};
use crate::model::{
    Event, FieldError, MAX_MESSAGE_BYTES, Outcome, Problem, SubmissionId, SubmissionRequest, UserId,
};
use crate::pipeline::{Admission, Refusal};
use crate::websocket;

/// Between pings: shorter than the 60 s after which common proxies drop an idle connection.
const PING_EVERY: Duration = Duration::from_secs(30);

/// Nothing heard for this long: two pings went unanswered, the peer is gone.
const DEAD_AFTER: Duration = Duration::from_secs(75);

/// A frame that the client does not take for this long ends the connection. A page that is
/// suspended for a moment recovers within it, and resumes if it does not.
const WRITE_STALL: Duration = Duration::from_secs(30);

/// What the slowest client worth waiting for takes per second, on top of [`WRITE_STALL`].
const SLOWEST_BYTES_PER_SECOND: usize = 64 << 10;

/// How long the close frame gets to reach the client.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(2);

/// Bytes still read after a close frame was sent, so that the client sees it: closing with unread
/// bytes resets the connection, and a reset overtakes what was sent. A few messages' worth.
const GOODBYE_BYTES: u64 = 8 << 20;

/// Read buffer of one socket: a common submission fits, and 10,000 idle sockets stay small.
const READ_BUFFER: usize = 4 << 10;

/// Submissions one connection may follow at a time.
const MAX_IN_FLIGHT: usize = 1_000;

/// Submissions of one user that all connections together may follow at a time, or as many as one may have
/// under way: each is woken by every record, so many of one user's would delay everybody's.
pub const FOLLOWED_PER_USER: usize = 1_000;

/// What messages that have not come whole may take of the memory, of all WebSockets of a key: sixteen of the
/// largest at one time.
pub const MAX_UNFINISHED_BYTES: u32 = 16 * UNFINISHED_BYTES as u32;

/// What one of them may take: what came of it, and as much again where fragments are put together.
const UNFINISHED_BYTES: usize = 2 * MAX_MESSAGE_BYTES;

/// A message that is not longer takes nothing of that: most submissions, and with as many WebSockets as a key
/// may have some 4 MiB.
const SMALL_MESSAGE: usize = 16 << 10;

/// How long a longer one may take to come whole: at half the speed of the slowest client that is waited for.
/// It is looked at with each ping.
const UNFINISHED_PATIENCE: Duration =
    Duration::from_secs((2 * MAX_MESSAGE_BYTES / SLOWEST_BYTES_PER_SECOND) as u64);

/// The head of a frame that controls the connection, as a client sends it.
const CONTROL_HEAD: usize = 6;

/// What may wait between reading and writing; a full one pauses reading.
const COMMANDS: usize = 8;

type Io = TokioIo<hyper::upgrade::Upgraded>;
type Socket = WebSocketStream<Bounded>;
type Frames = BoxStream<'static, Outgoing>;
type Pieces = BoxStream<'static, Result<Vec<u8>, JournalError>>;

/// A message to the client.
enum Outgoing {
    Text(Utf8Bytes),
    /// One too large to be held whole: each piece becomes a fragment.
    Pieces(Pieces),
}

/// What the reading side asks of the writing side.
enum Command {
    Send(Utf8Bytes),
    Follow(Frames),
}

/// Why a connection ends.
#[derive(Debug)]
enum End {
    /// The client closed it, or the network did.
    Gone,
    /// The client does not take what is sent, or does not answer.
    Dead(&'static str),
    /// The client must be told why.
    Close(CloseCode, &'static str),
}

/// Speaks the protocol until one side ends it. `passed`: another replica passes its client's frames on.
pub async fn run(edge: Arc<Edge>, caller: Caller, passed: bool, io: hyper::upgrade::Upgraded) {
    let config = websocket::config(MAX_MESSAGE_BYTES).read_buffer_size(READ_BUFFER);
    let message = Arc::new(Unfinished::default());
    let bounded = Bounded {
        io: TokioIo::new(io),
        edge: Arc::clone(&edge),
        key_id: caller.key_id.clone(),
        message: Arc::clone(&message),
        waits: None,
    };
    let socket = WebSocketStream::from_raw_socket(bounded, Role::Server, Some(config)).await;
    let (mut sink, mut source) = socket.split();
    let open = metrics::gauge!("gantry_websocket_connections");
    open.increment(1.0);
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let shared = Shared {
        started: Instant::now(),
        heard_ms: AtomicU64::new(0),
        in_flight: Arc::default(),
        relay_ended: Notify::new(),
        pinged: Notify::new(),
        message,
    };
    let shared = Arc::new(shared);
    let key_id = caller.key_id.clone();
    let reader = Reader {
        edge: &edge,
        caller,
        passed,
        refused: false,
        commands,
        shared: Arc::clone(&shared),
        relays: HashMap::new(),
    };
    let end = tokio::select! {
        end = reader.run(&mut source) => end,
        end = write(&mut sink, inbox, &shared) => end,
        () = shared.relay_ended.notified() => End::Close(CloseCode::Restart, "another replica that answered here has ended; connect again and resume"),
        () = revoked(&edge, &key_id) => End::Close(CloseCode::Policy, "the key was revoked"),
        () = edge.shutdown.token.cancelled() => End::Close(CloseCode::Away, "the server is stopping"),
    };
    open.decrement(1.0);
    goodbye(sink, source, end).await;
}

/// Resolves when the key no longer counts.
pub async fn revoked(edge: &Edge, key_id: &str) {
    let mut changes = edge.keys.changes();
    while edge.keys.caller(key_id).is_some() {
        if changes.changed().await.is_err() {
            future::pending::<()>().await;
        }
    }
}

async fn goodbye(mut sink: SplitSink<Socket, Message>, source: SplitStream<Socket>, end: End) {
    let frame = match end {
        End::Dead(why) => {
            tracing::debug!(why, "a WebSocket was dropped");
            return;
        }
        End::Gone => None,
        End::Close(code, reason) => Some(CloseFrame {
            code,
            reason: Utf8Bytes::from_static(reason),
        }),
    };
    let told = async {
        if let Some(frame) = frame {
            sink.send(Message::Close(Some(frame))).await?;
        }
        sink.flush().await
    };
    if !matches!(timeout(GOODBYE_TIMEOUT, told).await, Ok(Ok(()))) {
        return;
    }
    let Ok(mut socket) = sink.reunite(source) else {
        return;
    };
    let io = &mut socket.get_mut().io;
    let drained = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(GOODBYE_BYTES), &mut tokio::io::sink()).await
    };
    // The client is free to hang up first; either way the connection is over.
    let _ = timeout(GOODBYE_TIMEOUT, drained).await;
}

/// What both sides of one connection know.
struct Shared {
    started: Instant,
    heard_ms: AtomicU64,
    in_flight: Arc<AtomicUsize>,
    /// Another replica no longer answers for what this client follows there.
    relay_ended: Notify,
    /// What came of the message that is under way.
    message: Arc<Unfinished>,
    /// The client sent a ping, whose answer has to be taken as everything else that is sent.
    pinged: Notify,
}

/// The place of one followed submission on its connection and among its user's, until it is dropped.
struct Place {
    in_flight: Arc<AtomicUsize>,
    _of_user: Taken<UserId>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    fn heard_now(&self) {
        let elapsed = self.started.elapsed().as_millis();
        let elapsed = u64::try_from(elapsed).unwrap_or(u64::MAX);
        self.heard_ms.store(elapsed, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        let heard = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(heard)
    }
}

/// What came of the message that is under way, and what it takes of its key's memory for those.
#[derive(Default)]
struct Unfinished {
    bytes: AtomicUsize,
    /// And since when it has been coming with that, as long as it is.
    spent: Mutex<Option<(Spent, Option<Instant>)>>,
}

impl Unfinished {
    fn spent(&self) -> std::sync::MutexGuard<'_, Option<(Spent, Option<Instant>)>> {
        self.spent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether more of it has to be paid for first.
    fn must_pay(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) >= SMALL_MESSAGE && self.spent().is_none()
    }

    /// Whether it takes so long that others of its key wait for it.
    fn is_late(&self) -> bool {
        let since = self.spent().as_ref().and_then(|(_, since)| *since);
        since.is_some_and(|since| since.elapsed() > UNFINISHED_PATIENCE)
    }

    /// It has come.
    fn whole(&self) {
        if let Some((_, since)) = &mut *self.spent() {
            *since = None;
        }
    }

    /// Nothing is left of it.
    fn done(&self) {
        self.bytes.store(0, Ordering::Relaxed);
        *self.spent() = None;
    }

    /// So many bytes were something else's.
    fn less(&self, bytes: usize) {
        let left = self.bytes.load(Ordering::Relaxed).saturating_sub(bytes);
        self.bytes.store(left, Ordering::Relaxed);
    }
}

/// A client's connection. No more of a long message is read than its key has memory for.
struct Bounded {
    io: Io,
    edge: Arc<Edge>,
    key_id: String,
    message: Arc<Unfinished>,
    waits: Option<BoxFuture<'static, Spent>>,
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.message.must_pay() {
            let (edge, key_id) = (&this.edge, &this.key_id);
            let waits = this.waits.get_or_insert_with(|| {
                let (edge, key_id) = (Arc::clone(edge), key_id.clone());
                Box::pin(async move { edge.unfinished.take(key_id, UNFINISHED_BYTES).await })
            });
            let spent = ready!(waits.as_mut().poll(context));
            this.waits = None;
            *this.message.spent() = Some((spent, Some(Instant::now())));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut this.io).poll_read(context, buffer);
        let came = buffer.filled().len() - before;
        this.message.bytes.fetch_add(came, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

async fn write(
    sink: &mut SplitSink<Socket, Message>,
    mut inbox: mpsc::Receiver<Command>,
    shared: &Shared,
) -> End {
    let mut followed: SelectAll<Frames> = SelectAll::new();
    let mut ping = tokio::time::interval_at(Instant::now() + PING_EVERY, PING_EVERY);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let message = tokio::select! {
            Some(frame) = followed.next(), if !followed.is_empty() => match frame {
                Outgoing::Text(text) => Message::Text(text),
                Outgoing::Pieces(pieces) => match send_pieces(sink, pieces).await {
                    Ok(()) => continue,
                    Err(end) => return end,
                },
            },
            command = inbox.recv() => match command {
                Some(Command::Send(frame)) => Message::Text(frame),
                Some(Command::Follow(frames)) => {
                    followed.push(frames);
                    continue;
                }
                None => return End::Gone,
            },
            () = shared.pinged.notified() => match timeout(WRITE_STALL, sink.flush()).await {
                Ok(Ok(())) => continue,
                Ok(Err(_)) => return End::Gone,
                Err(_) => return End::Dead("it did not take the answers to its pings"),
            },
            _ = ping.tick() => {
                if shared.silence() > DEAD_AFTER {
                    return End::Dead("it answered no ping");
                }
                if shared.message.is_late() {
                    return End::Close(CloseCode::Policy, "a message has to come whole within a minute");
                }
                Message::Ping(Bytes::new())
            }
        };
        if let Err(end) = send(sink, message).await {
            return end;
        }
    }
}

async fn send(sink: &mut SplitSink<Socket, Message>, message: Message) -> Result<(), End> {
    for frame in websocket::frames(message) {
        let length = frame.len();
        let allowed = WRITE_STALL + Duration::from_secs((length / SLOWEST_BYTES_PER_SECOND) as u64);
        match timeout(allowed, sink.send(frame)).await {
            Ok(Ok(())) => {}
            // The answers to its pings fill what may wait.
            Ok(Err(WsError::WriteBufferFull(_))) | Err(_) => {
                return Err(End::Dead("it did not take what was sent"));
            }
            Ok(Err(_)) => return Err(End::Gone),
        }
    }
    Ok(())
}

/// Sends one text message in fragments: the next piece is read when the client has taken the one
/// before.
async fn send_pieces(sink: &mut SplitSink<Socket, Message>, mut pieces: Pieces) -> Result<(), End> {
    let mut kind = Data::Text;
    let mut next = pieces.next().await;
    while let Some(piece) = next {
        let piece = piece.map_err(|error| {
            tracing::error!(%error, "a reply breaks off");
            End::Close(CloseCode::Error, "the reply cannot be read")
        })?;
        next = pieces.next().await;
        let fragment = WsFrame::message(piece, OpCode::Data(kind), next.is_none());
        send(sink, Message::Frame(fragment)).await?;
        kind = Data::Continue;
    }
    Ok(())
}

struct Reader<'a> {
    edge: &'a Arc<Edge>,
    caller: Caller,
    passed: bool,
    /// Whether the last message was answered with an error, or was about nothing that is here.
    refused: bool,
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    /// Connections to other replicas, by address.
    relays: HashMap<String, SplitSink<WebSocketStream<TcpStream>, Message>>,
}

impl Reader<'_> {
    async fn run(mut self, source: &mut SplitStream<Socket>) -> End {
        loop {
            let message = match source.next().await {
                Some(Ok(message)) => message,
                Some(Err(error)) => return end_of(&error),
                None => return End::Gone,
            };
            self.shared.heard_now();
            match message {
                Message::Text(text) => {
                    let bytes = text.len();
                    self.shared.message.whole();
                    // Boxed: an idle connection must not carry the room this needs.
                    if Box::pin(self.frame(text)).await.is_err() {
                        return End::Gone;
                    }
                    self.shared.message.done();
                    self.rest(bytes).await;
                }
                Message::Binary(_) => {
                    let refused = wire::Refused {
                        submission_id: None,
                        user_id: None,
                        error: FieldError::new("", "is a binary frame"),
                    };
                    if self.reply(&wire::invalid(&refused)).await.is_err() {
                        return End::Gone;
                    }
                    self.shared.message.done();
                }
                // Pings are answered by the protocol layer; a close ends the stream after its echo.
                Message::Ping(data) => {
                    self.shared.message.less(data.len() + CONTROL_HEAD);
                    self.shared.pinged.notify_one();
                }
                Message::Pong(data) => self.shared.message.less(data.len() + CONTROL_HEAD),
                Message::Close(_) | Message::Frame(_) => {}
            }
        }
    }

    /// Waits after a message if its key sends more, or more that is refused, than others can afford.
    async fn rest(&mut self, bytes: usize) {
        let refused = std::mem::take(&mut self.refused);
        let rates = &self.edge.rates;
        while let Err(too_many) = rates.message(&self.caller.key_id, bytes, refused) {
            tokio::time::sleep(too_many.retry_after).await;
        }
    }

    async fn frame(&mut self, text: Utf8Bytes) -> Result<(), Gone> {
        let frame = wire::parse(&text);
        // What may have to be passed on.
        let text = self.edge.peers.any().then_some(text);
        match frame {
            Err(refused) => self.reply(&wire::invalid(&refused)).await,
            Ok(Frame::Submission(request)) => self.submission(*request, text).await,
            Ok(Frame::Resume(resume)) => match self.visible(resume.id) {
                None => self.elsewhere(resume.id, text).await,
                Some(known) => {
                    // A client that has it all still gets the reply: it may have missed it.
                    let last = if known.ended {
                        known.last_seq.saturating_sub(1)
                    } else {
                        known.last_seq
                    };
                    let after = resume.after.min(last);
                    match self.place(&known.user_id) {
                        Ok(place) => self.follow(resume.id, place, after, true).await,
                        Err(full) => self.reply(&full.told(Some(resume.id))).await,
                    }
                }
            },
            Ok(Frame::Cancel(cancel)) => match self.visible(cancel.id) {
                None => self.elsewhere(cancel.id, text).await,
                Some(_) => {
                    // One that has ended stays as it ended; its reply is on its way or was read.
                    self.edge.pipeline.cancel(cancel.id).await;
                    Ok(())
                }
            },
            Ok(Frame::Stdin(stdin)) => self.stdin(stdin, text).await,
        }
    }

    async fn submission(
        &mut self,
        request: SubmissionRequest,
        text: Option<Utf8Bytes>,
    ) -> Result<(), Gone> {
        let user = request.user_id().clone();
        let id = request.submission_id();
        let stream = request.stream();
        let refuse = |field: &str, reason: &str| {
            wire::invalid(&wire::Refused {
                submission_id: id,
                user_id: Some(user.clone()),
                error: FieldError::new(field, reason),
            })
        };
        if !self.caller.may_act_for(&user) {
            let outcome = refuse("user_id", "is not one this key may act for");
            return self.reply(&outcome).await;
        }
        let place = match self.place(&user) {
            Ok(place) => place,
            Err(full) => return self.reply(&full.told(id)).await,
        };
        if let Some(known) = id.and_then(|id| self.edge.journal.submission(id))
            && known.user_id != user
        {
            return self
                .reply(&refuse("submission_id", "is reserved; choose another"))
                .await;
        }
        let submission = match request.validate(self.edge.pipeline.maximum_limits()) {
            Ok(submission) => submission,
            Err(error) => {
                let outcome = refuse(&error.field, &error.reason);
                return self.reply(&outcome).await;
            }
        };
        let settled = match id {
            Some(id) if !self.passed && self.edge.journal.submission(id).is_none() => {
                self.edge.peers.settle(id).await
            }
            _ => Settled::Here(None),
        };
        let id = submission.id;
        // Held until the journal knows it.
        let _claim = match settled {
            Settled::Here(claim) => claim,
            Settled::There(peer) => return self.pass_on(id, &peer, text).await,
            Settled::Unknown => {
                let unknown = self.edge.peers.unknown();
                let outcome = wire::unavailable(Some(id), Some(&user), unknown);
                return self.reply(&outcome).await;
            }
        };
        match self
            .edge
            .pipeline
            .submit(submission, &self.caller.key_id)
            .await
        {
            Ok(Admission::Accepted(id) | Admission::Known(id)) => {
                self.follow(id, place, 0, stream).await
            }
            Err(Refusal::Invalid(error)) => {
                let outcome = refuse(&error.field, &error.reason);
                self.reply(&outcome).await
            }
            Err(Refusal::Unavailable(problem)) => {
                let outcome = wire::unavailable(Some(id), Some(&user), problem);
                self.reply(&outcome).await
            }
        }
    }

    /// A frame about a submission that is not here, or not this caller's.
    async fn elsewhere(&mut self, id: SubmissionId, text: Option<Utf8Bytes>) -> Result<(), Gone> {
        let peers = &self.edge.peers;
        if self.passed || !peers.any() || self.edge.journal.submission(id).is_some() {
            return self.reply(&wire::not_found(id)).await;
        }
        match peers.find(id).await {
            Found::At(peer) => self.pass_on(id, &peer, text).await,
            Found::Nowhere => self.reply(&wire::not_found(id)).await,
            Found::Unknown => {
                let outcome = wire::unavailable(Some(id), None, peers.unknown());
                self.reply(&outcome).await
            }
        }
    }

    /// Has another replica answer a frame of this client's.
    async fn pass_on(
        &mut self,
        id: SubmissionId,
        peer: &Peer,
        text: Option<Utf8Bytes>,
    ) -> Result<(), Gone> {
        let address = peer.address();
        if !self.relays.contains_key(address) {
            let key_id = &self.caller.key_id;
            match self.edge.peers.connect(peer, key_id).await {
                Ok(socket) => {
                    let (sink, source) = socket.split();
                    self.relays.insert(address.to_owned(), sink);
                    let frames = relayed(source, Arc::clone(&self.shared));
                    let follow = Command::Follow(frames);
                    self.commands.send(follow).await.map_err(|_| Gone)?;
                }
                Err(error) => {
                    tracing::warn!(peer = address, %error, "another replica cannot be connected to");
                    let outcome = wire::unavailable(Some(id), None, self.edge.peers.unknown());
                    return self.reply(&outcome).await;
                }
            }
        }
        let (Some(sink), Some(text)) = (self.relays.get_mut(address), text) else {
            return Ok(());
        };
        match timeout(WRITE_STALL, sink.send(Message::Text(text))).await {
            Ok(Ok(())) => Ok(()),
            // Its stream has ended as well, and the client is told so.
            _ => {
                self.shared.relay_ended.notify_one();
                Ok(())
            }
        }
    }

    async fn stdin(&mut self, stdin: wire::Stdin, text: Option<Utf8Bytes>) -> Result<(), Gone> {
        let Some(known) = self.visible(stdin.id) else {
            return self.elsewhere(stdin.id, text).await;
        };
        if known.ended {
            return Ok(());
        }
        let pipeline = &self.edge.pipeline;
        let taken = pipeline.stdin(stdin.id, &stdin.data, stdin.offset, stdin.eof);
        match taken.await {
            Ok(None) => Ok(()),
            Ok(Some(received)) => self.send(wire::stdin_received(stdin.id, received)).await,
            Err(problem) => self.send(wire::stdin_refused(stdin.id, &problem)).await,
        }
    }

    /// What the journal knows of a submission, if it exists for this caller.
    fn visible(&self, id: SubmissionId) -> Option<crate::journal::SubmissionState> {
        let known = self.edge.journal.submission(id)?;
        self.caller.sees(&known.user_id).then_some(known)
    }

    /// A place to follow one more submission of this user's.
    fn place(&self, user: &UserId) -> Result<Place, Full> {
        let in_flight = &self.shared.in_flight;
        if in_flight.load(Ordering::Relaxed) >= MAX_IN_FLIGHT {
            return Err(Full::Connection);
        }
        let of_user = self.edge.followed.take(user).ok_or(Full::User)?;
        in_flight.fetch_add(1, Ordering::Relaxed);
        Ok(Place {
            in_flight: Arc::clone(in_flight),
            _of_user: of_user,
        })
    }

    async fn follow(
        &mut self,
        id: SubmissionId,
        place: Place,
        after: u64,
        events: bool,
    ) -> Result<(), Gone> {
        let records = self.edge.journal.follow_submission(id, after);
        let frames = records
            .filter_map(move |record| {
                // Given back with the stream, which ends behind the reply.
                let _held = &place;
                future::ready(outgoing(id, record, events))
            })
            .boxed();
        self.commands
            .send(Command::Follow(frames))
            .await
            .map_err(|_| Gone)
    }

    async fn reply(&mut self, outcome: &Outcome) -> Result<(), Gone> {
        self.refused = true;
        self.send(wire::text(outcome)).await
    }

    async fn send(&mut self, text: String) -> Result<(), Gone> {
        self.commands
            .send(Command::Send(text.into()))
            .await
            .map_err(|_| Gone)
    }
}

/// The writing side has ended.
struct Gone;

/// The frames that another replica sends for this client. Its end ends this connection: the client
/// resumes, and is told whether what it followed there can be known.
fn relayed(source: SplitStream<WebSocketStream<TcpStream>>, shared: Arc<Shared>) -> Frames {
    let texts = source.filter_map(|message| {
        future::ready(match message {
            Ok(Message::Text(text)) => Some(Outgoing::Text(text)),
            _ => None,
        })
    });
    let end = futures_util::stream::once(async move { shared.relay_ended.notify_one() });
    texts
        .chain(end.filter_map(|()| future::ready(None)))
        .boxed()
}

/// The frame a record becomes, if the client wants it.
fn outgoing(id: SubmissionId, item: Result<Item, JournalError>, events: bool) -> Option<Outgoing> {
    let text = |text: String| Some(Outgoing::Text(text.into()));
    match item {
        Ok(Item::Large(reply)) => Some(Outgoing::Pieces(reply.pieces().boxed())),
        Ok(Item::Record(record)) if matches!(record.event, Event::Reply(_)) => {
            text(wire::text(&wire::reply(*record)?))
        }
        Ok(Item::Record(record)) if events => text(wire::text(&wire::event_frame(&record)?)),
        Ok(Item::Record(_)) => None,
        Err(gone @ JournalError::Gone { .. }) => {
            let problem = wire::gone_problem(id, &gone);
            text(wire::text(&wire::unavailable(Some(id), None, problem)))
        }
        // The server is stopping: the socket says so, and the client resumes.
        Err(JournalError::Closed) => None,
        Err(error) => {
            tracing::error!(submission_id = %id, %error, "a submission cannot be followed");
            let problem = Problem::new(
                "journal_failed",
                "The outcome cannot be read",
                error.told(),
                "Send {\"resume\": submission_id} again; the submission itself is not affected",
            );
            text(wire::text(&wire::unavailable(Some(id), None, problem)))
        }
    }
}

/// Why no more submissions can be followed.
enum Full {
    Connection,
    User,
}

impl Full {
    fn told(&self, id: Option<SubmissionId>) -> Outcome {
        let problem = match self {
            Self::Connection => Problem::new(
                "too_many_in_flight",
                "Too many submissions are in flight on this connection",
                format!("one connection follows at most {MAX_IN_FLIGHT} at a time"),
                "Wait for replies, or open another connection; the server did nothing with this message",
            ),
            Self::User => Problem::new(
                "too_many_in_flight",
                "Too many submissions of this user are in flight",
                format!(
                    "all connections together follow at most {FOLLOWED_PER_USER} of one user at a time, \
                     or GANTRY_MAX_WAITING where that is more"
                ),
                "Wait for replies, then send it again; the server did nothing with this message",
            ),
        };
        wire::unavailable(id, None, problem)
    }
}

fn end_of(error: &WsError) -> End {
    match error {
        WsError::Capacity(CapacityError::MessageTooLong { .. }) => {
            End::Close(CloseCode::Size, "a message may hold 1 MiB")
        }
        WsError::Utf8(_) => End::Close(CloseCode::Invalid, "a text frame is not UTF-8"),
        WsError::Protocol(_) => End::Close(CloseCode::Protocol, "not the WebSocket protocol"),
        _ => End::Gone,
    }
}
