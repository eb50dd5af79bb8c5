"""A module whose functions do what functions should not."""

import ctypes
import dataclasses
import datetime
import decimal
import os
import signal
import subprocess
import sys
import threading
import time

imported_at = time.time()
price = 3


@dataclasses.dataclass
class Item:
    name: str
    cost: decimal.Decimal


class Till:
    """Has a method that can be called."""

    @staticmethod
    def count(coins: list) -> int:
        return sum(coins)


def add(a, b=1, *, c=0):
    """Adds them."""
    return a + b + c


def total(numbers):
    """Takes one list."""
    return sum(numbers)


def when_imported():
    return imported_at


def values():
    return {
        "tuple": (1, 2),
        "set": {3, 1},
        "bytes": b"\x00\xff",
        "date": datetime.date(2026, 1, 31),
        "moment": datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.timezone.utc),
        "took": datetime.timedelta(seconds=90),
        "decimal": decimal.Decimal("1.10"),
        "item": Item("tea", decimal.Decimal("2.50")),
        "range": range(3),
        5: None,
    }


def not_a_number():
    return [float("nan"), float("inf"), -float("inf")]


def lock():
    return threading.Lock()


def lock_inside():
    return {"a": [threading.Lock()]}


def itself():
    loop = []
    loop.append(loop)
    return loop


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def large(megabytes):
    return "x" * (megabytes << 20)


def many(numbers):
    return list(range(numbers))


def fail(text):
    raise ValueError(text)


def leave():
    sys.exit(3)


def vanish():
    print("last words", flush=True)
    os._exit(7)


def segfault():
    ctypes.string_at(0)


def abort():
    os.abort()


def spin():
    while True:
        pass


def wait(seconds):
    time.sleep(seconds)
    return os.getpid()


def hold(megabytes):
    held = [bytearray(1 << 20) for _ in range(megabytes)]
    return len(held)


def hold_shared(megabytes):
    import mmap

    held = mmap.mmap(-1, megabytes << 20)
    for at in range(0, megabytes << 20, 4096):
        held[at] = 1
    time.sleep(5)
    return len(held)


def start(seconds):
    return subprocess.Popen(["sleep", str(seconds)]).pid


def start_far(seconds):
    """Two forks and a session of its own: nobody's child but the nursery's."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            time.sleep(seconds)
        else:
            os.write(write, str(pid).encode())
        os._exit(0)
    os.wait()
    return int(os.read(read, 20))


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def start_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def close_everything():
    os.closerange(0, 256)


def kill_nursery():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def steps(number):
    for step in range(number):
        print("step", step)
        yield {"step": step}
    return "done"


def steps_that_fail():
    yield 1
    raise KeyError("two")


def for_ever():
    number = 0
    while True:
        yield number
        number += 1


async def later(value):
    return value


def _private():
    return 1
