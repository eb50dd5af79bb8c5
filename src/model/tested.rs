//! What a release's tests were about: proof that what runs is what was tested.

use std::collections::BTreeMap;

use sha2::{Digest, Sha256};

use super::{RelativePath, Tests};

/// Digests of what passed, as `sha256:` and hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tested {
    /// Of the files: every path and every text.
    pub code: String,
    /// Of the tests: what decided.
    pub tests: String,
}

impl Tested {
    /// The digests of a submission's files and tests.
    pub fn of(files: &BTreeMap<RelativePath, String>, tests: &Tests) -> Self {
        let mut code = Sha256::new();
        for (path, text) in files {
            add(&mut code, path.as_str());
            add(&mut code, text);
        }
        let mut deciding = Sha256::new();
        match tests {
            Tests::ExitCode => add(&mut deciding, "exit code"),
            Tests::Cases(cases) => {
                for case in cases {
                    add(&mut deciding, &format!("{case:?}"));
                }
            }
            // Their text is among the files.
            Tests::Files(paths) => {
                for path in paths {
                    add(&mut deciding, path.as_str());
                    add(&mut deciding, files.get(path).map_or("", String::as_str));
                }
            }
        }
        Self {
            code: text(code),
            tests: text(deciding),
        }
    }
}

/// With its length, so that nothing runs into what follows.
fn add(digest: &mut Sha256, part: &str) {
    digest.update((part.len() as u64).to_le_bytes());
    digest.update(part);
}

fn text(digest: Sha256) -> String {
    use std::fmt::Write;
    let bytes = digest.finalize();
    bytes.iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn tested(files: &[(&str, &str)], tests: &Tests) -> Tested {
        let files = files
            .iter()
            .map(|(path, text)| {
                let path = RelativePath::try_from((*path).to_owned()).unwrap();
                (path, (*text).to_owned())
            })
            .collect();
        Tested::of(&files, tests)
    }

    #[test]
    fn any_change_changes_the_digest() {
        let one = tested(&[("a", "bc")], &Tests::ExitCode);
        assert_eq!(one, tested(&[("a", "bc")], &Tests::ExitCode));
        assert_ne!(one.code, tested(&[("ab", "c")], &Tests::ExitCode).code);
        let path = RelativePath::try_from("t".to_owned()).unwrap();
        let files = Tests::Files(vec![path]);
        let before = tested(&[("a", "bc"), ("t", "1")], &files);
        let after = tested(&[("a", "bc"), ("t", "2")], &files);
        assert_ne!(before.tests, after.tests);
        assert_ne!(before.tests, one.tests);
    }
}
