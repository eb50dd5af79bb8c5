"""Names, addresses, versions and folders of the test bed, in one place."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
SOURCES = REPOSITORY / "tests" / "testbed"
# Resolved: Elasticsearch does not start from a path that leads through a symbolic link.
CACHE = (pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target") / "testbed").resolve()
STATE = pathlib.Path("/var/lib/gantry-testbed")
RUN = pathlib.Path("/run/gantry-testbed")
LOGS = STATE / "logs"
# Kept by `down`: containerd's files with every image unpacked, from which each new node gets its own.
IMAGE_STORE = STATE / "image-store"

KUBERNETES = "1.34.4"
ELASTICSEARCH = "8.19.0"
# Fetched only where the machine has none that is new enough.
GO = "1.26.8"

CGROUP = "gantry-testbed"
BRIDGE = "gantry-bed0"
# The machine's own address on the bridge: every part that is not a pod listens here, so that it is
# reached under one name from the machine and from pods.
HOST = "10.245.0.1"
BED_NETWORK = "10.245.0.0/24"
POD_NETWORK = "10.244.0.0/16"
# What stands for the rest of the world: it has these addresses besides its own on the bridge, and only nodes have
# routes to them.
OUTSIDE = "10.245.0.9"
OUTSIDE_ADDRESSES = [
    "203.0.113.10",  # a machine on the internet
    "169.254.169.254",  # most clouds' metadata service
    "168.63.129.16",  # Azure's
    "192.0.0.192",  # Oracle's
    "100.100.100.200",  # Alibaba's
    "198.18.0.1", "240.0.0.1", "172.16.0.1", "192.168.0.1",  # private networks
]
SERVICE_NETWORK = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
DOMAIN = "cluster.local"

API_PORT = 6443
ETCD_PORT = 12379
ETCD_PEER_PORT = 12380
ELASTICSEARCH_PORT = 9200
ELASTICSEARCH_TRANSPORT_PORT = 9300
S3_PORT = 7480
INGRESS_PORT = 8080
INGRESS_SUPPORT_PORT = 9911
METRICS_PORT = 4443

S3_BUCKET = "gantry-code"
S3_KEY = "testbed"
S3_SECRET = "testbed-secret-key"
S3_REGION = "us-east-1"
ELASTICSEARCH_PASSWORD = "testbed-password"

RUNNER_IMAGE = "docker.io/library/gantry-runner:latest"
SERVER_IMAGE = "docker.io/library/gantry:latest"
DATABASE_IMAGE = "docker.io/library/postgres:16"
PAUSE_IMAGE = "docker.io/library/gantry-testbed-pause:1"
BASE_IMAGE = "docker.io/library/debian:bookworm-slim"

PKI = STATE / "pki"
KUBECONFIG = STATE / "admin.kubeconfig"
CNI_PROGRAMS = "/usr/lib/cni"


class BedError(Exception):
    """What happened, why, and what to do: shown to the person as it is."""
