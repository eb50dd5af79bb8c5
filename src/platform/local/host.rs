//! What this machine has and allows: interpreters, namespaces, filters. Looked at once, at start.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::cgroup::Cgroup;
use super::launch::launch;
use crate::model::{LANGUAGES, Tool};
use crate::platform::{Check, Finding};
use crate::runner::confine::landlock_version;
use crate::runner::sandbox::{Isolation, Role, SandboxSpec};

/// Host paths every program needs: libraries, commands and what they read of `/etc`.
const SHOWN: &[&str] = &[
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/nix/store",
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/fonts",
    "/etc/host.conf",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/magic",
    "/etc/mime.types",
    "/etc/nsswitch.conf",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl",
];

/// Where commands are found when the interpreters are not elsewhere.
const STANDARD_PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The first of the user ids that sandboxes use on the host: above the ranges that distributions
/// and systemd hand out (systemd's UIDS-GIDS page leaves 1879048192 and up unused).
pub const FIRST_HOST_UID: u32 = 0x7000_0000;

/// The machine, as far as sandboxes are concerned.
#[derive(Debug, Clone)]
pub struct Host {
    /// How far a sandbox can be cut off.
    pub isolation: Isolation,
    /// Whether a sandbox's memory and processes can be bounded by the kernel as a whole.
    pub cgroups: bool,
    /// What was found, for the operator.
    pub checks: Vec<Check>,
}

/// The interpreters, found by asking them.
#[derive(Debug, Clone)]
pub struct Interpreters {
    /// The real Python behind `python3`, past any wrapper script.
    pub python: Option<PathBuf>,
    /// `PATH` of user code.
    pub path: String,
    /// Host paths to show.
    pub shown: Vec<PathBuf>,
    /// By language, the first of its commands that this machine lacks.
    pub missing: HashMap<&'static str, Lacking>,
}

/// A command that programs of a language cannot be run with.
#[derive(Debug, Clone)]
pub enum Lacking {
    /// It is not installed.
    Tool(&'static Tool),
    /// It is, in a folder that cannot be shown to user code.
    Closed(&'static Tool, PathBuf),
}

/// What is the server's and is shown to nobody's program.
#[derive(Debug, Clone)]
pub struct Private {
    /// The server's data folder.
    data: PathBuf,
    /// The home of the server's user.
    home: Option<PathBuf>,
}

impl Host {
    /// Tries what can be done, strongest first.
    pub fn probe(runner: &Path, folder: &Path) -> Host {
        let mut checks = Vec::new();
        let isolation = probe_isolation(runner, folder, &mut checks);
        checks.push(probe_landlock());
        let cgroups = probe_cgroups(isolation, &mut checks);
        Host {
            isolation,
            cgroups,
            checks,
        }
    }
}

fn probe_isolation(runner: &Path, folder: &Path, checks: &mut Vec<Check>) -> Isolation {
    let root = rustix::process::getuid().is_root();
    let full = Isolation::Full {
        first_host_uid: FIRST_HOST_UID,
    };
    let candidates: &[Isolation] = if root {
        &[full, Isolation::SingleUser]
    } else {
        &[Isolation::SingleUser]
    };
    let mut refused = String::new();
    for isolation in candidates {
        let spec = SandboxSpec {
            isolation: *isolation,
            folder: folder.to_owned(),
            shown: SHOWN.iter().map(PathBuf::from).collect(),
            placed: Vec::new(),
            inside: Vec::new(),
            cgroups: Vec::new(),
            network: false,
            role: Role::Trial,
        };
        match launch(runner, &spec, None, None) {
            Ok(_) => {
                checks.push(match isolation {
                    Isolation::Full { .. } => Check {
                        name: "isolation",
                        finding: Finding::Good,
                        detail: "runs are in namespaces of their own, each slot under a user id of its own".to_owned(),
                    },
                    _ => Check {
                        name: "isolation",
                        finding: Finding::Weaker,
                        detail: "runs are in namespaces of their own but share one user id, so each user has one run at a time; start as root for user ids of their own".to_owned(),
                    },
                });
                return *isolation;
            }
            Err(error) => refused = format!("{error:#}"),
        }
    }
    checks.push(Check {
        name: "isolation",
        finding: Finding::Missing,
        detail: format!(
            "this machine does not allow namespaces ({refused}): user code runs with the server's own \
             rights, behind filters and limits only. Allow unprivileged user namespaces \
             (kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0) or start as root"
        ),
    });
    checks.push(Check {
        name: "ports of released programs",
        finding: Finding::Missing,
        detail: "without a network namespace of its own a released program would take a port of the \
                 machine's, so it cannot listen; a program that ends is released and its output shown"
            .to_owned(),
    });
    Isolation::None
}

fn probe_landlock() -> Check {
    if let Some(version) = landlock_version() {
        Check {
            name: "landlock",
            finding: Finding::Good,
            detail: format!("version {version}"),
        }
    } else {
        Check {
            name: "landlock",
            finding: Finding::Weaker,
            detail: "this kernel has no Landlock; mounts and user ids alone confine files"
                .to_owned(),
        }
    }
}

fn probe_cgroups(isolation: Isolation, checks: &mut Vec<Check>) -> bool {
    let made = if matches!(isolation, Isolation::Full { .. }) {
        let name = format!("trial-{}", std::process::id());
        Cgroup::create(&name, &name, 64 << 20, 16).map(|_| Cgroup::remove(&name))
    } else {
        Err(std::io::Error::other(
            "only root can make control groups here",
        ))
    };
    let (finding, detail) = match &made {
        Ok(()) => (
            Finding::Good,
            "each sandbox has a control group that bounds its memory and processes".to_owned(),
        ),
        Err(error) => (
            Finding::Weaker,
            format!(
                "no control groups ({error}): the supervisor alone bounds memory, by measuring"
            ),
        ),
    };
    checks.push(Check {
        name: "control groups",
        finding,
        detail,
    });
    made.is_ok()
}

impl Interpreters {
    /// Asks `PATH` for the interpreters and them for their folders.
    pub fn find(private: &Private) -> Interpreters {
        let mut shown: BTreeSet<PathBuf> = SHOWN.iter().map(PathBuf::from).collect();
        let mut folders: Vec<PathBuf> = Vec::new();
        let mut missing = HashMap::new();
        let python = ask_python().map(|asked| {
            let python = asked.python.clone();
            shown.extend(asked.shown(private));
            folders.extend(python.parent().map(Path::to_owned));
            python
        });
        for language in LANGUAGES {
            for tool in language.tools {
                // Python was asked itself.
                if language.warm && python.is_some() {
                    continue;
                }
                match search(tool.command) {
                    Some(found) => {
                        if let Err(home) = locate(tool, found, private, &mut shown, &mut folders) {
                            let closed = Lacking::Closed(tool, home);
                            missing.entry(language.name).or_insert(closed);
                        }
                    }
                    None => {
                        missing.entry(language.name).or_insert(Lacking::Tool(tool));
                    }
                }
            }
            shown.extend(language.settings.iter().flat_map(|name| settings(name)));
        }
        let mut path: Vec<String> = Vec::new();
        for folder in folders {
            let folder = folder.to_string_lossy().into_owned();
            if !STANDARD_PATH.split(':').any(|known| known == folder) && !path.contains(&folder) {
                path.push(folder);
            }
        }
        path.push(STANDARD_PATH.to_owned());
        Interpreters {
            python,
            path: path.join(":"),
            // Whatever was asked and answered: nothing at or above the data folder.
            shown: shown
                .into_iter()
                .filter(|path| !private.is_in(path))
                .collect(),
            missing,
        }
    }
}

/// What Python says of itself.
struct Python {
    python: PathBuf,
    /// The folders that it was installed into.
    prefixes: Vec<PathBuf>,
    /// The files and folders in them that it needs: itself, its libraries.
    parts: Vec<PathBuf>,
}

impl Python {
    /// What is to be shown: its folders, and only what it needs of those that hold more.
    fn shown(self, private: &Private) -> Vec<PathBuf> {
        let (closed, open): (Vec<_>, Vec<_>) = self
            .prefixes
            .into_iter()
            .partition(|prefix| private.holds_more(prefix));
        for prefix in &closed {
            tracing::info!(
                prefix = %prefix.display(),
                "Python is in a folder that holds more than programs: of it, only its own files are shown to user code"
            );
        }
        let parts = match closed.is_empty() {
            true => Vec::new(),
            false => self.parts,
        };
        let own = parts
            .into_iter()
            .filter(|part| part.exists() && !private.holds_more(part));
        open.into_iter()
            .chain(own)
            .filter(|path| !is_shown(path))
            .collect()
    }
}

/// `python3` may be a wrapper script; the interpreter knows itself and its folders.
fn ask_python() -> Option<Python> {
    let question = "import os, sys, sysconfig as c\n\
        paths, var = c.get_paths(), c.get_config_var\n\
        print(sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.realpath(sys.executable), \
        *(paths[name] for name in ('stdlib', 'platstdlib', 'purelib', 'platlib')), \
        *(os.path.join(var('LIBDIR'), var(name)) for name in ('LDLIBRARY', 'INSTSONAME') if var('LIBDIR') and var(name)), \
        *((os.path.join(sys.prefix, 'pyvenv.cfg'),) if sys.prefix != sys.base_prefix else ()), sep='\\n')";
    let text = answer(Command::new("python3").args(["-I", "-S", "-c", question]))?;
    let lines: Vec<PathBuf> = text.lines().map(PathBuf::from).collect();
    let python = lines.first().filter(|path| path.is_absolute())?.clone();
    let absolute = |path: &&PathBuf| path.is_absolute();
    let prefixes = lines.iter().skip(1).take(3).filter(absolute).cloned();
    let parts = lines.iter().skip(4).filter(absolute).cloned();
    Some(Python {
        prefixes: prefixes.collect(),
        // The name that it is called by may be a link to the file.
        parts: std::iter::once(python.clone()).chain(parts).collect(),
        python,
    })
}

/// Where a command that was found lives: what has to be shown of the machine, and where `PATH` has to lead.
/// An error has the folder that would have to be shown and cannot be.
fn locate(
    tool: &Tool,
    found: PathBuf,
    private: &Private,
    shown: &mut BTreeSet<PathBuf>,
    folders: &mut Vec<PathBuf>,
) -> Result<(), PathBuf> {
    let real = fs::canonicalize(&found).unwrap_or_else(|_| found.clone());
    let standard = |path: &Path| {
        let folder = path.parent().unwrap_or(path);
        STANDARD_PATH
            .split(':')
            .any(|known| Path::new(known) == folder)
    };
    if is_shown(&real) && standard(&found) {
        return Ok(());
    }
    // It says itself which folder it needs.
    if let Some(home) = ask_home(tool, &found) {
        if private.holds_more(&home) {
            return Err(home);
        }
        folders.push(home.join("bin"));
        if !is_shown(&home) {
            shown.insert(home);
        }
        return Ok(());
    }
    // PREFIX/bin/COMMAND: libraries are below PREFIX.
    let prefix = real.ancestors().nth(2).map(Path::to_owned);
    let own = |prefix: &PathBuf| !private.holds_more(prefix) && !is_top(prefix);
    let Some(prefix) = prefix.filter(own) else {
        if private.is_in(&real) {
            return Err(real);
        }
        folders.extend(real.parent().map(Path::to_owned));
        shown.insert(real);
        return Ok(());
    };
    folders.push(prefix.join("bin"));
    if !is_shown(&prefix) {
        shown.insert(prefix);
    }
    Ok(())
}

/// Whether a folder is one of the machine's own, such as `/opt`, in which there is more than one program.
fn is_top(folder: &Path) -> bool {
    folder.parent().is_none_or(|above| above.parent().is_none())
}

impl Private {
    /// With this data folder; where a whole folder is shown that has it in it, the server does not start.
    pub fn new(data: &Path) -> anyhow::Result<Self> {
        let data = real(data);
        if let Some(shown) = SHOWN
            .iter()
            .find(|shown| data.starts_with(real(Path::new(shown))))
        {
            anyhow::bail!(
                "the data folder {} is in {shown}, which every program of a user can read. Choose \
                 another one with GANTRY_DATA_DIR, such as /var/lib/gantry",
                data.display()
            );
        }
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
        Ok(Self {
            data,
            home: home.map(|home| real(Path::new(&home))),
        })
    }

    /// Whether it is the data folder, in it, or above it.
    fn is_in(&self, path: &Path) -> bool {
        let path = real(path);
        self.data.starts_with(&path) || path.starts_with(&self.data)
    }

    /// Whether a folder holds more than programs: the server's data, somebody's home, or the machine.
    fn holds_more(&self, folder: &Path) -> bool {
        let folder = real(folder);
        // Where programs are installed for one user: beside them are the data and keys of all others.
        let of_home = self.home.as_ref().is_some_and(|home| {
            home.starts_with(&folder)
                || [".local", ".local/share", ".config", ".cache"]
                    .iter()
                    .any(|name| home.join(name) == folder)
        });
        self.is_in(&folder)
            || of_home
            || ["/root", "/home"]
                .iter()
                .any(|name| folder == Path::new(name))
            || folder
                .parent()
                .is_none_or(|above| above == Path::new("/home"))
    }
}

/// The path without links, as far as it can be told.
fn real(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// A launcher knows the folder of what it launches.
fn ask_home(tool: &Tool, found: &Path) -> Option<PathBuf> {
    if tool.home.is_empty() {
        return None;
    }
    let text = answer(Command::new(found).args(tool.home))?;
    let home = PathBuf::from(text.trim_end());
    home.join("bin")
        .join(tool.command)
        .is_file()
        .then_some(home)
}

/// Longest wait for a command that says where it is: a hundred times what it takes.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);

/// Most bytes of such an answer.
const MOST_ANSWER: u64 = 64 << 10;

/// What a command says. One that does not answer is ended, and taken for one that is not there: everybody's
/// first run waits for it.
fn answer(command: &mut Command) -> Option<String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        // What it starts ends with it.
        .process_group(0)
        .spawn()
        .ok()?;
    let stdout = child.stdout.take()?;
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.take(MOST_ANSWER).read_to_string(&mut text);
        let _ = tell.send(read.map(|_| text));
    });
    let said = told.recv_timeout(ANSWER_PATIENCE);
    if said.is_err() {
        let program = command.get_program().to_string_lossy().into_owned();
        tracing::warn!(%program, "it does not answer and is not used");
    }
    // Also of one that has answered and does not end.
    if let Some(group) = rustix::process::Pid::from_raw(child.id().cast_signed()) {
        let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
    }
    let _ = child.wait();
    said.ok()?.ok()
}

/// What a language's commands read below `/etc`: distributions keep their settings there.
fn settings(beginning: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir("/etc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(beginning))
        .map(|entry| entry.path())
        .collect()
}

fn is_shown(path: &Path) -> bool {
    SHOWN.iter().any(|shown| path.starts_with(shown))
}

fn search(command: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(command))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn home() -> (tempfile::TempDir, Private) {
        let home = tempfile::tempdir().unwrap();
        let top = real(home.path());
        for folder in [
            ".local/share/gantry",
            ".local/bin",
            ".local/lib/python3",
            "tools/bin",
        ] {
            fs::create_dir_all(top.join(folder)).unwrap();
        }
        let private = Private {
            data: top.join(".local/share/gantry"),
            home: Some(top),
        };
        (home, private)
    }

    #[test]
    fn a_folder_that_holds_the_data_is_never_shown() {
        let (home, private) = home();
        let at = |name: &str| real(home.path()).join(name);
        for folder in [
            "",
            ".local",
            ".local/share",
            ".local/share/gantry",
            ".local/share/gantry/x",
        ] {
            assert!(private.holds_more(&at(folder)), "{folder}");
        }
        // By another name, too.
        std::os::unix::fs::symlink(at(".local"), at("alias")).unwrap();
        assert!(private.holds_more(&at("alias")));
        for folder in [".local/bin/tool", ".local/lib/python3", "tools"] {
            assert!(!private.holds_more(&at(folder)), "{folder}");
        }
        for folder in ["/", "/home", "/home/ann", "/root"] {
            assert!(private.holds_more(Path::new(folder)), "{folder}");
        }
    }

    #[test]
    fn of_a_python_beside_the_data_its_own_files_are_shown() {
        let (home, private) = home();
        let at = |name: &str| real(home.path()).join(name);
        fs::write(at(".local/bin/python3"), "").unwrap();
        let python = Python {
            python: at(".local/bin/python3"),
            prefixes: vec![at(".local"), at("tools")],
            parts: vec![
                at(".local/bin/python3"),
                at(".local/lib/python3"),
                at(".local/lib/absent"),
            ],
        };
        let expected = [
            at("tools"),
            at(".local/bin/python3"),
            at(".local/lib/python3"),
        ];
        assert_eq!(python.shown(&private), expected);
    }

    #[test]
    fn of_a_tool_beside_the_data_only_the_file_is_shown() {
        let (home, private) = home();
        let at = |name: &str| real(home.path()).join(name);
        let tool = Tool {
            home: &[],
            ..*LANGUAGES[0].tools.first().unwrap()
        };
        for (name, expected) in [
            (".local/bin/tool", ".local/bin/tool"),
            ("tools/bin/tool", "tools"),
        ] {
            fs::write(at(name), "").unwrap();
            let (mut shown, mut folders) = (BTreeSet::new(), Vec::new());
            locate(&tool, at(name), &private, &mut shown, &mut folders).unwrap();
            assert_eq!(shown.into_iter().collect::<Vec<_>>(), [at(expected)]);
        }
    }

    #[test]
    fn a_command_that_hangs_is_not_waited_for() {
        let began = std::time::Instant::now();
        let said = answer(Command::new("sh").args(["-c", "echo said; exec sleep 60 >&-"]));
        assert_eq!(said.as_deref(), Some("said\n"));
        assert!(answer(Command::new("sh").args(["-c", "sleep 60 & wait"])).is_none());
        assert!(began.elapsed() < ANSWER_PATIENCE + Duration::from_secs(5));
        assert!(answer(&mut Command::new("/no/such/command")).is_none());
    }

    #[test]
    fn a_data_folder_that_is_shown_is_refused() {
        let refused = Private::new(Path::new("/usr/share"))
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("/usr") && refused.contains("GANTRY_DATA_DIR"),
            "{refused}"
        );
        Private::new(&std::env::temp_dir()).unwrap();
    }
}
