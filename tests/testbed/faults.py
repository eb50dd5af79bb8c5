"""What the bed breaks on purpose, broken and mended: nodes, the network, the API server, Elasticsearch, a disk.

Uses the bed as every other test does: by scripts/testbed and what its `env` prints. The bed must be up.
"""

import base64
import errno
import json
import os
import pathlib
import subprocess
import time
import unittest
import urllib.parse
import urllib.request

TESTBED = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "testbed"
# One command of the bed; a node's restart takes 5 s, the start of Elasticsearch up to a minute.
COMMAND_SECONDS = 180
NOT_READY_SECONDS = 15  # a node that says nothing for 10 s is taken for lost; what the bed promises
READY_SECONDS = 20  # what the bed promises for a node that is switched on again
# After `part start` has returned, clients may need one more attempt; it has waited for readiness itself.
ANSWER_SECONDS = 10


def testbed(*arguments):
    done = subprocess.run(
        [TESTBED, *arguments], capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise AssertionError(f"scripts/testbed {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def environment():
    lines = subprocess.run(
        ["sh", "-c", 'eval "$1" && env -0', "sh", testbed("env")], capture_output=True, text=True, check=True
    ).stdout
    return dict(line.split("=", 1) for line in lines.split("\0") if line)


ENV = environment()


def kubectl(*arguments, seconds=30):
    done = subprocess.run(
        [ENV["TESTBED_KUBECTL"], *arguments], env=ENV, capture_output=True, text=True, timeout=seconds
    )
    if done.returncode != 0:
        raise OSError(f"kubectl {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-1000:]}")
    return done.stdout


def node_conditions():
    nodes = json.loads(kubectl("get", "nodes", "--output=json"))["items"]
    return {
        node["metadata"]["name"]: next(c["status"] for c in node["status"]["conditions"] if c["type"] == "Ready")
        for node in nodes
    }


def elasticsearch_health():
    host = urllib.parse.urlsplit(ENV["ELASTICSEARCH_HOST"])
    request = urllib.request.Request(f"http://{host.hostname}:{host.port}/_cluster/health")
    if host.username:  # `up --secure`
        login = base64.b64encode(f"{host.username}:{host.password}".encode()).decode()
        request.add_header("Authorization", f"Basic {login}")
    with urllib.request.urlopen(request, timeout=5) as answer:
        return json.load(answer)["status"]


def seconds_until(check, limit):
    """How long until check() is true; fails when it takes longer than the limit."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > limit:
            raise AssertionError(f"not within {limit} s")
        time.sleep(0.2)
    return time.monotonic() - began


class Nodes(unittest.TestCase):
    """A node that is lost, and one that cannot be reached. Each is whole again at the end of its test."""

    def setUp(self):
        self.node = sorted(node_conditions())[-1]
        seconds_until(lambda: node_conditions()[self.node] == "True", READY_SECONDS)

    def ready(self):
        return node_conditions()[self.node] == "True"

    def not_ready(self):
        return node_conditions()[self.node] != "True"

    def test_a_killed_node_is_noticed_and_comes_back(self):
        began = time.monotonic()
        testbed("node", "kill", self.node)
        seconds_until(self.not_ready, NOT_READY_SECONDS)
        gone = time.monotonic() - began
        began = time.monotonic()
        testbed("node", "restart", self.node)
        seconds_until(self.ready, READY_SECONDS)
        back = time.monotonic() - began
        print(f"\n{self.node}: NotReady {gone:.1f} s after the kill, Ready {back:.1f} s after the restart", flush=True)
        self.assertLessEqual(gone, NOT_READY_SECONDS)
        self.assertLessEqual(back, READY_SECONDS)

    def test_a_node_whose_cable_is_cut_is_noticed_and_heals(self):
        testbed("node", "cut", self.node)
        try:
            seconds_until(self.not_ready, NOT_READY_SECONDS)
        finally:
            testbed("node", "heal", self.node)
        back = seconds_until(self.ready, READY_SECONDS)
        print(f"\n{self.node}: Ready {back:.1f} s after its network healed", flush=True)

    def test_the_other_nodes_stay_ready(self):
        others = set(node_conditions()) - {self.node}
        testbed("node", "cut", self.node)
        try:
            seconds_until(self.not_ready, NOT_READY_SECONDS)
            conditions = node_conditions()
            self.assertEqual({name: conditions[name] for name in others}, {name: "True" for name in others})
        finally:
            testbed("node", "heal", self.node)
        seconds_until(self.ready, READY_SECONDS)


class Parts(unittest.TestCase):
    def test_the_api_server_stops_and_starts_and_has_forgotten_nothing(self):
        name = "testbed-faults"
        kubectl("create", "configmap", name, "--from-literal=kept=yes")
        self.addCleanup(kubectl, "delete", "configmap", name, "--ignore-not-found")
        testbed("part", "stop", "apiserver")
        try:
            with self.assertRaises(OSError):
                kubectl("get", "nodes", "--request-timeout=3s")
        finally:
            testbed("part", "start", "apiserver")
        seconds_until(lambda: answers(lambda: kubectl("get", "nodes")), ANSWER_SECONDS)
        self.assertEqual(json.loads(kubectl("get", "configmap", name, "--output=json"))["data"], {"kept": "yes"})

    def test_elasticsearch_stops_and_starts(self):
        self.assertIn(elasticsearch_health(), ("green", "yellow"))
        testbed("part", "stop", "elasticsearch")
        try:
            with self.assertRaises(OSError):
                elasticsearch_health()
        finally:
            testbed("part", "start", "elasticsearch")
        seconds_until(lambda: answers(elasticsearch_health), ANSWER_SECONDS)

    def test_s3_stops_and_starts(self):
        def refused():
            try:
                urllib.request.urlopen(ENV["AWS_ENDPOINT_URL"], timeout=5)
            except urllib.error.HTTPError as error:
                return error.code == 403  # it answers: an unsigned request is denied
            return False

        self.assertTrue(refused())
        testbed("part", "stop", "s3")
        try:
            with self.assertRaises(OSError):
                refused()
        finally:
            testbed("part", "start", "s3")
        self.assertTrue(refused())


def answers(ask):
    try:
        ask()
        return True
    except (OSError, subprocess.TimeoutExpired):
        return False


class Disk(unittest.TestCase):
    def test_a_full_disk_takes_nothing_until_it_is_freed(self):
        folder = pathlib.Path(testbed("disk", "make", "faults").strip())
        self.addCleanup(testbed, "disk", "remove", "faults")
        self.assertTrue(os.path.ismount(folder))
        (folder / "before").write_text("there")
        testbed("disk", "fill", "faults")
        with self.assertRaises(OSError) as full:
            (folder / "more").write_bytes(b"x" * 8192)
        self.assertEqual(full.exception.errno, errno.ENOSPC)
        self.assertEqual((folder / "before").read_text(), "there")
        testbed("disk", "free", "faults")
        (folder / "more").write_bytes(b"x" * 8192)


if __name__ == "__main__":
    unittest.main(verbosity=2)
