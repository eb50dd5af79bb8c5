//! Bytes of a program's output as text, chunk by chunk.

/// Decodes UTF-8 that comes in pieces: a character cut in two is put together again, and bytes that
/// are not UTF-8 become U+FFFD.
#[derive(Debug, Default)]
pub struct TextDecoder {
    rest: Vec<u8>,
}

impl TextDecoder {
    /// The text of this piece, without a character whose end is still to come.
    pub fn decode(&mut self, piece: &[u8]) -> String {
        self.rest.extend_from_slice(piece);
        let keep = incomplete_tail(&self.rest);
        let tail = self.rest.split_off(self.rest.len() - keep);
        let whole = std::mem::replace(&mut self.rest, tail);
        match String::from_utf8(whole) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        }
    }

    /// Whether everything it was given has come out.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// What is left when nothing follows.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.rest)).into_owned()
    }
}

/// Bytes at the end that may be the start of a character.
fn incomplete_tail(bytes: &[u8]) -> usize {
    for back in 1..=bytes.len().min(3) {
        let byte = bytes[bytes.len() - back];
        let length = match byte {
            0b1100_0000..=0b1101_1111 => 2,
            0b1110_0000..=0b1110_1111 => 3,
            0b1111_0000..=0b1111_0111 => 4,
            0b1000_0000..=0b1011_1111 => continue,
            _ => return 0,
        };
        return if length > back { back } else { 0 };
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_make_the_same_text_as_the_whole(text in ".*", cuts in proptest::collection::vec(0usize..200, 0..10)) {
            let bytes = text.as_bytes();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.sort_unstable();
            let mut decoder = TextDecoder::default();
            let (mut out, mut from) = (String::new(), 0);
            for cut in cuts {
                out.push_str(&decoder.decode(&bytes[from..cut]));
                from = cut;
            }
            out.push_str(&decoder.decode(&bytes[from..]));
            out.push_str(&decoder.finish());
            prop_assert_eq!(out, text);
        }

        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut decoder = TextDecoder::default();
            let mut out = decoder.decode(&bytes);
            out.push_str(&decoder.finish());
            prop_assert!(out.len() <= bytes.len() * 3);
        }
    }
}
