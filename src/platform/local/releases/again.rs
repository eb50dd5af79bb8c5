//! A released program whose sandbox ended although nobody ended it is started again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Program, Releases};
use crate::model::ReplId;

/// Pause before the first start, twice as long before each that follows soon.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// One that has lived for so long is started after the first pause again.
const GOOD_LIFE: Duration = Duration::from_secs(60);

impl Releases {
    /// Starts the program again when its sandbox is gone and it should serve. `early`: how often that was soon
    /// after a start.
    pub(super) fn keep_up(&self, repl: &ReplId, program: &Arc<Program>, early: u32) {
        let (this, repl, program) = (self.clone(), repl.clone(), Arc::clone(program));
        tokio::spawn(async move { this.watch_over(repl, program, early).await });
    }

    async fn watch_over(self, repl: ReplId, program: Arc<Program>, early: u32) {
        let began = Instant::now();
        let mut standing = program.standing();
        let gone = async { while standing.changed().await.is_ok() {} };
        let stopped = self.inner.stopped.clone();
        tokio::select! {
            () = gone => {}
            () = stopped.cancelled() => return,
        }
        let early = match began.elapsed() < GOOD_LIFE {
            true => early + 1,
            false => 0,
        };
        if !self.should_be_up(&repl, &program) {
            return;
        }
        tracing::error!(%repl, "the sandbox of a release ended; it is started again");
        let mut tries = early;
        loop {
            let pause = FIRST_PAUSE * 2_u32.saturating_pow(tries.min(10));
            tokio::select! {
                () = sleep(pause.min(LONGEST_PAUSE)) => {}
                () = stopped.cancelled() => return,
            }
            let changing = self.changing(&repl);
            let _one = changing.lock().await;
            // It was stopped meanwhile, or another release took its place.
            if !self.should_be_up(&repl, &program) {
                return;
            }
            let Some(stored) = self.current(&repl) else {
                return;
            };
            match self.start(&repl, &stored, true).await {
                Ok(fresh) => {
                    program.stop().await;
                    return self.install_again(&repl, fresh, early);
                }
                Err(error) => {
                    tracing::error!(%repl, %error, "a release whose sandbox ended was not started again");
                    tries += 1;
                }
            }
        }
    }

    /// Whether it is what should serve, and does not.
    fn should_be_up(&self, repl: &ReplId, program: &Arc<Program>) -> bool {
        let known = self.with(repl, |repl| {
            let own = repl.program.as_ref();
            own.is_some_and(|own| Arc::ptr_eq(own, program)) && repl.record.runs()
        });
        known == Some(true) && !program.is_alive() && self.why_stopped(program.name()).is_none()
    }
}
