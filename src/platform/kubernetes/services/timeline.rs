//! What happened to a service, for a person to read: bounded, oldest first.

use std::collections::VecDeque;

use jiff::Timestamp;

use super::replica::Replica;
use crate::model::{Happening, ServiceEvent};

/// Events kept of one service: a scaling of fifty containers and what came before it.
const MAX_EVENTS: usize = 200;

/// The timeline of one service.
#[derive(Debug, Default)]
pub struct Timeline {
    events: VecDeque<ServiceEvent>,
}

/// One event as it is put together.
pub struct Line {
    event: ServiceEvent,
}

impl Line {
    /// What happened, and in words.
    pub fn new(time: Timestamp, event: Happening, message: impl Into<String>) -> Self {
        Self {
            event: ServiceEvent {
                time,
                event,
                container: None,
                node: None,
                message: message.into(),
                duration_ms: None,
            },
        }
    }

    /// To which container, and where.
    pub fn of(mut self, replica: &Replica) -> Self {
        self.event.container = Some(replica.name.clone());
        self.event.node = replica.node.clone();
        self
    }

    /// On which node.
    pub fn on(mut self, node: &str) -> Self {
        self.event.node = Some(node.to_owned());
        self
    }

    /// How long it took since then.
    pub fn after(mut self, since: Timestamp) -> Self {
        let took = self.event.time.duration_since(since).as_millis();
        self.event.duration_ms = u64::try_from(took).ok();
        self
    }
}

impl Timeline {
    /// Adds an event at its time; nearly always the end.
    pub fn add(&mut self, line: Line) {
        let event = line.event;
        let at = self
            .events
            .partition_point(|before| before.time <= event.time);
        self.events.insert(at, event);
        if self.events.len() > MAX_EVENTS {
            self.events.pop_front();
        }
    }

    /// All that is kept, oldest first.
    pub fn events(&self) -> Vec<ServiceEvent> {
        self.events.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn it_is_in_order_and_bounded() {
        let mut timeline = Timeline::default();
        let begin: Timestamp = "2026-01-31T12:00:00Z".parse().unwrap();
        let at = |second: i64| begin + jiff::SignedDuration::from_secs(second);
        for second in (0..300).rev() {
            timeline.add(Line::new(at(second), Happening::Placed, "").after(begin));
        }
        let events = timeline.events();
        assert_eq!(events.len(), MAX_EVENTS);
        assert!(events.is_sorted_by_key(|event| event.time));
        assert_eq!(events.last().unwrap().duration_ms, Some(299_000));
    }
}
