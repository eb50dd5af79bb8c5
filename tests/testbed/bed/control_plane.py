"""etcd, API server, controller manager, scheduler and the objects every cluster has."""

import urllib.request

from . import api, pki
from .build import binary
from .process import Process, wait_for
from .settings import (
    API_PORT, DNS_SERVICE, ETCD_PEER_PORT, ETCD_PORT, HOST, METRICS_PORT, PKI, SERVICE_NETWORK, STATE,
)

# Seen: 1 s and 3 s on an idle machine; ten times that while the other parts start too.
ETCD_SECONDS = 20
API_SECONDS = 60
CONTROLLER_SECONDS = 60
# Machine-wide programs; a node's kubelet and kube-proxy are in node.py.
ETCD = Process("etcd")
APISERVER = Process("apiserver")
CONTROLLER_MANAGER = Process("controller-manager")
SCHEDULER = Process("scheduler")
VOLUMES = Process("volumes")


def fetch(url, seconds=3):
    with urllib.request.urlopen(url, timeout=seconds) as answer:
        return answer.read().decode()


def start_etcd():
    client, peer = f"http://127.0.0.1:{ETCD_PORT}", f"http://127.0.0.1:{ETCD_PEER_PORT}"
    ETCD.start([
        "etcd", "--name=testbed", f"--data-dir={STATE / 'etcd'}", "--unsafe-no-fsync",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=testbed={peer}",
    ])


def etcd_ready():
    return '"health":"true"' in fetch(f"http://127.0.0.1:{ETCD_PORT}/health")


def start_apiserver():
    APISERVER.start([
        binary("kubernetes"), "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{ETCD_PORT}",
        f"--bind-address={HOST}", f"--advertise-address={HOST}", f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        f"--tls-cert-file={PKI}/apiserver.crt", f"--tls-private-key-file={PKI}/apiserver.key",
        f"--client-ca-file={PKI}/ca.crt", "--authorization-mode=Node,RBAC", f"--token-auth-file={PKI}/tokens.csv",
        "--enable-admission-plugins=NodeRestriction,PodSecurity", "--allow-privileged=true",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={PKI}/service-account.pub",
        f"--service-account-signing-key-file={PKI}/service-account.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt", f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        f"--requestheader-client-ca-file={PKI}/front-proxy-ca.crt", "--requestheader-allowed-names=front-proxy",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={PKI}/front-proxy.crt", f"--proxy-client-key-file={PKI}/front-proxy.key",
        # The API server is no pod and has no kube-proxy: it goes to a service's endpoints by itself.
        "--enable-aggregator-routing=true", "--profiling=false",
    ])


def apiserver_ready():
    return api.get("/readyz") == "ok"


def start_controllers():
    CONTROLLER_MANAGER.start([
        binary("kubernetes"), "kube-controller-manager", f"--kubeconfig={STATE / 'controller-manager.kubeconfig'}",
        "--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials=true",
        f"--root-ca-file={PKI}/ca.crt", f"--service-account-private-key-file={PKI}/service-account.key",
        # A dead node is noticed in seconds; a cluster's own default is 50 s.
        "--node-monitor-period=1s", "--node-monitor-grace-period=10s", "--profiling=false",
    ])
    SCHEDULER.start([
        binary("kubernetes"), "kube-scheduler", f"--kubeconfig={STATE / 'scheduler.kubeconfig'}",
        "--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false",
    ])
    VOLUMES.start([
        binary("volumes"), f"--kubeconfig={STATE / 'volumes.kubeconfig'}", f"--directory={STATE / 'volumes'}",
    ])


def controllers_ready():
    # The controller manager is at work once it has made the first namespace's account.
    return api.get("/api/v1/namespaces/default/serviceaccounts/default")["kind"] == "ServiceAccount"


def role(name, user, rules):
    return [
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules},
        binding(name, name, user),
    ]


def binding(name, role_name, user):
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role_name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
    }


def machine_service(name, address, port_pairs):
    """A Service in kube-system whose one endpoint is a program on the machine."""
    meta = {"name": name, "namespace": "kube-system"}
    ports = [{"name": n, "port": port, "protocol": protocol} for n, port, _, protocol in port_pairs]
    spec = {"ports": [{**p, "targetPort": target} for p, (_, _, target, _) in zip(ports, port_pairs)]}
    if address:
        spec["clusterIP"] = address
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec},
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {**meta, "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": n, "port": target, "protocol": protocol} for n, _, target, protocol in port_pairs],
            "endpoints": [{"addresses": [HOST], "conditions": {"ready": True}}],
        },
    ]


def rules(groups, resources, verbs):
    return {"apiGroups": groups, "resources": resources, "verbs": verbs}


READ = ["get", "list", "watch"]


def objects():
    """The objects the bed's own parts need, in the order they are applied."""
    items = [
        {"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "provisioner": "gantry.dev/testbed",
         "metadata": {"name": "standard", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}},
         "reclaimPolicy": "Delete", "volumeBindingMode": "Immediate"},
        {"apiVersion": "networking.k8s.io/v1", "kind": "IngressClass", "metadata": {"name": "nginx"},
         "spec": {"controller": "gantry.dev/testbed"}},
        binding("testbed:kube-proxy", "system:node-proxier", "system:kube-proxy"),
    ]
    items += role("testbed:coredns", "testbed:coredns", [
        rules([""], ["services", "pods", "namespaces"], READ), rules(["discovery.k8s.io"], ["endpointslices"], READ)])
    items += role("testbed:ingress", "testbed:ingress", [
        rules([""], ["services", "endpoints", "namespaces", "pods", "secrets"], READ),
        rules(["discovery.k8s.io"], ["endpointslices"], READ),
        rules(["networking.k8s.io"], ["ingresses", "ingressclasses"], READ)])
    items += role("testbed:volumes", "testbed:volumes", [
        rules([""], ["persistentvolumeclaims"], READ),
        rules([""], ["persistentvolumes"], [*READ, "create", "delete"])])
    items += role("testbed:policies", "testbed:policies", [
        rules([""], ["pods", "namespaces", "nodes"], READ), rules(["networking.k8s.io"], ["networkpolicies"], READ)])
    items += machine_service("kube-dns", DNS_SERVICE, [("dns", 53, 53, "UDP"), ("dns-tcp", 53, 53, "TCP")])
    items += metrics_objects()
    return items


def metrics_objects():
    user = "testbed:metrics-server"
    items = role("testbed:metrics-server", user, [
        rules([""], ["nodes/metrics"], ["get"]), rules([""], ["pods", "nodes", "namespaces", "configmaps"], READ)])
    items.append(binding("testbed:metrics-server-delegator", "system:auth-delegator", user))
    items.append({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding",
        "metadata": {"name": "testbed:metrics-server", "namespace": "kube-system"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "extension-apiserver-authentication-reader"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}]})
    items += role("testbed:metrics-reader", user, [rules(["metrics.k8s.io"], ["pods", "nodes"], READ)])[:1]
    items += machine_service("metrics-server", None, [("https", 443, METRICS_PORT, "TCP")])
    items.append({
        "apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.metrics.k8s.io"},
        "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
                 "insecureSkipTLSVerify": True, "service": {"name": "metrics-server", "namespace": "kube-system"}}})
    return items


def up():
    start_etcd()
    wait_for("etcd", ETCD_SECONDS, etcd_ready, ETCD)
    start_apiserver()
    wait_for("the API server", API_SECONDS, apiserver_ready, APISERVER)
    start_controllers()
    for item in objects():
        api.apply(item)


def prepare():
    pki.make()
    (STATE / "volumes").mkdir(parents=True, exist_ok=True)
