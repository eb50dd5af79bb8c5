//! A test runner's report: one line of JSON for each test, between what was collected and the end.
//!
//! The runner takes it from a descriptor that only its own reporter is given, and leaves out what
//! does not begin with the run's word. The program under test runs in the same process as pytest,
//! so that it may still have written all of this: it is read with bounds, and never decides alone.

use serde::Deserialize;

use crate::model::TestResult;

/// Longest report. The runner takes less from its descriptor.
const MAX_BYTES: usize = 3 << 20;

/// Longest name kept of one test, as JSON.
const MAX_NAME: usize = 2 << 10;

/// Longest message kept of one test, as JSON.
const MAX_MESSAGE: usize = 16 << 10;

/// Most tests whose results are kept; the rest are judged and counted.
const MAX_TESTS: usize = 2_000;

/// What a report says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The first tests, in order.
    pub tests: Vec<TestResult>,
    /// How many passed.
    pub passed: usize,
    /// How many failed.
    pub failed: usize,
    /// How many were skipped.
    pub skipped: usize,
}

/// Why a text is no report that counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// It is longer than a report may be.
    #[error("it is longer than {MAX_BYTES} bytes")]
    Long,
    /// It ends before the test runner does.
    #[error(
        "it ends early: the process ended before its test runner did, or the report is too long"
    )]
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

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Passed,
    Failed,
    Skipped,
    /// A test file in which no test ran.
    Empty,
}

/// A report's tests; `Err` when it does not count as one.
pub fn parse(text: &str) -> Result<Report, Defect> {
    if text.len() > MAX_BYTES {
        return Err(Defect::Long);
    }
    let mut report = Report::default();
    let (mut collected, mut results, mut end) = (None, 0, None);
    for line in text.split_terminator('\n') {
        if end.is_some() {
            return Err(Defect::Foreign);
        }
        match serde_json::from_str::<Line>(line).map_err(|_| Defect::Foreign)? {
            Line::Collected(count) => collected = Some(count),
            Line::Test(test) => {
                results += 1;
                report.add(test);
            }
            Line::End(count) => end = Some(count),
        }
    }
    let ended = end.ok_or(Defect::Early)?;
    let collected = collected.unwrap_or(ended);
    if report.failed == 0 && (ended < collected || results < ended) {
        let ended = ended.min(results);
        return Err(Defect::Missing { collected, ended });
    }
    Ok(report)
}

impl Report {
    fn add(&mut self, test: Test) {
        let Test {
            name,
            outcome,
            ms,
            message,
        } = test;
        let passed = match outcome {
            Outcome::Passed => {
                self.passed += 1;
                true
            }
            Outcome::Skipped => {
                self.skipped += 1;
                true
            }
            Outcome::Failed | Outcome::Empty => {
                self.failed += 1;
                false
            }
        };
        if self.tests.len() == MAX_TESTS {
            return;
        }
        let message = match outcome {
            Outcome::Empty => Some(
                "no test ran in this file: it holds none, or the process ended while it was loaded"
                    .to_owned(),
            ),
            _ => message.filter(|_| !passed),
        };
        let short = |text: &str, most| super::fit::cut(text, most).to_owned();
        self.tests.push(TestResult {
            name: short(&name, MAX_NAME),
            passed,
            duration_ms: ms,
            message: message.map(|text| short(&text, MAX_MESSAGE)),
            expected: None,
            actual: None,
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::time::Duration;

    fn test(name: &str, outcome: &str) -> String {
        format!("{{\"test\":{{\"name\":\"{name}\",\"outcome\":\"{outcome}\",\"ms\":7}}}}\n")
    }

    #[test]
    fn tests_are_read_one_by_one() {
        let bad = r#"{"test":{"name":"b","outcome":"failed","ms":1,"message":"1 == 2"}}"#;
        let (good, skipped) = (test("a", "passed"), test("c", "skipped"));
        let report = parse(&format!(
            "{{\"collected\":3}}\n{good}{bad}\n{skipped}{{\"end\":3}}\n"
        ));
        let report = report.unwrap();
        assert_eq!((report.passed, report.failed, report.skipped), (1, 1, 1));
        let held: Vec<_> = report.tests.iter().map(|test| test.passed).collect();
        assert_eq!(held, [true, false, true]);
        assert_eq!(report.tests[1].message.as_deref(), Some("1 == 2"));
        assert_eq!(report.tests[0].duration_ms, 7);
    }

    #[test]
    fn a_report_that_is_not_whole_does_not_count() {
        let (one, end) = (test("a", "passed"), "{\"end\":1}\n");
        assert!(parse(&format!("{one}{end}")).is_ok());
        for early in [String::new(), one.clone(), "{\"collected\":1}\n".to_owned()] {
            assert_eq!(parse(&early), Err(Defect::Early), "{early}");
        }
        let (collected, ended) = (2, 1);
        let missing = parse(&format!("{{\"collected\":2}}\n{one}{end}"));
        assert_eq!(missing, Err(Defect::Missing { collected, ended }));
        for foreign in ["{\"foreign\":0}\n", "x\n", "\n", "{\"end\":1}\n"] {
            let foreign = parse(&format!("{one}{end}{foreign}"));
            assert_eq!(foreign, Err(Defect::Foreign));
        }
        let empty = parse(&format!("{}{end}", test("a", "empty"))).unwrap();
        assert_eq!((empty.passed, empty.failed), (0, 1));
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
            [deep, nested, many, "x".repeat(4 << 20)].map(|text| parse(&text))
        });
        let judged = judged.unwrap().join().unwrap();
        let expected = [
            Defect::Foreign,
            Defect::Foreign,
            Defect::Foreign,
            Defect::Long,
        ];
        assert_eq!(judged, expected.map(Err));
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_failure_beyond_the_tests_that_are_kept_counts() {
        let text = test("a", "passed").repeat(MAX_TESTS) + &test("b", "failed") + "{\"end\":1}";
        let report = parse(&text).unwrap();
        assert_eq!((report.tests.len(), report.failed), (MAX_TESTS, 1));
    }
}
