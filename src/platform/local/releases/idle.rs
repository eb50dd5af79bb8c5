//! A repl on this machine that nobody uses.

use jiff::Timestamp;

use super::{Problem, Releases, ReplId};
use crate::platform::PlatformError;

impl Releases {
    /// See [`Platform::stop_idle`](crate::platform::Platform::stop_idle).
    pub async fn stop_idle(
        &self,
        repl: &ReplId,
        unused_since: Timestamp,
        looked: Timestamp,
    ) -> Result<bool, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let resting = self.with(repl, |repl| {
            let runs = repl.record.runs() && repl.program.is_some();
            let unchanged = runs && repl.record.since <= looked;
            unchanged.then(|| {
                let mut record = repl.record.clone();
                record.rests(unused_since);
                record
            })
        });
        let Some(record) = resting.flatten() else {
            return Ok(false);
        };
        // Before anybody is told: a server that is killed now must not start it again.
        self.store(repl, &record)?;
        let program = self.with(repl, |repl| {
            repl.record.rests(unused_since);
            repl.program.take()
        });
        if let Some(program) = program.flatten() {
            program.end(self.inner.config.drain, false).await;
        }
        Ok(true)
    }

    /// See [`Platform::is_idle`](crate::platform::Platform::is_idle).
    pub fn is_idle(&self, repl: &ReplId) -> bool {
        let idle = self.with(repl, |repl| repl.record.wanted && !repl.record.runs());
        idle == Some(true)
    }

    /// See [`Platform::wake`](crate::platform::Platform::wake).
    pub async fn wake(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        self.wake_alone(repl).await
    }

    /// The same for who holds the lock of its changes; whether it was idle. One that cannot be started
    /// stays idle.
    pub(super) async fn wake_alone(&self, repl: &ReplId) -> Result<bool, PlatformError> {
        let idle = self.with(repl, |repl| repl.record.idle);
        let (Some(since), Some(stored)) = (idle.flatten(), self.current(repl)) else {
            return Ok(false);
        };
        self.with(repl, |repl| repl.record.opens(stored.clone()));
        self.save(repl)?;
        match self.start(repl, &stored, true).await {
            Ok(program) => {
                self.install(repl, program);
                Ok(true)
            }
            Err(error) => {
                self.with(repl, |repl| repl.record.rests(since));
                self.save(repl)?;
                Err(PlatformError::NotReady(Problem::new(
                    "start_failed",
                    "The repl could not be started again",
                    format!("{error:#}"),
                    "Look whether its files are in the code store; the server's log says more.",
                )))
            }
        }
    }
}
