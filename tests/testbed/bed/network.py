"""The bridge, a network namespace for each node and for what stands for the rest of the world, and the routes.

Nothing of it leads off the machine.
"""

import json
import pathlib

from .process import run
from .settings import BED_NETWORK, BRIDGE, HOST, OUTSIDE, OUTSIDE_ADDRESSES, POD_NETWORK, SERVICE_NETWORK

NAMESPACE = "gantry-bed-"
OUTSIDE_NAMESPACE = NAMESPACE + "outside"


def namespace(node):
    return NAMESPACE + node.name


def links():
    return {link["ifname"] for link in json.loads(run(["ip", "-j", "link"]) or "[]")}


def up():
    if BRIDGE not in links():
        run(["ip", "-b", "-"], input=f"link add {BRIDGE} type bridge\naddr add {HOST}/24 dev {BRIDGE}\nlink set {BRIDGE} up\n")
    if not pathlib.Path(f"/run/netns/{OUTSIDE_NAMESPACE}").exists():
        add_outside()


def add_outside():
    """A namespace of its own: the machine itself must not have the addresses of its cloud's services."""
    run(["ip", "netns", "add", OUTSIDE_NAMESPACE])
    run(["ip", "-b", "-"], input=(
        f"link add gbed-outside type veth peer name eth0 netns {OUTSIDE_NAMESPACE}\n"
        f"link set gbed-outside master {BRIDGE} up\n"
    ))
    run(["ip", "-n", OUTSIDE_NAMESPACE, "-b", "-"], input=(
        f"addr add {OUTSIDE}/24 dev eth0\nlink set lo up\nlink set eth0 up\n"
        + "".join(f"addr add {address}/32 dev lo\n" for address in OUTSIDE_ADDRESSES)
    ))


def add_node(node):
    """A veth pair to the bridge; the machine and the other nodes reach this node's pods through its address."""
    if pathlib.Path(f"/run/netns/{namespace(node)}").exists():
        remove_node(node)
    run(["ip", "netns", "add", namespace(node)])
    run(["ip", "-b", "-"], input=(
        f"link add {node.veth} type veth peer name eth0 netns {namespace(node)}\n"
        f"link set {node.veth} master {BRIDGE} up\n"
        f"route replace {node.pods} via {node.address} dev {BRIDGE}\n"
    ))
    run(["ip", "-n", OUTSIDE_NAMESPACE, "route", "replace", node.pods, "via", node.address])
    run(["ip", "-n", namespace(node), "-b", "-"], input=(
        f"addr add {node.address}/24 dev eth0\nlink set lo up\nlink set eth0 up\n"
        # Without a route the kernel refuses a packet before kube-proxy's rule gives it its real address.
        f"route add {SERVICE_NETWORK} dev eth0\n"
        + "".join(f"route add {address} via {OUTSIDE}\n" for address in OUTSIDE_ADDRESSES)
    ))
    inside(node, ["sysctl", "-q", "-w", "net.ipv4.ip_forward=1"])


def connect(node, nodes):
    """One node's routes to the pods of the others, whether those run yet or not."""
    others = "".join(f"route replace {other.pods} via {other.address}\n" for other in nodes if other.name != node.name)
    run(["ip", "-n", namespace(node), "-b", "-"], input=others)


def inside(node, command, **options):
    return run(["nsenter", f"--net=/run/netns/{namespace(node)}", *command], **options)


def cut(node, state):
    run(["ip", "link", "set", node.veth, state])
    if state == "up":  # the route went with the link of a bridge that had no other port
        run(["ip", "route", "replace", node.pods, "via", node.address, "dev", BRIDGE])


def remove_node(node):
    # The pair first: it goes at once, while a namespace takes its end of it away only some time later.
    if node.veth in links():
        run(["ip", "link", "del", node.veth])
    if pathlib.Path(f"/run/netns/{namespace(node)}").exists():
        run(["ip", "netns", "del", namespace(node)])


def down():
    for link in links():
        if link.startswith("gbed-") or link == BRIDGE:
            run(["ip", "link", "del", link])  # the routes go with the bridge
    for folder in pathlib.Path("/run/netns").glob(NAMESPACE + "*"):
        run(["ip", "netns", "del", folder.name])


def leftovers():
    found = [f"namespace {folder}" for folder in pathlib.Path("/run/netns").glob(NAMESPACE + "*")]
    found += [f"link {link}" for link in links() if link.startswith("gbed-") or link == BRIDGE]
    for route in json.loads(run(["ip", "-j", "route", "show", "table", "all"]) or "[]"):
        if str(route["dst"]).startswith((POD_NETWORK[:7], BED_NETWORK[:8], SERVICE_NETWORK[:6])):
            found.append(f"route {route['dst']}")
    return found
