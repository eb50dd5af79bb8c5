//! Text that comes, or is cut, in pieces of bytes: no letter of it is broken in two.

use std::collections::VecDeque;

/// Bytes of the longest letter in UTF-8.
const LONGEST: usize = 4;

/// Takes away what is left of a letter at the beginning of a text that was cut there.
pub fn begin_with_a_letter(text: &mut VecDeque<u8>) {
    let continues = |byte: &&u8| **byte & 0b1100_0000 == 0b1000_0000;
    let cut = text.iter().take(LONGEST - 1).take_while(continues).count();
    text.drain(..cut);
}

/// The length of a text without the beginning of a last letter whose end has not come. Bytes that are no text
/// are not waited for.
pub fn whole_letters(text: &[u8]) -> usize {
    let mut last = text.len().saturating_sub(LONGEST - 1)..text.len();
    let begins = |at: &usize| text[*at] & 0b1100_0000 == 0b1100_0000;
    let Some(at) = last.rfind(begins) else {
        return text.len();
    };
    match std::str::from_utf8(&text[at..]) {
        // An error without a length is an end that has not come.
        Err(error) if error.valid_up_to() == 0 && error.error_len().is_none() => at,
        _ => text.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_that_has_not_come_whole_is_kept_back() {
        for (text, expected) in [
            (&b"a\xe8\xaa"[..], 1),
            (b"a\xf0\x9f\x98", 1),
            (b"a\xe8\xaa\x9e", 4),
            (b"\xff\xfe", 2),
            (b"\xe8a", 2),
            (b"\x80\x80\x80\x80", 4),
            (b"", 0),
        ] {
            assert_eq!(whole_letters(text), expected, "{text:?}");
        }
    }

    #[test]
    fn a_text_that_was_cut_begins_with_a_letter() {
        let mut kept = VecDeque::from(b"\xaa\x9e\xe8\xaa\x9e".to_vec());
        begin_with_a_letter(&mut kept);
        assert_eq!(kept, "語".as_bytes());
        let mut no_text = VecDeque::from(vec![0x80; 9]);
        begin_with_a_letter(&mut no_text);
        assert_eq!(no_text.len(), 6);
    }
}
