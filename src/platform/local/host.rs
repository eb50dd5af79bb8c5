//! What this machine has and allows: interpreters, namespaces, filters. Looked at once, at start.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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
    pub missing: HashMap<&'static str, &'static Tool>,
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
        Cgroup::create(&name, 64 << 20, 16).map(|_| Cgroup::remove(&name))
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
    pub fn find() -> Interpreters {
        let mut shown: BTreeSet<PathBuf> = SHOWN.iter().map(PathBuf::from).collect();
        let mut folders: Vec<PathBuf> = Vec::new();
        let python = ask_python().map(|(python, prefixes)| {
            shown.extend(prefixes.into_iter().filter(|p| !is_shown(p)));
            folders.extend(python.parent().map(Path::to_owned));
            python
        });
        let mut missing = HashMap::new();
        for language in LANGUAGES {
            for tool in language.tools {
                // Python was asked itself.
                if language.warm && python.is_some() {
                    continue;
                }
                match search(tool.command) {
                    Some(found) => locate(tool, found, &mut shown, &mut folders),
                    None => {
                        missing.entry(language.name).or_insert(tool);
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
            shown: shown.into_iter().collect(),
            missing,
        }
    }
}

/// `python3` may be a wrapper script; the interpreter knows itself and its folders.
fn ask_python() -> Option<(PathBuf, Vec<PathBuf>)> {
    let question = "import sys; print(sys.executable, sys.prefix, sys.base_prefix, sys.exec_prefix, sep='\\n')";
    let answer = Command::new("python3")
        .args(["-I", "-S", "-c", question])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(answer.stdout).ok()?;
    let mut lines = text.lines().map(PathBuf::from);
    let python = lines.next().filter(|path| path.is_absolute())?;
    Some((python, lines.filter(|path| path.is_absolute()).collect()))
}

/// Where a command that was found lives: what has to be shown of the machine, and where `PATH` has to lead.
fn locate(tool: &Tool, found: PathBuf, shown: &mut BTreeSet<PathBuf>, folders: &mut Vec<PathBuf>) {
    let real = fs::canonicalize(&found).unwrap_or_else(|_| found.clone());
    let standard = |path: &Path| {
        let folder = path.parent().unwrap_or(path);
        STANDARD_PATH
            .split(':')
            .any(|known| Path::new(known) == folder)
    };
    if is_shown(&real) && standard(&found) {
        return;
    }
    // PREFIX/bin/COMMAND: libraries are below PREFIX.
    let prefix = real.ancestors().nth(2).filter(|prefix| !is_private(prefix));
    let prefix = prefix.map(Path::to_owned);
    let Some(home) = ask_home(tool, &found).or(prefix) else {
        folders.extend(real.parent().map(Path::to_owned));
        shown.insert(real);
        return;
    };
    folders.push(home.join("bin"));
    if !is_shown(&home) {
        shown.insert(home);
    }
}

/// Whether a folder holds more than programs: somebody's home, or the machine.
fn is_private(folder: &Path) -> bool {
    let own = std::env::var_os("HOME").is_some_and(|home| Path::new(&home) == folder);
    own || folder
        .parent()
        .is_none_or(|above| above == Path::new("/home"))
        || folder == Path::new("/root")
}

/// A launcher knows the folder of what it launches.
fn ask_home(tool: &Tool, found: &Path) -> Option<PathBuf> {
    if tool.home.is_empty() {
        return None;
    }
    let answer = Command::new(found)
        .args(tool.home)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(answer.stdout).ok()?;
    let home = PathBuf::from(text.trim_end());
    home.join("bin")
        .join(tool.command)
        .is_file()
        .then_some(home)
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
