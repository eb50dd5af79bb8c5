//! What submissions under way keep in memory, bounded for each user: one who sends more than their
//! share is refused, and nobody else is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{Problem, Submission, Tests, UserId};

/// Submissions under way of all users together. At the slowest, one run a minute and place, the
/// last of them would wait for hours: better to say so at once.
const MOST_IN_ALL: usize = 10_000;

/// Bytes that submissions under way of all users together keep: what a server of 512 MiB can spare.
const MOST_BYTES_IN_ALL: usize = 256 << 20;

/// What a submission counts for besides its texts: its task, its place and its history.
const FIXED_COST: usize = 4 << 10;

/// Bounds for each user.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Most submissions under way: waiting, running or being deployed.
    pub submissions: usize,
    /// Most bytes that these keep: their code, their input, and input that came in frames.
    pub bytes: usize,
}

/// Counts what is kept. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Intake {
    bounds: Bounds,
    now: Arc<Mutex<Now>>,
}

#[derive(Debug, Default)]
struct Now {
    users: HashMap<UserId, Amount>,
    all: Amount,
}

#[derive(Debug, Default, Clone, Copy)]
struct Amount {
    submissions: usize,
    bytes: usize,
}

/// What one submission keeps, until this is dropped.
#[derive(Debug)]
pub struct Kept {
    intake: Intake,
    user: UserId,
    bytes: Mutex<usize>,
}

impl Intake {
    /// With these bounds for each user.
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            now: Arc::default(),
        }
    }

    /// Takes a submission in, or says why its user has to wait.
    pub fn take(&self, submission: &Submission) -> Result<Kept, Problem> {
        let (user, bytes) = (&submission.user_id, size(submission));
        let Bounds {
            submissions: most,
            bytes: most_bytes,
        } = self.bounds;
        let mut now = self.locked();
        let own = now.users.get(user).copied().unwrap_or_default();
        if own.submissions >= most {
            return Err(full(
                format!("{most} submissions of {user} are under way already"),
                "Wait for replies or cancel some; the operator can raise GANTRY_MAX_WAITING.",
            ));
        }
        // The largest message always fits when nothing else is under way.
        if own.submissions > 0 && own.bytes + bytes > most_bytes {
            return Err(full(
                format!("submissions of {user} that are under way keep {most_bytes} bytes already"),
                "Wait for replies or cancel some; the operator can raise GANTRY_MAX_WAITING_BYTES.",
            ));
        }
        let crowded =
            now.all.submissions >= MOST_IN_ALL || now.all.bytes + bytes > MOST_BYTES_IN_ALL;
        // Who has nothing under way is taken in even then: others filled the queue.
        if crowded && own.submissions > 0 {
            return Err(full(
                format!(
                    "{} submissions of all users are waiting already",
                    now.all.submissions
                ),
                "Try again in a while.",
            ));
        }
        Ok(self.add(&mut now, user, bytes))
    }

    /// Counts one that was taken in by an earlier server; its texts are not in memory yet.
    pub fn take_again(&self, user: &UserId) -> Kept {
        self.add(&mut self.locked(), user, FIXED_COST)
    }

    fn add(&self, now: &mut Now, user: &UserId, bytes: usize) -> Kept {
        let own = now.users.entry(user.clone()).or_default();
        own.submissions += 1;
        own.bytes += bytes;
        now.all.submissions += 1;
        now.all.bytes += bytes;
        Kept {
            intake: self.clone(),
            user: user.clone(),
            bytes: Mutex::new(bytes),
        }
    }

    fn locked(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Counts input that came later; `Err` when its user keeps too much already.
    pub fn grow(&self, more: usize) -> Result<(), Problem> {
        let most = self.intake.bounds.bytes;
        let mut now = self.intake.locked();
        let own = now.users.get(&self.user).copied().unwrap_or_default();
        if own.bytes + more > most || now.all.bytes + more > MOST_BYTES_IN_ALL {
            return Err(Problem::new(
                "stdin_too_large",
                "The input was not taken",
                format!(
                    "submissions of {} that are under way keep {} bytes already, and may keep {most}",
                    self.user, own.bytes
                ),
                "Send less, or wait until other submissions have ended; the operator can raise GANTRY_MAX_WAITING_BYTES.",
            ));
        }
        self.count(&mut now, more);
        Ok(())
    }

    /// Counts the texts of a submission that was taken in by an earlier server. It is being read
    /// because it is its turn, so that there is no bound to hold it against.
    pub fn read_back(&self, submission: &Submission) {
        self.count(&mut self.intake.locked(), size(submission));
    }

    /// Counts its input, which is read back with it.
    pub fn read_input(&self, bytes: usize) {
        self.count(&mut self.intake.locked(), bytes);
    }

    fn count(&self, now: &mut Now, more: usize) {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) += more;
        now.all.bytes += more;
        if let Some(own) = now.users.get_mut(&self.user) {
            own.bytes += more;
        }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let bytes = *self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut now = self.intake.locked();
        now.all.submissions -= 1;
        now.all.bytes -= bytes;
        if let Some(own) = now.users.get_mut(&self.user) {
            own.submissions -= 1;
            own.bytes -= bytes;
            if own.submissions == 0 {
                now.users.remove(&self.user);
            }
        }
    }
}

fn full(cause: String, remediation: &str) -> Problem {
    Problem::new(
        "queue_full",
        "The submission was not taken",
        cause,
        remediation,
    )
}

/// Bytes that a submission keeps in memory while it is under way.
fn size(submission: &Submission) -> usize {
    let files = submission.files.iter();
    let files: usize = files
        .map(|(path, text)| path.as_str().len() + text.len())
        .sum();
    let args = |args: &[String]| args.iter().map(String::len).sum::<usize>();
    let optional = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let env = submission.env.iter();
    let env: usize = env.map(|(name, value)| name.len() + value.len()).sum();
    let cases = match &submission.tests {
        Tests::Cases(cases) => cases
            .iter()
            .map(|case| {
                case.name.len()
                    + optional(&case.stdin)
                    + optional(&case.expected_stdout)
                    + case.args.as_deref().map_or(0, args)
            })
            .sum(),
        Tests::ExitCode | Tests::Files(_) => 0,
    };
    FIXED_COST + files + args(&submission.args) + optional(&submission.stdin) + env + cases
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::{Limits, SubmissionRequest};

    fn submission(user: &str, bytes: usize) -> Submission {
        let code = "x".repeat(bytes);
        let request = format!(r#"{{"user_id":"{user}","code":"{code}"}}"#);
        let request: SubmissionRequest = serde_json::from_str(&request).unwrap();
        request.validate(&Limits::MAXIMUM).unwrap()
    }

    #[test]
    fn one_users_submissions_are_bounded_and_nobody_elses() {
        let intake = Intake::new(Bounds {
            submissions: 3,
            bytes: 100_000,
        });
        let small = submission("ann", 10);
        let kept: Vec<_> = (0..3).map(|_| intake.take(&small).unwrap()).collect();
        let refused = intake.take(&small).unwrap_err();
        assert_eq!(refused.code, "queue_full");
        assert!(refused.cause.contains("ann"), "{refused}");
        let _bob = intake.take(&submission("bob", 10)).unwrap();
        drop(kept);
        let _large = intake.take(&submission("ann", 90_000)).unwrap();
        assert!(intake.take(&submission("ann", 9_000)).is_err());
        // Nothing else is under way: the largest message fits.
        assert!(intake.take(&submission("eve", 200_000)).is_ok());
    }

    #[test]
    fn input_counts_for_its_user_until_the_submission_ends() {
        let intake = Intake::new(Bounds {
            submissions: 9,
            bytes: 100_000,
        });
        let one = intake.take(&submission("ann", 0)).unwrap();
        let other = intake.take(&submission("ann", 0)).unwrap();
        one.grow(80_000).unwrap();
        assert_eq!(other.grow(80_000).unwrap_err().code, "stdin_too_large");
        drop(one);
        other.grow(80_000).unwrap();
        drop(other);
        assert!(intake.locked().users.is_empty());
        let all = intake.locked().all;
        assert_eq!((all.submissions, all.bytes), (0, 0));
    }

    #[test]
    fn who_has_nothing_under_way_is_taken_in_when_others_fill_the_queue() {
        let intake = Intake::new(Bounds {
            submissions: MOST_IN_ALL,
            bytes: MOST_BYTES_IN_ALL,
        });
        let small = submission("ann", 0);
        let _all: Vec<_> = (0..MOST_IN_ALL)
            .map(|_| intake.take_again(&small.user_id))
            .collect();
        assert!(intake.take(&small).is_err());
        let _one = intake.take(&submission("bob", 10)).unwrap();
        assert!(intake.take(&submission("bob", 10)).is_err());
    }
}
