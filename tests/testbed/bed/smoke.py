"""The smoke test: uses the bed as a program does, through the exports of `env` alone."""

import json
import os
import pathlib
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.request

from bed import elasticsearch, s3
from bed.process import run
from bed.settings import HOST, OUTSIDE_ADDRESSES, S3_PORT

NAMESPACE = "testbed-smoke"
HOST_NAME = "page.smoke.test"
# Seen: a deployment on three nodes 3 s, an ingress route 1 s; more while the machine is busy.
ROLLOUT_SECONDS = 90
ROUTE_SECONDS = 20
DATABASE_SECONDS = 90
# Seen: half a second; more while many pods come and go.
POLICY_SECONDS = 30

RESTRICTED = {
    "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def exports():
    text = run([sys.executable, pathlib.Path(__file__).resolve().parents[3] / "scripts" / "testbed", "env"])
    return dict(line.removeprefix("export ").split("=", 1) for line in text.splitlines())


ENV = {name: value.strip("'") for name, value in exports().items()}


def kubectl(*arguments, input=None, seconds=60):
    return run([ENV["TESTBED_KUBECTL"], "--kubeconfig", ENV["KUBECONFIG"], *arguments], input=input, seconds=seconds)


def eventually(seconds, check):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def page():
    call = urllib.request.Request(f"http://{ENV['TESTBED_INGRESS']}/", headers={"Host": HOST_NAME})
    with urllib.request.urlopen(call, timeout=5) as answer:
        return answer.read().decode()


def manifests():
    labels = {"app": "page"}
    container = {
        "name": "page", "image": ENV["RUNNER_IMAGE"], "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", "hostname >index.html && exec python3 -m http.server 3000"], "workingDir": "/tmp",
        "ports": [{"containerPort": 3000}], "securityContext": RESTRICTED,
        "readinessProbe": {"httpGet": {"path": "/", "port": 3000}, "periodSeconds": 1},
    }
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
              "labelSelector": {"matchLabels": labels}}
    meta = {"name": "page", "namespace": NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Namespace",
         "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": {
            "replicas": 3, "selector": {"matchLabels": labels}, "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [container], "topologySpreadConstraints": [spread], "terminationGracePeriodSeconds": 1}}}},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta,
         "spec": {"selector": labels, "ports": [{"port": 80, "targetPort": 3000}]}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": meta, "spec": {
            "ingressClassName": "nginx", "rules": [{"host": HOST_NAME, "http": {"paths": [{
                "path": "/", "pathType": "Prefix", "backend": {"service": {"name": "page", "port": {"number": 80}}}}]}}]}},
    ]


def database():
    labels = {"app": "database"}
    meta = {"name": "database", "namespace": NAMESPACE}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": [{"port": 5432}]}},
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": meta, "spec": {
            "serviceName": "database", "selector": {"matchLabels": labels},
            "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {
                "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}],
            "template": {"metadata": {"labels": labels}, "spec": {"containers": [{
                "name": "database", "image": ENV["DATABASE_IMAGE"], "imagePullPolicy": "IfNotPresent",
                "securityContext": RESTRICTED,
                "env": [{"name": "POSTGRES_PASSWORD", "value": "secret"}, {"name": "POSTGRES_DB", "value": "app"},
                        {"name": "PGDATA", "value": "/var/lib/postgresql/data/pgdata"}],
                "readinessProbe": {"exec": {"command": ["pg_isready", "-h", "127.0.0.1"]}, "periodSeconds": 1},
                "volumeMounts": [{"name": "data", "mountPath": "/var/lib/postgresql/data"}]}]}}}},
    ]


class Smoke(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait", seconds=120)
        for item in manifests() + database():
            kubectl("apply", "--server-side", "-f", "-", input=json.dumps(item))
        kubectl("-n", NAMESPACE, "rollout", "status", "deployment/page", f"--timeout={ROLLOUT_SECONDS}s", seconds=ROLLOUT_SECONDS + 10)
        pods = json.loads(kubectl("-n", NAMESPACE, "get", "pods", "-l", "app=page", "-o", "json"))["items"]
        cls.pods = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in pods}

    @classmethod
    def tearDownClass(cls):
        kubectl("delete", "namespace", NAMESPACE, "--wait", seconds=120)

    def inside(self, *command, pod=None):
        return kubectl("-n", NAMESPACE, "exec", pod or next(iter(self.pods)), "--", *command)

    def test_a_deployment_runs_on_three_nodes(self):
        self.assertEqual(len(set(self.pods.values())), 3, self.pods)

    def test_a_page_comes_through_the_ingress_from_every_pod(self):
        seen = set()

        def all_seen():
            seen.add(page().strip())
            self.assertEqual(seen, set(self.pods))

        eventually(ROUTE_SECONDS, all_seen)

    def test_another_host_gets_no_page(self):
        call = urllib.request.Request(f"http://{ENV['TESTBED_INGRESS']}/", headers={"Host": "unknown.smoke.test"})
        with self.assertRaises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(call, timeout=5)
        self.assertEqual(refused.exception.code, 404)

    def test_every_pod_resolves_a_name_and_reaches_the_service(self):
        ask = "import urllib.request; print(urllib.request.urlopen('http://page.testbed-smoke.svc.cluster.local', timeout=5).read().decode())"
        for pod in self.pods:
            self.assertIn(self.inside("python3", "-c", ask, pod=pod).strip(), self.pods)

    def test_exec_goes_over_a_websocket(self):
        run_verbose = [ENV["TESTBED_KUBECTL"], "--kubeconfig", ENV["KUBECONFIG"], "-v=7", "-n", NAMESPACE, "exec", next(iter(self.pods))]
        done = subprocess.run([*run_verbose, "--", "echo", "from the pod"], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.stdout, "from the pod\n", done.stderr[-2000:])
        self.assertIn("v5.channel.k8s.io", done.stderr)

    def test_pod_security_refuses_a_pod_that_runs_as_root(self):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root", "namespace": NAMESPACE},
               "spec": {"containers": [{"name": "root", "image": ENV["RUNNER_IMAGE"], "securityContext": {"privileged": True}}]}}
        with self.assertRaisesRegex(Exception, "violates PodSecurity"):
            kubectl("create", "-f", "-", input=json.dumps(pod))

    def test_an_account_without_rights_is_refused(self):
        with self.assertRaisesRegex(Exception, "(?i)forbidden"):
            kubectl("--as=system:serviceaccount:testbed-smoke:default", "get", "secrets", "--all-namespaces")

    def test_a_policy_closes_pods_and_opens_them_again(self):
        """On every node, to the machine and to the rest of the world; the probes before and after it are its control."""
        ask = ("import socket; print([socket.socket().connect_ex((address, port)) for address, port in "
               f"[('{HOST}', {S3_PORT}), ('{OUTSIDE_ADDRESSES[0]}', 80)]])")
        policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                  "metadata": {"name": "closed", "namespace": NAMESPACE},
                  "spec": {"podSelector": {"matchLabels": {"app": "page"}}, "policyTypes": ["Egress"]}}

        def reached(as_expected):
            for pod in self.pods:
                answers = json.loads(self.inside("python3", "-c", ask, pod=pod))
                self.assertTrue(all(as_expected(answer) for answer in answers), f"{pod}: {answers}")

        reached(lambda answer: answer == 0)
        kubectl("apply", "--server-side", "-f", "-", input=json.dumps(policy))
        try:
            eventually(POLICY_SECONDS, lambda: reached(lambda answer: answer != 0))
        finally:
            kubectl("-n", NAMESPACE, "delete", "networkpolicy", "closed")
        eventually(POLICY_SECONDS, lambda: reached(lambda answer: answer == 0))

    def test_nothing_outside_is_reached_from_a_pod(self):
        ask = "import socket; s = socket.socket(); s.settimeout(3); print(s.connect_ex(('192.0.2.1', 80)))"
        self.assertNotEqual(self.inside("python3", "-c", ask).strip(), "0")

    def test_an_object_is_put_and_got_also_from_a_pod(self):
        s3.request("PUT", f"/{ENV['S3_BUCKET']}/smoke/object", b"content")
        self.assertEqual(s3.request("GET", f"/{ENV['S3_BUCKET']}/smoke/object"), b"content")
        s3.request("DELETE", f"/{ENV['S3_BUCKET']}/smoke/object")
        ask = f"import urllib.request, urllib.error\ntry: urllib.request.urlopen('{ENV['AWS_ENDPOINT_URL']}', timeout=5)\nexcept urllib.error.HTTPError as e: print(e.code)"
        self.assertEqual(self.inside("python3", "-c", ask).strip(), "403")

    def test_documents_are_indexed_in_bulk_and_found(self):
        lines = "".join(f'{{"create":{{}}}}\n{{"text":"word{n} common"}}\n' for n in range(50))
        answer = elasticsearch.request("POST", "/testbed-smoke/_bulk?refresh=true", lines.encode(), "application/x-ndjson")
        try:
            self.assertFalse(answer["errors"])
            found = elasticsearch.request("POST", "/testbed-smoke/_search", b'{"query":{"match":{"text":"word7"}}}')
            self.assertEqual([hit["_source"]["text"] for hit in found["hits"]["hits"]], ["word7 common"])
        finally:
            elasticsearch.request("DELETE", "/testbed-smoke")

    def test_a_database_keeps_its_data_on_a_volume(self):
        kubectl("-n", NAMESPACE, "rollout", "status", "statefulset/database", f"--timeout={DATABASE_SECONDS}s", seconds=DATABASE_SECONDS + 10)
        sql = ["psql", "postgresql://postgres:secret@database/app", "-tAc"]
        self.inside(*sql, "create table kept as select 42 as value", pod="database-0")
        kubectl("-n", NAMESPACE, "delete", "pod", "database-0", "--grace-period=1")
        kubectl("-n", NAMESPACE, "rollout", "status", "statefulset/database", f"--timeout={DATABASE_SECONDS}s", seconds=DATABASE_SECONDS + 10)
        # The Service's rule on the node follows the new pod a moment after the pod is Ready.
        kept = eventually(ROUTE_SECONDS, lambda: self.inside(*sql, "select value from kept", pod="database-0"))
        self.assertEqual(kept.strip(), "42")

    def test_the_nodes_report_their_use(self):
        self.assertGreaterEqual(len(kubectl("top", "nodes", "--no-headers").splitlines()), 3)


if __name__ == "__main__":
    os.environ.pop("KUBECONFIG", None)
    unittest.main(verbosity=2)
