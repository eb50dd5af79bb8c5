//! What a module's sandbox shows: the server, what the server needs, and the module's packages.
//!
//! Packages are installed by pip in a sandbox of its own, as what a program depends on is: a package's metadata may name
//! another by its URL, and pip runs what that brings. The sandbox has no network but the lines to the index. What comes
//! out of it is an archive, which is unpacked into the [`Store`].

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::store::{NotKept, Store, Whose};
use crate::model::{
    Ending, INDEX_FAILED, Limits, ModuleName, Package, PackageIndex, Packages, Problem,
    SubmissionId, UserId, index_failed, patient,
};
use crate::platform::ByteStream;
use crate::platform::local::sandboxes::{Sandboxes, Tenant};
use crate::platform::modules::packages_not_allowed;
use crate::platform::tunnel::{self, Meters, Trouble, Tunnel};
use crate::runner::client::{Connect, ConnectError, RunEvent, Session};
use crate::runner::sandbox::{Placed, Role};
use crate::runner::wire::{BUILD_SCRATCH_BYTES, Job, JobEvent, JobId};

/// Where a sandbox has them.
pub const SERVER: &str = "opt/gantry/server";
pub const TOOLS: &str = "opt/gantry/tools";
pub const PACKAGES: &str = "opt/gantry/packages";

/// The server, as `runner-image/` has it.
const FILES: &[(&str, &str)] = &[
    (
        "__init__.py",
        include_str!("../../../../runner-image/gantry_module/__init__.py"),
    ),
    (
        "__main__.py",
        include_str!("../../../../runner-image/gantry_module/__main__.py"),
    ),
    (
        "calls.py",
        include_str!("../../../../runner-image/gantry_module/calls.py"),
    ),
    (
        "module_service_pb2.py",
        include_str!("../../../../runner-image/gantry_module/module_service_pb2.py"),
    ),
    (
        "nursery.py",
        include_str!("../../../../runner-image/gantry_module/nursery.py"),
    ),
    (
        "pool.py",
        include_str!("../../../../runner-image/gantry_module/pool.py"),
    ),
    (
        "settings.py",
        include_str!("../../../../runner-image/gantry_module/settings.py"),
    ),
    (
        "supervisor.py",
        include_str!("../../../../runner-image/gantry_module/supervisor.py"),
    ),
    (
        "values.py",
        include_str!("../../../../runner-image/gantry_module/values.py"),
    ),
    (
        "wire.py",
        include_str!("../../../../runner-image/gantry_module/wire.py"),
    ),
    (
        "worker.py",
        include_str!("../../../../runner-image/gantry_module/worker.py"),
    ),
];

/// What the server needs, and the modules that the runner image has: here they are installed when they
/// are first asked for.
const REQUIREMENTS: &str = include_str!("../../../../runner-image/requirements.txt");
const MODULES: &str = include_str!("../../../../runner-image/modules.txt");

/// Installations of one user's that run or wait at one time.
const MOST_WAITING: usize = 8;

/// Lines that an installation may have at one time.
const LINES: usize = 6;

/// Between two tries to lend a line.
const AGAIN: Duration = Duration::from_millis(500);

/// How much longer than its limit an installation may be silent: its sandbox has to come up.
const GRACE: Duration = Duration::from_secs(60);

/// Lines of the installer's that say why it failed, and bytes of its output that are kept for them.
const LAST_LINES: usize = 12;
const KEPT_OUTPUT: usize = 16 << 10;

/// The folder that packages are installed into, below the sandbox's workspace.
const TARGET: &str = "packages";

/// Compiled files then say what they were compiled from by its content: the archive keeps no times.
const EPOCH: (&str, &str) = ("SOURCE_DATE_EPOCH", "315532800");

/// pip unpacks beside the target: moved from another mount, everything would be there twice for a moment.
const BESIDE: (&str, &str) = ("TMPDIR", "/workspace");

/// The operator's variables for the certificates that an index is trusted by, and where sandboxes show such files.
const CERTIFICATES: [&str; 3] = ["PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"];
const SHOWN_CERTIFICATES: [&str; 2] = ["/etc/ssl/", "/usr/"];

/// What a sandbox of a module shows.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The server.
    pub server: PathBuf,
    /// What the server needs.
    pub tools: PathBuf,
    /// The module's packages.
    pub packages: Option<PathBuf>,
}

impl Parts {
    /// All of them, in their places.
    pub fn inside(&self) -> Vec<Placed> {
        let placed = |from: &PathBuf, name: &str| Placed {
            from: from.clone(),
            name: name.to_owned(),
            writable: false,
        };
        let mut all = vec![placed(&self.server, SERVER), placed(&self.tools, TOOLS)];
        all.extend(self.packages.iter().map(|from| placed(from, PACKAGES)));
        all
    }
}

/// What is to be installed, and for whom.
#[derive(Clone, Copy)]
struct Order<'a> {
    whose: Whose<'a>,
    /// As pip takes them.
    packages: &'a [String],
    index: &'a PackageIndex,
    /// The set's name.
    name: &'a str,
}

/// Puts parts in their places.
#[derive(Debug)]
pub struct Installer {
    folder: PathBuf,
    store: Store,
    sandboxes: Arc<Sandboxes>,
    allowed: Packages,
    meters: Arc<Meters>,
    /// What Gantry itself names is installed once.
    own: tokio::sync::Mutex<()>,
    /// One installation of a user's at a time. A slow index keeps nobody else waiting.
    users: Mutex<HashMap<UserId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Installer {
    /// Into this folder.
    pub fn new(folder: PathBuf, sandboxes: Arc<Sandboxes>, allowed: Packages) -> Self {
        Self {
            store: Store::new(folder.clone()),
            folder,
            sandboxes,
            allowed,
            meters: Arc::default(),
            own: tokio::sync::Mutex::default(),
            users: Mutex::default(),
        }
    }

    /// Removes what an earlier version left, and what was not finished.
    pub fn tidy(&self) {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || {
            if let Err(error) = store.tidy() {
                tracing::warn!(%error, "packages of an earlier version stay behind");
            }
        });
    }

    /// The name of a user's set of packages.
    pub fn set_name(&self, python: &Path, packages: &[Package]) -> String {
        let index = self.index().map_or("", |index| index.url.as_str());
        let python = python.to_string_lossy();
        Package::set_name(&Package::set(packages), &[&python, index])
    }

    fn index(&self) -> Option<&PackageIndex> {
        self.allowed.index(Packages::python()?)
    }

    /// The parts of a module, installed if they are not there yet. `used`: the sets of the user's that are not to be
    /// removed for them.
    pub async fn parts(
        &self,
        python: &Path,
        user: &UserId,
        module: &ModuleName,
        packages: &[Package],
        used: &BTreeSet<String>,
    ) -> Result<Parts, Problem> {
        let server = self.write_server().map_err(|error| not_written(&error))?;
        let tools = self.own(python, &lines(REQUIREMENTS)).await?;
        let packages = match packages {
            [] => match bundled(module) {
                none if none.is_empty() => None,
                some => Some(self.own(python, &some).await?),
            },
            some => Some(self.users(python, user, some, used).await?),
        };
        Ok(Parts {
            server,
            tools,
            packages,
        })
    }

    /// The server's files, under a name that changes with them: what runs keeps what it was started with.
    fn write_server(&self) -> anyhow::Result<PathBuf> {
        let mut digest = Sha256::new();
        for part in FILES.iter().flat_map(|(name, text)| [*name, *text]) {
            digest.update((part.len() as u64).to_le_bytes());
            digest.update(part);
        }
        let sum: String = digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let folder = self.folder.join(format!("server-{sum}"));
        let package = folder.join("gantry_module");
        if package.join("worker.py").is_file() {
            return Ok(folder);
        }
        fs::create_dir_all(&package)?;
        // The last one is what says that all are there.
        for (name, text) in FILES {
            fs::write(package.join(name), text)?;
        }
        make_readable(&folder)?;
        Ok(folder)
    }

    /// A set that Gantry names: each package pinned, and what they need among them, so that neither a user nor a
    /// package's metadata has a say in what is in it.
    async fn own(&self, python: &Path, packages: &[String]) -> Result<PathBuf, Problem> {
        let name = Package::set_name(packages, &[&python.to_string_lossy()]);
        if let Some(found) = self.store.find(Whose::Own, &name) {
            return Ok(found);
        }
        let _one = self.own.lock().await;
        if let Some(found) = self.store.find(Whose::Own, &name) {
            return Ok(found);
        }
        let index = self.allowed.own.as_ref().ok_or_else(no_index)?;
        let order = Order {
            whose: Whose::Own,
            packages,
            index,
            name: &name,
        };
        self.installed(order, &BTreeSet::new()).await
    }

    async fn users(
        &self,
        python: &Path,
        user: &UserId,
        packages: &[Package],
        used: &BTreeSet<String>,
    ) -> Result<PathBuf, Problem> {
        let name = self.set_name(python, packages);
        let whose = Whose::User(user);
        if let Some(found) = self.store.find(whose, &name) {
            return Ok(found);
        }
        let index = self.index().ok_or_else(packages_not_allowed)?;
        let lock = self.lock_of(user).ok_or_else(too_many)?;
        let _one = lock.lock().await;
        if let Some(found) = self.store.find(whose, &name) {
            return Ok(found);
        }
        let order = Order {
            whose,
            packages: &Package::set(packages),
            index,
            name: &name,
        };
        self.installed(order, used).await
    }

    /// The user's lock; `None`: as many of theirs wait for it as may.
    fn lock_of(&self, user: &UserId) -> Option<Arc<tokio::sync::Mutex<()>>> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.retain(|_, lock| Arc::strong_count(lock) > 1);
        let lock = users.entry(user.clone()).or_default();
        (Arc::strong_count(lock) <= MOST_WAITING).then(|| Arc::clone(lock))
    }

    /// Installs a set and keeps it.
    async fn installed(
        &self,
        order: Order<'_>,
        used: &BTreeSet<String>,
    ) -> Result<PathBuf, Problem> {
        let packages = order.packages.join(" ");
        tracing::info!(%packages, "packages are being installed for modules");
        let archive = self.archive(&order).await?;
        let (store, name, used) = (self.store.clone(), order.name.to_owned(), used.clone());
        let user = match order.whose {
            Whose::Own => None,
            Whose::User(user) => Some(user.clone()),
        };
        let kept = tokio::task::spawn_blocking(move || {
            let whose = user.as_ref().map_or(Whose::Own, Whose::User);
            store.keep(whose, &name, (&archive, TARGET), &used)
        });
        match kept.await {
            Ok(Ok(folder)) => Ok(folder),
            Ok(Err(NotKept::Full)) => Err(full()),
            Ok(Err(NotKept::Failed(error))) => Err(not_installed(&packages, &error.to_string())),
            Err(error) => Err(not_installed(&packages, &error.to_string())),
        }
    }

    /// What pip installs, packed, out of a sandbox that is made for it and ends with it.
    async fn archive(&self, order: &Order<'_>) -> Result<Vec<u8>, Problem> {
        let packages = order.packages.join(" ");
        let name = format!("install-{}", SubmissionId::new());
        let tenant = Tenant {
            name: name.clone(),
            user: match order.whose {
                Whose::Own => None,
                Whose::User(user) => Some(user.clone()),
            },
            placed: Vec::new(),
            slots: 1,
            network: false,
            memory: Limits::COMPILE.memory_bytes + BUILD_SCRATCH_BYTES,
        };
        let sandbox = self.sandboxes.make(tenant, Role::Agent).await;
        let sandbox = sandbox.map_err(|error| not_installed(&packages, &format!("{error:#}")))?;
        let archive = self.run(&name, order).await;
        self.sandboxes.forget(&name, sandbox).await;
        archive
    }

    async fn run(&self, sandbox: &str, order: &Order<'_>) -> Result<Vec<u8>, Problem> {
        let packages = order.packages.join(" ");
        let failed = |why: String| not_installed(&packages, &why);
        let job = self.job(order);
        let (id, patience) = (job.id, job.limits.wall() + GRACE);
        let account = match order.whose {
            Whose::Own => String::new(),
            Whose::User(user) => user.to_string(),
        };
        let places = order.index.places.clone();
        let tunnel = Arc::new(Tunnel::new(account, places, Arc::clone(&self.meters)));
        let _lines = lend(&self.sandboxes, sandbox, id, &tunnel);
        let session = Session::open(Dial {
            sandboxes: Arc::clone(&self.sandboxes),
            name: sandbox.to_owned(),
        });
        let mut run = session.start(job);
        let mut said = Vec::new();
        let report = loop {
            let event = timeout(patience, run.next()).await;
            match event.map_err(|_| failed("its sandbox does not answer".to_owned()))? {
                RunEvent::Lost(why) => return Err(failed(why)),
                RunEvent::Event { seq, event } => {
                    run.stored(seq);
                    match event {
                        JobEvent::Output { data, .. } => {
                            said.extend_from_slice(&data);
                            let more = said.len().saturating_sub(KEPT_OUTPUT);
                            said.drain(..more);
                        }
                        JobEvent::Ended(report) => break report,
                    }
                }
            }
        };
        if report.ending == Ending::Exited(0) {
            return session.build(id).await.map_err(failed);
        }
        Err(why_not(&report.ending, &said, &tunnel.trouble(), &packages))
    }

    fn job(&self, order: &Order<'_>) -> Job {
        let mut argv: Vec<String> = patient().map(str::to_owned).to_vec();
        let pip = [
            "python3",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-input",
            "--no-cache-dir",
            "--disable-pip-version-check",
            "--only-binary",
            ":all:",
            "--no-warn-script-location",
            "--progress-bar=off",
            "--retries=1",
            "--target",
            TARGET,
        ];
        argv.extend(pip.map(str::to_owned));
        if let Whose::Own = order.whose {
            argv.push("--no-deps".to_owned());
        }
        argv.extend(order.packages.iter().cloned());
        let own = Packages::python().map(|pip| pip.variables(order.index));
        let own = own.into_iter().flatten();
        let mut env: Vec<(String, String)> = own
            .chain([EPOCH, BESIDE].map(|(name, value)| (name, value.to_owned())))
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        env.extend(certificates().map(|file| ("PIP_CERT".to_owned(), file)));
        Job {
            id: JobId {
                submission: SubmissionId::new(),
                run: 0,
            },
            files: Vec::new(),
            argv,
            env,
            stdin: Vec::new(),
            stdin_open: false,
            limits: Limits {
                wall_ms: u64::try_from(self.allowed.wall.as_millis()).unwrap_or(u64::MAX),
                ..Limits::COMPILE
            },
            report: false,
            output: vec![TARGET.to_owned()],
            builds: true,
            build: None,
            online: true,
            cache: None,
        }
    }
}

/// The way to an installation's sandbox.
struct Dial {
    sandboxes: Arc<Sandboxes>,
    name: String,
}

#[async_trait]
impl Connect for Dial {
    async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError> {
        match self.sandboxes.dial(&self.name).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(ConnectError::Lasting(error.to_string())),
        }
    }
}

/// Lends the job lines to the index, until this is dropped.
fn lend(
    sandboxes: &Arc<Sandboxes>,
    sandbox: &str,
    job: JobId,
    tunnel: &Arc<Tunnel>,
) -> JoinSet<()> {
    let mut lines = JoinSet::new();
    for _ in 0..LINES {
        let (sandboxes, tunnel) = (Arc::clone(sandboxes), Arc::clone(tunnel));
        let sandbox = sandbox.to_owned();
        lines.spawn(async move {
            loop {
                let carried = async {
                    let stream = sandboxes.dial(&sandbox).await?;
                    let (installer, head) = tunnel::taken(Box::new(stream), job).await?;
                    tunnel.carry(installer, head).await
                };
                if let Err(error) = carried.await {
                    tracing::debug!(%job, error = format!("{error:#}"), "a line to an installer ended");
                    sleep(AGAIN).await;
                }
            }
        });
    }
    lines
}

/// The file of certificates that the operator names, where sandboxes show it.
fn certificates() -> Option<String> {
    let mut named = CERTIFICATES
        .iter()
        .filter_map(|name| std::env::var(name).ok());
    named.find(|file| {
        SHOWN_CERTIFICATES
            .iter()
            .any(|shown| file.starts_with(shown))
    })
}

/// What the runner image has for this module.
fn bundled(module: &ModuleName) -> Vec<String> {
    let all = lines(MODULES);
    let named = |line: &String| line.split("==").next() == Some(module.top());
    match all.iter().any(named) {
        true => all,
        false => Vec::new(),
    }
}

fn lines(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(str::to_owned).collect()
}

/// Why an installation failed.
fn why_not(ending: &Ending, said: &[u8], trouble: &Trouble, packages: &str) -> Problem {
    if let Some(cause) = trouble.told() {
        return Problem::new(
            "package_index_unavailable",
            "The package index cannot be reached",
            cause,
            "Try again; if it lasts, the operator checks the index that the server is set up with.",
        );
    }
    let said = String::from_utf8_lossy(said);
    if *ending == Ending::Exited(INDEX_FAILED)
        && let Some(cause) = index_failed(&said)
    {
        return Problem::new(
            "package_index_unavailable",
            "The package index failed",
            cause,
            "Try again; if it lasts, the operator checks the index that the server is set up with.",
        );
    }
    let lines: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
    let how = match ending {
        Ending::Exited(_) if !last.is_empty() => last,
        Ending::Exited(code) => format!("pip ended with exit code {code}"),
        Ending::Signalled(signal) => format!("pip was ended by signal {signal}"),
        Ending::Limit(limit) => format!("pip was stopped at its {} limit", limit.as_str()),
        Ending::Cancelled => "it was cancelled".to_owned(),
        Ending::NotStarted(why) => why.clone(),
        Ending::Starved { waited_ms } => {
            format!("the machine was too busy: pip waited {waited_ms} ms for a processor")
        }
    };
    not_installed(packages, &how)
}

/// Whatever the server's umask is: user code reads it, under another user id.
fn make_readable(path: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(path)?;
    if about.is_symlink() {
        return Ok(());
    }
    let mode = about.permissions().mode();
    let more = if about.is_dir() { 0o555 } else { 0o444 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode | more))?;
    if about.is_dir() {
        for entry in fs::read_dir(path)? {
            make_readable(&entry?.path())?;
        }
    }
    Ok(())
}

fn not_written(error: &anyhow::Error) -> Problem {
    Problem::new(
        "platform_unavailable",
        "The module's server could not be put in its place",
        format!("{error:#}"),
        "Check that the data folder is writable and has room.",
    )
}

fn no_index() -> Problem {
    Problem::new(
        "package_index_unusable",
        "What modules need cannot be installed",
        "PIP_INDEX_URL, set for the server, is no http or https URL, or has a password in it",
        "Set it to a URL such as https://packages.example/simple, without a password, and start the server again.",
    )
}

fn too_many() -> Problem {
    Problem::new(
        "too_many_installations",
        "The module's packages were not installed",
        format!("{MOST_WAITING} installations of the same user's run or wait already"),
        "Ask again when one of them is done.",
    )
}

fn full() -> Problem {
    Problem::new(
        "quota_exceeded",
        "The module's packages were not kept",
        "the user's modules have as many packages, or as large ones, as they may have",
        "Remove a module that is not needed, or have several share the same packages.",
    )
}

fn not_installed(packages: &str, cause: &str) -> Problem {
    let remedy = if cause.contains("No module named pip") {
        "Install pip for the server's python3 (on Debian: apt-get install python3-pip) and ask again."
    } else {
        "Check the names and versions; packages are installed from wheels only. PIP_INDEX_URL, set for the server, names the index."
    };
    Problem::new(
        "packages_not_installed",
        format!("The packages could not be installed: {packages}"),
        cause,
        remedy,
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_file_of_the_server_is_in_the_program() {
        let here: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
        let mut there: Vec<String> = fs::read_dir("runner-image/gantry_module")
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".py"))
            .collect();
        there.sort();
        assert_eq!(here, there);
    }

    #[test]
    fn what_the_image_has_is_pinned_and_installed_for_its_modules_only() {
        let all = lines(REQUIREMENTS).into_iter().chain(lines(MODULES));
        for line in all {
            assert!(Package::try_from(line.clone()).is_ok(), "{line}");
        }
        let of = |module: &str| bundled(&module.parse().unwrap());
        assert!(
            of("numpy.linalg")
                .iter()
                .any(|one| one.starts_with("numpy=="))
        );
        assert!(of("math").is_empty());
    }
}
