"""Up and down again and again: nothing of the bed may be left on the machine, and the times are kept.

    python3 tests/testbed/rounds.py          one round
    GANTRY_TEST_FULL=1 ... rounds.py         ten

It takes the bed down, so nothing else may be using it. It looks at the whole machine, not only at what the bed
says it made; other programs' processes come and go, so of processes those with a cgroup or a name of the bed count.
"""

import json
import os
import pathlib
import subprocess
import time
import unittest

TESTBED = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "testbed"
ROUNDS = 10 if os.environ.get("GANTRY_TEST_FULL") == "1" else 1
UP_SECONDS = 75  # what the bed promises once everything is built
AGAIN_SECONDS = 3  # what it promises when it is up
# A hung start is ended by its own time-outs long before.
COMMAND_SECONDS = 600
# Busy machines are slower; what the bed promises is measured on an idle one.
STRICT = os.environ.get("GANTRY_TESTBED_STRICT") == "1"


def testbed(*arguments):
    began = time.monotonic()
    subprocess.run([TESTBED, *arguments], check=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL)
    return time.monotonic() - began


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def bed_processes():
    """Processes in a cgroup of the bed, or whose program or arguments are under its folders."""
    found = set()
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if "gantry-testbed" in (folder / "cgroup").read_text():
                found.add(f"{folder.name} {os.readlink(folder / 'exe')}")
            elif b"/var/lib/gantry-testbed" in (folder / "cmdline").read_bytes():
                found.add(f"{folder.name} {os.readlink(folder / 'exe')}")
        except OSError:
            pass  # it ended while we looked
    return found


def machine():
    """Everything on the machine that a bed could leave behind."""
    links = {link["ifname"] for link in json.loads(output("ip", "-j", "link") or "[]")}
    routes = {line.strip() for line in output("ip", "route", "show", "table", "all").splitlines()}
    rules = {line.strip() for line in output("nft", "list", "tables").splitlines()}
    rules |= set(output("iptables-save").splitlines()) - {""}
    mounts = {line.split()[1] for line in pathlib.Path("/proc/self/mounts").read_text().splitlines()}
    groups = {str(path) for path in pathlib.Path("/sys/fs/cgroup").glob("**/gantry-testbed")}
    loops = {line for line in output("losetup", "--list", "--noheadings").splitlines() if "gantry-testbed" in line}
    sockets = {path.name for path in pathlib.Path("/run/containerd/s").glob("*")}
    return {
        "processes": bed_processes(),
        "network links": links,
        "network namespaces": set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set(),
        "routes": routes,
        "packet filter rules": {rule for rule in rules if not rule.startswith(("#", ":"))},
        "mounts": mounts,
        "cgroups": groups,
        "loop devices": loops,
        "shim sockets": sockets,
    }


class Rounds(unittest.TestCase):
    def test_nothing_is_left_over(self):
        testbed("down")
        before = machine()
        self.assertEqual(before["processes"], set())
        for number in range(ROUNDS):
            up, again = testbed("up"), testbed("up")
            self.assertTrue(bed_processes(), "an up bed has processes: the looking is broken")
            down = testbed("down")
            print(f"round {number + 1}: up {up:.1f} s, up again {again:.1f} s, down {down:.1f} s", flush=True)
            after = machine()
            left = {what: sorted(after[what] - before[what]) for what in after if after[what] - before[what]}
            self.assertEqual(left, {}, f"left over after round {number + 1}")
            if STRICT:
                self.assertLessEqual(up, UP_SECONDS)
                self.assertLessEqual(again, AGAIN_SECONDS)


if __name__ == "__main__":
    unittest.main(verbosity=2)
