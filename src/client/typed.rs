//! What comes in on this command's standard input while a program runs.

use std::io::{self, Read};

use tokio::sync::mpsc;

/// Most bytes of one piece: a frame with it is far below what the server takes.
pub(super) const PIECE: usize = 16 << 10;

/// Pieces that are read while earlier ones wait to be sent.
const AHEAD: usize = 4;

/// A piece of text; `None`: nothing follows.
pub(super) type Typed = Option<String>;

/// Reads it piece by piece, as it comes, in a thread of its own: such a read cannot be given up, and the end of
/// the command does not wait for it.
pub(super) fn read() -> mpsc::Receiver<Typed> {
    let (tell, told) = mpsc::channel(AHEAD);
    std::thread::spawn(move || pass_on(io::stdin(), &tell));
    told
}

fn pass_on(mut source: impl Read, tell: &mpsc::Sender<Typed>) {
    let mut bytes = vec![0; PIECE];
    let mut begun = 0;
    loop {
        let length = match source.read(bytes.get_mut(begun..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(length) => begun + length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // As good as its end: nothing more can be read.
            Err(_) => break,
        };
        let whole = whole_characters(&bytes[..length]);
        let text = String::from_utf8_lossy(&bytes[..whole]).into_owned();
        if !text.is_empty() && tell.blocking_send(Some(text)).is_err() {
            return;
        }
        bytes.copy_within(whole..length, 0);
        begun = length - whole;
    }
    if begun > 0 {
        let rest = String::from_utf8_lossy(&bytes[..begun]).into_owned();
        let _ = tell.blocking_send(Some(rest));
    }
    let _ = tell.blocking_send(None);
}

/// Bytes up to a character that is cut in two at the end.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => error.valid_up_to(),
        // What is wrong in between becomes replacement characters.
        Err(_) | Ok(_) => match bytes.utf8_chunks().last() {
            Some(last) if last.invalid().len() < 4 && cut_in_two(last.invalid()) => {
                bytes.len() - last.invalid().len()
            }
            _ => bytes.len(),
        },
    }
}

/// Whether more bytes could make a character of these.
fn cut_in_two(bytes: &[u8]) -> bool {
    let error = std::str::from_utf8(bytes).err();
    !bytes.is_empty() && error.is_some_and(|error| error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Gives a few bytes at a time.
    struct Slow(Vec<u8>, usize);

    impl Read for Slow {
        fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
            let length = self.1.min(self.0.len()).min(to.len());
            to[..length].copy_from_slice(&self.0[..length]);
            self.0.drain(..length);
            Ok(length)
        }
    }

    #[test]
    fn what_is_typed_arrives_whole_however_it_is_cut() {
        let text = "aü€\u{1f600}\n".repeat(50);
        for piece in [1, 2, 3, 5, 7, 4_096] {
            let (tell, mut told) = mpsc::channel(1_000);
            pass_on(Slow(text.clone().into_bytes(), piece), &tell);
            let mut all = String::new();
            while let Some(piece) = told.try_recv().unwrap() {
                all.push_str(&piece);
            }
            assert_eq!(all, text, "in pieces of {piece}");
        }
        let (tell, mut told) = mpsc::channel(9);
        pass_on(&b"a\xff\xc3"[..], &tell);
        let mut all = String::new();
        while let Some(piece) = told.try_recv().unwrap() {
            all.push_str(&piece);
        }
        assert_eq!(all, "a\u{fffd}\u{fffd}");
    }
}
