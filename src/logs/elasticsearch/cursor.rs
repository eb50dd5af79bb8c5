//! A place among the records of several servers.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use crate::model::FieldError;

/// Servers whose records meet in one cluster: more names in a cursor are not from here.
const MAX_JOURNALS: usize = 256;

/// Up to which position each journal was seen. One number would not do: another server's records
/// arrive when they arrive, also behind newer ones of this server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::logs) struct Cursor(BTreeMap<String, u64>);

impl Cursor {
    /// The position in this journal; 0 when nothing of it was seen.
    pub(in crate::logs) fn of(&self, journal: &str) -> u64 {
        self.0.get(journal).copied().unwrap_or(0)
    }

    pub(in crate::logs) fn set(&mut self, journal: &str, position: u64) {
        self.0.insert(journal.to_owned(), position);
    }

    /// Goes on to a later place in each journal.
    pub(super) fn advance_to(&mut self, other: &Cursor) {
        for (journal, position) in other.iter() {
            let at = self.0.entry(journal.to_owned()).or_insert(0);
            *at = (*at).max(position);
        }
    }

    /// Whether something of this journal was seen.
    pub(super) fn knows(&self, journal: &str) -> bool {
        self.0.contains_key(journal)
    }

    /// Begins at these places in journals of which nothing was seen.
    pub(super) fn begin_at(&mut self, other: &Cursor) {
        for (journal, position) in other.iter() {
            self.0.entry(journal.to_owned()).or_insert(position);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(journal, at)| (journal.as_str(), *at))
    }

    /// Without this journal.
    pub(super) fn without(mut self, journal: &str) -> Self {
        self.0.remove(journal);
        self
    }

    /// What a client gave back; `field` names it when it is wrong.
    pub(in crate::logs) fn parse(
        field: &str,
        text: Option<String>,
    ) -> Result<Option<Self>, FieldError> {
        let parsed = text.map(|text| text.parse::<Self>()).transpose();
        parsed.map_err(|()| FieldError::new(field, "must be a `next` of an earlier answer"))
    }
}

/// Whether this can be a journal's name.
pub(super) fn is_journal(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_hexdigit())
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (journal, position)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{journal}:{position}")?;
        }
        Ok(())
    }
}

impl FromStr for Cursor {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut cursor = Self::default();
        for part in text.split(',') {
            let (journal, position) = part.split_once(':').ok_or(())?;
            let position: u64 = position.parse().map_err(|_| ())?;
            if !is_journal(journal) || position > i64::MAX as u64 || cursor.0.len() == MAX_JOURNALS
            {
                return Err(());
            }
            cursor.set(journal, position);
        }
        Ok(cursor)
    }
}

/// A place in the list of submissions, which goes from the newest to older ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Before {
    pub(super) clock: i64,
    pub(super) journal: String,
    pub(super) position: u64,
}

impl Before {
    pub(super) fn parse(text: Option<String>) -> Result<Option<Self>, FieldError> {
        let parsed = text.map(|text| text.parse::<Self>()).transpose();
        parsed.map_err(|()| FieldError::new("before", "must be a `next` of an earlier answer"))
    }
}

impl fmt::Display for Before {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.clock, self.journal, self.position)
    }
}

impl FromStr for Before {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut parts = text.split(':');
        let mut next = || parts.next().ok_or(());
        let before = Self {
            clock: next()?.parse().map_err(|_| ())?,
            journal: next()?.to_owned(),
            position: next()?.parse().map_err(|_| ())?,
        };
        let whole = parts.next().is_none()
            && is_journal(&before.journal)
            && before.position <= i64::MAX as u64;
        whole.then_some(before).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn cursors_come_back_as_they_were_given() {
        let mut cursor = Cursor::default();
        cursor.set("00000000000000aa", 7);
        cursor.set("00000000000000bb", i64::MAX as u64);
        let text = cursor.to_string();
        assert_eq!(Cursor::parse("after", Some(text)).unwrap(), Some(cursor));
        let before = Before {
            clock: -5,
            journal: "00000000000000aa".to_owned(),
            position: 3,
        };
        let text = before.to_string();
        assert_eq!(Before::parse(Some(text)).unwrap(), Some(before));
    }

    #[test]
    fn anything_else_is_refused() {
        let many = ["00000000000000aa:1"; 2].join(";");
        for text in [
            "",
            "7",
            "-1",
            "aa:1",
            "00000000000000aa",
            "00000000000000aa:",
            "00000000000000aa:-1",
            "00000000000000zz:1",
            "00000000000000aa:9223372036854775808",
            "00000000000000aa:1,",
            &many,
        ] {
            let error = Cursor::parse("after", Some(text.to_owned())).unwrap_err();
            assert_eq!(error.field, "after", "{text}");
            assert_eq!(
                Before::parse(Some(text.to_owned())).unwrap_err().field,
                "before"
            );
        }
        let known: Vec<String> = (0..300).map(|n| format!("{n:016x}:1")).collect();
        assert!(known.join(",").parse::<Cursor>().is_err());
        assert!("1:00000000000000aa:2:3".parse::<Before>().is_err());
    }

    #[test]
    fn a_cursor_only_goes_on() {
        let mut cursor: Cursor = "00000000000000aa:7".parse().unwrap();
        cursor.advance_to(&"00000000000000aa:5,00000000000000bb:2".parse().unwrap());
        assert_eq!(
            (cursor.of("00000000000000aa"), cursor.of("00000000000000bb")),
            (7, 2)
        );
        assert_eq!(cursor.of("00000000000000cc"), 0);
        cursor.begin_at(&"00000000000000aa:9,00000000000000cc:4".parse().unwrap());
        assert_eq!(
            (cursor.of("00000000000000aa"), cursor.of("00000000000000cc")),
            (7, 4)
        );
    }
}
