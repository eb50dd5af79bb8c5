"""One node: a network namespace, containerd, kubelet, kube-proxy, what enforces NetworkPolicies, and its pods."""

import datetime
import json
import os
import pathlib
import shutil
import signal

from . import api, images, network, pki
from .build import binary
from .process import Process, kill_cgroup, make_cgroup, run, wait_for
from .settings import (
    CGROUP, CNI_PROGRAMS, DNS_SERVICE, DOMAIN, PAUSE_IMAGE, PKI, POD_NETWORK, RUN, SERVICE_NETWORK, STATE,
)

# containerd: seen 1 s; a node: 4 s. More while all nodes start at once on two cores.
CONTAINERD_SECONDS = 30
READY_SECONDS = 60


class Node:
    def __init__(self, name):
        self.name = name
        self.number = int(name.removeprefix("node-"))
        self.address = f"10.245.0.{10 + self.number}"
        self.pods = f"10.244.{self.number}.0/24"
        self.veth = f"gbed-{self.number}"
        self.state = STATE / "nodes" / name
        self.run = RUN / "nodes" / name
        self.socket = self.run / "containerd.sock"
        # Which archives the images come from that containerd has.
        self.loaded = self.state / "images.json"
        self.group = f"{name}/system"
        self.containerd = Process(f"{name}-containerd", self.group)
        self.kubelet = Process(f"{name}-kubelet", self.group)
        self.proxy = Process(f"{name}-kube-proxy", self.group)
        self.policies = Process(f"{name}-policies", self.group)
        self.processes = [self.containerd, self.kubelet, self.proxy, self.policies]

    def running(self):
        return all(process.pid() for process in self.processes)

    def ready(self):
        return self.condition() == "True"

    def condition(self):
        """The Ready condition that the API server holds: True, False or Unknown."""
        for condition in api.get(f"/api/v1/nodes/{self.name}")["status"].get("conditions", []):
            if condition["type"] == "Ready":
                return condition["status"]
        return "Unknown"

    def start(self):
        """As when a machine is switched on: what was in memory is gone, what was on disk is there."""
        self.stop()
        self.configure()
        network.add_node(self)
        # Only its own routes: another node that starts at the same time may have no address yet.
        network.connect(self, all_nodes())
        make_cgroup(self.group)
        if not (self.state / "containerd").exists():
            images.clone_store(self.state / "containerd")
            self.loaded.write_text(json.dumps(images.archives()))
        self.start_processes()

    def start_processes(self):
        namespace = network.namespace(self)
        self.containerd.start(["containerd", "--config", self.state / "containerd.toml"], namespace)
        self.proxy.start([
            binary("kubernetes"), "kube-proxy", f"--config={self.state / 'kube-proxy.json'}",
        ], namespace)
        wait_for(f"{self.name}'s containerd", CONTAINERD_SECONDS, self.socket.exists, self.containerd)
        self.kubelet.start([
            binary("kubernetes"), "kubelet", f"--config={self.state / 'kubelet.json'}",
            f"--kubeconfig={STATE / f'kubelet-{self.name}.kubeconfig'}", f"--root-dir={self.state / 'kubelet'}",
            f"--hostname-override={self.name}", f"--node-ip={self.address}",
        ], namespace)
        # Its chains and sets are the namespace's and go with it.
        self.policies.start([
            binary("policies"), f"--kubeconfig={STATE / 'policies.kubeconfig'}", f"--node={self.name}",
            f"--services={SERVICE_NETWORK}",
        ], namespace)

    def old_images(self):
        """The images that containerd has from another archive than that of now."""
        try:
            loaded = json.loads(self.loaded.read_text())
        except OSError:
            loaded = {}
        return [image for image in images.IMAGES if loaded.get(image.name) != images.archive(image).name]

    def load(self, wanted):
        """Pods that are made from now on have these images; those that run keep what they have."""
        self.loaded.unlink(missing_ok=True)
        images.load(self.socket, wanted)
        self.loaded.write_text(json.dumps(images.archives()))

    def wait(self):
        wait_for(self.name, READY_SECONDS, self.reported, self.kubelet)
        wait_for(f"{self.name}'s policies", READY_SECONDS, self.enforces, self.policies)

    def enforces(self):
        """Whether what goes through the node passes the chain that has the policies' rules."""
        return "KUBE-ROUTER-FORWARD" in network.inside(self, ["iptables", "-S", "FORWARD"])

    def reported(self):
        """Ready by word of the kubelet that runs now: the API server still shows what a dead one said."""
        lease = api.get(f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{self.name}")
        renewed = datetime.datetime.fromisoformat(lease["spec"]["renewTime"]).timestamp()
        return renewed > self.kubelet.file.stat().st_mtime and self.ready()

    def bounce(self):
        """As when kubelet and containerd crash and are started again: pods run on meanwhile."""
        for each in (self.kubelet, self.containerd):
            os.kill(each.pid(), signal.SIGKILL)
            each.stop()
        self.start_processes()

    def kill(self):
        """As when a machine loses power: kubelet, containerd and every process of its pods at once.

        The cable first: a machine without power says goodbye to no connection, but a kernel that ends a process does.
        """
        network.cut(self, "down")
        kill_cgroup(self.name)

    def stop(self):
        kill_cgroup(self.name)
        for process in self.processes:
            process.file.unlink(missing_ok=True)
        unmount(self.run)
        unmount(self.state)
        network.remove_node(self)
        shutil.rmtree(self.run, ignore_errors=True)

    def configure(self):
        for folder in (self.state / "cni", self.state / "pod-logs", self.run):
            folder.mkdir(parents=True, exist_ok=True)
        pki.node(self.name, self.address)
        (self.state / "containerd.toml").write_text(self.containerd_config())
        (self.state / "cni" / "10-bed.conflist").write_text(json.dumps(self.cni_config()))
        (self.state / "kubelet.json").write_text(json.dumps(self.kubelet_config()))
        (self.state / "kube-proxy.json").write_text(json.dumps(self.proxy_config()))

    def containerd_config(self):
        return f"""version = 2
root = "{self.state}/containerd"
state = "{self.run}/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{CNI_PROGRAMS}"
    conf_dir = "{self.state}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""

    def cni_config(self):
        # No masquerading: a packet that is not for the bed finds no route and stops in the node. No bridge: on one,
        # two pods of a node would speak to each other past the rules that enforce policies, over IPv6 at least.
        return {"cniVersion": "0.4.0", "name": "bed", "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": 1500,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": self.pods}]], "dataDir": f"{self.run}/cni",
                      "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]}

    def kubelet_config(self):
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                               "x509": {"clientCAFile": f"{PKI}/ca.crt"}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{PKI}/kubelet-{self.name}.crt", "tlsPrivateKeyFile": f"{PKI}/kubelet-{self.name}.key",
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "cgroupDriver": "cgroupfs", "cgroupRoot": f"/{CGROUP}/{self.name}", "failCgroupV1": False, "failSwapOn": False,
            "clusterDNS": [DNS_SERVICE], "clusterDomain": DOMAIN, "resolvConf": "",
            "podLogsDir": f"{self.state}/pod-logs", "volumePluginDir": f"{self.state}/kubelet/volume-plugins",
            "nodeStatusUpdateFrequency": "2s", "nodeLeaseDurationSeconds": 8, "maxPods": 110,
            # There is no registry to fetch an image again from.
            "imageGCHighThresholdPercent": 100, "imageMinimumGCAge": "24h",
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
            "oomScoreAdj": 0,
        }

    def proxy_config(self):
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
            "clientConnection": {"kubeconfig": str(STATE / "kube-proxy.kubeconfig")},
            "clusterCIDR": POD_NETWORK, "hostnameOverride": self.name,
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "nftables": {"minSyncPeriod": "200ms", "syncPeriod": "30s"}, "oomScoreAdj": 0,
        }


def all_nodes():
    """The nodes the bed has, whether they run or not."""
    folder = STATE / "nodes"
    names = os.listdir(folder) if folder.exists() else []
    return sorted((Node(name) for name in names), key=lambda node: node.number)


def declare(count):
    for number in range(1, count + 1):
        (STATE / "nodes" / f"node-{number}").mkdir(parents=True, exist_ok=True)


def mounts(folder):
    """The mount points at and under a folder, innermost first."""
    found = []
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        point = line.split()[1].replace("\\040", " ")
        if point == str(folder) or point.startswith(f"{folder}/"):
            found.append(point)
    return found[::-1]


def unmount(folder):
    for point in mounts(folder):
        run(["umount", "-l", point])
