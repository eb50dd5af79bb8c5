//! Attacks on the Kubernetes platform by somebody who has a user's key and nothing else.

#[path = "security/network.rs"]
mod network;
#[path = "security/pods.rs"]
mod pods;
#[path = "security/store.rs"]
mod store;
