"""The example of README.md on a cluster: the server, scripts/test_backend.py, the pods, the release by its host name.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/backend.py --programs target/debug

Prints what was done and what came back; ends with an error when anything is not as it should be.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
KUBECTL = os.environ.get("TESTBED_KUBECTL", "kubectl")
INGRESS = os.environ.get("TESTBED_INGRESS", "127.0.0.1:80")
NAMESPACE = "user-test"
OWN_NAMESPACE = "gantry-backend"
HOST = "test-prod.apps.localhost"
# The server looks at the cluster and fills its watches first.
START_SECONDS = 60
# What test_backend.py itself waits for at most, twice, and its start.
SCRIPT_SECONDS = 250
# A namespace is gone when its pods and volumes are.
GONE_SECONDS = 90
# The ingress controller looks for new hosts now and then; the kubelet tells of a ready pod within seconds.
SEEN_SECONDS = 30
KUBECTL_SECONDS = GONE_SECONDS + 10


def say(text):
    print(text, flush=True)


def kubectl(*arguments):
    done = subprocess.run([KUBECTL, *arguments], capture_output=True, text=True, timeout=KUBECTL_SECONDS)
    if done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def forget():
    """Nothing of an earlier run is left: what is shown was made now."""
    for namespace in (NAMESPACE, OWN_NAMESPACE):
        kubectl("delete", "namespace", namespace, "--ignore-not-found", f"--timeout={GONE_SECONDS}s")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def server(programs, port, key):
    """The server, as an operator starts it."""
    data = tempfile.mkdtemp()
    environment = {**os.environ, "API_KEY": key, "PORT": str(port), "GANTRY_DATA_DIR": data,
                   "GANTRY_NAMESPACE": OWN_NAMESPACE}
    log_path = pathlib.Path(data) / "server.out"
    with open(log_path, "w") as log:
        process = subprocess.Popen(
            [pathlib.Path(programs) / "gantry", "serve", "--platform", "kubernetes"],
            env=environment, stdout=log, stderr=log,
        )
        try:
            wait(f"http://127.0.0.1:{port}/readyz", process, log_path)
            say("$ gantry serve --platform kubernetes")
            say(re.sub(r"(?m)^\d\S+Z +|^ +data .*\n", "", log_path.read_text()).rstrip())
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            shutil.rmtree(data)


def wait(url, process, log):
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        time.sleep(0.1)


def pods():
    """Every pod with its state, restarts included; what is on its way out is not counted."""
    found = json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-o", "json"))["items"]
    found = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return {
        pod["metadata"]["name"]: (
            pod["status"]["phase"],
            all(c["ready"] for c in pod["status"].get("containerStatuses", [{"ready": False}])),
            sum(c["restartCount"] for c in pod["status"].get("containerStatuses", [])),
        )
        for pod in found
    }


def wrong_with(found):
    expected = [r"test-test", r"test-prod-(?!db-)[a-z0-9]+-[a-z0-9]+", r"test-prod-db-0"]
    names = sorted(found)
    missing = [name for name in expected if sum(bool(re.fullmatch(name, one)) for one in names) != 1]
    if missing or len(names) != len(expected):
        return f"expected one pod each of {expected}, found {names}"
    bad = {name: state for name, state in found.items() if state != ("Running", True, 0)}
    return f"expected Running, ready and 0 restarts: {bad}" if bad else None


def fetch(host=None):
    """The release, or what this host is, by way of the ingress controller."""
    address, port = INGRESS.rsplit(":", 1)
    with socket.create_connection((address, int(port)), timeout=10) as one:
        one.sendall(f"GET / HTTP/1.0\r\nHost: {host or HOST}\r\nConnection: close\r\n\r\n".encode())
        head, _, body = one.makefile("rb").read().partition(b"\r\n\r\n")
    return head.decode("latin-1").split("\r\n")[0], body.decode()


def eventually(check):
    """The error that `check` still returns in the end, or None."""
    end = time.monotonic() + SEEN_SECONDS
    while (error := check()) and time.monotonic() < end:
        time.sleep(0.2)
    return error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--programs", default=str(ROOT / "target" / "debug"), help="the folder with gantry")
    parser.add_argument("--keep", action="store_true", help="leave what was made in the cluster")
    options = parser.parse_args()
    key, port = secrets.token_urlsafe(24), free_port()
    forget()
    failures = []
    with server(options.programs, port, key):
        command = [ROOT / "scripts" / "test_backend.py", "--url", f"ws://127.0.0.1:{port}/ws/code"]
        say("\n$ python3 scripts/test_backend.py")
        done = subprocess.run([sys.executable, *command], env={**os.environ, "API_KEY": key},
                              capture_output=True, text=True, timeout=SCRIPT_SECONDS)
        say((done.stdout + done.stderr).rstrip())
        if done.returncode:
            failures.append(f"scripts/test_backend.py ended with {done.returncode}")
        failures.append(eventually(lambda: wrong_with(pods())))
        say(f"\n$ kubectl get pods -n {NAMESPACE}\n{kubectl('get', 'pods', '-n', NAMESPACE).rstrip()}")
        say(f"\n$ kubectl logs -l app=prod -n {NAMESPACE}")
        logs = kubectl("logs", "-l", "app=prod", "-n", NAMESPACE)
        say(logs.rstrip())
        if "Hello" not in logs:
            failures.append("the program's output is not in its pod's log")
        answer = lambda: None if fetch()[0].endswith("200 OK") else f"the ingress answered {fetch()[0]}"  # noqa: E731
        failures.append(eventually(answer))
        status, body = fetch()
        say(f"\n$ curl -i -H 'Host: {HOST}' http://the-ingress-controller/\n{status}\n{body.rstrip()}")
        if "Hello" not in body:
            failures.append(f"the release's page does not show what the program wrote: {body!r}")
    if not options.keep:
        forget()
    failures = [failure for failure in failures if failure]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
