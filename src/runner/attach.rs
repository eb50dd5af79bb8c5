//! `gantry-runner attach`: joins standard input and output to the agent's socket. This is what a
//! kube exec starts, so that the stream of the exec is the agent's. It stops nothing but itself.
//!
//! Two threads that read and write, and no runtime: nothing stands between the end of a read and the
//! beginning of the write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use super::pod::SOCKET;

/// Bytes moved at once: four times what a pipe holds, so that a whole frame goes in one step.
const BLOCK: usize = 256 << 10;

/// Longest wait for an agent that is not up yet: the kubelet lets an exec in as soon as the container
/// runs, and the agent listens some milliseconds later.
const AGENT_PATIENCE: Duration = Duration::from_secs(10);

/// Pause between two tries.
const TRY_EVERY: Duration = Duration::from_millis(5);

/// Longest wait for the agent to hang up after its server has: it does so at once, and the other
/// end of this program's output is gone.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// `gantry-runner attach`.
pub fn main() -> anyhow::Result<()> {
    let socket = connect()?;
    let to_agent = socket.try_clone()?;
    thread::spawn(move || {
        let _ = pass(io::stdin().as_fd(), to_agent.as_fd());
        // The agent hears the end of the stream and closes its side, which ends the other thread.
        let _ = to_agent.shutdown(Shutdown::Write);
        thread::sleep(LAST_WORDS);
        std::process::exit(0)
    });
    // A closed output is the end of the exec: there is nobody left to be told.
    match pass(socket.as_fd(), io::stdout().as_fd()) {
        Err(error)
            if !matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) =>
        {
            anyhow::bail!(
                "the stream to the agent broke: {error}. The server connects again by itself"
            )
        }
        _ => Ok(()),
    }
}

fn connect() -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + AGENT_PATIENCE;
    loop {
        let error = match UnixStream::connect(SOCKET) {
            Ok(socket) => return Ok(socket),
            Err(error) => error,
        };
        match error.kind() {
            ErrorKind::PermissionDenied => anyhow::bail!(
                "{SOCKET} is the agent's own user's: {error}. Exec as the container's user"
            ),
            // Not there yet, or of an agent that ended and is being started again.
            ErrorKind::NotFound | ErrorKind::ConnectionRefused if Instant::now() < deadline => {
                thread::sleep(TRY_EVERY);
            }
            _ => anyhow::bail!(
                "no agent listens at {SOCKET}: {error}, for {} s. Is `gantry-runner agent` this container's \
                 first process? Its own words are in the container's log",
                AGENT_PATIENCE.as_secs()
            ),
        }
    }
}

/// Moves bytes until the end of `from`.
fn pass(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // Files without a buffer of their own, unlike the handles of the standard streams.
    let mut from = std::fs::File::from(from.try_clone_to_owned()?);
    let mut to = std::fs::File::from(to.try_clone_to_owned()?);
    let mut block = vec![0; BLOCK];
    loop {
        let length = match from.read(&mut block) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(block.get(..length).unwrap_or_default())?;
    }
}
