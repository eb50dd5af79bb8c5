//! Replies so large that no reader holds one whole: they go from the disk to the client in pieces.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::stream::{self, Stream};

use super::frame::{self, Outline, REPLY_TAG};
use super::{JournalError, blocking};
use crate::model::{Event, Record};

/// A reply whose frame is longer than this is read in pieces. Usual replies are far smaller: what is
/// shown live comes from memory and costs no read.
pub(super) const LARGE: usize = 256 << 10;
/// Bytes of one piece: what a reader that does not go on holds.
const PIECE: u64 = 64 << 10;

/// Something of a submission.
#[derive(Debug)]
pub enum Item {
    /// A record.
    Record(Box<Record>),
    /// A large reply.
    Large(LargeReply),
}

impl Item {
    /// Whether nothing follows it.
    pub fn ends(&self) -> bool {
        match self {
            Item::Record(record) => matches!(record.event, Event::Reply(_)),
            Item::Large(_) => true,
        }
    }

    pub(super) fn seq(&self) -> Option<u64> {
        match self {
            Item::Record(record) => record.seq,
            Item::Large(reply) => reply.seq,
        }
    }

    /// Its place in the journal.
    pub fn position(&self) -> u64 {
        match self {
            Item::Record(record) => record.position,
            Item::Large(reply) => reply.position,
        }
    }
}

/// A reply on the disk.
#[derive(Debug)]
pub struct LargeReply {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) seq: Option<u64>,
    pub(super) position: u64,
    pub(super) outline: Outline,
}

/// How far the pieces of a reply are.
struct Reading {
    reply: Arc<LargeReply>,
    at: u64,
    sum: crc32fast::Hasher,
    done: bool,
}

impl LargeReply {
    /// The reply as it is sent, piece by piece. What was found damaged at its end ends in an error:
    /// the pieces before it are then no reply.
    pub fn pieces(self) -> impl Stream<Item = Result<Vec<u8>, JournalError>> + Send + 'static {
        let reading = Reading {
            at: self.outline.json.start,
            reply: Arc::new(self),
            sum: crc32fast::Hasher::new(),
            done: false,
        };
        stream::unfold(reading, |mut reading| async move {
            if reading.done {
                return None;
            }
            let piece = reading.next().await;
            reading.done |= piece.is_err();
            Some((piece, reading))
        })
    }
}

impl Reading {
    async fn next(&mut self) -> Result<Vec<u8>, JournalError> {
        let range = self.reply.outline.json.clone();
        let (from, to) = (self.at, range.end.min(self.at + PIECE));
        let reply = Arc::clone(&self.reply);
        let read = move || {
            let mut bytes = vec![0; (to - from) as usize];
            let done = reply.file.read_exact_at(&mut bytes, from);
            done.map_err(|e| JournalError::io("read", &reply.path, e))?;
            Ok(bytes)
        };
        let mut bytes = blocking(read).await?;
        self.sum.update(&bytes);
        self.at = to;
        if to == range.end {
            self.done = true;
            if !self.reply.outline.is_whole(self.sum.clone()) {
                let cause = "a frame's checksum does not match its bytes".to_owned();
                return Err(JournalError::damaged_segment(&self.reply.path, from, cause));
            }
            bytes.pop();
            if let Some(seq) = self.reply.seq {
                bytes.extend_from_slice(format!(",\"seq\":{seq}").as_bytes());
            }
            bytes.push(b'}');
        }
        if from == range.start {
            let members = frame::without_tag(&bytes, REPLY_TAG);
            bytes = [b"{".as_slice(), members].concat();
        }
        Ok(bytes)
    }
}
