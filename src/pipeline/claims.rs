//! Names of repls: whose a name may become, and how many of them one user may have.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::Inner;
use crate::model::{Problem, ReplId, UserId};
use crate::platform::{AWAY, PlatformError};

/// What an operator decides about names.
#[derive(Debug, Clone, Default)]
pub struct NameRules {
    /// Names that nobody gets.
    pub reserved: BTreeSet<String>,
    /// Most names of one user.
    pub per_user: usize,
}

/// New names that may be taken at one time; one user's never overlap, so that their number is right.
const LANES: usize = 64;

/// How long a submission that passed waits for a platform that cannot be asked, as its release does.
pub(super) const AWAY_PATIENCE: Duration = Duration::from_secs(12 * 60);

/// How long a request waits for it: an answer may take 90 s.
pub(super) const CLAIM_PATIENCE: Duration = Duration::from_secs(60);

/// Between two tries.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// The rules, and who takes a name just now.
#[derive(Debug)]
pub struct Claims {
    rules: NameRules,
    lanes: [Mutex<()>; LANES],
}

/// Why a user does not get a name.
#[derive(Debug)]
pub enum NotYours {
    /// It is another's, or kept for another.
    Taken,
    /// Nobody gets it.
    Reserved,
    /// The user has this many names, as many as there may be.
    TooMany(usize),
    /// It could not be found out.
    Failed(PlatformError),
}

impl From<PlatformError> for NotYours {
    fn from(error: PlatformError) -> Self {
        Self::Failed(error)
    }
}

impl NotYours {
    /// What is wrong with the name, as the rest of a sentence about the field; the platform's error where it is
    /// not the name.
    pub fn reason(self) -> Result<String, PlatformError> {
        match self {
            Self::Taken => Ok("is not available; choose another".to_owned()),
            Self::Reserved => Ok("is a reserved name; choose another".to_owned()),
            Self::TooMany(most) => Ok(format!(
                "cannot be a new name: its user has {most} names, as many as GANTRY_MAX_NAMES allows; use one of them, or delete one that is not needed (DELETE /repls/{{id}})"
            )),
            Self::Failed(error) => Err(error),
        }
    }

    /// The problem of a name that was free when the submission came in.
    pub fn problem(self, repl: &ReplId) -> Problem {
        match self.reason() {
            Ok(reason) => Problem::new(
                "name_unavailable",
                format!("{repl} cannot be deployed under this name"),
                format!("the name {reason}"),
                "Submit it again with another repl_id.",
            ),
            Err(PlatformError::NotReady(problem) | PlatformError::Unavailable(problem)) => problem,
            Err(PlatformError::NotFound(what)) => Problem::new(
                "name_unavailable",
                "The repl's name could not be taken",
                format!("{what} does not exist"),
                "Submit it again.",
            ),
        }
    }
}

impl Claims {
    /// Nothing is being taken.
    pub fn new(rules: NameRules) -> Self {
        Self {
            rules,
            lanes: std::array::from_fn(|_| Mutex::default()),
        }
    }

    fn lane(&self, user: &UserId) -> &Mutex<()> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(user);
        &self.lanes[hash as usize % LANES]
    }

    fn fits(&self, user: &UserId, repl: &ReplId) -> Result<(), NotYours> {
        if repl.default_of().is_some_and(|of| of != *user) {
            return Err(NotYours::Taken);
        }
        if self.rules.reserved.contains(repl.as_str()) {
            return Err(NotYours::Reserved);
        }
        Ok(())
    }
}

impl Inner {
    /// Whether the user has this name (`true`), or could have it.
    pub(super) async fn check_name(&self, user: &UserId, repl: &ReplId) -> Result<bool, NotYours> {
        match self.platform.owner(repl).await? {
            Some(owner) if owner == *user => return Ok(true),
            Some(_) => return Err(NotYours::Taken),
            None => {}
        }
        self.claims.fits(user, repl)?;
        let most = self.claims.rules.per_user;
        if self.platform.names(user).await? >= most {
            return Err(NotYours::TooMany(most));
        }
        Ok(false)
    }

    /// The same for what has passed: while the platform cannot be asked, it waits.
    pub(super) async fn claim_name_patiently(
        &self,
        user: &UserId,
        repl: &ReplId,
        patience: Duration,
    ) -> Result<bool, NotYours> {
        let began = Instant::now();
        loop {
            match self.claim_name(user, repl).await {
                Err(NotYours::Failed(PlatformError::Unavailable(problem)))
                    if problem.code == AWAY && began.elapsed() < patience =>
                {
                    tracing::warn!(%repl, %problem, "a name waits for the platform");
                    sleep(AWAY_PAUSE).await;
                }
                result => return result,
            }
        }
    }

    /// A name that nothing came of is free again.
    pub(super) async fn give_back(&self, repl: &ReplId) {
        if let Err(error) = self.platform.forget_unused(repl).await {
            tracing::warn!(%repl, %error, "the name of a repl that nothing came of stays taken");
        }
    }

    /// The name is the user's from now on; whether it was not before.
    pub(super) async fn claim_name(&self, user: &UserId, repl: &ReplId) -> Result<bool, NotYours> {
        let _one = self.claims.lane(user).lock().await;
        if self.check_name(user, repl).await? {
            return Ok(false);
        }
        if self.platform.claim(repl, user).await? != *user {
            return Err(NotYours::Taken);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_users_own_name_is_nobody_elses_and_some_are_nobodys() {
        let claims = Claims::new(NameRules {
            reserved: BTreeSet::from(["kibana".to_owned()]),
            per_user: 10,
        });
        let fits = |user: &str, repl: &str| {
            let (user, repl) = (user.parse().unwrap(), repl.parse().unwrap());
            claims.fits(&user, &repl)
        };
        assert!(fits("ann", "ann-prod").is_ok());
        assert!(fits("ann", "shop").is_ok());
        assert!(matches!(fits("ann", "bob-prod"), Err(NotYours::Taken)));
        assert!(matches!(fits("ann", "kibana"), Err(NotYours::Reserved)));
        // Nobody can have the name that this would be kept for.
        assert!(fits("ann", "bob--prod").is_ok());
    }
}
