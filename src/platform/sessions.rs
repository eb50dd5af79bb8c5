//! One session per user, kept open over whatever stream the platform gives.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{AWAY, ByteStream, Platform, PlatformError};
use crate::model::{Problem, UserId};
use crate::runner::client::{Connect, ConnectError, Session};

/// The sessions to every user's runner.
#[derive(Debug, Clone)]
pub struct Sessions {
    platform: Arc<dyn Platform>,
    sessions: Arc<Mutex<HashMap<UserId, Session>>>,
}

/// Sessions kept. One costs a few kilobytes; beyond it an arbitrary one is let go, and made again
/// when its user comes back.
const MAX_SESSIONS: usize = 10_000;

impl Sessions {
    /// Sessions over this platform.
    pub fn new(platform: Arc<dyn Platform>) -> Self {
        Self {
            platform,
            sessions: Arc::default(),
        }
    }

    /// The user's session.
    pub fn of(&self, user: &UserId) -> Session {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = sessions.get(user) {
            return session.clone();
        }
        if sessions.len() >= MAX_SESSIONS {
            let any = sessions.keys().next().cloned();
            any.and_then(|user| sessions.remove(&user));
        }
        let session = Session::open(ToUser {
            platform: Arc::clone(&self.platform),
            user: user.clone(),
        });
        sessions.insert(user.clone(), session.clone());
        session
    }
}

struct ToUser {
    platform: Arc<dyn Platform>,
    user: UserId,
}

#[async_trait]
impl Connect for ToUser {
    async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError> {
        let connected = self.platform.connect(&self.user).await;
        connected.map_err(|error| {
            let told = |problem: &Problem| {
                if problem.message.contains(&problem.cause) {
                    problem.message.clone()
                } else {
                    problem.to_string()
                }
            };
            match &error {
                PlatformError::NotReady(problem) => ConnectError::Lasting(told(problem)),
                PlatformError::Unavailable(problem) if problem.code == AWAY => {
                    ConnectError::Away(told(problem))
                }
                PlatformError::Unavailable(problem) => ConnectError::Passing(told(problem)),
                PlatformError::NotFound(_) => ConnectError::Passing(error.to_string()),
            }
        })
    }
}
