"""What the environment says."""

import os
import re
import sys
from dataclasses import dataclass, field

MODULE = re.compile(r"[A-Za-z][A-Za-z0-9_]*(\.[A-Za-z][A-Za-z0-9_]*)*")

#: A shorter secret, an empty one above all, is a mistake of whoever set it.
SHORTEST_SECRET = 32
SECRET = re.compile(r"[A-Za-z0-9_-]{%d,}" % SHORTEST_SECRET)

#: Longest time of a call: default and maximum, as for any run of user code.
CALL_MS = 10_000
MAX_CALL_MS = 60_000

#: Largest result, and largest list of arguments, as JSON.
MAX_RESULT_BYTES = 16 << 20
MAX_ARGUMENT_BYTES = 8 << 20

#: Memory of one call beside what the module itself takes.
CALL_MEMORY_BYTES = 256 << 20

#: Memory of all calls at one time, beside the module itself.
MEMORY_BYTES = 1 << 30

#: Workers that are kept ready, and at most.
READY_WORKERS = 2
MAX_WORKERS = 8


@dataclass(frozen=True)
class Settings:
    module: str
    port: int
    host: str
    manager: str
    packages: str
    workers: int
    call_memory: int
    memory: int
    max_result: int
    #: What a caller has to know; empty: whoever reaches the port may call.
    token: str = field(default="", repr=False)

    @classmethod
    def from_environment(cls) -> "Settings":
        module = os.environ.get("MODULE_NAME", "")
        if not MODULE.fullmatch(module):
            refuse("MODULE_NAME", f"is {module!r}; expected the name of a Python module, such as numpy")
        return cls(
            module=module,
            port=number("PORT", 50051, 1, 65535),
            host=os.environ.get("MODULE_HOST", "0.0.0.0"),
            manager=os.environ.get("POD_MANAGER_URL", ""),
            packages=os.environ.get("MODULE_PACKAGES", ""),
            workers=number("MODULE_WORKERS", MAX_WORKERS, 1, 64),
            call_memory=number("MODULE_CALL_MEMORY_BYTES", CALL_MEMORY_BYTES, 16 << 20, 1 << 40),
            memory=number("MODULE_MEMORY_BYTES", MEMORY_BYTES, 16 << 20, 1 << 40),
            max_result=number("MODULE_MAX_RESULT_BYTES", MAX_RESULT_BYTES, 1 << 10, 64 << 20),
            token=secret("MODULE_TOKEN"),
        )


def secret(name: str) -> str:
    """Taken out of the environment: the module and what its calls start inherit that."""
    text = os.environ.pop(name, None)
    if text is None:
        return ""
    if not SECRET.fullmatch(text):
        refuse(name, f"is not what it should be; expected at least {SHORTEST_SECRET} of A-Z, a-z, 0-9, '-' and '_'")
    return text


def number(name: str, default: int, least: int, most: int) -> int:
    text = os.environ.get(name, "") or str(default)
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        refuse(name, f"is {text!r}; expected a whole number from {least} to {most}")
    return int(text)


def refuse(name: str, why: str) -> None:
    sys.exit(f"gantry_module: {name} {why}")
