//! Repls that nobody uses are stopped, and started again by whoever asks them for something next.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, Shared};
use futures_util::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant, sleep};

use super::runner::Runner;
use super::{LastSave, NotSaved, Pipeline, Share};
use crate::model::{ReplId, ReplStatus, idle_cause};
use crate::platform::PlatformError;

/// How often it is looked at who is idle: four times in the time after which a repl is, within these.
const SELDOM: Duration = Duration::from_secs(60);
const OFTEN: Duration = Duration::from_secs(1);

/// Repls asked at one time.
const AT_ONCE: usize = 8;

/// How long what was woken gets to serve, before who waits for it is let on: an image that has to be
/// brought first, a database that comes up.
const UP_PATIENCE: Duration = Duration::from_secs(60);

/// Pause before a runner that cannot be reached yet is asked again, and before its program is looked at again.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// How long the reason is told to everybody why a repl could not be started, before it is tried again.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

/// Resolves when what was idle serves, or cannot be started. However many ask, there is one start.
pub type Awake = Shared<BoxFuture<'static, Result<(), PlatformError>>>;

/// Repls that are being woken.
#[derive(Default)]
pub struct Waking(Mutex<HashMap<ReplId, Awake>>);

impl fmt::Debug for Waking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waking")
    }
}

impl Waking {
    fn locked(&self) -> MutexGuard<'_, HashMap<ReplId, Awake>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pipeline {
    /// Stops what nobody has used for as long as `after`, until the server ends.
    pub(super) async fn keep_stopping_idle(self, after: Option<Duration>) {
        let every = after.map_or(SELDOM, |after| (after / 4).clamp(OFTEN, SELDOM));
        loop {
            sleep(every).await;
            self.inner.platform.settle_idle().await;
            let Some(after) = after else {
                continue;
            };
            let Ok(repls) = self.inner.platform.repls().await else {
                continue;
            };
            // Of several servers one sees to each.
            let Share(mine) = &self.inner.share;
            let up = repls
                .into_iter()
                .filter(|repl| repl.state.is_on() && mine(&repl.repl_id));
            stream::iter(up)
                .for_each_concurrent(AT_ONCE, |repl| self.stop_if_idle(repl, after))
                .await;
        }
    }

    async fn stop_if_idle(&self, status: ReplStatus, after: Duration) {
        let repl = &status.repl_id;
        let looked = Timestamp::now();
        let unused = match self.unused(repl).await {
            Ok(unused) => unused,
            Err(NotSaved::Gone(error)) => {
                tracing::debug!(%repl, %error, "it is not known whether it is used");
                return;
            }
            Err(NotSaved::Failed(problem)) => {
                tracing::debug!(%repl, %problem, "it is not known whether it is used");
                return;
            }
        };
        if unused < after {
            return;
        }
        // While the store does not take it, it is not stopped: there is no hurry. What cannot be kept later either
        // keeps nothing running.
        let last = match self.save_before(repl).await {
            Ok(LastSave {
                problem: None,
                left,
            }) => LastSave {
                problem: None,
                left,
            },
            Ok(LastSave {
                problem: Some(problem),
                ..
            })
            | Err(problem) => {
                tracing::warn!(%repl, %problem, "an idle workspace is not stopped, since it was not saved");
                return;
            }
        };
        let unused = SignedDuration::try_from(unused).unwrap_or(SignedDuration::MAX);
        let Ok(since) = looked.checked_sub(unused) else {
            return;
        };
        match self.inner.platform.stop_idle(repl, since, looked).await {
            Ok(true) => {
                self.inner.saves.forget(repl);
                let (user, message) = (&status.user_id, idle_cause(since) + &last.told());
                self.note(user, repl, "repl.idle", message, status.release)
                    .await;
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%repl, %error, "an idle repl could not be stopped"),
        }
    }

    /// For how long nobody has used the repl, whichever of its pods they would have come to.
    async fn unused(&self, repl: &ReplId) -> Result<Duration, NotSaved> {
        let platform = &*self.inner.platform;
        let runners = platform.dial_runners(repl).await;
        let mut shortest = Duration::MAX;
        for stream in runners.map_err(NotSaved::Gone)? {
            let mut runner = Runner::over(platform, repl, stream).await?;
            let activity = runner.activity().await?;
            // Somebody waits for what starts.
            let unused = match activity.starting {
                true => Duration::ZERO,
                false => Duration::from_millis(activity.unused_ms),
            };
            shortest = shortest.min(unused);
        }
        // Without a runner nobody can tell.
        Ok(if shortest == Duration::MAX {
            Duration::ZERO
        } else {
            shortest
        })
    }

    /// Starts an idle repl again, unless that is under way. `None`: it is not idle, as far as is known.
    pub fn wake(&self, repl: &ReplId) -> Option<Awake> {
        let mut waking = self.inner.waking.locked();
        if let Some(awake) = waking.get(repl) {
            return Some(awake.clone());
        }
        if !self.inner.platform.is_idle(repl) {
            return None;
        }
        let (this, id) = (self.clone(), repl.clone());
        let awake = async move { this.bring_back(&id).await }.boxed().shared();
        waking.insert(repl.clone(), awake.clone());
        let (inner, repl, done) = (Arc::clone(&self.inner), repl.clone(), awake.clone());
        // Whoever asked may go away meanwhile.
        tokio::spawn(async move {
            if let Err(error) = done.await {
                tracing::warn!(%repl, %error, "an idle repl could not be started again");
                sleep(FAILED_PAUSE).await;
            }
            inner.waking.locked().remove(&repl);
        });
        Some(awake)
    }

    async fn bring_back(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let platform = &*self.inner.platform;
        let owner = platform.owner(repl).await?;
        let user = owner.ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))?;
        let place = self.inner.places.take(platform, &user, repl).await?;
        platform.used(&user);
        let woken = platform.wake(repl).await?;
        self.inner.opened.notify_one();
        drop(place);
        if woken {
            let message = "Started again by a request".to_owned();
            self.note(&user, repl, "repl.woken", message, None).await;
        }
        self.is_up(repl).await;
        Ok(())
    }

    /// Resolves when the repl's program has come to something, or has had its time.
    async fn is_up(&self, repl: &ReplId) {
        let began = Instant::now();
        let mut runner = None;
        while began.elapsed() < UP_PATIENCE {
            let now = match runner.take() {
                Some(runner) => Ok(runner),
                None => Runner::dial(&*self.inner.platform, repl).await,
            };
            if let Ok(mut now) = now
                && let Ok(activity) = now.activity().await
            {
                if !activity.starting {
                    return;
                }
                runner = Some(now);
            }
            sleep(ASK_AGAIN).await;
        }
    }
}
