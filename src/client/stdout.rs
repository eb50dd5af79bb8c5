//! Standard output as data: whole writes, and a reader that went away is not an error.

use std::io::{self, Write};

use super::failure::{Exit, Failure};
use crate::model::Problem;

/// Whether anybody still reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    Listening,
    /// `| head` has what it wanted.
    Gone,
}

/// Writes and flushes: what was written must be visible at once, also through a pipe.
pub(super) fn write(bytes: &[u8]) -> Result<Reader, Failure> {
    write_to(&mut io::stdout().lock(), bytes)
}

fn write_to(out: &mut impl Write, bytes: &[u8]) -> Result<Reader, Failure> {
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listening),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Failure::new(
            Exit::Failed,
            Problem::new(
                "output",
                "standard output cannot be written",
                error.to_string(),
                "Check where the output goes to: a full disk, a closed descriptor?",
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Broken(io::ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_pipe_is_a_quiet_end_and_a_full_disk_is_not() {
        let gone = write_to(&mut Broken(io::ErrorKind::BrokenPipe), b"x").unwrap();
        assert_eq!(gone, Reader::Gone);
        let full = write_to(&mut Broken(io::ErrorKind::StorageFull), b"x").unwrap_err();
        assert_eq!(full.exit, Exit::Failed);
    }
}
