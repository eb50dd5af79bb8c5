//! Packages of modules and of programs: what they run while they are installed, whose they are, and what their
//! installer may say to an index.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::server::{Server, client};

/// The first module of a server waits for what serves modules to be installed.
const FIRST: Duration = Duration::from_secs(90);

/// The wheels that serve modules, fetched once, by this machine's pip.
fn tools() -> &'static Path {
    static TOOLS: OnceLock<tempfile::TempDir> = OnceLock::new();
    let made = TOOLS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let fetched = Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps"])
            .args(["--only-binary", ":all:", "--dest"])
            .arg(folder.path())
            .args(["--requirement", "runner-image/requirements.txt"])
            .output()
            .unwrap();
        assert!(fetched.status.success(), "{fetched:?}");
        folder
    });
    made.path()
}

struct Index {
    process: Child,
    folder: tempfile::TempDir,
    /// Anybody on this machine may write here.
    open: tempfile::TempDir,
    port: u16,
}

impl Index {
    fn start() -> Self {
        let (folder, open) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let everybody = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(open.path(), everybody).unwrap();
        let mut process = Command::new("python3")
            .arg("tests/security/modules/index.py")
            .args([folder.path(), tools(), &open.path().join("mark")])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut told = BufReader::new(process.stdout.take().unwrap());
        told.read_line(&mut line).unwrap();
        Self {
            process,
            folder,
            open,
            port: line.trim().parse().unwrap(),
        }
    }

    fn server(&self, allowed: &str) -> Server {
        let url = format!("http://127.0.0.1:{}/simple", self.port);
        Server::start_as(
            0,
            &[
                ("PIP_INDEX_URL", &url),
                ("PIP_FIND_LINKS", ""),
                ("GANTRY_ALLOW_PACKAGES", allowed),
                ("AWS_SECRET_ACCESS_KEY", "hush"),
            ],
        )
    }

    /// What it was asked for.
    fn asked(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn ask(key: &str, request: reqwest::RequestBuilder) -> (u16, Value) {
    let request = request.header("x-api-key", key).timeout(FIRST);
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn create(server: &Server, key: &str, module: &str, packages: &[&str]) -> (u16, Value) {
    let path = format!("/create_pod/{module}");
    let body = match packages {
        [] => json!({}),
        some => json!({ "packages": some }),
    };
    ask(key, server.post(&path).json(&body)).await
}

async fn call(server: &Server, key: &str, module: &str, method: &str) -> Value {
    let path = format!("/run_module?module_name={module}&method_name={method}");
    let (status, told) = ask(key, server.post(&path).json(&json!({}))).await;
    assert_eq!(status, 200, "{told}");
    told["result"].clone()
}

/// Its metadata names another package by its URL, with which pip runs what that brings.
#[tokio::test]
async fn what_a_package_runs_while_it_is_installed_runs_in_a_sandbox() {
    let index = Index::start();
    let server = index.server("true");
    let (_, key) = server.user("mallory").await;
    let (status, told) = create(&server, &key, "dropper", &["evil==1.0"]).await;
    let mark = std::fs::read_to_string(index.open.path().join("mark"));
    assert!(mark.is_err(), "it ran on the host: {mark:?}");
    assert_eq!(status, 200, "{told}");
    let seen = call(&server, &key, "dropper", "seen").await;
    // It is no test of what did not run.
    assert_ne!(seen["mark"], "written", "{seen}");
    assert_ne!(seen["uid"], 0, "{seen}");
    let first_on_host = seen["uid_map"][1].as_str().unwrap();
    assert_ne!(first_on_host, "0", "{seen}");
    assert_eq!(seen["secrets"], json!([]), "{seen}");
    assert_eq!(seen["direct"], "ConnectionRefusedError", "{seen}");
    assert!(!seen["shadow"].as_str().unwrap().contains(':'), "{seen}");
}

#[tokio::test]
async fn modules_packages_are_the_operators_to_allow() {
    let index = Index::start();
    let server = index.server("false");
    let (_, key) = server.user("mallory").await;
    let (status, told) = create(&server, &key, "dropper", &["evil==1.0"]).await;
    assert_eq!(
        (status, told["code"].as_str()),
        (422, Some("packages_not_allowed")),
        "{told}"
    );
    assert!(!index.asked().contains("evil"), "{}", index.asked());
    let (status, told) = create(&server, &key, "math", &[]).await;
    assert_eq!(status, 200, "{told}");
}

/// The name of a package in letters of such sizes that the sum of it and of what follows is `wanted`.
fn name_with_sum(name: &str, after: &str, wanted: u32) -> String {
    let sum = |name: &str| crc32fast::hash(format!("{name}{after}").as_bytes());
    let flipped = |name: &str, at: usize| {
        let mut bytes = name.as_bytes().to_vec();
        bytes[at] ^= 0x20;
        String::from_utf8(bytes).unwrap()
    };
    let base = sum(name);
    let letters = name.char_indices().filter(|(_, c)| c.is_ascii_lowercase());
    // What each letter changes, reduced to one leading bit each, with which letters make it up.
    let mut rows: Vec<(u32, u128)> = Vec::new();
    let reduce = |rows: &[(u32, u128)], mut row: (u32, u128)| {
        for (bits, made_of) in rows {
            if row.0 & (1 << bits.ilog2()) != 0 {
                row = (row.0 ^ bits, row.1 ^ made_of);
            }
        }
        row
    };
    for (at, _) in letters {
        let row = reduce(&rows, (base ^ sum(&flipped(name, at)), 1 << at));
        if row.0 != 0 {
            rows.push(row);
            rows.sort_by_key(|(bits, _)| std::cmp::Reverse(*bits));
        }
    }
    let (left, made_of) = reduce(&rows, (base ^ wanted, 0));
    assert_eq!(left, 0, "its letters are too few");
    let flip = |(at, c): (usize, char)| match made_of >> at & 1 {
        1 => c.to_ascii_uppercase(),
        _ => c,
    };
    let found: String = name.char_indices().map(flip).collect();
    assert_eq!(sum(&found), wanted);
    found
}

/// Sets of packages once had a 32-bit sum for their name, and all users shared them.
#[tokio::test]
async fn a_users_packages_never_serve_anothers_module() {
    let index = Index::start();
    let server = index.server("true");
    let (_, mallory) = server.user("mallory").await;
    let (_, ann) = server.user("ann").await;
    let question = "import sys; print(sys.executable)";
    let python = Command::new("python3")
        .args(["-I", "-S", "-c", question])
        .output();
    let python = String::from_utf8(python.unwrap().stdout).unwrap();
    let after = format!("==1.0\n{}", python.trim());
    let wanted = crc32fast::hash(format!("victim-pkg{after}").as_bytes());
    let name = name_with_sum(&format!("attacker-{}", "a".repeat(60)), &after, wanted);
    let attack = format!("{name}==1.0");
    let (status, told) = create(&server, &mallory, "shared_name", &[&attack]).await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(
        call(&server, &mallory, "shared_name", "whose").await,
        "attacker"
    );
    let (status, told) = create(&server, &ann, "shared_name", &["victim-pkg==1.0"]).await;
    assert_eq!(status, 200, "{told}");
    assert_eq!(call(&server, &ann, "shared_name", "whose").await, "victim");
}

/// Folders below that have this file.
fn having(folder: &Path, file: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.file_name() == file {
            found.push(folder.to_owned());
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(having(&entry.path(), file));
        }
    }
    found
}

#[tokio::test]
async fn a_slow_installation_keeps_nobody_else_waiting() {
    let index = Index::start();
    let server = index.server("true");
    let (_, mallory) = server.user("mallory").await;
    let (_, ann) = server.user("ann").await;
    let (status, told) = create(&server, &ann, "math", &[]).await;
    assert_eq!(status, 200, "{told}");
    // Each with a name of its own, so that each is a module of its own.
    let attacks = (0..40).map(|number| {
        let url = server.url(&format!("/create_pod/module{number}"));
        let request = client().post(url).header("x-api-key", &mallory);
        let request = request.json(&json!({ "packages": [format!("slow==1.{number}")] }));
        let request = request.timeout(Duration::from_secs(8)).send();
        tokio::spawn(async move { Some(request.await.ok()?.status().as_u16()) })
    });
    let attacks: Vec<_> = attacks.collect();
    let since = Instant::now();
    while !index.asked().contains("/simple/slow") {
        assert!(since.elapsed() < FIRST);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let begun = Instant::now();
    let (status, told) = create(&server, &ann, "json", &[]).await;
    assert_eq!(status, 200, "{told}");
    assert!(
        begun.elapsed() < Duration::from_secs(15),
        "{:?}",
        begun.elapsed()
    );
    // Another user's packages come as well, once for all the ways to write them.
    for (module, packages) in [
        ("spelled_module", "Spelled_Pkg==1.0"),
        ("string", "spelled.pkg==1.0"),
        ("bisect", "SPELLED--PKG==1.0"),
    ] {
        let (status, told) = create(&server, &ann, module, &[packages]).await;
        assert_eq!(status, 200, "{told}");
    }
    let modules = server.data.path().join("local/modules");
    let copies = having(&modules, "spelled_module.py");
    assert_eq!(copies.len(), 1, "{copies:?}");
    // What mallory may have waiting is bounded.
    let mut refused = 0;
    for attack in attacks {
        let status = attack.await.unwrap();
        refused += u32::from(status.is_some_and(|status| [422, 429].contains(&status)));
    }
    assert!(refused >= 40 - 16, "{refused}");
    let asked = index.asked().matches("/simple/slow").count();
    assert_eq!(asked, 1, "one installation of a user's at a time");
}

/// Speaks to the index by its proxy in every way that an installer has no use for.
const PROBER: &str = r#"
import json, os, socket, zipfile

PORT = int(open("port").read())
PLACE = f"127.0.0.1:{PORT}"

def proxied(text):
    proxy = os.environ["https_proxy"].rsplit(":", 1)
    with socket.create_connection(("127.0.0.1", int(proxy[1])), 10) as line:
        line.settimeout(10)
        line.sendall(text.encode())
        return line.makefile("rb").readline().decode().split()[1:2]

def tunnelled(first):
    proxy = os.environ["https_proxy"].rsplit(":", 1)
    with socket.create_connection(("127.0.0.1", int(proxy[1])), 10) as line:
        line.settimeout(10)
        line.sendall(f"CONNECT {PLACE} HTTP/1.1\r\n\r\n".encode())
        status = line.recv(1000).split()[1].decode()
        line.sendall(first)
        try:
            answer = line.recv(1000)
        except OSError:
            answer = b""
        return [status, answer.decode("latin-1")[:20]]

def get(path, more=""):
    return f"GET http://{PLACE}{path} HTTP/1.1\r\nHost: {PLACE}\r\n{more}\r\n"

SEEN = {
    "get": proxied(get("/plain")),
    "post": proxied(get("/posted").replace("GET", "POST", 1)),
    "put": proxied(get("/put", "Content-Length: 1\r\n").replace("GET", "PUT", 1) + "x"),
    "host": proxied(get("/other-host").replace(f"Host: {PLACE}", "Host: internal.example")),
    "two hosts": proxied(get("/two-hosts", "Host: internal.example\r\n")),
    "body": proxied(get("/with-body", "Content-Length: 4\r\n") + "body"),
    "second": proxied(get("/first") + get("/second")),
    "tunnel": tunnelled(f"GET /tunnelled HTTP/1.1\r\nHost: internal.example\r\n\r\n".encode()),
    "server": proxied("CONNECT 127.0.0.1:1 HTTP/1.1\r\n\r\n"),
}

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "prober-1.0-py3-none-any.whl", "prober-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        archive.writestr("prober.py", f"SEEN = {json.dumps(SEEN)!r}\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: prober\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"prober.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return name
"#;

#[tokio::test]
async fn the_way_to_packages_carries_tls_or_reads_and_nothing_else() {
    let index = Index::start();
    let server = index.server("true");
    let project =
        "[build-system]\nrequires = []\nbuild-backend = \"backend\"\nbackend-path = [\".\"]\n";
    let message = json!({
        "user_id": "mallory", "deploy": false,
        "files": {
            "main.py": "import prober; print(prober.SEEN)",
            "requirements.txt": "./prober\n",
            "prober/pyproject.toml": project,
            "prober/backend.py": PROBER,
            "prober/port": index.port.to_string(),
        },
    });
    let mut socket = server.connect(&server.admin).await;
    socket.send(message.to_string()).await;
    let reply = socket.next().await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let seen: Value = serde_json::from_str(reply["stdout"].as_str().unwrap()).unwrap();
    let asked = index.asked();
    let line = format!("GET /plain 127.0.0.1:{}\n", index.port);
    assert!(asked.contains(&line), "the control: {asked}{seen}");
    for path in [
        "posted",
        "put",
        "other-host",
        "two-hosts",
        "with-body",
        "second",
        "tunnelled",
        "internal",
    ] {
        assert!(!asked.contains(path), "{path}: {asked}{seen}");
    }
    assert!(asked.contains("GET /first "), "{asked}{seen}");
    for (what, status) in [
        ("post", "405"),
        ("put", "405"),
        ("host", "400"),
        ("two hosts", "400"),
        ("body", "400"),
        ("server", "403"),
    ] {
        assert_eq!(seen[what], json!([status]), "{what}: {seen}");
    }
    assert_eq!(seen["tunnel"], json!(["200", ""]), "{seen}");
}

#[tokio::test]
async fn a_users_modules_have_so_many_pods_in_all() {
    let server = Server::start_as(0, &[("GANTRY_MAX_MODULE_PODS", "2")]);
    let (_, one) = server.user("one").await;
    let (_, two) = server.user("two").await;
    let (status, told) = create(&server, &one, "json", &[]).await;
    assert_eq!(status, 200, "{told}");
    let scaled = |module: &str, replicas: u32| {
        let path = format!("/modules/{module}/scale");
        server.post(&path).json(&json!({ "replicas": replicas }))
    };
    let (status, told) = ask(&one, scaled("json", 3)).await;
    assert_eq!(told["code"], "quota_exceeded", "{status} {told}");
    let (status, told) = create(&server, &one, "string", &[]).await;
    assert_eq!(status, 200, "{told}");
    // As many as may be; what is there already is asked for again.
    let (status, told) = create(&server, &one, "json", &[]).await;
    assert_eq!(status, 200, "{told}");
    let (status, told) = create(&server, &one, "random", &[]).await;
    assert_eq!(told["code"], "quota_exceeded", "{status} {told}");
    let (status, told) = create(&server, &two, "random", &[]).await;
    assert_eq!(status, 200, "{told}");
}

/// What a function returns may have 16 MiB, and who called it need not read it.
#[tokio::test]
async fn results_that_nobody_reads_hold_a_bounded_part_of_the_memory() {
    const UNREAD: usize = 40;
    const RESULT: usize = 12_000_000;
    let server = Server::start_as(0, &[]);
    let (_, mallory) = server.user("mallory").await;
    let (_, other) = server.user("other").await;
    for key in [&mallory, &other] {
        let (status, told) = create(&server, key, "operator", &[]).await;
        assert_eq!(status, 200, "{told}");
    }
    let before = resident_kib(server.pid());
    let body = json!({ "args": ["x", RESULT], "timeout_ms": 30_000 }).to_string();
    let request = format!(
        "POST /run_module?module_name=operator&method_name=mul HTTP/1.1\r\nHost: {}\r\n\
         X-API-Key: {mallory}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        server.address,
        body.len()
    );
    let mut unread = Vec::new();
    for _ in 0..UNREAD {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        unread.push(stream);
    }
    let mut most = 0;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(250)).await;
        most = most.max(resident_kib(server.pid()));
    }
    // Two results and their copies, and what the allocator keeps.
    let grown = most.saturating_sub(before) / 1024;
    assert!(grown < 160, "{grown} MiB for {UNREAD} unread results");
    // They wait for nobody but their own user.
    let path = "/run_module?module_name=operator&method_name=mul";
    let large = json!({ "args": ["y", RESULT] });
    let (status, told) = ask(&other, server.post(path).json(&large)).await;
    assert_eq!(status, 200);
    assert_eq!(told["result"].as_str().unwrap().len(), RESULT);
    // When they are gone, so is the wait.
    drop(unread);
    let (status, told) = ask(&mallory, server.post(path).json(&large)).await;
    assert_eq!(status, 200, "{told}");
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().nth(1));
    number.unwrap().parse().unwrap()
}
