//! Attacks by what user code leaves in folders that the server handles.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{PATIENCE, Server};

/// Submits a program and waits for its reply.
async fn submit(server: &Server, key: &str, submission: Value) -> Value {
    let mut socket = server.connect(key).await;
    socket.ask(submission.to_string()).await
}

/// A release with a database.
fn release(user: &str, repl: &str, code: &str) -> Value {
    json!({ "user_id": user, "repl_id": repl, "code": code, "database": true, "deploy": true })
}

fn data_of(server: &Server, repl: &str) -> std::path::PathBuf {
    server.data.path().join("databases").join(repl)
}

async fn wait_until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// Exchanges a file of its data folder for a link to a file of the host, as fast as it can.
const SWAPS: &str = r"
import ctypes, os
target = '@TARGET@'
if not os.path.isdir('/data'):
    raise SystemExit
for name in range(40):
    open(f'/data/{name}', 'w').close()
os.symlink(target, '/data/link')
libc = ctypes.CDLL(None)
print('swapping', flush=True)
while True:
    for name in range(40):
        # RENAME_EXCHANGE, below the current folder.
        libc.renameat2(-100, f'/data/{name}'.encode(), -100, b'/data/link', 2)
";

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_swaps_links_into_its_data_opens_no_file_of_the_host() {
    let server = Server::start();
    let (_, key) = server.user("mallory").await;
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    std::fs::write(&secret, "s").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    let code = SWAPS.replace("@TARGET@", secret.to_str().unwrap());
    // What serves goes on swapping while the next one is started.
    for _ in 0..3 {
        let reply = submit(&server, &key, release("mallory", "swaps", &code)).await;
        assert_eq!(reply["status"], "deployed", "{reply}");
        assert_eq!(
            mode(&secret),
            0o600,
            "the server opened a file of the host to all"
        );
    }
    assert!(data_of(&server, "swaps").join("link").is_symlink());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_has_neither_devices_nor_programs_with_anothers_rights() {
    let server = Server::start();
    let (_, key) = server.user("mallory").await;
    let code = "for line in open('/proc/self/mountinfo'):\n  \
                parts = line.split()\n  \
                if parts[4] == '/data': open('/data/options', 'w').write(parts[5])\n";
    let reply = submit(&server, &key, release("mallory", "mounts", code)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let options = data_of(&server, "mounts").join("options");
    wait_until("the program wrote nothing", async || options.is_file()).await;
    let options = std::fs::read_to_string(options).unwrap();
    assert!(
        options.contains("nosuid") && options.contains("nodev"),
        "{options}"
    );
}
