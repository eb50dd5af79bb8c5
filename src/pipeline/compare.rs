//! Whether a program wrote what was expected, and where it did not.

use crate::model::{Compare, Tolerance};

/// Most characters shown of either output, from where they differ.
const MOST_SHOWN: usize = 40;

/// Where two outputs differ, in words; `None`: they count as the same.
pub fn difference(compare: Compare, expected: &str, actual: &str) -> Option<String> {
    let difference = match compare {
        Compare::Exact => exact(expected, actual),
        Compare::Trailing => trailing(expected, actual),
        Compare::Tokens => tokens(expected, actual, None),
        Compare::Floats(tolerance) => tokens(expected, actual, Some(tolerance)),
    };
    difference.map(|difference| difference.in_words())
}

/// The first place where two outputs differ, by what came out.
struct Difference<'a> {
    /// From 1, as editors count.
    line: usize,
    /// Characters from 1.
    column: usize,
    expected: Rest<'a>,
    found: Rest<'a>,
}

/// What one of the outputs has there.
enum Rest<'a> {
    Text(&'a str),
    EndOfLine,
    EndOfOutput,
}

impl<'a> Rest<'a> {
    fn of(text: &'a str, without: Self) -> Self {
        match text.is_empty() {
            true => without,
            false => Rest::Text(text),
        }
    }

    fn in_words(&self) -> String {
        match self {
            Rest::EndOfLine => "the end of the line".to_owned(),
            Rest::EndOfOutput => "the end of the output".to_owned(),
            Rest::Text(text) => match text.char_indices().nth(MOST_SHOWN) {
                None => format!("{text:?}"),
                Some((end, _)) => format!("{:?} and more", &text[..end]),
            },
        }
    }
}

impl Difference<'_> {
    fn in_words(&self) -> String {
        let Self { line, column, .. } = self;
        let (expected, found) = (self.expected.in_words(), self.found.in_words());
        format!(
            "stdout differs at line {line}, column {column}: expected {expected}, found {found}"
        )
    }
}

fn exact<'a>(expected: &'a str, actual: &'a str) -> Option<Difference<'a>> {
    if expected == actual {
        return None;
    }
    let at = common(expected, actual);
    let (line, column) = place(actual, at);
    Some(Difference {
        line,
        column,
        expected: Rest::of(&expected[at..], Rest::EndOfOutput),
        found: Rest::of(&actual[at..], Rest::EndOfOutput),
    })
}

fn trailing<'a>(expected: &'a str, actual: &'a str) -> Option<Difference<'a>> {
    let lines = |text: &'a str| text.trim_end().split('\n').map(str::trim_end);
    let (mut expected, mut actual) = (lines(expected), lines(actual));
    for line in 1.. {
        let (wanted, found) = (expected.next(), actual.next());
        let rest = |text: Option<&'a str>, at: usize| match text {
            None => Rest::EndOfOutput,
            Some(text) => Rest::of(&text[at..], Rest::EndOfLine),
        };
        match (wanted, found) {
            (None, None) => return None,
            (Some(wanted), Some(found)) if wanted == found => {}
            (wanted, found) => {
                let at = common(wanted.unwrap_or_default(), found.unwrap_or_default());
                return Some(Difference {
                    line,
                    column: found.map_or(1, |found| found[..at].chars().count() + 1),
                    expected: rest(wanted, at),
                    found: rest(found, at),
                });
            }
        }
    }
    None
}

fn tokens<'a>(
    expected: &'a str,
    actual: &'a str,
    tolerance: Option<Tolerance>,
) -> Option<Difference<'a>> {
    let (mut wanted, mut found) = (expected.split_whitespace(), actual.split_whitespace());
    loop {
        let (wanted, found) = match (wanted.next(), found.next()) {
            (None, None) => return None,
            (Some(wanted), Some(found)) if same(wanted, found, tolerance) => continue,
            other => other,
        };
        // Words are parts of the text that they were taken from.
        let at = found.map_or(actual.trim_end().len(), |word| {
            word.as_ptr() as usize - actual.as_ptr() as usize
        });
        let (line, column) = place(actual, at);
        let rest = |word: Option<&'a str>| word.map_or(Rest::EndOfOutput, Rest::Text);
        return Some(Difference {
            line,
            column,
            expected: rest(wanted),
            found: rest(found),
        });
    }
}

fn same(expected: &str, actual: &str, tolerance: Option<Tolerance>) -> bool {
    let number = |word: &str| word.parse::<f64>().ok().filter(|number| number.is_finite());
    expected == actual
        || tolerance.is_some_and(|tolerance| {
            let numbers = number(expected).zip(number(actual));
            numbers.is_some_and(|(expected, actual)| tolerance.allows(expected, actual))
        })
}

/// Bytes of the characters that both begin with.
fn common(one: &str, other: &str) -> usize {
    let mut pairs = one.char_indices().zip(other.chars());
    let differ = pairs.find(|((_, one), other)| one != other);
    differ.map_or(one.len().min(other.len()), |((at, _), _)| at)
}

/// The line and column of this place.
fn place(text: &str, at: usize) -> (usize, usize) {
    let before = &text[..at];
    let line_begins = before.rfind('\n').map_or(0, |end| end + 1);
    (
        before.matches('\n').count() + 1,
        before[line_begins..].chars().count() + 1,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use Compare::{Exact, Floats, Tokens, Trailing};

    use super::*;

    #[test]
    fn ends_of_lines_and_of_the_output_do_not_count_unless_asked_for() {
        for (expected, actual) in [
            ("3\n", "3"),
            ("3", "3\n\n \n"),
            ("a\nb\n", "a \t\r\nb\r\n"),
            ("", "\n"),
            ("a\n\nb", "a\n   \nb\n"),
        ] {
            for compare in [Trailing, Tokens] {
                assert_eq!(difference(compare, expected, actual), None, "{actual:?}");
                assert_eq!(difference(compare, actual, expected), None, "{actual:?}");
            }
            assert!(difference(Exact, expected, actual).is_some());
        }
        for (expected, actual) in [
            ("a b", "a  b"),
            ("a", " a"),
            ("a\nb", "a b"),
            ("a\nb", "a\n\nb"),
        ] {
            assert!(
                difference(Trailing, expected, actual).is_some(),
                "{actual:?}"
            );
            assert_eq!(difference(Tokens, expected, actual), None, "{actual:?}");
        }
    }

    #[test]
    fn numbers_may_differ_within_their_tolerance_only() {
        let floats = Floats(1e-6.try_into().unwrap());
        let same = |expected, actual| difference(floats, expected, actual).is_none();
        assert!(same("0.1 x", "0.10000000001   x\n"));
        assert!(same("1e9", "1000000000.5"), "relatively");
        assert!(same("0", "-1e-7"), "absolutely");
        assert!(!same("0.1", "0.10001"));
        assert!(!same("1 2", "1"));
        assert!(!same("x", "1"));
        assert!(same("nan", "nan") && !same("inf", "1e308"));
        assert!(difference(Tokens, "0.1", "0.10").is_some());
    }

    #[test]
    fn a_difference_says_where_it_is_and_what_is_there() {
        let said = |compare, expected, actual| difference(compare, expected, actual).unwrap();
        assert_eq!(
            said(Trailing, "a\nüx\n", "a\nüy z\n"),
            r#"stdout differs at line 2, column 2: expected "x", found "y z""#
        );
        assert_eq!(
            said(Trailing, "a\nb", "a"),
            r#"stdout differs at line 2, column 1: expected "b", found the end of the output"#
        );
        assert_eq!(
            said(Trailing, "a\nb", "a x\nb"),
            r#"stdout differs at line 1, column 2: expected the end of the line, found " x""#
        );
        assert_eq!(
            said(Exact, "a\r\nb", "a\nb"),
            r#"stdout differs at line 1, column 2: expected "\r\nb", found "\nb""#
        );
        assert_eq!(
            said(Exact, "a\n", "a"),
            r#"stdout differs at line 1, column 2: expected "\n", found the end of the output"#
        );
        assert_eq!(
            said(Tokens, "1 2 3", "1\n 2  4\n"),
            r#"stdout differs at line 2, column 5: expected "3", found "4""#
        );
        assert_eq!(
            said(Trailing, "", "\u{1b}[2J"),
            r#"stdout differs at line 1, column 1: expected the end of the line, found "\u{1b}[2J""#
        );
        let long = said(Trailing, &"x".repeat(1_000), "y");
        assert!(long.len() < 200 && long.contains("and more"), "{long}");
    }

    proptest::proptest! {
        #[test]
        fn any_two_outputs_can_be_compared(expected in "[ab \r\nü.1\u{85}]{0,12}", actual in "[ab \r\nü.1\u{85}]{0,12}") {
            for compare in [Exact, Trailing, Tokens, Floats(0.5.try_into().unwrap())] {
                proptest::prop_assert_eq!(difference(compare, &expected, &expected), None);
                // Neither may fail on a place inside a character.
                let _ = difference(compare, &expected, &actual);
                if expected.trim() != actual.trim() {
                    proptest::prop_assert!(difference(Exact, &expected, &actual).is_some());
                }
            }
        }
    }
}
