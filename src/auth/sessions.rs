//! Browser sessions: a cookie that stands for a key, kept by its hash so that a restart of the
//! server does not sign anybody out.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use crate::kept;

use super::{AuthError, CREDENTIAL_BYTES, hex, random_hex, replace_file, sha256};

/// How long a browser stays signed in: a working day.
pub const SESSION_LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);

/// Most sessions kept. It bounds the file that is rewritten at each sign-in.
const MAX_SESSIONS: usize = 1_000;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Session {
    sha256: String,
    key_id: String,
    expires: Timestamp,
}

/// The file. An earlier version wrote the list alone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum SessionFile {
    Now { sessions: Vec<Session> },
    Earlier(Vec<Session>),
}

/// The browsers that are signed in.
#[derive(Debug)]
pub struct Sessions {
    path: PathBuf,
    /// The file was damaged when the server started, and was set aside.
    set_aside: bool,
    per_key: usize,
    /// Oldest first. Requests read it, so nobody holds it while a file is written.
    open: Mutex<Vec<Session>>,
    /// Held while the file is written: one change at a time.
    writing: Mutex<()>,
}

impl Sessions {
    /// Opens the store in the data folder. A damaged one is set aside, which only signs people out. `per_key`:
    /// most sessions of one key.
    pub fn open(data_dir: &Path, per_key: usize) -> Result<Self, AuthError> {
        let path = data_dir.join("sessions.json");
        let mut set_aside = false;
        let open = match std::fs::read(&path) {
            Ok(bytes) => match kept::open(&bytes) {
                Ok(SessionFile::Now { sessions } | SessionFile::Earlier(sessions)) => sessions,
                Err(error) => {
                    tracing::warn!(
                        "{} is damaged ({error}) and is set aside; browsers must sign in again",
                        path.display()
                    );
                    std::fs::rename(&path, path.with_extension("set-aside"))
                        .map_err(|e| AuthError::io(&path, e))?;
                    set_aside = true;
                    Vec::new()
                }
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(AuthError::io(&path, error)),
        };
        Ok(Self {
            path,
            set_aside,
            per_key,
            open: Mutex::new(open),
            writing: Mutex::default(),
        })
    }

    /// The file that was set aside when the server started, if it was.
    pub fn set_aside(&self) -> Option<&Path> {
        self.set_aside.then_some(&self.path)
    }

    /// Signs a browser in with what the key allows; writes to disk. Where there are too many sessions, the
    /// oldest of this key ends, or of the key that has the most.
    pub fn create(&self, key_id: &str) -> Result<SecretString, AuthError> {
        let text = random_hex::<CREDENTIAL_BYTES>()?;
        let now = Timestamp::now();
        let session = Session {
            sha256: hex(&sha256(&text)),
            key_id: key_id.to_owned(),
            expires: now + SESSION_LIFETIME,
        };
        self.change(|sessions| {
            sessions.retain(|session| session.expires > now);
            while count(sessions, key_id) >= self.per_key {
                end_oldest(sessions, key_id);
            }
            while sessions.len() >= MAX_SESSIONS {
                end_oldest(sessions, &busiest(sessions));
            }
            sessions.push(session);
        })?;
        Ok(text.into())
    }

    /// The key behind a cookie, while the session lasts.
    pub fn key_id(&self, cookie: &str) -> Option<String> {
        let hash = hex(&sha256(cookie));
        let open = self.locked();
        let session = open.iter().find(|session| session.sha256 == hash)?;
        (session.expires > Timestamp::now()).then(|| session.key_id.clone())
    }

    /// Signs a browser out; writes to disk. Unknown is fine.
    pub fn end(&self, cookie: &str) -> Result<(), AuthError> {
        let hash = hex(&sha256(cookie));
        if !self.locked().iter().any(|session| session.sha256 == hash) {
            return Ok(());
        }
        self.change(|sessions| sessions.retain(|session| session.sha256 != hash))
    }

    /// Changes the file first and then what is known.
    fn change(&self, edit: impl FnOnce(&mut Vec<Session>)) -> Result<(), AuthError> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = self.locked().clone();
        edit(&mut next);
        let file = SessionFile::Now { sessions: next };
        let bytes =
            kept::seal(&file).map_err(|e| AuthError::io(&self.path, std::io::Error::other(e)))?;
        replace_file(&self.path, &bytes)?;
        let (SessionFile::Now { sessions } | SessionFile::Earlier(sessions)) = file;
        *self.locked() = sessions;
        Ok(())
    }

    fn locked(&self) -> MutexGuard<'_, Vec<Session>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(sessions: &[Session], key_id: &str) -> usize {
    let of_key = |session: &&Session| session.key_id == key_id;
    sessions.iter().filter(of_key).count()
}

fn end_oldest(sessions: &mut Vec<Session>, key_id: &str) {
    if let Some(at) = sessions.iter().position(|s| s.key_id == key_id) {
        sessions.remove(at);
    }
}

/// The key with the most sessions.
fn busiest(sessions: &[Session]) -> String {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for session in sessions {
        *counts.entry(&session.key_id).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    most.map_or_else(String::new, |(key, _)| key.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn a_session_survives_a_restart_until_it_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let cookie = Sessions::open(dir.path(), 50)
            .unwrap()
            .create("k1")
            .unwrap();
        let cookie = cookie.expose_secret();
        let restarted = Sessions::open(dir.path(), 50).unwrap();
        assert_eq!(restarted.key_id(cookie).as_deref(), Some("k1"));
        assert_eq!(restarted.key_id("other"), None);
        restarted.end(cookie).unwrap();
        assert_eq!(restarted.key_id(cookie), None);
        assert_eq!(Sessions::open(dir.path(), 50).unwrap().key_id(cookie), None);
    }

    #[test]
    fn a_damaged_file_is_set_aside_and_an_earlier_versions_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = Sessions::open(dir.path(), 50).unwrap();
        let cookie = sessions.create("k1").unwrap();
        let path = dir.path().join("sessions.json");
        let earlier = serde_json::to_vec(&*sessions.locked()).unwrap();
        let mut text = std::fs::read(&path).unwrap();
        let at = text.windows(2).position(|two| two == b"k1").unwrap();
        text[at + 1] ^= 1;
        std::fs::write(&path, text).unwrap();
        let damaged = Sessions::open(dir.path(), 50).unwrap();
        assert_eq!(damaged.key_id(cookie.expose_secret()), None);
        assert_eq!(damaged.set_aside(), Some(&*path));
        assert!(path.with_extension("set-aside").exists());
        std::fs::write(&path, earlier).unwrap();
        let read = Sessions::open(dir.path(), 50).unwrap();
        assert_eq!(read.key_id(cookie.expose_secret()).as_deref(), Some("k1"));
        assert_eq!(read.set_aside(), None);
    }

    #[test]
    fn the_cookie_is_not_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let cookie = Sessions::open(dir.path(), 50)
            .unwrap()
            .create("k1")
            .unwrap();
        let stored = std::fs::read_to_string(dir.path().join("sessions.json")).unwrap();
        assert!(!stored.contains(cookie.expose_secret()));
    }

    #[test]
    fn one_key_ends_its_own_sessions_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = Sessions::open(dir.path(), 3).unwrap();
        let admin = sessions.create("admin").unwrap();
        let own: Vec<SecretString> = (0..5).map(|_| sessions.create("u").unwrap()).collect();
        assert!(sessions.key_id(admin.expose_secret()).is_some());
        let there: Vec<bool> = own
            .iter()
            .map(|cookie| sessions.key_id(cookie.expose_secret()).is_some())
            .collect();
        assert_eq!(there, [false, false, true, true, true]);
    }

    #[test]
    fn a_full_store_ends_a_session_of_the_key_that_has_the_most() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = Sessions::open(dir.path(), MAX_SESSIONS).unwrap();
        let full: Vec<Session> = (0..MAX_SESSIONS)
            .map(|n| Session {
                sha256: n.to_string(),
                key_id: if n < 2 { "admin" } else { "u" }.to_owned(),
                expires: Timestamp::now() + SESSION_LIFETIME,
            })
            .collect();
        *sessions.locked() = full;
        let cookie = sessions.create("newest").unwrap();
        let open = sessions.locked().clone();
        assert_eq!((open.len(), count(&open, "admin")), (MAX_SESSIONS, 2));
        assert!(sessions.key_id(cookie.expose_secret()).is_some());
    }
}
