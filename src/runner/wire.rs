//! Frames between the server and a runner: a little-endian `u32` length, then postcard.
//!
//! The same frames on every platform. Each side says [`VERSION`] first; a side that speaks another
//! version is refused before anything else is read.

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncWrite, ReadHalf, WriteHalf};
use tokio_util::codec::{FramedRead, FramedWrite, LengthDelimitedCodec};

use crate::model::{Limits, OutputStream, RunReport, SubmissionId};

/// The header with the number of a runner's list of files.
pub const LISTING: &str = "x-gantry-listing";

/// Where a runner's port gives what was installed in a workspace, packed, and the header with when that was, by
/// which the server says the next time what it has: milliseconds of the Unix clock.
pub const PACKAGES: &str = "/packages";
/// See [`PACKAGES`].
pub const INSTALLED: &str = "x-gantry-installed";

/// Where a runner's port takes a line for its program's installer, and the protocol that it changes to:
/// [`FromRunner::Taken`], and then whatever the installer sends.
pub const LINE: &str = "/line";
/// See [`LINE`].
pub const LINE_PROTOCOL: &str = "gantry-line";

/// What a runner's port tells of its use, at `/activity`.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Activity {
    /// Milliseconds since somebody asked the program for something or had a terminal.
    pub unused_ms: u64,
    /// Its program has come to nothing yet.
    pub starting: bool,
}

/// The version of these frames. Raised when a frame changes shape.
pub const VERSION: u16 = 7;

/// Largest frame: a job carries at most 8 MiB of code, and its arguments and input beside it.
pub const MAX_FRAME_BYTES: usize = 12 << 20;

/// Largest archive of what a job built: a release has 256 MiB for everything, and the archive is there
/// beside its content.
pub const MAX_BUILD_BYTES: usize = 64 << 20;

/// The same unpacked: what a release has room for, beside the archive.
pub const MAX_UNPACKED_BYTES: u64 = 192 << 20;

/// Bytes of scratch space for installing and for compiling, each by itself. A web server of axum's with its test
/// takes 330 MiB.
pub const BUILD_SCRATCH_BYTES: u64 = 768 << 20;

/// Files and folders in it: what the packages of a usual page need, unpacked.
pub const BUILD_SCRATCH_FILES: u64 = 65_536;

/// What a line begins with that says which bound on its files a build met.
pub const DISK_SAID: &str = "Too large: ";

/// Bytes of a program's scratch space, beside what was installed and built for it.
pub fn scratch_bytes(maximum: &Limits) -> u64 {
    (4 * maximum.file_bytes).max(64 << 20)
}

/// One run, for all time: the submission and the run's number within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobId {
    /// The submission.
    pub submission: SubmissionId,
    /// Which of its runs, from 0.
    pub run: u32,
}

impl std::fmt::Display for JobId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.submission, self.run)
    }
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Starting the same id again never runs it twice.
    pub id: JobId,
    /// Files to put into the workspace, by relative path.
    pub files: Vec<(String, String)>,
    /// Command and arguments.
    pub argv: Vec<String>,
    /// Variables beside the sandbox's own.
    pub env: Vec<(String, String)>,
    /// Standard input to begin with.
    pub stdin: Vec<u8>,
    /// Whether more input may follow in [`ToRunner::Stdin`]; otherwise end of file follows `stdin`.
    pub stdin_open: bool,
    /// What it may use.
    pub limits: Limits,
    /// It reports its tests on a descriptor of its own. `{reporters}` in its command stands for the
    /// folder with what does that.
    pub report: bool,
    /// Make these folders in the workspace first, and keep what is in them when the job ends with exit
    /// code 0: what was built.
    pub output: Vec<String>,
    /// It installs or compiles: its scratch space is a build's, not a program's.
    pub builds: bool,
    /// Put what this job built into the workspace, beside the files.
    pub build: Option<JobId>,
    /// It may speak to whatever the server lends it lines to: see [`ToRunner::Lend`].
    pub online: bool,
    /// What it builds is the same whenever this is, and need not be built again.
    pub cache: Option<String>,
}

/// From the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToRunner {
    /// First frame.
    Hello {
        /// See [`VERSION`].
        version: u16,
    },
    /// Run this, unless it ran or runs already; then as [`ToRunner::Attach`] after 0.
    Start(Box<Job>),
    /// Send this job's events after `after`, and what follows.
    Attach {
        /// Which.
        job: JobId,
        /// The last sequence number the server has stored.
        after: u64,
    },
    /// More input.
    Stdin {
        /// For which job.
        job: JobId,
        /// Bytes of input frames before this one: what a runner has already is passed over, so that all of
        /// it can be sent again on a new connection.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// Nothing follows.
        eof: bool,
    },
    /// Kill its whole process tree.
    Cancel {
        /// Which.
        job: JobId,
    },
    /// Everything up to here is stored by the server and need not be kept.
    Ack {
        /// Which.
        job: JobId,
        /// The last sequence number stored.
        seq: u64,
    },
    /// Send what this job built.
    Fetch {
        /// Which.
        job: JobId,
    },
    /// The first frame on a connection of its own: it becomes one of this job's lines out, and carries
    /// whatever its program sends once it is [`FromRunner::Taken`].
    Lend {
        /// Which.
        job: JobId,
    },
    /// What this job built is not needed any more.
    Forget {
        /// Which.
        job: JobId,
    },
    /// Heartbeat.
    Ping,
    /// End every job and the runner itself.
    Shutdown,
}

/// From the runner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromRunner {
    /// First frame.
    Hello {
        /// See [`VERSION`].
        version: u16,
    },
    /// Something happened to a job.
    Event {
        /// Which.
        job: JobId,
        /// From 1 without gaps, per job.
        seq: u64,
        /// What.
        event: JobEvent,
    },
    /// The runner does not have this job (any more).
    Unknown {
        /// Which.
        job: JobId,
    },
    /// A piece of what a job built, in order.
    Build {
        /// Which.
        job: JobId,
        /// The next bytes of the archive.
        data: Vec<u8>,
        /// Nothing follows.
        last: bool,
    },
    /// The runner does not have what this job built (any more).
    NoBuild {
        /// Which.
        job: JobId,
    },
    /// A program speaks on this line from here on.
    Taken,
    /// Answer to a heartbeat.
    Pong,
}

/// What happens to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobEvent {
    /// It wrote something.
    Output {
        /// Where to.
        stream: OutputStream,
        /// What.
        data: Vec<u8>,
    },
    /// It ended; nothing follows.
    Ended(RunReport),
}

/// Why frames could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The stream ended or broke. Never a result.
    #[error("the connection was lost: {0}")]
    Lost(std::io::Error),
    /// The stream ended between two frames.
    #[error("the connection was closed by the other side")]
    Closed,
    /// A frame that is not one of these.
    #[error("a frame could not be read: {0}")]
    Malformed(postcard::Error),
    /// The other side speaks another version.
    #[error("the other side speaks version {theirs} of the runner's frames, this one {VERSION}")]
    Version {
        /// What it said.
        theirs: u16,
    },
}

fn codec() -> LengthDelimitedCodec {
    LengthDelimitedCodec::builder()
        .little_endian()
        .length_field_length(4)
        .max_frame_length(MAX_FRAME_BYTES)
        .new_codec()
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<S>(FramedRead<ReadHalf<S>, LengthDelimitedCodec>);

/// Writes frames.
#[derive(Debug)]
pub struct FrameWriter<S>(FramedWrite<WriteHalf<S>, LengthDelimitedCodec>);

/// Both directions of one stream.
pub fn frames<S: AsyncRead + AsyncWrite>(stream: S) -> (FrameReader<S>, FrameWriter<S>) {
    let (read, write) = tokio::io::split(stream);
    (
        FrameReader(FramedRead::new(read, codec())),
        FrameWriter(FramedWrite::new(write, codec())),
    )
}

/// The stream itself again, and what was read of it beyond the last frame.
pub fn raw<S: AsyncRead + AsyncWrite + Unpin>(
    reader: FrameReader<S>,
    writer: FrameWriter<S>,
) -> (S, Vec<u8>) {
    let parts = reader.0.into_parts();
    let stream = parts.io.unsplit(writer.0.into_inner());
    (stream, parts.read_buf.to_vec())
}

impl<S: AsyncRead + AsyncWrite> FrameReader<S> {
    /// The next frame. Safe to drop and call again: no bytes are lost.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<T, WireError> {
        let frame: BytesMut = match self.0.next().await {
            None => return Err(WireError::Closed),
            Some(Err(error)) => return Err(WireError::Lost(error)),
            Some(Ok(frame)) => frame,
        };
        postcard::from_bytes(&frame).map_err(WireError::Malformed)
    }
}

impl<S: AsyncRead + AsyncWrite> FrameWriter<S> {
    /// Writes one frame and flushes it.
    pub async fn send<T: Serialize>(&mut self, frame: &T) -> Result<(), WireError> {
        self.send_all(std::slice::from_ref(frame)).await
    }

    /// Writes these frames, then flushes them: every hop on the way sees them together.
    pub async fn send_all<T: Serialize>(&mut self, frames: &[T]) -> Result<(), WireError> {
        for frame in frames {
            let bytes = postcard::to_stdvec(frame).map_err(WireError::Malformed)?;
            self.0
                .feed(Bytes::from(bytes))
                .await
                .map_err(WireError::Lost)?;
        }
        SinkExt::<Bytes>::flush(&mut self.0)
            .await
            .map_err(WireError::Lost)
    }
}

/// First byte of a connection to a released program's runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppPort {
    /// [`FromApp`] frames follow. When this connection ends, so does the program: its server is gone.
    Control,
    /// Bytes to and from the program's own port.
    Program,
    /// Bytes to and from the runner's own port.
    Runner,
}

impl AppPort {
    /// The byte.
    pub fn byte(self) -> u8 {
        match self {
            AppPort::Control => b'C',
            AppPort::Program => b'P',
            AppPort::Runner => b'R',
        }
    }

    /// The port of this byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'C' => Some(AppPort::Control),
            b'P' => Some(AppPort::Program),
            b'R' => Some(AppPort::Runner),
            _ => None,
        }
    }
}

/// To a released program's runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToApp {
    /// End the program and the runner.
    End {
        /// How long the program has to end after SIGTERM, before SIGKILL.
        patience_ms: u64,
        /// Before SIGTERM, wait as long for answers to requests that it has.
        drain: bool,
    },
}

/// What a released program does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromApp {
    /// It was started, for the `restarts + 1`-th time.
    Started {
        /// Times it was started again.
        restarts: u32,
    },
    /// It serves: it listens, or is a worker that runs.
    Serving,
    /// It wrote something.
    Output {
        /// Where to.
        stream: OutputStream,
        /// What.
        data: Vec<u8>,
    },
    /// It ended.
    Ended {
        /// How.
        ending: crate::model::Ending,
        /// Whether it will be started again.
        again: bool,
        /// Why it was stopped, when it did not come to serve.
        unready: Option<String>,
    },
    /// It wrote this much more before what follows, which is lost: whoever watches did not keep up.
    Lost {
        /// Bytes.
        bytes: u64,
    },
}
