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
    json!({ "user_id": user, "repl_id": repl, "code": code, "database": true, "deploy": true, "serves": false })
}

fn data_of(server: &Server, repl: &str) -> std::path::PathBuf {
    server.data.path().join("local/databases").join(repl)
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
own = f'/data/{os.urandom(4).hex()}-'
for name in range(40):
    open(f'{own}{name}', 'w').close()
os.symlink(target, f'{own}link')
libc = ctypes.CDLL(None)
print('swapping', flush=True)
while True:
    for name in range(40):
        # RENAME_EXCHANGE, below the current folder.
        libc.renameat2(-100, f'{own}{name}'.encode(), -100, f'{own}link'.encode(), 2)
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
    // The last program's link moves while it is looked for; those of the others stand still.
    wait_until("the programs put no links there", async || {
        let entries = std::fs::read_dir(data_of(&server, "swaps")).unwrap();
        let links = entries.flatten().filter(|entry| entry.path().is_symlink());
        links.count() >= 2
    })
    .await;
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

/// Writes to its data until somebody stops it, from the moment that it runs as a release.
const FILLS: &str = r"
import os, time
if not os.path.isdir('/data'):
    raise SystemExit
print('filling', flush=True)
number = 0
while True:
    number += 1
    with open(f'/data/{number}', 'wb') as file:
        for _ in range(4):
            file.write(os.urandom(1 << 20))
    time.sleep(0.02)
";

fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.metadata().map_or(0, |about| about.len()))
        .sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_fills_its_data_is_stopped_and_its_user_can_delete_them() {
    const MOST: u64 = 64 << 20;
    let most = MOST.to_string();
    let server = Server::start_as(0, &[("GANTRY_MAX_REPL_DATA_BYTES", &most)]);
    let (_, mallory) = server.user("mallory").await;
    let (_, ann) = server.user("ann").await;
    let reply = submit(&server, &mallory, release("mallory", "fills", FILLS)).await;
    let stopped = reply["error"]["cause"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let state = async || -> Value {
        let answer = server.get("/repls/fills").header("x-api-key", &mallory);
        answer.send().await.unwrap().json().await.unwrap()
    };
    // It serves when it is not stopped within the five seconds after which it counts as a worker.
    if reply["status"] == "deployed" {
        wait_until("it was not stopped", async || {
            state().await["state"] == "stopped"
        })
        .await;
        assert!(
            state().await["last_error"]
                .as_str()
                .unwrap()
                .contains("a repl may have")
        );
    } else {
        assert!(stopped.contains("a repl may have"), "{reply}");
    }
    let left = bytes_in(&data_of(&server, "fills"));
    assert!(left > MOST && left < 16 * MOST, "{left} bytes");

    // It does not come back as it is, and says what to do.
    let again = submit(&server, &mallory, release("mallory", "fills", "print(1)")).await;
    assert_eq!(again["status"], "deploy_failed", "{again}");
    assert!(
        again["error"]["remediation"]
            .as_str()
            .unwrap()
            .contains("/repls/fills/data"),
        "{again}"
    );
    let data = |key: &str| server.get("/repls/fills/data").header("x-api-key", key);
    let told: Value = data(&mallory).send().await.unwrap().json().await.unwrap();
    assert!(
        told["bytes"].as_u64().unwrap() > MOST && told["limit_bytes"] == MOST,
        "{told}"
    );

    // Nobody else's to see or to delete.
    let delete = |key: &str| {
        let request = crate::server::client().delete(server.url("/repls/fills/data"));
        request.header("x-api-key", key)
    };
    assert_eq!(data(&ann).send().await.unwrap().status(), 404);
    assert_eq!(delete(&ann).send().await.unwrap().status(), 404);
    let deleted = delete(&mallory).send().await.unwrap();
    assert_eq!(deleted.status(), 200);
    assert_eq!(deleted.json::<Value>().await.unwrap()["bytes"], 0);
    assert_eq!(bytes_in(&data_of(&server, "fills")), 0);
    let serves = "import http.server; http.server.HTTPServer(('', 3000), http.server.BaseHTTPRequestHandler).serve_forever()";
    let code = format!("import os\nif os.path.isdir('/data'):\n  {serves}");
    let again = submit(&server, &mallory, release("mallory", "fills", &code)).await;
    assert_eq!(again["status"], "deployed", "{again}");
    // Not under a running program.
    assert_eq!(delete(&mallory).send().await.unwrap().status(), 409);
}

/// A file system of its own for a server's data.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(bytes: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = std::ffi::CString::new(format!("size={bytes},mode=0700")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", folder.path(), "tmpfs", flags, options.as_c_str()).unwrap();
        Self(folder)
    }

    fn free(&self) -> u64 {
        let about = rustix::fs::statfs(self.0.path()).unwrap();
        about.f_bavail * u64::try_from(about.f_bsize).unwrap()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let detach = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0.path(), detach).unwrap();
    }
}

/// Takes room that no listing shows: files without a name, and a mapping of one that is closed.
const HIDES: &str = r"
import mmap, os, time
if not os.path.isdir('/data'):
    raise SystemExit
print('hiding', flush=True)
kept = []
piece = os.urandom(1 << 20)
while True:
    file = os.open('/data', os.O_TMPFILE | os.O_RDWR, 0o600)
    for _ in range(4):
        os.write(file, piece)
    kept.append(mmap.mmap(file, 4 << 20))
    os.close(file)
    time.sleep(0.02)
";

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_who_fills_it_and_nobody_else() {
    const DISK: u64 = 512 << 20;
    const RESERVE: u64 = 256 << 20;
    let disk = SmallDisk::mount(DISK);
    let reserve = RESERVE.to_string();
    let server = Server::start_as(
        0,
        &[
            ("GANTRY_DATA_DIR", disk.0.path().to_str().unwrap()),
            ("GANTRY_DISK_RESERVE_BYTES", &reserve),
        ],
    );
    let serves = "import os\nif os.path.isdir('/data'):\n  import http.server\n  \
                  http.server.HTTPServer(('', 3000), http.server.SimpleHTTPRequestHandler).serve_forever()";
    let victim = submit(&server, &server.admin, release("ann", "quiet", serves)).await;
    assert_eq!(victim["status"], "deployed", "{victim}");
    let reply = submit(&server, &server.admin, release("mallory", "hides", HIDES)).await;
    if reply["status"] == "deployed" {
        wait_until("it was not stopped", async || {
            let answer = server
                .get("/repls/hides")
                .header("x-api-key", &server.admin);
            let state: Value = answer.send().await.unwrap().json().await.unwrap();
            state["state"] == "stopped"
        })
        .await;
    } else {
        let cause = reply["error"]["cause"].as_str().unwrap_or_default();
        assert!(cause.contains("disk is full"), "{reply}");
    }
    wait_until("the room did not come back", async || disk.free() > RESERVE).await;
    let quiet = server
        .get("/repls/quiet")
        .header("x-api-key", &server.admin);
    let quiet: Value = quiet.send().await.unwrap().json().await.unwrap();
    assert_eq!(quiet["state"], "running", "{quiet}");
    let run = submit(
        &server,
        &server.admin,
        release("ann", "quiet", "print('x')"),
    )
    .await;
    assert_eq!(run["status"], "deployed", "{run}");
}

/// Waits until a release is stopped, which may be before it counts as deployed, and returns why.
async fn why_stopped(server: &Server, key: &str, repl: &str, reply: &Value) -> String {
    if reply["status"] != "deployed" {
        return reply["error"]["cause"].as_str().unwrap().to_owned();
    }
    let mut why = String::new();
    wait_until("it was not stopped", async || {
        let state = state_of(server, key, repl).await;
        why = state["last_error"].as_str().unwrap_or_default().to_owned();
        state["state"] == "stopped"
    })
    .await;
    why
}

async fn state_of(server: &Server, key: &str, repl: &str) -> Value {
    let asked = server.get(&format!("/repls/{repl}"));
    let answer = asked.header("x-api-key", key).send().await.unwrap();
    answer.json().await.unwrap()
}

/// Keeps the room of closed files by one mapped page of each.
const MAPS: &str = r"
import mmap, os, time
if not os.path.isdir('/data'):
    raise SystemExit
kept = []
for _ in range(20):
    file = os.open('/data', os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(file, os.urandom(8 << 20))
    kept.append(mmap.mmap(file, 4096))
    os.close(file)
print('kept', flush=True)
time.sleep(1000)
";

/// Keeps files open in a thread that has a descriptor table of its own, after the first thread has ended.
const OWN_TABLE: &str = r"
import ctypes, os, threading, time
if not os.path.isdir('/data'):
    raise SystemExit
libc = ctypes.CDLL(None, use_errno=True)
def hide():
    # CLOSE_RANGE_UNSHARE, and nothing to close.
    if libc.syscall(436, 100000, 200000, 2) != 0:
        os._exit(100 + ctypes.get_errno())
    for _ in range(20):
        file = os.open('/data', os.O_TMPFILE | os.O_RDWR, 0o600)
        os.write(file, os.urandom(8 << 20))
    print('kept', flush=True)
    time.sleep(1000)
threading.Thread(target=hide).start()
@THEN@
";

#[tokio::test(flavor = "multi_thread")]
async fn data_without_a_name_or_a_descriptor_of_the_process_are_counted() {
    let most = (64 << 20).to_string();
    let server = Server::start_as(0, &[("GANTRY_MAX_REPL_DATA_BYTES", &most)]);
    let (_, key) = server.user("mallory").await;
    let stopped = async |repl: &str, code: &str| {
        let reply = submit(&server, &key, release("mallory", repl, code)).await;
        let why = why_stopped(&server, &key, repl, &reply).await;
        assert!(why.contains("a repl may have"), "{repl}: {why} {reply}");
    };
    let sleeps = OWN_TABLE.replace("@THEN@", "time.sleep(1000)");
    // The first thread ends alone, and the process goes on without it.
    let ends = OWN_TABLE.replace("@THEN@", "libc.syscall(60, 0)");
    tokio::join!(
        stopped("maps", MAPS),
        stopped("table", &sleeps),
        stopped("headless", &ends),
    );
}

/// Fills the disk up to its reserve, keeps the files in messages that nobody receives, and then is still.
const IN_FLIGHT: &str = r"
import os, socket, time
if not os.path.isdir('/data'):
    raise SystemExit
ours, theirs = socket.socketpair()
def free():
    about = os.statvfs('/data')
    return about.f_bavail * about.f_frsize
while free() > @LEAVES@:
    file = os.open('/data', os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(file, os.urandom(8 << 20))
    socket.send_fds(ours, [b'x'], [file])
    os.close(file)
open('/data/done', 'w').close()
time.sleep(1000)
";

/// Rewrites one file, from when its repl is asked to.
const REWRITES: &str = r"
import os, time
if not os.path.isdir('/data'):
    raise SystemExit
print('ready', flush=True)
while not os.path.exists('/data/go'):
    time.sleep(0.05)
while True:
    with open('/data/file', 'r+b' if os.path.exists('/data/file') else 'wb') as file:
        for _ in range(48):
            file.write(os.urandom(1 << 20))
";

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_who_holds_it_and_not_who_writes_now() {
    const DISK: u64 = 512 << 20;
    const RESERVE: u64 = 256 << 20;
    let disk = SmallDisk::mount(DISK);
    let reserve = RESERVE.to_string();
    let server = Server::start_as(
        0,
        &[
            ("GANTRY_DATA_DIR", disk.0.path().to_str().unwrap()),
            ("GANTRY_DISK_RESERVE_BYTES", &reserve),
        ],
    );
    let key = server.admin.clone();
    let ann = submit(&server, &key, release("ann", "rewrites", REWRITES)).await;
    assert_eq!(ann["status"], "deployed", "{ann}");
    let leaves = (RESERVE + (32 << 20)).to_string();
    let code = IN_FLIGHT.replace("@LEAVES@", &leaves);
    let mallory = submit(&server, &key, release("mallory", "flies", &code)).await;
    assert_eq!(mallory["status"], "deployed", "{mallory}");
    let databases = disk.0.path().join("local/databases");
    wait_until("the disk was not filled", async || {
        databases.join("flies/done").exists()
    })
    .await;
    assert_eq!(state_of(&server, &key, "flies").await["state"], "running");
    std::fs::write(databases.join("rewrites/go"), "").unwrap();
    let why = why_stopped(&server, &key, "flies", &mallory).await;
    assert!(why.contains("disk is full"), "{why}");
    wait_until("the room did not come back", async || disk.free() > RESERVE).await;
    // It writes on, much more than the disk has, and takes no more room by that.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let rewrites = state_of(&server, &key, "rewrites").await;
    assert_eq!(rewrites["state"], "running", "{rewrites}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_room_is_taken_without_writing() {
    let server = Server::start();
    let (_, key) = server.user("mallory").await;
    let code = "import os, errno, ctypes\n\
                if not os.path.isdir('/data'): raise SystemExit\n\
                file = os.open('/data/large', os.O_CREAT | os.O_RDWR)\n\
                libc = ctypes.CDLL(None, use_errno=True)\n\
                done = libc.fallocate(file, 0, ctypes.c_long(0), ctypes.c_long(1 << 40))\n\
                open('/data/answer', 'w').write(errno.errorcode.get(ctypes.get_errno(), str(done)))\n\
                os.posix_fallocate(file, 0, 1 << 20)\n";
    let reply = submit(&server, &key, release("mallory", "reserves", code)).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
    let answer = std::fs::read_to_string(data_of(&server, "reserves").join("answer")).unwrap();
    // As Python calls EOPNOTSUPP.
    assert_eq!(answer, "ENOTSUP");
    let large = data_of(&server, "reserves").join("large");
    assert_eq!(
        large.metadata().unwrap().len(),
        1 << 20,
        "libraries have another way"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn code_is_refused_beyond_its_users_room() {
    let server = Server::start_as(0, &[("GANTRY_MAX_USER_DISK_BYTES", "2097152")]);
    let (_, key) = server.user("mallory").await;
    let (_, ann) = server.user("ann").await;
    let mut refused = None;
    for number in 0..8 {
        let filler = format!("{number}").repeat(400 << 10);
        let code = format!("text = '{filler}'");
        let mut wanted = release("mallory", "large", &code);
        wanted["database"] = false.into();
        let reply = submit(&server, &key, wanted).await;
        if reply["status"] != "deployed" {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.expect("it was never refused");
    assert_eq!(refused["error"]["code"], "disk_quota", "{refused}");
    let reply = submit(&server, &ann, release("ann", "small", "print(1)")).await;
    assert_eq!(reply["status"], "deployed", "{reply}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_folder_that_user_code_could_read_is_refused_at_the_start() {
    let folder = Path::new("/usr/local/share").join(format!("gantry-test-{}", std::process::id()));
    let started = std::process::Command::new(env!("CARGO_BIN_EXE_gantry"))
        .env("GANTRY_DATA_DIR", &folder)
        .args(["serve", "--port", "0"])
        .output()
        .unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    let said = String::from_utf8_lossy(&started.stderr);
    assert!(
        !started.status.success() && said.contains("/usr, which every program"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_beside_the_data_is_shown_and_nothing_else_there() {
    // Not in /tmp, which a run has of its own.
    let home = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let local = home.path().canonicalize().unwrap().join(".local");
    let (bin, data) = (local.join("bin"), local.join("share/gantry"));
    std::fs::create_dir_all(&bin).unwrap();
    for tool in ["tsc", "node"] {
        std::fs::write(bin.join(tool), "#!/bin/sh\n").unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(bin.join(tool), mode).unwrap();
    }
    let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
    let server = Server::start_as(
        0,
        &[
            ("HOME", home.path().to_str().unwrap()),
            ("PATH", &path),
            ("GANTRY_DATA_DIR", data.to_str().unwrap()),
        ],
    );
    assert!(
        data.join("local").is_dir(),
        "the server keeps its data there"
    );
    let code = format!(
        "import os\nprint(os.path.exists('{0}/share'), os.path.exists('{0}/bin/tsc'))",
        local.display()
    );
    let run = json!({ "user_id": "ann", "code": code, "deploy": false });
    let reply = submit(&server, &server.admin, run).await;
    assert_eq!(reply["stdout"], "False True\n", "{reply}");
}
