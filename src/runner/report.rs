//! A test runner's report, on a descriptor of its own. Not a file: a program finds a file by its
//! name, and a socket cannot be opened again through `/proc`.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Files that jobs can read: what runs pytest and reports its tests, and what reports those of Node's
/// own runner.
pub const REPORTERS: [(&str, &str); 2] = [
    ("report_python.py", include_str!("report_python.py")),
    ("report_node.mjs", include_str!("report_node.mjs")),
];

/// What stands for the reporters' folder in a job's command.
const FOLDER_WORD: &str = "{reporters}";

/// The descriptor that a reporter writes to.
const DESCRIPTOR: i32 = 3;

/// Largest report: 2,000 tests with short messages fit, or 120 with the longest ones.
const MAX_BYTES: usize = 1 << 20;

/// Bytes that are read and dropped at a time, once the report is too long.
const DROPPED_BYTES: usize = 64 << 10;

/// What a line of the report becomes that its reporter did not write.
const FOREIGN: &str = "{\"foreign\":true}\n";

/// A job's command, which knows where the reporters are.
pub fn with_folder(argv: &[String], folder: &Path) -> Vec<String> {
    let folder = folder.to_string_lossy();
    argv.iter()
        .map(|part| part.replace(FOLDER_WORD, &folder))
        .collect()
}

/// The runner's end of a report.
#[derive(Debug)]
pub struct Report {
    stream: UnixStream,
    /// What every line begins with.
    word: String,
}

impl Report {
    /// A new one, whose other end the command gets.
    pub fn of(command: &mut Command) -> anyhow::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random)
            .map_err(|error| anyhow::anyhow!("no random number: {error}"))?;
        let word = random.iter().map(|byte| format!("{byte:02x}")).collect();
        give(command, theirs);
        let stream = UnixStream::from_std(std::os::unix::net::UnixStream::from(ours))?;
        Ok(Self { stream, word })
    }

    /// All of it, once every process that could write to it has ended.
    pub async fn read(mut self) -> String {
        let mut bytes = Vec::with_capacity(DROPPED_BYTES);
        // What does not fit is dropped, so that the end is missing; the writer is not held up. Reads are as large
        // as the room in the vector.
        let mut dropped = Vec::with_capacity(DROPPED_BYTES);
        let begun = format!("{}\n", self.word);
        if self.stream.write_all(begun.as_bytes()).await.is_ok() {
            loop {
                let room = bytes.len() < MAX_BYTES;
                let read = if room { &mut bytes } else { &mut dropped };
                match self.stream.read_buf(read).await {
                    Ok(0) | Err(_) => break,
                    Ok(_) => dropped.clear(),
                }
            }
        }
        own_lines(&bytes, &self.word)
    }
}

/// The lines that begin with the word, without it. The first other one ends the report, and one that
/// is not whole does not count.
fn own_lines(bytes: &[u8], word: &str) -> String {
    let mut text = String::new();
    let bytes = String::from_utf8_lossy(bytes);
    for line in bytes
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'))
    {
        let own = line.strip_prefix(word);
        match own.and_then(|rest| rest.strip_prefix(' ')) {
            Some(rest) => text.push_str(rest),
            None => {
                text.push_str(FOREIGN);
                break;
            }
        }
    }
    text
}

/// Gives the descriptor to what the command starts, under its number.
fn give(command: &mut Command, theirs: OwnedFd) {
    // SAFETY: dup2 and fcntl are async-signal-safe and the descriptor lives in the closure.
    unsafe {
        command.pre_exec(move || {
            if libc::dup2(theirs.as_raw_fd(), DESCRIPTOR) < 0 {
                return Err(io::Error::last_os_error());
            }
            // dup2 onto itself leaves close-on-exec as it was.
            if libc::fcntl(DESCRIPTOR, libc::F_SETFD, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    async fn reported(script: &str) -> String {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let report = Report::of(&mut command).unwrap();
        let mut child = command.spawn().unwrap();
        // Its end of the descriptor goes with it.
        drop(command);
        let text = report.read().await;
        child.wait().unwrap();
        text
    }

    #[tokio::test]
    async fn only_lines_with_the_runs_word_are_taken() {
        let own = "read word <&3; echo \"$word {}\" >&3; echo \"$word []\" >&3";
        assert_eq!(reported(own).await, "{}\n[]\n");
        let guessed = "read word <&3; echo \"$word {}\" >&3; echo 'guess []' >&3";
        assert_eq!(reported(guessed).await, format!("{{}}\n{FOREIGN}"));
        assert_eq!(reported("exit 0").await, "");
    }

    #[tokio::test]
    async fn a_report_that_is_too_long_holds_nobody_up_and_has_no_end() {
        let long = "read word <&3; yes \"$word x\" | head -c 5000000 >&3; echo \"$word end\" >&3";
        let text = reported(long).await;
        assert!(text.len() <= 2 * MAX_BYTES && !text.contains("end"));
    }

    #[tokio::test]
    async fn the_descriptor_cannot_be_opened_again_by_its_name() {
        let again = "exec 4>/proc/self/fd/3 || exit 9";
        assert_eq!(reported(again).await, "");
    }
}
