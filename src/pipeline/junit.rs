//! JUnit XML, as pytest and `node --test` write it: one `testcase` per test.

use crate::model::TestResult;

/// Longest message kept of one test.
const MAX_MESSAGE: usize = 8 << 10;

/// Most tests read from one report.
const MAX_TESTS: usize = 2_000;

/// The tests of a report; `Err` when it is not one. Written by a program we do not trust, so it
/// informs and never decides alone.
pub fn parse(text: &str) -> Result<Vec<TestResult>, roxmltree::Error> {
    let options = roxmltree::ParsingOptions {
        // No document types, so no entities that grow.
        allow_dtd: false,
        nodes_limit: 100_000,
    };
    let document = roxmltree::Document::parse_with_options(text, options)?;
    let cases = document
        .descendants()
        .filter(|node| node.has_tag_name("testcase"));
    Ok(cases.take(MAX_TESTS).map(|case| test(&case)).collect())
}

fn test(case: &roxmltree::Node<'_, '_>) -> TestResult {
    let attribute = |name: &str| case.attribute(name).unwrap_or_default();
    let trouble = case
        .children()
        .find(|child| child.has_tag_name("failure") || child.has_tag_name("error"));
    let name = match attribute("classname") {
        "" | "test" => attribute("name").to_owned(),
        class => format!("{class}::{}", attribute("name")),
    };
    let seconds: f64 = attribute("time").parse().unwrap_or(0.0);
    let message = trouble.map(|node| {
        let text = node.text().unwrap_or_default().trim();
        let whole = if text.is_empty() {
            node.attribute("message").unwrap_or_default()
        } else {
            text
        };
        whole.chars().take(MAX_MESSAGE).collect()
    });
    TestResult {
        name,
        passed: trouble.is_none(),
        duration_ms: std::time::Duration::try_from_secs_f64(seconds).map_or(0, |time| {
            u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
        }),
        message,
        expected: None,
        actual: None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tests_are_read_one_by_one() {
        let report = r#"<?xml version="1.0"?><testsuites><testsuite name="pytest">
            <testcase classname="test_a" name="test_good" time="0.5"/>
            <testcase classname="test_a" name="test_bad" time="x"><failure message="assert 1 == 2">def test_bad():
E assert 1 == 2</failure></testcase></testsuite></testsuites>"#;
        let tests = parse(report).unwrap();
        assert_eq!(tests.len(), 2);
        assert!(tests[0].passed && tests[0].name == "test_a::test_good");
        assert_eq!(tests[0].duration_ms, 500);
        assert!(!tests[1].passed && tests[1].message.as_deref().unwrap().contains("1 == 2"));
    }

    #[test]
    fn entities_are_refused() {
        assert!(parse("<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>").is_err());
        assert!(parse("").is_err());
    }
}
