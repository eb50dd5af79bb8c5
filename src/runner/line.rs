//! Lines out of the sandbox for an installer, a job's or a workspace's: it speaks to a proxy on loopback, which
//! is this, and each of its connections goes on over one that the server has lent.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::client::ByteStream;
use super::network::Network;
use super::wire::{FromRunner, frames, raw};
use crate::model::PROXY_VARIABLES;

/// Pause before another connection is taken when one could not be.
const AGAIN: Duration = Duration::from_millis(50);

/// Longest wait for a line: a server lends them all the time, unless it is away or may install nothing.
const LINE_PATIENCE: Duration = Duration::from_secs(30);

/// Most lines that wait for somebody to speak on them: more than a server lends at one time.
const MAX_FREE: usize = 16;

type Line = Box<dyn ByteStream>;

/// Those that nobody speaks on.
#[derive(Default)]
pub struct Lines {
    free: RefCell<VecDeque<Line>>,
    lent: Notify,
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Lines")
    }
}

impl Lines {
    /// The server lends another.
    pub fn lend(&self, line: Line) {
        let mut free = self.free.borrow_mut();
        free.push_back(line);
        while free.len() > MAX_FREE {
            free.pop_front();
        }
        self.lent.notify_one();
    }

    async fn take(&self) -> Line {
        loop {
            let lent = self.lent.notified();
            // The newest: of those that have waited for long, some are of a server that is gone.
            if let Some(line) = self.free.borrow_mut().pop_back() {
                return line;
            }
            lent.await;
        }
    }
}

/// Most connections of an installer's that wait for a line or have one.
const MAX_CALLERS: usize = 64;

/// The proxy of one installer, until this is dropped.
#[derive(Debug)]
pub struct Proxy {
    /// On loopback.
    pub port: u16,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// One that uses these lines, for programs of this user only: others with the same loopback may not go
    /// out. In a slot's own network there are no others.
    pub async fn start(
        lines: Rc<Lines>,
        uid: u32,
        network: Option<&Network>,
    ) -> std::io::Result<Self> {
        let listen = || std::net::TcpListener::bind(("127.0.0.1", 0));
        let (listener, uid) = match network {
            Some(network) => (network.within(listen)?, None),
            None => (listen()?, Some(uid)),
        };
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let port = listener.local_addr()?.port();
        let mut tasks = JoinSet::new();
        tasks.spawn_local(serve(listener, lines, uid));
        Ok(Self {
            port,
            _tasks: tasks,
        })
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// What tells a job's program of it.
    pub fn environment(&self) -> impl Iterator<Item = (String, String)> {
        let url = self.url();
        PROXY_VARIABLES
            .into_iter()
            .map(move |name| (name.to_owned(), url.clone()))
    }
}

/// Takes the connections of this user; `None`: of everybody.
async fn serve(listener: TcpListener, lines: Rc<Lines>, uid: Option<u32>) {
    let mut callers = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((caller, from)) if uid.is_none() || owner(from) == uid => {
                callers.spawn_local(pass_on(caller, Rc::clone(&lines)));
            }
            Ok(_) => {}
            Err(_) => sleep(AGAIN).await,
        }
        while callers.try_join_next().is_some() {}
        while callers.len() >= MAX_CALLERS {
            callers.join_next().await;
        }
    }
}

/// Who made the connection whose other end is this one on loopback, as the kernel knows it (proc_net_tcp).
fn owner(end: SocketAddr) -> Option<u32> {
    let SocketAddr::V4(end) = end else {
        return None;
    };
    let address = u32::from_ne_bytes(end.ip().octets());
    let v4 = format!("{address:08X}:{:04X}", end.port());
    // A socket for both families has the same address in the longer form.
    let mapped = format!("{}{v4}", "0000000000000000FFFF0000");
    let in_table = |table: &str, wanted: &str| {
        let table = std::fs::read_to_string(table).ok()?;
        table.lines().skip(1).find_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(1);
            (fields.next()? == wanted).then(|| fields.nth(5)?.parse().ok())?
        })
    };
    in_table("/proc/self/net/tcp", &v4).or_else(|| in_table("/proc/self/net/tcp6", &mapped))
}

async fn pass_on(mut caller: TcpStream, lines: Rc<Lines>) {
    let _ = caller.set_nodelay(true);
    let taken = async {
        loop {
            let mut line = lines.take().await;
            // Nothing comes on it before it is taken, but its end.
            if line.read(&mut [0]).now_or_never().is_some() {
                continue;
            }
            let (reader, mut writer) = frames(line);
            if writer.send(&FromRunner::Taken).await.is_ok() {
                return raw(reader, writer).0;
            }
        }
    };
    if let Ok(mut stream) = timeout(LINE_PATIENCE, taken).await {
        let _ = tokio::io::copy_bidirectional(&mut caller, &mut stream).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_connections_owner_is_known() {
        let own = rustix::process::getuid().as_raw();
        for bound in ["127.0.0.1:0", "[::ffff:127.0.0.1]:0"] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let socket = match bound.starts_with('[') {
                true => tokio::net::TcpSocket::new_v6().unwrap(),
                false => tokio::net::TcpSocket::new_v4().unwrap(),
            };
            socket.bind(bound.parse().unwrap()).unwrap();
            let port = listener.local_addr().unwrap().port();
            let to = bound.replace(":0", &format!(":{port}"));
            let _caller = socket.connect(to.parse().unwrap()).await.unwrap();
            let (_, from) = listener.accept().await.unwrap();
            assert_eq!(owner(from), Some(own), "{bound}");
        }
        assert_eq!(owner("127.0.0.1:1".parse().unwrap()), None);
    }
}
