//! A client of the real server that keeps what it was told of every submission.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::server::{Server, Socket};

/// A client with one connection and many submissions.
pub struct Client {
    socket: Socket,
    pub frames: HashMap<String, Vec<Value>>,
}

impl Client {
    pub async fn of(server: &Server) -> Self {
        Self {
            socket: server.connect(&server.admin).await,
            frames: HashMap::new(),
        }
    }

    /// Sends it under a new id, streaming.
    pub async fn send(&mut self, mut message: Value) -> String {
        let id = uuid::Uuid::now_v7().to_string();
        message["submission_id"] = json!(id);
        message["stream"] = json!(true);
        self.socket.send(message.to_string()).await;
        id
    }

    pub async fn tell(&mut self, frame: Value) {
        self.socket.send(frame.to_string()).await;
    }

    /// The next frame of whichever submission, kept with the others of its own.
    pub async fn next(&mut self) -> Value {
        let frame = self.socket.next().await;
        let id = frame["submission_id"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        self.frames.entry(id).or_default().push(frame.clone());
        frame
    }

    /// Until there is a frame of this submission that fits.
    pub async fn until(&mut self, id: &str, fits: impl Fn(&Value) -> bool) -> Value {
        loop {
            let frame = self.next().await;
            if frame["submission_id"] == id && fits(&frame) {
                return frame;
            }
            let ended = frame["submission_id"] == id && frame.get("status").is_some();
            assert!(!ended, "it ended first: {frame}");
        }
    }

    pub async fn reply(&mut self, id: &str) -> Value {
        // It may have come while another submission's was waited for.
        let came = self.frames.get(id).into_iter().flatten();
        if let Some(reply) = came.clone().find(|frame| frame.get("status").is_some()) {
            return reply.clone();
        }
        self.until(id, |frame| frame.get("status").is_some()).await
    }

    pub async fn ask(&mut self, message: Value) -> Value {
        let id = self.send(message).await;
        self.reply(&id).await
    }

    pub fn steps(&self, id: &str) -> Vec<String> {
        let steps = self.frames[id]
            .iter()
            .filter(|frame| frame["event"] == "step");
        steps
            .map(|f| {
                format!(
                    "{} {}",
                    f["name"].as_str().unwrap(),
                    f["state"].as_str().unwrap()
                )
            })
            .collect()
    }
}

pub fn message(user: &str, code: &str) -> Value {
    json!({ "user_id": user, "code": code, "deploy": false })
}

pub fn with(mut message: Value, more: Value) -> Value {
    let more = more.as_object().unwrap().clone();
    message.as_object_mut().unwrap().extend(more);
    message
}
