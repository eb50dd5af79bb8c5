//! Records that Elasticsearch refused, one JSON line each, with the reason.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use serde_json::json;

use super::batch::Refused;
use super::decision::ItemAnswer;

/// Past this the file is put aside, and the one that was aside before is deleted: two of them are
/// more than anybody reads, and a mapping that refuses everything must not fill the disk.
const MAX_BYTES: u64 = 64 << 20;

/// The file.
#[derive(Debug)]
pub(super) struct DeadLetters {
    path: PathBuf,
    max_bytes: u64,
}

impl DeadLetters {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            max_bytes: MAX_BYTES,
        }
    }

    /// Writes them; they are on the disk when it returns.
    pub(super) fn add(&self, letters: &[(Refused, ItemAnswer)]) -> io::Result<()> {
        let mut lines = Vec::new();
        for (refused, answer) in letters {
            let error = answer.error.clone().unwrap_or_default();
            let line = json!({
                "refused": jiff::Timestamp::now().to_string(),
                "index": refused.index,
                "id": refused.id,
                "status": answer.status,
                "type": error.kind,
                "reason": error.reason,
                "record": refused.document,
            });
            serde_json::to_writer(&mut lines, &line)?;
            lines.push(b'\n');
        }
        let mut file = self.open()?;
        let length = file.metadata()?.len();
        if length > 0 && length + lines.len() as u64 > self.max_bytes {
            std::fs::rename(&self.path, self.path.with_extension("old.ndjson"))?;
            tracing::error!(
                "{} is full and was put aside; the file put aside before is gone",
                self.path.display()
            );
            file = self.open()?;
        }
        let is_new = file.metadata()?.len() == 0;
        file.write_all(&lines)?;
        file.sync_data()?;
        match self.path.parent().filter(|_| is_new) {
            // Its name, too: it is the only place where these records are.
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }

    fn open(&self) -> io::Result<File> {
        OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&self.path)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn letters_are_appended_and_the_file_stays_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("dead-letters.ndjson");
        let letters = DeadLetters {
            path: path.clone(),
            max_bytes: 1_000,
        };
        for n in 0..20 {
            let refused = Refused {
                index: "gantry-logs-2026.01.31".to_owned(),
                id: format!("id-{n}"),
                document: [("message".to_owned(), "x".repeat(100).into())]
                    .into_iter()
                    .collect(),
                stand_in: false,
            };
            let answer = ItemAnswer {
                status: 400,
                error: None,
            };
            letters.add(&[(refused, answer)]).unwrap();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(text.len() <= 1_000);
            let last: serde_json::Value =
                serde_json::from_str(text.lines().last().unwrap()).unwrap();
            assert_eq!(last["id"], format!("id-{n}"));
            assert_eq!(last["status"], 400);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
