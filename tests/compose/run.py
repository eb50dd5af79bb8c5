"""compose.yaml, really run: a docker engine of its own, stand-ins for the images that need a registry, and then
what a person would do. Needs docker.io and docker-compose of Debian (installed when missing, as root), and the
test bed's images and programs (`scripts/testbed up` has built them)."""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "testbed"))
from bed import build, images  # noqa: E402
from bed.process import installed, run  # noqa: E402

HERE = REPOSITORY / "tests" / "compose"
KEY = "a-key-of-the-compose-test-that-is-long-enough"
PROJECT = "gantry-compose-test"
# Seen: 5 s.
ENGINE_SECONDS = 60
# An image with a Java in it: seen 60 s.
BUILD_SECONDS = 900
# Elasticsearch takes 20 to 60 s, and Kibana begins after it.
UP_SECONDS = 300
# A batch of records, the index's refresh, and a busy machine.
RECORD_SECONDS = 30


def say(text):
    print(text, flush=True)


@contextlib.contextmanager
def engine():
    """A docker engine with files of its own; nothing of it is left. The machine's packet filter stays as it is:
    containers reach each other over their bridge, and ports are passed on by a process."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="gantry-docker-"))
    socket = folder / "docker.sock"
    log = folder / "log"
    # Debian's, also where another one comes first in PATH.
    environment = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DOCKER_HOST": f"unix://{socket}", "DOCKER_BUILDKIT": "1",
                   "DOCKER_CONFIG": str(folder / "client")}
    with open(log, "wb") as out:
        daemon = subprocess.Popen(
            ["/usr/sbin/dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid",
             "--host", f"unix://{socket}", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--bridge=none"],
            stdout=out, stderr=out, env=environment)
    try:
        eventually("the engine", ENGINE_SECONDS, lambda: subprocess.run(
            ["docker", "version"], env=environment, capture_output=True).returncode == 0, daemon)
        yield environment
    except BaseException:
        say(log.read_text(errors="replace")[-2000:])
        raise
    finally:
        daemon.terminate()
        try:
            daemon.wait(60)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        run(["sh", "-c", f"grep -o ' {folder}[^ ]*' /proc/self/mounts | sort -r | xargs -r umount -l"])
        shutil.rmtree(folder, ignore_errors=True)


def eventually(what, seconds, check, process=None):
    deadline = time.monotonic() + seconds
    problem = None
    while True:
        try:
            found = check()
            if found:
                return found
        except (OSError, ValueError) as error:
            problem = error
        if time.monotonic() > deadline or (process and process.poll() is not None):
            raise SystemExit(f"{what} is not there after {seconds} s: {problem}")
        time.sleep(0.3)


def may_give_every_privilege():
    """Whether this process has every capability that the kernel knows: a privileged container gets them all."""
    status = pathlib.Path("/proc/self/status").read_text()
    bounding = int(next(line.split()[1] for line in status.splitlines() if line.startswith("CapBnd")), 16)
    last = int(pathlib.Path("/proc/sys/kernel/cap_last_cap").read_text())
    return bounding == (1 << last + 1) - 1


def make_images(environment, programs):
    def call(*command):
        run(command, env=environment, seconds=BUILD_SECONDS, cwd=REPOSITORY)

    images.build_base()
    call("docker", "load", "--quiet", "--input", images.base_archive())
    call("docker", "tag", images.BASE_IMAGE, "debian:bookworm-slim")
    call("scripts/images", "--programs", programs, *images.RUNNER.arguments)
    stand_ins = [
        ("elasticsearch", "docker.elastic.co/elasticsearch/elasticsearch:8.19.0", build.elasticsearch, "program"),
        ("kibana", "docker.elastic.co/kibana/kibana:8.19.0", None, None),
        ("s3", "versity/versitygw:v1.0.18", lambda: build.binary("versitygw"), "versitygw"),
    ]
    for name, tag, program, place in stand_ins:
        with tempfile.TemporaryDirectory() as context:
            target = pathlib.Path(context) / "image"
            shutil.copytree(HERE / name, target)
            if program:
                source = program()
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, target / place)
            call("docker", "build", "--network", "host", "--tag", tag, target)
        say(f"built: {tag}")


def get(url, headers=None):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=10) as answer:
        return json.load(answer)


def state_of(environment, service):
    name = f"{PROJECT}_{service}_1"
    form = "{{.State.Status}} {{.State.ExitCode}} {{if .State.Health}}{{.State.Health.Status}}{{end}}"
    return subprocess.run(["docker", "inspect", "--format", form, name], env=environment, capture_output=True, text=True).stdout.strip()


def recorded():
    found = get("http://127.0.0.1:9200/gantry-logs-*/_search?q=event.action:submission.ended")
    return found["hits"]["total"]["value"]


def use(environment):
    """What a person would do."""
    for service in ("orchestration", "elasticsearch", "kibana", "s3"):
        eventually(f"{service}, healthy", UP_SECONDS, lambda: state_of(environment, service) == "running 0 healthy")
        say(f"healthy: {service}")
    assert state_of(environment, "test-base") == "exited 0", state_of(environment, "test-base")
    backend = ["python3", REPOSITORY / "scripts" / "test_backend.py", "--url", "ws://127.0.0.1:8000/ws/code"]
    say(run(backend, env={**os.environ, "API_KEY": KEY}, seconds=120).strip())
    before = eventually("the record in Elasticsearch", RECORD_SECONDS, recorded)
    found = get("http://127.0.0.1:8000/logs?q=Hello", {"X-API-Key": KEY})
    assert any("Hello" in record["message"] for record in found["records"]), found
    url = {**os.environ, "KIBANA_URL": "http://127.0.0.1:5601"}
    say(run([REPOSITORY / "infrastructure" / "kibana" / "import"], env=url).strip())
    with urllib.request.urlopen("http://127.0.0.1:7070/health", timeout=10) as answer:
        assert answer.status == 200
    # What was there is there after a restart.
    run(["docker", "kill", f"{PROJECT}_orchestration_1"], env=environment)
    run(["docker", "start", f"{PROJECT}_orchestration_1"], env=environment)
    listed = eventually("the list after a restart", UP_SECONDS, lambda: get("http://127.0.0.1:8000/submissions", {"X-API-Key": KEY})["submissions"])
    assert len(listed) >= 2 and recorded() == before, (listed, before)
    say(f"{len(listed)} submissions and their records outlive the container")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default=str(REPOSITORY / "target" / "release"), help="the folder of gantry and gantry-runner")
    options = options.parse_args()
    missing = [package for program, package in (("dockerd", "docker.io"), ("docker-compose", "docker-compose")) if not installed(program)]
    if missing:
        run(["apt-get", "update", "-qq"])
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    with engine() as environment, tempfile.TemporaryDirectory() as folder:
        make_images(environment, os.path.abspath(options.programs))
        example = (REPOSITORY / ".env.example").read_text()
        settings = pathlib.Path(folder) / "env"
        settings.write_text(example.replace("API_KEY=\n", f"API_KEY={KEY}\n"))
        files = ["--file", REPOSITORY / "compose.yaml"]
        if not may_give_every_privilege():
            say("SKIPPED the whole sandbox: this machine's root lacks a privilege, so no container can have them all")
            files += ["--file", HERE / "without-privileges.yaml"]
        compose = ["docker-compose", "--project-name", PROJECT, *files, "--env-file", settings]
        try:
            run([*compose, "up", "--detach"], env=environment, seconds=UP_SECONDS)
            use(environment)
        except BaseException:
            logs = subprocess.run([*map(str, compose), "logs", "--tail", "40"], env=environment, capture_output=True, text=True)
            say(logs.stdout[-8000:])
            raise
        finally:
            run([*compose, "down", "--volumes", "--timeout", "10"], env=environment)
    say("compose.yaml works")


if __name__ == "__main__":
    main()
