//! A terminal: a shell on a pseudo-terminal, which outlives the connections that look at it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::runner::agent::Exits;
use crate::runner::process::Exit;

/// Output kept for whoever comes back: some thousand lines.
const SCROLLBACK: usize = 256 << 10;

/// Most bytes of output that are passed on at once.
const PIECE: usize = 16 << 10;

/// Pieces of input that wait for a program that does not read; more is refused.
const INPUT: usize = 16;

/// Bytes of input that a terminal is given at once: what it takes for one line (Linux' N_TTY_BUF_SIZE).
const TYPED_PIECE: usize = 4 << 10;

/// Pause after a terminal took nothing. One whose program does not read says that it can be written to, and
/// again after each attempt.
const TYPED_PAUSE: Duration = Duration::from_millis(20);

/// A connection that takes nothing for this long is let go; until then the program waits for it, as it
/// would for a slow terminal.
const SLOWEST: Duration = Duration::from_secs(10);

/// Widest and highest terminal.
const MOST_CELLS: u16 = 1_000;

/// What a connection hears of its terminals.
#[derive(Debug)]
pub enum Said {
    /// The program wrote this.
    Output(Rc<str>, Bytes),
    /// The terminal's shell ended.
    Ended(Rc<str>, i32),
}

/// Where a connection hears it.
pub type Listener = mpsc::Sender<Said>;

/// A terminal.
pub struct Terminal {
    name: Rc<str>,
    master: AsyncFd<OwnedFd>,
    pid: i32,
    scrollback: RefCell<VecDeque<u8>>,
    /// Each with its connection's number.
    listeners: RefCell<Vec<(u64, Listener)>>,
    /// `None` after its end.
    input: RefCell<Option<mpsc::Sender<Bytes>>>,
    ended: Cell<bool>,
}

/// A pseudo-terminal's two sides.
struct Pair {
    master: OwnedFd,
    slave: OwnedFd,
}

fn ioctl(fd: &OwnedFd, request: libc::c_ulong, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: every caller passes the kind of argument that its request takes.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

impl Pair {
    /// A new one from this multiplexer, its program's side owned by this user.
    fn open(multiplexer: &Path, owner: Option<u32>) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let master = rustix::fs::open(multiplexer, flags, Mode::empty())?;
        let unlocked: libc::c_int = 0;
        ioctl(
            &master,
            libc::TIOCSPTLCK,
            &raw const unlocked as libc::c_ulong,
        )?;
        // Not by its path, which is another one in the program's root.
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let slave = ioctl(
            &master,
            libc::TIOCGPTPEER,
            libc::c_ulong::from(flags.unsigned_abs()),
        )?;
        // SAFETY: the kernel has just given this descriptor to nobody else.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        if owner.is_some() {
            std::os::unix::fs::fchown(&slave, owner, owner)?;
        }
        Ok(Self { master, slave })
    }
}

impl Terminal {
    /// Starts this command on a new terminal. `command` becomes a session of its own.
    pub fn start(
        name: &str,
        mut command: Command,
        multiplexer: &Path,
        owner: Option<u32>,
        exits: &Exits,
        size: (u16, u16),
    ) -> anyhow::Result<Rc<Self>> {
        let pair = Pair::open(multiplexer, owner)?;
        resize(&pair.master, size)?;
        command
            .env("TERM", "xterm-256color")
            .env("COLORTERM", "truecolor")
            .stdin(Stdio::from(pair.slave.try_clone()?))
            .stdout(Stdio::from(pair.slave.try_clone()?))
            .stderr(Stdio::from(pair.slave));
        // SAFETY: one system call with integer arguments. Standard input is the terminal by now, and the
        // process leads its session.
        unsafe {
            command.pre_exec(|| {
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn()?;
        // It holds the program's side until it goes: without it the end would not be seen.
        drop(command);
        let pid = i32::try_from(child.id())?;
        // Asked for before anything else happens: an end that nobody waits for is an orphan's.
        let exit = exits.wait_for(pid);
        // SAFETY: the descriptor is owned by what is registered, and so open as long as it is.
        let master = unsafe { AsyncFd::register(pair.master) }?;
        let (input, typed) = mpsc::channel(INPUT);
        let this = Rc::new(Self {
            name: name.into(),
            master,
            pid,
            scrollback: RefCell::default(),
            listeners: RefCell::default(),
            input: RefCell::new(Some(input)),
            ended: Cell::new(false),
        });
        tokio::task::spawn_local(Rc::clone(&this).read(exit));
        tokio::task::spawn_local(Rc::clone(&this).write(typed));
        Ok(this)
    }

    /// The session that its shell leads, and everything started from it is in.
    pub fn session(&self) -> i32 {
        self.pid
    }

    /// Whether its shell ended.
    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// From now on the connection hears of it; what it wrote before is returned.
    pub fn attach(&self, connection: u64, listener: Listener) -> Vec<u8> {
        self.detach(connection);
        self.listeners.borrow_mut().push((connection, listener));
        self.scrollback.borrow().iter().copied().collect()
    }

    /// The connection hears no more of it.
    pub fn detach(&self, connection: u64) {
        self.listeners
            .borrow_mut()
            .retain(|(id, _)| *id != connection);
    }

    /// Types; `false` when its program does not read and too much waits already.
    pub fn input(&self, data: Bytes) -> bool {
        let input = self.input.borrow();
        input
            .as_ref()
            .is_some_and(|input| input.try_send(data).is_ok())
    }

    /// Says how large the window is.
    pub fn resize(&self, size: (u16, u16)) -> io::Result<()> {
        resize(self.master.get_ref(), size)
    }

    /// Ends its shell, as a closed window does.
    pub fn hang_up(&self) {
        if !self.ended.get() {
            // SAFETY: kill has no memory effects. The group is the shell's own: it leads its session, and
            // it was not collected yet.
            unsafe { libc::kill(-self.pid, libc::SIGHUP) };
        }
    }

    async fn read(self: Rc<Self>, exit: oneshot::Receiver<Exit>) {
        let mut buffer = vec![0; PIECE];
        loop {
            let Ok(mut guard) = self.master.readable().await else {
                break;
            };
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut buffer)?));
            match read {
                Err(_would_block) => {}
                Ok(Ok(length)) if length > 0 => {
                    self.wrote(Bytes::copy_from_slice(&buffer[..length])).await;
                }
                // Nobody holds the program's side any more.
                Ok(_) => break,
            }
        }
        let code = exit
            .await
            .map_or(1, |exit| match libc::WIFSIGNALED(exit.status) {
                true => 128 + libc::WTERMSIG(exit.status),
                false => libc::WEXITSTATUS(exit.status),
            });
        self.ended.set(true);
        // With it ends who writes.
        self.input.take();
        self.tell(|name| Said::Ended(name, code)).await;
    }

    async fn wrote(&self, data: Bytes) {
        {
            let mut scrollback = self.scrollback.borrow_mut();
            scrollback.extend(&data);
            let excess = scrollback.len().saturating_sub(SCROLLBACK);
            scrollback.drain(..excess);
        }
        self.tell(|name| Said::Output(name, data.clone())).await;
    }

    async fn tell(&self, said: impl Fn(Rc<str>) -> Said) {
        // Who attaches meanwhile has it from the scrollback.
        let listeners = self.listeners.borrow().clone();
        for (connection, listener) in listeners {
            let told = timeout(SLOWEST, listener.send(said(Rc::clone(&self.name)))).await;
            if !matches!(told, Ok(Ok(()))) {
                self.detach(connection);
            }
        }
    }

    async fn write(self: Rc<Self>, mut typed: mpsc::Receiver<Bytes>) {
        while let Some(mut data) = typed.recv().await {
            while !data.is_empty() && !self.ended.get() {
                let Ok(mut guard) = self.master.writable().await else {
                    return;
                };
                let piece = &data[..data.len().min(TYPED_PIECE)];
                match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), piece)?)) {
                    Err(_would_block) => tokio::time::sleep(TYPED_PAUSE).await,
                    Ok(Ok(length)) => data = data.slice(length..),
                    Ok(Err(_)) => return,
                }
            }
        }
    }
}

fn resize(master: &OwnedFd, (columns, rows): (u16, u16)) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows.clamp(1, MOST_CELLS),
        ws_col: columns.clamp(1, MOST_CELLS),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    ioctl(master, libc::TIOCSWINSZ, &raw const size as libc::c_ulong).map(drop)
}
