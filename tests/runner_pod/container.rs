//! Something like a pod's container, without a cluster: a process namespace whose first process is
//! the runner, a read-only root, folders in memory, and few capabilities. Made by root with
//! `unshare`, entered as a kube exec enters a container.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use async_trait::async_trait;
use gantry::runner::client::{ByteStream, Connect, ConnectError};
use tokio::net::unix::pipe;

/// What the platform gives the test pod, and nothing else.
pub const CAPABILITIES: &[&str] = &["setuid", "setgid", "chown", "dac_override", "fowner"];

/// Longest wait for a container to be there.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// Makes the root: the machine's programs, read-only, and folders in memory. `$1` is where, `$2` the
/// runner; what follows is executed in it.
const MAKE: &str = r#"
set -e
new=$1 runner=$2; shift 2
mount -t tmpfs -o mode=755 root "$new"
cd "$new"
mkdir proc workspace tmp run dev usr etc srv sys
for name in bin sbin lib lib32 lib64 libx32; do
  if [ -L "/$name" ]; then cp -P "/$name" "$name"; elif [ -d "/$name" ]; then mkdir "$name"; mount --rbind "/$name" "$name"; fi
done
mount --bind /usr usr
mount -o remount,bind,ro usr
# Of /etc what an image has, and not what a machine has.
for name in alternatives group ld.so.cache ld.so.conf ld.so.conf.d nsswitch.conf passwd python3 python3.11 ssl; do
  [ ! -e "/etc/$name" ] || cp -a "/etc/$name" etc/
done
cp "$runner" srv/gantry-runner
chmod 755 srv/gantry-runner
cp /usr/bin/id srv/id-as-root
chmod 4755 srv/id-as-root
mount -t tmpfs -o mode=755 dev dev
for name in null zero full random urandom; do touch "dev/$name"; mount --bind "/dev/$name" "dev/$name"; done
ln -s /proc/self/fd dev/fd
mkdir dev/shm
touch dev/termination-log
chmod 666 dev/termination-log
for name in workspace tmp; do mount -t tmpfs -o size=64m,mode=777 "$name" "$name"; done
mount -t tmpfs -o size=64m,mode=1777 shm dev/shm
mount -t tmpfs -o size=16m,mode=777 run run
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -o remount,ro "$new"
exec chroot "$new" "$@"
"#;

/// A container and the runner in it.
pub struct Container {
    folder: tempfile::TempDir,
    outer: Child,
    /// The runner, as the machine numbers it.
    pub runner: i32,
    privileges: Vec<String>,
}

/// How a container's process is to be.
pub struct Privileges {
    pub uid: u32,
    pub capabilities: Vec<&'static str>,
}

impl Privileges {
    pub fn agent() -> Self {
        Self {
            uid: 0,
            capabilities: CAPABILITIES.to_vec(),
        }
    }

    pub fn nothing() -> Self {
        Self {
            uid: 1_000,
            capabilities: Vec::new(),
        }
    }

    /// `setpriv` with its arguments, as the kubelet would have set these.
    fn command(&self) -> Vec<String> {
        let mut set = "-all".to_owned();
        for name in &self.capabilities {
            set.push_str(&format!(",+{name}"));
        }
        let id = self.uid;
        [
            "setpriv".to_owned(),
            "--no-new-privs".to_owned(),
            format!("--bounding-set={set}"),
            "--inh-caps=-all".to_owned(),
            format!("--reuid={id}"),
            format!("--regid={id}"),
            "--clear-groups".to_owned(),
        ]
        .to_vec()
    }
}

impl Container {
    /// Starts `gantry-runner COMMAND` as first process. It may have ended again when this returns.
    pub fn start(
        command: &str,
        privileges: &Privileges,
        variables: &[(&str, &str)],
        prepare: &str,
    ) -> anyhow::Result<Container> {
        let folder = tempfile::tempdir()?;
        let root = folder.path().join("root");
        std::fs::create_dir(&root)?;
        let log = File::create(folder.path().join("log"))?;
        let set = privileges.command();
        let mut unshare = Command::new("unshare");
        unshare
            .args([
                "--mount",
                "--pid",
                "--ipc",
                "--net",
                "--fork",
                "--kill-child",
            ])
            .args(["sh", "-c", MAKE, "sh"])
            .arg(&root)
            .arg(env!("CARGO_BIN_EXE_gantry-runner"))
            // What is prepared is prepared with all power, as a volume's content is by others.
            .args(["sh", "-c", &format!("{prepare}\nexec \"$@\""), "sh"])
            .args(&set)
            .args(["/srv/gantry-runner", command])
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let outer = unshare
            .spawn()
            .context("unshare (util-linux) cannot be started")?;
        let mut container = Container {
            folder,
            outer,
            runner: 0,
            privileges: set,
        };
        let deadline = Instant::now() + START_PATIENCE;
        while container.runner == 0 && container.outer.try_wait()?.is_none() {
            ensure!(
                Instant::now() < deadline,
                "no container: {}",
                container.log()
            );
            container.runner = container.find_runner().unwrap_or(0);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(container)
    }

    fn find_runner(&self) -> Option<i32> {
        let id = self.outer.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
        let child = children.split_whitespace().next()?.parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{child}/comm")).ok()?;
        (name.trim() == "gantry-runner").then_some(child)
    }

    /// What the runner said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Whether the log comes to hold these words in time.
    pub fn says(&self, words: &str, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if self.log().contains(words) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// The exit code, when it ends in time.
    pub fn ended(&mut self, patience: Duration) -> Option<i32> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Ok(Some(status)) = self.outer.try_wait() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    /// A command in the container, with the power of its first process, as `kubectl exec` starts it.
    pub fn exec(&self, command: &[&str]) -> Command {
        self.enter(&self.privileges, command)
    }

    /// A command in the container as root with all power: the control for what is denied.
    pub fn as_root(&self, command: &[&str]) -> Command {
        self.enter(&[], command)
    }

    fn enter(&self, privileges: &[String], command: &[&str]) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter
            .args(["--target", &self.runner.to_string()])
            .args(["--mount", "--pid", "--ipc", "--net", "--root", "--wd"])
            .args(privileges)
            .args(command)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        nsenter
    }

    /// Its file, from outside.
    pub fn path(&self, path: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.runner)).join(path.trim_start_matches('/'))
    }

    /// `gantry-runner attach` as a kube exec starts it.
    pub fn attach(&self) -> io::Result<(Child, ChildStdin, ChildStdout)> {
        let mut child = self
            .exec(&["/srv/gantry-runner", "attach"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(stdin), Some(stdout)) => Ok((child, stdin, stdout)),
            _ => Err(io::Error::other("no pipes")),
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // `--kill-child` is forgotten by a child that changes its privileges.
        if let Some(runner) = rustix::process::Pid::from_raw(self.runner) {
            let _ = rustix::process::kill_process(runner, rustix::process::Signal::KILL);
        }
        let _ = self.outer.kill();
        let _ = self.outer.wait();
    }
}

/// Makes connections the way the cluster does: a new `attach` for each.
pub struct Attach(pub std::sync::Arc<Container>);

#[async_trait]
impl Connect for Attach {
    async fn connect(&self) -> Result<Box<dyn ByteStream>, ConnectError> {
        let failed = |error: io::Error| ConnectError::Passing(error.to_string());
        let (mut child, stdin, stdout) = self.0.attach().map_err(failed)?;
        // Collected when it ends, which is when either pipe does.
        std::thread::spawn(move || child.wait());
        let pipes = || -> io::Result<_> {
            let (stdin, stdout) = (OwnedFd::from(stdin), OwnedFd::from(stdout));
            for pipe in [&stdin, &stdout] {
                rustix::io::ioctl_fionbio(pipe, true)?;
            }
            Ok(tokio::io::join(
                pipe::Receiver::from_owned_fd(stdout)?,
                pipe::Sender::from_owned_fd(stdin)?,
            ))
        };
        Ok(Box::new(pipes().map_err(failed)?))
    }
}
