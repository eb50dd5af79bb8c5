"""A worker: one call at a time, in a process of its own, until the supervisor lets go or a call leaves something behind."""

import faulthandler
import json
import os
import resource
import signal
import socket
import sys
import threading

from gantry_module import calls, values, wire
from gantry_module.settings import MAX_ARGUMENT_BYTES, Settings


def live(module, settings: Settings, sock: socket.socket, out: int, err: int) -> None:
    """The life of a worker; never returns."""
    try:
        prepare(settings, out, err)
        Worker(module, settings, sock).run()
    except (wire.Closed, OSError):
        pass
    os._exit(0)


def prepare(settings: Settings, out: int, err: int) -> None:
    # Everything that a call starts is in this session, and goes with it.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.stdout.reconfigure(line_buffering=True)
    # A segmentation fault tells where it was.
    faulthandler.enable(2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(settings.call_memory)


def limit_memory(more: int) -> None:
    """What is asked for beyond it fails in the function that asks, as a MemoryError."""
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + more if most == resource.RLIM_INFINITY else min(used + more, most)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, wanted))


class Worker:
    def __init__(self, module, settings: Settings, sock: socket.socket):
        self.module = module
        self.most = settings.max_result
        self.sock = sock
        self.reader = wire.Reader(sock, MAX_ARGUMENT_BYTES + wire.SLACK)
        self.threads = threading.active_count()
        self.children = f"/proc/self/task/{os.getpid()}/children"

    def run(self) -> None:
        while True:
            kind, body = self.reader.next()
            method, args, kwargs = wire.parse_request(body)
            try:
                answer, flags = self.answer(kind, method, args, kwargs)
                reply = wire.RESULT, answer
            except wire.Closed:
                raise
            except BaseException as error:
                reply, flags = (wire.FAILURE, calls.told(error).as_json()), 0
            self.flush()
            if self.has_left_something():
                flags |= wire.RETIRES
            self.send(wire.pack(reply[0], bytes((flags,)), reply[1]))
            if flags & wire.RETIRES:
                return

    def answer(self, kind: int, method: str, args: bytes, kwargs: bytes):
        if kind == wire.DESCRIBE:
            return json.dumps(calls.describe(self.module, method)).encode(), 0
        result, as_list = calls.invoke(self.module, method, args, kwargs)
        result = calls.awaited(result)
        if kind == wire.STREAM and hasattr(result, "__next__"):
            result = self.items(result)
        return values.to_json(result, self.most), wire.CALLED_WITH_LIST if as_list else 0

    def items(self, iterator):
        """Sends what it yields; the result is what it returns in the end."""
        while True:
            try:
                item = next(iterator)
            except StopIteration as end:
                return end.value
            self.send(wire.pack(wire.ITEM, values.to_json(item, self.most)))

    def send(self, frame: bytes) -> None:
        try:
            self.sock.sendall(frame)
        except OSError as error:
            # Not an error of the module's: nobody listens any more.
            raise wire.Closed(str(error)) from error

    def flush(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:
                # The call closed it; there is nothing to flush.
                continue

    def has_left_something(self) -> bool:
        """Threads and processes that outlive their call would be the next one's neighbours."""
        if threading.active_count() > self.threads:
            return True
        try:
            with open(self.children) as children:
                return bool(children.read(1))
        except OSError:
            return False
