//! What a program depends on: installed by pip, npm, go and cargo themselves, from an index on this machine,
//! through the real server.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

#[allow(
    dead_code,
    reason = "shared with the tests of the protocol, which use all of it"
)]
#[path = "protocol/server.rs"]
mod server;

#[allow(dead_code, reason = "shared with the tests of the pipeline")]
#[path = "pipeline/client.rs"]
mod client;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use client::{Client, message};
use reqwest::header::HOST;
use serde_json::{Value, json};
use server::Server;

struct Index {
    process: Child,
    _folder: tempfile::TempDir,
    port: u16,
}

impl Index {
    fn start() -> Self {
        Self::start_as(&[])
    }

    fn start_as(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/packages/index.py");
        let mut process = Command::new("python3")
            .arg(script)
            .arg(folder.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut told = BufReader::new(process.stdout.take().unwrap());
        told.read_line(&mut line).unwrap();
        Self {
            process,
            _folder: folder,
            port: line.trim().parse().unwrap(),
        }
    }

    /// A server that may install from it.
    fn server(&self, more: &[(&str, &str)]) -> Server {
        self.server_of("", more)
    }

    /// One that finds it below this path.
    fn server_of(&self, below: &str, more: &[(&str, &str)]) -> Server {
        let at = |host: &str, path: &str| format!("http://{host}:{}/{below}{path}", self.port);
        let (python, node) = (at("127.0.0.1", "simple"), at("127.0.0.1", ""));
        let go = at(&own_name().unwrap_or_else(|| "127.0.0.1".to_owned()), "go");
        let rust = at("127.0.0.1", "cargo/");
        let mut variables = vec![
            ("GANTRY_ALLOW_PACKAGES", "true"),
            ("PIP_INDEX_URL", python.as_str()),
            ("npm_config_registry", node.as_str()),
            ("GOPROXY", go.as_str()),
            ("GANTRY_CARGO_INDEX", rust.as_str()),
        ];
        variables.extend(more);
        Server::start_as(0, &variables)
    }
}

impl Drop for Index {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A name of this machine's own on loopback: to `localhost` and addresses there Go uses no proxy.
fn own_name() -> Option<String> {
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
    let mut names = hosts
        .lines()
        .filter_map(|line| line.strip_prefix("127.0.0.1"))
        .flat_map(str::split_whitespace);
    let name = names.find(|name| !name.contains("localhost") && !name.starts_with('#'));
    name.map(str::to_owned)
}

/// Whether this is there. Where results count it must.
fn has(what: &str, there: bool) -> bool {
    if !there {
        assert!(std::env::var_os("CI").is_none(), "{what} is needed");
        eprintln!("SKIPPED, NOT TESTED: {what} is not on this machine");
    }
    there
}

fn runs(program: &str, args: &[&str]) -> bool {
    let asked = Command::new(program).args(args).output();
    let there = asked.is_ok_and(|answer| answer.status.success());
    has(&format!("{program} {}", args.join(" ")), there)
}

fn pip() -> bool {
    runs("python3", &["-m", "pip", "--version"])
}

fn python(user: &str, requirements: &str, code: &str) -> Value {
    json!({ "user_id": user, "deploy": false,
        "files": { "main.py": code, "requirements.txt": requirements } })
}

const USES: &str = "import gantry_example; print(gantry_example.WORD)";

fn outcome(reply: &Value) -> Value {
    json!([reply["status"], reply["reason"], reply["error"]["code"]])
}

#[tokio::test]
async fn what_requirements_name_is_installed_once_tested_with_and_released() {
    if !pip() {
        return;
    }
    let index = Index::start();
    let mut server = index.server(&[]);
    let mut client = Client::of(&server).await;
    let mut program = python("packages", "# ours\ngantry-example==1.0\n", USES);
    program["deploy"] = json!(true);
    let begun = Instant::now();
    let id = client.send(program.clone()).await;
    let reply = client.reply(&id).await;
    println!("installed and deployed: {:?}", begun.elapsed());
    assert_eq!(reply["status"], "deployed", "{reply}");
    assert_eq!(reply["stdout"], "installed\n", "{reply}");
    let steps = client.steps(&id);
    let at = |step: &str| steps.iter().position(|one| one == step).unwrap();
    assert!(at("install started") < at("install passed"), "{steps:?}");
    assert!(at("install passed") < at("test started"), "{steps:?}");
    let told = client.frames[&id].iter();
    let told: String = told
        .filter_map(|frame| frame["data"].as_str())
        .collect::<Vec<_>>()
        .concat();
    assert!(
        told.contains("Successfully installed gantry-example"),
        "{told}"
    );
    // A program that is changed needs nothing of the index any more; another user's has none of it.
    let port = index.port;
    drop(index);
    let mut other = program.clone();
    other["user_id"] = json!("neighbour");
    other["deploy"] = json!(false);
    let reply = client.ask(other).await;
    let expected = json!(["unavailable", null, "package_index_unavailable"]);
    assert_eq!(outcome(&reply), expected, "{reply}");
    let cause = reply["error"]["cause"].as_str().unwrap();
    assert!(cause.contains(&format!("127.0.0.1:{port}")), "{reply}");
    program["files"]["main.py"] = json!(format!("{USES}; print(2)"));
    program["deploy"] = json!(false);
    let begun = Instant::now();
    let reply = client.ask(program).await;
    println!("installed before: {:?}", begun.elapsed());
    assert_eq!(reply["stdout"], "installed\n2\n", "{reply}");
    // What was tested is what runs: from the store, with no index and no installer.
    server.restart();
    let since = Instant::now();
    loop {
        let repls = server.get("/repls").header("x-api-key", &server.admin);
        let repls: Value = repls.send().await.unwrap().json().await.unwrap();
        let state = &repls["repls"][0]["state"];
        if state == "exited(0)" {
            return;
        }
        assert!(since.elapsed() < server::PATIENCE, "{repls}");
        assert_ne!(state, "exited(1)", "{repls}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_program_that_names_nothing_has_no_such_step() {
    let index = Index::start();
    let server = index.server(&[]);
    let mut client = Client::of(&server).await;
    for program in [
        message("plain", "print('fine')"),
        python("plain", "# nothing\n\n", "print('fine')"),
    ] {
        let id = client.send(program).await;
        let reply = client.reply(&id).await;
        assert_eq!(reply["stdout"], "fine\n", "{reply}");
        let steps = client.steps(&id);
        assert!(
            !steps.iter().any(|step| step.starts_with("install")),
            "{steps:?}"
        );
    }
}

/// A program of each language that depends on a package, where its installer is on this machine.
fn programs() -> Vec<Value> {
    let package = json!({ "dependencies": { "gantry-example": "1.0.0" } }).to_string();
    let npm = runs("npm", &["--version"]);
    let cases = [
        (
            npm,
            json!({ "language": "node", "files": {
                "package.json": package,
                "main.js": "console.log(require('gantry-example').word)",
            } }),
        ),
        (
            npm && runs("tsc", &["--version"]),
            json!({ "language": "typescript", "files": {
                "package.json": package,
                "main.ts": "import { word } from 'gantry-example';\nconsole.log(word);\n",
            } }),
        ),
        (
            runs("go", &["version"])
                && has(
                    "a name for 127.0.0.1 beside localhost",
                    own_name().is_some(),
                ),
            json!({ "language": "go", "files": {
                "go.mod": "module example.org/project\n\ngo 1.19\n\nrequire example.org/word v1.0.0\n",
                "main.go": "package main\n\nimport (\n\t\"fmt\"\n\n\t\"example.org/word\"\n)\n\nfunc main() { fmt.Println(word.Word) }\n",
            } }),
        ),
        (
            runs("cargo", &["--version"]),
            json!({ "language": "rust", "files": {
                "Cargo.toml": "[package]\nname = \"project\"\nversion = \"1.0.0\"\nedition = \"2021\"\n\n[dependencies]\ngantry-example = \"1\"\n",
                "src/main.rs": "fn main() { println!(\"{}\", gantry_example::WORD); }\n",
            } }),
        ),
    ];
    let there = cases.into_iter().filter(|(there, _)| *there);
    there.map(|(_, program)| program).collect()
}

#[tokio::test]
async fn every_installer_of_the_table_installs() {
    let index = Index::start();
    let server = index.server(&[]);
    let mut client = Client::of(&server).await;
    for mut program in programs() {
        program["user_id"] = json!("installers");
        program["deploy"] = json!(false);
        let begun = Instant::now();
        let reply = client.ask(program).await;
        println!("{}: {:?}", reply["stdout"], begun.elapsed());
        assert_eq!(reply["status"], "tests_passed", "{reply}");
        assert_eq!(reply["stdout"], "installed\n", "{reply}");
    }
}

/// A repl whose files these are, started.
async fn workspace(server: &Server, repl: &str, language: &str, files: &Value) {
    for (name, text) in files.as_object().unwrap() {
        let file = stored(server, repl).join(name);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, text.as_str().unwrap()).unwrap();
    }
    let body = json!({ "replId": repl, "userId": "ann", "language": language });
    let request = server.post("/start").header("x-api-key", &server.admin);
    let answer = request.json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
}

fn stored(server: &Server, repl: &str) -> PathBuf {
    server.data.path().join("store/code").join(repl)
}

/// The page that shows what the repl's program wrote, once it is one of its end.
async fn ended(server: &Server, repl: &str) -> String {
    let host = format!("{repl}.apps.localhost:{}", server.address.port());
    let since = Instant::now();
    loop {
        // What a program wrote is its owner's to see, unless it ended well.
        let asked = server.post(&format!("/repls/{repl}/ticket"));
        let asked = asked.header("x-api-key", &server.admin).json(&json!({}));
        let told: Value = asked.send().await.unwrap().json().await.unwrap();
        let path = format!("/?ticket={}", told["ticket"].as_str().unwrap_or_default());
        let page = server.get(&path).header(HOST, &host).send().await.unwrap();
        let page = page.text().await.unwrap();
        if page.contains("<title>The program ended") {
            return page;
        }
        assert!(since.elapsed() < server::PATIENCE, "{page}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_workspace_installs_what_its_files_name() {
    let index = Index::start();
    let server = index.server(&[]);
    for program in programs() {
        let language = program["language"].as_str().unwrap();
        let begun = Instant::now();
        workspace(&server, language, language, &program["files"]).await;
        let page = ended(&server, language).await;
        println!("{language}: {:?}", begun.elapsed());
        assert!(page.contains("\ninstalled\n"), "{language}: {page}");
        // What was installed, and what tools keep for themselves, is nobody's work.
        let save = server.post(&format!("/repls/{language}/save"));
        let saved = save.header("x-api-key", &server.admin).send().await;
        assert_eq!(saved.unwrap().status(), 200, "{language}");
        let kept = std::fs::read_dir(stored(&server, language)).unwrap();
        let mut kept: Vec<String> = kept
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        let beside = [".build.tar.gz", "package-lock.json", "go.sum", "Cargo.lock"];
        kept.retain(|name| !beside.contains(&&**name));
        kept.sort();
        let mut own: Vec<&str> = program["files"]
            .as_object()
            .unwrap()
            .keys()
            .map(|name| name.split('/').next().unwrap())
            .collect();
        own.sort_unstable();
        assert_eq!(kept, own, "{language}");
    }
}

#[tokio::test]
async fn a_workspace_installs_again_when_its_file_changes() {
    if !pip() {
        return;
    }
    let index = Index::start();
    let server = index.server(&[]);
    let files = json!({ "requirements.txt": "gantry-nothing-like-it\n", "main.py": USES });
    workspace(&server, "edited", "python", &files).await;
    let page = ended(&server, "edited").await;
    assert!(
        page.contains("What requirements.txt names could not be installed."),
        "{page}"
    );
    let headers = [("x-api-key", server.admin.as_str())];
    let mut runner = server::Socket::open(&server, "/repls/edited/terminal", &headers)
        .await
        .unwrap();
    let mut change = async |name: &str, text: &str| {
        let write = json!({ "id": 1, "op": "files.write", "path": name, "text": text });
        let run = json!({ "id": 2, "op": "program.run" });
        for request in [write, run] {
            let mut told = runner.ask(request.to_string()).await;
            while told["id"] != request["id"] {
                told = runner.next().await;
            }
            assert_eq!(told["ok"], true, "{told}");
        }
    };
    change("requirements.txt", "gantry-example\n").await;
    let page = loop {
        let page = ended(&server, "edited").await;
        if !page.contains("could not be installed") {
            break page;
        }
    };
    assert!(
        page.contains("Successfully installed gantry-example"),
        "{page}"
    );
    assert!(page.contains("\ninstalled\n"), "{page}");
    // The same file again needs no installer and no index.
    drop(index);
    change(
        "main.py",
        "import gantry_example; print('again', gantry_example.WORD)",
    )
    .await;
    let page = loop {
        let page = ended(&server, "edited").await;
        if page.contains("again") {
            break page;
        }
    };
    assert!(page.contains("<pre>again installed"), "{page}");
    // It is kept over a stop, soon after it was installed.
    let since = Instant::now();
    while !stored(&server, "edited").join(".build.tar.gz").is_file() {
        assert!(since.elapsed() < server::PATIENCE, "it is not kept");
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    }
    let stop = server.post("/stop").header("x-api-key", &server.admin);
    let stopped = stop.json(&json!({ "replId": "edited" })).send().await;
    assert_eq!(stopped.unwrap().status(), 200);
    workspace(&server, "edited", "python", &json!({})).await;
    let page = ended(&server, "edited").await;
    assert!(page.contains("<pre>again installed"), "{page}");
}

#[tokio::test]
async fn an_installer_that_fails_says_why() {
    if !pip() {
        return;
    }
    let index = Index::start();
    let server = index.server(&[]);
    let mut client = Client::of(&server).await;
    let failed = json!(["tests_failed", "compile", "packages_not_installed"]);
    for (requirements, words) in [
        ("gantry-nothing-like-it\n", "No matching distribution"),
        ("gantry-example==9\n", "No matching distribution"),
        ("== broken ==\n", "Invalid requirement"),
    ] {
        let id = client.send(python("wrong", requirements, "")).await;
        let reply = client.reply(&id).await;
        assert_eq!(outcome(&reply), failed, "{reply}");
        assert_eq!(reply.get("exit_code"), None, "{reply}");
        assert!(
            reply["error"]["cause"].as_str().unwrap().contains(words),
            "{reply}"
        );
        assert!(reply["stderr"].as_str().unwrap().contains(words), "{reply}");
        let steps = client.steps(&id);
        assert_eq!(steps.last().unwrap(), "install failed", "{steps:?}");
    }
    // It was not kept for the next.
    let reply = client.ask(python("wrong", "gantry-example\n", USES)).await;
    assert_eq!(reply["stdout"], "installed\n", "{reply}");
}

#[tokio::test]
async fn an_installer_has_limits_and_can_be_cancelled() {
    if !pip() {
        return;
    }
    let index = Index::start();
    let server = index.server(&[("GANTRY_INSTALL_SECONDS", "15")]);
    let mut client = Client::of(&server).await;
    let limited = json!(["tests_failed", "compile", "install_limit"]);
    let reply = client.ask(python("limits", "gantry-loud\n", "")).await;
    assert_eq!(outcome(&reply), limited, "{}", reply["error"]);
    assert!(
        reply["error"]["message"]
            .as_str()
            .unwrap()
            .contains("output"),
        "{}",
        reply["error"]
    );
    let id = client.send(python("limits", "gantry-slow\n", "")).await;
    client
        .until(&id, |frame| {
            frame["name"] == "install" && frame["state"] == "started"
        })
        .await;
    client.tell(json!({ "cancel": id })).await;
    let asked = Instant::now();
    let reply = client.reply(&id).await;
    assert_eq!(reply["status"], "cancelled", "{reply}");
    assert!(asked.elapsed().as_secs() < 5);
    let reply = client.ask(python("limits", "gantry-slow\n", "")).await;
    assert_eq!(outcome(&reply), limited, "{reply}");
    let told = reply["error"].to_string();
    assert!(told.contains("timeout") && told.contains("15 s"), "{reply}");
}

#[tokio::test]
async fn an_installer_reaches_the_index_and_nothing_else() {
    if !pip() {
        return;
    }
    let index = Index::start();
    let server = index.server(&[]);
    let mut client = Client::of(&server).await;
    // What another user sent is somewhere in this folder.
    let reply = client.ask(message("neighbour", "print('theirs')")).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let mut curious = python(
        "curious",
        "gantry-curious\n",
        "import gantry_curious; print(gantry_curious.SEEN)",
    );
    curious["env"] = json!({
        "PROBE_INDEX": format!("127.0.0.1:{}", index.port),
        "PROBE_SERVER": server.address.port().to_string(),
        "PROBE_FOLDER": server.data.path(),
    });
    let reply = client.ask(curious.clone()).await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    let seen: Value = serde_json::from_str(reply["stdout"].as_str().unwrap()).unwrap();
    assert_eq!(seen["index"], "200", "{seen}");
    assert_eq!(seen["server"], "403", "{seen}");
    assert_eq!(seen["metadata"], "403", "{seen}");
    for way in [
        "direct server",
        "direct internet",
        "others' files",
        "shadow",
    ] {
        let told = seen[way]
            .as_str()
            .unwrap_or_else(|| panic!("{way}: {seen}"));
        assert!(told.ends_with("Error"), "{way}: {seen}");
    }
    assert_eq!(seen["own key"], false, "{seen}");
    // The same by what is named, and around the proxy.
    let elsewhere = format!("http://{}/elsewhere-1.0-py3-none-any.whl\n", server.address);
    let reply = client.ask(python("curious", &elsewhere, "")).await;
    assert_eq!(reply["error"]["code"], "packages_not_installed", "{reply}");
    assert!(reply["stderr"].as_str().unwrap().contains("403"), "{reply}");
    let wheel = format!(
        "http://127.0.0.1:{}/gantry_example-1.0-py3-none-any.whl\n",
        index.port
    );
    let mut around = python("curious", &wheel, "");
    around["env"] = json!({ "no_proxy": "127.0.0.1" });
    // Nothing is there: an index that cannot be reached.
    let reply = client.ask(around).await;
    assert_eq!(
        reply["error"]["code"], "package_index_unavailable",
        "{reply}"
    );
}

/// While an installer runs, its proxy listens on the loopback device of its own slot, which the user's other
/// runs do not have.
#[tokio::test]
async fn another_run_has_no_part_in_an_installers_way_out() {
    if !pip()
        || !has(
            "a user id for each slot (root)",
            rustix::process::getuid().is_root(),
        )
    {
        return;
    }
    let index = Index::start();
    let server = index.server(&[]);
    let mut client = Client::of(&server).await;
    let slow = client.send(python("two", "gantry-slow\n", "")).await;
    client
        .until(&slow, |frame| {
            frame["name"] == "install" && frame["state"] == "started"
        })
        .await;
    // Every port that somebody listens on, from the kernel's own table; what it answers to a request for a tunnel.
    let code = "
import socket, time
def listening():
    lines = open('/proc/net/tcp').read().splitlines()[1:]
    return [int(line.split()[1].split(':')[1], 16) for line in lines if line.split()[3] == '0A']
deadline = time.monotonic() + 3
while not listening() and time.monotonic() < deadline:
    time.sleep(0.05)
for port in listening():
    line = socket.create_connection(('127.0.0.1', port), 2)
    try:
        line.sendall(b'CONNECT 127.0.0.1:INDEX HTTP/1.1\\r\\n\\r\\n')
        print('answer', line.recv(64))
    except ConnectionError:
        print('hung up')
";
    let code = code.replace("INDEX", &index.port.to_string());
    let reply = client.ask(message("two", &code)).await;
    assert_eq!(reply["stdout"], "", "{reply}");
    client.tell(json!({ "cancel": slow })).await;
    assert_eq!(client.reply(&slow).await["status"], "cancelled");
}

#[tokio::test]
async fn nothing_is_installed_unless_the_operator_allows_it() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let reply = client.ask(python("none", "gantry-example\n", USES)).await;
    let expected = json!(["tests_failed", "exit_code", "packages_not_allowed"]);
    assert_eq!(outcome(&reply), expected, "{reply}");
    let error = reply["error"].to_string();
    assert!(error.contains("requirements.txt") && error.contains("GANTRY_ALLOW_PACKAGES"));
    assert!(error.contains("PIP_INDEX_URL"), "{error}");
    // What is there already is used, and nothing is said.
    let reply = client
        .ask(python("none", "pytest\n", "print('fine')"))
        .await;
    assert_eq!(reply["status"], "tests_passed", "{reply}");
    assert_eq!(reply.get("error"), None, "{reply}");
}

/// Every installer against an index that fails so; a program that needs nothing runs beside them.
async fn fails(how: &str) -> Vec<Value> {
    let index = Index::start();
    let server = index.server_of(&format!("fail/{how}/"), &[]);
    let mut programs = programs();
    if pip() {
        programs.push(json!({ "language": "python", "files": { "main.py": USES, "requirements.txt": "gantry-example" } }));
    }
    let mut client = Client::of(&server).await;
    let mut ids = Vec::new();
    for (number, mut program) in programs.into_iter().enumerate() {
        program["user_id"] = json!(format!("fails-{number}"));
        program["deploy"] = json!(false);
        ids.push(client.send(program).await);
    }
    let mut replies = Vec::new();
    for id in ids {
        replies.push(client.reply(&id).await);
    }
    replies
}

#[tokio::test]
async fn an_index_that_fails_is_never_the_programs_fault() {
    // One after the other: each runs every installer at once.
    for how in ["503", "429", "500", "reset", "cut"] {
        for reply in fails(how).await {
            let expected = json!(["unavailable", null, "package_index_unavailable"]);
            assert_eq!(outcome(&reply), expected, "{how}: {reply}");
            assert!(
                reply["error"]["cause"].as_str().unwrap().len() > 5,
                "{how}: {reply}"
            );
        }
    }
    // One that is busy for a moment is asked again, and nobody notices.
    for reply in fails("twice").await {
        assert_eq!(reply["stdout"], "installed\n", "{reply}");
    }
}

/// The usual indexes' own names and port, answered on this machine.
struct Usual {
    folder: tempfile::TempDir,
    index: Index,
}

impl Usual {
    const HOSTS: [&str; 6] = [
        "pypi.org",
        "files.pythonhosted.org",
        "registry.npmjs.org",
        "proxy.golang.org",
        "index.crates.io",
        "static.crates.io",
    ];

    /// On an address of loopback that nothing else uses.
    fn start(address: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let names = Self::HOSTS.map(|host| format!("DNS:{host}")).join(",");
        let made = Command::new("openssl")
            .args([
                "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            ])
            .args(["-subj", "/CN=the usual indexes", "-addext"])
            .arg(format!("subjectAltName={names}"))
            .args(["-keyout", &at("key"), "-out", &at("certificate")])
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let lines = Self::HOSTS
            .map(|host| format!("{address} {host}\n"))
            .concat();
        let hosts = std::fs::read_to_string("/etc/hosts").unwrap();
        std::fs::write(at("hosts"), hosts + &lines).unwrap();
        let mut known = std::fs::read("/etc/ssl/certs/ca-certificates.crt").unwrap();
        known.extend(std::fs::read(at("certificate")).unwrap());
        std::fs::write(at("known"), known).unwrap();
        let script = format!(
            "#!/bin/sh\nmount --bind {} /etc/hosts && mount --bind {} /etc/ssl/certs/ca-certificates.crt && exec \"$@\"\n",
            at("hosts"),
            at("known")
        );
        std::fs::write(at("within"), script).unwrap();
        let index = Index::start_as(&[address, &at("certificate"), &at("key")]);
        Self { folder, index }
    }

    /// A server that is told only that packages may be installed.
    fn server(&self) -> Server {
        let within = self.folder.path().join("within");
        Server::start_through(
            &["unshare", "--mount", "sh", within.to_str().unwrap()],
            &[("GANTRY_ALLOW_PACKAGES", "true")],
        )
    }
}

/// The configuration is the one that is shipped: no variable names an index.
#[tokio::test]
async fn every_usual_index_is_used_as_shipped() {
    let root = rustix::process::getuid().is_root();
    let ready = has("mounts of its own (root)", root)
        && runs("openssl", &["version"])
        && Path::new("/etc/ssl/certs/ca-certificates.crt").exists();
    if !ready {
        return;
    }
    let usual = Usual::start("127.93.7.1");
    assert_eq!(usual.index.port, 443);
    let server = usual.server();
    let mut client = Client::of(&server).await;
    let mut programs = programs();
    if pip() {
        programs.push(json!({ "language": "python", "files": { "main.py": USES, "requirements.txt": "gantry-example" } }));
    }
    for mut program in programs {
        program["user_id"] = json!("usual");
        program["deploy"] = json!(false);
        // Some bring authorities of their own, and are told of the machine's.
        let known = "/etc/ssl/certs/ca-certificates.crt";
        program["env"] = json!({ "PIP_CERT": known, "NODE_EXTRA_CA_CERTS": known });
        let reply = client.ask(program).await;
        assert_eq!(reply["status"], "tests_passed", "{reply}");
        assert_eq!(reply["stdout"], "installed\n", "{reply}");
    }
}

/// What is installed and what is built are no part of a program's own space, and a bound is named by whose it is.
#[tokio::test]
async fn installing_building_and_running_have_space_of_their_own() {
    let server = Server::start();
    let mut client = Client::of(&server).await;
    let megabytes = |count: u32, word: &str| {
        format!(
            "fallocate -l {count}M {word} || dd if=/dev/zero of={word} bs=1M count={count} status=none"
        )
    };
    // A compiler's own files, more than a program may have.
    let build = |count: u32| {
        let make: Vec<String> = (0..count / 100)
            .map(|one| format!("std::fs::write(\"{one}\", vec![0; 100 << 20]).unwrap();"))
            .collect();
        json!({ "user_id": "space", "language": "rust", "deploy": false, "files": {
            "Cargo.toml": "[package]\nname = \"space\"\nversion = \"1.0.0\"\nedition = \"2021\"\nbuild = \"build.rs\"\n",
            "build.rs": format!("fn main() {{ {} }}", make.concat()),
            "src/main.rs": "fn main() { println!(\"built\"); }",
        } })
    };
    if runs("cargo", &["--version"]) {
        let reply = client.ask(build(400)).await;
        assert_eq!(reply["stdout"], "built\n", "{reply}");
        let reply = client.ask(build(900)).await;
        let expected = json!(["tests_failed", "compile", "compile_limit"]);
        assert_eq!(outcome(&reply), expected, "{reply}");
        let cause = reply["error"]["cause"].as_str().unwrap();
        assert!(
            cause.contains("scratch space is full, which has 768 MiB"),
            "{cause}"
        );
    }
    let program = json!({ "user_id": "space", "language": "bash", "deploy": false,
        "code": format!("for one in $(seq 20); do {}; done; sleep 5", megabytes(15, "$one")) });
    let reply = client.ask(program).await;
    assert_eq!(reply["reason"], "disk", "{reply}");
    let cause = reply["error"]["cause"].as_str().unwrap();
    assert!(
        cause.contains("256 MiB beside what was installed and built"),
        "{cause}"
    );
}
