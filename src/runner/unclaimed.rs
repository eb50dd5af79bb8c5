//! Processor time that no process has in its sum: that of children which the kernel collected itself, because
//! their parent ignores their end. Their control group has it.
//!
//! The group is that of all runs of a sandbox, which are one user's. What of it belongs to none that can be
//! named is shared by the runs of that time: so all of them together have no more than their limits allow.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use super::process::{ProcessorGroup, processor_time_of_all};

/// For how long processes of a run that has ended may take with them what they used: ten times as long as
/// killed ones have taken at most to be gone here.
const LEAVING: Duration = Duration::from_millis(500);

/// The processor time of one sandbox that is in nobody's sum.
#[derive(Debug)]
pub struct Unclaimed {
    group: ProcessorGroup,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was shared out already, or was there before.
    counted: Duration,
    /// What the last look found.
    last: Duration,
    /// What runs that ended a moment ago had, and until when it is theirs.
    leaving: Option<(Duration, Instant)>,
    shares: Vec<Weak<Cell<Duration>>>,
}

/// What falls to one run.
#[derive(Debug)]
pub struct Share {
    of: Rc<Unclaimed>,
    own: Rc<Cell<Duration>>,
    /// What its processes had when they were looked at last.
    pub claimed: Duration,
}

impl Unclaimed {
    /// Of the sandbox with this group.
    pub fn of(group: ProcessorGroup) -> Rc<Self> {
        Rc::new(Self {
            group,
            state: RefCell::default(),
        })
    }

    /// For a run that has just begun; `None`: the group's time is not known.
    pub fn share(self: &Rc<Self>) -> Option<Share> {
        let (unclaimed, _) = self.now()?;
        let own = Rc::new(Cell::default());
        let mut state = self.state.borrow_mut();
        state.shares.retain(|share| share.strong_count() > 0);
        if state.shares.is_empty() {
            // Of runs that are over.
            state.counted = state.counted.max(unclaimed);
            state.last = unclaimed;
        }
        state.shares.push(Rc::downgrade(&own));
        Some(Share {
            of: Rc::clone(self),
            own,
            claimed: Duration::ZERO,
        })
    }

    /// What is in nobody's sum now, and by how much that may be too much.
    fn now(&self) -> Option<(Duration, Duration)> {
        // First: what is used from here on is in the processes' sums at most.
        let used = self.group.used()?;
        let (claimed, inexact) = processor_time_of_all();
        Some((used.saturating_sub(claimed), inexact))
    }

    fn look(&self) {
        if let Some((unclaimed, inexact)) = self.now() {
            let certain = unclaimed.saturating_sub(inexact);
            self.state.borrow_mut().found(certain, Instant::now());
        }
    }
}

impl State {
    /// Shares out what is new of so much.
    fn found(&mut self, certain: Duration, now: Instant) {
        // A process that ends in the middle of a look may be in no sum for this once.
        let lasting = certain.min(self.last);
        self.last = certain;
        let mut new = lasting.saturating_sub(self.counted);
        self.counted += new;
        if let Some((left, until)) = self.leaving {
            let theirs = left.min(new);
            new -= theirs;
            self.leaving = (now < until).then_some((left - theirs, until));
        }
        let shares: Vec<_> = self.shares.iter().filter_map(Weak::upgrade).collect();
        let each = new / u32::try_from(shares.len()).unwrap_or(u32::MAX).max(1);
        for share in shares {
            share.set(share.get() + each);
        }
    }
}

impl Share {
    /// Looks again. The run's processes have used so much by their own sums.
    pub fn look(&mut self, claimed: Duration) {
        self.claimed = claimed;
        self.of.look();
    }

    /// What fell to this run.
    pub fn cpu(&self) -> Duration {
        self.own.get()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = self.of.state.borrow_mut();
        // What is left of it is killed, and may be collected by the kernel, too.
        let before = state.leaving.map_or(Duration::ZERO, |(left, _)| left);
        state.leaving = Some((before + self.claimed, Instant::now() + LEAVING));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn what_is_nobodys_is_shared_by_who_runs() {
        let (one, two) = (Rc::new(Cell::default()), Rc::new(Cell::default()));
        let now = Instant::now();
        let mut state = State {
            counted: ms(100),
            last: ms(100),
            shares: vec![Rc::downgrade(&one)],
            ..State::default()
        };
        state.found(ms(300), now);
        assert_eq!(one.get(), ms(0), "one look may be mistaken");
        state.found(ms(300), now);
        assert_eq!(one.get(), ms(200));
        state.shares.push(Rc::downgrade(&two));
        state.found(ms(900), now);
        state.found(ms(500), now);
        assert_eq!((one.get(), two.get()), (ms(300), ms(100)));
        drop(one);
        state.found(ms(600), now);
        state.found(ms(600), now);
        assert_eq!(two.get(), ms(200));
    }

    #[test]
    fn what_an_ended_run_used_is_not_anothers() {
        let own = Rc::new(Cell::default());
        let now = Instant::now();
        let mut state = State {
            leaving: Some((ms(500), now + LEAVING)),
            shares: vec![Rc::downgrade(&own)],
            ..State::default()
        };
        state.found(ms(600), now);
        state.found(ms(600), now);
        assert_eq!(own.get(), ms(100));
        state.found(ms(600), now + 2 * LEAVING);
        state.found(ms(800), now + 2 * LEAVING);
        state.found(ms(800), now + 2 * LEAVING);
        assert_eq!((own.get(), state.leaving), (ms(300), None));
    }
}
