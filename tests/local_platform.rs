//! The local platform, held to the contract of every platform.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;

use gantry::model::Limits;
use gantry::platform::Platform;
use gantry::platform::conformance::{Subject, all};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::storage::DirectoryStore;

async fn platform(data: &std::path::Path) -> (Arc<LocalPlatform>, DirectoryStore) {
    let store = DirectoryStore::open(data.join("store")).unwrap();
    let config = LocalConfig {
        data: data.to_owned(),
        runner: env!("CARGO_BIN_EXE_gantry-runner").into(),
        runs_per_user: 4,
        maximum: Limits::MAXIMUM,
        network: false,
        app_authority: "apps.localhost:8000".to_owned(),
    };
    (
        Arc::new(LocalPlatform::start(config, store.clone()).await.unwrap()),
        store,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_local_platform_keeps_the_contract() {
    let data = tempfile::tempdir().unwrap();
    let (platform, store) = platform(data.path()).await;
    for check in platform.checks() {
        println!("{check:?}");
    }
    let subject = Subject {
        platform: Arc::clone(&platform) as Arc<dyn Platform>,
        store: Arc::new(store),
    };
    let result = all(&subject).await;
    if result.is_err() {
        for entry in std::fs::read_dir(data.path().join("sandboxes"))
            .unwrap()
            .flatten()
        {
            let log = std::fs::read_to_string(entry.path().join("runner.log")).unwrap_or_default();
            println!("--- {:?}\n{log}", entry.path());
        }
    }
    platform.shutdown().await;
    result.unwrap();
}
