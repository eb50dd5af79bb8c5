//! Several replicas of the server side by side: each answers for all.
//!
//! A submission lives where it was taken in: its records are in that replica's journal. Whoever is asked
//! for one it does not have asks the others, and passes on what they say. A client's own submission id
//! is settled between all replicas before it runs anywhere, so that the same id sent to two of them runs
//! once. When a replica that may have it cannot be asked, the answer is that nobody knows: never a
//! second run.

mod claims;
mod follow;
mod routes;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use axum::http::{HeaderMap, header};
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_util::sync::CancellationToken;

use crate::auth::{Keys, is_credential};
use crate::config::PeersConfig;
use crate::model::{Problem, ReplId, SubmissionId, UserId};
pub use claims::Claim;
use claims::Claims;
pub use follow::Replicas;
pub use routes::routes;

/// How often each replica is greeted: a key that was revoked on one does not count on any after this. One that is
/// new is asked for when somebody comes with it.
const GREET_EVERY: Duration = Duration::from_secs(2);

/// Between two greetings because of keys that are not known: wrong ones must not keep replicas busy.
const GREET_AGAIN: Duration = Duration::from_millis(100);

/// Longest wait for a replica: it is in the same network, and has the answer in memory.
const ANSWER: Duration = Duration::from_secs(2);

/// Longest wait for a connection to one.
const CONNECT: Duration = Duration::from_secs(1);

/// How long a replica that has just begun waits for the others before it says that it is ready: names
/// that were not there a moment ago are not found for some seconds.
const ACQUAINTANCE: Duration = Duration::from_secs(40);

/// How far replicas' and clients' clocks may differ.
const SKEW: SignedDuration = SignedDuration::from_secs(60);

/// The secret that replicas know each other by.
const PEER_KEY: &str = "x-gantry-peer-key";

/// For whom a replica asks.
const CALLER: &str = "x-gantry-caller";

/// The name that a replica is asked under: every server answers to it.
const OWN_HOST: &str = "localhost";

/// One of the replicas, perhaps this one.
#[derive(Debug)]
pub struct Peer {
    address: String,
    /// It is this very server.
    myself: AtomicBool,
    /// It did not answer the last time.
    away: AtomicBool,
    /// Its name, once it has answered.
    name: OnceLock<String>,
    /// Which keys of it are known.
    keys: Mutex<String>,
}

/// Every replica of this server.
#[derive(Debug)]
pub struct Peers {
    replica: String,
    key: Option<SecretString>,
    all: Vec<Arc<Peer>>,
    claims: Claims,
    http: reqwest::Client,
    /// When the others were greeted last because of a key that was not known.
    greeted: tokio::sync::Mutex<Option<Instant>>,
    started: Timestamp,
    began: Instant,
}

/// Where a submission is.
#[derive(Debug)]
pub enum Found {
    /// At this replica.
    At(Arc<Peer>),
    /// At none.
    Nowhere,
    /// A replica that may have it cannot be asked.
    Unknown,
}

/// Where a submission with an id of the client's runs.
#[derive(Debug)]
pub enum Settled {
    /// Here; nobody else takes it while the claim is held.
    Here(Option<Claim>),
    /// There; it is known there already.
    There(Arc<Peer>),
    /// A replica that may have it cannot be asked.
    Unknown,
}

#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    replica: String,
    keys: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Greeted {
    replica: String,
    /// The version of the keys, and their text unless it is the one that is known.
    version: String,
    keys: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Question {
    replica: String,
    submission: SubmissionId,
    /// The asker is about to run it.
    claim: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    replica: String,
    /// It is here.
    mine: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Overtaking {
    repl: ReplId,
    /// Whose submissions; `None`: everybody's, as an admin may.
    user: Option<UserId>,
    /// What was asked of the repl.
    why: String,
}

#[derive(Debug, Serialize, Deserialize)]
struct Credential {
    kind: Kind,
    text: String,
}

/// What a browser proves with who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A session's cookie.
    Session,
    /// A ticket for a WebSocket.
    Ticket,
}

#[derive(Debug, Serialize, Deserialize)]
struct KeyOf {
    key_id: Option<String>,
}

impl Peers {
    /// The replicas that the configuration names.
    pub fn new(config: &PeersConfig) -> anyhow::Result<Self> {
        let peer = |address: &String| {
            Arc::new(Peer {
                address: address.clone(),
                myself: AtomicBool::new(false),
                away: AtomicBool::new(false),
                name: OnceLock::new(),
                keys: Mutex::default(),
            })
        };
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self {
            replica: config.replica.clone(),
            key: config.key.clone(),
            all: config.addresses.iter().map(peer).collect(),
            claims: Claims::default(),
            http,
            greeted: tokio::sync::Mutex::default(),
            started: Timestamp::now(),
            began: Instant::now(),
        })
    }

    /// Whether every other replica has answered once, or was given time to. Before that much would be
    /// called unknown that is known.
    pub fn acquainted(&self) -> bool {
        let met = |peer: &Arc<Peer>| peer.name.get().is_some();
        self.began.elapsed() >= ACQUAINTANCE || self.others().all(met)
    }

    /// Whether this replica is the one that records what the repl's program does: all of them see it,
    /// and one of those that answer keeps it. Around a replica's end two may; what they keep is one
    /// record, by where it comes from.
    pub fn records(&self, repl: &ReplId) -> bool {
        let rank = |name: &str| crc32fast::hash(format!("{name}/{repl}").as_bytes());
        let here = (rank(&self.replica), self.replica.as_str());
        let alive = |peer: &&Arc<Peer>| !peer.away.load(Ordering::Relaxed);
        let mut others = self
            .others()
            .filter(alive)
            .filter_map(|peer| peer.name.get());
        others.all(|name| (rank(name), name.as_str()) < here)
    }

    /// Whether there are others.
    pub fn any(&self) -> bool {
        !self.all.is_empty()
    }

    /// Greets the others until stopped, and keeps what they say of their keys.
    pub async fn watch(self: Arc<Self>, keys: Keys, stop: CancellationToken) {
        loop {
            join_all(self.others().map(|peer| self.greet(peer, &keys))).await;
            let pause = tokio::time::sleep(GREET_EVERY);
            if stop.run_until_cancelled(pause).await.is_none() {
                return;
            }
        }
    }

    /// Asks the others for their keys now: somebody comes with one that is not known here, and may have been made
    /// there a moment ago. All that wait at one time share an answer.
    pub async fn ask_for_keys(&self, keys: &Keys) {
        if !self.any() {
            return;
        }
        let asked = Instant::now();
        let mut greeted = self.greeted.lock().await;
        if let Some(last) = *greeted {
            if last >= asked {
                return;
            }
            tokio::time::sleep_until(last + GREET_AGAIN).await;
        }
        *greeted = Some(Instant::now());
        // One that did not answer a moment ago is greeted every other second: nobody waits for it.
        let there = self
            .others()
            .filter(|peer| !peer.away.load(Ordering::Relaxed));
        join_all(there.map(|peer| self.greet(peer, keys))).await;
    }

    /// Whether these headers are another replica's.
    pub fn is_peer(&self, headers: &HeaderMap) -> bool {
        let (Some(key), Some(said)) = (&self.key, headers.get(PEER_KEY)) else {
            return false;
        };
        key.expose_secret().as_bytes().ct_eq(said.as_bytes()).into()
    }

    /// The public name of the key for whose caller another replica asks.
    pub fn caller<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        self.is_peer(headers)
            .then(|| headers.get(CALLER)?.to_str().ok())
            .flatten()
    }

    /// Which replica has the submission. It is not here.
    pub async fn find(&self, id: SubmissionId) -> Found {
        let answers = self.ask_all(id, false).await;
        let mut away = false;
        for (peer, mine) in answers {
            match mine {
                Some(true) => return Found::At(peer),
                Some(false) => {}
                None => away = true,
            }
        }
        if away { Found::Unknown } else { Found::Nowhere }
    }

    /// Settles where a submission with this id runs. It is not here yet.
    pub async fn settle(self: &Arc<Self>, id: SubmissionId) -> Settled {
        if !self.any() {
            return Settled::Here(None);
        }
        if self.claims.is_noted(id) {
            match self.find(id).await {
                Found::At(peer) => return Settled::There(peer),
                Found::Unknown => return Settled::Unknown,
                // It was refused there after all.
                Found::Nowhere => self.claims.forget(id),
            }
        }
        let claim = Claims::claim(self, id);
        let mut away = false;
        for (peer, mine) in self.ask_all(id, true).await {
            match mine {
                Some(true) => return Settled::There(peer),
                Some(false) => {}
                None => away = true,
            }
        }
        // Whatever an absent replica took while it could be reached it had asked here for; it can only
        // have an id that is older than this server.
        if away && !self.is_new(id) {
            return Settled::Unknown;
        }
        Settled::Here(Some(claim))
    }

    /// Has what the others have under way for the repl not be deployed, because of this that was asked of it:
    /// whether all of them know. `user`: whose; `None`: everybody's.
    pub async fn overtake(&self, repl: &ReplId, user: Option<&UserId>, why: &str) -> bool {
        let overtaking = Overtaking {
            repl: repl.clone(),
            user: user.cloned(),
            why: why.to_owned(),
        };
        let overtaking = &overtaking;
        let told = self.others().map(|peer| async move {
            // One that did not answer a moment ago is greeted every other second: nobody waits for it.
            if peer.away.load(Ordering::Relaxed) {
                return false;
            }
            let told = self.post::<_, Answer>(peer, "/peer/overtake", overtaking);
            told.await.is_some()
        });
        join_all(told).await.into_iter().all(|told| told)
    }

    /// The problem of a submission that a replica may have which cannot be asked.
    pub fn unknown(&self) -> Problem {
        Problem::new(
            "replica_away",
            "Whether the submission ran is not known now",
            format!(
                "another replica of the server may have it and does not answer: {}",
                self.away()
            ),
            "Ask again when that replica is back; it takes up what it has.",
        )
    }

    /// The problem of a repl that is nobody's yet, when a replica cannot be told that it is to stay so.
    pub fn not_told(&self) -> Problem {
        Problem::new(
            "replica_away",
            "Whether something is under way for the repl is not known now",
            format!(
                "another replica of the server may be about to deploy it and does not answer: {}",
                self.away()
            ),
            "Stop it again when that replica is back; it takes up what it has.",
        )
    }

    /// Addresses of those that did not answer the last time.
    fn away(&self) -> String {
        let away: Vec<&str> = self
            .others()
            .filter(|peer| peer.away.load(Ordering::Relaxed))
            .map(|peer| peer.address.as_str())
            .collect();
        away.join(", ")
    }

    /// A WebSocket to the other replica, for this caller.
    pub async fn connect(
        &self,
        peer: &Peer,
        key_id: &str,
    ) -> Result<WebSocketStream<TcpStream>, String> {
        let opening = async {
            let address = &peer.address;
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let mut request = format!("ws://{address}/ws/code")
                .into_client_request()
                .map_err(std::io::Error::other)?;
            let headers = request.headers_mut();
            let own = |text: &str| text.parse().map_err(std::io::Error::other);
            headers.insert(header::HOST, own(OWN_HOST)?);
            headers.insert(PEER_KEY, own(self.secret())?);
            headers.insert(CALLER, own(key_id)?);
            let opened = tokio_tungstenite::client_async(request, stream).await;
            let (socket, _) = opened.map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(socket)
        };
        match timeout(ANSWER, opening).await {
            Ok(Ok(socket)) => Ok(socket),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        }
    }

    /// What the other replica answers to a GET of this caller's: status and JSON, which may be long.
    pub async fn get(
        &self,
        peer: &Peer,
        path: &str,
        key_id: &str,
    ) -> Result<(u16, BoxStream<'static, reqwest::Result<bytes::Bytes>>), String> {
        let request = self
            .http
            .get(format!("http://{}{path}", peer.address))
            .header(header::HOST.as_str(), OWN_HOST)
            .header(PEER_KEY, self.secret())
            .header(CALLER, key_id);
        let answer = match tokio::time::timeout(ANSWER, request.send()).await {
            Ok(answer) => answer.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("no answer within {} s", ANSWER.as_secs())),
        };
        Ok((answer.status().as_u16(), answer.bytes_stream().boxed()))
    }

    /// The key that a credential stands for which another replica gave out.
    pub async fn redeem(&self, kind: Kind, text: &str) -> Option<String> {
        // What no replica can have given out is asked of none.
        if !is_credential(text) {
            return None;
        }
        let credential = Credential {
            kind,
            text: text.to_owned(),
        };
        let asked = self
            .others()
            .map(|peer| self.post::<_, KeyOf>(peer, "/peer/credential", &credential));
        let answers = join_all(asked).await;
        answers.into_iter().flatten().find_map(|known| known.key_id)
    }

    fn others(&self) -> impl Iterator<Item = &Arc<Peer>> {
        let other = |peer: &&Arc<Peer>| !peer.myself.load(Ordering::Relaxed);
        self.all.iter().filter(other)
    }

    fn secret(&self) -> &str {
        self.key.as_ref().map_or("", |key| key.expose_secret())
    }

    /// `Some(true)`: it has it; `None`: it cannot be asked.
    async fn ask_all(&self, id: SubmissionId, claim: bool) -> Vec<(Arc<Peer>, Option<bool>)> {
        let asked = self.others().map(|peer| async move {
            // One that did not answer a moment ago is greeted every other second: nobody waits for it.
            if peer.away.load(Ordering::Relaxed) {
                return (Arc::clone(peer), None);
            }
            let question = Question {
                replica: self.replica.clone(),
                submission: id,
                claim,
            };
            let answer = self.post::<_, Answer>(peer, "/peer/ask", &question).await;
            let mine = answer.map(|answer| self.is_other(peer, &answer.replica) && answer.mine);
            (Arc::clone(peer), mine)
        });
        join_all(asked).await
    }

    async fn greet(&self, peer: &Peer, keys: &Keys) {
        let known = peer.keys().clone();
        let greeting = Greeting {
            replica: self.replica.clone(),
            keys: known,
        };
        let Some(greeted) = self
            .post::<_, Greeted>(peer, "/peer/hello", &greeting)
            .await
        else {
            return;
        };
        if !self.is_other(peer, &greeted.replica) {
            return;
        }
        if let Some(text) = greeted.keys {
            match keys.adopt(&greeted.replica, text.as_bytes()) {
                Ok(()) => *peer.keys() = greeted.version,
                Err(error) => {
                    tracing::warn!(peer = %peer.address, %error, "another replica's keys cannot be read");
                }
            }
        }
    }

    /// Whether the one that answered is not this very server.
    fn is_other(&self, peer: &Peer, replica: &str) -> bool {
        let myself = replica == self.replica;
        peer.name.get_or_init(|| replica.to_owned());
        peer.myself.store(myself, Ordering::Relaxed);
        !myself
    }

    async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        peer: &Peer,
        path: &str,
        question: &Q,
    ) -> Option<A> {
        let asked = self
            .http
            .post(format!("http://{}{path}", peer.address))
            .header(header::HOST.as_str(), OWN_HOST)
            .header(PEER_KEY, self.secret())
            .json(question)
            .timeout(ANSWER)
            .send();
        let answered = async {
            let answer = asked.await?.error_for_status()?;
            answer.json::<A>().await
        };
        match answered.await {
            Ok(answer) => {
                if peer.away.swap(false, Ordering::Relaxed) {
                    tracing::info!(peer = %peer.address, "another replica answers again");
                }
                Some(answer)
            }
            Err(error) => {
                if !peer.away.swap(true, Ordering::Relaxed) {
                    let error = error.without_url();
                    let error = std::error::Error::source(&error)
                        .map_or_else(|| error.to_string(), ToString::to_string);
                    tracing::warn!(peer = %peer.address, %error, "another replica does not answer; what it has cannot be shown meanwhile");
                }
                None
            }
        }
    }

    /// Whether the id was made after this server began: then every replica that took it had asked here.
    fn is_new(&self, id: SubmissionId) -> bool {
        let began = self.started.checked_add(SKEW);
        id.time()
            .zip(began.ok())
            .is_some_and(|(made, began)| made > began)
    }
}

impl Peer {
    fn keys(&self) -> std::sync::MutexGuard<'_, String> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is.
    pub fn address(&self) -> &str {
        &self.address
    }
}
