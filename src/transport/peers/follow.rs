//! Following the other replicas' records: a client at one replica sees within a moment what happens at
//! any, without waiting for Elasticsearch.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use tokio::time::timeout;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::io::StreamReader;

use super::routes::FromPeer;
use super::{ANSWER, OWN_HOST, PEER_KEY, Peer, Peers};
use crate::logs::{HEARTBEAT, LogQuery, Neighbours, News, own_news};
use crate::transport::Edge;
use crate::transport::body::{Json, field_refused};
use crate::transport::problem::HttpProblem;

/// Pause before a replica that does not answer is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// A connection on which nothing came for this long is dead: three heartbeats.
const SILENCE: Duration = HEARTBEAT.saturating_mul(3);

/// Longest line: what matches in a quarter of a megabyte of journal, as JSON with every field's name.
const MAX_LINE: usize = 16 << 20;

/// The replicas as the log search knows them.
#[derive(Debug)]
pub struct Replicas(pub Arc<Peers>);

impl Neighbours for Replicas {
    fn follow(&self, query: &LogQuery) -> BoxStream<'static, News> {
        let listening = self.0.others().map(|peer| {
            let listener = Listener {
                peers: Arc::clone(&self.0),
                peer: Arc::clone(peer),
                query: query.clone(),
                lines: None,
            };
            listener.news()
        });
        // So that it does not end where there is no other replica.
        stream::select_all(listening.chain([stream::pending().boxed()])).boxed()
    }
}

/// What one replica says, line by line.
type Lines = BoxStream<'static, Result<String, String>>;

struct Listener {
    peers: Arc<Peers>,
    peer: Arc<Peer>,
    query: LogQuery,
    lines: Option<Lines>,
}

impl Listener {
    fn news(self) -> BoxStream<'static, News> {
        let heard = stream::unfold(self, |mut listener| async move {
            let news = listener.next().await;
            Some((news, listener))
        });
        heard.boxed()
    }

    async fn next(&mut self) -> News {
        loop {
            match self.listen().await {
                Ok(news) => {
                    // From there on, should the connection break.
                    self.query.after = Some(news.place());
                    return news;
                }
                Err(why) => {
                    tracing::debug!(peer = %self.peer.address, %why, "another replica's records are not followed now");
                    self.lines = None;
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    async fn listen(&mut self) -> Result<News, String> {
        let lines = match &mut self.lines {
            Some(lines) => lines,
            closed => closed.insert(connect(&self.peers, &self.peer, &self.query).await?),
        };
        let line = match timeout(SILENCE, lines.next()).await {
            Ok(Some(line)) => line?,
            Ok(None) => return Err("it closed the connection".to_owned()),
            Err(_) => return Err(format!("silent for {} s", SILENCE.as_secs())),
        };
        serde_json::from_str(&line).map_err(|error| error.to_string())
    }
}

async fn connect(peers: &Peers, peer: &Peer, query: &LogQuery) -> Result<Lines, String> {
    if peer.away.load(Ordering::Relaxed) {
        return Err("it does not answer".to_owned());
    }
    let asked = peers
        .http
        .post(format!("http://{}/peer/follow", peer.address))
        .header("host", OWN_HOST)
        .header(PEER_KEY, peers.secret())
        .json(query)
        .send();
    let answer = match timeout(ANSWER, asked).await {
        Ok(answer) => answer.and_then(reqwest::Response::error_for_status),
        Err(_) => return Err(format!("no answer within {} s", ANSWER.as_secs())),
    };
    let answer = answer.map_err(|error| error.without_url().to_string())?;
    let bytes = StreamReader::new(answer.bytes_stream().map_err(io::Error::other));
    let lines = FramedRead::new(bytes, LinesCodec::new_with_max_length(MAX_LINE));
    Ok(lines.map_err(|error| error.to_string()).boxed())
}

/// This replica's records, for a client of another one's.
pub async fn follow(
    _: FromPeer,
    State(edge): State<Arc<Edge>>,
    Json(query): Json<LogQuery>,
) -> Result<Response, HttpProblem> {
    let news = own_news(&edge.journal, query).map_err(|error| field_refused(&error))?;
    let lines = news.map(|news| {
        let mut line = serde_json::to_vec(&news.map_err(io::Error::other)?)?;
        line.push(b'\n');
        Ok::<_, io::Error>(line)
    });
    let stopping = edge.shutdown.token.clone().cancelled_owned();
    let body = Body::from_stream(lines.take_until(stopping));
    Ok(body.into_response())
}
