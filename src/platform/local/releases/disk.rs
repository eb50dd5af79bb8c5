//! The disk that repls' data share: who takes more than its part is stopped, before there is no room for
//! anybody. A program cannot take room faster than it writes, because the kernel reserves none for user code.
//!
//! When less than the reserve is free, one program at a time is stopped, and only one whose end helps: it
//! writes just now, or it holds files without a name, whose room comes back when it ends. Of these it is the
//! one that may take most room: its repl's data and code, what it may hide, and what it will have written
//! by the next look. Who wrote most just now is no measure alone, because a program may fill the disk, keep
//! still, and leave it to a neighbour's next bytes to be stopped.
//!
//! What a program hides is counted where the kernel shows it. It does not show a file whose descriptor waits
//! in a socket, so a program seen with such a descriptor may hide all that it ever wrote, except what its
//! data grew by. For other programs the sum of what they wrote says nothing: a database that rewrites
//! one file for a year takes no room by that.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::{Releases, ReplId, UserId};
use crate::model::{Problem, ReplData, repl_runs};
use crate::platform::PlatformError;
use crate::platform::local::hidden::Hidden;
use crate::platform::local::launch::{FirstProcess, Written};
use crate::platform::local::program::Program;
use crate::platform::local::unavailable;

/// How often the disk's free room is looked at: a system call. In this time a program writes less than the
/// usual reserve.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often data are counted, and after how many bytes less of free room at once.
const COUNT_EVERY: Duration = Duration::from_secs(3);
const COUNT_AFTER: u64 = 32 << 20;

/// Counting takes at most one part in so many of the time.
const REST: u32 = 4;

/// How long is looked at who is writing, when there is no room left, and the fewest bytes that count.
const WATCHED: Duration = Duration::from_millis(150);
const LEAST_WRITTEN: u64 = 1 << 20;

/// The fewest bytes in files without a name for which a program is stopped when there is no room left.
/// Temporary files of an ordinary program are smaller.
const LEAST_HELD: u64 = 16 << 20;

/// The next look is about so many times `WATCHED` away.
const AHEAD: u64 = 2;

/// How long a stopped program may take to end, and to give its room back, before the next one is stopped.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

/// How long it is remembered why a program was stopped.
const REMEMBERED: Duration = Duration::from_secs(600);

/// A program that writes to its repl's data, from before it serves.
#[derive(Debug, Clone)]
pub(super) struct Writer {
    repl: ReplId,
    user: UserId,
    /// The name of its sandbox.
    name: String,
    process: FirstProcess,
    /// Since when it is stopped, and why.
    stopped: Option<(Instant, String)>,
}

impl Releases {
    /// Watches what this program writes.
    pub(super) fn writes(&self, repl: &ReplId, user: &UserId, program: &Program) {
        let mut writers = self.writers();
        writers.retain(|known| match &known.stopped {
            Some((since, _)) => since.elapsed() < REMEMBERED,
            None => known.process.is_alive(),
        });
        writers.push(Writer {
            repl: repl.clone(),
            user: user.clone(),
            name: program.name().to_owned(),
            process: program.first_process(),
            stopped: None,
        });
    }

    /// Why the program in this sandbox was stopped, if it wrote too much.
    pub(super) fn why_stopped(&self, name: &str) -> Option<String> {
        let writers = self.writers();
        let found = writers.iter().find(|writer| writer.name == name)?;
        found.stopped.as_ref().map(|(_, why)| why.clone())
    }

    fn writers(&self) -> std::sync::MutexGuard<'_, Vec<Writer>> {
        let writers = &self.inner.writers;
        writers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn living_writers(&self) -> Vec<Writer> {
        let writers = self.writers();
        let living = writers.iter();
        let living = living.filter(|one| one.stopped.is_none() && one.process.is_alive());
        living.cloned().collect()
    }

    /// Watches the disk until the server ends.
    pub(in super::super) fn watch_disk(&self) {
        let this = self.clone();
        tokio::spawn(async move {
            let stopped = this.inner.stopped.clone();
            let mut state = Watch::default();
            loop {
                tokio::select! {
                    () = tokio::time::sleep(LOOK_EVERY) => {}
                    () = stopped.cancelled() => return,
                }
                let look = this.clone();
                // Counting waits for the disk.
                let looked = tokio::task::spawn_blocking(move || {
                    let result = look.look_at_disk(&mut state);
                    (state, result)
                });
                let Ok((next, result)) = looked.await else {
                    return;
                };
                state = next;
                match result {
                    Ok(over) => {
                        for (writer, why) in over {
                            this.stop_writer(writer, why);
                        }
                    }
                    Err(error) => tracing::warn!(%error, "the room on the disk cannot be told"),
                }
            }
        });
    }

    /// Who is to be stopped, and why.
    fn look_at_disk(&self, state: &mut Watch) -> std::io::Result<Vec<(Writer, String)>> {
        let disk = &self.inner.disk;
        let (free, reserve) = disk.free()?;
        let writers = self.living_writers();
        if writers.is_empty() {
            return Ok(Vec::new());
        }
        let mut over = Vec::new();
        let shrunk = state.free.saturating_sub(free) > COUNT_AFTER;
        state.free = state.free.max(free);
        let since = state
            .counted
            .map_or(COUNT_EVERY, |counted| counted.elapsed());
        if since >= COUNT_EVERY || (shrunk && since >= state.pause) {
            let began = Instant::now();
            over = self.count_all(&writers, state)?;
            state.pause = began.elapsed() * REST;
            state.counted = Some(Instant::now());
            state.free = free;
        }
        if over.is_empty() && free < reserve && !state.still_ends() {
            over.extend(self.takes_most(&writers, state)?);
            let ends = over.first();
            state.ends = ends.map(|(writer, _)| (Instant::now(), writer.process));
        }
        Ok(over)
    }

    /// Whose end gives most room back, or keeps most of it, and why.
    fn takes_most(
        &self,
        writers: &[Writer],
        state: &mut Watch,
    ) -> std::io::Result<Option<(Writer, String)>> {
        let disk = &self.inner.disk;
        let before: Vec<Written> = writers.iter().map(|one| one.process.written()).collect();
        std::thread::sleep(WATCHED);
        let mut most: Option<(u64, &Writer, String)> = None;
        for (writer, before) in writers.iter().zip(before) {
            let after = writer.process.written();
            let written = after.since(before);
            let data = disk.data(&writer.repl)?;
            let (seen, unseen) = match state.held.get_mut(&writer.name) {
                Some(held) => {
                    held.written = held.written.max(after);
                    (held.seen, held.unseen(data))
                }
                None => (0, 0),
            };
            if written < LEAST_WRITTEN && seen + unseen < LEAST_HELD {
                continue;
            }
            // What is seen without a name is among the data.
            let taken = disk.of_user(std::slice::from_ref(&writer.repl))?;
            let room = taken + unseen + AHEAD * written;
            if most.as_ref().is_none_or(|(largest, ..)| room > *largest) {
                let why = format!(
                    "the machine's disk is full, and of the programs that write or hold removed files it may take most: data and code are {taken} bytes, {unseen} more may be hidden, and {written} were written within {} ms",
                    WATCHED.as_millis()
                );
                most = Some((room, writer, why));
            }
        }
        Ok(most.map(|(_, writer, why)| (writer.clone(), why)))
    }

    fn count_all(
        &self,
        writers: &[Writer],
        state: &mut Watch,
    ) -> std::io::Result<Vec<(Writer, String)>> {
        let disk = &self.inner.disk;
        let device = disk.device()?;
        let mut over: Vec<(Writer, String)> = Vec::new();
        state
            .held
            .retain(|name, _| writers.iter().any(|one| one.name == *name));
        for writer in writers {
            // Also what it has removed and holds open or mapped.
            let hidden = writer.process.hidden(device);
            let written = writer.process.written();
            if let Some(why) = disk.count(&writer.repl, hidden)? {
                over.push((writer.clone(), why));
            }
            let data = disk.data(&writer.repl)?;
            let held = state.held.entry(writer.name.clone());
            held.or_insert_with(|| Held::of(data))
                .add(hidden, written, data);
        }
        for writer in writers {
            let user = &writer.user;
            if over.iter().any(|(one, _)| one.user == *user) {
                continue;
            }
            let (bytes, most) = (
                disk.of_user(&self.repls_of(user))?,
                disk.bounds().user_bytes,
            );
            if bytes <= most {
                continue;
            }
            let own = writers.iter().filter(|one| one.user == *user);
            let largest = own.max_by_key(|one| disk.data(&one.repl).unwrap_or(0));
            let why = format!(
                "data and releases of {user} take {bytes} bytes, more than the {most} that a user may have, and its data are the largest"
            );
            over.extend(largest.map(|largest| (largest.clone(), why)));
        }
        Ok(over)
    }

    fn repls_of(&self, user: &UserId) -> Vec<ReplId> {
        let repls = self.locked();
        let own = repls
            .iter()
            .filter(|(_, repl)| repl.record.user_id == *user);
        own.map(|(id, _)| id.clone()).collect()
    }

    /// Ends its sandbox at once, whoever changes the repl just now; then it counts as stopped.
    fn stop_writer(&self, writer: Writer, why: String) {
        tracing::warn!(repl = %writer.repl, user = %writer.user, %why, "a program is stopped");
        for known in self.writers().iter_mut() {
            if known.name == writer.name {
                known.stopped = Some((Instant::now(), why.clone()));
            }
        }
        writer.process.kill();
        let this = self.clone();
        tokio::spawn(async move {
            let changing = this.changing(&writer.repl);
            let _one = changing.lock().await;
            let program = this.with(&writer.repl, |repl| {
                let its = |program: &std::sync::Arc<Program>| program.name() == writer.name;
                if !repl.program.as_ref().is_some_and(its) {
                    return None;
                }
                repl.record.stopped();
                repl.lost = Some(format!("Stopped: {why}"));
                repl.program.take()
            });
            let Some(program) = program.flatten() else {
                return;
            };
            program.stop().await;
            if let Err(error) = this.save(&writer.repl) {
                tracing::error!(repl = %writer.repl, %error, "that it is stopped is not stored");
            }
        });
    }

    /// See [`Platform::admit`](crate::platform::Platform::admit).
    pub async fn admit(&self, user: &UserId, repl: &ReplId, more: u64) -> Result<(), Problem> {
        let (this, user, repl) = (self.clone(), user.clone(), repl.clone());
        let admitted = tokio::task::spawn_blocking(move || {
            let mut repls = this.repls_of(&user);
            if !repls.contains(&repl) {
                repls.push(repl.clone());
            }
            this.inner.disk.admit(&user, &repl, &repls, more)
        });
        let admitted = admitted.await.map_err(std::io::Error::other).flatten();
        admitted.unwrap_or_else(|error| Err(not_counted(&error)))
    }

    /// See [`Platform::data`](crate::platform::Platform::data).
    pub async fn data(&self, repl: &ReplId) -> Result<ReplData, PlatformError> {
        let user = self.owner(repl);
        let user = user.ok_or_else(|| PlatformError::NotFound(format!("the repl {repl}")))?;
        let (this, repl) = (self.clone(), repl.clone());
        let counted = tokio::task::spawn_blocking(move || {
            let disk = &this.inner.disk;
            disk.count(&repl, Hidden::default())?;
            let bounds = disk.bounds();
            Ok(ReplData {
                bytes: Some(disk.data(&repl)?),
                limit_bytes: Some(bounds.repl_bytes),
                user_bytes: Some(disk.of_user(&this.repls_of(&user))?),
                user_limit_bytes: Some(bounds.user_bytes),
            })
        });
        let counted = counted.await.map_err(std::io::Error::other).flatten();
        counted.map_err(|error| PlatformError::Unavailable(not_counted(&error)))
    }

    /// See [`Platform::delete_data`](crate::platform::Platform::delete_data).
    pub async fn delete_data(&self, repl: &ReplId) -> Result<(), PlatformError> {
        let changing = self.changing(repl);
        let _one = changing.lock().await;
        let runs = self.with(repl, |repl| repl.program.is_some() || repl.record.wanted);
        match runs {
            None => return Err(PlatformError::NotFound(format!("the repl {repl}"))),
            Some(true) => return Err(PlatformError::NotReady(repl_runs(repl))),
            Some(false) => {}
        }
        let (this, name) = (self.clone(), repl.clone());
        let deleted = tokio::task::spawn_blocking(move || this.inner.disk.delete(&name)).await;
        let deleted = deleted.map_err(std::io::Error::other).flatten();
        deleted.map_err(|error| {
            unavailable(
                "The repl's data could not be deleted",
                &error.into(),
                "Try again; the server's log says more.",
            )
        })?;
        // What was said of its data is over.
        self.with(repl, |repl| repl.lost = None);
        Ok(())
    }
}

/// What is known from one look to the next.
#[derive(Debug, Default)]
struct Watch {
    counted: Option<Instant>,
    /// The shortest time to the next count.
    pause: Duration,
    /// The most room there was since.
    free: u64,
    /// What living programs hold, by the names of their sandboxes.
    held: HashMap<String, Held>,
    /// Which program was stopped last because the disk was full, and when.
    ends: Option<(Instant, FirstProcess)>,
}

impl Watch {
    fn still_ends(&self) -> bool {
        let ends = self.ends.as_ref();
        ends.is_some_and(|(since, process)| since.elapsed() < ENDS_WITHIN && process.is_alive())
    }
}

/// What a program holds beside the files that its data folder shows.
#[derive(Debug)]
struct Held {
    /// Bytes of files without a name, as they were counted last.
    seen: u64,
    /// Whether a descriptor was ever seen on its way through a socket. One that moves all the time is not
    /// seen at every look.
    in_flight: bool,
    /// The largest figures: those of a process may go with it.
    written: Written,
    /// The least that the repl's data were. What was there before the program is nothing that it wrote.
    least: u64,
}

impl Held {
    fn of(data: u64) -> Self {
        Self {
            seen: 0,
            in_flight: false,
            written: Written::default(),
            least: data,
        }
    }

    fn add(&mut self, hidden: Hidden, written: Written, data: u64) {
        self.seen = hidden.bytes;
        self.in_flight |= hidden.in_flight;
        self.written = self.written.max(written);
        self.least = self.least.min(data);
    }

    /// The most that it may hide where nobody sees it.
    fn unseen(&self, data: u64) -> u64 {
        if !self.in_flight {
            return 0;
        }
        let grown = data.saturating_sub(self.least);
        self.written.most_room().saturating_sub(grown)
    }
}

fn not_counted(error: &std::io::Error) -> Problem {
    Problem::new(
        "disk_unavailable",
        "It cannot be told how much room there is",
        error.to_string(),
        "Check that the data folder is there and can be read.",
    )
}
