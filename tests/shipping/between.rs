//! What stands between a server and Elasticsearch and fails on purpose. What it lets through goes to the
//! real one and comes from it.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// How it is on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Weather {
    Fine,
    /// Every third record of a bulk request is refused for now.
    BusyForSome,
    /// Everything is taken, and the answer is a failure.
    FailsAfterTaking,
    /// Everything is taken, and no answer comes.
    CutAfterTaking,
    /// Connections are closed without an answer.
    Away,
}

struct Way {
    /// Weather, and which one a bulk request has met.
    now: Mutex<(Weather, BTreeSet<Weather>)>,
    to: String,
    client: reqwest::Client,
}

pub struct Between {
    way: Arc<Way>,
    address: SocketAddr,
}

impl Between {
    /// On the way to this address.
    pub async fn new(to: &str) -> Self {
        let way = Arc::new(Way {
            now: Mutex::new((Weather::Fine, BTreeSet::new())),
            to: to.trim_end_matches('/').to_owned(),
            client: reqwest::Client::new(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&way);
        tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let way = Arc::clone(&serving);
                let service = service_fn(move |request| Arc::clone(&way).pass(request));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service);
                // An error is what it is here for.
                tokio::spawn(async move { connection.await.ok() });
            }
        });
        Self { way, address }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn set(&self, weather: Weather) {
        self.way.now.lock().unwrap().0 = weather;
    }

    /// Whether bulk requests have met each of these.
    pub fn met_all(&self, weathers: &[Weather]) -> bool {
        let now = self.way.now.lock().unwrap();
        weathers.iter().all(|weather| now.1.contains(weather))
    }
}

impl Way {
    async fn pass(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, io::Error> {
        let weather = self.now.lock().unwrap().0;
        let bulk = request.uri().path() == "/_bulk";
        if bulk || weather == Weather::Away {
            self.now.lock().unwrap().1.insert(weather);
        }
        if weather == Weather::Away {
            return Err(io::Error::other("away"));
        }
        let (head, body) = request.into_parts();
        let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
        let forward = async |body: Bytes, packed: bool| {
            let url = format!("{}{}", self.to, head.uri);
            let mut call = self.client.request(head.method.clone(), url).body(body);
            for name in ["content-type", "accept"] {
                if let Some(value) = head.headers.get(name) {
                    call = call.header(name, value);
                }
            }
            if packed {
                call = call.header("content-encoding", "gzip");
            }
            let answer = call.send().await.map_err(io::Error::other)?;
            let status = answer.status().as_u16();
            let body = answer.bytes().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((status, body))
        };
        if bulk && weather == Weather::BusyForSome {
            let (kept, refused) = divide(&body)?;
            let (status, answer) = forward(kept, false).await?;
            return respond(status, join(&answer, &refused)?);
        }
        let (status, answer) = forward(body, bulk).await?;
        match weather {
            Weather::FailsAfterTaking if bulk => respond(503, Bytes::new()),
            Weather::CutAfterTaking if bulk => Err(io::Error::other("cut")),
            _ => respond(status, answer),
        }
    }
}

fn respond(status: u16, body: Bytes) -> Result<Response<Full<Bytes>>, io::Error> {
    let response = Response::builder()
        .status(status)
        .header("content-type", "application/json")
        .header("x-elastic-product", "Elasticsearch");
    response.body(Full::new(body)).map_err(io::Error::other)
}

/// Without every third record; which those are.
fn divide(packed: &[u8]) -> Result<(Bytes, Vec<bool>), io::Error> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text)?;
    let lines: Vec<&str> = text.lines().collect();
    let refused: Vec<bool> = (0..lines.len() / 2).map(|n| n % 3 == 0).collect();
    let mut kept = String::new();
    for (pair, refused) in lines.chunks(2).zip(&refused) {
        if !refused {
            kept.push_str(&format!("{}\n{}\n", pair[0], pair[1]));
        }
    }
    Ok((Bytes::from(kept), refused))
}

/// The real answers, with refusals where records were taken out.
fn join(answer: &[u8], refused: &[bool]) -> Result<Bytes, io::Error> {
    // A bulk request without a record is refused as a whole.
    let real: Value = serde_json::from_slice(answer)?;
    let mut items = real["items"]
        .as_array()
        .cloned()
        .unwrap_or_default()
        .into_iter();
    let busy = json!({"create": {"status": 429, "error":
        {"type": "es_rejected_execution_exception", "reason": "queue full"}}});
    let all: Option<Vec<Value>> = refused
        .iter()
        .map(|refused| match refused {
            true => Some(busy.clone()),
            false => items.next(),
        })
        .collect();
    let all = all.ok_or_else(|| io::Error::other("an answer is missing"))?;
    Ok(Bytes::from(serde_json::to_vec(&json!({"items": all}))?))
}
