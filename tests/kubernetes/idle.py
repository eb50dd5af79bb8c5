"""Starts while the API server does not answer, many starts at once, and repls that nobody uses: stopped, and started
again by the next request that comes through the ingress. Two replicas of the server are there all the while.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/idle.py [--programs target/debug]
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("bench", "testbed", "kubernetes")]
import kubernetes as bed  # noqa: E402
import program_logs  # noqa: E402
import run  # noqa: E402
from bed import s3  # noqa: E402
from bed.settings import HOST, S3_BUCKET  # noqa: E402
from kubernetes import INGRESS, kubectl  # noqa: E402
from wsclient import WebSocket  # noqa: E402

PROGRAMS = str(ROOT / "target" / "debug")
# Long enough that nothing is idle while a start is looked at on a busy machine.
IDLE_SECONDS = 8
PATIENCE = 90
# More than one request to the API server is waited for (10 s), less than a start is tried (30 s).
AWAY_SECONDS = 14
MANY = 20
FLOOD = 60
OWN = f"gantry-idle-{uuid.uuid4().hex[:6]}"
USER = f"h-idle-{uuid.uuid4().hex[:6]}"
PEER_KEY = uuid.uuid4().hex
# Comes up late enough that somebody sees it come up.
SERVER = """
import http.server, time
print('warming up', flush=True)
time.sleep(2)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'served ' + self.headers.get('X-Test', '').encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(('', 3000), Handler).serve_forever()
"""


class FreezableWay(program_logs.Way):
    """A way to the API server that can be frozen: what is sent waits, as on a machine that does not come to answer."""

    def __init__(self, host, port):
        self.moves = threading.Event()
        self.moves.set()
        super().__init__(host, port)

    def carry(self, near):
        far = socket.create_connection(self.to)

        def pump(source, sink):
            try:
                while data := source.recv(1 << 16):
                    self.moves.wait()
                    sink.sendall(data)
            except OSError:
                pass
            for one in (near, far):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        other = threading.Thread(target=pump, args=(far, near), daemon=True)
        other.start()
        pump(near, far)
        other.join()
        near.close()
        far.close()


def put(repl, text, name="main.py"):
    s3.request("PUT", f"/{S3_BUCKET}/code/{repl}/{name}", text.encode())


def stored(repl, name):
    try:
        return s3.request("GET", f"/{S3_BUCKET}/code/{repl}/{name}").decode()
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return None


def call(server, path, body=None):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", None if body is None else json.dumps(body).encode(),
        {"X-API-Key": run.KEY, "Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def start(server, repl):
    return call(server, "/start", {"replId": repl, "userId": USER})


def terminal(*arguments, **options):
    """A connection to a runner, or None while there is none."""
    try:
        return WebSocket(*arguments, **options)
    except ConnectionError:
        return None


def told(server, repl):
    return call(server, f"/repls/{repl}")[1]


def host(repl):
    return f"{repl}.apps.localhost"


def visit(name, **headers):
    """What the ingress answers for a host: status, headers, text."""
    request = urllib.request.Request(f"http://{INGRESS}/", headers={"Host": name, **headers})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def eventually(what, check, pause=0.1):
    end = time.monotonic() + PATIENCE
    while not (found := check()):
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {PATIENCE} s")
        time.sleep(pause)
    return found


def happened(servers, repl, action):
    """How often the replicas' logs tell of this, all together."""
    count = 0
    for server in servers:
        found = program_logs.logs(server, repl_id=repl, limit=1_000)["records"]
        count += sum(record["event.action"] == action for record in found)
    return count


def template(folder):
    """The built-in one, with what the bed's ingress controller, unlike most, has to be told: requests keep their Host."""
    text = (ROOT / "infrastructure" / "service.yaml").read_text()
    head = "kind: Ingress\nmetadata:\n"
    assert head in text
    note = "  annotations: {zalando.org/skipper-filter: 'preserveHost(\"true\")'}\n"
    path = pathlib.Path(folder) / "service.yaml"
    path.write_text(text.replace(head, head + note))
    return str(path)


def way_to_the_servers(ports):
    """A Service without pods that leads to servers outside of the cluster, as `gantry` does to those inside."""
    addresses = [{"addresses": [HOST], "conditions": {"ready": True}}]
    metadata = {"name": "outside", "namespace": OWN}
    service = {"apiVersion": "v1", "kind": "Service", "metadata": metadata,
               "spec": {"ports": [{"name": "http", "port": 80, "protocol": "TCP"}]}}
    slices = [{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "endpoints": addresses,
               "metadata": {**metadata, "name": f"outside-{port}", "labels": {"kubernetes.io/service-name": "outside"}},
               "ports": [{"name": "http", "port": port, "protocol": "TCP"}]} for port in ports]
    kubectl("apply", "-f", "-", given=json.dumps({"apiVersion": "v1", "kind": "List", "items": [service, *slices]}))


class OnTheBed(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.data = [tempfile.mkdtemp() for _ in range(2)]
        to = urllib.parse.urlparse(json.loads(pathlib.Path(os.environ["KUBECONFIG"]).read_text())["clusters"][0]["cluster"]["server"])
        cls.way = FreezableWay(to.hostname, to.port)
        ports = [run.free_port() for _ in range(2)]
        common = {
            "GANTRY_PLATFORM": "kubernetes", "GANTRY_NAMESPACE": OWN, "HOST": "0.0.0.0", "GANTRY_CLEAN_UP": "off",
            "GANTRY_IDLE_STOP": f"{IDLE_SECONDS}s", "GANTRY_WAKE_SERVICE": "outside:80",
            "MANIFEST_TEMPLATE": template(cls.data[0]),
            # Each replica then tells of what it recorded itself.
            "ELASTICSEARCH_HOST": "",
            "GANTRY_PEERS": ",".join(f"127.0.0.1:{port}" for port in ports), "GANTRY_PEER_KEY": PEER_KEY,
        }
        cls.variables = [
            {**common, "GANTRY_REPLICA": "one", "KUBECONFIG": program_logs.kubeconfig(cls.data[0], cls.way, to)},
            {**common, "GANTRY_REPLICA": "two"},
        ]
        cls.servers = cls.started(ports)
        way_to_the_servers(ports)

    @classmethod
    def started(cls, ports):
        """Both at once: each is ready when it has heard of the other."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda one: run.Server(PROGRAMS, one[0], one[1].items(), one[2]), zip(cls.data, cls.variables, ports)))

    @classmethod
    def tearDownClass(cls):
        for server in cls.servers:
            server.stop()
        bed.forget(USER)
        kubectl("delete", "namespace", OWN, "--wait=false")
        for data in cls.data:
            shutil.rmtree(data)

    def setUp(self):
        self.one, self.two = self.servers
        self.repl = f"{USER}-{uuid.uuid4().hex[:4]}"

    def is_idle(self):
        return eventually("it is idle", lambda: (found := told(self.one, self.repl))["state"] == "idle" and found)

    def is_gone(self):
        """A pod that ends still answers for some seconds."""
        left = "deployment,service,ingress,secret,pod"
        gone = lambda: not kubectl("get", left, "-n", f"user-{USER}", "-l", f"gantry.dev/repl={self.repl}", "-o", "name")  # noqa: E731
        eventually("nothing of it is left in its namespace", gone)

    def woken(self):
        return happened(self.servers, self.repl, "repl.woken")

    def stop(self):
        self.assertEqual(call(self.two, "/stop", {"replId": self.repl}), (200, {"success": True}))
        left = kubectl("get", "ingress", "-A", "-o", "name")
        self.assertNotIn(self.repl, left)

    def test_a_start_waits_for_an_api_server_that_does_not_answer(self):
        put(self.repl, "print('Hello')")
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            self.way.moves.clear()
            try:
                began = time.monotonic()
                asked = pool.submit(start, self.one, self.repl)
                time.sleep(AWAY_SECONDS)
                self.assertFalse(asked.done(), asked.done() and asked.result())
            finally:
                self.way.moves.set()
            status, answer = asked.result(PATIENCE)
        self.assertEqual((status, answer.get("podCreated")), (200, True), answer)
        self.assertGreater(time.monotonic() - began, AWAY_SECONDS)
        deployments = json.loads(kubectl("get", "deployments", "-n", f"user-{USER}", "-l", f"gantry.dev/repl={self.repl}", "-o", "json"))
        self.assertEqual(len(deployments["items"]), 1)
        eventually("it serves", lambda: "Hello" in visit(host(self.repl))[2])
        self.stop()

    @unittest.skipUnless(os.environ.get("GANTRY_TEST_FULL"), "takes a minute")
    def test_a_start_does_not_wait_for_ever(self):
        put(self.repl, "print('Hello')")
        self.way.moves.clear()
        try:
            began = time.monotonic()
            status, answer = start(self.one, self.repl)
            waited = time.monotonic() - began
        finally:
            self.way.moves.set()
        self.assertEqual((status, answer["success"], answer["error"]["code"]), (500, False, "cluster_unavailable"), answer)
        self.assertTrue(30 <= waited < PATIENCE, waited)
        # What was asked for is asked for again.
        eventually("it starts", lambda: start(self.one, self.repl)[0] == 200, pause=1)
        self.stop()

    def test_many_starts_at_once_are_all_made(self):
        repls = [f"{self.repl}-{number}" for number in range(MANY)]
        for repl in repls:
            put(repl, "print('Hello')")
        with concurrent.futures.ThreadPoolExecutor(MANY) as pool:
            answers = list(pool.map(lambda repl: start(self.two, repl), repls))
            wrong = [answer for answer in answers if answer[0] != 200 or not answer[1]["podCreated"]]
            self.assertEqual(wrong, [])
            list(pool.map(lambda repl: call(self.two, "/stop", {"replId": repl}), repls))

    def test_a_request_through_the_ingress_wakes_an_idle_repl_once(self):
        put(self.repl, SERVER)
        self.assertEqual(start(self.one, self.repl)[0], 200)
        eventually("it serves", lambda: visit(host(self.repl))[0] == 200)
        found = self.is_idle()
        self.assertTrue(found["cause"].startswith("stopped: idle since "), found)
        eventually("it is recorded", lambda: happened(self.servers, self.repl, "repl.idle"))
        self.assertEqual(happened(self.servers, self.repl, "repl.idle"), 1)
        eventually("the other replica sees it", lambda: told(self.two, self.repl)["state"] == "idle")
        self.is_gone()
        # A stranger's name leads nowhere, and the runner's door wakes nothing.
        self.assertEqual(visit(host(f"{self.repl}x"))[0], 404)
        eventually("the ingress leads here", lambda: visit(f"{self.repl}.localhost")[0] == 503)
        self.assertEqual((told(self.one, self.repl)["state"], self.woken()), ("idle", 0))
        # Programs are held until they are answered, however many come.
        with concurrent.futures.ThreadPoolExecutor(FLOOD) as pool:
            answers = list(pool.map(lambda number: visit(host(self.repl), **{"X-Test": str(number)})[::2], range(FLOOD)))
        self.assertEqual(answers, [(200, f"served {number}") for number in range(FLOOD)])
        # Both servers may have been asked; one of them made it, once.
        eventually("it is recorded", self.woken)
        self.assertEqual(self.woken(), 1)
        pods = json.loads(kubectl("get", "pods", "-n", f"user-{USER}", "-l", f"gantry.dev/repl={self.repl}", "-o", "json"))["items"]
        self.assertEqual(len([pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]), 1)
        own = lambda: self.repl not in kubectl("get", "ingress", "-n", OWN, "-o", "name")  # noqa: E731
        eventually("requests go to the repl itself again", own)
        for _ in range(20):
            self.assertEqual(visit(host(self.repl))[0], 200)
        self.stop()

    def test_a_browser_sees_an_idle_repl_start_and_its_files_are_kept(self):
        put(self.repl, SERVER)
        self.assertEqual(start(self.two, self.repl)[0], 200)
        inside = (self.one.port, run.KEY, f"/repls/{self.repl}/terminal")
        ws = eventually("its terminal is there", lambda: terminal(*inside))
        ws.send({"id": 1, "op": "files.write", "path": "edited.txt", "text": "kept"})
        while ws.receive().get("id") != 1:
            pass
        # Somebody is there.
        time.sleep(IDLE_SECONDS + IDLE_SECONDS / 2)
        self.assertNotEqual(told(self.one, self.repl)["state"], "idle")
        ws.close()
        self.is_idle()
        self.is_gone()
        self.assertEqual(stored(self.repl, "edited.txt"), "kept")
        seen = []

        def served():
            status, headers, text = visit(host(self.repl), Accept="text/html")
            if status == 200:
                return text
            # Before the ingress has heard of it, the answer may be its own.
            if "from Gantry" in text or "<pre>" in text:
                self.assertEqual((status, "refresh" in text, "Retry-After" in headers), (503, True, True), text)
                seen.append(text)
            return None

        self.assertEqual(eventually("it is served", served), "served ")
        self.assertTrue(any("Nobody used it for a while" in text for text in seen), seen)
        # What a program writes while it starts is its owner's to read.
        self.assertFalse(any("warming up" in text for text in seen), seen)
        ws = WebSocket(self.two.port, run.KEY, f"/repls/{self.repl}/terminal")
        ws.send({"id": 1, "op": "files.read", "path": "edited.txt"})
        while (answer := ws.receive()).get("id") != 1:
            pass
        self.assertEqual(answer.get("text"), "kept", answer)
        ws.close()
        self.stop()

    def test_what_is_deleted_while_the_server_is_away_does_not_come_back(self):
        put(self.repl, "import time\ntime.sleep(3600)")
        put(self.repl, "mine", "given.txt")
        status, answer = start(self.one, self.repl)
        self.assertEqual(status, 200, answer)
        url = answer["terminalUrl"].removeprefix("ws://")
        name, path = url.split("/", 1)
        address, port = INGRESS.rsplit(":", 1)
        inside = {"path": f"/{path}", "host": address, "named": name}
        ws = eventually("its terminal is there", lambda: terminal(int(port), "", **inside))

        def ask(request):
            ws.send(request)
            while (found := ws.receive()).get("id") != request["id"]:
                pass
            self.assertTrue(found.get("ok"), found)

        ask({"id": 1, "op": "files.write", "path": "saved.txt", "text": "saved"})
        answered = call(self.one, f"/repls/{self.repl}/save", {})
        self.assertEqual(stored(self.repl, "saved.txt"), "saved", answered)
        for server in self.servers:
            server.process.kill()
            server.process.wait()
        for number, path in enumerate(("saved.txt", "given.txt")):
            ask({"id": 10 + number, "op": "files.delete", "path": path})
        self.servers[:] = self.started([server.port for server in self.servers])
        self.one, self.two = self.servers
        status, saved = call(self.one, f"/repls/{self.repl}/save", {})
        self.assertEqual(status, 200, saved)
        self.assertEqual((stored(self.repl, "saved.txt"), stored(self.repl, "given.txt")), (None, None))
        self.assertIsNotNone(stored(self.repl, "main.py"))
        ws.close()
        self.stop()


if __name__ == "__main__":
    if "--programs" in sys.argv:
        at = sys.argv.index("--programs")
        PROGRAMS = sys.argv[at + 1]
        del sys.argv[at:at + 2]
    unittest.main(verbosity=2)
