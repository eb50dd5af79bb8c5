"""Python started ahead of time.

The runner starts `python3 main.py` with this file first on the path as `sitecustomize`, which the
interpreter imports after it has set itself up and before it looks at `main.py`. Here it stops and
forks a child for each run. A child that is given a run leaves this file, and the interpreter goes on
natively: it opens `main.py`, sets `sys.path[0]`, runs it, prints tracebacks, calls atexit and ends,
all by its own code, as if it had been started just then.

One datagram socket, named by GANTRY_WARM_FD, joins this process to the runner:
  from the runner: `fork UID`, with the slot's root folder, stdin, stdout, stderr and the run's
                   control stream as file descriptors
  to the runner:   `forked PID`, `exit PID STATUS CPU_MICROSECONDS PEAK_KIB`
A run comes as one message on the control stream: a length (4 bytes, little-endian), then NUL-ended
texts: the number of arguments, the arguments, and `NAME=VALUE` for each variable.
"""


def _serve():
    import sys

    before = set(sys.modules)
    import os
    import posix
    import _signal
    import _socket
    import gc

    here = os.path.dirname(__file__)
    workspace = posix.getcwd()
    control = _socket.socket(fileno=int(os.environ["GANTRY_WARM_FD"]))

    try:
        import ctypes

        libc = ctypes.CDLL(None)
        madvise, prctl = libc.madvise, libc.prctl
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    except (ImportError, OSError, AttributeError):
        # Without ctypes runs are slower by the page faults below, and still right.
        madvise = prctl = None

    def writable_ranges():
        """Memory a run will write to: heap, arenas and data. Breaking the sharing of these pages
        while the child waits takes the page faults out of the run."""
        ranges = []
        with open("/proc/self/maps", "rb") as maps:
            for line in maps:
                fields = line.split()
                if fields[1] != b"rw-p" or fields[-1].startswith((b"[vv", b"[stack")):
                    continue
                start, _, end = fields[0].partition(b"-")
                start, end = int(start, 16), int(end, 16)
                if end - start <= 8 << 20:
                    ranges.append((start, end - start))
        return ranges

    def collect(signum=None, frame=None):
        while True:
            try:
                pid, status, usage = posix.wait4(-1, posix.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            cpu = int((usage.ru_utime + usage.ru_stime) * 1000000)
            control.send(b"exit %d %d %d %d" % (pid, status, cpu, usage.ru_maxrss))

    def be_parked(uid, fds):
        """In the child: become the slot's user in the slot's root and wait. Returns when a run
        has come."""
        root, stdin, stdout, stderr, run = fds
        for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            posix.dup2(source, target)
            posix.close(source)
        if root >= 0:
            posix.fchdir(root)
            posix.chroot(".")
            posix.close(root)
        if uid >= 0:
            posix.setgroups([])
            posix.setresgid(uid, uid, uid)
            posix.setresuid(uid, uid, uid)
        posix.chdir(workspace)
        posix.setsid()
        if prctl is not None:
            PR_SET_DUMPABLE = 4
            prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        if madvise is not None:
            MADV_POPULATE_WRITE = 23
            for start, length in ranges:
                madvise(start, length, MADV_POPULATE_WRITE)
        posix.write(run, b"R")
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            more = posix.read(run, 1 << 20)
            if not more:
                posix._exit(0)
            data += more
        posix.close(run)
        texts = data[4:].split(b"\0")
        count = int(texts[0])
        arguments = [os.fsdecode(t) for t in texts[1 : 1 + count]]
        sys.argv[:] = arguments[1:]
        sys.orig_argv[:] = arguments
        os.environ.clear()
        for text in texts[1 + count :]:
            name, mark, value = text.partition(b"=")
            if mark:
                os.environb[name] = value

    def leave():
        """In the child: undo what bringing this file in has changed."""
        sys.path[:] = [entry for entry in sys.path if entry != here]
        sys.path_importer_cache.pop(here, None)
        for name in set(sys.modules) - before:
            del sys.modules[name]
        # The system's own sitecustomize, if it has one, comes to its turn.
        from _frozen_importlib_external import PathFinder
        from _frozen_importlib import module_from_spec

        spec = PathFinder.find_spec("sitecustomize", None)
        if spec is None:
            raise ImportError("No module named 'sitecustomize'", name="sitecustomize")
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)

    import resource  # wait4 needs it; brought in once, here

    for name in set(sys.modules) - before:
        del sys.modules[name]
    _signal.signal(_signal.SIGCHLD, collect)
    gc.collect()
    # What is here already is never garbage: collections in a run need not touch it.
    gc.freeze()
    ranges = writable_ranges()
    while True:
        message, ancillary, _, _ = control.recvmsg(64, _socket.CMSG_SPACE(5 * 4))
        if not message:
            posix._exit(0)
        fds = []
        for _, _, data in ancillary:
            fds += [int.from_bytes(data[i : i + 4], sys.byteorder) for i in range(0, len(data), 4)]
        if len(fds) == 4:
            fds.insert(0, -1)
        pid = posix.fork()
        if pid == 0:
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
            control.close()
            be_parked(int(message.split()[1]), fds)
            return leave()
        for fd in fds:
            if fd >= 0:
                posix.close(fd)
        control.send(b"forked %d" % pid)


_serve()
