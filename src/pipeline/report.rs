//! A test runner's report: one line of JSON for each test, between what was collected and the end.
//!
//! The runner takes it from a descriptor that only its own reporter is given, and leaves out what
//! does not begin with the run's word. The program under test runs in the same process as pytest,
//! so that it may still have written all of this: it is read with bounds, and never decides alone.

use serde::Deserialize;

use crate::model::{Reason, TestCounts, TestOutcome, TestResult};

/// Longest report. The runner takes less from its descriptor.
const MAX_BYTES: usize = 3 << 20;

/// Longest name kept of one test, as JSON.
const MAX_NAME: usize = 2 << 10;

/// Longest message kept of one test, as JSON.
const MAX_MESSAGE: usize = 16 << 10;

/// Most tests whose results are kept; the rest are counted.
const MAX_TESTS: usize = 2_000;

/// What a report says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Tests in order; where not all are kept, those that failed come first.
    pub tests: Vec<TestResult>,
    /// How many ended how, also of those that are not kept.
    pub counts: TestCounts,
    /// Why it does not count as a whole one. What could be read of it is above.
    pub defect: Option<Defect>,
}

/// Why a text is no report that counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// It is longer than a report may be.
    #[error("it is longer than {MAX_BYTES} bytes")]
    Long,
    /// It ends before the test runner does.
    #[error("it ends early: the process ended before its test runner did")]
    Early,
    /// Tests that were found are not in it.
    #[error("{collected} tests were found, and {ended} of them ended")]
    Missing {
        /// How many were found.
        collected: usize,
        /// How many have a result.
        ended: usize,
    },
    /// Somebody else wrote to it.
    #[error("something other than the test runner wrote to it")]
    Foreign,
    /// It could not be read.
    #[error("it could not be read: {0}")]
    Unread(String),
}

/// One line. What nests deeper than these do is refused by the parser, which has a bound of its own.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Collected(usize),
    Test(Test),
    /// Tests that there was no room for.
    Untold(Untold),
    End(usize),
}

#[derive(Deserialize)]
struct Test {
    name: String,
    outcome: Outcome,
    ms: u64,
    #[serde(default)]
    message: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Untold {
    passed: usize,
    failed: usize,
    skipped: usize,
    todo: usize,
    empty: usize,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Passed,
    Failed,
    Skipped,
    Todo,
    /// A test file in which no test ran.
    Empty,
}

/// A report's tests, as far as they can be read.
pub fn parse(text: &str) -> Report {
    if text.len() > MAX_BYTES {
        return Report::broken(Defect::Long);
    }
    let mut report = Report::default();
    let mut late = Vec::new();
    let (mut collected, mut end) = (None, None);
    for line in text.split_terminator('\n') {
        let line = match end {
            None => serde_json::from_str::<Line>(line).ok(),
            // Nothing follows the end.
            Some(_) => None,
        };
        match line {
            Some(Line::Collected(count)) => collected = Some(count),
            Some(Line::Test(test)) => report.add(test, &mut late),
            Some(Line::Untold(untold)) => report.count(&untold),
            Some(Line::End(count)) => end = Some(count),
            None => {
                report.defect = Some(Defect::Foreign);
                break;
            }
        }
    }
    report.keep(late);
    if report.defect.is_none() {
        report.defect = report.missing(collected, end);
    }
    report
}

impl Report {
    /// One of which nothing can be read.
    pub fn broken(defect: Defect) -> Self {
        Self {
            defect: Some(defect),
            ..Self::default()
        }
    }

    /// What is not in it.
    fn missing(&self, collected: Option<usize>, end: Option<usize>) -> Option<Defect> {
        let Some(ended) = end else {
            return Some(Defect::Early);
        };
        let (results, collected) = (self.counts.all(), collected.unwrap_or(ended));
        let ended_all = ended >= collected && results >= ended;
        // A test runner may stop at the first failure.
        (!ended_all && self.counts.failed == 0).then(|| Defect::Missing {
            collected,
            ended: ended.min(results),
        })
    }

    fn add(&mut self, test: Test, late: &mut Vec<TestResult>) {
        let Test {
            name,
            outcome,
            ms,
            message,
        } = test;
        let (outcome, message) = match outcome {
            Outcome::Passed => (TestOutcome::Passed, None),
            Outcome::Skipped => (TestOutcome::Skipped, None),
            Outcome::Todo => (TestOutcome::Todo, None),
            Outcome::Failed => (TestOutcome::Failed, message),
            Outcome::Empty => (TestOutcome::Failed, Some(EMPTY.to_owned())),
        };
        self.counts.add(outcome);
        let short = |text: &str, most| super::fit::cut(text, most).to_owned();
        let kept = match self.tests.len() < MAX_TESTS {
            true => &mut self.tests,
            // What failed takes the place of what did not.
            false if outcome == TestOutcome::Failed && late.len() < MAX_TESTS => late,
            false => return,
        };
        kept.push(TestResult {
            reason: (outcome == TestOutcome::Failed).then_some(Reason::Tests),
            message: message.map(|text| short(&text, MAX_MESSAGE)),
            ..TestResult::new(short(&name, MAX_NAME), outcome, ms)
        });
    }

    fn count(&mut self, untold: &Untold) {
        let counts = &mut self.counts;
        for (count, more) in [
            (&mut counts.passed, untold.passed),
            (
                &mut counts.failed,
                untold.failed.saturating_add(untold.empty),
            ),
            (&mut counts.skipped, untold.skipped),
            (&mut counts.todo, untold.todo),
        ] {
            *count = count.saturating_add(more);
        }
    }

    /// Those that failed come first in a list that is not whole.
    fn keep(&mut self, late: Vec<TestResult>) {
        if self.counts.all() == self.tests.len() {
            return;
        }
        self.tests.extend(late);
        self.tests.sort_by_key(|test| !test.failed());
        self.tests.truncate(MAX_TESTS);
    }
}

/// Why a test file in which no test ran does not pass.
const EMPTY: &str =
    "no test ran in this file: it holds none, or the process ended while it was loaded";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    fn test(name: &str, outcome: &str) -> String {
        format!("{{\"test\":{{\"name\":\"{name}\",\"outcome\":\"{outcome}\",\"ms\":7}}}}\n")
    }

    fn counts(report: &Report) -> [usize; 4] {
        let TestCounts {
            passed,
            failed,
            skipped,
            todo,
        } = report.counts;
        [passed, failed, skipped, todo]
    }

    #[test]
    fn tests_are_read_one_by_one() {
        let bad = r#"{"test":{"name":"b","outcome":"failed","ms":1,"message":"1 == 2"}}"#;
        let [good, skipped, todo] = ["passed", "skipped", "todo"].map(|word| test(word, word));
        let report = parse(&format!(
            "{{\"collected\":4}}\n{good}{bad}\n{skipped}{todo}{{\"end\":4}}\n"
        ));
        assert_eq!((counts(&report), &report.defect), ([1, 1, 1, 1], &None));
        use TestOutcome::{Failed, Passed, Skipped, Todo};
        let outcomes: Vec<_> = report.tests.iter().map(|test| test.outcome).collect();
        assert_eq!(outcomes, [Passed, Failed, Skipped, Todo]);
        assert_eq!(report.tests[1].message.as_deref(), Some("1 == 2"));
        assert_eq!(report.tests[1].reason, Some(Reason::Tests));
        assert_eq!(report.tests[0].duration_ms, 7);
    }

    #[test]
    fn a_report_that_is_not_whole_says_so_and_what_is_in_it_is_read() {
        let (one, end) = (test("a", "passed"), "{\"end\":1}\n");
        let read = |text: String| {
            let report = parse(&text);
            (report.counts.passed, report.defect)
        };
        assert_eq!(read(format!("{one}{end}")), (1, None));
        assert_eq!(read(one.clone()), (1, Some(Defect::Early)));
        for early in [String::new(), "{\"collected\":1}\n".to_owned()] {
            assert_eq!(read(early), (0, Some(Defect::Early)));
        }
        let (collected, ended) = (2, 1);
        let missing = read(format!("{{\"collected\":2}}\n{one}{end}"));
        assert_eq!(missing, (1, Some(Defect::Missing { collected, ended })));
        for foreign in ["{\"foreign\":0}\n", "x\n", "\n", "{\"end\":1}\n"] {
            let foreign = read(format!("{one}{end}{foreign}"));
            assert_eq!(foreign, (1, Some(Defect::Foreign)));
        }
        let empty = parse(&format!("{}{end}", test("a", "empty")));
        assert_eq!((counts(&empty), empty.defect), ([0, 1, 0, 0], None));
    }

    #[test]
    fn what_a_program_may_write_costs_neither_stack_nor_time() {
        let begun = std::time::Instant::now();
        let small = std::thread::Builder::new().stack_size(256 << 10);
        let judged = small.spawn(|| {
            let deep = "[".repeat(1_000_000);
            let nested = "{\"test\":".repeat(300_000);
            let names: String = (0..100_000).map(|n| format!("\"a{n}\":1,")).collect();
            let many = format!("{{\"test\":{{{names}\"name\":\"a\"}}}}");
            let all = usize::MAX;
            let counts = format!("{{\"untold\":{{\"passed\":{all}}}}}\n").repeat(3);
            [deep, nested, many, "x".repeat(4 << 20), counts].map(|text| parse(&text).defect)
        });
        let judged = judged.unwrap().join().unwrap();
        let expected = [
            Defect::Foreign,
            Defect::Foreign,
            Defect::Foreign,
            Defect::Long,
            Defect::Early,
        ];
        assert_eq!(judged, expected.map(Some));
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn what_failed_comes_first_when_not_all_are_kept() {
        let text = test("a", "passed").repeat(MAX_TESTS) + &test("b", "failed");
        let report = parse(&(text + "{\"untold\":{\"passed\":9,\"failed\":1}}\n{\"end\":2011}"));
        assert_eq!(report.defect, None);
        assert_eq!(counts(&report), [MAX_TESTS + 9, 2, 0, 0]);
        assert_eq!(report.tests.len(), MAX_TESTS);
        let first: Vec<&str> = report
            .tests
            .iter()
            .map(|t| t.name.as_str())
            .take(2)
            .collect();
        assert_eq!(first, ["b", "a"]);
        // A list that is whole stays in order.
        let whole = parse(&(test("a", "passed") + &test("b", "failed") + "{\"end\":2}"));
        assert!(!whole.tests[0].failed());
    }
}
