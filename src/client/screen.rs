//! A submission as people watch it, and as programs read it.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::failure::Failure;
use super::follow::View;
use super::frame::{Event, Frame, Kind};
use super::render::{self, Style};
use super::stdout::{self, Reader};
use crate::model::{Limits, Outcome, OutputStream};

/// Between two pictures of the spinner: fast enough to look alive, slow enough for a remote terminal.
const SPIN_EVERY: Duration = Duration::from_millis(100);

/// Event frames and the reply as JSON lines.
pub(super) struct Json {
    reader: Reader,
}

impl Json {
    pub(super) fn new() -> Self {
        Self {
            reader: Reader::Listening,
        }
    }
}

impl View for Json {
    fn frame(&mut self, frame: &Frame) -> Result<(), Failure> {
        // A reader that left does not stop the submission: the exit code still tells how it ended.
        if self.reader == Reader::Listening {
            self.reader = stdout::write(format!("{}\n", frame.json).as_bytes())?;
        }
        Ok(())
    }

    fn notice(&mut self, text: &str) {
        eprintln!("{text}");
    }
}

/// Steps with a spinner where the terminal has one, the program's output as it comes, the verdict.
pub(super) struct Screen {
    limits: Limits,
    style: Style,
    spinner: Option<ProgressBar>,
    /// Where output can be seen beside the steps, a line the program has not ended must be ended for it.
    shared: bool,
    mid_line: bool,
    reader: Reader,
    output_seen: bool,
    tests_seen: bool,
}

impl Screen {
    pub(super) fn new(limits: Limits) -> Self {
        let terminal = io::stderr().is_terminal();
        Self {
            limits,
            style: Style::stderr(),
            spinner: terminal.then(spinner),
            shared: terminal && io::stdout().is_terminal(),
            mid_line: false,
            reader: Reader::Listening,
            output_seen: false,
            tests_seen: false,
        }
    }

    /// A line beside the program's output.
    fn say(&mut self, text: &str) {
        self.pause_spinner();
        let line_end = if std::mem::take(&mut self.mid_line) {
            "\n"
        } else {
            ""
        };
        eprint!("{line_end}{text}");
    }

    /// What is being waited for.
    fn waiting_for(&mut self, what: &str) {
        // The spinner's line would overwrite the one the program has begun.
        if let (Some(spinner), false) = (&self.spinner, self.mid_line) {
            spinner.reset();
            spinner.set_message(render::printable(what));
            spinner.enable_steady_tick(SPIN_EVERY);
        }
    }

    fn pause_spinner(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }

    fn output(&mut self, stream: OutputStream, data: &str) -> Result<(), Failure> {
        self.output_seen = true;
        self.pause_spinner();
        let visible = match stream {
            OutputStream::Stdout => {
                if self.reader == Reader::Listening {
                    self.reader = stdout::write(data.as_bytes())?;
                }
                self.shared
            }
            OutputStream::Stderr => {
                // Nobody to tell when standard error itself is closed.
                let _ = io::stderr().lock().write_all(data.as_bytes());
                true
            }
        };
        if visible && let Some(last) = data.bytes().last() {
            self.mid_line = last != b'\n';
        }
        Ok(())
    }

    fn event(&mut self, event: &Event) -> Result<(), Failure> {
        match event {
            Event::Queued if self.spinner.is_some() => self.waiting_for("queued"),
            Event::Queued => self.say("· queued\n"),
            Event::Step {
                name,
                state,
                duration_ms,
            } => match state.as_str() {
                "started" => self.waiting_for(name),
                state => self.say(&render::step(
                    name,
                    state == "passed",
                    *duration_ms,
                    self.style,
                )),
            },
            Event::Output { stream, data } => self.output(*stream, data)?,
            Event::Test(result) => {
                self.tests_seen = true;
                self.say(&render::test(result, self.style));
            }
            Event::Unknown => {}
        }
        Ok(())
    }

    fn reply(&mut self, outcome: &Outcome) -> Result<(), Failure> {
        // The stored outcome of an id that ran before may come without its events.
        if !self.output_seen {
            for (stream, text) in [
                (OutputStream::Stdout, &outcome.stdout),
                (OutputStream::Stderr, &outcome.stderr),
            ] {
                self.output(stream, text.as_deref().unwrap_or_default())?;
            }
        }
        if !self.tests_seen {
            for result in &outcome.tests {
                self.say(&render::test(result, self.style));
            }
        }
        self.say(&render::verdict(outcome, &self.limits, self.style));
        Ok(())
    }
}

impl View for Screen {
    fn frame(&mut self, frame: &Frame) -> Result<(), Failure> {
        match &frame.kind {
            Kind::Event(event) => self.event(event),
            Kind::Reply(outcome) => self.reply(outcome),
            Kind::InputReceived(_) | Kind::InputRefused(_) | Kind::Other => Ok(()),
        }
    }

    fn notice(&mut self, text: &str) {
        let line = format!("{}\n", self.style.dim(text));
        self.say(&line);
    }
}

impl Drop for Screen {
    /// An error may come while it spins.
    fn drop(&mut self) {
        self.pause_spinner();
    }
}

fn spinner() -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    spinner.set_style(ProgressStyle::default_spinner());
    spinner
}
