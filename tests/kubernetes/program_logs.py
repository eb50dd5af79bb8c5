"""What a released program writes is recorded once, line by line, also when the way to the API server breaks again
and again, when the server is killed and started again, and when one of two replicas after the other is killed; and
that the program's container was started again.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/program_logs.py [--programs target/debug]
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import select
import shutil
import socket
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import kubernetes as bed  # noqa: E402
import run  # noqa: E402

LINES = 1_000
# It writes for 20 s, and is cut off every second of them; some of them the server does not live.
PROGRAM = f"""
import http.server, threading, time
server = http.server.HTTPServer(('0.0.0.0', 3000), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for n in range({LINES}):
    print('line', n, flush=True)
    time.sleep(0.02)
time.sleep(3600)
"""
CUTS = 15
KILLED_AT = (4, 9)
AWAY_SECONDS = 1.5
# Two replicas are killed and started within the 20 s.
SECONDS_BETWEEN_KILLS = 4
# A log that broke off is asked for again after two seconds; the watches that say what runs take longer.
PATIENCE = 60


class Way:
    """A way to the API server whose connections can all be cut."""

    def __init__(self, host, port):
        self.to, self.open, self.lock = (host, port), set(), threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            near, _ = self.listener.accept()
            threading.Thread(target=self.carry, args=(near,), daemon=True).start()

    def carry(self, near):
        far = socket.create_connection(self.to)
        pair = (near, far)
        with self.lock:
            self.open.add(pair)
        try:
            while True:
                for one in select.select(pair, [], [])[0]:
                    data = one.recv(1 << 16)
                    if not data:
                        return
                    (far if one is near else near).sendall(data)
        except (OSError, ValueError):
            pass
        finally:
            with self.lock:
                self.open.discard(pair)
            near.close()
            far.close()

    def cut(self):
        with self.lock:
            pairs = list(self.open)
        for pair in pairs:
            for one in pair:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
        return len(pairs)


def kubeconfig(folder, way, server):
    config = json.loads(pathlib.Path(os.environ["KUBECONFIG"]).read_text())
    cluster = config["clusters"][0]["cluster"]
    cluster["server"] = f"https://127.0.0.1:{way.port}"
    cluster["tls-server-name"] = server.hostname
    path = pathlib.Path(folder) / "kubeconfig"
    path.write_text(json.dumps(config))
    path.chmod(0o600)
    return str(path)


def logs(server, **query):
    url = f"http://127.0.0.1:{server.port}/logs?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(urllib.request.Request(url, headers={"X-API-Key": run.KEY}), timeout=30) as answer:
        return json.load(answer)


def everything(server, after):
    """Every record of this test's repl behind this place: another's may still be going."""
    records = []
    while True:
        page = logs(server, after=after, limit=1_000, repl_id=f"{bed.USER}-prod")
        if not page["records"]:
            return records
        records += page["records"]
        after = page["next"]


def eventually(what, check):
    end = time.monotonic() + PATIENCE
    while not (found := check()):
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {PATIENCE} s")
        time.sleep(0.5)
    return found


def numbers(server, after):
    texts = "".join(r["message"] for r in everything(server, after) if r["event.action"] == "output.stdout" and "gantry.release" in r)
    return [int(n) for n in re.findall(r"^line (\d+)$", texts, re.MULTILINE)]


def deploy(server, user):
    reply = server.connect().ask(
        {"user_id": user, "code": PROGRAM, "database": False, "tests": {"test_ok.py": "def test_ok(): pass\n"}})
    assert reply["status"] == "deployed", reply


def each_once(server, begin):
    eventually("the last line", lambda: LINES - 1 in numbers(server, begin))
    found = numbers(server, begin)
    lost = sorted(set(range(LINES)) - set(found))
    assert found == list(range(LINES)), f"{len(lost)} lost ({lost[:20]} …), {len(found) - len(set(found))} twice"


def replicas(programs):
    """Both see what the program writes, and one records it, until it is killed."""
    user, data, ports = bed.USER, [tempfile.mkdtemp() for _ in range(2)], [run.free_port() for _ in range(2)]
    prefix = f"program-logs-{os.getpid()}"

    def start(index):
        return run.Server(programs, data[index], {
            "GANTRY_PLATFORM": "kubernetes", "GANTRY_NAMESPACE": f"gantry-{user}", "ELASTICSEARCH_INDEX_PREFIX": prefix,
            "GANTRY_REPLICA": f"replica-{index}", "GANTRY_PEER_KEY": "k" * 32,
            "GANTRY_PEERS": ",".join(f"127.0.0.1:{port}" for port in ports),
        }, ports[index])

    # None is ready before it knows the other.
    with concurrent.futures.ThreadPoolExecutor() as both:
        servers = list(both.map(start, (0, 1)))
    try:
        begin = logs(servers[0], limit=1)["next"]
        deploy(servers[0], user)
        for index in (0, 1):
            time.sleep(SECONDS_BETWEEN_KILLS)
            servers[index].process.kill()
            servers[index].process.wait()
            time.sleep(SECONDS_BETWEEN_KILLS)
            servers[index] = start(index)
        each_once(servers[0], begin)
        print(f"{LINES} lines, two replicas, each killed once: 0 lost, 0 twice", flush=True)
    finally:
        for server in servers:
            server.stop()
        for folder in data:
            shutil.rmtree(folder)
        bed.forget(user)
        bed.kubectl("delete", "namespace", f"gantry-{user}", "--ignore-not-found", "--wait=false")
        remove_indices(prefix)


def remove_indices(prefix):
    elastic = os.environ["ELASTICSEARCH_HOST"]
    with urllib.request.urlopen(f"{elastic}/_cat/indices/{prefix}-*?h=index", timeout=30) as answer:
        names = answer.read().decode().split()
    for path in [*names, *(f"_index_template/{prefix}-{name}" for name in ("logs", "journals"))]:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{elastic}/{path}", method="DELETE"), timeout=30).close()
        except urllib.error.HTTPError as error:
            # A test that failed early made no template.
            assert error.code == 404, error


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--programs", default=str(ROOT / "target" / "debug"))
    options = parser.parse_args()
    config = json.loads(pathlib.Path(os.environ["KUBECONFIG"]).read_text())
    address = urllib.parse.urlparse(config["clusters"][0]["cluster"]["server"])
    way = Way(address.hostname, address.port)
    user, data = bed.USER, tempfile.mkdtemp()
    variables = {
        "GANTRY_PLATFORM": "kubernetes", "KUBECONFIG": kubeconfig(data, way, address), "ELASTICSEARCH_HOST": "",
        "GANTRY_NAMESPACE": f"gantry-{user}",
    }
    server = run.Server(options.programs, data, variables)
    try:
        begin = logs(server, limit=1)["next"]
        deploy(server, user)
        cut = 0
        for number in range(CUTS):
            time.sleep(1)
            cut += way.cut()
            if number in KILLED_AT:
                server.process.kill()
                server.process.wait()
                time.sleep(AWAY_SECONDS)
                server = run.Server(options.programs, data, variables)
        assert cut >= CUTS, "there was nothing to cut"
        each_once(server, begin)
        print(f"{LINES} lines, {cut} connections cut, {len(KILLED_AT)} kills of the server: 0 lost, 0 twice", flush=True)
        pod = bed.kubectl("get", "pods", "-n", f"user-{user}", "-l", "app=prod", "-o", "name").strip()
        bed.kubectl("exec", "-n", f"user-{user}", pod, "--", "sh", "-c", "kill -TERM 1", check=False)
        restarted = eventually("the restart", lambda: [r for r in everything(server, begin) if r["event.action"] == "repl.restarted"])
        assert len(restarted) == 1 and "once" in restarted[0]["message"], restarted
        print(restarted[0]["message"])
        eventually("what it writes after the restart", lambda: numbers(server, begin).count(LINES - 1) == 2)
        assert numbers(server, begin) == 2 * list(range(LINES)), "after the restart it is not what it wrote"
    finally:
        server.stop()
        shutil.rmtree(data)
        # The next part makes them again.
        bed.forget(user, wait=True)
        bed.kubectl("delete", "namespace", f"gantry-{user}", "--ignore-not-found")
    replicas(options.programs)


if __name__ == "__main__":
    main()
