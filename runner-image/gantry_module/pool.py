"""The supervisor's side of its workers: who is idle, who runs what, and what ended a call that did not answer."""

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque

from gantry_module import calls, wire
from gantry_module.settings import READY_WORKERS, Settings

#: How often a call that goes on is looked at: its memory.
LOOK_S = 0.1

#: A killed process is gone within this; a machine that is full takes its time.
END_S = 5.0

#: Longest message of the nursery's: a failure with its traceback.
MAX_EVENT = 64 << 10

#: Calls that may wait for a worker. More are told so at once.
MAX_WAITING = 48

#: The end of what a call wrote, kept for the case that it does not live to answer.
KEPT_OUTPUT = 4 << 10

#: Pause before a nursery that was lost is started again.
AGAIN_S = 0.2

PAGE = os.sysconf("SC_PAGE_SIZE")


class Worker:
    """A process that takes one call at a time."""

    def __init__(self, sock: socket.socket, out: int, err: int, most: int):
        self.sock, self.out, self.err = sock, out, err
        self.pid = None
        #: What it had before its first call: the module.
        self.at_rest = 0
        self.ended = threading.Event()
        self.status = None
        self.reader = wire.Reader(sock, most + wire.SLACK)
        self.wake, self.alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.poll = select.poll()
        for descriptor in (sock.fileno(), out, err, self.wake):
            self.poll.register(descriptor, select.POLLIN)

    def close(self) -> None:
        self.sock.close()
        for descriptor in (self.out, self.err, self.wake, self.alarm):
            os.close(descriptor)

    def resident(self) -> int:
        """Bytes of memory it has, those that it shares with others by its own doing included."""
        try:
            with open(f"/proc/{self.pid}/statm") as statm:
                return int(statm.read().split()[1]) * PAGE
        except (OSError, ValueError, IndexError):
            return 0


class Run:
    """One call: until when, for whom, and what it has written."""

    def __init__(self, deadline: float, on_item=None, on_output=None):
        self.deadline = deadline
        self.on_item = on_item
        self.on_output = on_output
        self.cancelled = False
        self.over = False
        self.tail = bytearray()
        self.lock = threading.Lock()
        self.worker = None

    def cancel(self) -> None:
        """The caller is gone. Called at the end of every call, too."""
        with self.lock:
            if self.over or self.worker is None:
                self.cancelled = True
                return
            self.cancelled = True
            os.write(self.worker.alarm, b"c")

    def wrote(self, stream: str, data: bytes) -> None:
        self.tail += data
        del self.tail[:-KEPT_OUTPUT]
        if self.on_output:
            self.on_output(stream, data)
        else:
            log(data)


class Cancelled(Exception):
    """The caller is gone."""


def log(data: bytes) -> None:
    """What a call prints, and nobody listens to, is the pod's log."""
    try:
        os.write(1, data)
    except OSError:
        return


class Pool:
    def __init__(self, settings: Settings, on_state):
        self.settings = settings
        self.on_state = on_state
        self.changed = threading.Condition()
        self.idle = deque()
        self.starting = {}
        self.all = {}
        self.waiting = 0
        self.state = "loading"
        self.failure = None
        self.keys = itertools.count()
        self.start_nursery()

    # The nursery.

    def start_nursery(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        with theirs:
            command = [sys.executable, "-m", "gantry_module.nursery", str(theirs.fileno())]
            self.nursery = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        threading.Thread(target=self.listen, args=(ours, self.nursery), daemon=True).start()

    def listen(self, control: socket.socket, nursery: subprocess.Popen) -> None:
        while True:
            try:
                message = control.recv(MAX_EVENT)
            except OSError:
                message = b""
            if not message:
                break
            self.heard(json.loads(message))
        nursery.kill()
        nursery.wait()
        with self.changed:
            workers, self.all = self.all, {}
            self.idle.clear()
            self.starting.clear()
            self.state = "loading"
        for worker in workers.values():
            # Nobody else ends them now, and nobody else uses their numbers: they are this process's to collect.
            end_session(worker.pid)
            worker.status = signal.SIGKILL
            worker.ended.set()
        collect_orphans()
        print(f"gantry_module: the nursery ended with {nursery.returncode}; another one is started", flush=True)
        time.sleep(AGAIN_S)
        self.start_nursery()

    def heard(self, event: dict) -> None:
        kind = event["event"]
        with self.changed:
            if kind == "loaded":
                self.state = "ready"
                for _ in range(min(READY_WORKERS, self.settings.workers)):
                    self.fork()
            elif kind == "failed":
                self.state, self.failure = "failed", event["failure"]
            elif kind == "started":
                worker = self.starting.pop(event["key"])
                worker.pid = event["pid"]
                worker.at_rest = worker.resident()
                self.all[worker.pid] = worker
                self.idle.append(worker)
            elif kind == "ended":
                worker = self.all.pop(event["pid"], None)
                if worker is not None:
                    worker.status = event["status"]
                    worker.ended.set()
                    if worker in self.idle:
                        self.idle.remove(worker)
                        worker.close()
                    if len(self.all) + len(self.starting) < READY_WORKERS and self.state == "ready":
                        self.fork()
            self.changed.notify_all()
        if kind in ("loaded", "failed"):
            self.on_state(self.state, self.failure)

    def fork(self) -> None:
        """Asks for one more worker. Called with the lock held."""
        ours, theirs = socket.socketpair()
        (out, out_end), (err, err_end) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        os.set_blocking(out, False)
        os.set_blocking(err, False)
        key = next(self.keys)
        self.starting[key] = Worker(ours, out, err, self.settings.max_result)
        try:
            socket.send_fds(self.control, [b"fork %d" % key], [theirs.fileno(), out_end, err_end])
        except OSError:
            # The nursery is gone; who listens to it starts another one.
            self.starting.pop(key).close()
        theirs.close()
        os.close(out_end)
        os.close(err_end)

    # Calls.

    def take(self, deadline: float, run: Run) -> Worker:
        """An idle worker, waited for."""
        with self.changed:
            if self.waiting >= MAX_WAITING:
                raise calls.Failed(calls.BUSY, f"{self.waiting} calls are waiting for a worker already")
            self.waiting += 1
            try:
                while True:
                    if self.state == "failed":
                        raise failed_to_load(self.failure)
                    if self.idle:
                        worker = self.idle.pop()
                        if not self.idle:
                            self.fork_if_room()
                        return worker
                    if self.state == "ready" and not self.starting:
                        self.fork_if_room()
                    left = deadline - time.monotonic()
                    if left <= 0:
                        what = "the module is still being imported" if self.state == "loading" else "every worker is busy"
                        raise calls.Failed(calls.BUSY, f"{what}, and the time of the call is over")
                    if run.cancelled:
                        raise Cancelled
                    self.changed.wait(min(left, 1.0))
            finally:
                self.waiting -= 1

    def fork_if_room(self) -> None:
        if len(self.all) + len(self.starting) < self.settings.workers:
            self.fork()

    def call(self, kind: int, method: str, args: bytes, kwargs: bytes, run: Run):
        """Runs one call: its flags and its result as JSON, or `Failed`."""
        while True:
            worker = self.take(run.deadline, run)
            try:
                worker.sock.settimeout(max(0.001, run.deadline - time.monotonic()))
                worker.sock.sendall(wire.request(kind, method, args, kwargs))
                break
            except TimeoutError:
                self.end(worker)
                raise calls.Failed(calls.DEADLINE, "the arguments could not be handed over in time") from None
            except OSError:
                # It ended while it was idle; nothing of the call was done.
                self.end(worker)
        worker.sock.settimeout(None)
        with run.lock:
            run.worker = worker
        good = False
        try:
            frame, body = self.follow(worker, run)
            good = not body[0] & wire.RETIRES
        finally:
            with run.lock:
                run.over = True
            if good:
                self.give_back(worker)
            else:
                self.end(worker)
        if frame == wire.FAILURE:
            raise from_worker(body[1:])
        return body[0], body[1:]

    def follow(self, worker: Worker, run: Run):
        """Until it answers, or may not go on: the last frame."""
        sock = worker.sock.fileno()
        while True:
            left = run.deadline - time.monotonic()
            late = left <= 0
            # A machine that stood still may have let the time pass after the answer came: it is looked for once more.
            # One read takes all that a socket holds.
            ready = worker.poll.poll(0 if late else max(1, int(min(left, LOOK_S) * 1000)))
            if late and not any(descriptor == sock for descriptor, _ in ready):
                raise too_late()
            if not ready and self.uses_too_much(worker):
                raise calls.Failed(calls.OUT_OF_MEMORY, "the call used more memory than it may, and was ended", "MemoryError")
            for descriptor, _ in ready:
                if descriptor != sock:
                    self.heard_beside(worker, run, descriptor)
            if run.cancelled:
                raise Cancelled
            if not any(descriptor == sock for descriptor, _ in ready):
                continue
            try:
                worker.reader.take()
                frame = worker.reader.frame()
                while frame is not None:
                    if frame[0] != wire.ITEM:
                        self.drain(worker, run)
                        return frame
                    if run.on_item:
                        run.on_item(frame[1])
                    frame = worker.reader.frame()
            except (wire.Closed, OSError):
                self.drain(worker, run)
                raise self.crash(worker, run) from None
            if late:
                raise too_late()

    def uses_too_much(self, worker: Worker) -> bool:
        """Memory that the limit on its data does not see, or too much of what all calls share."""
        own = worker.resident() - worker.at_rest
        if own > self.settings.call_memory:
            return True
        with self.changed:
            others = [one for one in self.all.values() if one is not worker]
        residents = [one.resident() - one.at_rest for one in others]
        return own + sum(residents) > self.settings.memory and own >= max(residents, default=0)

    def heard_beside(self, worker: Worker, run: Run, descriptor: int) -> bool:
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            # The call closed it. A pipe at its end is always ready: it is not looked at any more.
            worker.poll.unregister(descriptor)
            return False
        if descriptor != worker.wake:
            run.wrote("stdout" if descriptor == worker.out else "stderr", data)
        return True

    def drain(self, worker: Worker, run: Run) -> None:
        """What was written before the last frame belongs to this call."""
        sock = worker.sock.fileno()
        while True:
            ready = [descriptor for descriptor, _ in worker.poll.poll(0) if descriptor not in (sock, worker.wake)]
            if not any([self.heard_beside(worker, run, descriptor) for descriptor in ready]):
                return

    def crash(self, worker: Worker, run: Run) -> calls.Failed:
        """The worker is gone without an answer: why."""
        worker.ended.wait(END_S)
        status = worker.status
        if status is None:
            self.kill(worker)
            return calls.Failed(calls.CRASHED, "the call let go of its connection, and was ended")
        output = bytes(run.tail).decode(errors="replace")
        if os.WIFSIGNALED(status):
            name = signal_name(os.WTERMSIG(status))
            hint = "; something outside ended it, often because the pod is out of memory" if name == "SIGKILL" else ""
            failed = calls.Failed(calls.CRASHED, f"the call was ended by {name}{hint}", name)
        else:
            code = os.waitstatus_to_exitcode(status)
            failed = calls.Failed(calls.CRASHED, f"the call ended its process with exit code {code}", "exit")
        failed.output = output
        return failed

    def give_back(self, worker: Worker) -> None:
        with self.changed:
            if worker.ended.is_set():
                worker.close()
                return
            self.idle.append(worker)
            self.changed.notify()

    def end(self, worker: Worker) -> None:
        """Ends a worker; another one takes its place."""
        self.kill(worker)
        worker.ended.wait(END_S)
        worker.close()
        with self.changed:
            if self.state == "ready" and not self.idle and not self.starting:
                self.fork_if_room()

    def kill(self, worker: Worker) -> None:
        if worker.ended.is_set():
            return
        try:
            self.control.send(b"kill %d" % worker.pid)
        except OSError:
            # The nursery is gone, and its workers with it.
            return

    def load_wait(self, deadline: float) -> str:
        """Until the module is imported or failed to be."""
        with self.changed:
            while self.state == "loading" and time.monotonic() < deadline:
                self.changed.wait(max(0.001, min(1.0, deadline - time.monotonic())))
            return self.state


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def from_worker(body: bytes) -> calls.Failed:
    told = json.loads(body)
    return calls.Failed(told["kind"], told["message"], told["type"], told["traceback"])


def too_late() -> calls.Failed:
    return calls.Failed(calls.DEADLINE, "the call ran longer than it may, and was ended")


def failed_to_load(told: dict) -> calls.Failed:
    return calls.Failed(told["kind"], told["message"], told["type"], told["traceback"])


def end_session(pid: int) -> None:
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def collect_orphans() -> None:
    """What the nursery left is this process's, where it is the container's first."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return
