"""The nursery: imports the module once, and forks a worker whenever the supervisor wants one.

It has one thread and is the parent of all workers, so that it alone says when one has ended, and nothing that a call started
outlives its worker: orphans come back here.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time

from gantry_module import calls, worker
from gantry_module.settings import Settings

PR_SET_CHILD_SUBREAPER = 36

#: How often it is looked for processes that left their worker's session.
LOOK_S = 1.0

#: Longest message of the supervisor's.
MAX_MESSAGE = 64


class Nursery:
    def __init__(self, settings: Settings, control: socket.socket):
        self.settings = settings
        self.control = control
        self.workers = set()
        self.module = None
        self.wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def run(self) -> None:
        self.tell(self.load())
        # What is shared with workers is not copied because the collector writes to it.
        gc.collect()
        gc.freeze()
        looked = time.monotonic()
        while True:
            ready, _, _ = select.select([self.control, self.wake], [], [], LOOK_S)
            if self.wake in ready:
                os.read(self.wake, 4096)
            self.collect()
            if time.monotonic() - looked > LOOK_S:
                self.end_strays()
                looked = time.monotonic()
            if self.control in ready and not self.obey():
                self.end_all()
                os._exit(0)

    def load(self) -> dict:
        """Imports the module: what came of it."""
        name = self.settings.module
        if self.settings.packages:
            sys.path.insert(0, self.settings.packages)
        try:
            self.module = importlib.import_module(name)
            return {"event": "loaded"}
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                failed = calls.Failed(calls.MODULE_NOT_FOUND, f"there is no module {error.name}", "ModuleNotFoundError")
            else:
                failed = broken(error)
        except BaseException as error:
            failed = broken(error)
        return {"event": "failed", "failure": json.loads(failed.as_json())}

    def tell(self, event: dict) -> None:
        self.control.sendall(json.dumps(event).encode())

    def obey(self) -> bool:
        """Does what the supervisor wants; False when it is gone."""
        message, descriptors, _, _ = socket.recv_fds(self.control, MAX_MESSAGE, 3)
        if not message:
            return False
        word, number = message.split()
        if word == b"fork":
            self.fork(int(number), descriptors)
        elif word == b"kill" and int(number) in self.workers:
            # Nobody but this process collects it, so the number is still its own.
            kill_session(int(number))
        return True

    def fork(self, key: int, descriptors) -> None:
        sock, out, err = descriptors
        pid = os.fork()
        if pid == 0:
            self.control.close()
            os.close(self.wake)
            worker.live(self.module, self.settings, socket.socket(fileno=sock), out, err)
        for descriptor in descriptors:
            os.close(descriptor)
        self.workers.add(pid)
        self.tell({"event": "started", "key": key, "pid": pid})

    def collect(self) -> None:
        """Tells which workers have ended, and ends what they left."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            if ended.si_pid in self.workers:
                kill_session(ended.si_pid)
            _, status = os.waitpid(ended.si_pid, 0)
            if ended.si_pid in self.workers:
                self.workers.discard(ended.si_pid)
                self.tell({"event": "ended", "pid": ended.si_pid, "status": status})

    def end_strays(self) -> None:
        for child in children():
            if child not in self.workers:
                try:
                    os.kill(child, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def end_all(self) -> None:
        for pid in self.workers:
            kill_session(pid)
        self.end_strays()


def main() -> None:
    settings = Settings.from_environment()
    try:
        Nursery(settings, socket.socket(fileno=int(sys.argv[1]))).run()
    except OSError as error:
        sys.exit(f"gantry_module: the nursery lost its supervisor: {error}")


def broken(error: BaseException) -> calls.Failed:
    return calls.Failed(
        calls.MODULE_BROKEN, f"the module raised while it was imported: {error}"[:2000],
        calls.values.name_of(type(error)), calls.trace_of(error),
    )


def kill_session(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has not come as far as making its session, or nothing is left of it.
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def children() -> list:
    """Processes whose parent is this one."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listed:
            return [int(pid) for pid in listed.read().split()]
    except OSError:
        return []


if __name__ == "__main__":
    main()
