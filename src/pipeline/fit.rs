//! Texts cut to what one record of the journal, and so one frame, can hold: 64 MiB of JSON, in
//! which a control character takes six bytes.

/// Most bytes of a reply's stdout and stderr together, as JSON. With [`MAX_ACTUAL`] and
/// [`MAX_SAID`] for each of 500 tests and what they expected, a reply stays below the journal's bound.
const MAX_OUTPUT: usize = 36 << 20;

/// Most bytes of what one test wrote, as JSON: enough to see where it went wrong.
pub const MAX_ACTUAL: usize = 48 << 10;

/// Most bytes of the end of one stream of a failed test's run, as JSON: enough for the last words.
pub const MAX_SAID: usize = 2 << 10;

/// Most bytes that a byte of UTF-8 can take as JSON.
const LARGEST_ESCAPE: usize = 6;

/// The beginning of a text that takes at most this many bytes as JSON.
pub fn cut(text: &str, room: usize) -> &str {
    if text.len().saturating_mul(LARGEST_ESCAPE) <= room {
        return text;
    }
    let mut left = room;
    for (at, character) in text.char_indices() {
        match left.checked_sub(size(character)) {
            Some(rest) => left = rest,
            None => return text.get(..at).unwrap_or_default(),
        }
    }
    text
}

/// The end of a text that takes at most this many bytes as JSON.
pub fn end_within(text: &str, room: usize) -> &str {
    let mut left = room;
    for (at, character) in text.char_indices().rev() {
        match left.checked_sub(size(character)) {
            Some(rest) => left = rest,
            None => return text.get(at + character.len_utf8()..).unwrap_or_default(),
        }
    }
    text
}

/// Cuts a reply's outputs to what it can hold. Each gets half, and what the other leaves. `true`
/// when something was cut.
pub fn cut_outputs(stdout: &mut String, stderr: &mut String) -> bool {
    let half = MAX_OUTPUT / 2;
    let taken = |text: &str| {
        let within = cut(text, half);
        if within.len() < text.len() {
            half
        } else {
            within.chars().map(size).sum()
        }
    };
    let rooms = [MAX_OUTPUT - taken(stderr), MAX_OUTPUT - taken(stdout)];
    let mut was_cut = false;
    for (text, room) in [stdout, stderr].into_iter().zip(rooms) {
        let keep = cut(text, room).len();
        was_cut |= keep < text.len();
        text.truncate(keep);
    }
    was_cut
}

/// Bytes of a character as JSON.
fn size(character: char) -> usize {
    match character {
        '"' | '\\' | '\u{8}' | '\t' | '\n' | '\u{c}' | '\r' => 2,
        '\0'..='\u{1f}' => LARGEST_ESCAPE,
        other => other.len_utf8(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn json(text: &str) -> usize {
        serde_json::to_string(text).unwrap().len() - 2
    }

    proptest::proptest! {
        #[test]
        fn what_is_kept_fits_and_no_more_would(text in "[\\x00-\\x7f\u{80}-\u{ffff}]{0,40}", room in 0_usize..120) {
            let end = end_within(&text, room);
            proptest::prop_assert!(text.ends_with(end) && json(end) <= room);
            if let Some(before) = text[..text.len() - end.len()].chars().next_back() {
                let more = format!("{before}{end}");
                proptest::prop_assert!(json(&more) > room);
            }
            let kept = cut(&text, room);
            proptest::prop_assert!(text.starts_with(kept) && json(kept) <= room);
            if let Some(next) = text[kept.len()..].chars().next() {
                let more = format!("{kept}{next}");
                proptest::prop_assert!(json(&more) > room);
            }
        }
    }

    #[test]
    fn each_output_gets_half_and_what_the_other_leaves() {
        let long = "\u{1}".repeat(16 << 20);
        let cases = [
            ("short", "short", false),
            (&long, "short", true),
            ("short", &long, true),
            (&long, &long, true),
        ];
        for (stdout, stderr, expected) in cases {
            let (mut out, mut err) = (stdout.to_owned(), stderr.to_owned());
            assert_eq!(cut_outputs(&mut out, &mut err), expected);
            let sizes = [json(&out), json(&err)];
            assert!(sizes.iter().sum::<usize>() <= MAX_OUTPUT, "{sizes:?}");
            assert!(!expected || sizes.iter().sum::<usize>() > MAX_OUTPUT - 12);
            assert!(stdout.len() > 9 || out == stdout);
            assert!(stderr.len() > 9 || err == stderr);
        }
    }
}
