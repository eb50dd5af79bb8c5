//! What a module's sandbox shows: the server, what the server needs, and the module's packages. Installed
//! once by pip, from the index that pip is configured for, into the data folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::model::{ModuleName, Package, Problem};
use crate::runner::sandbox::Placed;

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

/// Longest time of one installation: some hundred megabytes over a slow line.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// How often an installation is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Lines of the installer's that say why it failed.
const LAST_LINES: usize = 12;

/// Variables that the installer gets: where to find things. Nothing of the server's own secrets.
const PASSED: &[&str] = &[
    "PATH",
    "HOME",
    "LANG",
    "TMPDIR",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "PYENV_ROOT",
    "XDG_CONFIG_HOME",
];

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

/// Puts parts in their places.
#[derive(Debug)]
pub struct Installer {
    folder: PathBuf,
    /// One installation at a time: they share a cache, and a machine's line.
    installing: tokio::sync::Mutex<()>,
}

impl Installer {
    /// Into this folder.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            installing: tokio::sync::Mutex::default(),
        }
    }

    /// The parts of a module, installed if they are not there yet.
    pub async fn parts(
        &self,
        python: Option<&Path>,
        module: &ModuleName,
        packages: &[Package],
    ) -> Result<Parts, Problem> {
        let python = python.ok_or_else(|| {
            Problem::new(
                "python_missing",
                "There is no Python on this machine",
                "the command python3 is not found, or does not run",
                "Install Python 3.9 or newer, and start the server again.",
            )
        })?;
        let server = self.write_server().map_err(|error| not_written(&error))?;
        let _one = self.installing.lock().await;
        let tools = self
            .installed(python, "tools", &lines(REQUIREMENTS))
            .await?;
        let wanted: Vec<String> = match packages {
            [] => bundled(module),
            some => some.iter().map(|one| one.as_str().to_owned()).collect(),
        };
        let packages = match wanted.is_empty() {
            true => None,
            false => Some(self.installed(python, "packages", &wanted).await?),
        };
        Ok(Parts {
            server,
            tools,
            packages,
        })
    }

    /// The server's files, under a name that changes with them: what runs keeps what it was started with.
    fn write_server(&self) -> anyhow::Result<PathBuf> {
        let text: String = FILES
            .iter()
            .flat_map(|(name, text)| [*name, *text])
            .collect();
        let folder = self
            .folder
            .join(format!("server-{:08x}", crc32fast::hash(text.as_bytes())));
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

    /// A folder with these packages.
    async fn installed(
        &self,
        python: &Path,
        what: &str,
        packages: &[String],
    ) -> Result<PathBuf, Problem> {
        let mut key = packages.to_vec();
        key.sort();
        key.push(python.display().to_string());
        let name = format!("{what}-{:08x}", crc32fast::hash(key.join("\n").as_bytes()));
        let (folder, staged) = (
            self.folder.join(&name),
            self.folder.join(format!("{name}.new")),
        );
        if folder.is_dir() {
            return Ok(folder);
        }
        let command = self.command(python, &staged, packages);
        let log = self.folder.join(format!("{name}.log"));
        let (target, packages) = (folder.clone(), packages.join(" "));
        tracing::info!(%packages, "packages are being installed for modules");
        let done = tokio::task::spawn_blocking(move || install(command, &staged, &target, &log));
        match done.await {
            Ok(Ok(())) => Ok(folder),
            Ok(Err(error)) => Err(not_installed(&packages, &error)),
            Err(error) => Err(not_installed(&packages, &error.into())),
        }
    }

    fn command(&self, python: &Path, staged: &Path, packages: &[String]) -> Command {
        let mut command = Command::new(python);
        let variables = std::env::vars()
            .filter(|(name, _)| name.starts_with("PIP_") || PASSED.contains(&name.as_str()));
        let variables: BTreeMap<String, String> = variables.collect();
        command
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-input",
                "--disable-pip-version-check",
            ])
            // Nothing of a package runs while it is installed.
            .args(["--only-binary", ":all:", "--no-warn-script-location"])
            .args(["--root-user-action", "ignore", "--progress-bar", "off"])
            .arg("--cache-dir")
            .arg(self.folder.join("cache"))
            .arg("--target")
            .arg(staged)
            .args(packages)
            .env_clear()
            .envs(variables)
            .stdin(Stdio::null());
        command
    }
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

/// Runs the installer to its end, and puts what it made in its place.
fn install(mut command: Command, staged: &Path, folder: &Path, log: &Path) -> anyhow::Result<()> {
    if let Err(error) = fs::remove_dir_all(staged)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error.into());
    }
    let file = File::create(log)?;
    command.stdout(file.try_clone()?).stderr(file);
    let mut child = command.spawn().context("pip could not be started")?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > INSTALL_TIMEOUT {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("it was not done within {} s", INSTALL_TIMEOUT.as_secs());
        }
        std::thread::sleep(LOOK);
    };
    let said = fs::read(log).unwrap_or_default();
    let said = String::from_utf8_lossy(&said).into_owned();
    fs::remove_file(log)?;
    if !status.success() {
        let lines: Vec<&str> = said
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        anyhow::bail!(
            "{}",
            if last.is_empty() {
                status.to_string()
            } else {
                last
            }
        );
    }
    make_readable(staged)?;
    fs::rename(staged, folder)?;
    Ok(())
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

fn not_installed(packages: &str, error: &anyhow::Error) -> Problem {
    let cause = format!("{error:#}");
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
