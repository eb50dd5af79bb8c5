//! What is said over the runner's WebSocket. Texts are JSON; a terminal's bytes are binary frames: one byte
//! with the length of its name, its name, its bytes, both ways.

use bytes::Bytes;
use serde::Deserialize;

use crate::model::RelativePath;

/// A request; its answer carries the same `id`.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The client's own number.
    pub id: u64,
    /// What is asked for.
    #[serde(flatten)]
    pub ask: Ask,
}

/// What is left of a request that makes no sense.
#[derive(Debug, Deserialize)]
pub struct Numbered {
    /// The client's own number.
    pub id: u64,
}

/// What can be asked for.
#[derive(Debug, Deserialize)]
#[serde(tag = "op")]
pub enum Ask {
    /// Look at a terminal, made when it is not there; first comes what it showed before.
    #[serde(rename = "terminal.open")]
    Open {
        /// Its name.
        terminal: String,
        /// Columns.
        #[serde(default = "columns")]
        cols: u16,
        /// Rows.
        #[serde(default = "rows")]
        rows: u16,
    },
    /// The window has another size.
    #[serde(rename = "terminal.resize")]
    Resize {
        /// Its name.
        terminal: String,
        /// Columns.
        cols: u16,
        /// Rows.
        rows: u16,
    },
    /// End the terminal.
    #[serde(rename = "terminal.close")]
    Close {
        /// Its name.
        terminal: String,
    },
    /// The terminals there are.
    #[serde(rename = "terminal.list")]
    List,
    /// Everything there is.
    #[serde(rename = "files.tree")]
    Tree,
    /// A piece of a file.
    #[serde(rename = "files.read")]
    Read {
        /// Which.
        path: RelativePath,
        /// From where.
        #[serde(default)]
        offset: u64,
    },
    /// A piece of a file to write; large ones come in several.
    #[serde(rename = "files.write")]
    Write {
        /// Which.
        path: RelativePath,
        /// The piece, as text.
        #[serde(default)]
        text: Option<String>,
        /// The piece, as bytes.
        #[serde(default)]
        base64: Option<String>,
        /// Where it belongs.
        #[serde(default)]
        offset: u64,
        /// More pieces follow.
        #[serde(default)]
        more: bool,
    },
    /// Make a folder.
    #[serde(rename = "files.make")]
    Make {
        /// Which.
        path: RelativePath,
    },
    /// Move to where nothing stands.
    #[serde(rename = "files.rename")]
    Rename {
        /// From.
        path: RelativePath,
        /// To.
        to: RelativePath,
    },
    /// Remove, with all that is in it.
    #[serde(rename = "files.delete")]
    Delete {
        /// Which.
        path: RelativePath,
    },
    /// Tell of changes, or no more.
    #[serde(rename = "files.watch")]
    Watch {
        /// Whether.
        on: bool,
    },
    /// Start the program, unless it runs.
    #[serde(rename = "program.run")]
    Run,
    /// End the program and start it again.
    #[serde(rename = "program.restart")]
    Restart,
    /// End the program.
    #[serde(rename = "program.stop")]
    Stop,
    /// What the program does, and what it printed last.
    #[serde(rename = "program.state")]
    State,
}

fn columns() -> u16 {
    80
}

fn rows() -> u16 {
    24
}

/// A terminal's bytes as a binary frame.
pub fn frame(terminal: &str, data: &[u8]) -> Bytes {
    let mut frame = Vec::with_capacity(1 + terminal.len() + data.len());
    frame.push(u8::try_from(terminal.len()).unwrap_or(u8::MAX));
    frame.extend_from_slice(terminal.as_bytes());
    frame.extend_from_slice(data);
    frame.into()
}

/// A binary frame's terminal and bytes.
pub fn unframe(frame: Bytes) -> Option<(String, Bytes)> {
    let length = usize::from(*frame.first()?);
    let name = std::str::from_utf8(frame.get(1..1 + length)?)
        .ok()?
        .to_owned();
    Some((name, frame.slice(1 + length..)))
}

/// Whether a terminal may be called so.
pub fn is_name(name: &str) -> bool {
    (1..=32).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}
