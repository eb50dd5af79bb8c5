//! What the server is told of files for the code store: those that are there, and those that were there and
//! are not any more. The server may be another one than the one before, or have been away: what went meanwhile
//! would come back with the next start if this side did not remember it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use super::files::{Entry, Kind, is_kept};

/// Most files that are remembered to be gone, while nobody says that he knows: as many as there may be.
const MOST_GONE: usize = 10_000;

/// What was told so far.
#[derive(Debug, Default)]
pub struct Listing {
    number: u64,
    /// The files that were told to be kept.
    there: BTreeSet<String>,
    /// What went, and the number of the first list that told so.
    gone: BTreeMap<String, u64>,
}

impl Listing {
    /// What a workspace begins with: the code store has it.
    pub fn beginning_with(entries: &[Entry]) -> Self {
        // Later than every list of a runner before this one: a server may remember one of those.
        let began = SystemTime::now().duration_since(UNIX_EPOCH);
        let began = began.map_or(0, |began| began.as_millis());
        Self {
            number: u64::try_from(began).unwrap_or_default(),
            there: files(entries),
            gone: BTreeMap::new(),
        }
    }

    /// The files that the code store has, as far as is known here.
    pub fn there(&self) -> &BTreeSet<String> {
        &self.there
    }

    /// The next list, and its number. Who asks has done what the lists up to `done` told.
    pub fn next(&mut self, mut entries: Vec<Entry>, done: u64) -> (Vec<Entry>, u64) {
        self.number += 1;
        let mut now = files(&entries);
        // What was somebody's and is among packages now is not gone, and what cannot be looked at may be there.
        let hidden = entries.iter().filter(|entry| entry.made || entry.closed);
        let hidden: Vec<(String, bool)> = hidden
            .map(|entry| (format!("{}/", entry.path), entry.closed))
            .collect();
        for path in self.there.difference(&now.clone()) {
            match hidden.iter().find(|(above, _)| path.starts_with(above)) {
                None => drop(self.gone.insert(path.clone(), self.number)),
                Some((_, true)) => drop(now.insert(path.clone())),
                Some((_, false)) => {}
            }
        }
        self.gone
            .retain(|path, told| *told > done && !now.contains(path));
        while self.gone.len() > MOST_GONE
            && let Some(oldest) = self.gone.values().min().copied()
        {
            self.gone.retain(|_, told| *told != oldest);
        }
        self.there = now;
        entries.extend(self.gone.keys().map(|path| Entry {
            path: path.clone(),
            kind: Kind::Gone,
            size: 0,
            modified: 0,
            made: false,
            executable: false,
            link: None,
            unkept: None,
            closed: false,
        }));
        (entries, self.number)
    }
}

fn files(entries: &[Entry]) -> BTreeSet<String> {
    let files = entries
        .iter()
        .filter(|entry| entry.kind == Kind::File && is_kept(entry));
    files.map(|entry| entry.path.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(paths: &[&str]) -> Vec<Entry> {
        let entry = |path: &&str| Entry {
            path: (*path).to_owned(),
            kind: Kind::File,
            size: 1,
            modified: 1,
            made: false,
            executable: false,
            link: None,
            unkept: None,
            closed: false,
        };
        paths.iter().map(entry).collect()
    }

    fn gone(listing: &mut Listing, paths: &[&str], done: u64) -> (Vec<String>, u64) {
        let (entries, number) = listing.next(entries(paths), done);
        let gone = entries.into_iter().filter(|entry| entry.kind == Kind::Gone);
        (gone.map(|entry| entry.path).collect(), number)
    }

    #[test]
    fn what_went_is_told_until_somebody_has_done_it() {
        let mut listing = Listing::beginning_with(&entries(&["a", "b", "c"]));
        let (told, first) = gone(&mut listing, &["b", "c", "new"], 0);
        assert_eq!(told, ["a"]);
        // A server that died meanwhile did nothing about it.
        let (told, second) = gone(&mut listing, &["b", "new"], 0);
        assert_eq!(told, ["a", "c"]);
        assert_eq!(gone(&mut listing, &["b"], first).0, ["c", "new"]);
        // It is there again.
        let (told, last) = gone(&mut listing, &["b", "c"], second);
        assert_eq!(told, ["new"]);
        assert!(gone(&mut listing, &["b", "c"], last).0.is_empty());
    }

    #[test]
    fn what_is_among_packages_is_not_gone() {
        let mut listing = Listing::beginning_with(&entries(&["packages/own", "packages2"]));
        let mut now = entries(&["packages"]);
        (now[0].kind, now[0].made) = (Kind::Folder, true);
        let (told, _) = listing.next(now, 0);
        let gone = told.iter().filter(|entry| entry.kind == Kind::Gone);
        assert_eq!(
            gone.map(|entry| &entry.path).collect::<Vec<_>>(),
            ["packages2"]
        );
    }

    #[test]
    fn what_cannot_be_looked_at_is_not_gone_and_what_is_not_kept_any_more_is() {
        let mut listing = Listing::beginning_with(&entries(&["closed/a", "large", "b"]));
        let mut now = entries(&["closed", "large", "b"]);
        (now[0].kind, now[0].closed) = (Kind::Folder, true);
        now[1].unkept = Some("it is too large".to_owned());
        let gone = |told: Vec<Entry>| {
            let gone = told.into_iter().filter(|entry| entry.kind == Kind::Gone);
            gone.map(|entry| entry.path).collect::<Vec<_>>()
        };
        let (told, number) = listing.next(now.clone(), 0);
        assert_eq!(gone(told), ["large"]);
        assert!(listing.there().contains("closed/a"));
        // Looked into again, it turns out to be empty.
        now[0].closed = false;
        let (told, _) = listing.next(now, number);
        assert_eq!(gone(told), ["closed/a"]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut listing = Listing::default();
        for round in 0..30 {
            let names: Vec<String> = (0..1_000).map(|n| format!("{round}-{n}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            listing.next(entries(&names), 0);
        }
        assert!(listing.gone.len() <= MOST_GONE);
        assert!(listing.gone.contains_key("28-0"), "the latest are kept");
    }
}
