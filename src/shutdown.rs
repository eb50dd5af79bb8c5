//! Ending in order: nothing new is taken, what runs gets a while, then the rest is dropped.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long connections and tasks get to end: a browser's socket closes in milliseconds, an HTTP
/// reply that is being sent in a second or two. Container engines kill after 10 s, so less than that.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the platform gets afterwards, within the same 10 s.
pub const PLATFORM_TIMEOUT: Duration = Duration::from_secs(3);

/// What every long-lived task holds: when to stop, and a count of who has not yet.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Cancelled when the server ends.
    pub token: CancellationToken,
    /// Every connection and background task.
    pub tasks: TaskTracker,
}

/// The wish to end: SIGINT or SIGTERM. Listened for before anybody is told that the server is there:
/// until then the kernel ends the process at once.
#[derive(Debug)]
pub struct EndSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl EndSignals {
    /// From now on a signal waits until it is asked for.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for one and names it.
    pub async fn received(mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

impl Shutdown {
    /// Tells everybody to stop and waits for them; `false` when some did not in time.
    pub async fn drain(&self) -> bool {
        self.drain_within(DRAIN_TIMEOUT).await
    }

    async fn drain_within(&self, limit: Duration) -> bool {
        self.token.cancel();
        self.tasks.close();
        tokio::time::timeout(limit, self.tasks.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn draining_waits_for_tasks_that_end() {
        let shutdown = Shutdown::default();
        let token = shutdown.token.clone();
        shutdown.tasks.spawn(async move { token.cancelled().await });
        assert!(shutdown.drain().await);
    }

    #[tokio::test]
    async fn draining_does_not_wait_for_ever() {
        let shutdown = Shutdown::default();
        shutdown.tasks.spawn(std::future::pending::<()>());
        assert!(!shutdown.drain_within(Duration::from_millis(20)).await);
    }
}
