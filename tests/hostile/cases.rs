//! The table: one hostile program each, what it is held to, and how its run has to end.

use gantry::model::{Ending, Limits, Reason};

use super::programs as code;

/// One hostile program.
pub struct Case {
    pub name: String,
    pub code: String,
    /// Run by bash instead of Python.
    pub bash: bool,
    pub limits: Limits,
    /// Bytes of standard input, sent in pieces; it is never closed.
    pub stdin: usize,
    /// It reports tests on descriptor 3; whether this may be what comes of it.
    pub report: Option<fn(&str) -> bool>,
    /// Any of these. With repeats it has to be the same each time.
    pub endings: Vec<Ending>,
    /// What it wrote, when that matters.
    pub output: Option<Output>,
    /// What the same program does with the one guard off.
    pub control: Control,
    /// Needs user ids of its own for each slot, and so root.
    pub isolated: bool,
}

/// A look at stdout and stderr; the error says what is wrong.
pub type Output = fn(&[u8], &[u8]) -> Result<(), String>;

/// The same program with one guard off.
pub enum Control {
    /// The case denies nothing.
    None,
    /// With these limits it ends with exit code 0.
    Limits(Limits),
    /// On the machine itself, as this test's user, its stdout is like this.
    Host(fn(&str) -> Result<(), String>),
}

const D: Limits = Limits::DEFAULT;

fn wall(wall_ms: u64) -> Limits {
    Limits { wall_ms, ..D }
}

fn limit(reason: Reason) -> Vec<Ending> {
    vec![Ending::Limit(reason)]
}

fn case(name: impl Into<String>, code: impl Into<String>) -> Case {
    Case {
        name: name.into(),
        code: code.into(),
        bash: false,
        limits: D,
        stdin: 0,
        report: None,
        endings: vec![Ending::Exited(0)],
        output: None,
        control: Control::None,
        isolated: false,
    }
}

impl Case {
    fn bash(mut self) -> Self {
        self.bash = true;
        self
    }

    fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    fn ends(mut self, endings: Vec<Ending>) -> Self {
        self.endings = endings;
        self
    }

    fn exits(self, code: i32) -> Self {
        self.ends(vec![Ending::Exited(code)])
    }

    fn at(self, reason: Reason) -> Self {
        self.ends(limit(reason))
    }

    fn writes(mut self, output: Output) -> Self {
        self.output = Some(output);
        self
    }

    /// The control: the same program under these limits passes.
    fn unless(mut self, limits: Limits) -> Self {
        self.control = Control::Limits(limits);
        self
    }

    /// The control: the same program on the machine itself.
    fn outside(mut self, check: fn(&str) -> Result<(), String>) -> Self {
        self.control = Control::Host(check);
        self
    }

    fn isolated(mut self) -> Self {
        self.isolated = true;
        self
    }
}

fn says(expected: &str, stdout: &[u8]) -> Result<(), String> {
    if stdout == expected.as_bytes() {
        return Ok(());
    }
    Err(format!(
        "it wrote {:?} instead of {expected:?}",
        String::from_utf8_lossy(stdout)
    ))
}

/// Every case. `full`: all exit codes instead of a sample.
pub fn all(full: bool, surroundings: &code::Surroundings) -> Vec<Case> {
    let mut cases = processes(full);
    cases.extend(endings(full));
    cases.extend(time());
    cases.extend(memory());
    cases.extend(disk());
    cases.extend(full.then(memory_in_sockets));
    cases.extend(output());
    cases.extend(reports());
    cases.extend(escape(surroundings));
    cases.extend(network(surroundings));
    cases
}

fn processes(full: bool) -> Vec<Case> {
    let busy = Limits {
        wall_ms: 1_000,
        cpu_ms: 30_000,
        ..D
    };
    let done = |stdout: &[u8], _: &[u8]| says("done\n", stdout);
    vec![
        case("fork bomb", code::FORK_BOMB)
            .limits(busy)
            .at(Reason::Timeout),
        case(
            "fork bomb that changes its process group",
            code::FORK_BOMB_GROUPS,
        )
        .limits(busy)
        .at(Reason::Timeout),
        case("fork bomb in bash", "b() { b | b & b; }; b; wait; exit 9")
            .bash()
            .limits(busy)
            .ends(vec![
                Ending::Limit(Reason::Timeout),
                Ending::Exited(254),
                Ending::Exited(9),
                Ending::Signalled(libc::SIGSEGV),
            ]),
        case("more processes than allowed", code::COUNTED_FORKS)
            .exits(1)
            .unless(Limits {
                processes: 256,
                ..D
            }),
        case("double fork and setsid", code::DAEMON)
            .exits(5)
            .writes(done),
        case("children outlive the parent", code::OUTLIVED).exits(6),
        case("thread bomb", code::THREADS).exits(1).unless(Limits {
            processes: 256,
            ..D
        }),
        case("zombies", code::zombies(if full { 5_000 } else { 500 }))
            .limits(Limits {
                cpu_ms: 30_000,
                wall_ms: 60_000,
                ..D
            })
            .writes(done),
        case("ignores every signal it can", code::IGNORES_SIGNALS)
            .limits(wall(1_000))
            .at(Reason::Timeout),
        case(
            "stops itself",
            "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        )
        .limits(wall(1_000))
        .at(Reason::Timeout),
        case("signals to everything it sees", code::SIGNALS_ALL)
            .isolated()
            .writes(|stdout, _| says("parent denied\nreached 0\n", stdout))
            .outside(|text| match text.starts_with("parent reached") {
                true => Ok(()),
                false => Err(format!(
                    "the probe cannot reach its parent even here: {text}"
                )),
            }),
        case(
            "kill(-1, SIGKILL)",
            "import os\nos.fork()\nos.kill(-1, 9)\nprint('done')",
        )
        .ends(vec![
            Ending::Exited(0),
            Ending::Exited(1),
            Ending::Signalled(libc::SIGKILL),
        ]),
        case("kill(-1, SIGSTOP)", code::STOPS_ALL)
            .isolated()
            .writes(done),
        case("signals its own group", "import os\nos.killpg(0, 15)")
            .ends(vec![Ending::Signalled(libc::SIGTERM)]),
    ]
}

fn endings(full: bool) -> Vec<Case> {
    let codes: Vec<i32> = if full {
        (0..=255).collect()
    } else {
        vec![0, 1, 2, 3, 77, 124, 126, 127, 128, 134, 137, 139, 143, 255]
    };
    let mut cases: Vec<Case> = codes
        .into_iter()
        .map(|n| {
            case(
                format!("exit code {n}"),
                format!("import sys; sys.exit({n})"),
            )
            .exits(n)
        })
        .collect();
    let signals = [
        libc::SIGTERM,
        libc::SIGKILL,
        libc::SIGSEGV,
        libc::SIGABRT,
        libc::SIGXCPU,
        libc::SIGSYS,
        libc::SIGHUP,
        libc::SIGUSR1,
        libc::SIGALRM,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
    ];
    cases.extend(signals.into_iter().map(|n| {
        case(
            format!("raises signal {n}"),
            format!("import os\nos.kill(os.getpid(), {n})"),
        )
        .ends(vec![Ending::Signalled(n)])
    }));
    cases.push(
        case("exit code 137 from bash", "exit 137")
            .bash()
            .exits(137),
    );
    cases.push(
        case("kills itself in bash", "kill -9 $$")
            .bash()
            .ends(vec![Ending::Signalled(libc::SIGKILL)]),
    );
    cases.push(
        case("reads address 0", "import ctypes\nctypes.string_at(0)")
            .ends(vec![Ending::Signalled(libc::SIGSEGV)]),
    );
    cases
        .push(case("aborts", "import os\nos.abort()").ends(vec![Ending::Signalled(libc::SIGABRT)]));
    cases
}

fn time() -> Vec<Case> {
    let burning = Limits { cpu_ms: 300, ..D };
    vec![
        case("sleeps", "import time\ntime.sleep(2)")
            .limits(wall(700))
            .at(Reason::Timeout)
            .unless(D),
        case("busy loop", code::BURN)
            .limits(burning)
            .at(Reason::Cpu)
            .unless(D),
        case("busy threads and children", code::BURN_IN_CHILDREN)
            .limits(burning)
            .at(Reason::Cpu)
            .unless(D),
        case("a child at a time, each short", code::BURN_IN_TURNS)
            .limits(burning)
            .at(Reason::Cpu)
            .unless(D),
        case(
            "right output, then hangs",
            "print('42', flush=True)\nimport time\ntime.sleep(60)",
        )
        .limits(wall(700))
        .at(Reason::Timeout)
        .writes(|stdout, _| says("42\n", stdout)),
        Case {
            stdin: 16 << 20,
            ..case(
                "never reads its input",
                "import time\ntime.sleep(0.5)\nprint('done')",
            )
        }
        .writes(|stdout, _| says("done\n", stdout)),
        case("closes its output and works on", code::CLOSES_OUTPUT).exits(3),
    ]
}

fn memory() -> Vec<Case> {
    let more = Limits {
        memory_bytes: 512 << 20,
        processes: 256,
        ..D
    };
    vec![
        case("touches twice the limit", code::TOUCH)
            .at(Reason::Memory)
            .unless(more),
        case(
            "touches twice the limit in 50 children",
            code::TOUCH_IN_CHILDREN,
        )
        .at(Reason::Memory)
        .unless(more),
        // Refused at once, or promised by a kernel told to promise anything (vm.overcommit_memory=1, as
        // a kubelet sets it) and then filled until the limit.
        case("asks for far more than there is", "b = bytearray(1 << 44)")
            .ends(vec![Ending::Exited(1), Ending::Limit(Reason::Memory)]),
        // Memory that belongs to no process is measured for none: there must be no way to have it.
        case("memory in a file without a name", code::MEMFD)
            .exits(1)
            .outside(|text| match text.contains("filled") {
                true => Ok(()),
                false => Err(text.to_owned()),
            }),
        case("shared memory that outlives its process", code::SYSTEM_V)
            .writes(|stdout, _| says("denied denied denied denied\n", stdout))
            .outside(|text| match text.contains("denied") {
                false => Ok(()),
                true => Err(text.to_owned()),
            }),
    ]
}

/// Kernel memory that the supervisor does not see: a gigabyte of socket buffers. Freeing it can take
/// seconds on a small machine, so the end comes late there; only the full run has it.
fn memory_in_sockets() -> Case {
    case("memory in sockets", code::SOCKET_BUFFERS)
        .limits(wall(3_000))
        .ends(vec![
            Ending::Exited(0),
            Ending::Exited(1),
            Ending::Limit(Reason::Timeout),
            Ending::Limit(Reason::Memory),
        ])
}

fn disk() -> Vec<Case> {
    let room = |text: &str| match text.trim() {
        "done" => Ok(()),
        _ => Err(text.to_owned()),
    };
    vec![
        case(
            "sparse file of 1 TB",
            "f = open('sparse', 'wb')\nf.truncate(1 << 40)",
        )
        .at(Reason::Disk),
        case("file over its limit", code::FILE_20_MIB)
            .at(Reason::Disk)
            .unless(Limits {
                file_bytes: 64 << 20,
                ..D
            }),
        case("fills the disk", code::FILL)
            .at(Reason::Disk)
            .outside(room),
        case("more files than allowed", code::MORE_FILES)
            .at(Reason::Disk)
            .outside(room),
        case("fills the disk and goes on", code::FILL_QUIETLY).at(Reason::Disk),
        case("a million empty files", code::MANY_FILES).at(Reason::Disk),
        case("fills a deleted file", code::DELETED_FILE)
            .limits(wall(5_000))
            .at(Reason::Disk)
            .outside(room),
        case("all the descriptors it can have", code::DESCRIPTORS)
            .writes(|stdout, _| says("done\n", stdout)),
        case("nested folders", code::nested(10_000))
            .limits(Limits {
                cpu_ms: 30_000,
                wall_ms: 60_000,
                ..D
            })
            .writes(|stdout, _| says("done\n", stdout)),
        case("large file below 500 folders", code::NESTED_FILE).at(Reason::Disk),
        case("names that are not text", code::ODD_NAMES).writes(|stdout, _| says("done\n", stdout)),
        case("folders that may not be entered", code::CLOSED_FOLDERS)
            .writes(|stdout, _| says("done\n", stdout)),
    ]
}

fn output() -> Vec<Case> {
    let more = Limits {
        output_bytes: 16 << 20,
        ..D
    };
    let full = |stdout: &[u8], stderr: &[u8]| match stdout.len() + stderr.len() {
        length if length == 1 << 20 => Ok(()),
        length => Err(format!("{length} bytes were kept")),
    };
    vec![
        case("flood on stdout", code::flood("1"))
            .at(Reason::Output)
            .writes(full)
            .unless(more),
        case("flood on stderr", code::flood("2"))
            .at(Reason::Output)
            .writes(full)
            .unless(more),
        case("flood on both", code::flood("1, 2"))
            .at(Reason::Output)
            .writes(full)
            .unless(more),
        case("flood from children", code::FLOOD_CHILDREN)
            .at(Reason::Output)
            .writes(full),
        case(
            "flood without end",
            "import os\nwhile True: os.write(1, b'y\\n' * 30000)",
        )
        .at(Reason::Output)
        .writes(full),
        case(
            "one huge line",
            "import sys\nfor _ in range(1 << 14): sys.stdout.write('x' * 65536)",
        )
        .at(Reason::Output)
        .writes(full),
        case("bytes that are not text", code::NOT_TEXT).writes(|stdout, stderr| {
            if stdout == code::NOT_TEXT_BYTES && stderr == code::NOT_TEXT_BYTES {
                Ok(())
            } else {
                Err(format!("{stdout:?} {stderr:?}"))
            }
        }),
        case("our own frames", code::OWN_FRAMES).exits(3),
    ]
}

fn reports() -> Vec<Case> {
    let report = |name: &str, code: &str, taken: fn(&str) -> bool| Case {
        report: Some(taken),
        ..case(
            format!("report: {name}"),
            format!("import os\nword = os.read(3, 100).strip()\n{code}"),
        )
    };
    vec![
        report("its own line", "os.write(3, word + b' own\\n')", |said| {
            said == "own\n"
        }),
        report("nothing", "", str::is_empty),
        report("half a line", "os.write(3, word + b' half')", str::is_empty),
        report(
            "a line without the run's word",
            "os.write(3, b'guess own\\n')",
            |said| said.contains("foreign"),
        ),
        report(
            "a flood",
            "for _ in range(200): os.write(3, (word + b' x\\n') * 10_000)",
            |said| said.lines().all(|line| line == "x") && said.len() < 2 << 20,
        ),
        report(
            "written on after the end",
            "os.write(3, word + b' own\\n')\nif os.fork() == 0:\n    while True: os.write(3, word + b' own\\n')",
            |said| said.lines().all(|line| line == "own"),
        ),
        report(
            "kept open by a process in a session of its own",
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
            str::is_empty,
        ),
    ]
}

fn escape(surroundings: &code::Surroundings) -> Vec<Case> {
    let nothing = |stdout: &[u8], _: &[u8]| says("", stdout);
    let something = |text: &str| match text.trim().is_empty() {
        false => Ok(()),
        true => Err("the probe finds nothing even on the machine itself".to_owned()),
    };
    let mut cases = calls();
    cases.extend([
        case("host paths", surroundings.host_paths())
            .writes(nothing)
            .outside(something),
        case("sweep of /proc and /sys", code::SWEEP)
            .isolated()
            .writes(nothing)
            .outside(something),
        case("keys in environments", code::ENVIRONMENTS)
            .writes(nothing)
            .outside(something),
        case("setuid programs", code::SETUID)
            .writes(nothing)
            .outside(|text| match text.contains("gained by") {
                true => Ok(()),
                false => Err(format!(
                    "no setuid program gains anything even here: {text}"
                )),
            })
            .isolated(),
        case("devices", code::DEVICES)
            .writes(nothing)
            .outside(something),
        case("writes outside its folders", code::WRITES)
            .writes(nothing)
            .outside(|text| {
                let all = [
                    "wrote in /usr\n",
                    "wrote in /etc\n",
                    "changed /etc/passwd\n",
                ];
                match all.iter().all(|line| text.contains(line)) {
                    true => Ok(()),
                    false => Err(text.to_owned()),
                }
            })
            .isolated(),
        case("descriptors it was left", code::LEFT_DESCRIPTORS)
            .writes(nothing)
            .outside(|text| match text.contains("keys/admin") {
                true => Ok(()),
                false => Err(format!("nothing is left open even here: {text}")),
            }),
    ]);
    cases
}

/// System calls by their numbers, which are this architecture's.
#[cfg(not(target_arch = "x86_64"))]
fn calls() -> Vec<Case> {
    Vec::new()
}

#[cfg(target_arch = "x86_64")]
fn calls() -> Vec<Case> {
    vec![
        case("denied system calls", code::CALLS)
            .writes(|stdout, _| says("", stdout))
            .outside(|text| match text.lines().count() {
                // Each one that is denied inside answers otherwise outside.
                code::CALLS_COUNT => Ok(()),
                _ => Err(text.to_owned()),
            }),
        case("system calls of another architecture", code::OTHER_CALLS)
            .writes(|stdout, _| says("x32 denied\ni386 denied\n", stdout)),
    ]
}

fn network(surroundings: &code::Surroundings) -> Vec<Case> {
    let blocked = |stdout: &[u8], _: &[u8]| match String::from_utf8_lossy(stdout) {
        text if text.contains("connected") => Err(text.into_owned()),
        _ => Ok(()),
    };
    let connects = |text: &str| match text.contains("connected") {
        true => Ok(()),
        false => Err(text.to_owned()),
    };
    vec![
        case("the machine's own ports", surroundings.connects_tcp())
            .writes(blocked)
            .outside(connects),
        case("metadata and other addresses", code::ADDRESSES).writes(blocked),
        case("unix sockets of the server", surroundings.connects_unix())
            .writes(blocked)
            .outside(connects),
        case(
            "abstract unix sockets of the machine",
            surroundings.connects_abstract(),
        )
        .writes(blocked)
        .outside(connects),
    ]
}
