//! The server's end of a line out of a sandbox: an installer asks it for a package index, as it would ask an HTTP
//! proxy, and is joined to that index or refused.
//!
//! The code that asks is a user's. A tunnel therefore carries TLS to the host it was opened for and nothing else, a
//! plain request reads and cannot write, and what one user moves is bounded.

use std::collections::{BTreeSet, HashMap};
use std::io::Cursor;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustls::server::Acceptor;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::ByteStream;
use crate::model::{Place, package_place};
use crate::runner::wire::{FromRunner, JobId, ToRunner, VERSION, frames, raw};

/// Longest head of a request to a proxy: installers send a few hundred bytes.
const MOST_HEAD: usize = 8 << 10;

/// Longest ClientHello, record headers included. One with post-quantum key shares has under 2 KiB; RFC 8446 lets a
/// record have 16 KiB.
const MOST_HELLO: usize = 16 << 10;

/// Longest wait for an installer's request on a new connection, for its ClientHello, and for an index to answer.
const REQUEST_PATIENCE: Duration = Duration::from_secs(20);

/// A connection on which nothing moves for this long is closed: an index that answers this late is down. An
/// installation has three times as long, unless the operator says otherwise.
const IDLE: Duration = Duration::from_secs(60);

/// Longest life of a connection: the longest installation that an operator may allow.
const LONGEST: Duration = Duration::from_secs(1_800);

/// How often a connection is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Longest wait for a runner's greeting: it has nothing to do before it.
const GREETING: Duration = Duration::from_secs(5);

/// Connections of one user at one time, in all sandboxes: six for each of four installations.
const MOST_CONNECTIONS: usize = 24;

/// Bytes that one user may move within [`WINDOW`]: several installations of the largest packages there are.
const MOST_BYTES: u64 = 8 << 30;

/// Bytes that one connection may send to an index. Requests are small; this is no way to carry data out.
const MOST_SENT: u64 = 4 << 20;

/// How long moved bytes count.
const WINDOW: Duration = Duration::from_secs(3_600);

/// Bytes that are passed on at once.
const PIECE: usize = 16 << 10;

/// What each user has moved and has open.
#[derive(Debug, Default)]
pub struct Meters(Mutex<HashMap<String, Meter>>);

#[derive(Debug)]
struct Meter {
    open: usize,
    bytes: u64,
    since: Instant,
}

impl Meters {
    /// A place for one more connection of this user's, until it is dropped; `None`: they have all they may have.
    fn enter(self: &Arc<Self>, user: &str) -> Option<Metered> {
        let mut meters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that say nothing any more.
        meters.retain(|_, meter| meter.open > 0 || meter.since.elapsed() < WINDOW);
        let meter = meters.entry(user.to_owned()).or_insert_with(|| Meter {
            open: 0,
            bytes: 0,
            since: Instant::now(),
        });
        meter.renew();
        if meter.open >= MOST_CONNECTIONS || meter.bytes >= MOST_BYTES {
            return None;
        }
        meter.open += 1;
        Some(Metered {
            meters: Arc::clone(self),
            user: user.to_owned(),
        })
    }
}

impl Meter {
    fn renew(&mut self) {
        if self.since.elapsed() >= WINDOW {
            (self.bytes, self.since) = (0, Instant::now());
        }
    }
}

/// One connection of a user's.
#[derive(Debug)]
struct Metered {
    meters: Arc<Meters>,
    user: String,
}

impl Metered {
    /// Counts bytes; an error: that is more than the user may move.
    fn count(&self, bytes: usize) -> anyhow::Result<()> {
        let mut meters = self.meters.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(meter) = meters.get_mut(&self.user) else {
            return Ok(());
        };
        meter.renew();
        meter.bytes += bytes as u64;
        anyhow::ensure!(
            meter.bytes <= MOST_BYTES,
            "{} has moved more than {MOST_BYTES} bytes within {} s",
            self.user,
            WINDOW.as_secs()
        );
        Ok(())
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        let mut meters = self.meters.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(meter) = meters.get_mut(&self.user) {
            meter.open = meter.open.saturating_sub(1);
        }
    }
}

/// Lends the job this connection to its runner, and returns when its program speaks on it: the line, and what came on
/// it already.
pub async fn taken(
    stream: Box<dyn ByteStream>,
    job: JobId,
) -> anyhow::Result<(Box<dyn ByteStream>, Vec<u8>)> {
    let (mut reader, mut writer) = frames(stream);
    writer.send(&ToRunner::Hello { version: VERSION }).await?;
    timeout(GREETING, reader.next::<FromRunner>()).await??;
    writer.send(&ToRunner::Lend { job }).await?;
    let taken = reader.next::<FromRunner>().await?;
    anyhow::ensure!(taken == FromRunner::Taken, "no line is wanted: {taken:?}");
    Ok(raw(reader, writer))
}

/// Where one installer may go, and on whose account.
#[derive(Debug)]
pub struct Tunnel {
    /// Whose connections these are.
    pub user: String,
    /// The indexes.
    pub places: BTreeSet<Place>,
    /// What everybody moves.
    pub meters: Arc<Meters>,
    trouble: Arc<Trouble>,
}

/// How an index failed, as far as it did not answer well since.
#[derive(Debug, Default)]
pub struct Trouble(Mutex<Option<String>>);

impl Trouble {
    /// In words.
    pub fn told(&self) -> Option<String> {
        let trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }

    fn note(&self, why: &str) {
        let mut trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(why.to_owned());
    }

    fn is_over(&self) {
        let mut trouble = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = None;
    }
}

/// An index that broke off, or said nothing.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct IndexFailed(String);

impl Tunnel {
    /// To these places.
    pub fn new(user: String, places: BTreeSet<Place>, meters: Arc<Meters>) -> Self {
        Self {
            user,
            places,
            meters,
            trouble: Arc::default(),
        }
    }

    /// Why an index could not be reached.
    pub fn trouble(&self) -> Arc<Trouble> {
        Arc::clone(&self.trouble)
    }

    /// One connection of the installer's, from its request to its end. `head` is what it has sent already.
    pub async fn carry(
        &self,
        mut installer: Box<dyn ByteStream>,
        mut head: Vec<u8>,
    ) -> anyhow::Result<()> {
        let asked = timeout(REQUEST_PATIENCE, read_head(&mut installer, &mut head)).await;
        asked.context("it asked for nothing")??;
        let request = match Request::parse(&head) {
            Ok(request) => request,
            Err((status, why)) => return refuse(&mut installer, status, why).await,
        };
        let (host, port) = &request.place;
        if !self.places.contains(&request.place) {
            let why = format!("{host}:{port} is no package index that the operator allows");
            return refuse(&mut installer, "403 Forbidden", &why).await;
        }
        let Some(metered) = self.meters.enter(&self.user) else {
            let why = format!(
                "a user may have {MOST_CONNECTIONS} connections to package indexes at one time and move {MOST_BYTES} bytes an hour"
            );
            return refuse(&mut installer, "429 Too Many Requests", &why).await;
        };
        let index = match reach(&request.place).await {
            Ok(index) => index,
            Err(why) => {
                self.trouble.note(&why);
                return refuse(&mut installer, "502 Bad Gateway", &why).await;
            }
        };
        index.set_nodelay(true)?;
        let carried = match request.head {
            Some(head) => answer_plain(installer, index, &head, &metered).await,
            None => {
                let beyond = end_of_head(&head).unwrap_or(head.len());
                join(installer, index, host, head.split_off(beyond), &metered).await
            }
        };
        match carried.as_ref().map_err(|error| error.downcast_ref()) {
            Ok(()) => self.trouble.is_over(),
            Err(Some(IndexFailed(why))) => self.trouble.note(&format!("{host}:{port} {why}")),
            // What the installer did says nothing of the index.
            Err(None) => {}
        }
        carried
    }
}

async fn read_head(installer: &mut Box<dyn ByteStream>, head: &mut Vec<u8>) -> anyhow::Result<()> {
    while end_of_head(head).is_none() {
        anyhow::ensure!(head.len() < MOST_HEAD, "its request has no end");
        anyhow::ensure!(installer.read_buf(head).await? > 0, "it hung up");
    }
    Ok(())
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(end + 4)
}

/// What an installer asks its proxy for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    place: Place,
    /// What to send there in its head's place; `None`: a tunnel, through which it speaks TLS itself.
    head: Option<Vec<u8>>,
}

/// An HTTP status, and why.
type Refused = (&'static str, &'static str);

const BAD: &str = "400 Bad Request";

/// Fields that are about one connection, or about a body that no request here has.
const HOP_FIELDS: [&str; 12] = [
    "connection",
    "proxy-connection",
    "proxy-authorization",
    "keep-alive",
    "te",
    "trailer",
    "upgrade",
    "expect",
    "http2-settings",
    "transfer-encoding",
    "content-length",
    "host",
];

impl Request {
    fn parse(bytes: &[u8]) -> Result<Self, Refused> {
        const NO_PROXY: Refused = (BAD, "this is no request to a proxy");
        let end = end_of_head(bytes).ok_or(NO_PROXY)?;
        let head = std::str::from_utf8(&bytes[..end]).map_err(|_| NO_PROXY)?;
        // What one reads as the end of a line another may not.
        let plain = |c: char| c == '\t' || (' '..='~').contains(&c);
        let mut lines = head.trim_end_matches("\r\n").split("\r\n");
        if !lines.clone().all(|line| line.chars().all(plain)) {
            return Err((BAD, "it has characters that no head has"));
        }
        let first: Vec<&str> = lines.next().unwrap_or_default().split(' ').collect();
        let &[method, target, version] = &first[..] else {
            return Err(NO_PROXY);
        };
        if !matches!(version, "HTTP/1.1" | "HTTP/1.0") {
            return Err(NO_PROXY);
        }
        let fields: Option<Vec<(&str, &str)>> = lines
            .map(|line| {
                let (name, value) = line.split_once(':')?;
                let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
                (!name.is_empty() && name.chars().all(token)).then(|| (name, value.trim()))
            })
            .collect();
        let fields = fields.ok_or((BAD, "one of its fields has no name"))?;
        if method == "CONNECT" {
            let place = package_place(target, 443).ok_or(NO_PROXY)?;
            return Ok(Self { place, head: None });
        }
        if !matches!(method, "GET" | "HEAD") {
            let why = "a package index is read, by GET and HEAD";
            return Err(("405 Method Not Allowed", why));
        }
        let rest = target.strip_prefix("http://").ok_or(NO_PROXY)?;
        let slash = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let place = package_place(authority, 80).ok_or(NO_PROXY)?;
        let named = |wanted: &str| {
            let fields = fields.iter();
            fields
                .filter(|(name, _)| name.eq_ignore_ascii_case(wanted))
                .map(|(_, value)| *value)
                .collect::<Vec<&str>>()
        };
        // A server of many names answers for the one in this field, whatever it was connected for.
        let host = named("host");
        if host.len() != 1 || package_place(host[0], 80).as_ref() != Some(&place) {
            return Err((BAD, "its Host is not the host that it asks for"));
        }
        let no_body = named("content-length").iter().all(|length| *length == "0");
        if !no_body || !named("transfer-encoding").is_empty() {
            return Err((BAD, "a request to a package index has no body"));
        }
        let slash = if path.starts_with('/') { "" } else { "/" };
        // One request on a connection: the next may be for somewhere else.
        let mut own = format!(
            "{method} {slash}{path} HTTP/1.1\r\nHost: {authority}\r\nConnection: close\r\n"
        );
        let hop = |name: &str| HOP_FIELDS.iter().any(|hop| name.eq_ignore_ascii_case(hop));
        for (name, value) in fields.iter().filter(|(name, _)| !hop(name)) {
            own.push_str(&format!("{name}: {value}\r\n"));
        }
        own.push_str("\r\n");
        Ok(Self {
            place,
            head: Some(own.into_bytes()),
        })
    }
}

async fn reach((host, port): &Place) -> Result<TcpStream, String> {
    let connected = timeout(REQUEST_PATIENCE, TcpStream::connect((host.as_str(), *port))).await;
    let why = match connected {
        Ok(Ok(index)) => return Ok(index),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer within {} s", REQUEST_PATIENCE.as_secs()),
    };
    Err(format!("{host}:{port} cannot be reached: {why}"))
}

/// One request, and its answer. Nothing that the installer sends after its request goes anywhere.
async fn answer_plain(
    mut installer: Box<dyn ByteStream>,
    mut index: TcpStream,
    head: &[u8],
    metered: &Metered,
) -> anyhow::Result<()> {
    index.write_all(head).await.map_err(broke_off)?;
    let moved = Moved::asked();
    let answer = Answer::to(head);
    let answering = from_index(&mut index, &mut installer, metered, &moved, answer);
    watched(answering, &moved).await
}

/// A tunnel, once its installer has shown that it speaks TLS to that host.
async fn join(
    mut installer: Box<dyn ByteStream>,
    mut index: TcpStream,
    host: &str,
    mut sent: Vec<u8>,
    metered: &Metered,
) -> anyhow::Result<()> {
    let joined = b"HTTP/1.1 200 Connection established\r\n\r\n";
    installer.write_all(joined).await?;
    installer.flush().await?;
    let greeted = timeout(REQUEST_PATIENCE, read_hello(&mut installer, &mut sent)).await;
    let name = greeted.context("it did not begin to speak TLS")??;
    is_for(host, name.as_deref())?;
    metered.count(sent.len())?;
    index.write_all(&sent).await.map_err(broke_off)?;
    let moved = Moved::asked();
    let (mut from_installer, mut to_installer) = tokio::io::split(installer);
    let (mut answers, mut to_index) = index.split();
    let both = async {
        tokio::try_join!(
            to_an_index(&mut from_installer, &mut to_index, metered, &moved),
            from_index(
                &mut answers,
                &mut to_installer,
                metered,
                &moved,
                Records::default()
            ),
        )
        .map(|_| ())
    };
    watched(both, &moved).await
}

/// Reads until the ClientHello is whole: the host that it names, if it names one.
async fn read_hello(
    installer: &mut Box<dyn ByteStream>,
    sent: &mut Vec<u8>,
) -> anyhow::Result<Option<String>> {
    loop {
        if let Some(named) = hello_name(sent)? {
            return Ok(named);
        }
        anyhow::ensure!(sent.len() < MOST_HELLO, "its ClientHello has no end");
        let mut piece = [0; 4 << 10];
        let read = installer.read(&mut piece).await?;
        anyhow::ensure!(read > 0, "it hung up");
        sent.extend_from_slice(&piece[..read]);
    }
}

/// The name in a ClientHello; `None`: it is not whole yet.
fn hello_name(sent: &[u8]) -> anyhow::Result<Option<Option<String>>> {
    let mut acceptor = Acceptor::default();
    let mut cursor = Cursor::new(sent);
    while cursor.position() < sent.len() as u64 {
        if acceptor.read_tls(&mut cursor)? == 0 {
            break;
        }
        match acceptor.accept() {
            Ok(Some(hello)) => {
                let name = hello.client_hello().server_name().map(str::to_owned);
                return Ok(Some(name));
            }
            Ok(None) => {}
            Err((error, _)) => anyhow::bail!("a tunnel carries TLS only: {error}"),
        }
    }
    Ok(None)
}

/// Whether a ClientHello that names this is for this host. An address is never named in one (RFC 6066).
fn is_for(host: &str, name: Option<&str>) -> anyhow::Result<()> {
    match name {
        Some(name) => {
            let same = name.trim_end_matches('.').eq_ignore_ascii_case(host);
            anyhow::ensure!(same, "its TLS is for {name}, the tunnel for {host}");
        }
        None => anyhow::ensure!(
            host.parse::<IpAddr>().is_ok(),
            "its TLS names no host, the tunnel is for {host}"
        ),
    }
    Ok(())
}

/// When something moved last, and whether the index was to answer then.
#[derive(Debug)]
struct Moved(Mutex<(Instant, bool)>);

impl Moved {
    fn asked() -> Self {
        Self(Mutex::new((Instant::now(), true)))
    }

    fn now(&self, asked: bool) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *last = (Instant::now(), asked);
    }

    fn last(&self) -> (Instant, bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn broke_off(error: std::io::Error) -> IndexFailed {
    IndexFailed(format!("broke the connection off: {error}"))
}

/// Tells whether what came of an index ended where it may.
trait Whole {
    fn add(&mut self, piece: &[u8]);
    fn is_whole(&self) -> bool;
}

/// One plain answer.
#[derive(Debug)]
struct Answer {
    /// The answer to this has no body.
    only_head: bool,
    head: Vec<u8>,
    /// How many bytes of the body came, once the head is whole.
    body: Option<u64>,
    /// The last bytes: a body in chunks ends with an empty one.
    last: Vec<u8>,
}

impl Answer {
    const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

    fn to(request: &[u8]) -> Self {
        Self {
            only_head: request.starts_with(b"HEAD "),
            head: Vec::new(),
            body: None,
            last: Vec::new(),
        }
    }

    fn field(&self, wanted: &str) -> Option<String> {
        let head = String::from_utf8_lossy(&self.head);
        let fields = head.lines().filter_map(|line| line.split_once(':'));
        let mut found = fields.filter(|(name, _)| name.trim().eq_ignore_ascii_case(wanted));
        let (_, value) = found.next()?;
        Some(value.trim().to_ascii_lowercase())
    }

    fn has_no_body(&self) -> bool {
        let status = self.head.get(9..12).unwrap_or_default();
        self.only_head || status.starts_with(b"1") || matches!(status, b"204" | b"304")
    }
}

impl Whole for Answer {
    fn add(&mut self, piece: &[u8]) {
        let body = match self.body {
            Some(_) => piece,
            None if self.head.len() > 2 * MOST_HEAD => return,
            None => {
                let before = self.head.len();
                self.head.extend_from_slice(piece);
                let Some(end) = end_of_head(&self.head) else {
                    return;
                };
                self.head.truncate(end);
                &piece[end - before..]
            }
        };
        self.body = Some(self.body.unwrap_or(0) + body.len() as u64);
        self.last.extend_from_slice(body);
        let more = self.last.len().saturating_sub(Self::LAST_CHUNK.len());
        self.last.drain(..more);
    }

    fn is_whole(&self) -> bool {
        let Some(body) = self.body else {
            // One with so long a head is the installer's to judge.
            return self.head.len() > 2 * MOST_HEAD;
        };
        if self.has_no_body() {
            return true;
        }
        match (
            self.field("transfer-encoding"),
            self.field("content-length"),
        ) {
            (Some(coding), _) if coding.ends_with("chunked") => self.last == Self::LAST_CHUNK,
            (None, Some(length)) => length.parse().is_ok_and(|length: u64| body >= length),
            _ => true,
        }
    }
}

/// TLS records (RFC 8446, 5.1), as far as their lengths say where they end.
#[derive(Debug, Default)]
struct Records {
    head: Vec<u8>,
    left: usize,
}

impl Whole for Records {
    fn add(&mut self, mut piece: &[u8]) {
        while let Some(first) = piece.first() {
            if self.left > 0 {
                let some = self.left.min(piece.len());
                self.left -= some;
                piece = &piece[some..];
                continue;
            }
            self.head.push(*first);
            piece = &piece[1..];
            if let &[_, _, _, high, low] = &self.head[..] {
                self.left = usize::from(u16::from_be_bytes([high, low]));
                self.head.clear();
            }
        }
    }

    fn is_whole(&self) -> bool {
        self.head.is_empty() && self.left == 0
    }
}

/// Passes on what an index answers, to its end.
async fn from_index(
    index: &mut (impl AsyncRead + Unpin),
    installer: &mut (impl AsyncWrite + Unpin),
    metered: &Metered,
    moved: &Moved,
    mut whole: impl Whole,
) -> anyhow::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut answered = false;
    loop {
        let read = index.read(&mut piece).await.map_err(broke_off)?;
        if read == 0 {
            installer.shutdown().await?;
            let why = "closed the connection without an answer";
            anyhow::ensure!(answered, IndexFailed(why.to_owned()));
            // Not every installer notices: pip takes what it has of a page for all of it.
            let why = "broke off in the middle of an answer";
            anyhow::ensure!(whole.is_whole(), IndexFailed(why.to_owned()));
            return Ok(());
        }
        answered = true;
        whole.add(&piece[..read]);
        metered.count(read)?;
        installer.write_all(&piece[..read]).await?;
        installer.flush().await?;
        moved.now(false);
    }
}

/// Passes on what an installer asks, to its end.
async fn to_an_index(
    installer: &mut (impl AsyncRead + Unpin),
    index: &mut (impl AsyncWrite + Unpin),
    metered: &Metered,
    moved: &Moved,
) -> anyhow::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut all = 0;
    loop {
        let read = installer.read(&mut piece).await?;
        if read == 0 {
            index.shutdown().await.map_err(broke_off)?;
            return Ok(());
        }
        all += read as u64;
        anyhow::ensure!(all <= MOST_SENT, "it sent more than {MOST_SENT} bytes");
        metered.count(read)?;
        index.write_all(&piece[..read]).await.map_err(broke_off)?;
        index.flush().await.map_err(broke_off)?;
        moved.now(true);
    }
}

/// Ends a connection that lives too long or on which nothing moves.
async fn watched(
    carried: impl Future<Output = anyhow::Result<()>>,
    moved: &Moved,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    let idle = async {
        loop {
            sleep(LOOK_EVERY).await;
            let (last, asked) = moved.last();
            if last.elapsed() > IDLE || begun.elapsed() > LONGEST {
                return asked;
            }
        }
    };
    let asked = tokio::select! {
        ended = carried => return ended,
        asked = idle => asked,
    };
    let why = format!(
        "said nothing for {} s, or its answer took {} s",
        IDLE.as_secs(),
        LONGEST.as_secs()
    );
    anyhow::ensure!(!asked, IndexFailed(why));
    anyhow::bail!(
        "nothing moved for {} s, or it was open for {} s",
        IDLE.as_secs(),
        LONGEST.as_secs()
    )
}

async fn refuse(
    installer: &mut Box<dyn ByteStream>,
    status: &str,
    why: &str,
) -> anyhow::Result<()> {
    let length = why.len() + 1;
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{why}\n"
    );
    installer.write_all(answer.as_bytes()).await?;
    installer.shutdown().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::net::TcpListener;

    fn parse(text: &str) -> Result<Request, Refused> {
        Request::parse(text.as_bytes())
    }

    #[test]
    fn requests_are_for_the_place_they_name() {
        let tunnel = parse("CONNECT PyPI.org:443 HTTP/1.1\r\nHost: other\r\n\r\nrest").unwrap();
        assert_eq!(tunnel.place, ("pypi.org".to_owned(), 443));
        assert_eq!(tunnel.head, None);
        let plain = parse(
            "GET http://index:8080/simple/?a=b HTTP/1.1\r\nAccept: x\r\nHost: index:8080\r\nConnection: keep-alive\r\nUpgrade: h2c\r\n\r\n",
        )
        .unwrap();
        assert_eq!(plain.place, ("index".to_owned(), 8_080));
        let head = String::from_utf8(plain.head.unwrap()).unwrap();
        let expected = "GET /simple/?a=b HTTP/1.1\r\nHost: index:8080\r\nConnection: close\r\nAccept: x\r\n\r\n";
        assert_eq!(head, expected);
        // A name before an @ is not the host.
        for wrong in [
            "GET http://pypi.org@elsewhere/ HTTP/1.1\r\nHost: elsewhere\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: index\r\n\r\n",
            "CONNECT :443 HTTP/1.1\r\n\r\n",
            "x",
            "CONNECT a:b HTTP/1.1\r\n\r\n",
            "CONNECT a:1 HTTP/2\r\n\r\n",
            "GET  http://index/ HTTP/1.1\r\nHost: index\r\n\r\n",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_plain_request_reads_from_the_host_it_names_and_does_nothing_else() {
        let status = |method: &str, fields: &str| {
            let text = format!("{method} http://index:81/a HTTP/1.1\r\n{fields}\r\n");
            parse(&text).map(|_| ()).map_err(|(status, _)| &status[..3])
        };
        assert_eq!(status("GET", "Host: index:81\r\n"), Ok(()));
        assert_eq!(status("HEAD", "HOST: Index:81\r\n"), Ok(()));
        for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "get", "TRACE"] {
            assert_eq!(status(method, "Host: index:81\r\n"), Err("405"), "{method}");
        }
        for fields in [
            "",
            "Host: metadata\r\n",
            "Host: index\r\n",
            "Host: index:81\r\nHost: metadata\r\n",
            "Host: index:81\r\nContent-Length: 5\r\n",
            "Host: index:81\r\nTransfer-Encoding: chunked\r\n",
            "Host: index:81\r\nX: a\nHost: metadata\r\n",
            "Host: index:81\r\nX: a\rHost: metadata\r\n",
            "Host: index:81\r\n folded\r\n",
            "Host : index:81\r\n",
        ] {
            assert_eq!(status("GET", fields), Err("400"), "{fields:?}");
        }
    }

    fn hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = rustls::pki_types::ServerName::try_from(name.to_owned()).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_tunnel_is_for_the_host_that_its_tls_names() {
        let bytes = hello("pypi.org");
        let name = hello_name(&bytes).unwrap().unwrap();
        assert_eq!(name.as_deref(), Some("pypi.org"));
        assert!(hello_name(&bytes[..bytes.len() - 1]).unwrap().is_none());
        assert!(hello_name(b"").unwrap().is_none());
        for wrong in [
            &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
            b"SSH-2.0-x\r\n",
            &[0; 64],
        ] {
            assert!(hello_name(wrong).is_err(), "{wrong:?}");
        }
        assert!(is_for("pypi.org", name.as_deref()).is_ok());
        assert!(is_for("pypi.org", Some("PyPI.org")).is_ok());
        assert!(is_for("pypi.org", Some("evil.org")).is_err());
        assert!(is_for("pypi.org", None).is_err());
        assert!(is_for("127.0.0.1", None).is_ok());
        let unnamed = hello_name(&hello("127.0.0.1")).unwrap().unwrap();
        assert_eq!(unnamed, None);
    }

    #[test]
    fn a_user_has_so_many_connections_and_bytes_and_others_have_theirs() {
        let meters = Arc::new(Meters::default());
        let mut open: Vec<Metered> = (0..MOST_CONNECTIONS)
            .map(|_| meters.enter("ann").unwrap())
            .collect();
        assert!(meters.enter("ann").is_none());
        assert!(meters.enter("bob").is_some());
        open.pop();
        let one = meters.enter("ann").unwrap();
        assert!(one.count(usize::try_from(MOST_BYTES).unwrap()).is_ok());
        assert!(one.count(1).is_err());
        drop((one, open));
        assert!(meters.enter("ann").is_none(), "the bytes still count");
        assert!(meters.enter("bob").is_some());
    }

    /// What an index receives of what an installer sends through a tunnel.
    async fn through(sent: &[u8]) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let index = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut got = Vec::new();
            let _ = timeout(Duration::from_secs(2), stream.read_to_end(&mut got)).await;
            got
        });
        let places = BTreeSet::from([("localhost".to_owned(), port)]);
        let tunnel = Tunnel::new("ann".to_owned(), places, Arc::default());
        let (mut installer, line) = tokio::io::duplex(1 << 16);
        let carried = tokio::spawn(async move { tunnel.carry(Box::new(line), Vec::new()).await });
        let head = format!("CONNECT localhost:{port} HTTP/1.1\r\n\r\n");
        installer.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; 39];
        installer.read_exact(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200 "));
        installer.write_all(sent).await.unwrap();
        let _ = installer.shutdown().await;
        let got = index.await.unwrap();
        drop(carried);
        got
    }

    /// What is known of an index after it has answered a plain request so.
    async fn trouble_of(answer: Option<&'static [u8]>) -> Option<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = vec![0; 16];
            stream.read_exact(&mut head).await.unwrap();
            // What was not read makes the end of the stream a reset.
            if let Some(answer) = answer {
                while !head.ends_with(b"\r\n\r\n") {
                    stream.read_buf(&mut head).await.unwrap();
                }
                stream.write_all(answer).await.unwrap();
            }
        });
        let places = BTreeSet::from([("localhost".to_owned(), port)]);
        let tunnel = Tunnel::new("ann".to_owned(), places, Arc::default());
        let trouble = tunnel.trouble();
        let (mut installer, line) = tokio::io::duplex(1 << 16);
        let carried = tokio::spawn(async move { tunnel.carry(Box::new(line), Vec::new()).await });
        let head = format!(
            "GET http://localhost:{port}/simple/ HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
        );
        installer.write_all(head.as_bytes()).await.unwrap();
        let _ = installer.read_to_end(&mut Vec::new()).await;
        let _ = carried.await.unwrap();
        trouble.told()
    }

    #[tokio::test]
    async fn an_index_that_breaks_off_is_in_trouble_until_it_answers() {
        let told = trouble_of(None).await.unwrap();
        assert!(told.contains("broke the connection off"), "{told}");
        let told = trouble_of(Some(b"")).await.unwrap();
        assert!(told.contains("localhost"), "{told}");
        assert_eq!(
            trouble_of(Some(b"HTTP/1.1 404 Not Found\r\n\r\n")).await,
            None
        );
        let cut = trouble_of(Some(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n<a href")).await;
        assert!(cut.unwrap().contains("broke off in the middle"));
    }

    #[test]
    fn an_answer_that_is_cut_is_told_from_a_whole_one() {
        let is_whole = |request: &str, answer: &str| {
            // Byte by byte as well as at once.
            let mut at_once = Answer::to(request.as_bytes());
            let mut slowly = Answer::to(request.as_bytes());
            at_once.add(answer.as_bytes());
            answer.bytes().for_each(|byte| slowly.add(&[byte]));
            assert_eq!(at_once.is_whole(), slowly.is_whole(), "{answer}");
            at_once.is_whole()
        };
        let sized = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n";
        assert!(is_whole("GET ", &format!("{sized}abc")));
        assert!(!is_whole("GET ", &format!("{sized}ab")));
        assert!(is_whole("HEAD ", sized));
        assert!(!is_whole("GET ", "HTTP/1.1 200 OK\r\nA: b\r\n"));
        assert!(is_whole("GET ", "HTTP/1.1 200 OK\r\n\r\nto its end"));
        let unchanged = "HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n";
        assert!(is_whole("GET ", unchanged));
        let chunks = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n";
        assert!(is_whole("GET ", &format!("{chunks}0\r\n\r\n")));
        assert!(!is_whole("GET ", chunks));
        let bytes = hello("pypi.org");
        let mut records = Records::default();
        records.add(&bytes[..7]);
        assert!(!records.is_whole());
        records.add(&bytes[7..]);
        assert!(records.is_whole());
    }

    #[tokio::test]
    async fn nothing_but_tls_to_its_host_goes_through_a_tunnel() {
        let good = hello("localhost");
        assert_eq!(through(&good).await, good);
        assert_eq!(through(&hello("other.example")).await, b"");
        assert_eq!(through(b"POST /run HTTP/1.1\r\nHost: x\r\n\r\n").await, b"");
    }
}
