"""Measures the Kubernetes platform on the bed, against kubectl doing the same by hand, in pairs.

    eval "$(scripts/testbed env)"; python3 tests/bench/kubernetes.py

Pairs are interleaved, so that a machine whose speed drifts slows both sides. Figures, not verdicts: a
target that is missed is marked and does not fail the run; a wrong answer does.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import uuid

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import run  # noqa: E402
from run import HELLO, KEY, quantile, row, timed  # noqa: E402

KUBECTL = os.environ.get("TESTBED_KUBECTL", "kubectl")
INGRESS = os.environ.get("TESTBED_INGRESS", "127.0.0.1:80")
USER = f"bench-{uuid.uuid4().hex[:6]}"
# Longest wait for anything the cluster does here; far above every target.
PATIENCE_S = 120


def kubectl(*arguments, given=None, check=True):
    done = subprocess.run(
        [KUBECTL, *arguments], input=given, capture_output=True, text=True, timeout=PATIENCE_S
    )
    if check and done.returncode:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def forget(user, wait=False):
    kubectl("delete", "namespace", f"user-{user}", f"--wait={str(wait).lower()}", "--ignore-not-found")


def ingress(host):
    """The status and body of GET / by way of the ingress controller, or None."""
    address, port = INGRESS.rsplit(":", 1)
    try:
        with socket.create_connection((address, int(port)), timeout=5) as s:
            s.sendall(f"GET / HTTP/1.0\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = s.makefile("rb").read()
            return int(answer.split()[1]), answer
    except (OSError, IndexError, ValueError):
        return None


def wait_for_page(host, text=b""):
    end = time.time() + PATIENCE_S
    while True:
        answer = ingress(host)
        if answer and answer[0] == 200 and text in answer[1]:
            return
        assert time.time() < end, f"{host} never answered 200: {answer}"
        time.sleep(0.005)


class Exec:
    """One kube-rs exec per line that it is sent; answers with milliseconds."""

    def __init__(self, namespace, pod):
        listed = subprocess.run(
            ["cargo", "test", "--test", "kubernetes", "--no-run", "--message-format", "json"],
            capture_output=True, text=True, check=True,
        ).stdout
        messages = [json.loads(line) for line in listed.splitlines()]
        program = next(m["executable"] for m in messages
                       if m.get("executable") and m["target"]["name"] == "kubernetes")
        self.process = subprocess.Popen(
            [program, "--ignored", "--exact", "--nocapture", "bench::one_exec_for_each_line"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "BENCH_NAMESPACE": namespace, "BENCH_POD": pod},
        )

    def ask(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while True:
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError("the exec program ended")
            if line.startswith("ms "):
                return float(line.split()[1])

    def stop(self):
        self.process.stdin.close()
        self.process.wait(30)


def requests(server):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers={"X-API-Key": KEY})
    with urllib.request.urlopen(request, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("gantry_cluster_requests_total "):
                return int(float(line.split()[1]))
    raise RuntimeError("gantry_cluster_requests_total is not among the metrics")


# Run inside the pod: what a fresh interpreter costs there.
COLD = """
import subprocess, sys, time
for _ in range(int(sys.argv[1])):
    begin = time.perf_counter()
    done = subprocess.run(['python3', '/run/hello.py'], capture_output=True)
    print((time.perf_counter() - begin) * 1e3)
    assert done.stdout == b'Hello\\n', done
"""


def latency(server, rounds):
    namespace, pod = f"user-{USER}", f"{USER}-test"
    message = {"user_id": USER, "code": HELLO, "deploy": False}
    ws = server.connect()
    for _ in range(20):
        ws.ask(message)
    # Not in a folder of the runs': those are emptied after each.
    kubectl("exec", "-n", namespace, pod, "--", "bash", "-c", f"echo \"{HELLO}\" > /run/hello.py")
    plain = Exec(namespace, pod)
    plain.ask()
    ours, by_kubectl, by_exec, cold, asked = [], [], [], [], 0
    for _ in range(rounds):
        took, out = timed(lambda: kubectl("exec", "-n", namespace, pod, "--", "python3", "-c", HELLO))
        assert out == "Hello\n", out
        by_kubectl.append(took * 1e3)
        by_exec.append(plain.ask())
        cold += [float(line) for line in
                 kubectl("exec", "-n", namespace, pod, "--", "python3", "-c", COLD, "5").split()]
        before = requests(server)
        for _ in range(20):
            took, reply = timed(lambda: ws.ask(message))
            assert reply["status"] == "tests_passed" and reply["stdout"] == "Hello\n", reply
            ours.append(took * 1e3)
        asked += requests(server) - before
    plain.stop()
    ws.close()
    p50, p99 = quantile(ours, 0.5), quantile(ours, 0.99)
    for name, base, part in [("kubectl exec", by_kubectl, 40), ("a kube-rs exec", by_exec, 25),
                             ("python3 hello.py in the pod", cold, 3)]:
        b50 = quantile(base, 0.5)
        row(f"hello, frame → reply, p50, against {name}", f"{p50:.2f}", f"{b50:.1f}", "ms",
            f"1/{b50 / p50:.0f}", f"≤ 1/{part}", p50 * part <= b50)
    row("hello, frame → reply, p99", f"{p99:.2f}", "–", "ms", "–", "≤ 15 ms", p99 <= 15)
    row("API-server requests per warm submission", f"{asked / len(ours):g}", "–", "", "–", "0", asked == 0)


def manifests_of_pod(user, image):
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"user-{user}"}}
    found = json.loads(kubectl("get", "pod", "-n", f"user-{USER}", f"{USER}-test", "-o", "json"))
    spec = {key: found["spec"][key] for key in
            ("containers", "volumes", "restartPolicy", "securityContext", "terminationGracePeriodSeconds")}
    drop = lambda items, prefix: [i for i in items if not i["name"].startswith(prefix)]  # noqa: E731
    spec["volumes"] = drop(spec["volumes"], "kube-api-access")
    spec["automountServiceAccountToken"] = False
    pod = {"apiVersion": "v1", "kind": "Pod",
           "metadata": {"name": f"{user}-test", "namespace": f"user-{user}"}, "spec": spec}
    return namespace, pod


def first_submission(server, pairs):
    ours, direct = [], []
    for number in range(pairs):
        user = f"{USER}-d{number}"
        namespace, pod = manifests_of_pod(user, os.environ.get("RUNNER_IMAGE"))
        begin = time.perf_counter()
        kubectl("create", "namespace", f"user-{user}")
        kubectl("apply", "-f", "-", given=json.dumps(pod))
        kubectl("wait", "-n", f"user-{user}", "--for=condition=Ready", f"pod/{user}-test", "--timeout=60s")
        direct.append((time.perf_counter() - begin) * 1e3)
        # Whole, on both sides: what ends beside the other's start slows it.
        forget(user, wait=True)
        user = f"{USER}-o{number}"
        ws = server.connect()
        took, reply = timed(lambda: ws.ask({"user_id": user, "code": HELLO, "deploy": False}))
        assert reply["status"] == "tests_passed", reply
        ours.append(took * 1e3)
        ws.close()
        forget(user, wait=True)
    o, d = quantile(ours, 0.5), quantile(direct, 0.5)
    row("first submission of a new user, p50", f"{o:.0f}", f"{d:.0f}", "ms", f"{o / d:.2f}", "≤ 1.20", o <= 1.2 * d)


def same_manifests(repl, name):
    """The release's own manifests, under another name."""
    namespace = f"user-{USER}"
    found = json.loads(kubectl("get", "deployment,service,ingress,secret", "-n", namespace,
                               "-l", f"gantry.dev/repl={repl}", "-o", "json"))
    kept = []
    for item in found["items"]:
        # The runner in the pod has a Secret of its own; the pod waits for it.
        if item["metadata"]["name"] not in (repl, f"{repl}-runner"):
            continue
        item.pop("status", None)
        metadata = item["metadata"]
        item["metadata"] = {key: metadata[key] for key in ("name", "namespace", "labels", "annotations")
                            if key in metadata}
        item["metadata"].get("annotations", {}).pop("deployment.kubernetes.io/revision", None)
        for key in ("clusterIP", "clusterIPs"):
            item.get("spec", {}).pop(key, None)
        item["metadata"]["labels"] = {"bench": "direct"}
        kept.append(item)
    prefix = f"releases/{repl}/"
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": kept})
    return text.replace(prefix, "RELEASE/").replace(repl, name).replace("RELEASE/", prefix)


def gone(name):
    """Waits until no pod of the repl is left: one that ends beside the other side's start slows it."""
    end = time.time() + PATIENCE_S
    while kubectl("get", "pods", "-n", f"user-{USER}", "-l", f"gantry.dev/repl={name}", "-o", "name"):
        assert time.time() < end, f"the pods of {name} do not go"
        time.sleep(0.1)


def deploy(server, pairs):
    """A new repl each time, without a database: what is measured is the same manifests."""
    ws = server.connect()
    available, served, direct_available, direct_served = [], [], [], []
    message = {"user_id": USER, "code": HELLO, "database": False}
    model = f"{USER}-model"
    assert ws.ask({**message, "repl_id": model})["status"] == "deployed"
    for number in range(pairs):
        name = f"{USER}-d{number}"
        given = same_manifests(model, name)
        begin = time.perf_counter()
        kubectl("apply", "-f", "-", given=given)
        kubectl("rollout", "status", "-n", f"user-{USER}", f"deployment/{name}", "--timeout=60s")
        direct_available.append((time.perf_counter() - begin) * 1e3)
        wait_for_page(f"{name}.apps.localhost")
        direct_served.append((time.perf_counter() - begin) * 1e3)
        kubectl("delete", "deployment,service,ingress", "-n", f"user-{USER}", name, "--wait=false")
        kubectl("delete", "secret", "-n", f"user-{USER}", f"{name}-runner", "--wait=false")
        gone(name)
        repl = f"{USER}-o{number}"
        begin = time.perf_counter()
        reply = ws.ask({**message, "repl_id": repl})
        available.append((time.perf_counter() - begin) * 1e3)
        assert reply["status"] == "deployed", reply
        wait_for_page(f"{repl}.apps.localhost")
        served.append((time.perf_counter() - begin) * 1e3)
        run.stop(server, repl)
        gone(repl)
    run.stop(server, model)
    ws.close()
    for what, ours, base in [("good code → release Available, p50", available, direct_available),
                             ("good code → 200 through the ingress, p50", served, direct_served)]:
        o, d = quantile(ours, 0.5), quantile(base, 0.5)
        row(what, f"{o:.0f}", f"{d:.0f}", "ms", f"{o / d:.2f}", "≤ 1.20", o <= 1.2 * d)


def pod_start():
    """One start of the pod, as the cluster needs for it."""
    pod = json.loads(kubectl("get", "pod", "-n", f"user-{USER}", f"{USER}-test", "-o", "json"))
    clean = manifests_of_pod(f"{USER}-s", None)[1]
    clean["metadata"]["namespace"] = pod["metadata"]["namespace"]
    begin = time.perf_counter()
    kubectl("apply", "-f", "-", given=json.dumps(clean))
    kubectl("wait", "-n", f"user-{USER}", "--for=condition=Ready", f"pod/{USER}-s-test", "--timeout=60s")
    took = time.perf_counter() - begin
    kubectl("delete", "pod", "-n", f"user-{USER}", f"{USER}-s-test", "--grace-period=0", "--force")
    return took


def container_process():
    """The runner's process as this machine numbers it: the bed's nodes share its kernel."""
    pod = json.loads(kubectl("get", "pod", "-n", f"user-{USER}", f"{USER}-test", "-o", "json"))
    wanted = pod["status"]["containerStatuses"][0]["containerID"].rsplit("/", 1)[1]
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/cgroup") as cgroup, open(f"/proc/{entry}/cmdline") as command:
                if wanted in cgroup.read() and command.read().split("\0")[1:2] == ["agent"]:
                    return int(entry)
        except OSError:
            continue
    raise RuntimeError("the runner's process was not found")


def faults(server, times):
    start = quantile([pod_start() for _ in range(3)], 0.5)
    ws = server.connect()
    message = {"user_id": USER, "code": HELLO, "deploy": False}
    namespace, pod = f"user-{USER}", f"{USER}-test"
    breaks = {
        "hung": lambda: os.kill(container_process(), signal.SIGSTOP),
        "killed": lambda: os.kill(container_process(), signal.SIGKILL),
        "deleted": lambda: kubectl("delete", "pod", "-n", namespace, pod, "--grace-period=0", "--force"),
    }
    for name, act in breaks.items():
        took = []
        for _ in range(times):
            assert ws.ask(message)["status"] == "tests_passed"
            act()
            begin = time.perf_counter()
            reply = ws.ask(message)
            assert reply["status"] == "tests_passed", (name, reply)
            took.append(time.perf_counter() - begin)
        worst = max(took)
        row(f"{name} test pod → next submission answered, worst", f"{worst:.1f}", f"{start:.1f}", "s", "–",
            f"≤ 15 s + one pod start ({start:.1f} s)", worst <= 15 + start)
    ws.close()


class Watcher(threading.Thread):
    """Asks the old release's page all the while, and counts what is not an answer."""

    def __init__(self, host):
        super().__init__(daemon=True)
        self.host, self.asked, self.failed, self.over = host, 0, [], False

    def run(self):
        while not self.over:
            answer = ingress(self.host)
            self.asked += 1
            if not answer or answer[0] != 200:
                self.failed.append(answer and answer[0])
            time.sleep(0.02)


def kill_often(programs, data, count):
    """kill -9 of the server at a moment of its own each time; what was wrong in the cluster after each,
    and who watched the old release meanwhile."""
    server = Server(programs, data)
    repl = f"{USER}-kills"
    ws = server.connect()
    message = {"user_id": USER, "code": HELLO, "repl_id": repl, "database": False}
    took, reply = timed(lambda: ws.ask(message))
    assert reply["status"] == "deployed", reply
    wait_for_page(f"{repl}.apps.localhost")
    watcher = Watcher(f"{repl}.apps.localhost")
    watcher.start()
    wrong = []
    for number in range(count):
        ws = server.connect()
        submission = str(uuid.uuid4())
        ws.send({**message, "submission_id": submission, "code": f"print('Hello {number}')"})
        time.sleep(took * number / count)
        server.process.kill()
        server.process.wait()
        with contextlib.suppress(OSError):
            ws.close()
        server = Server(programs, data)
        ws = server.connect()
        ws.send({"resume": submission, "after": 0})
        while True:
            frame = ws.receive()
            if "status" in frame:
                break
        # A kill before the submission was on the disk: the client sends it again, and it runs once.
        if frame["status"] != "deployed":
            frame = ws.ask({**message, "submission_id": submission, "code": f"print('Hello {number}')"})
        assert frame["status"] == "deployed", frame
        ws.close()
        found = json.loads(kubectl("get", "deployment,service,ingress", "-n", f"user-{USER}",
                                   "-l", f"gantry.dev/repl={repl}", "-o", "json"))["items"]
        kinds = sorted(item["kind"] for item in found)
        if kinds != ["Deployment", "Ingress", "Service"]:
            wrong.append(f"after kill {number}: {kinds}")
    watcher.over = True
    watcher.join()
    run.stop(server, repl)
    server.stop()
    return wrong, watcher


def kills(programs, data, count):
    wrong, watcher = kill_often(programs, data, count)
    row(f"{count} kill -9 of the server across a deploy: one Deployment, Service, Ingress",
        f"{count - len(wrong)}", f"{count}", "times", "–", "always", not wrong)
    row("the old release's answers meanwhile that were not 200",
        f"{len(watcher.failed)}", f"{watcher.asked}", "answers", "–", "0", not watcher.failed)


class Server(run.Server):
    def __init__(self, programs, data):
        os.environ["GANTRY_PLATFORM"] = "kubernetes"
        os.environ["GANTRY_NAMESPACE"] = "gantry-bench"
        super().__init__(programs, data)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default="target/release")
    options.add_argument("--rounds", type=int, default=30)
    options.add_argument("--kills", type=int, default=500)
    options = options.parse_args()
    data = tempfile.mkdtemp()
    server = Server(options.programs, data)
    try:
        latency(server, options.rounds)
        first_submission(server, max(3, options.rounds // 3))
        deploy(server, max(3, options.rounds // 3))
        faults(server, 3)
    finally:
        server.stop()
    try:
        if options.kills:
            kills(options.programs, data, options.kills)
    finally:
        forget(USER)
    shutil.rmtree(data)
    print("\n| what | measured | baseline | ratio | target | holds |\n|---|---|---|---|---|---|")
    for values in run.rows:
        print("| " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
