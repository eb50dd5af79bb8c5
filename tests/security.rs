//! Attacks by somebody who has a user's key and nothing else, each on a real server on the local
//! platform. Every test broke Gantry before the repair that it guards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "security/access.rs"]
mod access;
#[path = "security/files.rs"]
mod files;
#[path = "security/journal.rs"]
mod journal;
#[path = "security/modules.rs"]
mod modules;
#[path = "security/pipeline.rs"]
mod pipeline;
#[path = "security/sandbox.rs"]
mod sandbox;
#[path = "protocol/server.rs"]
#[allow(dead_code, reason = "shared with other tests, which use the rest")]
mod server;
