//! A repl's workspace on this machine: its current files, run as they are.

use super::{AppPort, Releases, Stored};
use crate::model::{Order, Problem, ReplId, TicketKey};
use crate::platform::{ByteStream, Opened, PlatformError, WorkspaceSpec};

impl Releases {
    /// See [`Platform::open_workspace`](crate::platform::Platform::open_workspace).
    pub async fn open_workspace(&self, spec: &WorkspaceSpec) -> Result<Opened, PlatformError> {
        let repl = &spec.repl_id;
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        if self.claim(repl, &spec.user_id).await? != spec.user_id {
            return Err(PlatformError::NotFound(format!("the repl {repl}")));
        }
        let woken = self.wake_alone(repl).await?;
        let created = woken || !self.runs(repl);
        if created && !woken {
            // What an earlier server was running comes back; it was killed in between.
            let stored = match self.current(repl) {
                Some(stored) => stored,
                None => Stored::workspace(spec.argv.clone(), self.given(repl)),
            };
            self.begin(repl, stored, Some(&spec.order)).await?;
        }
        Ok(Opened {
            created,
            url: self.url(repl),
            terminal_url: self.inner.config.sites.terminal(repl),
        })
    }

    /// See [`Platform::dial_runner`](crate::platform::Platform::dial_runner).
    pub async fn dial_runner(&self, repl: &ReplId) -> Result<Box<dyn ByteStream>, PlatformError> {
        self.dial_port(repl, AppPort::Runner).await
    }

    /// See [`Platform::ticket_key`](crate::platform::Platform::ticket_key).
    pub async fn ticket_key(&self, repl: &ReplId) -> Result<TicketKey, PlatformError> {
        Ok(self.program(repl).await?.key.clone())
    }

    /// Recorded first, with the order: a server that is killed in between brings it up at its next start.
    pub(super) async fn begin(
        &self,
        repl: &ReplId,
        stored: Stored,
        order: Option<&Order>,
    ) -> Result<(), PlatformError> {
        let known = self.with(repl, |repl| {
            let first = repl.record.workspace.is_none();
            let before = repl.record.order.clone();
            repl.record.opens(stored.clone());
            if let Some(order) = order {
                repl.record.order.note(order);
            }
            repl.lost = None;
            (first, before)
        });
        let (first, before) = known.unwrap_or_default();
        self.save(repl)?;
        match self.start(repl, &stored, true).await {
            Ok(program) => {
                self.install(repl, program);
                Ok(())
            }
            Err(error) => {
                self.with(repl, |repl| {
                    repl.record.stopped();
                    // One that never ran does not keep its name.
                    if first {
                        repl.record.workspace = None;
                    }
                    if let Some(order) = order {
                        repl.record.order.withdraw(order, &before);
                    }
                });
                self.save(repl)?;
                Err(PlatformError::NotReady(Problem::new(
                    "start_failed",
                    "The repl could not be started",
                    format!("{error:#}"),
                    "Look whether its files are in the code store; the server's log says more.",
                )))
            }
        }
    }

    /// Whether its sandbox is there and meant to be.
    fn runs(&self, repl: &ReplId) -> bool {
        let runs = self.with(repl, |repl| {
            let program = repl.program.as_ref();
            repl.record.runs() && program.is_some_and(|program| program.is_alive())
        });
        runs == Some(true)
    }
}
