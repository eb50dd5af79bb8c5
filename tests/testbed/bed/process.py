"""Processes of the bed: started in a cgroup of the bed, known by pid and start time, never by name."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

from .settings import CGROUP, LOGS, RUN, BedError

CGROUPS = pathlib.Path("/sys/fs/cgroup")
# A part that has not ended by then is killed: none of them has anything to save.
STOP_SECONDS = 3.0
# SIGKILL acts at once; a process that is still there hangs in the kernel and only a restart helps.
KILL_SECONDS = 10.0


def hierarchies():
    """The folders under which cgroups of the bed are made: each v1 controller, or the one v2 tree."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [folder for folder in sorted(CGROUPS.iterdir()) if folder.is_dir() and (folder / "cgroup.procs").exists()]


def make_cgroup(name):
    """Makes gantry-testbed/NAME in every hierarchy and returns the file that takes a process in."""
    for hierarchy in hierarchies():
        folder = hierarchy
        for step in [CGROUP, *name.split("/")]:
            parent, folder = folder, folder / step
            folder.mkdir(exist_ok=True)
            # A new cpuset group is empty, and an empty one takes no process.
            for file in ("cpuset.cpus", "cpuset.mems"):
                if (folder / file).exists() and not (folder / file).read_text().strip() and (parent / file).exists():
                    (folder / file).write_text((parent / file).read_text())
            if (parent / "cgroup.subtree_control").exists() and hierarchy == CGROUPS:
                controllers = (parent / "cgroup.controllers").read_text().split()
                (parent / "cgroup.subtree_control").write_text(" ".join("+" + c for c in controllers))
    first = next((h for h in hierarchies() if h.name == "pids"), hierarchies()[0])
    return first / CGROUP / name / "cgroup.procs"


def cgroup_processes(name=""):
    found = set()
    for hierarchy in hierarchies():
        # Not rglob: it gives up when a group goes away under it, and groups go with their last process.
        for folder, _, files in os.walk(hierarchy / CGROUP / name):
            if "cgroup.procs" in files:
                try:
                    found.update(int(pid) for pid in (pathlib.Path(folder) / "cgroup.procs").read_text().split())
                except OSError:
                    continue
    found.discard(0)  # a process of another pid namespace: its own group lists it there
    return found


def kill_cgroup(name=""):
    """Kills every process in a cgroup of the bed and below, then removes the folders."""
    deadline = time.monotonic() + KILL_SECONDS
    while pids := cgroup_processes(name):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if time.monotonic() > deadline:
            raise BedError(f"processes {sorted(pids)} survived SIGKILL for {KILL_SECONDS:.0f} s: they hang in the kernel; restart the machine")
        time.sleep(0.02)
    remove_cgroup(name)


def remove_cgroup(name=""):
    for hierarchy in hierarchies():
        top = hierarchy / CGROUP / name
        for folder in [pathlib.Path(folder) for folder, *_ in os.walk(top, topdown=False)]:
            for _ in range(50):  # the kernel lets go of a group a moment after its last process
                try:
                    folder.rmdir()
                except FileNotFoundError:
                    pass
                except OSError:
                    time.sleep(0.02)
                    continue
                break


def start_time(pid):
    """When the process started, in clock ticks: a pid that is used again has another one. None when it is gone."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class Process:
    """One program of the bed that runs on by itself after this command has ended."""

    def __init__(self, name, group="system"):
        self.name = name
        self.group = group
        self.file = RUN / "pids" / f"{name}.json"
        self.log = LOGS / f"{name}.log"

    def pid(self):
        try:
            record = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return None
        return record["pid"] if start_time(record["pid"]) == record["started"] else None

    def program(self):
        """The file name of the program that runs; None when none does."""
        try:
            return os.path.basename(os.readlink(f"/proc/{self.pid()}/exe")).removesuffix(" (deleted)")
        except OSError:
            return None

    def start(self, command, namespace=None, env=None, user=None, cwd="/"):
        if self.pid():
            return
        LOGS.mkdir(parents=True, exist_ok=True)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        procs = make_cgroup(self.group)
        if user is not None:
            command = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *command]
        if namespace:
            command = ["nsenter", f"--net=/run/netns/{namespace}", *command]
        # Inside its group before the program itself starts: nothing it forks can be outside.
        command = ["/bin/sh", "-c", 'echo $$ >"$0" && exec "$@"', str(procs), *map(str, command)]
        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", **(env or {})}
        with open(self.log, "ab") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment, cwd=cwd
            )
        self.file.write_text(json.dumps({"pid": child.pid, "started": start_time(child.pid)}))

    def stop(self):
        """Ends the process. A signal reaches a stopped (SIGSTOP) process only as SIGKILL, which comes in the end."""
        pid = self.pid()
        if pid:
            os.kill(pid, signal.SIGTERM)
            wait_gone(pid, STOP_SECONDS) or os.kill(pid, signal.SIGKILL)
            wait_gone(pid, KILL_SECONDS)
        self.file.unlink(missing_ok=True)

    def last_lines(self, count=15):
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-count:]
        except OSError:
            return "(no log)"
        return "\n".join(line[:400] for line in lines)


def wait_gone(pid, seconds):
    started = start_time(pid)
    deadline = time.monotonic() + seconds
    while started is not None and start_time(pid) == started:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def wait_for(what, seconds, check, process=None):
    """Waits until check() is true. The error names the part, its last log lines and what to do."""
    deadline = time.monotonic() + seconds
    problem = None
    while True:
        try:
            if check():
                return
            problem = "not ready yet"
        except Exception as error:  # whatever keeps it from being ready is what the message tells
            problem = f"{type(error).__name__}: {error}"
        dead = process is not None and process.pid() is None
        if dead or time.monotonic() > deadline:
            why = "its process ended" if dead else f"not within {seconds:g} s"
            tail = f"\nlast lines of {process.log}:\n{process.last_lines()}" if process else ""
            raise BedError(f"{what} is not ready: {why} ({problem}).{tail}\nTo do: read the log, then `scripts/testbed down` and `up` again.")
        time.sleep(0.1)


def run(command, input=None, seconds=600, env=None, cwd=None):
    """Runs a command to its end and returns its output. The time-out is for a hung download or mount."""
    try:
        done = subprocess.run(
            [str(part) for part in command], input=input, capture_output=True, text=True, timeout=seconds, env=env, cwd=cwd
        )
    except FileNotFoundError as error:
        raise BedError(f"{command[0]} is not installed: `scripts/testbed up` installs it by apt on Debian") from error
    except subprocess.TimeoutExpired as error:
        raise BedError(f"{' '.join(map(str, command))[:300]} did not end within {seconds} s") from error
    if done.returncode != 0:
        text = (done.stderr + done.stdout).strip()[-3000:]
        raise BedError(f"{' '.join(map(str, command))[:300]} ended with {done.returncode}:\n{text}")
    return done.stdout


def installed(program):
    return shutil.which(program, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:" + os.environ.get("PATH", ""))
