"""500 services of 4 replicas each on simulated nodes: what GET /state costs.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/many_services.py [--programs target/release] [--services 500]

Nodes, their Leases and what their kubelets say are written here; the controllers and the scheduler are real. The nodes
are tainted, so that nothing else is placed on them; for the same reason the Deployments are made here and not by
POST /service: Gantry knows its own by their labels. Figures, and an error when one misses its target: the times are
promised of a release build on a machine that does nothing else.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import http.client
import json
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "testbed"), str(ROOT / "tests" / "kubernetes")]
import services  # noqa: E402
from bed import api  # noqa: E402

REPLICAS = 4
PODS_OF_A_NODE = 110
# The controllers of Kubernetes hold back what they ask for: some minutes on a busy machine.
MADE_SECONDS = 600
GETS, ROUNDS = 500, 10
STATE_P99_MS, SERVER_MB = 50, 150
USER = f"w{services.RUN}"
NAMESPACE = f"services-{USER}"
TAINT = "gantry.dev/simulated"
# What a real kubelet of the bed does.
LEASE_SECONDS, BEAT_SECONDS = 8, 2
THREADS = 8


def node(number):
    room = {"cpu": "32", "memory": "256Gi", "pods": str(PODS_OF_A_NODE)}
    return {"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": f"simulated-{services.RUN}-{number}", "labels": {TAINT: services.RUN}},
            "spec": {"taints": [{"key": TAINT, "value": "true", "effect": "NoSchedule"}]},
            "status": {"allocatable": room, "capacity": room,
                       "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated", "message": "simulated"}]}}


def lease(name):
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name, "namespace": "kube-node-lease"},
            "spec": {"holderIdentity": name, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now}}


def deployment(number):
    name = f"service-{number}"
    labels = {"app.kubernetes.io/managed-by": "gantry", "gantry.dev/services-of": USER, "gantry.dev/user": USER,
              "gantry.dev/service": name}
    pod = {"nodeSelector": {TAINT: services.RUN}, "automountServiceAccountToken": False,
           "tolerations": [{"key": TAINT, "operator": "Exists"}],
           "containers": [{"name": "main", "image": "simulated:1"}]}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": NAMESPACE, "labels": labels},
            "spec": {"replicas": REPLICAS, "selector": {"matchLabels": {"gantry.dev/service": name}},
                     "template": {"metadata": {"labels": labels}, "spec": pod}}}


class Kubelets(threading.Thread):
    """Keeps the nodes alive, and says of every pod placed on them that it runs."""

    def __init__(self, names):
        super().__init__(daemon=True)
        self.names, self.stopped, self.failure = names, threading.Event(), None
        self.start()

    def run(self):
        try:
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                threading.Thread(target=self.beat, daemon=True).start()
                while not self.stopped.wait(1):
                    list(pool.map(self.runs, self.placed()))
        except Exception as error:  # told by whoever waits for the pods
            self.failure = error

    def beat(self):
        while not self.stopped.wait(BEAT_SECONDS):
            for name in self.names:
                api.apply(lease(name))

    def placed(self):
        pods = api.get(f"/api/v1/namespaces/{NAMESPACE}/pods?fieldSelector=status.phase%3DPending&limit=500")["items"]
        return [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName")]

    def runs(self, name):
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = {"phase": "Running", "startTime": now,
                  "conditions": [{"type": type_, "status": "True", "lastTransitionTime": now}
                                 for type_ in ("Initialized", "Ready", "ContainersReady")],
                  "containerStatuses": [{"name": "main", "image": "simulated:1", "imageID": "", "ready": True,
                                         "restartCount": 0, "state": {"running": {"startedAt": now}}}]}
        with contextlib.suppress(OSError):  # the API server is busy; the next round finds the pod again
            api.request("PATCH", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/status", {"status": status},
                        "application/strategic-merge-patch+json")


def memory(server, what):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+)", status)[1]) / 1024


def measure(server):
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    times, asked, size = [], [], 0
    # In rounds: a server also looks after other users' programs, and a watch begins again now and then.
    for _ in range(ROUNDS):
        before = server.requests()
        for _ in range(GETS // ROUNDS):
            begin = time.perf_counter()
            connection.request("GET", "/state", headers={"X-API-Key": server.key})
            body = connection.getresponse().read()
            times.append((time.perf_counter() - begin) * 1e3)
            size = len(body)
        asked.append(server.requests() - before)
    times.sort()
    return {"p50": times[GETS // 2], "p99": times[GETS * 99 // 100], "asked": min(asked), "size": size}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--programs", default=str(ROOT / "target" / "release"))
    parser.add_argument("--services", type=int, default=500)
    options = parser.parse_args()
    services.PROGRAMS = pathlib.Path(options.programs)
    wanted = options.services * REPLICAS
    nodes = [node(number) for number in range(-(-wanted // (PODS_OF_A_NODE - 10)))]
    server = services.Server()
    kubelets = None
    try:
        print(f"empty: {memory(server, 'VmRSS'):.0f} MB", flush=True)
        for one in nodes:
            api.apply(one)
            api.apply(lease(one["metadata"]["name"]))
        api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        kubelets = Kubelets([one["metadata"]["name"] for one in nodes])
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda number: api.apply(deployment(number)), range(options.services)))

        def all_run():
            if kubelets.failure:
                raise kubelets.failure
            own = [one for one in server.get("/service_state")["services"] if one["userId"] == USER]
            return len(own) == options.services and all(one["state"] == "running" for one in own)
        services.eventually("all run", all_run, MADE_SECONDS)
        print(f"{options.services} services x {REPLICAS} on {len(nodes)} simulated nodes, "
              f"running after {time.monotonic() - begin:.0f} s", flush=True)
        services.eventually("the server rests", lambda: rests(server))
        found = measure(server)
        rss, peak = memory(server, "VmRSS"), memory(server, "VmHWM")
        print(f"GET /state ({found['size'] / 1e3:.0f} kB): p50 {found['p50']:.1f} ms, p99 {found['p99']:.1f} ms "
              f"(target {STATE_P99_MS}); server {rss:.0f} MB, at most {peak:.0f} MB (target {SERVER_MB}); "
              f"{found['asked']} API requests for {GETS // ROUNDS} GETs (target 0)", flush=True)
        missed = found["p99"] > STATE_P99_MS or peak > SERVER_MB or found["asked"]
        return 1 if missed else 0
    finally:
        server.stop()
        shutil.rmtree(server.data)
        services.kubectl("delete", "deployments,replicasets", "--all", "-n", NAMESPACE, "--wait=false")
        if kubelets:
            kubelets.stopped.set()
            kubelets.join()
        # Nobody ends pods on nodes that are none, and two thousand take longer than one request may.
        services.eventually("the pods are gone", ended)
        services.kubectl("delete", "nodes", "-l", f"{TAINT}={services.RUN}", "--wait=false")
        for one in nodes:
            services.kubectl("delete", "lease", one["metadata"]["name"], "-n", "kube-node-lease", "--ignore-not-found")
        services.kubectl("delete", "namespace", NAMESPACE, f"gantry-w{services.RUN}", "--ignore-not-found", "--wait=false")
        services.kubectl("delete", "priorityclass", f"gantry-w{services.RUN}-services", "--ignore-not-found")


def ended():
    with contextlib.suppress(OSError):
        api.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods?gracePeriodSeconds=0")
        return not api.get(f"/api/v1/namespaces/{NAMESPACE}/pods?limit=1")["items"]
    return False


def rests(server):
    before = server.requests()
    time.sleep(2)
    return server.requests() == before



if __name__ == "__main__":
    sys.exit(main())
