"""Services on the bed: made all or none, spread, told about, and brought back when a node is lost.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/services.py [--programs target/debug] [NAME...]

GANTRY_TEST_FULL=1: nodes are killed and cut off, too, which needs five of them: scripts/testbed up --nodes 5.
"""

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
import threading
import time
import unittest
import urllib.error
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "testbed"))
from bed.settings import PAUSE_IMAGE, RUNNER_IMAGE  # noqa: E402

PROGRAMS = ROOT / "target" / "debug"
KUBECTL = os.environ.get("TESTBED_KUBECTL", "kubectl")
FULL = bool(os.environ.get("GANTRY_TEST_FULL"))
# The server's own namespace and its users are of this run alone.
RUN = uuid.uuid4().hex[:6]
# The server looks at the cluster and fills its watches first.
START_SECONDS = 60
# Longest wait for what the cluster does by itself; far above every target.
PATIENCE = 90
# Between two looks at a state.
LOOK = 0.1
# What is promised (a lost node's replicas elsewhere; a restarted node at work), on an idle machine.
BACK_SECONDS = 20
RESTARTED_SECONDS = 30
SCALE_RATIO = 1.2
NO_IMAGE = "localhost/no/such:1"


def say(text):
    print(text, flush=True)


def kubectl(*arguments, check=True):
    done = subprocess.run([KUBECTL, *arguments], capture_output=True, text=True, timeout=PATIENCE)
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def testbed(*words):
    subprocess.run([ROOT / "scripts" / "testbed", *words], check=True, timeout=PATIENCE, capture_output=True)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """The server as an operator starts it."""

    def __init__(self):
        self.data = tempfile.mkdtemp()
        self.key = secrets.token_urlsafe(24)
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = pathlib.Path(self.data) / "server.out"
        self.start()

    def start(self):
        environment = {**os.environ, "API_KEY": self.key, "PORT": self.url.rsplit(":", 1)[1],
                       "GANTRY_DATA_DIR": self.data, "GANTRY_NAMESPACE": f"gantry-w{RUN}",
                       # It asks the API server now and then, which would be counted.
                       "GANTRY_CLEAN_UP": "off"}
        with open(self.log, "a") as log:
            self.process = subprocess.Popen([PROGRAMS / "gantry", "serve", "--platform", "kubernetes"],
                                            env=environment, stdout=log, stderr=log)
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                if self.ask("GET", "/readyz")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(LOOK)

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def ask(self, method, path, body=None, key=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"X-API-Key": key or self.key}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def get(self, path, key=None):
        end = time.monotonic() + PATIENCE
        status, body = self.ask("GET", path, key=key)
        # Hundreds at once are more than one caller gets on a fast machine; the answer says when to come again.
        while status == 429 and time.monotonic() < end:
            time.sleep(1)
            status, body = self.ask("GET", path, key=key)
        if status != 200:
            raise RuntimeError(f"GET {path}: {status} {body}")
        return body

    def requests(self):
        """Requests that the server has made to the API server, streams and watches included."""
        request = urllib.request.Request(self.url + "/metrics", headers={"X-API-Key": self.key})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            found = re.search(r"(?m)^gantry_cluster_requests_total (\S+)$", answer.read().decode())
        return int(float(found[1]))

    def user_key(self, user):
        made = subprocess.run([PROGRAMS / "gantry", "key", "create", "--user", user, "-o", "json"], check=True,
                              capture_output=True, timeout=PATIENCE, env={**os.environ, "GANTRY_DATA_DIR": self.data})
        key = json.loads(made.stdout)["key"]
        eventually("the new key works", lambda: self.ask("GET", "/session", key=key)[0] == 200)
        return key


def eventually(what, is_so, seconds=PATIENCE):
    """Waits until it is so, and returns how long that took."""
    begin = time.monotonic()
    while not is_so():
        if time.monotonic() - begin > seconds:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(LOOK)
    return time.monotonic() - begin


def service(name, replicas, image=PAUSE_IMAGE, **more):
    return {"serviceName": name, "replicas": replicas, "container": {"name": "main", "image": image, **more}}


SERVER = None


def setUpModule():
    global SERVER
    SERVER = Server()


def tearDownModule():
    SERVER.stop()
    kubectl("delete", "namespace", f"gantry-w{RUN}", "--ignore-not-found", "--wait=false")
    kubectl("delete", "priorityclass", f"gantry-w{RUN}-services", "--ignore-not-found")
    shutil.rmtree(SERVER.data)


class Services(unittest.TestCase):
    def setUp(self):
        self.user = f"w{uuid.uuid4().hex[:8]}"
        self.namespace = f"services-{self.user}"
        self.addCleanup(kubectl, "delete", "namespace", self.namespace, "--ignore-not-found", "--wait=false")

    def post(self, *services, **more):
        return SERVER.ask("POST", "/service", {"services": list(services), "userId": self.user, **more})

    def made(self, *services):
        status, answer = self.post(*services)
        self.assertEqual(status, 200, answer)
        return [one["outcome"] for one in answer["services"]]

    def service(self, name):
        own = [one for one in SERVER.get("/service_state")["services"]
               if (one["userId"], one["serviceName"]) == (self.user, name)]
        self.assertLessEqual(len(own), 1, own)
        return own[0] if own else None

    def containers(self, name):
        return [one for one in SERVER.get("/container_state")["containers"]
                if (one["userId"], one["service"]) == (self.user, name)]

    def running(self, name, count):
        def is_so():
            found = self.service(name)
            return found and (found["current_state"], found["replicas"], found["state"]) == (count, count, "running")
        return eventually(f"{name} runs with {count}", is_so)

    def events(self, name):
        return SERVER.get(f"/service/{name}/events?userId={self.user}")["events"]

    def objects(self):
        """What of services is in the cluster, checks of images included."""
        found = kubectl("get", "deployments,pods", "-n", self.namespace, "-o", "name", "--ignore-not-found")
        return found.split()


class Asked(Services):
    def test_a_wrong_field_is_named_and_nothing_is_made(self):
        good = service("good", 1)
        cases = [(service("a", 0), "services[1].replicas"), (service("a", -1), "services[1].replicas"),
                 (service("a", 10_001), "services[1].replicas"), (service("a", 1.5), "services[1].replicas"),
                 (service("good", 2), "services[1].serviceName"), (service("A_b", 1), "services[1].serviceName"),
                 (service("", 1), "services[1].serviceName"), (service("x" * 51, 1), "services[1].serviceName"),
                 (service("a.b", 1), "services[1].serviceName"), (service("a", 1, "no image"), "services[1].container.image"),
                 (service("a", 1, ""), "services[1].container.image"),
                 ({"serviceName": "a", "replicas": 1}, "services[1].container"),
                 ({**service("a", 1), "replica": 2}, "services[1].replica"),
                 ({"serviceName": "a", "container": good["container"]}, "services[1].replicas")]
        for bad, field in cases:
            status, problem = self.post(good, bad)
            self.assertEqual((status, problem["field"]), (400, field), problem)
            self.assertTrue(problem["cause"] and problem["remediation"], problem)
        self.assertEqual(self.objects(), [])
        self.assertIsNone(self.service("good"))
        # The control: without the bad one it is made.
        self.assertEqual(self.made(good), ["created"])
        self.running("good", 1)

    def test_an_image_that_does_not_exist_is_a_wrong_field_and_nothing_is_made(self):
        begin = time.monotonic()
        status, problem = self.post(service("good", 1), service("bad", 3, NO_IMAGE))
        say(f"an image that does not exist is refused after {time.monotonic() - begin:.1f} s: {problem['detail']}")
        self.assertEqual((status, problem["field"]), (400, "services[1].container.image"), problem)
        self.assertIn(NO_IMAGE, problem["detail"])
        eventually("nothing is left of the check", lambda: self.objects() == [])
        # A service that runs goes on with what it has.
        self.made(service("good", 1))
        self.running("good", 1)
        before = [one["container"] for one in self.containers("good")]
        self.assertEqual(self.post(service("good", 1, NO_IMAGE))[0], 400)
        self.assertEqual([one["container"] for one in self.containers("good")], before)
        self.assertEqual(self.service("good")["state"], "running")

    def test_posting_again_scales_and_changes_and_deleting_leaves_nothing(self):
        self.assertEqual(self.made(service("shop", 3), service("till", 1)), ["created", "created"])
        self.running("shop", 3)
        self.running("till", 1)
        self.assertEqual(self.made(service("shop", 3)), ["unchanged"])
        self.assertEqual(self.made({"serviceName": "shop", "replicas": 5}), ["rescaled"])
        self.running("shop", 5)
        nodes = {one["node"] for one in self.containers("shop")}
        self.assertGreater(len(nodes), 1, "five replicas are on one node")
        self.assertEqual(self.made(service("shop", 2)), ["rescaled"])
        self.running("shop", 2)
        changed = service("shop", 2, RUNNER_IMAGE, command=["sleep", "1000"])
        self.assertEqual(self.made(changed), ["updated"])
        self.running("shop", 2)
        eventually("all run the new image", lambda: [one["image"] for one in self.containers("shop")] == [RUNNER_IMAGE] * 2)
        told = [one["event"] for one in self.events("shop")]
        for word in ("created", "placed", "started", "scaled", "updated", "stopped"):
            self.assertIn(word, told)
        for name in ("shop", "till"):
            self.assertEqual(SERVER.ask("DELETE", f"/service/{name}?userId={self.user}"),
                             (200, {"success": True, "serviceName": name}))
        self.assertIsNone(self.service("shop"))
        self.assertEqual(SERVER.ask("DELETE", f"/service/shop?userId={self.user}")[0], 404)
        self.assertEqual(SERVER.ask("GET", f"/service/shop/events?userId={self.user}")[0], 404)
        eventually("nothing is left", lambda: self.objects() == [] and not self.containers("shop"))

    def test_a_key_sees_and_changes_its_own_and_nothing_else(self):
        key, other = SERVER.user_key(self.user), SERVER.user_key(f"{self.user}-b")
        status, answer = SERVER.ask("POST", "/service", {"services": [service("mine", 1)]}, key=key)
        self.assertEqual(status, 200, answer)
        self.running("mine", 1)
        own = SERVER.get("/state", key=key)
        self.assertEqual(sorted(own), ["containers", "nodes", "services"])
        self.assertEqual((own["nodes"], len(own["containers"]), len(own["services"])), ([], 1, 1))
        for name in ("container", "service", "node", "image", "state", "reason", "since"):
            self.assertIn(name, own["containers"][0])
        for name in ("serviceName", "replicas", "current_state", "state"):
            self.assertIn(name, own["services"][0])
        self.assertEqual(SERVER.get("/state", key=other), {"nodes": [], "containers": [], "services": []})
        self.assertEqual(SERVER.get("/node_state", key=key), {"nodes": []})
        nodes = SERVER.get("/node_state")["nodes"]
        self.assertGreater(len(nodes), 1)
        for name in ("node", "state", "last_heartbeat"):
            self.assertIn(name, nodes[0])
        for method, path in [("DELETE", "/service/mine"), ("GET", "/service/mine/events"),
                             ("DELETE", f"/service/mine?userId={self.user}")]:
            self.assertEqual(SERVER.ask(method, path, key=other)[0], 404, path)
        body = {"services": [service("theirs", 1)], "userId": self.user}
        self.assertEqual(SERVER.ask("POST", "/service", body, key=other)[0], 403)
        self.assertEqual(SERVER.ask("GET", "/service/mine/events", key=key)[0], 200)

    def test_a_job_that_is_done_and_one_that_crashes_are_told_apart(self):
        self.made(service("done", 1, RUNNER_IMAGE, command=["true"]),
                  service("crash", 1, RUNNER_IMAGE, command=["sh", "-c", "echo no such thing >&2; exit 3"]))

        def state(name, wanted):
            found = self.containers(name)
            return found and found[0]["state"] == wanted and found[0]["restarts"] > 0
        for name, wanted, words in [("done", "completed", ["exit code 0"]),
                                    ("crash", "failed", ["exit code 3", "no such thing"])]:
            eventually(f"{name} is {wanted}", lambda: state(name, wanted))  # noqa: B023
            found = self.service(name)
            self.assertEqual(found["state"], wanted, found)
            for part in words:
                self.assertIn(part, found["reason"])

    def test_the_state_routes_ask_the_api_server_nothing(self):
        self.made(service("quiet", 2))
        self.running("quiet", 2)
        eventually("the server rests", self.rests)
        # A watch that begins again in the middle is one request; five hundred questions that cost one each are more.
        self.assertIn(0, [self.asked_for_states() for _ in range(3)])
        # The control: what does ask is counted.
        before = SERVER.requests()
        self.made(service("quiet", 1))
        self.assertGreater(SERVER.requests(), before)

    def asked_for_states(self):
        before = SERVER.requests()
        for _ in range(100):
            for path in ("/state", "/node_state", "/container_state", "/service_state"):
                SERVER.get(path)
            self.events("quiet")
        return SERVER.requests() - before

    def rests(self):
        before = SERVER.requests()
        time.sleep(2)
        return SERVER.requests() == before

    def test_the_command_line_does_the_same(self):
        def gantry(*words, status=0, given=None):
            environment = {**os.environ, "API_KEY": SERVER.key, "GANTRY_SERVER": SERVER.url, "GANTRY_USER": self.user}
            done = subprocess.run([PROGRAMS / "gantry", "service", *words], capture_output=True, text=True,
                                  input=given, timeout=PATIENCE, env=environment)
            self.assertEqual(done.returncode, status, done)
            return done.stdout + (done.stderr if status else "")
        body = f"services:\n- serviceName: cli\n  replicas: 2\n  container: {{name: main, image: '{PAUSE_IMAGE}'}}\n"
        self.assertEqual(gantry("apply", "-f", "-", given=body), "cli created replicas=2\n")
        self.running("cli", 2)
        self.assertRegex(gantry("ls"), r"cli +\S+ +running +2/2")
        self.assertEqual(gantry("scale", "cli", "1"), "cli rescaled replicas=1\n")
        self.running("cli", 1)
        self.assertIn("services[0].replicas", gantry("scale", "cli", "-1", status=1))
        self.assertRegex(gantry("events", "cli"), r"placed +.*cli-\S+ +node-\d")
        gantry("rm", "cli")
        self.assertEqual(json.loads(gantry("ls", "-o", "json")), [])


    def test_the_page_shows_scales_and_deletes(self):
        self.made(service("page", 3))
        self.running("page", 3)
        environment = {**os.environ, "GANTRY_URL": SERVER.url, "API_KEY": SERVER.key,
                       "GANTRY_SERVICE": f"{self.user}/page"}
        done = subprocess.run(["node", ROOT / "tests" / "browser" / "services.mjs"], capture_output=True, text=True,
                              timeout=3 * PATIENCE, env=environment)
        say(done.stdout.rstrip())
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        eventually("nothing is left", lambda: self.objects() == [])


class Watcher:
    """Looks at a service all the time: the most that ever counted as ready, and when it had what."""

    def __init__(self, test, name):
        self.test, self.name, self.seen, self.stopped = test, name, [], threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self):
        while not self.stopped.is_set():
            found = self.test.service(self.name)
            self.seen.append((time.monotonic(), found["current_state"], found["state"]))
            self.stopped.wait(LOOK / 2)

    def stop(self):
        self.stopped.set()
        self.thread.join()

    def most(self):
        return max(count for _, count, _ in self.seen)


@unittest.skipUnless(FULL, "GANTRY_TEST_FULL is not set")
class Lost(Services):
    """What is lost and comes back. Nodes of the bed die here."""

    def setUp(self):
        super().setUp()
        nodes = sorted(one["node"] for one in SERVER.get("/node_state")["nodes"])
        self.assertGreaterEqual(len(nodes), 5, "scripts/testbed up --nodes 5")
        self.nodes = nodes[:5]
        # Twelve on three nodes are four on each.
        self.addCleanup(kubectl, "uncordon", *self.nodes)
        kubectl("cordon", *nodes[3:])
        self.made(service("shop", 12))
        self.running("shop", 12)
        kubectl("uncordon", *self.nodes)
        on = [one["node"] for one in self.containers("shop")]
        self.lost = next(node for node in nodes[:3] if on.count(node) == 4)

    def lose(self, action):
        """Loses the node, and waits until all twelve are ready without it."""
        watcher = Watcher(self, "shop")
        try:
            begin = time.monotonic()
            testbed("node", action, self.lost)
            eventually("the node counts as failed", lambda: self.state_of(self.lost) == "failed")
            failed = time.monotonic() - begin
            condition = kubectl("get", "node", self.lost, "-o",
                                "jsonpath={.status.conditions[?(@.type=='Ready')].status}")
            eventually("some are missed", lambda: self.service("shop")["current_state"] < 12)
            self.running("shop", 12)
            back = time.monotonic() - begin
            time.sleep(2)
        finally:
            watcher.stop()
        say(f"node {action}: failed after {failed:.1f} s (Kubernetes said Ready={condition}), "
            f"all 12 ready after {back:.1f} s, most ever ready {watcher.most()}")
        self.assertEqual(watcher.most(), 12)
        told = self.events("shop")
        for event in told[-14:]:
            say("  " + " ".join(str(event.get(part, "")) for part in ("time", "event", "container", "node", "message", "duration_ms")))
        words = [one["event"] for one in told]
        after = words[words.index("node_lost"):]
        self.assertEqual([after.count(word) for word in ("node_lost", "rescheduled", "recovered")], [1, 4, 1], after)
        self.assertEqual(condition, "True", "the node was failed no sooner than Kubernetes said so")
        self.assertLessEqual(back, BACK_SECONDS)
        self.assertNotIn(self.lost, [one["node"] for one in self.containers("shop") if one["state"] == "running"])

    def state_of(self, node):
        return next(one["state"] for one in SERVER.get("/node_state")["nodes"] if one["node"] == node)

    def test_a_killed_node_costs_nothing_and_takes_new_containers_when_it_is_back(self):
        self.addCleanup(testbed, "node", "restart", self.lost)
        self.lose("kill")
        begin = time.monotonic()
        testbed("node", "restart", self.lost)
        self.made(service("shop", 15))

        def takes():
            return any(one["node"] == self.lost and one["state"] == "running" for one in self.containers("shop"))
        # New containers go where there are the fewest; what waits elsewhere was placed before.
        while not takes():
            self.assertLess(time.monotonic() - begin, PATIENCE, "the restarted node takes nothing")
            replicas = self.service("shop")["replicas"]
            if self.service("shop")["state"] == "running":
                self.made(service("shop", replicas + 1))
            time.sleep(LOOK)
        took = time.monotonic() - begin
        say(f"node restarted: takes new containers after {took:.1f} s")
        self.assertLessEqual(took, RESTARTED_SECONDS)

    def test_a_node_that_was_cut_off_is_healed_without_a_double(self):
        self.addCleanup(testbed, "node", "heal", self.lost)
        self.lose("cut")
        watcher = Watcher(self, "shop")
        try:
            testbed("node", "heal", self.lost)
            took = eventually("the node is healthy", lambda: self.state_of(self.lost) == "healthy")
            gone = eventually("what ran there is stopped",
                              lambda: self.lost not in [one["node"] for one in self.containers("shop")])
        finally:
            watcher.stop()
        say(f"healed: healthy after {took:.1f} s, the old containers gone after {gone:.1f} s more, "
            f"most ever ready {watcher.most()}")
        self.assertEqual(watcher.most(), 12)
        self.assertEqual({count for _, count, _ in watcher.seen}, {12})
        pods = json.loads(kubectl("get", "pods", "-n", self.namespace, "-o", "json"))["items"]
        self.assertEqual(len(pods), 12)

    def test_the_view_is_right_again_after_the_api_server_was_away(self):
        testbed("part", "stop", "apiserver")
        try:
            eventually("it is said that the view is old", lambda: "stale_since" in SERVER.get("/state"))
            time.sleep(15)
            state = SERVER.get("/state")
            self.assertEqual({one["state"] for one in state["nodes"]}, {"healthy"}, "nodes fail with the API server")
            self.assertEqual(self.service("shop")["current_state"], 12)
        finally:
            testbed("part", "start", "apiserver")
        # Changed by somebody else, and told once the watches are back.
        kubectl("scale", "deployment/shop", "-n", self.namespace, "--replicas=4")
        self.running("shop", 4)
        eventually("the view is as it is", lambda: "stale_since" not in SERVER.get("/state"))
        self.assertNotIn("node_lost", [one["event"] for one in self.events("shop")])


@unittest.skipUnless(FULL, "GANTRY_TEST_FULL is not set")
class Slow(Services):
    def test_what_does_not_start_within_a_minute_is_failed_and_replaced(self):
        self.made(service("stuck", 1))
        self.running("stuck", 1)
        # Somebody changes the image past Gantry, which would have refused it.
        kubectl("set", "image", "deployment/stuck", f"main={NO_IMAGE}", "-n", self.namespace)

        def new():
            return [one for one in self.containers("stuck") if one["image"] == NO_IMAGE]
        eventually("the new container is explained", lambda: new() and "cannot be had" in (new()[0]["reason"] or ""))
        first = new()[0]
        self.assertEqual(first["state"], "in_queue", first)
        begin = time.monotonic()
        eventually("it is failed, or another took its place",
                   lambda: new() and (new()[0]["state"] == "failed" or new()[0]["container"] != first["container"]))
        eventually("another took its place", lambda: new() and new()[-1]["container"] != first["container"])
        say(f"a container that cannot start was replaced {time.monotonic() - begin:.1f} s after it was explained")
        told = {one["event"]: one for one in self.events("stuck") if one.get("container") == first["container"]}
        self.assertIn("cannot be had", told["failed"]["message"])
        self.assertIn("replaced", told)
        self.assertGreaterEqual(told["failed"]["duration_ms"], 58_000)
        # The old one serves on meanwhile.
        self.assertEqual(self.service("stuck")["current_state"], 1)

    def test_scaling_takes_as_long_as_kubectl_takes(self):
        self.made(service("ours", 3), service("theirs", 3))
        self.running("ours", 3)
        self.running("theirs", 3)

        def ours(count):
            self.made({"serviceName": "ours", "replicas": count})
            self.running("ours", count)

        def theirs(count):
            kubectl("scale", "deployment/theirs", f"--replicas={count}", "-n", self.namespace)
            kubectl("rollout", "status", "deployment/theirs", "-n", self.namespace)
        took = {ours: [], theirs: []}
        for _ in range(3):
            for way in (ours, theirs):
                begin = time.monotonic()
                for count in (30, 5):
                    way(count)
                took[way].append(time.monotonic() - begin)
                way(3)
                eventually("the others are gone", lambda: len(self.objects()) == 2 + 6)
        a, b = (sorted(times)[1] for times in (took[ours], took[theirs]))
        say(f"scale 3 → 30 → 5: {a:.2f} s, kubectl {b:.2f} s, ratio {a / b:.2f}")
        self.assertLessEqual(a, SCALE_RATIO * b)

    def test_a_server_started_anew_knows_the_same(self):
        self.made(service("kept", 3))
        self.running("kept", 3)
        before = (self.service("kept"), sorted(one["container"] for one in self.containers("kept")))
        SERVER.stop()
        SERVER.start()
        after = (self.service("kept"), sorted(one["container"] for one in self.containers("kept")))
        self.assertEqual(after, before)
        told = [one["event"] for one in self.events("kept")]
        self.assertEqual(sorted(set(told)), ["created", "placed", "started"])


if __name__ == "__main__":
    if "--programs" in sys.argv:
        at = sys.argv.index("--programs")
        PROGRAMS = pathlib.Path(sys.argv[at + 1])
        del sys.argv[at:at + 2]
    unittest.main(verbosity=2)
