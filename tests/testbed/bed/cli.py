"""The commands of scripts/testbed."""

import argparse
import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import shlex
import shutil
import sys
import time

from . import build, control_plane, disk, elasticsearch, images, network, node, outside, process, s3, services
from .settings import (
    CACHE, DATABASE_IMAGE, ELASTICSEARCH_PASSWORD, HOST, INGRESS_PORT, KUBECONFIG, LOGS, RUN, RUNNER_IMAGE, S3_BUCKET,
    S3_KEY, S3_REGION, S3_SECRET, STATE, BedError,
)

# The machine's settings that a kubelet changes; `down` gives them back.
KERNEL_SETTINGS = ["vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
                   "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes"]
# Programs that `part stop|start` knows, each with how it is started and how its readiness is awaited.
PARTS = {
    "etcd": (control_plane.ETCD, control_plane.start_etcd, control_plane.etcd_ready, control_plane.ETCD_SECONDS),
    "apiserver": (control_plane.APISERVER, control_plane.start_apiserver, control_plane.apiserver_ready, control_plane.API_SECONDS),
    "controller-manager": (control_plane.CONTROLLER_MANAGER, control_plane.start_controllers, control_plane.controllers_ready, control_plane.CONTROLLER_SECONDS),
    "scheduler": (control_plane.SCHEDULER, control_plane.start_controllers, control_plane.controllers_ready, control_plane.CONTROLLER_SECONDS),
    "volumes": (control_plane.VOLUMES, control_plane.start_controllers, control_plane.controllers_ready, control_plane.CONTROLLER_SECONDS),
    "coredns": (services.DNS, services.start_dns, services.dns_ready, services.READY_SECONDS),
    "ingress": (services.INGRESS, services.start_ingress, services.ingress_ready, services.READY_SECONDS),
    "metrics-server": (services.METRICS, services.start_metrics, services.metrics_ready, services.METRICS_SECONDS),
    "outside": (outside.PROCESS, outside.start, outside.ready, outside.READY_SECONDS),
    "s3": (s3.PROCESS, s3.start, s3.ready, s3.READY_SECONDS),
    "elasticsearch": (elasticsearch.PROCESS, elasticsearch.start, elasticsearch.ready, elasticsearch.READY_SECONDS),
}
STARTED = time.monotonic()


def say(text):
    print(f"{time.monotonic() - STARTED:6.1f} s  {text}", file=sys.stderr, flush=True)


def timed(name, *steps):
    began = time.monotonic()
    for step in steps:
        step()
    say(f"{name} ({time.monotonic() - began:.1f} s)")


def together(jobs):
    """Runs the named jobs at the same time. The first failure is the one that is told."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        running = [pool.submit(timed, name, *steps) for name, *steps in jobs]
        for job in running:
            job.result()


@contextlib.contextmanager
def locked(wanted):
    """One command at a time changes the bed; another waits for it."""
    if not wanted:
        yield
        return
    with open("/run/gantry-testbed.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another scripts/testbed is at work; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def is_up(count, secure):
    """Whether every part runs and answers, as `up` with the same arguments would leave it."""
    nodes = node.all_nodes()
    if len(nodes) < count or not all(each.running() for each in nodes) or elasticsearch.secure() != secure:
        return False
    if not all(program.pid() for program, *_ in PARTS.values()):
        return False
    checks = [ready for _, _, ready, _ in PARTS.values()] + [each.ready for each in nodes]
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(checks)) as pool:
        return all(pool.map(answers, checks))


def answers(check):
    try:
        return bool(check())
    except Exception:  # a part that does not answer, for whatever reason, is not up
        return False


def build_everything():
    timed("packages", build.packages)
    CACHE.mkdir(parents=True, exist_ok=True)
    together([
        ("built: programs", *[lambda name=name: build.build(name) for name in build.PROGRAMS]),
        ("built: images", images.build_all, images.make_store),
        ("built: elasticsearch", build.elasticsearch),
    ])


def save_kernel_settings():
    file = STATE / "kernel-settings.json"
    if not file.exists():
        folder = pathlib.Path("/proc/sys")
        file.write_text(json.dumps({name: (folder / name).read_text().strip() for name in KERNEL_SETTINGS}))


def restore_kernel_settings():
    file = STATE / "kernel-settings.json"
    if file.exists():
        for name, value in json.loads(file.read_text()).items():
            (pathlib.Path("/proc/sys") / name).write_text(value)
        file.unlink()


def end_outdated():
    """Ends what runs a program that was built from other sources; `up` starts it again."""
    for name, (program, *_) in PARTS.items():
        if build.outdated(program.program()):
            timed(f"{name} runs an old program, ended", program.stop)
    for each in node.all_nodes():
        if any(build.outdated(program.program()) for program in each.processes):
            timed(f"{each.name} runs an old program, ended", each.stop)


def load_new_images():
    jobs = [(f"new images loaded into {each.name}", lambda each=each, old=old: each.load(old))
            for each in node.all_nodes() if each.running() and (old := each.old_images())]
    if jobs:
        together(jobs)


def up(arguments):
    build_everything()
    end_outdated()
    if is_up(arguments.nodes, arguments.secure):
        load_new_images()
        say("everything is up")
        return
    for folder in (STATE, RUN, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    save_kernel_settings()
    node.declare(arguments.nodes)
    network.up()
    if elasticsearch.secure() != arguments.secure:
        elasticsearch.stop()
    together([
        ("elasticsearch", lambda: elasticsearch.up(arguments.secure)),
        ("s3", s3.up),
        ("outside", outside.up),
        ("cluster", cluster_up),
    ])
    load_new_images()
    say("everything is up: `eval \"$(scripts/testbed env)\"` sets the variables")


def cluster_up():
    timed("control plane", control_plane.prepare, control_plane.up)
    services.start_all()
    nodes = node.all_nodes()
    together([(each.name, lambda each=each: each.running() or each.start(), each.wait) for each in nodes])
    timed("names, ingress, metrics", services.wait_all)


def down(arguments):
    process.kill_cgroup()
    disk.remove_all()
    for folder in (RUN, STATE):
        node.unmount(folder)
    network.down()
    restore_kernel_settings()
    remove_shim_sockets()
    for link in pathlib.Path("/var/log/containers").glob("*"):
        if link.is_symlink() and str(STATE) in os.readlink(link):
            link.unlink()
    shutil.rmtree(RUN, ignore_errors=True)
    kept = set() if arguments.purge else {"image-store", "buildah"}
    for entry in STATE.glob("*"):
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    say("everything is down")


def remove_shim_sockets():
    """A killed container's shim leaves its socket in a folder that all containerds of the machine share."""
    used = pathlib.Path("/proc/net/unix").read_text()
    for socket in pathlib.Path("/run/containerd/s").glob("*"):
        if str(socket) not in used:
            socket.unlink()


def leftovers():
    """What `down` must not leave: the leftovers test asks for it after every round."""
    found = [f"process {pid}" for pid in process.cgroup_processes()]
    found += [f"cgroup {h / process.CGROUP}" for h in process.hierarchies() if (h / process.CGROUP).exists()]
    found += [f"mount {point}" for folder in (RUN, STATE) for point in node.mounts(folder)]
    return found + network.leftovers()


def status(_arguments):
    lines = [(name, "running" if program.pid() else "stopped", "answers" if program.pid() and answers(ready) else "-")
             for name, (program, _, ready, _) in PARTS.items()]
    for each in node.all_nodes():
        ready = answers(each.ready)
        lines.append((each.name, "running" if each.running() else "stopped", "Ready" if ready else "not Ready"))
    for name, state, answer in lines:
        print(f"{name:20} {state:8} {answer}")
    print(f"memory {memory() / 1024:.0f} MB in {len(process.cgroup_processes())} processes")
    return 0 if all(state == "running" and answer != "-" and answer != "not Ready" for _, state, answer in lines) else 1


def memory():
    """The bed's own share of memory in kB: pages that several processes map count once."""
    total = 0
    for pid in process.cgroup_processes():
        try:
            text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)
    return total


def kubectl():
    """kubectl is one of the names of the Kubernetes program."""
    link = CACHE / "bin" / "kubectl"
    if not link.is_symlink() or os.readlink(link) != str(build.binary("kubernetes")):
        link.unlink(missing_ok=True)
        link.symlink_to(build.binary("kubernetes"))
    return link


def env(_arguments):
    exports = {
        "KUBECONFIG": KUBECONFIG, "ELASTICSEARCH_HOST": elasticsearch.host(),
        "AWS_ACCESS_KEY_ID": S3_KEY, "AWS_SECRET_ACCESS_KEY": S3_SECRET, "AWS_REGION": S3_REGION,
        "AWS_ENDPOINT_URL": s3.ENDPOINT, "S3_BUCKET": S3_BUCKET,
        "RUNNER_IMAGE": RUNNER_IMAGE, "DATABASE_IMAGE": DATABASE_IMAGE,
        # The ingress controller is a program on the machine, not a pod.
        "GANTRY_INGRESS_ADDRESSES": HOST,
        "TESTBED_KUBECTL": kubectl(), "TESTBED_INGRESS": f"{HOST}:{INGRESS_PORT}",
    }
    if elasticsearch.secure():
        exports |= {"ELASTICSEARCH_USER": "elastic", "ELASTICSEARCH_PASSWORD": ELASTICSEARCH_PASSWORD}
    for name, value in exports.items():
        print(f"export {name}={shlex.quote(str(value))}")


def rebuild_images(arguments):
    if not arguments.server:
        timed("built: images", images.build_all, images.make_store)
        load_new_images()
        return
    timed("built: the server's image", images.build_base, lambda: images.build(images.SERVER))
    together([(f"loaded into {each.name}", lambda each=each: images.load(each.socket, [images.SERVER]))
              for each in node.all_nodes() if each.running()] or [("no node runs", lambda: None)])


def named_node(name):
    for each in node.all_nodes():
        if each.name == name:
            return each
    raise BedError(f"there is no node {name}; there are: {', '.join(each.name for each in node.all_nodes()) or 'none'}")


def node_command(arguments):
    if arguments.action == "add":
        name = arguments.name or f"node-{max([each.number for each in node.all_nodes()], default=0) + 1}"
        if not name.removeprefix("node-").isdigit() or not 1 <= int(name.removeprefix("node-")) <= 200:
            raise BedError(f"a node is called node-1 to node-200, not {name}")
        (STATE / "nodes" / name).mkdir(parents=True, exist_ok=True)
        each = node.Node(name)
        timed(f"{name} added", each.start, each.wait)
        for other in node.all_nodes():
            if other.running():
                network.connect(other, node.all_nodes())
        return
    each = named_node(arguments.name)
    actions = {
        "kill": [each.kill], "restart": [each.start, each.wait], "bounce": [each.bounce, each.wait],
        "cut": [lambda: network.cut(each, "down")], "heal": [lambda: network.cut(each, "up")],
    }
    timed(f"{each.name} {arguments.action}", *actions[arguments.action])


def part_command(arguments):
    program, start, ready, seconds = PARTS[arguments.name]
    if arguments.action == "stop":
        timed(f"{arguments.name} stopped", elasticsearch.stop if program is elasticsearch.PROCESS else program.stop)
    else:
        timed(f"{arguments.name} started", start, lambda: process.wait_for(arguments.name, seconds, ready, program))


def logs(arguments):
    file = LOGS / f"{arguments.name}.log"
    if not file.exists():
        known = sorted(path.stem for path in LOGS.glob("*.log"))
        raise BedError(f"there is no log of {arguments.name}; there are: {', '.join(known) or 'none: the bed is down'}")
    sys.stdout.write(file.read_text(errors="replace"))


def parser():
    top = argparse.ArgumentParser(prog="scripts/testbed", description="A real Kubernetes, Elasticsearch, S3 and ingress on this machine.")
    commands = top.add_subparsers(dest="command", required=True)

    def command(name, function, text):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(function=function)
        return sub

    sub = command("up", up, "build what is missing or old, and start every part that does not run or runs an old program")
    sub.add_argument("--nodes", type=int, default=3)
    sub.add_argument("--secure", action="store_true", help="Elasticsearch with security on")
    command("down", down, "remove every process, namespace, mount, route and rule").add_argument(
        "--purge", action="store_true", help="the unpacked images too")
    command("status", status, "each part, and the memory of all")
    command("env", env, "the exports that a program needs to use the bed")
    command("images", rebuild_images, "build the images again and load those that are new into every node").add_argument(
        "--server", action="store_true", help="the server's own image instead, which `up` does not build")
    sub = command("node", node_command, "add, kill, restart, cut off or reconnect a node, or crash its kubelet and containerd")
    sub.add_argument("action", choices=["add", "kill", "restart", "bounce", "cut", "heal"])
    sub.add_argument("name", nargs="?")
    sub = command("part", part_command, "stop or start one part")
    sub.add_argument("action", choices=["stop", "start"])
    sub.add_argument("name", choices=list(PARTS))
    disk.add_command(command("disk", disk.command, "a small file system that a test can fill"))
    command("logs", logs, "the log of a part").add_argument("name")
    return top


def main(arguments):
    options = parser().parse_args(arguments)
    try:
        if os.geteuid() != 0:
            raise BedError("network namespaces, mounts and cgroups need root, and this is not root: run it as root")
        with locked(options.command in ("up", "down", "images", "node", "part", "disk")):
            return options.function(options) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader, `head` for one, has seen enough
        return 1
    except BedError as error:
        print(f"scripts/testbed {options.command}: {error}", file=sys.stderr)
        return 1
