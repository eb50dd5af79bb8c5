"""What a program depends on, in a cluster: installed in the user's test pod from an index that only the server reaches,
tested with, released as it was tested, and nothing else reached meanwhile.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/packages.py [--programs target/debug]

The bed has no network plugin that enforces policies: what keeps the installer to its index here is the runner.
"""

import argparse
import contextlib
import json
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "tests" / "kubernetes"))
sys.path.insert(0, str(ROOT / "tests" / "testbed"))
import backend  # noqa: E402
import test_backend  # noqa: E402
from bed import s3  # noqa: E402
from bed.settings import S3_BUCKET  # noqa: E402

USER = "packages"
REPL = f"{USER}-prod"
# What an earlier run's had installed is in the store still.
WORKSPACE = f"{USER}-{secrets.token_hex(3)}"
# The server's own objects; another run of these tests has others.
backend.OWN_NAMESPACE = "gantry-packages"
backend.NAMESPACE = f"user-{USER}"
backend.HOST = f"{REPL}.apps.localhost"

SHOWS = "import gantry_example; print(gantry_example.WORD)"
ASKS = "import gantry_curious; print(gantry_curious.SEEN)"


@contextlib.contextmanager
def index():
    with tempfile.TemporaryDirectory() as folder:
        script = ROOT / "tests" / "packages" / "index.py"
        process = subprocess.Popen([sys.executable, script, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()
            process.wait()


def submission(requirements, code, **more):
    return {"user_id": USER, "deploy": False, "database": False, "files": {"main.py": code, "requirements.txt": requirements}, **more}


def check(name, condition, told):
    print(f"{'ok  ' if condition else 'FAIL'} {name}", flush=True)
    if not condition:
        print(json.dumps(told, indent=1)[:4_000], flush=True)
    return condition


def released(what, repl=REPL):
    """Whether the page of the release, or of another repl, shows this, soon."""
    def shown():
        status, body = backend.fetch(f"{repl}.apps.localhost")
        return None if what in body else f"{status}\n{body}"
    return backend.eventually(shown)


def kept():
    """Whether what the workspace has installed is in the store, soon."""
    def there():
        try:
            s3.request("GET", f"/{S3_BUCKET}/code/{WORKSPACE}/.build.tar.gz")
            return None
        except OSError as error:
            return f"it is not in the store: {error}"
    return backend.eventually(there)


def post(server_port, key, path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{server_port}{path}", json.dumps(body).encode(),
                                     {"X-API-Key": key, "Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def checks(ask, index_port, server_port, key, stop_index):
    begun = time.monotonic()
    reply = ask(submission("gantry-example\n", SHOWS, deploy=True))
    print(f"installed, tested and released in {time.monotonic() - begun:.1f} s")
    yield check("what is named is installed, tested with and released", reply.get("status") == "deployed" and reply["stdout"] == "installed\n", reply)
    error = released("installed")
    yield check("the release has it", error is None, error)
    reply = ask(submission("gantry-nothing-like-it\n", ""))
    yield check("what is not there is the program's failure, in the installer's words",
                reply["status"] == "tests_failed" and reply["error"]["code"] == "packages_not_installed"
                and "No matching distribution" in reply["error"]["cause"], reply)
    failing = f"--index-url http://127.0.0.1:{index_port}/fail/503/simple\ngantry-example\n"
    reply = ask(submission(failing, SHOWS))
    yield check("an index that answers 503 is not the program's failure",
                reply["status"] == "unavailable" and reply["error"]["code"] == "package_index_unavailable", reply)
    reply = ask(submission(failing.replace("/503/", "/twice/"), SHOWS))
    yield check("one that is busy for a moment is asked again", reply.get("stdout") == "installed\n", reply)
    probe = {"PROBE_INDEX": f"127.0.0.1:{index_port}", "PROBE_SERVER": str(server_port), "PROBE_FOLDER": "/run/gantry/agent"}
    reply = ask(submission("gantry-curious\n", ASKS, env=probe))
    seen = json.loads(reply.get("stdout") or "{}")
    yield check("an installer reaches the index", seen.get("index") == "200", reply)
    yield check("and nothing else by way of it", (seen.get("server"), seen.get("metadata")) == ("403", "403"), reply)
    ways = ["direct server", "direct internet", "others' files", "shadow"]
    yield check("nor by itself", all(str(seen.get(way)).endswith("PermissionError") for way in ways), reply)
    yield check("and sees nothing of the server's", seen.get("own key") is False, reply)
    start = {"replId": WORKSPACE, "userId": USER, "files": {"main.py": SHOWS, "requirements.txt": "gantry-example\n"}}
    begun = time.monotonic()
    reply = post(server_port, key, "/start", start)
    error = released("Successfully installed gantry-example", WORKSPACE) or released("\ninstalled", WORKSPACE)
    print(f"a workspace started and its packages installed in {time.monotonic() - begun:.1f} s")
    yield check("a workspace installs what its file names", error is None, [reply, error])
    error = kept()
    yield check("what it has installed is kept", error is None, error)
    post(server_port, key, "/stop", {"replId": WORKSPACE})
    stop_index()
    reply = post(server_port, key, "/start", start)
    error = released("<pre>installed", WORKSPACE)
    yield check("it has it over a stop, without the index", error is None, [reply, error])
    begun = time.monotonic()
    reply = ask(submission("gantry-example\n", f"{SHOWS}; print(2)"))
    print(f"with what was installed before: {(time.monotonic() - begun) * 1_000:.0f} ms")
    yield check("the same is not installed again", reply.get("stdout") == "installed\n2\n", reply)
    reply = ask(submission("gantry-example==1.0\n", SHOWS))
    yield check("an index that is away is not the program's failure",
                reply["status"] == "unavailable" and reply["error"]["code"] == "package_index_unavailable", reply)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--programs", default=str(ROOT / "target" / "debug"), help="the folder with gantry")
    options = parser.parse_args()
    key, port = secrets.token_urlsafe(24), backend.free_port()
    backend.forget()
    with index() as (index_port, process):
        os.environ["GANTRY_ALLOW_PACKAGES"] = "true"
        os.environ["PIP_INDEX_URL"] = f"http://127.0.0.1:{index_port}/simple"
        with backend.server(options.programs, port, key):
            client = test_backend.WebSocket(f"ws://127.0.0.1:{port}/ws/code", key)
            passed = list(checks(client.ask, index_port, port, key, process.kill))
    backend.forget()
    if not all(passed):
        sys.exit(f"{passed.count(False)} of {len(passed)} checks failed")


if __name__ == "__main__":
    main()
