//! Browser sessions: a cookie that stands for a key, kept by its hash so that a restart of the
//! server does not sign anybody out.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};

use super::{AuthError, hex, random_hex, replace_file, sha256};

/// How long a browser stays signed in: a working day.
pub const SESSION_LIFETIME: Duration = Duration::from_secs(12 * 60 * 60);

/// Most sessions kept; the oldest makes room. It bounds the file that is rewritten at each sign-in.
const MAX_SESSIONS: usize = 1_000;

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Session {
    sha256: String,
    key_id: String,
    expires: Timestamp,
}

/// The browsers that are signed in.
#[derive(Debug)]
pub struct Sessions {
    path: PathBuf,
    open: Mutex<Vec<Session>>,
}

impl Sessions {
    /// Opens the store in the data folder. A damaged one only signs people out.
    pub fn open(data_dir: &Path) -> Result<Self, AuthError> {
        let path = data_dir.join("sessions.json");
        let open = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, "the session store is damaged; browsers must sign in again");
                Vec::new()
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(AuthError::io(&path, error)),
        };
        Ok(Self {
            path,
            open: Mutex::new(open),
        })
    }

    /// Signs a browser in with what the key allows; writes to disk.
    pub fn create(&self, key_id: &str) -> Result<SecretString, AuthError> {
        let text = random_hex::<24>()?;
        let now = Timestamp::now();
        let session = Session {
            sha256: hex(&sha256(&text)),
            key_id: key_id.to_owned(),
            expires: now + SESSION_LIFETIME,
        };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = open.clone();
        next.retain(|session| session.expires > now);
        if next.len() >= MAX_SESSIONS {
            next.remove(0);
        }
        next.push(session);
        self.write(&next)?;
        *open = next;
        Ok(text.into())
    }

    /// The key behind a cookie, while the session lasts.
    pub fn key_id(&self, cookie: &str) -> Option<String> {
        let hash = hex(&sha256(cookie));
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let session = open.iter().find(|session| session.sha256 == hash)?;
        (session.expires > Timestamp::now()).then(|| session.key_id.clone())
    }

    /// Signs a browser out; writes to disk. Unknown is fine.
    pub fn end(&self, cookie: &str) -> Result<(), AuthError> {
        let hash = hex(&sha256(cookie));
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = open.clone();
        next.retain(|session| session.sha256 != hash);
        if next.len() != open.len() {
            self.write(&next)?;
            *open = next;
        }
        Ok(())
    }

    fn write(&self, sessions: &[Session]) -> Result<(), AuthError> {
        let bytes = serde_json::to_vec(sessions)
            .map_err(|e| AuthError::io(&self.path, std::io::Error::other(e)))?;
        replace_file(&self.path, &bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use secrecy::ExposeSecret;

    #[test]
    fn a_session_survives_a_restart_until_it_is_ended() {
        let dir = tempfile::tempdir().unwrap();
        let cookie = Sessions::open(dir.path()).unwrap().create("k1").unwrap();
        let cookie = cookie.expose_secret();
        let restarted = Sessions::open(dir.path()).unwrap();
        assert_eq!(restarted.key_id(cookie).as_deref(), Some("k1"));
        assert_eq!(restarted.key_id("other"), None);
        restarted.end(cookie).unwrap();
        assert_eq!(restarted.key_id(cookie), None);
        assert_eq!(Sessions::open(dir.path()).unwrap().key_id(cookie), None);
    }

    #[test]
    fn the_cookie_is_not_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let cookie = Sessions::open(dir.path()).unwrap().create("k1").unwrap();
        let stored = std::fs::read_to_string(dir.path().join("sessions.json")).unwrap();
        assert!(!stored.contains(cookie.expose_secret()));
    }

    #[test]
    fn the_number_of_sessions_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = Sessions::open(dir.path()).unwrap();
        let full: Vec<Session> = (0..MAX_SESSIONS)
            .map(|n| Session {
                sha256: n.to_string(),
                key_id: "k".to_owned(),
                expires: Timestamp::now() + SESSION_LIFETIME,
            })
            .collect();
        *sessions.open.lock().unwrap() = full;
        let cookie = sessions.create("newest").unwrap();
        assert_eq!(sessions.open.lock().unwrap().len(), MAX_SESSIONS);
        assert!(sessions.key_id(cookie.expose_secret()).is_some());
    }
}
