//! Lines out of a sandbox or a workspace, for the installer of what a program depends on, and for nothing else.
//! The installer needs no network of its own: its runner passes each connection on to here, and here it is
//! joined to a package index, or refused.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Pipeline;
use super::runner::Runner;
use crate::model::{Place, ReplId, UserId, package_place};
use crate::platform::{ByteStream, Platform};
use crate::runner::wire::{FromRunner, JobId, ToRunner, VERSION, frames, raw};

/// Connections that an installer may have at one time.
const LINES: usize = 6;

/// Longest head of a request to a proxy: installers send a few hundred bytes.
const MOST_HEAD: usize = 8 << 10;

/// Longest wait for an installer's request on a new connection, and for an index to answer one.
const REQUEST_PATIENCE: Duration = Duration::from_secs(20);

/// Longest wait for the runner's greeting: it has nothing to do before it.
const GREETING: Duration = Duration::from_secs(5);

/// Between two tries to lend a line to a runner that cannot be reached.
const AGAIN: Duration = Duration::from_millis(500);

/// How often it is looked for workspaces that other servers opened.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How long a line waits in a workspace before another takes its place.
const RENEW: Duration = Duration::from_secs(60);

/// Longest pause before a workspace is tried again that took no line: its pod may be starting, or of an image
/// from before there were lines.
const SELDOM: Duration = Duration::from_secs(5);

/// Pause before the first line is lent: what is installed already is found sooner, and no installer starts
/// as fast.
const AHEAD: Duration = Duration::from_millis(50);

/// The lines of one job, until this is dropped.
#[derive(Debug)]
pub struct Lent {
    _lines: JoinSet<()>,
    trouble: Trouble,
}

/// Why a place that may be reached could not be.
type Trouble = Arc<Mutex<Option<String>>>;

impl Lent {
    /// Why an index could not be reached, the last time that it could not.
    pub fn trouble(&self) -> Option<String> {
        let trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        trouble.clone()
    }
}

/// Lends the job lines to these places.
pub fn lend(
    platform: &Arc<dyn Platform>,
    user: &UserId,
    job: JobId,
    places: BTreeSet<Place>,
) -> Lent {
    let user = user.clone();
    let line = Arc::new(Line::new(platform, Taker::Job { user, job }, places));
    let mut lines = JoinSet::new();
    for _ in 0..LINES {
        let line = Arc::clone(&line);
        lines.spawn(async move {
            sleep(AHEAD).await;
            loop {
                if let Err(error) = line.carry_one().await {
                    tracing::debug!(%job, error = format!("{error:#}"), "a line to an installer ended");
                    sleep(AGAIN).await;
                }
            }
        });
    }
    Lent {
        _lines: lines,
        trouble: Arc::clone(&line.trouble),
    }
}

/// Lends the workspace lines to these places, until this is dropped. Nobody knows when its user will run an
/// installer: one line waits at any time, and the next one when that is taken.
pub fn lend_to_workspace(
    platform: &Arc<dyn Platform>,
    repl: &ReplId,
    places: BTreeSet<Place>,
) -> JoinSet<()> {
    let line = Arc::new(Line::new(platform, Taker::Workspace(repl.clone()), places));
    let repl = repl.clone();
    let mut lending = JoinSet::new();
    lending.spawn(async move {
        let (mut carried, mut pause) = (JoinSet::new(), AGAIN);
        loop {
            while carried.try_join_next().is_some() {}
            while carried.len() >= LINES {
                carried.join_next().await;
            }
            match line.taken().await {
                Ok((installer, head)) => {
                    pause = AGAIN;
                    let line = Arc::clone(&line);
                    carried.spawn(async move {
                        if let Err(error) = line.carry(installer, head).await {
                            tracing::debug!(error = format!("{error:#}"), "a line to an installer ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(%repl, error = format!("{error:#}"), "a workspace takes no line");
                    sleep(pause).await;
                    pause = SELDOM.min(pause * 2);
                }
            }
        }
    });
    lending
}

/// Who is lent a line.
enum Taker {
    Job { user: UserId, job: JobId },
    Workspace(ReplId),
}

/// What a line needs to know.
struct Line {
    platform: Arc<dyn Platform>,
    taker: Taker,
    places: BTreeSet<Place>,
    trouble: Trouble,
}

impl Line {
    fn new(platform: &Arc<dyn Platform>, taker: Taker, places: BTreeSet<Place>) -> Self {
        Self {
            platform: Arc::clone(platform),
            taker,
            places,
            trouble: Trouble::default(),
        }
    }

    fn note(&self, why: &str) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        *trouble = Some(why.to_owned());
    }

    /// A line of which somebody has taken the other end, and what came on it already.
    async fn taken(&self) -> anyhow::Result<(Box<dyn ByteStream>, Vec<u8>)> {
        let (mut reader, writer) = match &self.taker {
            Taker::Job { user, job } => {
                let (mut reader, mut writer) = frames(self.platform.connect(user).await?);
                writer.send(&ToRunner::Hello { version: VERSION }).await?;
                timeout(GREETING, reader.next::<FromRunner>()).await??;
                writer.send(&ToRunner::Lend { job: *job }).await?;
                (reader, writer)
            }
            Taker::Workspace(repl) => {
                let runner = Runner::dial(&*self.platform, repl).await?;
                frames(timeout(GREETING, runner.lend()).await??)
            }
        };
        let taken = match self.taker {
            Taker::Job { .. } => reader.next::<FromRunner>().await?,
            // It may have been lost long ago, and nothing tells of it.
            Taker::Workspace(_) => timeout(RENEW, reader.next::<FromRunner>()).await??,
        };
        anyhow::ensure!(taken == FromRunner::Taken, "no line is wanted: {taken:?}");
        Ok(raw(reader, writer))
    }

    /// One connection of the installer's, from when it is made to its end.
    async fn carry_one(&self) -> anyhow::Result<()> {
        let (installer, head) = self.taken().await?;
        self.carry(installer, head).await
    }

    async fn carry(
        &self,
        mut installer: Box<dyn ByteStream>,
        mut head: Vec<u8>,
    ) -> anyhow::Result<()> {
        let asked = timeout(REQUEST_PATIENCE, read_head(&mut installer, &mut head)).await;
        asked.context("it asked for nothing")??;
        let Some(request) = Request::parse(&head) else {
            let why = "this is no request to a proxy\n";
            return refuse(&mut installer, "400 Bad Request", why).await;
        };
        let (host, port) = &request.place;
        if !self.places.contains(&request.place) {
            let why = format!("{host}:{port} is no package index that the operator allows\n");
            return refuse(&mut installer, "403 Forbidden", &why).await;
        }
        match reach(&request.place).await {
            Ok(index) => join(installer, index, &request, &head).await,
            Err(why) => {
                self.note(&why);
                refuse(&mut installer, "502 Bad Gateway", &format!("{why}\n")).await
            }
        }
    }
}

impl Pipeline {
    /// Lends lines to every workspace that is this server's to see to, until the server ends.
    pub(super) async fn keep_lending(self) {
        let packages = &self.inner.packages;
        let places: BTreeSet<Place> = packages
            .indexes
            .values()
            .flat_map(|index| index.places.iter().cloned())
            .collect();
        let platform = &self.inner.platform;
        let mut lent: HashMap<ReplId, JoinSet<()>> = HashMap::new();
        loop {
            if let Ok(open) = self.open_workspaces().await {
                lent.retain(|repl, _| open.contains(repl));
                for repl in open {
                    let lending = || lend_to_workspace(platform, &repl, places.clone());
                    lent.entry(repl.clone()).or_insert_with(lending);
                }
            }
            // One that was opened here is seen to at once.
            let _ = timeout(LOOK_EVERY, self.inner.opened.notified()).await;
        }
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
    /// What to send there in its head's place; `None`: a tunnel, through which it speaks itself.
    head: Option<Vec<u8>>,
}

impl Request {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let head = std::str::from_utf8(bytes.get(..end_of_head(bytes)?)?).ok()?;
        let mut lines = head.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let (method, target, version) = (first.next()?, first.next()?, first.next()?);
        if method == "CONNECT" {
            let place = package_place(target, 443)?;
            return Some(Self { place, head: None });
        }
        let rest = target.strip_prefix("http://")?;
        let slash = rest.find('/').unwrap_or(rest.len());
        let (authority, path) = rest.split_at(slash);
        let path = if path.is_empty() { "/" } else { path };
        // One request on a connection: the next may be for somewhere else.
        let mut own = format!("{method} {path} {version}\r\nConnection: close\r\n");
        let hop = |line: &str| {
            let name = line.split(':').next().unwrap_or_default();
            [
                "connection",
                "proxy-connection",
                "proxy-authorization",
                "keep-alive",
            ]
            .iter()
            .any(|hop| name.eq_ignore_ascii_case(hop))
        };
        for line in lines.filter(|line| !line.is_empty() && !hop(line)) {
            own.push_str(line);
            own.push_str("\r\n");
        }
        own.push_str("\r\n");
        Some(Self {
            place: package_place(authority, 80)?,
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

/// Joins the installer to the index. `bytes` are what it has sent so far.
async fn join(
    mut installer: Box<dyn ByteStream>,
    mut index: TcpStream,
    request: &Request,
    bytes: &[u8],
) -> anyhow::Result<()> {
    index.set_nodelay(true)?;
    match &request.head {
        Some(head) => index.write_all(head).await?,
        None => {
            let joined = b"HTTP/1.1 200 Connection established\r\n\r\n";
            installer.write_all(joined).await?;
            installer.flush().await?;
        }
    }
    let beyond = end_of_head(bytes).unwrap_or(bytes.len());
    index.write_all(&bytes[beyond..]).await?;
    tokio::io::copy_bidirectional(&mut installer, &mut index).await?;
    Ok(())
}

async fn refuse(
    installer: &mut Box<dyn ByteStream>,
    status: &str,
    why: &str,
) -> anyhow::Result<()> {
    let length = why.len();
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{why}"
    );
    installer.write_all(answer.as_bytes()).await?;
    installer.shutdown().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn requests_are_for_the_place_they_name() {
        let parse = |text: &str| Request::parse(text.as_bytes());
        let tunnel = parse("CONNECT PyPI.org:443 HTTP/1.1\r\nHost: other\r\n\r\nrest").unwrap();
        assert_eq!(tunnel.place, ("pypi.org".to_owned(), 443));
        assert_eq!(tunnel.head, None);
        let plain = parse(
            "GET http://index:8080/simple/?a=b HTTP/1.1\r\nHost: index:8080\r\nConnection: keep-alive\r\n\r\n",
        )
        .unwrap();
        assert_eq!(plain.place, ("index".to_owned(), 8_080));
        let head = String::from_utf8(plain.head.unwrap()).unwrap();
        let expected = "GET /simple/?a=b HTTP/1.1\r\nConnection: close\r\nHost: index:8080\r\n\r\n";
        assert_eq!(head, expected);
        // A name before an @ is not the host.
        for wrong in [
            "GET http://pypi.org@elsewhere/ HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\r\n\r\n",
            "CONNECT :443 HTTP/1.1\r\n\r\n",
            "x",
            "CONNECT a:b c\r\n\r\n",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
