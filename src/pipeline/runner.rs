//! A connection to a workspace's runner: what there is, what it is used for, and lines for its installer.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper::http::request;
use hyper::{HeaderMap, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use tokio::time::timeout;

use super::NotSaved;
use crate::model::{MAX_WORKSPACE_FILE_BYTES, Problem, RelativePath, ReplId};
use crate::platform::{ByteStream, Platform, PlatformError};
use crate::runner::wire::{
    Activity, INSTALLED, LINE, LINE_PROTOCOL, LISTING, MAX_BUILD_BYTES, PACKAGES,
};

/// Longest wait for one answer of a runner, which has files at hand: the largest on a slow network.
const ANSWER: Duration = Duration::from_secs(30);

/// Largest list of files: as many as a runner looks at, with names that take six times the room in JSON.
const MOST_LIST: usize = 64 << 20;

/// Largest answer about its use.
const MOST_ACTIVITY: usize = 1 << 10;

/// Largest file, as the runner has it.
const MOST_FILE: usize = MAX_WORKSPACE_FILE_BYTES as usize;

/// How long a ticket of the server's own lasts: one save.
const TICKET_SECONDS: u64 = 600;

/// What stays as it is in a URL's path.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'.')
    .remove(b'-')
    .remove(b'_');

/// A file as the runner lists it.
#[derive(Debug, Deserialize)]
pub struct Listed {
    pub path: String,
    pub kind: String,
    pub size: u64,
    pub modified: i64,
    /// What is in the folder is nobody's work, and not listed.
    #[serde(default)]
    pub made: bool,
    /// The file can be run.
    #[serde(default)]
    pub executable: bool,
    /// What the symbolic link holds.
    #[serde(default)]
    pub link: Option<String>,
    /// Why it is left out.
    #[serde(default)]
    pub unkept: Option<String>,
    /// What is in the folder could not be looked at.
    #[serde(default)]
    pub closed: bool,
}

/// What came of reading a file.
pub enum Read {
    /// It is this.
    Whole(Vec<u8>),
    /// It is not there any more.
    Gone,
    /// It cannot be read.
    Refused(String),
}

/// A connection to a workspace's runner.
pub struct Runner {
    send: SendRequest<Empty<Bytes>>,
    ticket: String,
}

impl Runner {
    pub async fn dial(platform: &dyn Platform, repl: &ReplId) -> Result<Self, NotSaved> {
        let stream = platform.dial_runner(repl).await.map_err(NotSaved::Gone)?;
        Self::over(platform, repl, stream).await
    }

    /// Over this connection.
    pub async fn over(
        platform: &dyn Platform,
        repl: &ReplId,
        stream: Box<dyn ByteStream>,
    ) -> Result<Self, NotSaved> {
        let key = platform.ticket_key(repl).await.map_err(NotSaved::Gone)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let until = now.map_or(0, |now| now.as_secs()) + TICKET_SECONDS;
        let (send, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| cut(&error))?;
        // Its error comes out at the request.
        tokio::spawn(connection.with_upgrades());
        let ticket = key.issue(repl, until);
        Ok(Self { send, ticket })
    }

    /// Lends its program's installer a line: this connection.
    pub async fn lend(mut self) -> anyhow::Result<Box<dyn ByteStream>> {
        let request = self
            .request(LINE)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, LINE_PROTOCOL);
        let request = request.body(Empty::new())?;
        self.send.ready().await?;
        let answer = self.send.send_request(request).await?;
        let status = answer.status();
        anyhow::ensure!(
            status == StatusCode::SWITCHING_PROTOCOLS,
            "it answers {status}"
        );
        let line = hyper::upgrade::on(answer).await?;
        Ok(Box::new(TokioIo::new(line)))
    }

    fn request(&self, path: &str) -> request::Builder {
        Request::get(path)
            .header(header::HOST, "runner")
            .header(header::AUTHORIZATION, format!("Bearer {}", self.ticket))
    }

    /// What there is, and what is gone since the list of the number `done`; and this list's number. A
    /// runner of an image from before lists were numbered tells of nothing that is gone.
    pub async fn list(&mut self, done: u64) -> Result<(Vec<Listed>, u64), NotSaved> {
        let answer = self.get(&format!("/files?done={done}"), MOST_LIST).await?;
        let (headers, body) = answer.ok_or_else(|| cut(&"it lists no files"))?;
        let listed = serde_json::from_slice(&body).map_err(|error| cut(&error))?;
        Ok((listed, number(&headers, LISTING)))
    }

    /// Since when it was not used, and whether its program is up.
    pub async fn activity(&mut self) -> Result<Activity, NotSaved> {
        let answer = self.get("/activity", MOST_ACTIVITY).await?;
        let (_, body) = answer.ok_or_else(|| cut(&"it is of an image that does not tell"))?;
        serde_json::from_slice(&body).map_err(|error| cut(&error))
    }

    /// What was installed in the workspace and when, unless that is what was installed `done`.
    pub async fn packages(&mut self, done: u64) -> Result<Option<(u64, Bytes)>, NotSaved> {
        let path = format!("{PACKAGES}?done={done}");
        let answer = self.get(&path, MAX_BUILD_BYTES).await?;
        Ok(answer.map(|(headers, body)| (number(&headers, INSTALLED), body)))
    }

    /// The whole of a file.
    pub async fn read(&mut self, path: &RelativePath) -> Result<Read, NotSaved> {
        let path = utf8_percent_encode(path.as_str(), PLAIN);
        let (status, _, body) = self.ask(&format!("/files/{path}"), MOST_FILE).await?;
        Ok(match status {
            StatusCode::OK => Read::Whole(body.into()),
            StatusCode::NOT_FOUND => Read::Gone,
            _ => Read::Refused(String::from_utf8_lossy(&body).into_owned()),
        })
    }

    async fn get(
        &mut self,
        path: &str,
        most: usize,
    ) -> Result<Option<(HeaderMap, Bytes)>, NotSaved> {
        let (status, headers, body) = self.ask(path, most).await?;
        match status {
            StatusCode::OK => Ok(Some((headers, body))),
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(NotSaved::Failed(problem(&String::from_utf8_lossy(&body)))),
        }
    }

    async fn ask(
        &mut self,
        path: &str,
        most: usize,
    ) -> Result<(StatusCode, HeaderMap, Bytes), NotSaved> {
        let request = self
            .request(path)
            .body(Empty::new())
            .map_err(|error| cut(&error))?;
        let answer = async {
            self.send.ready().await.map_err(|error| cut(&error))?;
            let answer = self.send.send_request(request).await;
            let answer = answer.map_err(|error| cut(&error))?;
            let (status, headers) = (answer.status(), answer.headers().clone());
            let body = Limited::new(answer.into_body(), most).collect().await;
            let body = body.map_err(|error| cut(&error))?.to_bytes();
            Ok((status, headers, body))
        };
        let answered = timeout(ANSWER, answer).await;
        answered.unwrap_or_else(|_| Err(cut(&"it did not answer in time")))
    }
}

fn number(headers: &HeaderMap, name: &str) -> u64 {
    let text = headers.get(name).and_then(|value| value.to_str().ok());
    text.and_then(|text| text.parse().ok()).unwrap_or_default()
}

/// The runner went away in the middle.
fn cut(error: &impl ToString) -> NotSaved {
    NotSaved::Gone(PlatformError::Unavailable(problem(&error.to_string())))
}

pub fn problem(cause: &str) -> Problem {
    Problem::new(
        "not_saved",
        "The workspace could not be saved",
        cause,
        "Look at the repl's state and at the server's log; it is tried again by itself.",
    )
}
