//! The key store: `keys.json` in the data folder, hashes only.

use std::collections::HashMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use jiff::Timestamp;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{AuthError, Caller, Role, hex, random_hex, replace_file, sha256};
use crate::kept;
use crate::model::UserId;

/// How often the file is looked at: open sockets must end within 5 s of `gantry key revoke`, which
/// runs in another process; one second leaves the rest for closing them.
const RELOAD_EVERY: Duration = Duration::from_secs(1);

/// Most keys in one store: a bound, far above any team's size, on what is read once a second.
const MAX_KEYS: usize = 10_000;

/// What every key's text starts with, so that secret scanners and people know it.
const PREFIX: &str = "gtk";

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StoredKey {
    id: String,
    /// Absent for an admin key.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    user_id: Option<UserId>,
    sha256: String,
    created: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    revoked: Option<Timestamp>,
}

impl StoredKey {
    fn caller(&self) -> Caller {
        Caller {
            role: match &self.user_id {
                None => Role::Admin,
                Some(user) => Role::User(user.clone()),
            },
            key_id: self.id.clone(),
        }
    }
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct KeyFile {
    version: u32,
    keys: Vec<StoredKey>,
}

/// A key as `gantry key list` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct KeyInfo {
    /// Its public name.
    pub id: String,
    /// `admin` or `user`.
    pub role: &'static str,
    /// Whose it is, for a user's key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_id: Option<UserId>,
    /// When it was made.
    pub created: Timestamp,
    /// When it was revoked, if it was.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Timestamp>,
}

/// A key that was just made: the only time its text is known.
#[derive(Debug)]
pub struct NewKey {
    /// Its public name.
    pub id: String,
    /// Its text, to be shown once.
    pub text: SecretString,
}

/// The keys of this server.
#[derive(Debug, Clone)]
pub struct Keys {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    state: RwLock<State>,
    /// Keys of other replicas of this server, by replica.
    adopted: RwLock<HashMap<String, Vec<StoredKey>>>,
    /// The key given in the environment, as an admin key.
    environment: Option<StoredKey>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    keys: Vec<StoredKey>,
    /// Which file the bytes are of.
    file: Option<FileMark>,
}

/// Tells a file from the one that replaced it, without reading either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileMark {
    inode: u64,
    bytes: u64,
    changed: (i64, i64),
}

impl FileMark {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            bytes: metadata.size(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl Keys {
    /// Opens the store in the data folder; a missing file is an empty store.
    pub fn open(data_dir: &Path, api_key: Option<&SecretString>) -> Result<Self, AuthError> {
        let environment = api_key.map(|text| {
            let hash = sha256(text.expose_secret());
            StoredKey {
                // Named by its hash, so that what was made from it ends when it is changed.
                id: format!("env-{}", hex(&hash[..4])),
                user_id: None,
                sha256: hex(&hash),
                created: Timestamp::now(),
                revoked: None,
            }
        });
        let keys = Self {
            inner: Arc::new(Inner {
                path: data_dir.join("keys.json"),
                state: RwLock::default(),
                adopted: RwLock::default(),
                environment,
                changes: watch::Sender::new(0),
            }),
        };
        keys.reload()?;
        Ok(keys)
    }

    /// The caller behind a key's text, if the key is known and not revoked.
    pub fn authenticate(&self, text: &str) -> Option<Caller> {
        let hash = hex(&sha256(text));
        let matches = |key: &StoredKey| bool::from(key.sha256.as_bytes().ct_eq(hash.as_bytes()));
        if let Some(key) = &self.inner.environment
            && matches(key)
        {
            return Some(key.caller());
        }
        let id = well_formed_id(text)?;
        if let Some(caller) = self.find(id, matches) {
            return Some(caller);
        }
        // Another process may have made it a moment ago. If the file cannot be read now, `watch` reports that.
        let read = !self.knows(id) && self.has_changed() && self.reload().is_ok();
        read.then(|| self.find(id, matches)).flatten()
    }

    /// Whether a text has a key's form and no key that is known here has its id.
    pub fn is_strange(&self, text: &str) -> bool {
        well_formed_id(text).is_some_and(|id| !self.knows(id))
    }

    /// Whether some key has this id, whether it still counts or not.
    fn knows(&self, id: &str) -> bool {
        let known = |keys: &[StoredKey]| keys.iter().any(|key| key.id == id);
        known(&self.state().keys) || self.adopted().values().any(|keys| known(keys))
    }

    /// Whether the file is another than the one that was read: cheap enough to ask for each wrong key.
    fn has_changed(&self) -> bool {
        let now = std::fs::metadata(&self.inner.path);
        now.is_ok_and(|metadata| self.state().file != Some(FileMark::of(&metadata)))
    }

    /// The key of this id, of this replica's or another's, if it is not revoked and `fits`.
    fn find(&self, id: &str, fits: impl Fn(&StoredKey) -> bool) -> Option<Caller> {
        let found = |keys: &[StoredKey]| {
            let key = keys.iter().find(|key| key.id == id)?;
            Some((fits(key) && key.revoked.is_none()).then(|| key.caller()))
        };
        let own = found(&self.state().keys);
        own.or_else(|| self.adopted().values().find_map(|keys| found(keys)))?
    }

    /// This replica's own keys as text, hashes only, with the version of it.
    pub fn own(&self) -> (String, String) {
        if self.has_changed()
            && let Err(error) = self.reload()
        {
            tracing::debug!(%error, "the key store cannot be read");
        }
        let state = self.state();
        let version = format!(
            "{:08x}-{}",
            crc32fast::hash(&state.bytes),
            state.bytes.len()
        );
        let text = String::from_utf8_lossy(&state.bytes).into_owned();
        (version, text)
    }

    /// Takes another replica's keys in, in the place of those it had before.
    pub fn adopt(&self, replica: &str, text: &[u8]) -> Result<(), AuthError> {
        let keys = parse(Path::new(replica), text)?.keys;
        let mut adopted = self
            .inner
            .adopted
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        adopted.insert(replica.to_owned(), keys);
        drop(adopted);
        self.inner.changes.send_modify(|version| *version += 1);
        Ok(())
    }

    fn adopted(&self) -> std::sync::RwLockReadGuard<'_, HashMap<String, Vec<StoredKey>>> {
        self.inner
            .adopted
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The caller of a key id, while the key is not revoked.
    pub fn caller(&self, key_id: &str) -> Option<Caller> {
        if let Some(key) = &self.inner.environment
            && key.id == key_id
        {
            return Some(key.caller());
        }
        self.find(key_id, |_| true)
    }

    /// Whether the key of this id was revoked. One that is not known, such as another replica's
    /// before it was heard of, was not.
    pub fn is_revoked(&self, key_id: &str) -> bool {
        let revoked = |keys: &[StoredKey]| {
            let key = keys.iter().find(|key| key.id == key_id);
            key.is_some_and(|key| key.revoked.is_some())
        };
        revoked(&self.state().keys) || self.adopted().values().any(|keys| revoked(keys))
    }

    /// Some admin key that is not revoked, the environment's first.
    pub fn admin(&self) -> Option<Caller> {
        if let Some(key) = &self.inner.environment {
            return Some(key.caller());
        }
        let state = self.state();
        let mut usable = state.keys.iter();
        usable
            .find(|key| key.user_id.is_none() && key.revoked.is_none())
            .map(StoredKey::caller)
    }

    /// Makes a key.
    pub fn create(&self, role: Role) -> Result<NewKey, AuthError> {
        let id = random_hex::<4>()?;
        let body = format!("{PREFIX}_{id}_{}", random_hex::<24>()?);
        let text = format!("{body}_{:08x}", crc32fast::hash(body.as_bytes()));
        let stored = StoredKey {
            id: id.clone(),
            user_id: match role {
                Role::Admin => None,
                Role::User(user) => Some(user),
            },
            sha256: hex(&sha256(&text)),
            created: Timestamp::now(),
            revoked: None,
        };
        self.change(|keys| {
            if keys.len() >= MAX_KEYS {
                // A revoked key opens nothing, known or not.
                let revoked = keys.iter().position(|key| key.revoked.is_some());
                keys.remove(revoked.ok_or(AuthError::Full(MAX_KEYS))?);
            }
            keys.push(stored);
            Ok(())
        })?;
        Ok(NewKey {
            id,
            text: text.into(),
        })
    }

    /// Revokes a key; again is fine. The key's text is taken as well as its id.
    pub fn revoke(&self, id_or_text: &str) -> Result<(), AuthError> {
        let id = well_formed_id(id_or_text).unwrap_or(id_or_text);
        self.change(|keys| {
            let key = keys
                .iter_mut()
                .find(|key| key.id == id)
                .ok_or_else(|| AuthError::UnknownKey(id.chars().take(40).collect()))?;
            key.revoked.get_or_insert_with(Timestamp::now);
            Ok(())
        })
    }

    /// Every key, oldest first.
    pub fn list(&self) -> Vec<KeyInfo> {
        let state = self.state();
        let info = |key: &StoredKey| KeyInfo {
            id: key.id.clone(),
            role: if key.user_id.is_none() {
                "admin"
            } else {
                "user"
            },
            user_id: key.user_id.clone(),
            created: key.created,
            revoked: key.revoked,
        };
        state.keys.iter().map(info).collect()
    }

    /// Tells when keys were made or revoked, by this process or another.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Follows the file until told to stop.
    pub async fn watch(self, stop: CancellationToken) {
        let mut complained = false;
        while stop
            .run_until_cancelled(tokio::time::sleep(RELOAD_EVERY))
            .await
            .is_some()
        {
            let keys = self.clone();
            let result = tokio::task::spawn_blocking(move || keys.reload()).await;
            match result {
                Ok(Ok(())) => complained = false,
                // The keys known so far stay in force: a half-made edit must not lock everybody out.
                Ok(Err(error)) if !complained => {
                    complained = true;
                    tracing::error!(%error, "the key store cannot be read; keys stay as they were");
                }
                Ok(Err(_)) => {}
                Err(error) => tracing::error!(%error, "looking at the key store failed"),
            }
        }
    }

    fn state(&self) -> std::sync::RwLockReadGuard<'_, State> {
        // Nothing panics while holding it; what it holds is whole either way.
        self.inner
            .state
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the file again when its bytes are not the known ones.
    fn reload(&self) -> Result<(), AuthError> {
        let path = &self.inner.path;
        let (bytes, file) = match read_marked(path) {
            Ok((bytes, file)) => (bytes, Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (Vec::new(), None),
            Err(error) => return Err(AuthError::io(path, error)),
        };
        let known = self.state().bytes == bytes;
        let keys = match known {
            true => Vec::new(),
            false => parse(path, &bytes)?.keys,
        };
        let mut state = self
            .inner
            .state
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        state.file = file;
        if known {
            return Ok(());
        }
        (state.bytes, state.keys) = (bytes, keys);
        drop(state);
        self.inner.changes.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Changes the file under a lock that other processes respect.
    fn change(
        &self,
        edit: impl FnOnce(&mut Vec<StoredKey>) -> Result<(), AuthError>,
    ) -> Result<(), AuthError> {
        let path = &self.inner.path;
        let lock_path = path.with_extension("lock");
        let lock = std::fs::File::create(&lock_path).map_err(|e| AuthError::io(&lock_path, e))?;
        lock.lock().map_err(|e| AuthError::io(&lock_path, e))?;
        self.reload()?;
        let mut keys = self.state().keys.clone();
        edit(&mut keys)?;
        let file = KeyFile { version: 1, keys };
        let bytes = kept::seal(&file).map_err(|e| AuthError::io(path, std::io::Error::other(e)))?;
        replace_file(path, &bytes)?;
        self.reload()
    }
}

/// A file's bytes, and which file they are of.
fn read_marked(path: &Path) -> std::io::Result<(Vec<u8>, FileMark)> {
    let mut file = std::fs::File::open(path)?;
    let mark = FileMark::of(&file.metadata()?);
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok((bytes, mark))
}

fn parse(path: &Path, bytes: &[u8]) -> Result<KeyFile, AuthError> {
    if bytes.is_empty() {
        return Ok(KeyFile::default());
    }
    let damaged = |reason: String| AuthError::Damaged {
        path: path.display().to_string(),
        reason,
    };
    // The server does not start with a damaged store: an empty one would refuse everybody, and one that is read in
    // part could admit a revoked key.
    let file: KeyFile = kept::open(bytes).map_err(damaged)?;
    if file.version != 1 {
        return Err(damaged(format!("version {} is not known", file.version)));
    }
    Ok(file)
}

/// The id in a key's text, if the text has a key's shape and its checksum holds.
fn well_formed_id(text: &str) -> Option<&str> {
    let (body, checksum) = text.rsplit_once('_')?;
    if checksum.len() != 8 || format!("{:08x}", crc32fast::hash(body.as_bytes())) != checksum {
        return None;
    }
    let id = body.strip_prefix(PREFIX)?.strip_prefix('_')?;
    id.split_once('_').map(|(id, _secret)| id)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_key_opens_until_it_is_revoked_by_another_process() {
        let dir = tempfile::tempdir().unwrap();
        let server = Keys::open(dir.path(), None).unwrap();
        assert!(server.admin().is_none());
        let other = Keys::open(dir.path(), None).unwrap();
        let key = other.create(Role::User("ann".parse().unwrap())).unwrap();
        let text = key.text.expose_secret();

        // The key works at once, before the file is next looked at.
        let caller = server.authenticate(text).unwrap();
        assert_eq!(caller.role, Role::User("ann".parse().unwrap()));
        assert!(server.admin().is_none());

        let mut changes = server.changes();
        changes.mark_unchanged();
        other.revoke(&key.id).unwrap();
        server.reload().unwrap();
        assert!(changes.has_changed().unwrap());
        assert!(server.authenticate(text).is_none());
        assert!(server.caller(&key.id).is_none());
        assert!(other.list()[0].revoked.is_some());
    }

    #[test]
    fn a_wrong_key_has_the_file_read_only_when_it_changed() {
        let dir = tempfile::tempdir().unwrap();
        let server = Keys::open(dir.path(), None).unwrap();
        let other = Keys::open(dir.path(), None).unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let strange = Keys::open(elsewhere.path(), None).unwrap();
        let strange = strange.create(Role::Admin).unwrap();
        other.create(Role::Admin).unwrap();
        assert!(server.has_changed());
        assert!(server.authenticate(strange.text.expose_secret()).is_none());
        assert!(!server.has_changed());
        // A file that cannot be read leaves the keys that are known.
        std::fs::write(dir.path().join("keys.json"), b"{").unwrap();
        assert!(server.authenticate(strange.text.expose_secret()).is_none());
        assert_eq!(server.list().len(), 1);
    }

    #[test]
    fn a_key_with_any_character_changed_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), None).unwrap();
        let key = keys.create(Role::Admin).unwrap();
        let text = key.text.expose_secret();
        assert!(keys.authenticate(text).is_some());
        for index in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[index] ^= 1;
            let changed = String::from_utf8(bytes).unwrap();
            assert!(keys.authenticate(&changed).is_none(), "{index}");
        }
        assert!(keys.authenticate("").is_none());
    }

    #[test]
    fn the_store_holds_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), None).unwrap();
        let key = keys.create(Role::Admin).unwrap();
        let secret = key
            .text
            .expose_secret()
            .split('_')
            .nth(2)
            .unwrap()
            .to_owned();
        let stored = std::fs::read_to_string(dir.path().join("keys.json")).unwrap();
        assert!(stored.contains(&key.id) && !stored.contains(&secret));
        assert!(!format!("{key:?}").contains(&secret));
    }

    #[test]
    fn the_environments_key_is_an_admin_key_under_a_name_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = Keys::open(dir.path(), Some(&"one-secret".into())).unwrap();
        let caller = first.authenticate("one-secret").unwrap();
        assert_eq!(caller.role, Role::Admin);
        assert!(first.caller(&caller.key_id).is_some());
        let second = Keys::open(dir.path(), Some(&"another".into())).unwrap();
        assert!(second.authenticate("one-secret").is_none());
        assert!(second.caller(&caller.key_id).is_none());
    }

    #[test]
    fn a_damaged_store_is_an_error_and_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("keys.json"), "{").unwrap();
        assert!(matches!(
            Keys::open(dir.path(), None),
            Err(AuthError::Damaged { .. })
        ));
    }

    #[test]
    fn a_flipped_bit_admits_nobody_who_was_revoked_and_refuses_nobody_else() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), None).unwrap();
        let (good, revoked) = (
            keys.create(Role::Admin).unwrap(),
            keys.create(Role::Admin).unwrap(),
        );
        keys.revoke(&revoked.id).unwrap();
        let path = dir.path().join("keys.json");
        let text = std::fs::read(&path).unwrap();
        for bit in 0..text.len() * 8 {
            let mut flipped = text.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, flipped).unwrap();
            let Ok(keys) = Keys::open(dir.path(), None) else {
                continue;
            };
            assert!(
                keys.authenticate(good.text.expose_secret()).is_some(),
                "{bit}"
            );
            assert!(
                keys.authenticate(revoked.text.expose_secret()).is_none(),
                "{bit}"
            );
        }
    }

    #[test]
    fn a_full_store_takes_a_key_in_place_of_a_revoked_one() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), None).unwrap();
        let first = keys.create(Role::Admin).unwrap();
        keys.change(|keys| {
            keys.resize(MAX_KEYS, keys[0].clone());
            for (number, key) in keys.iter_mut().enumerate().skip(1) {
                key.id = format!("k{number}");
            }
            Ok(())
        })
        .unwrap();
        assert!(matches!(keys.create(Role::Admin), Err(AuthError::Full(_))));
        keys.revoke(&first.id).unwrap();
        let key = keys.create(Role::Admin).unwrap();
        assert!(keys.authenticate(key.text.expose_secret()).is_some());
        assert_eq!(keys.list().len(), MAX_KEYS);
    }

    #[test]
    fn revoking_an_unknown_key_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path(), None).unwrap();
        assert!(matches!(keys.revoke("nope"), Err(AuthError::UnknownKey(_))));
    }
}
