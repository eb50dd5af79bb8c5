//! Names of users, repls, services and submissions.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest user or repl name. 63 is DNS's own bound for a label (RFC 1035); 50 leaves room for the
/// suffixes and prefixes Gantry adds (`user-…`, `…-test`, `…-db-0`).
const MAX_LABEL: usize = 50;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{value:?} is not a DNS label: 1 to {MAX_LABEL} of a-z, 0-9 and '-', not starting or ending with '-'"
)]
pub struct IdError {
    value: String,
}

fn checked_label(text: &str) -> Result<String, IdError> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let ok = !text.is_empty()
        && text.len() <= MAX_LABEL
        && text.bytes().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-');
    if ok {
        Ok(text.to_owned())
    } else {
        Err(IdError {
            value: text.chars().take(80).collect(),
        })
    }
}

macro_rules! label {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                checked_label(text).map(Self)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                checked_label(&text).map(Self)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

label!(
    /// A user: a DNS label of at most 50 characters.
    UserId
);
label!(
    /// A service: a DNS label of at most 50 characters, unique among its user's.
    ServiceName
);
label!(
    /// A repl: a DNS label of at most 50 characters; it is a host name, so it is unique across users.
    ReplId
);

impl UserId {
    /// The namespace that holds everything of this user.
    pub fn namespace(&self) -> String {
        format!("user-{}", self.0)
    }

    /// The repl a submission goes to when it names none. `None` when the suffix makes the name
    /// longer than a repl's may be.
    pub fn default_repl(&self) -> Option<ReplId> {
        format!("{}{DEFAULT_SUFFIX}", self.0).parse().ok()
    }
}

/// What a user's default repl has behind its user's name.
const DEFAULT_SUFFIX: &str = "-prod";

impl ReplId {
    /// The user whose default repl this is.
    pub fn default_of(&self) -> Option<UserId> {
        self.0.strip_suffix(DEFAULT_SUFFIX)?.parse().ok()
    }
}

/// One submission. Clients may choose it, which makes sending again safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SubmissionId(Uuid);

impl SubmissionId {
    /// When it was made, if it says so: version 7 does.
    pub fn time(&self) -> Option<jiff::Timestamp> {
        let (seconds, nanoseconds) = self.0.get_timestamp()?.to_unix();
        let nanoseconds = i32::try_from(nanoseconds).ok()?;
        jiff::Timestamp::new(i64::try_from(seconds).ok()?, nanoseconds).ok()
    }

    /// A new UUIDv7: ids sort by the time they were made.
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }

    /// The id these bytes are.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    /// The bytes, for binary keys.
    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl Default for SubmissionId {
    fn default() -> Self {
        Self::new()
    }
}

impl FromStr for SubmissionId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        Uuid::parse_str(text).map(Self)
    }
}

impl fmt::Display for SubmissionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn labels_are_dns_labels() {
        for good in ["a", "test", "a-b", "0", &"x".repeat(50)] {
            assert!(good.parse::<UserId>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "a-",
            "A",
            "a_b",
            "a.b",
            "é",
            "a\n",
            &"x".repeat(51),
        ] {
            assert!(bad.parse::<UserId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn default_repl_needs_room_for_its_suffix() {
        let user: UserId = "x".repeat(46).parse().unwrap();
        assert!(user.default_repl().is_none());
        let user: UserId = "test".parse().unwrap();
        let repl = user.default_repl().unwrap();
        assert_eq!(repl.as_str(), "test-prod");
        assert_eq!(repl.default_of(), Some(user));
        let other: ReplId = "prod".parse().unwrap();
        assert_eq!(other.default_of(), None);
    }
}
