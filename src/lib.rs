//! Gantry takes code over a WebSocket, tests it in the submitter's own sandbox and, when it
//! passes, deploys it under its own URL.
//!
//! # The map
//!
//! | room | what happens there |
//! |---|---|
//! | [`model`] | the vocabulary; true without I/O |
//! | `transport` | people and programs come in: WebSocket, HTTP, the page, the reverse proxy |
//! | `pipeline` | what happens next: admission → test → publish → release → reply |
//! | `platform` | the trait for whatever owns sandboxes and releases, and its backends |
//! | [`runner`] | inside the sandbox; its wire format and client are shared with the server |
//! | `storage` | the code store |
//! | [`journal`] | append, replay, follow |
//! | `logs` | the record's shape, shipping it and finding it again |
//! | `client` | the command line's side of the protocol |
//! | [`beneath`] | files in folders that user code can write to; the only way to them |
//! | [`budget`] | memory that the server holds for each user |
//! | [`kept`] | small files with a checksum |
//! | `app` | the composition root: the only file that names concrete backends |
//!
//! # The rule of arrows
//!
//! `transport → pipeline → platform → runner/client` and `pipeline → journal → logs`. [`model`],
//! [`beneath`], [`budget`] and [`kept`] import nothing of ours; everyone may import them. `tests/house.rs` fails on any other edge.

pub mod app;
pub mod auth;
pub mod beneath;
pub mod budget;
pub mod client;
pub mod config;
pub mod journal;
pub mod kept;
pub mod logs;
pub mod model;
pub mod pipeline;
pub mod platform;
pub mod runner;
pub mod shutdown;
pub mod storage;
pub mod telemetry;
pub mod transport;
pub mod websocket;
