"""Small loop file systems that a test can fill without filling the machine."""

import errno
import os
import re

from .node import mounts, unmount
from .process import run
from .settings import STATE, BedError

FOLDER = STATE / "disks"


def point(name):
    if not re.fullmatch(r"[a-z0-9-]{1,40}", name):
        raise BedError(f"a disk's name is small letters, digits and dashes, not {name!r}")
    return FOLDER / name


def make(name, megabytes):
    """Makes and mounts the file system; prints where."""
    where, image = point(name), FOLDER / f"{name}.img"
    if not mounts(where):
        where.mkdir(parents=True, exist_ok=True)
        with open(image, "wb") as file:
            file.truncate(megabytes * 1024 * 1024)
        run(["mkfs.ext4", "-q", "-F", "-m", "0", image])
        run(["mount", "-o", "loop", image, where])
        where.chmod(0o777)
    print(where)


def fill(name):
    """Writes until nothing more goes in."""
    if not mounts(point(name)):
        raise BedError(f"there is no disk {name}: `scripts/testbed disk make {name}` makes it")
    with open(point(name) / "filler", "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def free(name):
    (point(name) / "filler").unlink(missing_ok=True)


def remove(name):
    unmount(point(name))
    (FOLDER / f"{name}.img").unlink(missing_ok=True)
    if point(name).exists():
        point(name).rmdir()


def remove_all():
    for name in os.listdir(FOLDER) if FOLDER.exists() else []:
        if not name.endswith(".img"):
            remove(name)


def add_command(parser):
    parser.add_argument("action", choices=["make", "fill", "free", "remove"])
    parser.add_argument("name")
    parser.add_argument("--megabytes", type=int, default=32)


def command(arguments):
    action = {"fill": fill, "free": free, "remove": remove}.get(arguments.action)
    action(arguments.name) if action else make(arguments.name, arguments.megabytes)
