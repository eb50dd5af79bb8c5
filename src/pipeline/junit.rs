//! JUnit XML, as pytest and `node --test` write it: one `testcase` per test.
//!
//! The program under test can write whatever it likes into the report. It is read as a stream:
//! neither how deep its elements nest nor how many attributes one has costs stack or more than
//! linear time.

use std::time::Duration;

use quick_xml::events::{BytesStart, Event};
use quick_xml::{Reader, XmlVersion, escape};

use crate::model::TestResult;

/// Longest report. The runner reads 1 MiB of it; each byte that is not UTF-8 becomes three.
const MAX_BYTES: usize = 3 << 20;

/// Deepest nesting: `testsuites`, `testsuite`, `testcase` and `failure` are four; a suite within
/// a suite, as Node writes it, adds one each.
const MAX_DEPTH: usize = 64;

/// Most attributes of one element: pytest writes eight.
const MAX_ATTRIBUTES: usize = 64;

/// Longest name kept of one test.
const MAX_NAME: usize = 1 << 10;

/// Longest message kept of one test.
const MAX_MESSAGE: usize = 8 << 10;

/// Most tests whose results are kept; the rest are judged and counted.
const MAX_TESTS: usize = 2_000;

/// What a report says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The first tests, in order.
    pub tests: Vec<TestResult>,
    /// How many tests there are in all.
    pub count: usize,
    /// How many of them failed.
    pub failed: usize,
    /// How many of them were skipped.
    pub skipped: usize,
}

/// Why a text is no report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Defect {
    /// It is longer than a report may be.
    #[error("it is longer than {MAX_BYTES} bytes")]
    Long,
    /// Its elements nest deeper than a report's do.
    #[error("its elements nest more than {MAX_DEPTH} deep")]
    Deep,
    /// An element has more attributes than a report's have.
    #[error("one of its elements has more than {MAX_ATTRIBUTES} attributes")]
    Attributes,
    /// It declares a document type or uses an entity, which no test runner does.
    #[error("it declares a document type or uses an entity of its own")]
    Entity,
    /// It ends before its elements do.
    #[error("it ends early")]
    Early,
    /// It is not XML.
    #[error("it is not XML: {0}")]
    Syntax(String),
}

impl From<quick_xml::Error> for Defect {
    fn from(error: quick_xml::Error) -> Self {
        // The parser's words may quote the report.
        Self::Syntax(error.to_string().chars().take(200).collect())
    }
}

/// A report's tests; `Err` when it is not one. Written by a program we do not trust, so it
/// informs and never decides alone.
pub fn parse(text: &str) -> Result<Report, Defect> {
    if text.len() > MAX_BYTES {
        return Err(Defect::Long);
    }
    let mut reader = Reader::from_str(text);
    let mut reading = Reading::default();
    loop {
        match reader.read_event()? {
            Event::Start(element) => reading.open(&element)?,
            Event::Empty(element) => {
                reading.open(&element)?;
                reading.close();
            }
            Event::End(_) => reading.close(),
            Event::Text(text) => reading.text(&text),
            Event::CData(text) => reading.text(&text),
            Event::GeneralRef(reference) => {
                if let Some(character) = reference.resolve_char_ref()? {
                    reading.text(character.encode_utf8(&mut [0; 4]));
                } else {
                    let known = escape::resolve_predefined_entity(&reference);
                    reading.text(known.ok_or(Defect::Entity)?);
                }
            }
            Event::DocType(_) => return Err(Defect::Entity),
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
            Event::Eof if reading.depth > 0 || !reading.begun => return Err(Defect::Early),
            Event::Eof => return Ok(reading.report),
        }
    }
}

/// A report while it is read.
#[derive(Default)]
struct Reading {
    report: Report,
    depth: usize,
    begun: bool,
    /// The test whose element is open, and how deep that is.
    test: Option<(usize, Test)>,
    /// How deep the open element of its failure is.
    trouble: Option<usize>,
}

/// A test while its element is read.
#[derive(Default)]
struct Test {
    name: String,
    duration_ms: u64,
    failed: bool,
    skipped: bool,
    /// The `message` of the element that says that it failed.
    message: String,
    /// That element's text.
    text: String,
}

impl Reading {
    fn open(&mut self, element: &BytesStart<'_>) -> Result<(), Defect> {
        self.begun = true;
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Defect::Deep);
        }
        let depth = self.depth;
        let attributes = Attributes::of(element)?;
        match (element.name().as_ref(), &mut self.test) {
            ("testcase", None) => {
                let name = match attributes.class.as_str() {
                    "" | "test" => attributes.name,
                    class => format!("{class}::{}", attributes.name),
                };
                let time = Duration::try_from_secs_f64(attributes.seconds).unwrap_or_default();
                let test = Test {
                    name,
                    duration_ms: u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
                    ..Test::default()
                };
                self.test = Some((depth, test));
            }
            ("failure" | "error", Some((at, test))) if depth == *at + 1 && !test.failed => {
                test.failed = true;
                test.message = attributes.message;
                self.trouble = Some(depth);
            }
            ("skipped", Some((at, test))) if depth == *at + 1 => test.skipped = true,
            _ => {}
        }
        Ok(())
    }

    fn text(&mut self, text: &str) {
        if let (Some(_), Some((_, test))) = (self.trouble, &mut self.test) {
            append(&mut test.text, text, MAX_MESSAGE);
        }
    }

    fn close(&mut self) {
        if self.trouble == Some(self.depth) {
            self.trouble = None;
        }
        if let Some((_, test)) = self.test.take_if(|(at, _)| *at == self.depth) {
            self.report.add(test);
        }
        // The parser refuses an end without a beginning.
        self.depth = self.depth.saturating_sub(1);
    }
}

impl Report {
    fn add(&mut self, test: Test) {
        self.count += 1;
        self.failed += usize::from(test.failed);
        self.skipped += usize::from(test.skipped && !test.failed);
        if self.tests.len() == MAX_TESTS {
            return;
        }
        let text = test.text.trim();
        let message = if text.is_empty() { &test.message } else { text };
        self.tests.push(TestResult {
            name: test.name,
            passed: !test.failed,
            duration_ms: test.duration_ms,
            message: test.failed.then(|| message.to_owned()),
            expected: None,
            actual: None,
        });
    }
}

/// The attributes that matter.
#[derive(Default)]
struct Attributes {
    name: String,
    class: String,
    message: String,
    seconds: f64,
}

impl Attributes {
    fn of(element: &BytesStart<'_>) -> Result<Self, Defect> {
        let mut found = Self::default();
        let mut all = element.attributes();
        // The check for names that come twice compares each with all before it.
        for (number, attribute) in all.with_checks(false).enumerate() {
            if number == MAX_ATTRIBUTES {
                return Err(Defect::Attributes);
            }
            let attribute = attribute.map_err(quick_xml::Error::from)?;
            let name = attribute.key.as_ref();
            if !["name", "classname", "message", "time"].contains(&name) {
                continue;
            }
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|_| Defect::Entity)?;
            match name {
                "name" => append(&mut found.name, &value, MAX_NAME),
                "classname" => append(&mut found.class, &value, MAX_NAME),
                "message" => append(&mut found.message, &value, MAX_MESSAGE),
                _ => found.seconds = value.parse().unwrap_or(0.0),
            }
        }
        Ok(found)
    }
}

/// Adds as many whole characters as there is room for.
fn append(text: &mut String, more: &str, most: usize) {
    let room = most.saturating_sub(text.len());
    text.push_str(super::fit::cut(more, room));
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
E assert 1 &lt; 2 &#38; more<![CDATA[ <as it is>]]></failure></testcase>
            <testcase name="test_not"><skipped message="later">why</skipped></testcase></testsuite></testsuites>"#;
        let report = parse(report).unwrap();
        let tests = &report.tests;
        assert_eq!((tests.len(), report.count), (3, 3));
        assert_eq!((report.failed, report.skipped), (1, 1));
        assert!(tests[0].passed && tests[0].name == "test_a::test_good");
        assert_eq!(tests[0].duration_ms, 500);
        let said = tests[1].message.as_deref().unwrap();
        assert!(!tests[1].passed && said.ends_with("1 < 2 & more <as it is>"));
        assert!(tests[2].passed && tests[2].message.is_none());
    }

    #[test]
    fn a_failure_without_text_says_its_message() {
        let text = r#"<a><testcase name="b"><failure message="c &quot;d&quot;"/></testcase></a>"#;
        let report = parse(text).unwrap();
        assert_eq!(report.tests[0].message.as_deref(), Some("c \"d\""));
    }

    #[test]
    fn entities_are_refused() {
        let doctype = "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>";
        assert_eq!(parse(doctype), Err(Defect::Entity));
        assert_eq!(parse("<a>&b;</a>"), Err(Defect::Entity));
        assert_eq!(parse(r#"<a name="&b;"/>"#), Err(Defect::Entity));
    }

    #[test]
    fn a_report_that_ends_early_is_none() {
        for text in ["", " ", "<a>", "<a><testcase name='b'/>", "<a><b></b>"] {
            assert_eq!(parse(text), Err(Defect::Early), "{text}");
        }
        for text in ["<a", "<a></b>", "</a>", "<a b='"] {
            assert!(matches!(parse(text), Err(Defect::Syntax(_))), "{text}");
        }
    }

    #[test]
    fn neither_depth_nor_attributes_nor_length_cost_more_than_their_bytes() {
        let begun = std::time::Instant::now();
        // The smallest stack that a thread of the server has.
        let small = std::thread::Builder::new().stack_size(128 << 10);
        let judged = small.spawn(|| {
            let deep = "<a>".repeat(300_000);
            let names: String = (0..100_000).map(|n| format!(" a{n}=''")).collect();
            let long = "<a/>".repeat(1_000_000);
            [deep, format!("<a{names}/>"), long].map(|text| parse(&text))
        });
        let expected = [Defect::Deep, Defect::Attributes, Defect::Long].map(Err);
        assert_eq!(judged.unwrap().join().unwrap(), expected);
        assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_failure_beyond_the_tests_that_are_kept_counts() {
        let good = "<testcase name='a'/>".repeat(MAX_TESTS);
        let text = format!("<a>{good}<testcase name='b'><error/></testcase></a>");
        let report = parse(&text).unwrap();
        assert_eq!(
            (report.tests.len(), report.count, report.failed),
            (MAX_TESTS, MAX_TESTS + 1, 1)
        );
    }
}
