//! A name server of a test's own, on loopback: it knows the texts it is told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use hickory_resolver::proto::op::{Message, OpCode, ResponseCode};
use hickory_resolver::proto::rr::rdata::TXT;
use hickory_resolver::proto::rr::{RData, Record, RecordType};
use tokio::net::UdpSocket;

/// Largest question: as large as a packet without extensions may be.
const MAX_QUESTION: usize = 4_096;

pub struct Dns {
    pub address: SocketAddr,
    texts: Arc<Mutex<BTreeMap<String, Vec<String>>>>,
}

impl Dns {
    pub async fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let texts: Arc<Mutex<BTreeMap<String, Vec<String>>>> = Arc::default();
        let known = Arc::clone(&texts);
        tokio::spawn(async move {
            let mut question = [0; MAX_QUESTION];
            while let Ok((length, peer)) = socket.recv_from(&mut question).await {
                if let Some(answer) = answer(&question[..length], &known) {
                    socket.send_to(&answer, peer).await.unwrap();
                }
            }
        });
        Self { address, texts }
    }

    /// The texts of a name from now on.
    pub fn set(&self, name: &str, texts: &[&str]) {
        let texts = texts.iter().map(ToString::to_string).collect();
        self.texts.lock().unwrap().insert(format!("{name}."), texts);
    }
}

fn answer(question: &[u8], known: &Mutex<BTreeMap<String, Vec<String>>>) -> Option<Vec<u8>> {
    let asked = Message::from_vec(question).ok()?;
    let query = asked.queries.first()?.clone();
    let name = query.name().clone();
    let mut answer = Message::response(asked.metadata.id, OpCode::Query);
    answer.add_query(query.clone());
    let texts = known
        .lock()
        .unwrap()
        .get(&name.to_ascii().to_lowercase())
        .cloned();
    match texts {
        Some(texts) if query.query_type() == RecordType::TXT => {
            for text in texts {
                // As servers send long ones: in pieces.
                let (one, other) = text.split_at(text.len() / 2);
                let text = TXT::new(vec![one.to_owned(), other.to_owned()]);
                answer.add_answer(Record::from_rdata(name.clone(), 60, RData::TXT(text)));
            }
        }
        Some(_) => {}
        None => answer.metadata.response_code = ResponseCode::NXDomain,
    }
    answer.to_vec().ok()
}
