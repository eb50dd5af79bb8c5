//! A warm run looks like a cold one: every script below `tests/fidelity` is run by an interpreter
//! that waited, by one started for it in the same sandbox, and by one on the machine itself, and
//! all must write the same bytes and end the same way.
//!
//! What a script needs stands in its first lines: `#: args …`, `#: stdin …`, `#: env A=b …`,
//! `#: sandbox WHY` when the machine itself would rightly answer otherwise, `#: cold` when what it brings makes it start cold, `#: packages` when it has
//! packages of its user's, and `#: bare` when not
//! even the line that proves the warm start may be put before it.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(clippy::print_stdout, reason = "figures, shown with --nocapture")]

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use gantry::model::{DiskBounds, Ending, Limits, UserId};
use gantry::platform::conformance::{finish, python};
use gantry::platform::local::{LocalConfig, LocalPlatform};
use gantry::platform::{Platform, Sessions};
use gantry::runner::client::Session;
use gantry::storage::DirectoryStore;

/// Fewer scripts than this means that the folder was not read as a whole.
const FEWEST_SCRIPTS: usize = 40;

/// Few scripts may go unproven, or the suite could compare cold with cold.
const MOST_BARE: usize = 3;

/// Clock ticks are 10 ms: a run that was asked for two ticks after the last one ended can be told
/// from an interpreter that was started before.
const BETWEEN_RUNS: Duration = Duration::from_millis(30);

/// How often a run is repeated when its slot was not ready yet and its interpreter was forked just
/// then: two slots need no more.
const TRIES: usize = 5;

/// Writes down when its process began, as the kernel knows it.
const PROOF: &str = "with open('/proc/self/stat', 'rb', 0) as f, open(PLACE if __name__ == '__main__' else '/dev/null', 'wb', 0) as g: g.write(f.read())";

/// Tells a cold start apart from a warm one without meaning anything to Python.
const COLD: (&str, &str) = ("PYTHON_COLD", "1");

#[derive(Debug, Default)]
struct Script {
    name: String,
    text: String,
    args: Vec<String>,
    stdin: Vec<u8>,
    env: Vec<(String, String)>,
    sandbox_only: bool,
    bare: bool,
    cold: bool,
    packages: bool,
}

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    stdout: String,
    stderr: String,
    ending: Ending,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fidelity")
}

fn scripts() -> Vec<Script> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "py"))
        .collect();
    paths.sort();
    paths.iter().map(|path| Script::read(path)).collect()
}

/// The files beside every script, by their path in the workspace.
fn companions() -> BTreeMap<String, String> {
    [
        "sibling.py",
        "broken.py",
        "package/__init__.py",
        "package/inner.py",
    ]
    .map(|name| {
        (
            name.to_owned(),
            std::fs::read_to_string(folder().join("lib").join(name)).unwrap(),
        )
    })
    .into()
}

impl Script {
    fn read(path: &Path) -> Self {
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let mut script = Script {
            name,
            text: std::fs::read_to_string(path).unwrap(),
            ..Self::default()
        };
        let text = script.text.clone();
        for line in text.lines().map_while(|line| line.strip_prefix("#: ")) {
            let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "args" => script.args = words(rest),
                "stdin" => script.stdin = unescape(rest),
                "env" => {
                    let pairs = rest.split(' ').map(|pair| pair.split_once('=').unwrap());
                    script.env = pairs.map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
                }
                "sandbox" => {
                    assert!(!rest.is_empty(), "{}: say why", script.name);
                    script.sandbox_only = true;
                }
                "bare" => script.bare = true,
                "cold" => script.cold = true,
                "packages" => script.packages = true,
                other => panic!("{}: {other} is not known", script.name),
            }
        }
        script
    }

    /// Its text with the proof in its first line, the numbers of the others being the same in all.
    fn text_with_proof(&self, place: &str) -> String {
        if self.bare {
            return self.text.clone();
        }
        let proof = PROOF.replace("PLACE", place);
        match self.text.strip_prefix("\"\"\"") {
            // What documents the module has to come first.
            Some(_) => {
                let (first, rest) = self.text.split_once('\n').unwrap();
                format!("{first}; {proof}\n{rest}").replacen("; with", "\nwith", 1)
            }
            None => format!("{proof}\n{}", self.text),
        }
    }

    fn companions(&self) -> BTreeMap<String, String> {
        let mut files = companions();
        if self.packages {
            let text = "import sys\nWHERE = __file__\nprint('customized')\n".to_owned();
            let folder = format!(".local/lib/{}/site-packages", python_version());
            files.insert(format!("{folder}/usercustomize.py"), text);
        }
        files
    }

    fn argv(&self) -> Vec<String> {
        let command = ["python3", "main.py"].map(str::to_owned);
        command
            .into_iter()
            .chain(self.args.iter().cloned())
            .collect()
    }

    /// In the sandbox. `true`: by an interpreter that was there before it was asked for.
    async fn run(&self, session: &Session, cold: bool) -> (Seen, Option<bool>) {
        let mut job = python(&self.text_with_proof("__import__('posix').dup(2)"));
        job.files.extend(self.companions());
        job.argv = self.argv();
        job.env.clone_from(&self.env);
        if cold {
            job.env.push((COLD.0.to_owned(), COLD.1.to_owned()));
        }
        job.stdin.clone_from(&self.stdin);
        job.limits = Limits {
            memory_bytes: 512 << 20,
            output_bytes: 4 << 20,
            ..Limits::DEFAULT
        };
        tokio::time::sleep(BETWEEN_RUNS).await;
        let asked = ticks_since_boot();
        let ended = finish(&mut session.start(job)).await.unwrap();
        let said = text_of(&ended.stderr);
        let (proof, stderr) = match self.bare {
            true => (None, said),
            false => without_proofs(&said),
        };
        let began = proof.as_deref().map(start_of);
        if !self.bare {
            assert!(
                began.is_some(),
                "{}: no proof of its start: {ended:?}",
                self.name
            );
        }
        let seen = Seen {
            stdout: text_of(&ended.stdout),
            stderr,
            ending: ended.report.ending,
        };
        (seen, began.map(|began| began < asked))
    }

    async fn run_warm(&self, session: &Session) -> Seen {
        if self.cold {
            let (seen, waited) = self.run(session, false).await;
            assert_eq!(
                waited,
                Some(false),
                "{}: what it brings came too late",
                self.name
            );
            return seen;
        }
        for _ in 0..TRIES {
            let (seen, waited) = self.run(session, false).await;
            if waited != Some(false) {
                return seen;
            }
        }
        panic!("{}: {TRIES} runs in a row were not warm", self.name);
    }

    async fn run_cold(&self, session: &Session) -> Seen {
        let (seen, waited) = self.run(session, true).await;
        assert_ne!(
            waited,
            Some(true),
            "{}: {} did not start it cold",
            self.name,
            COLD.0
        );
        seen
    }

    /// On the machine, in a folder of its own.
    fn run_directly(&self, python: &Path) -> Seen {
        let data = tempfile::tempdir().unwrap();
        let data = data.path().canonicalize().unwrap();
        let (workspace, temporary) = (data.join("workspace"), data.join("tmp"));
        for folder in [&workspace, &temporary] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let place = temporary.join("proof");
        std::fs::write(
            workspace.join("main.py"),
            self.text_with_proof(&format!("'{}'", place.display())),
        )
        .unwrap();
        for (path, text) in self.companions() {
            let path = workspace.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let argv = self.argv();
        let bin = python.parent().unwrap().display();
        let mut command = Command::new(python);
        command
            .arg0(&argv[0])
            .args(&argv[1..])
            .current_dir(&workspace)
            .env_clear()
            .env("PATH", format!("{bin}:/usr/local/bin:/usr/bin:/bin"))
            .env("HOME", &workspace)
            .env("LANG", "C.UTF-8")
            .env("TMPDIR", &temporary)
            .envs(self.env.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: `signal` may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // What a shell's background and `nohup` ignore, and a sandbox does not.
                for number in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(number, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let mut child = command.spawn().unwrap();
        // A script may end without reading.
        let _ = child.stdin.take().unwrap().write_all(&self.stdin);
        let output = child.wait_with_output().unwrap();
        let normal =
            |bytes: &[u8]| text_of(bytes).replace(workspace.to_str().unwrap(), "/workspace");
        Seen {
            stdout: normal(&output.stdout),
            stderr: normal(&output.stderr),
            ending: match (output.status.code(), output.status.signal()) {
                (Some(code), _) => Ending::Exited(code),
                (None, signal) => Ending::Signalled(signal.unwrap()),
            },
        }
    }
}

fn words(text: &str) -> Vec<String> {
    let mut parts = text.split('"');
    let mut words = Vec::new();
    while let Some(plain) = parts.next() {
        words.extend(plain.split_whitespace().map(str::to_owned));
        words.extend(parts.next().map(str::to_owned));
    }
    words
}

fn unescape(text: &str) -> Vec<u8> {
    text.replace("\\n", "\n")
        .replace("\\r", "\r")
        .replace("\\x00", "\0")
        .into_bytes()
}

/// With the addresses of objects, which no two processes share, taken out.
fn text_of(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut parts = text.split("0x");
    let mut normal = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let rest = part.trim_start_matches(|c: char| c.is_ascii_hexdigit());
        let address = part.len() - rest.len() >= 8;
        normal.push_str("0x");
        normal.push_str(if address {
            "…"
        } else {
            &part[..part.len() - rest.len()]
        });
        normal.push_str(rest);
    }
    normal
}

/// Now, in the unit of `/proc/*/stat`: a hundredth of a second.
fn ticks_since_boot() -> u64 {
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
    let seconds = uptime.split(' ').next().unwrap();
    seconds.replace('.', "").parse().unwrap()
}

/// The first proof in what a run wrote to stderr, and the rest without any.
fn without_proofs(said: &str) -> (Option<String>, String) {
    let is_proof = |line: &&str| {
        let fields = line.rsplit_once(") ").map(|(_, rest)| rest.split(' '));
        fields.is_some_and(|fields| fields.count() >= 40)
    };
    let (proofs, rest): (Vec<&str>, Vec<&str>) = said.split_inclusive('\n').partition(is_proof);
    (
        proofs.first().map(|proof| (*proof).to_owned()),
        rest.concat(),
    )
}

/// When a process began, from its `/proc/*/stat`: the 22nd field, the second being in brackets.
fn start_of(stat: &str) -> u64 {
    let after_name = stat.rsplit_once(") ").unwrap().1;
    after_name.split(' ').nth(19).unwrap().parse().unwrap()
}

fn compare(name: &str, what: &str, warm: &Seen, other: &Seen) -> Option<String> {
    if warm == other {
        return None;
    }
    let mut said = format!("=== {name}: warm differs from {what}\n");
    if warm.ending != other.ending {
        said += &format!("ending: {:?}, {what}: {:?}\n", warm.ending, other.ending);
    }
    for (stream, ours, theirs) in [
        ("stdout", &warm.stdout, &other.stdout),
        ("stderr", &warm.stderr, &other.stderr),
    ] {
        let (ours, theirs): (Vec<_>, Vec<_>) =
            (ours.split('\n').collect(), theirs.split('\n').collect());
        let differing =
            (0..ours.len().max(theirs.len())).filter(|n| ours.get(*n) != theirs.get(*n));
        for line in differing.take(8) {
            let (ours, theirs) = (ours.get(line), theirs.get(line));
            said += &format!(
                "{stream} {}\n  warm  {ours:.1500?}\n  other {theirs:.1500?}\n",
                line + 1
            );
        }
    }
    Some(said)
}

/// What the machine's own Python answers.
fn ask_python(question: &str) -> String {
    let answer = Command::new("python3")
        .args(["-I", "-S", "-c", &format!("import sys; print({question})")])
        .output()
        .expect("python3 is needed to compare with");
    String::from_utf8(answer.stdout).unwrap().trim().to_owned()
}

/// As its folders are named: `python3.11`.
fn python_version() -> String {
    ask_python("'python%d.%d' % sys.version_info[:2]")
}

/// A user's sandbox on a platform of its own, with interpreters waiting in its slots.
async fn sandbox() -> (tempfile::TempDir, Arc<LocalPlatform>, Session) {
    let data = tempfile::tempdir().unwrap();
    let store = DirectoryStore::open(data.path().join("store")).unwrap();
    let config = LocalConfig {
        data: data.path().to_owned(),
        runner: env!("CARGO_BIN_EXE_gantry-runner").into(),
        runs_per_user: 2,
        maximum: Limits::MAXIMUM,
        network: false,
        packages: Default::default(),
        log_refused: false,
        drain: Duration::from_secs(10),
        sites: gantry::model::Sites::plain("apps.localhost:8000", "localhost:8000"),
        disk: DiskBounds::USUAL,
    };
    let platform = Arc::new(LocalPlatform::start(config, store).await.unwrap());
    let sessions = Sessions::new(Arc::clone(&platform) as Arc<dyn Platform>);
    let user: UserId = "fidelity".parse().unwrap();
    let session = sessions.of(&user);
    session.ready().await.unwrap();
    // Until both slots have an interpreter waiting.
    tokio::time::sleep(Duration::from_secs(1)).await;
    (data, platform, session)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_run_looks_like_a_cold_one() {
    let only = std::env::var("GANTRY_TEST_ONLY").ok();
    let scripts = scripts();
    assert!(
        scripts.len() >= FEWEST_SCRIPTS,
        "only {} scripts",
        scripts.len()
    );
    let bare = scripts.iter().filter(|script| script.bare).count();
    assert!(
        bare <= MOST_BARE,
        "{bare} scripts without proof of a warm start"
    );
    let (_data, platform, session) = sandbox().await;
    let python = PathBuf::from(ask_python("sys.executable"));
    let (mut differences, mut direct) = (Vec::new(), 0);
    for script in scripts
        .iter()
        .filter(|s| only.as_ref().is_none_or(|only| s.name.contains(only)))
    {
        let warm = script.run_warm(&session).await;
        let cold = script.run_cold(&session).await;
        differences.extend(compare(&script.name, "cold", &warm, &cold));
        if !script.sandbox_only {
            direct += 1;
            let directly = script.run_directly(&python);
            differences.extend(compare(&script.name, "direct", &warm, &directly));
        }
    }
    platform.shutdown().await;
    println!(
        "{} scripts warm and cold, {direct} of them directly too",
        scripts.len()
    );
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_runs_do_not_draw_the_same_numbers() {
    let script = Script {
        name: "luck".to_owned(),
        text: "import random, secrets, tempfile, uuid, os, ssl\n\
               print(random.random())\nprint(secrets.token_hex())\nprint(tempfile.mktemp())\n\
               print(uuid.uuid4())\nprint(os.urandom(8))\nprint(ssl.RAND_bytes(8))\n\
               print(random.SystemRandom().random())\nprint(uuid.uuid1())\n"
            .to_owned(),
        ..Script::default()
    };
    let (_data, platform, session) = sandbox().await;
    let mut drawn = std::collections::HashSet::new();
    for _ in 0..4 {
        let seen = script.run_warm(&session).await;
        assert_eq!(seen.ending, Ending::Exited(0), "{seen:?}");
        for line in seen.stdout.lines() {
            assert!(drawn.insert(line.to_owned()), "{line} came twice");
        }
    }
    platform.shutdown().await;
    assert_eq!(drawn.len(), 4 * 8);
}
