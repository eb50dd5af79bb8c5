//! Lines out of a sandbox or a workspace, for the installer of what a program depends on, and for nothing else.
//! The installer needs no network of its own: its runner passes each connection on to here, and a
//! [`Tunnel`] joins it to a package index, or refuses it.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Pipeline;
use super::runner::Runner;
use crate::model::{Place, ReplId, UserId};
use crate::platform::tunnel::{self, Meters, Trouble, Tunnel};
use crate::platform::{ByteStream, Platform};
use crate::runner::wire::{FromRunner, JobId, frames, raw};

/// Connections that an installer may have at one time.
const LINES: usize = 6;

/// Longest wait for a workspace's runner to take a line: it has nothing to do before it.
const GREETING: Duration = Duration::from_secs(5);

/// Between two tries to lend a line to a runner that cannot be reached.
const AGAIN: Duration = Duration::from_millis(500);

/// How often it is looked for workspaces that other servers opened.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// How long a line waits in a workspace before another takes its place.
const RENEW: Duration = Duration::from_secs(60);

/// Longest pause before a workspace is tried again that took no line: its pod may be starting, or of an image
/// from before there were lines.
const SELDOM: Duration = Duration::from_secs(5);

/// Pause before the first line is lent: what is installed already is found sooner, and no installer starts
/// as fast.
const AHEAD: Duration = Duration::from_millis(50);

/// The lines of one job, until this is dropped.
#[derive(Debug)]
pub struct Lent {
    _lines: JoinSet<()>,
    trouble: Arc<Trouble>,
}

impl Lent {
    /// Why an index could not be reached, the last time that it could not.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.told()
    }
}

/// Lends the job lines to these places.
pub fn lend(
    platform: &Arc<dyn Platform>,
    user: &UserId,
    job: JobId,
    places: BTreeSet<Place>,
    meters: &Arc<Meters>,
) -> Lent {
    let tunnel = Tunnel::new(user.to_string(), places, Arc::clone(meters));
    let user = user.clone();
    let line = Arc::new(Line::new(platform, Taker::Job { user, job }, tunnel));
    let mut lines = JoinSet::new();
    for _ in 0..LINES {
        let line = Arc::clone(&line);
        lines.spawn(async move {
            sleep(AHEAD).await;
            loop {
                if let Err(error) = line.carry_one().await {
                    tracing::debug!(%job, error = format!("{error:#}"), "a line to an installer ended");
                    sleep(AGAIN).await;
                }
            }
        });
    }
    Lent {
        _lines: lines,
        trouble: line.tunnel.trouble(),
    }
}

/// Lends the workspace lines to these places, until this is dropped. Nobody knows when its user will run an
/// installer: one line waits at any time, and the next one when that is taken.
pub fn lend_to_workspace(
    platform: &Arc<dyn Platform>,
    repl: &ReplId,
    places: BTreeSet<Place>,
    meters: &Arc<Meters>,
) -> JoinSet<()> {
    let (platform, meters) = (Arc::clone(platform), Arc::clone(meters));
    let repl = repl.clone();
    let mut lending = JoinSet::new();
    lending.spawn(async move {
        let user = owner(&platform, &repl).await;
        let tunnel = Tunnel::new(user.to_string(), places, meters);
        let line = Arc::new(Line::new(&platform, Taker::Workspace(repl.clone()), tunnel));
        let (mut carried, mut pause) = (JoinSet::new(), AGAIN);
        loop {
            while carried.try_join_next().is_some() {}
            while carried.len() >= LINES {
                carried.join_next().await;
            }
            match line.taken().await {
                Ok((installer, head)) => {
                    pause = AGAIN;
                    let line = Arc::clone(&line);
                    carried.spawn(async move {
                        if let Err(error) = line.tunnel.carry(installer, head).await {
                            tracing::debug!(error = format!("{error:#}"), "a line to an installer ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::debug!(%repl, error = format!("{error:#}"), "a workspace takes no line");
                    sleep(pause).await;
                    pause = SELDOM.min(pause * 2);
                }
            }
        }
    });
    lending
}

/// Whose account the repl's lines are on; waits while the platform cannot say.
async fn owner(platform: &Arc<dyn Platform>, repl: &ReplId) -> UserId {
    loop {
        if let Ok(Some(user)) = platform.owner(repl).await {
            return user;
        }
        sleep(SELDOM).await;
    }
}

/// Who is lent a line.
enum Taker {
    Job { user: UserId, job: JobId },
    Workspace(ReplId),
}

/// What a line needs to know.
struct Line {
    platform: Arc<dyn Platform>,
    taker: Taker,
    tunnel: Tunnel,
}

impl Line {
    fn new(platform: &Arc<dyn Platform>, taker: Taker, tunnel: Tunnel) -> Self {
        Self {
            platform: Arc::clone(platform),
            taker,
            tunnel,
        }
    }

    /// A line of which somebody has taken the other end, and what came on it already.
    async fn taken(&self) -> anyhow::Result<(Box<dyn ByteStream>, Vec<u8>)> {
        let repl = match &self.taker {
            Taker::Job { user, job } => {
                return tunnel::taken(self.platform.connect(user).await?, *job).await;
            }
            Taker::Workspace(repl) => repl,
        };
        let runner = Runner::dial(&*self.platform, repl).await?;
        let (mut reader, writer) = frames(timeout(GREETING, runner.lend()).await??);
        // It may have been lost long ago, and nothing tells of it.
        let taken = timeout(RENEW, reader.next::<FromRunner>()).await??;
        anyhow::ensure!(taken == FromRunner::Taken, "no line is wanted: {taken:?}");
        Ok(raw(reader, writer))
    }

    /// One connection of the installer's, from when it is made to its end.
    async fn carry_one(&self) -> anyhow::Result<()> {
        let (installer, head) = self.taken().await?;
        self.tunnel.carry(installer, head).await
    }
}

impl Pipeline {
    /// Lends lines to every workspace that is this server's to see to, until the server ends.
    pub(super) async fn keep_lending(self) {
        let packages = &self.inner.packages;
        let places: BTreeSet<Place> = packages
            .indexes
            .values()
            .flat_map(|index| index.places.iter().cloned())
            .collect();
        let (platform, meters) = (&self.inner.platform, &self.inner.meters);
        let mut lent: HashMap<ReplId, JoinSet<()>> = HashMap::new();
        loop {
            if let Ok(open) = self.open_workspaces().await {
                lent.retain(|repl, _| open.contains(repl));
                for repl in open {
                    let lending = || lend_to_workspace(platform, &repl, places.clone(), meters);
                    lent.entry(repl.clone()).or_insert_with(lending);
                }
            }
            // One that was opened here is seen to at once.
            let _ = timeout(LOOK_EVERY, self.inner.opened.notified()).await;
        }
    }
}
