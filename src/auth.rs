//! Who may do what: keys with roles, browser sessions, one-time tickets, and how often one may ask.
//!
//! A key is checked by its hash in constant time. Whatever is made from a key (a browser session, a
//! ticket, an open WebSocket) names the key and ends with it.

mod keys;
mod once;
mod rate;
mod sessions;

use std::io::Write;
use std::path::Path;

use crate::model::UserId;

pub use keys::{KeyInfo, Keys, NewKey};
pub use once::OneTime;
pub use rate::{Network, RateLimits, TooMany};
pub use sessions::{SESSION_LIFETIME, Sessions};

/// What a key allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Everything, for every user.
    Admin,
    /// Everything of this user.
    User(UserId),
}

/// Somebody whose key was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// What the key allows.
    pub role: Role,
    /// The key's public name; never its secret.
    pub key_id: String,
}

impl Caller {
    /// Whether it may submit, stop and roll back as this user.
    pub fn may_act_for(&self, user: &UserId) -> bool {
        match &self.role {
            Role::Admin => true,
            Role::User(own) => own == user,
        }
    }

    /// Whether things of this user exist for it.
    pub fn sees(&self, user: &UserId) -> bool {
        self.may_act_for(user)
    }
}

/// Why the key store or the session store could not be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what Gantry wrote.
    #[error(
        "{path} is damaged ({reason}); restore it from a backup, or move it away to start with no keys"
    )]
    Damaged {
        /// Which file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The store holds as many keys as it may.
    #[error("there are already {0} keys; revoke some first")]
    Full(usize),
    /// No key has this id.
    #[error("no key has the id {0:?}; `gantry key list` shows them")]
    UnknownKey(String),
    /// The system gave no random bytes.
    #[error("the system's random number generator failed: {0}")]
    Random(getrandom::Error),
}

impl AuthError {
    fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.display().to_string(),
            source,
        }
    }
}

/// Random bytes of a session's cookie and of a one-time secret.
const CREDENTIAL_BYTES: usize = 24;

/// Whether a text has the shape of a session's cookie or a one-time secret.
pub fn is_credential(text: &str) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == 2 * CREDENTIAL_BYTES && text.bytes().all(digit)
}

/// Fresh random bytes as lower-case hexadecimal text.
fn random_hex<const BYTES: usize>() -> Result<String, AuthError> {
    let mut bytes = [0_u8; BYTES];
    getrandom::fill(&mut bytes).map_err(AuthError::Random)?;
    Ok(hex(&bytes))
}

/// Bytes as lower-case hexadecimal text.
fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(char::from(DIGITS[usize::from(byte >> 4)]));
        text.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
    text
}

/// The hash under which a secret is stored and looked up.
fn sha256(text: &str) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(text.as_bytes()).into()
}

/// Replaces a file whole or not at all, readable by its owner only.
fn replace_file(path: &Path, bytes: &[u8]) -> Result<(), AuthError> {
    use std::os::unix::fs::OpenOptionsExt;
    let written = || -> std::io::Result<()> {
        let next = path.with_extension("next");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&next)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&next, path)?;
        // The rename itself must survive a power cut: a revoked key must not come back.
        if let Some(folder) = path.parent() {
            std::fs::File::open(folder)?.sync_all()?;
        }
        Ok(())
    };
    // Requests that are answered on this thread do not wait for the disk.
    let many = tokio::runtime::Handle::try_current()
        .is_ok_and(|handle| handle.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread);
    let written = match many {
        true => tokio::task::block_in_place(written),
        false => written(),
    };
    written.map_err(|source| AuthError::io(path, source))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_user_key_acts_for_its_own_user_only() {
        let own: UserId = "ann".parse().unwrap();
        let other: UserId = "bob".parse().unwrap();
        let user = Caller {
            role: Role::User(own.clone()),
            key_id: "k".to_owned(),
        };
        assert!(user.may_act_for(&own) && !user.may_act_for(&other) && !user.sees(&other));
        let admin = Caller {
            role: Role::Admin,
            key_id: "k".to_owned(),
        };
        assert!(admin.may_act_for(&own) && admin.sees(&other));
    }

    #[test]
    fn replaced_files_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        replace_file(&path, b"1").unwrap();
        replace_file(&path, b"2").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
