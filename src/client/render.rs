//! What people see, as text. Nothing here writes anywhere.

use std::fmt::Write as _;
use std::io::IsTerminal;

use crate::model::{Limits, Outcome, Problem, Reason, Status, TestCounts, TestOutcome, TestResult};

/// Lines of an expected or actual output that are shown; the rest is in the record.
const MAX_BLOCK_LINES: usize = 20;
/// Most characters of one line of it.
const MAX_LINE_CHARS: usize = 400;
/// Column at which durations start: the longest step's name and some room.
const NAME_WIDTH: usize = 10;

/// Colours, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Colour,
}

impl Style {
    /// Colours on a terminal that shows them, unless `NO_COLOR` is set (no-color.org).
    pub(super) fn stderr() -> Self {
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        if std::io::stderr().is_terminal() && !refused {
            Style::Colour
        } else {
            Style::Plain
        }
    }

    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Style::Plain => text.to_owned(),
            Style::Colour => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }

    pub(super) fn good(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub(super) fn bad(self, text: &str) -> String {
        self.paint("31", text)
    }

    pub(super) fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub(super) fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }

    fn mark(self, passed: bool) -> String {
        if passed {
            self.good("✓")
        } else {
            self.bad("✗")
        }
    }
}

/// Text from elsewhere, made harmless for a terminal: control characters become visible.
pub(super) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\t' => shown.push(c),
            c if c.is_control() => shown.extend(c.escape_default()),
            // These turn the direction of the text around them: what is shown is not what is there.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => shown.extend(c.escape_unicode()),
            c => shown.push(c),
        }
    }
    shown
}

/// `12 ms`, `1.23 s`, `2 m 5 s`.
pub(super) fn milliseconds(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..60_000 => format!("{}.{:02} s", ms / 1_000, ms % 1_000 / 10),
        _ => format!("{} m {} s", ms / 60_000, ms % 60_000 / 1_000),
    }
}

/// `512 B`, `9.1 MiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 3] = ["KiB", "MiB", "GiB"];
    let (mut scaled, mut unit) = (count, None);
    let mut tenths = 0;
    for name in UNITS {
        if scaled < 1_024 {
            break;
        }
        tenths = scaled % 1_024 * 10 / 1_024;
        scaled /= 1_024;
        unit = Some(name);
    }
    match unit {
        None => format!("{scaled} B"),
        Some(unit) => format!("{scaled}.{tenths} {unit}"),
    }
}

/// One step that ended.
pub(super) fn step(name: &str, passed: bool, duration_ms: Option<u64>, style: Style) -> String {
    let took = duration_ms.map(milliseconds).unwrap_or_default();
    let name = printable(name);
    let line = format!(
        "{} {name:NAME_WIDTH$} {}",
        style.mark(passed),
        style.dim(&took)
    );
    format!("{}\n", line.trim_end())
}

/// One test's result; what was expected and what came out when it did not hold.
pub(super) fn test(result: &TestResult, style: Style) -> String {
    let took = style.dim(&milliseconds(result.duration_ms));
    let mark = match result.outcome {
        TestOutcome::Passed | TestOutcome::Failed => style.mark(!result.failed()),
        TestOutcome::Skipped | TestOutcome::Todo => style.dim("-"),
    };
    let name = printable(&result.name);
    let left_out = match result.outcome {
        TestOutcome::Passed | TestOutcome::Failed => String::new(),
        TestOutcome::Skipped | TestOutcome::Todo => format!(" ({})", result.outcome.as_str()),
    };
    let mut text = format!("  {mark} {name}{left_out}  {took}\n");
    if !result.failed() {
        return text;
    }
    if let Some(message) = &result.message {
        text.push_str(&block("    ", message));
    }
    for (title, value) in [("expected", &result.expected), ("actual", &result.actual)] {
        let Some(value) = value else { continue };
        if value.lines().count() <= 1 {
            // Quoted: a missing or extra space or line end is what most such failures are about.
            let _ = writeln!(text, "    {title:8} {}", cut(&format!("{value:?}")));
        } else {
            let _ = writeln!(text, "    {title}");
            text.push_str(&block("      | ", value));
        }
    }
    for (title, value) in [("stdout", &result.stdout), ("stderr", &result.stderr)] {
        if let Some(value) = value {
            let _ = writeln!(text, "    {title}");
            text.push_str(&block("      | ", value));
        }
    }
    text
}

/// Lines under a common margin, bounded.
pub(super) fn block(margin: &str, value: &str) -> String {
    let mut text = String::new();
    let mut lines = value.lines();
    for line in lines.by_ref().take(MAX_BLOCK_LINES) {
        let _ = writeln!(text, "{margin}{}", cut(&printable(line)));
    }
    let more = lines.count();
    if more > 0 {
        let _ = writeln!(text, "{margin}… {more} more lines");
    }
    text
}

fn cut(line: &str) -> String {
    match line.char_indices().nth(MAX_LINE_CHARS) {
        None => line.to_owned(),
        Some((end, _)) => format!("{}…", &line[..end]),
    }
}

/// How it ended: the status, why, what it used, where it is served.
pub(super) fn verdict(outcome: &Outcome, limits: &Limits, style: Style) -> String {
    let passed = matches!(outcome.status, Status::Deployed | Status::TestsPassed);
    let words = match outcome.status {
        Status::Deployed => "deployed",
        Status::TestsPassed => "tests passed",
        Status::TestsFailed => "tests failed",
        Status::DeployFailed => "deploy failed",
        Status::Superseded => "superseded",
        Status::Cancelled => "cancelled",
        Status::Invalid => "invalid",
        Status::Unavailable => "unavailable",
    };
    let mut text = format!("{} {}", style.mark(passed), style.bold(words));
    if let Some(why) = reason(outcome, limits) {
        let _ = write!(text, ": {why}");
    }
    let mut facts = Vec::new();
    // A failure's code or signal is in its reason already.
    if passed && let Some(code) = outcome.exit_code {
        facts.push(format!("exit code {code}"));
    }
    facts.extend(outcome.duration_ms.map(milliseconds));
    if let Some(usage) = outcome.usage {
        facts.push(format!("{} of processor", milliseconds(usage.cpu_ms)));
        facts.push(format!("{} of memory", bytes(usage.memory_bytes)));
    }
    facts.extend(outcome.release.map(|release| format!("release {release}")));
    if !facts.is_empty() {
        text.push_str(&style.dim(&format!("  ({})", facts.join(" · "))));
    }
    text.push('\n');
    if outcome.truncated {
        text.push_str("  output was longer than its limit; only the first part was kept\n");
    }
    if let Some(error) = &outcome.error {
        text.push_str(&explained("  ", error));
    }
    if let Some(url) = &outcome.url {
        let _ = writeln!(text, "  {}", style.bold(&printable(url)));
    }
    text
}

/// Why it failed, and which option would have changed that.
fn reason(outcome: &Outcome, limits: &Limits) -> Option<String> {
    let most = Limits::MAXIMUM;
    let why = match outcome.reason? {
        Reason::ExitCode => match outcome.exit_code {
            Some(code) => format!("exit code {code}"),
            None => "the program ended with a failure".to_owned(),
        },
        Reason::Signal => match &outcome.signal {
            Some(signal) => format!("ended by {}", printable(signal)),
            None => "ended by a signal".to_owned(),
        },
        Reason::Timeout => format!(
            "stopped after {} (--wall, up to {})",
            milliseconds(limits.wall_ms),
            milliseconds(most.wall_ms)
        ),
        Reason::Cpu => format!(
            "used more than {} of processor (--cpu, up to {})",
            milliseconds(limits.cpu_ms),
            milliseconds(most.cpu_ms)
        ),
        Reason::Memory => format!(
            "used more than {} of memory (--memory, up to {})",
            bytes(limits.memory_bytes),
            bytes(most.memory_bytes)
        ),
        Reason::Output => format!(
            "wrote more than {} (--output-size, up to {})",
            bytes(limits.output_bytes),
            bytes(most.output_bytes)
        ),
        Reason::Disk => format!(
            "wrote a file larger than {} (--file-size, up to {}) or filled its disk",
            bytes(limits.file_bytes),
            bytes(most.file_bytes)
        ),
        Reason::Compile if outcome.error.is_some() => "it could not be built".to_owned(),
        Reason::Compile => "it does not compile".to_owned(),
        Reason::Tests => {
            let listed = || TestCounts::of(&outcome.tests);
            let counts = outcome.test_counts.unwrap_or_else(listed);
            match counts.failed {
                0 => "the test runner reported a failure".to_owned(),
                failed => format!("{failed} of {} tests", counts.all()),
            }
        }
    };
    Some(why)
}

/// A failure of a command, as it is printed last.
pub(super) fn problem(problem: &Problem, style: Style) -> String {
    let mut text = format!("{} {}\n", style.bad("error:"), printable(&problem.message));
    text.push_str(&cause_and_remedy("  ", problem));
    text
}

fn explained(margin: &str, problem: &Problem) -> String {
    let mut text = block(margin, &problem.message);
    text.push_str(&cause_and_remedy(margin, problem));
    text
}

fn cause_and_remedy(margin: &str, problem: &Problem) -> String {
    let mut text = String::new();
    for (title, value) in [("why: ", &problem.cause), ("do:  ", &problem.remediation)] {
        let lines = block("", value);
        for (index, line) in lines.lines().enumerate() {
            let title = if index == 0 { title } else { "     " };
            let _ = writeln!(text, "{margin}{title}{line}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::Usage;

    fn outcome(status: Status, reason: Option<Reason>) -> Outcome {
        Outcome {
            reason,
            duration_ms: Some(1_234),
            ..Outcome::new(status)
        }
    }

    #[test]
    fn durations_and_sizes_read_well_at_every_scale() {
        let times = [0, 999, 1_000, 59_999, 60_000, 125_000].map(milliseconds);
        assert_eq!(
            times,
            ["0 ms", "999 ms", "1.00 s", "59.99 s", "1 m 0 s", "2 m 5 s"]
        );
        let sizes = [0, 1_023, 1_024, 9_600_000, 128 << 20, u64::MAX].map(bytes);
        assert_eq!(
            sizes[..5],
            ["0 B", "1023 B", "1.0 KiB", "9.1 MiB", "128.0 MiB"]
        );
        assert!(sizes[5].ends_with("GiB"));
    }

    #[test]
    fn a_pass_says_where_it_is_served() {
        let passed = Outcome {
            exit_code: Some(0),
            usage: Some(Usage {
                cpu_ms: 8,
                memory_bytes: 9 << 20,
            }),
            release: Some(3),
            url: Some("http://test-prod.apps.localhost:8000/".to_owned()),
            ..outcome(Status::Deployed, None)
        };
        insta::assert_snapshot!(verdict(&passed, &Limits::DEFAULT, Style::Plain), @r"
        ✓ deployed  (exit code 0 · 1.23 s · 8 ms of processor · 9.0 MiB of memory · release 3)
          http://test-prod.apps.localhost:8000/
        ");
    }

    #[test]
    fn every_limit_names_the_option_that_raises_it() {
        let line = |reason| {
            verdict(
                &outcome(Status::TestsFailed, Some(reason)),
                &Limits::DEFAULT,
                Style::Plain,
            )
        };
        assert_eq!(
            line(Reason::Timeout),
            "✗ tests failed: stopped after 10.00 s (--wall, up to 1 m 0 s)  (1.23 s)\n"
        );
        for (reason, option) in [
            (Reason::Cpu, "--cpu"),
            (Reason::Memory, "--memory"),
            (Reason::Output, "--output-size"),
            (Reason::Disk, "--file-size"),
        ] {
            assert!(line(reason).contains(option), "{reason:?}");
        }
    }

    #[test]
    fn a_failure_says_what_happened_why_and_what_to_do() {
        let failed = Outcome {
            error: Some(Problem::new(
                "not_ready",
                "release 2 did not come up",
                "line 1\nline 2",
                "Fix it.",
            )),
            ..outcome(Status::DeployFailed, None)
        };
        insta::assert_snapshot!(verdict(&failed, &Limits::DEFAULT, Style::Plain), @r"
        ✗ deploy failed  (1.23 s)
          release 2 did not come up
          why: line 1
               line 2
          do:  Fix it.
        ");
    }

    #[test]
    fn a_failing_test_shows_expected_and_actual() {
        let one_line = TestResult {
            expected: Some("3\n".to_owned()),
            actual: Some("3".to_owned()),
            ..TestResult::new("adds", TestOutcome::Failed, 12)
        };
        insta::assert_snapshot!(test(&one_line, Style::Plain), @r#"
          ✗ adds  12 ms
            expected "3\n"
            actual   "3"
        "#);
        let many_lines = TestResult {
            message: Some("assert 1 == 2".to_owned()),
            expected: Some("a\nb\n".to_owned()),
            actual: Some("x\n".repeat(25)),
            ..one_line
        };
        let text = test(&many_lines, Style::Plain);
        assert!(
            text.contains("    assert 1 == 2\n    expected\n      | a\n      | b\n    actual\n"),
            "{text}"
        );
        assert!(text.ends_with("      | … 5 more lines\n"), "{text}");
        let ended = TestResult {
            message: Some("ended with exit code 1".to_owned()),
            stderr: Some("Traceback\nError".to_owned()),
            ..TestResult::new("divides", TestOutcome::Failed, 3)
        };
        insta::assert_snapshot!(test(&ended, Style::Plain), @r"
          ✗ divides  3 ms
            ended with exit code 1
            stderr
              | Traceback
              | Error
        ");
        let skipped = TestResult::new("later", TestOutcome::Skipped, 0);
        assert_eq!(test(&skipped, Style::Plain), "  - later (skipped)  0 ms\n");
    }

    #[test]
    fn text_from_elsewhere_cannot_steer_the_terminal() {
        assert_eq!(
            printable("a\x1b[2Jb\r\n\u{202e}c\u{9b}"),
            "a\\u{1b}[2Jb\\r\\n\\u{202e}c\\u{9b}"
        );
        let hostile = TestResult {
            message: Some("\x1b]0;x\x07".to_owned()),
            expected: Some("\x1b".to_owned()),
            actual: Some("\x1b\n\x1b".to_owned()),
            stdout: Some("\x1b".to_owned()),
            stderr: Some("\x1b".to_owned()),
            ..TestResult::new("\x1b[2J", TestOutcome::Failed, 0)
        };
        assert!(!test(&hostile, Style::Plain).contains('\x1b'));
    }

    #[test]
    fn plain_style_has_no_escapes_and_colour_has() {
        assert_eq!(
            step("test", true, Some(7), Style::Plain),
            "✓ test       7 ms\n"
        );
        assert!(step("test", false, None, Style::Colour).contains("\x1b[31m✗"));
    }
}
