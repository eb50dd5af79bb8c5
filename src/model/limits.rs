//! Limits of one run: what it may use before it is stopped.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Largest WebSocket message taken; a larger one closes the connection with 1009.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Most bytes of code in one submission, all files together. A WebSocket message bounds it further.
pub const MAX_CODE_BYTES: usize = 8 << 20;

/// What one run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Wall-clock milliseconds, by the monotonic clock.
    pub wall_ms: u64,
    /// Processor milliseconds of the whole process tree.
    pub cpu_ms: u64,
    /// Bytes of memory of the whole process tree.
    pub memory_bytes: u64,
    /// Processes and threads at one time.
    pub processes: u64,
    /// Bytes of one file.
    pub file_bytes: u64,
    /// Bytes of stdout and stderr together.
    pub output_bytes: u64,
}

impl Limits {
    /// What a submission gets that asks for nothing (design.md §8).
    pub const DEFAULT: Limits = Limits {
        wall_ms: 10_000,
        cpu_ms: 5_000,
        memory_bytes: 128 << 20,
        processes: 64,
        file_bytes: 16 << 20,
        output_bytes: 1 << 20,
    };

    /// The most a submission can ask for (design.md §8), unless the operator lowers it.
    pub const MAXIMUM: Limits = Limits {
        wall_ms: 60_000,
        cpu_ms: 30_000,
        memory_bytes: 512 << 20,
        processes: 256,
        file_bytes: 64 << 20,
        output_bytes: 16 << 20,
    };

    /// What compiling gets: a compiler needs more than what it compiles, and a submission has no say in it.
    /// A debug build of a small web server by the hungriest one here took 25 s and 400 MiB.
    pub const COMPILE: Limits = Limits {
        wall_ms: 120_000,
        cpu_ms: 180_000,
        memory_bytes: 768 << 20,
        processes: 512,
        file_bytes: 128 << 20,
        output_bytes: 1 << 20,
    };

    /// The wall-clock limit.
    pub fn wall(&self) -> Duration {
        Duration::from_millis(self.wall_ms)
    }

    /// The processor limit.
    pub fn cpu(&self) -> Duration {
        Duration::from_millis(self.cpu_ms)
    }
}

/// The limits a submission asks for; what it leaves out is the default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsRequest {
    /// See [`Limits::wall_ms`].
    pub wall_ms: Option<u64>,
    /// See [`Limits::cpu_ms`].
    pub cpu_ms: Option<u64>,
    /// See [`Limits::memory_bytes`].
    pub memory_bytes: Option<u64>,
    /// See [`Limits::processes`].
    pub processes: Option<u64>,
    /// See [`Limits::file_bytes`].
    pub file_bytes: Option<u64>,
    /// See [`Limits::output_bytes`].
    pub output_bytes: Option<u64>,
}

impl LimitsRequest {
    /// The limits to run under, or the field that asks for nothing or for more than `maximum` has.
    pub fn resolve(&self, maximum: &Limits) -> Result<Limits, (&'static str, String)> {
        let pick = |name, asked: Option<u64>, default: u64, max: u64| match asked {
            None => Ok(default.min(max)),
            Some(0) => Err((name, "must be at least 1".to_owned())),
            Some(value) if value > max => {
                Err((name, format!("{value} is more than the maximum of {max}")))
            }
            Some(value) => Ok(value),
        };
        let d = Limits::DEFAULT;
        Ok(Limits {
            wall_ms: pick("limits.wall_ms", self.wall_ms, d.wall_ms, maximum.wall_ms)?,
            cpu_ms: pick("limits.cpu_ms", self.cpu_ms, d.cpu_ms, maximum.cpu_ms)?,
            memory_bytes: pick(
                "limits.memory_bytes",
                self.memory_bytes,
                d.memory_bytes,
                maximum.memory_bytes,
            )?,
            processes: pick(
                "limits.processes",
                self.processes,
                d.processes,
                maximum.processes,
            )?,
            file_bytes: pick(
                "limits.file_bytes",
                self.file_bytes,
                d.file_bytes,
                maximum.file_bytes,
            )?,
            output_bytes: pick(
                "limits.output_bytes",
                self.output_bytes,
                d.output_bytes,
                maximum.output_bytes,
            )?,
        })
    }
}
