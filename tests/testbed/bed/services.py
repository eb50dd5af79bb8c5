"""The parts that a cluster usually runs as pods: names, ingress, metrics. Here each is a program on the machine."""

import socket
import struct

from . import api
from .build import binary
from .control_plane import fetch
from .process import Process, wait_for
from .settings import (
    API_PORT, DOMAIN, HOST, INGRESS_PORT, INGRESS_SUPPORT_PORT, METRICS_PORT, PKI, STATE,
)

# Seen: 1 to 3 s after the API server; more while every part starts at once.
READY_SECONDS = 60
# The first values come one scrape after the last node is Ready.
METRICS_SECONDS = 90
DNS = Process("coredns")
INGRESS = Process("ingress")
METRICS = Process("metrics-server")


def start_dns():
    corefile = STATE / "Corefile"
    corefile.write_text(f"""{DOMAIN}:53 in-addr.arpa:53 {{
    bind {HOST}
    errors
    ready {HOST}:8181
    kubernetes {DOMAIN} in-addr.arpa {{
        kubeconfig {STATE / "coredns.kubeconfig"} testbed
        pods verified
        ttl 5
    }}
    cache 5
    loadbalance
}}
""")
    DNS.start([binary("coredns"), "-conf", corefile])


def dns_ready():
    return fetch(f"http://{HOST}:8181/ready") == "OK" and resolve("kubernetes.default.svc." + DOMAIN) != []


def resolve(name, seconds=3):
    """Asks CoreDNS for the addresses of a name."""
    question = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".")) + b"\0\0\1\0\1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(seconds)
        client.sendto(struct.pack(">6H", 1, 0x100, 1, 0, 0, 0) + question, (HOST, 53))
        answer = client.recv(4096)
    count, position, found = struct.unpack(">H", answer[6:8])[0], 12 + len(question), []
    for _ in range(count):
        while answer[position] and answer[position] < 0xC0:
            position += 1 + answer[position]
        position += 2 if answer[position] else 1
        kind, _, _, length = struct.unpack(">HHIH", answer[position:position + 10])
        if kind == 1:
            found.append(socket.inet_ntoa(answer[position + 10:position + 10 + length]))
        position += 10 + length
    return found


def start_ingress():
    INGRESS.start([
        binary("skipper"), "-kubernetes", f"-kubernetes-url=https://{HOST}:{API_PORT}",
        f"-kubernetes-token-file={PKI / 'ingress.token'}", "-kubernetes-ingress-class=nginx", "-kubernetes-https-redirect=false",
        "-address", f"{HOST}:{INGRESS_PORT}", "-support-listener", f"{HOST}:{INGRESS_SUPPORT_PORT}",
        "-source-poll-timeout=200", "-experimental-upgrade", "-wait-first-route-load", "-access-log-disabled",
        "-enable-kubernetes-endpointslices", "-application-log-level=WARN",
    ], env={"SSL_CERT_FILE": str(PKI / "ca.crt")})


def ingress_ready():
    with socket.create_connection((HOST, INGRESS_PORT), timeout=2):
        return True


def start_metrics():
    METRICS.start([
        binary("metrics-server"), f"--kubeconfig={STATE / 'metrics-server.kubeconfig'}",
        f"--authentication-kubeconfig={STATE / 'metrics-server.kubeconfig'}",
        f"--authorization-kubeconfig={STATE / 'metrics-server.kubeconfig'}",
        f"--bind-address={HOST}", f"--secure-port={METRICS_PORT}", f"--cert-dir={STATE / 'metrics-server'}",
        f"--kubelet-certificate-authority={PKI}/ca.crt", "--kubelet-preferred-address-types=InternalIP",
        "--metric-resolution=10s", "--kubelet-request-timeout=4s",
    ])


def metrics_ready():
    return bool(api.get("/apis/metrics.k8s.io/v1beta1/nodes")["items"])


def start_all():
    start_dns()
    start_ingress()
    start_metrics()


def wait_all():
    wait_for("CoreDNS", READY_SECONDS, dns_ready, DNS)
    wait_for("the ingress controller", READY_SECONDS, ingress_ready, INGRESS)
    wait_for("metrics-server", METRICS_SECONDS, metrics_ready, METRICS)
