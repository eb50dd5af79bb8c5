"""Python started ahead of time.

The runner starts `python3 main.py` with this file first on the path as `sitecustomize`, which the
interpreter imports after it has set itself up and before it looks at `main.py`. Here it stops and
forks a child for each run. A child that is given a run leaves this file, and the interpreter goes on
natively: it opens `main.py`, sets `sys.path[0]`, runs it, prints tracebacks, calls atexit and ends,
all by its own code, as if it had been started just then.

One datagram socket, named by GANTRY_WARM_FD, joins this process to the runner:
  from the runner: `fork UID AHEAD ROOT NETWORK`, with stdin, stdout, stderr and the run's control
                   stream as file descriptors, then the slot's root folder where ROOT is 1, and its
                   network namespace where NETWORK is 1
  to the runner:   `forked PID`, `exit PID STATUS CPU_MICROSECONDS PEAK_KIB`
A run comes as one message on its control stream: a length (4 bytes, little-endian), then NUL-ended
texts: its limits as `RESOURCE=VALUE` with spaces between, the number of arguments, the arguments, and
`NAME=VALUE` for each variable.

With AHEAD=1 a child copies, before it is given its run, the memory shared with this process that
every run changes: a run would wait for each page, some 600 of them and 3 microseconds each on a
virtual machine, which is half of what a short program takes. Which pages these are a rehearsal tells.
It takes as much processor time as it saves: where runs wait for each other, it only holds them up.
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
    searched = set(sys.path_importer_cache) - {here}
    workspace = posix.getcwd()
    control = _socket.socket(fileno=int(os.environ["GANTRY_WARM_FD"]))

    try:
        import ctypes

        library = ctypes.CDLL(None)
    except (ImportError, OSError):
        # Where a child would need it, no run is taken; see be_parked.
        library = None
    try:
        # Before 3.9 no one operation merges dictionaries; see forget_known.
        if library is None or sys.version_info < (3, 9):
            raise ImportError
        prctl, madvise = library.prctl, library.madvise
        prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
        madvise.argtypes = [ctypes.c_ulong] * 2 + [ctypes.c_int]
        keep_alive = ctypes.pythonapi.Py_IncRef
        finish, call_at_end = ctypes.pythonapi.Py_Exit, ctypes.pythonapi.Py_AtExit
        call_at_end.argtypes = [ctypes.c_void_p]
        track, untrack = ctypes.pythonapi.PyObject_GC_Track, ctypes.pythonapi.PyObject_GC_UnTrack
        for function in (keep_alive, track, untrack):
            function.argtypes = [ctypes.py_object]
            function.restype = None
    except (ImportError, OSError, AttributeError):
        # Without these runs are slower at their end, and /proc/self is root's; else they are right.
        prctl = madvise = keep_alive = track = untrack = None

    def forget_known():
        """At the end of a run, after all that the program registered: what was here before the
        program needs no taking down. Setting an entry of sys.modules to None is what the
        interpreter does next anyway; with nothing behind it that could die, it leaves the memory
        alone that all runs share, and a run ends in half the time. Garbage is collected first, so
        that a `__del__` in a cycle still finds every module."""
        if gc.isenabled():
            gc.collect()
        # One operation, at whose end no other thread gets its turn: a daemon thread must not meet
        # the gaps.
        modules = known_modules
        modules |= nothing

    def keep_known(main):
        """Gives everything that is here already one owner more, who never lets go. An interpreter
        that ends would take all of it apart and, in doing so, copy the memory that runs share.
        `main` is handed in: a cell of this file's would be kept, and the program's module with it."""
        for module in list(sys.modules.values()):
            if module is not main:
                keep_alive(module)
                keep_alive(getattr(module, "__dict__", module))
        classes, found = [object], {object}
        for known in classes:
            for inner in set(type.__subclasses__(known)) - found:
                classes.append(inner)
                found.add(inner)
            for part in (*gc.get_referents(known.__dict__), known.__mro__, known.__bases__):
                keep_alive(part)
        # The standard streams write out what is left in them when they are taken apart.
        ending = [main, main.__dict__]
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            while stream is not None:
                ending += [stream, getattr(stream, "__dict__", stream)]
                stream = getattr(stream, "buffer", None) or getattr(stream, "raw", None)
        ending = {id(thing) for thing in ending}
        for thing in gc.get_objects():
            if id(thing) not in ending:
                keep_alive(thing)

    def rehearse(main):
        """Finds out what every run changes of the memory that it shares with this process: start and
        size of each piece. A child runs a program of one line, ends as every run does, and stops just
        before it is gone."""
        launcher = posix.getpid()
        child = posix.fork()
        if child == 0:
            try:
                # It must not outlive the one it is for.
                prctl(PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0)
                if posix.getppid() != launcher:
                    posix._exit(1)
                control.close()
                # What the interpreter calls last of all, in reverse: it says that it has come to its
                # end by being in a session of its own, and waits there.
                for function in (library.pause, library.setsid):
                    call_at_end(ctypes.cast(function, ctypes.c_void_p))
                prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
                # What the system's customization registered is for runs.
                atexit._clear()
                atexit.register(forget_known)
                try:
                    leave()
                except Exception:
                    # The system has no sitecustomize, or one that fails: so does it in every run.
                    pass
                exec("print('Hello')", main.__dict__)
                finish(0)
            finally:
                # Never on to the interpreter's own way: the workspace may have a main.py by now.
                posix._exit(1)
        try:
            patience = time.monotonic() + REHEARSAL_PATIENCE_S
            while posix.getsid(child) != child:
                if posix.waitid(posix.P_PID, child, posix.WEXITED | posix.WNOHANG | posix.WNOWAIT):
                    return []
                if time.monotonic() > patience:
                    return []
                time.sleep(0.0005)
            return own_pages(child)
        except Exception:
            # No /proc here, or it may not be looked at: runs are slower, else they are right.
            return []
        finally:
            posix.kill(child, _signal.SIGKILL)
            posix.waitpid(child, 0)

    def own_pages(child):
        """What of the memory that may be written a child shares with nobody: start and size of each
        piece."""
        pieces = []
        with open("/proc/self/maps") as maps, open(f"/proc/{child}/pagemap", "rb", 0) as pages:
            for line in maps:
                place, mode, _ = line.split(maxsplit=2)
                if mode != "rw-p":
                    continue
                start, end = (int(address, 16) // page for address in place.split("-"))
                pages.seek(start * 8)
                entries = memoryview(pages.read((end - start) * 8)).cast("Q")
                for number, entry in enumerate(entries, start):
                    if entry & OWN_PAGE != OWN_PAGE:
                        continue
                    if pieces and sum(pieces[-1]) == number * page:
                        pieces[-1][1] += page
                    else:
                        pieces.append([number * page, page])
        return pieces

    def own_memory():
        """In the child: copies what its run will change."""
        for start, size in changed_by_runs:
            # Older kernels refuse; the run copies what it changes, then.
            madvise(start, size, MADV_POPULATE_WRITE)

    def collect(options=posix.WNOHANG):
        while True:
            try:
                pid, status, usage = posix.wait4(-1, options)
            except ChildProcessError:
                return
            if pid == 0:
                return
            cpu = int((usage.ru_utime + usage.ru_stime) * 1000000)
            control.send(b"exit %d %d %d %d" % (pid, status, cpu, usage.ru_maxrss))

    def must(result):
        if result < 0:
            raise OSError("a system call failed")
        return result

    def keep_to_itself():
        """In the child: a Landlock domain of its own, which signals and abstract sockets do not leave.
        Where all have one user id, a run could stop the process that forks the next ones."""
        attributes = (ctypes.c_uint64 * 3)(0, 0, SCOPE_ABSTRACT_SOCKETS | SCOPE_SIGNALS)
        call = library.syscall
        domain = must(call(LANDLOCK_CREATE_RULESET, attributes, ctypes.sizeof(attributes), 0))
        must(call(LANDLOCK_RESTRICT_SELF, domain, 0))
        posix.close(domain)

    def be_parked(uid, ahead, has_root, has_network, fds):
        """In the child: wait, and when a run has come become the slot's user in the slot's root. Not
        before: until then the slot may be another run's."""
        stdin, stdout, stderr, run, *fds = fds
        root = fds.pop(0) if has_root else -1
        for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            posix.dup2(source, target)
            posix.close(source)
        posix.setsid()
        if has_network:
            must(library.setns(fds[0], CLONE_NEWNET))
            posix.close(fds[0])
        if uid < 0:
            keep_to_itself()
        if ahead:
            own_memory()
        posix.write(run, b"R")
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "little"):
            # Small enough to come from memory that is here already.
            more = posix.read(run, 1 << 16)
            if not more:
                posix._exit(0)
            data += more
        posix.close(run)
        if root >= 0:
            posix.fchdir(root)
            posix.chroot(".")
            posix.close(root)
        if uid >= 0:
            posix.setgroups([])
            posix.setresgid(uid, uid, uid)
            posix.setresuid(uid, uid, uid)
        posix.chdir(workspace)
        if prctl is not None:
            prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        texts = data[4:].split(b"\0")
        for limit in texts[0].split():
            which, _, value = limit.partition(b"=")
            hard = min(int(value), resource.getrlimit(int(which))[1] % (1 << 64))
            resource.setrlimit(int(which), (hard, hard))
        count = int(texts[1])
        arguments = [os.fsdecode(t) for t in texts[2 : 2 + count]]
        sys.argv[:] = arguments[1:]
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[:] = arguments
        # In the order in which a program that is started gets them; the last of a name counts.
        pairs = {name: value for name, mark, value in map(split, texts[2 + count :]) if mark}
        for name in sorted(pairs):
            os.environb[name] = pairs[name]

    def split(text):
        return text.partition(b"=")

    def customize():
        """The system's own sitecustomize, if it has one, comes to its turn."""
        from _frozen_importlib_external import PathFinder
        from _frozen_importlib import module_from_spec

        spec = PathFinder.find_spec("sitecustomize", None)
        if spec is None:
            raise ImportError("No module named 'sitecustomize'", name="sitecustomize")
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)

    def customized_here():
        """Before any run: the system's sitecustomize knows nothing of the run, so once is enough, and
        the search for it leaves the folders of sys.path read, as it does there. If it fails, it fails
        in every run; nothing of the failure is kept, which would keep the program's module, too."""
        sys.path[:] = [entry for entry in sys.path if entry != here]
        for entry in set(sys.path_importer_cache) - searched:
            del sys.path_importer_cache[entry]
        for name in ("GANTRY_WARM_FD", "PYTHONPATH"):
            os.environ.pop(name, None)
        try:
            customize()
        except Exception:
            return False
        return True

    def looked_up_here():
        """Before any run, what the interpreter would look up in each to find nothing: a usercustomize (a
        run with packages of its user's has an interpreter of its own), and whether main.py is an archive
        (then it has one as well). It remembers that itself where it would have remembered it."""
        if sys.version_info < (3, 9):
            return
        sys.path_importer_cache[workspace + "/main.py"] = None
        site = sys.modules.get("site")
        if site is None or not site.ENABLE_USER_SITE:
            return
        try:
            if any(finder.find_spec("usercustomize", None) for finder in sys.meta_path):
                return
        except Exception:
            return

        def skip(usual=site.execusercustomize):
            site.execusercustomize = usual

        site.execusercustomize = skip

    def leave():
        """In the child: undo what bringing this file in has changed."""
        nonlocal own
        for thing in own:
            if not gc.is_tracked(thing):
                track(thing)
        # The cell it stands in is kept for good; the program's module must not be.
        thing = own = None
        threading = sys.modules.get("threading")
        if threading is not None:
            # Python itself leaves the forking process's number there, before 3.13.
            threading.main_thread()._set_native_id()
        if not customized:
            customize()

    import atexit
    import resource  # wait4 needs it; brought in once, here
    import select
    import time

    PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
    CLONE_NEWNET = 0x40000000
    # The same numbers on every machine, and bits of `struct landlock_ruleset_attr`.
    LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446
    SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2
    MADV_POPULATE_WRITE = 23
    # In /proc/PID/pagemap: a page that is there, and is in no other process's memory.
    OWN_PAGE = 1 << 63 | 1 << 56
    # Ten times what it takes on a loaded machine; the runner waits for longer.
    REHEARSAL_PATIENCE_S = 0.5
    page = resource.getpagesize()

    main = sys.modules["__main__"]
    known_modules = sys.modules
    if keep_alive is not None:
        # Registered first, called last.
        atexit.register(forget_known)
    for name in set(sys.modules) - before:
        del sys.modules[name]
    customized = customized_here()
    looked_up_here()
    # Each run brings its own.
    os.environ.clear()
    before = set(sys.modules)
    nothing = dict.fromkeys(before - {"sys", "builtins", "__main__"})
    # A handler alone would come too late for a child that ends just before the wait begins: only
    # what is readable ends a wait for sure.
    woken, wake = posix.pipe()
    posix.set_blocking(wake, False)
    _signal.signal(_signal.SIGCHLD, lambda signum, frame: None)
    _signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    waiting = select.poll()
    waiting.register(woken, select.POLLIN)
    waiting.register(control, select.POLLIN)
    gc.collect()
    if keep_alive is not None:
        keep_known(main)
    # What is here already is never garbage: collections in a run need not touch it.
    # The program's own module is not: what hangs on it must be found when it ends.
    own = (main, main.__dict__) if track is not None else ()
    for thing in filter(gc.is_tracked, own):
        untrack(thing)
    gc.freeze()
    changed_by_runs = rehearse(main) if madvise is not None else []
    # What the rehearsal made would count towards a run's first collection.
    gc.collect()
    gc.freeze()
    # The workspace goes with each run; this process would keep one that is gone.
    posix.chdir("/")
    while True:
        ready = [fd for fd, _ in waiting.poll()]
        if woken in ready:
            posix.read(woken, 512)
            collect()
        if control.fileno() not in ready:
            continue
        message, ancillary, _, _ = control.recvmsg(64, _socket.CMSG_SPACE(6 * 4))
        if not message:
            # The runner has a new interpreter. This one stays until its last child has ended.
            _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
            collect(options=0)
            posix._exit(0)
        fds = []
        for _, _, data in ancillary:
            fds += [int.from_bytes(data[i : i + 4], sys.byteorder) for i in range(0, len(data), 4)]
        # What waiting for a child brings in, here only.
        ours = {name: sys.modules.pop(name) for name in set(sys.modules) - before}
        pid = posix.fork()
        if pid == 0:
            parked = False
            try:
                _signal.set_wakeup_fd(-1)
                _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
                posix.close(woken)
                posix.close(wake)
                control.close()
                be_parked(*map(int, message.split()[1:]), fds)
                parked = True
            finally:
                # What stands in the workspace is never run with this process's rights.
                if not parked:
                    posix._exit(1)
            return leave()
        sys.modules.update(ours)
        for fd in fds:
            posix.close(fd)
        control.send(b"forked %d" % pid)


import posix as _posix

_launcher = _posix.getpid()
try:
    _serve()
except BaseException:
    # What stands in the workspace is never run with this process's rights.
    if _posix.getpid() == _launcher:
        _posix._exit(1)
    raise
