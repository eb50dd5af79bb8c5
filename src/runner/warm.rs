//! Interpreters started ahead of time: a run then costs a wake-up instead of a start.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::agent::{AgentConfig, Exits};
use super::confine::{Confinement, Identity, kernel_limits};
use super::process::{Exit, die_first, processor_time, signal};
use super::slot::Slot;
use super::wire::Job;
use crate::beneath::give;
use crate::model::Limits;

/// The file that makes an interpreter wait; see its own words.
pub const PYTHON_HOOK: &str = include_str!("warm_python.py");

/// The folder the hook stands in, below the root of user code's world.
pub const HOOK_FOLDER: &str = "run/gantry";

/// Longest wait for a fork: a hundred times what it takes on a loaded machine. After it the
/// interpreter is taken for broken and a new one is started.
const FORK_PATIENCE: Duration = Duration::from_secs(2);

/// Forks from one interpreter before it is replaced. Children share their parent's hash seed; a new
/// parent now and then means that no seed lasts.
const FORKS_PER_INTERPRETER: u32 = 256;

/// The three streams of a job and the news of its end.
#[derive(Debug)]
pub struct Program {
    /// Its standard input.
    pub stdin: pipe::Sender,
    /// Its standard output.
    pub stdout: pipe::Receiver,
    /// Its standard error.
    pub stderr: pipe::Receiver,
    /// Its process.
    pub pid: i32,
    /// Resolves when it has ended.
    pub exit: oneshot::Receiver<Exit>,
    /// Up to here the peak at its end is not its own, but what its process had before it was executed.
    pub peak_before: u64,
    /// Processor time it had used before it was given its run.
    pub cpu_before: Duration,
}

/// The child's ends of a program's streams.
#[derive(Debug)]
pub struct ChildEnds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// The parent's ends of a program's streams.
#[derive(Debug)]
pub struct ParentEnds {
    /// Writes to the program's standard input.
    pub stdin: pipe::Sender,
    /// Reads its standard output.
    pub stdout: pipe::Receiver,
    /// Reads its standard error.
    pub stderr: pipe::Receiver,
}

/// New pipes for a program. Who runs it as another user gives them to that one: see [`ChildEnds::give`].
pub fn pipes() -> io::Result<(ParentEnds, ChildEnds)> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (stdin_read, stdin_write) = pipe()?;
    let (stdout_read, stdout_write) = pipe()?;
    let (stderr_read, stderr_write) = pipe()?;
    let ours = |fd: &OwnedFd| rustix::io::ioctl_fionbio(fd, true);
    ours(&stdin_write)?;
    ours(&stdout_read)?;
    ours(&stderr_read)?;
    Ok((
        ParentEnds {
            stdin: pipe::Sender::from_owned_fd(stdin_write)?,
            stdout: pipe::Receiver::from_owned_fd(stdout_read)?,
            stderr: pipe::Receiver::from_owned_fd(stderr_read)?,
        },
        ChildEnds {
            stdin: stdin_read,
            stdout: stdout_write,
            stderr: stderr_write,
        },
    ))
}

impl ChildEnds {
    /// Makes them this user's; `None`: they stay the runner's. Whoever opens `/dev/stdout` opens the pipe
    /// anew, and needs rights to it that a descriptor alone does not give.
    pub fn give(&self, owner: Option<u32>) -> io::Result<()> {
        let all = [&self.stdin, &self.stdout, &self.stderr];
        all.into_iter().try_for_each(|end| give(end, owner))
    }

    /// Gives them to a command that is about to be started.
    pub fn attach(self, command: &mut Command) {
        command
            .stdin(Stdio::from(self.stdin))
            .stdout(Stdio::from(self.stdout))
            .stderr(Stdio::from(self.stderr));
    }
}

/// A child of the warm interpreter, waiting in its slot for a run.
#[derive(Debug)]
pub struct Parked {
    program: Program,
    control: UnixStream,
}

impl Parked {
    /// Sends it off with these arguments and variables, and under these limits, which it sets
    /// itself before anything of the user's runs: for another user's process it would take
    /// CAP_SYS_RESOURCE, which containers do not have.
    pub async fn run(
        mut self,
        argv: &[String],
        env: &[(String, String)],
        limits: &Limits,
    ) -> io::Result<Program> {
        let mut body = String::new();
        for (resource, value) in kernel_limits(limits) {
            body.push_str(&format!("{resource}={value} "));
        }
        body.push('\0');
        body.push_str(&argv.len().to_string());
        for text in argv {
            body.push('\0');
            body.push_str(text);
        }
        for (name, value) in env {
            body.push('\0');
            body.push_str(name);
            body.push('=');
            body.push_str(value);
        }
        let mut message = u32::try_from(body.len())
            .map_err(io::Error::other)?
            .to_le_bytes()
            .to_vec();
        message.extend_from_slice(body.as_bytes());
        self.control.write_all(&message).await?;
        Ok(self.program)
    }
}

/// An interpreter that waits and forks.
#[derive(Debug)]
pub struct Interpreter {
    pid: i32,
    control: Rc<AsyncFd<OwnedFd>>,
    forked: mpsc::UnboundedReceiver<i32>,
    exits: Exits,
    forks: u32,
    /// Awaited, so that its end is not taken for a job's orphan's.
    _end: oneshot::Receiver<Exit>,
    /// Held open so that its standard streams stay pipes, as a run's are.
    _streams: ParentEnds,
}

impl Interpreter {
    /// Starts it. It takes a few milliseconds until it answers.
    pub fn start(
        python: &Path,
        config: &AgentConfig,
        confinement: &Confinement,
        slot: &Slot,
        exits: Exits,
    ) -> anyhow::Result<Interpreter> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        // It has to outlive the exec.
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
        let (parent, child) = pipes()?;
        let mut command = Command::new(python);
        command
            .arg0("python3")
            .arg("main.py")
            .env_clear()
            .envs(config.environment(slot))
            .env("PYTHONPATH", config.hook_folder())
            .env("GANTRY_WARM_FD", theirs.as_raw_fd().to_string());
        child.attach(&mut command);
        // With user ids to give away it waits in the common root and its children enter their slots.
        let base = config.open_base()?;
        let (identity, root) = match slot.uid {
            Some(_) => (
                Identity::Launcher {
                    networks: slot.network().is_some(),
                },
                base.as_ref().map(AsRawFd::as_raw_fd),
            ),
            None => (Identity::Own, slot.root()),
        };
        confinement.apply(
            &mut command,
            identity,
            root,
            slot.workspace(),
            &Limits::MAXIMUM,
        )?;
        let pid = i32::try_from(command.spawn()?.id())?;
        // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
        let control = Rc::new(unsafe { AsyncFd::register(ours) }?);
        let (forks_told, forked) = mpsc::unbounded_channel();
        tokio::task::spawn_local(listen(Rc::clone(&control), forks_told, exits.clone()));
        Ok(Interpreter {
            pid,
            control,
            forked,
            _end: exits.wait_for(pid),
            exits,
            forks: 0,
            _streams: parent,
        })
    }

    /// Its process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it has forked often enough to be replaced.
    pub fn is_worn(&self) -> bool {
        self.forks >= FORKS_PER_INTERPRETER
    }

    /// A new child in `slot`, waiting for a run. `ahead`: it copies now what its run would have to.
    pub async fn park(&mut self, slot: &Slot, ahead: bool) -> anyhow::Result<Parked> {
        self.forks += 1;
        let (parent, child) = pipes()?;
        child.give(slot.uid)?;
        let (control, theirs) = UnixStream::pair()?;
        let theirs = theirs.into_std()?;
        theirs.set_nonblocking(false)?;
        let uid = slot.uid.map_or(-1, i64::from);
        // Where all have one user id the interpreter is in the slot's root itself.
        let root = slot.root().filter(|_| slot.uid.is_some());
        let network = slot.network().map(AsRawFd::as_raw_fd);
        let [ahead, has_root, has_network] =
            [ahead, root.is_some(), network.is_some()].map(u8::from);
        let message = format!("fork {uid} {ahead} {has_root} {has_network}");
        let mut fds = vec![
            child.stdin.as_fd(),
            child.stdout.as_fd(),
            child.stderr.as_fd(),
            theirs.as_fd(),
        ];
        // SAFETY: the slot's descriptors are open for as long as the slot lives.
        let own = |fd| unsafe { BorrowedFd::borrow_raw(fd) };
        fds.extend([root, network].into_iter().flatten().map(own));
        self.send(message.as_bytes(), &fds).await?;
        let pid = timeout(FORK_PATIENCE, self.forked.recv())
            .await?
            .ok_or_else(|| anyhow::anyhow!("the waiting interpreter has ended"))?;
        die_first(pid);
        let mut parked = Parked {
            program: Program {
                stdin: parent.stdin,
                stdout: parent.stdout,
                stderr: parent.stderr,
                pid,
                exit: self.exits.wait_for(pid),
                // The interpreter's memory is the program's.
                peak_before: 0,
                cpu_before: Duration::ZERO,
            },
            control,
        };
        drop((child, theirs));
        let mut ready = [0];
        timeout(FORK_PATIENCE, parked.control.read_exact(&mut ready)).await??;
        // What it did until now is not the run's.
        parked.program.cpu_before = processor_time(pid).unwrap_or_default();
        Ok(parked)
    }

    async fn send(&self, message: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        loop {
            let mut guard = self.control.writable().await?;
            let result = guard.try_io(|socket| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(6))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                ancillary.push(SendAncillaryMessage::ScmRights(fds));
                rustix::net::sendmsg(
                    socket,
                    &[IoSlice::new(message)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                )
                .map_err(io::Error::from)
            });
            if let Ok(result) = result {
                return result.map(drop);
            }
        }
    }
}

impl Interpreter {
    /// Ends it at once: it does not do what it should.
    pub fn kill(self) {
        signal(self.pid, libc::SIGKILL);
    }
}

impl Drop for Interpreter {
    fn drop(&mut self) {
        // It forks no more, and ends when it has told the end of its last child: the news of an end
        // must not be lost with it.
        let _ = rustix::net::shutdown(self.control.get_ref(), rustix::net::Shutdown::Write);
    }
}

/// Passes on what an interpreter says, until it ends.
async fn listen(control: Rc<AsyncFd<OwnedFd>>, forked: mpsc::UnboundedSender<i32>, exits: Exits) {
    loop {
        let mut buffer = [0u8; 128];
        let Ok(mut guard) = control.readable().await else {
            return;
        };
        let received = guard.try_io(|socket| {
            rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()).map_err(io::Error::from)
        });
        match received {
            Err(_) => {}
            Ok(Ok((length, _))) if length > 0 => {
                let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
                if understand(&text, &forked, &exits).is_none() {
                    tracing::error!(%text, "the waiting interpreter said something unknown");
                }
            }
            Ok(_) => return,
        }
    }
}

fn understand(text: &str, forked: &mpsc::UnboundedSender<i32>, exits: &Exits) -> Option<()> {
    let mut words = text.split(' ');
    match words.next()? {
        "forked" => forked.send(words.next()?.parse().ok()?).ok(),
        "exit" => {
            let pid = words.next()?.parse().ok()?;
            let exit = Exit {
                status: words.next()?.parse().ok()?,
                cpu: Duration::from_micros(words.next()?.parse().ok()?),
                peak: words.next()?.parse::<u64>().ok()? * 1024,
            };
            exits.tell(pid, exit);
            Some(())
        }
        _ => None,
    }
}

/// What every zip archive has near its end; Python runs one whatever it is called.
const ARCHIVE_END: &str = "PK\u{5}\u{6}";

/// Whether the job brings something that an interpreter reads when it starts: variables, packages
/// of its user's (`~/.local`, which is in the workspace), or an archive or folder in place of its program; or
/// has to be given a descriptor, which an interpreter that waits does not have.
pub fn needs_cold_start(job: &Job) -> bool {
    const NAMES: [&str; 5] = ["HOME", "LANG", "LANGUAGE", "PATH", "TZ"];
    const PREFIXES: [&str; 5] = ["PYTHON", "LC_", "LD_", "MALLOC_", "GLIBC_"];
    let read_at_start = |name: &str| {
        NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    };
    job.report
        || job.build.is_some()
        || job.env.iter().any(|(name, _)| read_at_start(name))
        || job.files.iter().any(|(path, content)| {
            [".local/", "main.py/"]
                .iter()
                .any(|folder| path.starts_with(folder))
                || content.contains(ARCHIVE_END)
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::wire::JobId;
    use super::*;
    use crate::model::SubmissionId;

    fn job(path: &str, content: &str, env: &[(&str, &str)]) -> Job {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Job {
            id: JobId {
                submission: SubmissionId::new(),
                run: 0,
            },
            files: vec![(path.to_owned(), content.to_owned())],
            argv: vec!["python3".to_owned(), "main.py".to_owned()],
            env: env.iter().map(owned).collect(),
            stdin: Vec::new(),
            stdin_open: false,
            limits: Limits::MAXIMUM,
            report: false,
            output: Vec::new(),
            builds: false,
            build: None,
            online: false,
            cache: None,
        }
    }

    /// `python3 main.py` with the hook, as the runner starts it; its output is what `main.py` printed.
    fn hooked(folder: &Path, control: &OwnedFd) -> Command {
        std::fs::write(folder.join("sitecustomize.py"), PYTHON_HOOK).unwrap();
        std::fs::write(folder.join("main.py"), "print('run')").unwrap();
        rustix::io::fcntl_setfd(control, rustix::io::FdFlags::empty()).unwrap();
        let mut command = Command::new("python3");
        command
            .arg("main.py")
            .current_dir(folder)
            .env("PYTHONPATH", folder)
            .env("GANTRY_WARM_FD", control.as_raw_fd().to_string())
            .stderr(Stdio::null());
        command
    }

    #[test]
    fn an_interpreter_that_cannot_wait_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (no_socket, _writer) = rustix::pipe::pipe().unwrap();
        let done = hooked(folder.path(), &no_socket).output().unwrap();
        assert_eq!((done.status.code(), done.stdout), (Some(1), Vec::new()));
    }

    #[test]
    fn a_child_that_cannot_be_parked_runs_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut waiting = hooked(folder.path(), &theirs)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        drop(theirs);
        let (stdin, _stdin_writer) = rustix::pipe::pipe().unwrap();
        let (output, child_output) = rustix::pipe::pipe().unwrap();
        // It cannot say there that it is ready.
        let (control, _control_writer) = rustix::pipe::pipe().unwrap();
        let fds = [&stdin, &child_output, &child_output, &control].map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let message = [IoSlice::new(b"fork -1 0 0 0")];
        rustix::net::sendmsg(&ours, &message, &mut ancillary, SendFlags::empty()).unwrap();
        let said = || {
            let mut buffer = [0; 128];
            let (length, _) =
                rustix::net::recv(&ours, &mut buffer[..], RecvFlags::empty()).unwrap();
            String::from_utf8_lossy(&buffer[..length]).into_owned()
        };
        assert!(said().starts_with("forked "));
        let end = said();
        assert_eq!(end.split(' ').nth(2), Some("256"), "{end}");
        drop((child_output, ours));
        let mut printed = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(output), &mut printed).unwrap();
        assert!(!printed.contains("run"), "{printed}");
        waiting.wait().unwrap();
    }

    #[test]
    fn what_an_interpreter_reads_at_its_start_takes_a_cold_one() {
        assert!(!needs_cold_start(&job(
            "main.py",
            "print(1)",
            &[("A", "B")]
        )));
        for env in [("TZ", "UTC"), ("PYTHONSAFEPATH", "1"), ("LC_ALL", "C")] {
            assert!(needs_cold_start(&job("main.py", "print(1)", &[env])));
        }
        let package = ".local/lib/python3.11/site-packages/usercustomize.py";
        assert!(needs_cold_start(&job(package, "", &[])));
        assert!(needs_cold_start(&job("main.py/__main__.py", "", &[])));
        let archive = "#!/usr/bin/python3\nPK\u{5}\u{6}\0\0\0\0";
        assert!(needs_cold_start(&job("main.py", archive, &[])));
    }
}
