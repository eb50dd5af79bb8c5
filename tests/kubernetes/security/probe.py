"""Tries from inside pods' network namespaces who reaches whom. Needs root on the machine that has the bed.

Takes {"from": {name: address or null}, "to": {name: [protocol, address, port]}} from standard input; null is the machine
itself. Prints {name: [names of those that answered]}.

    probe.py --listen ADDRESS PORT...    accepts connections, and answers packets, in the pod that has the address
"""

import json
import pathlib
import socket
import subprocess
import sys
import threading

NODES = pathlib.Path("/run/gantry-testbed/nodes")
# On one machine an answer takes a millisecond; a busy machine's may take longer.
SECONDS = 2
# A question for the address of kubernetes.default.svc.cluster.local.
QUESTION = b"\0\1\1\0\0\1\0\0\0\0\0\0\nkubernetes\7default\3svc\7cluster\5local\0\0\1\0\1"


def namespaces():
    """The network namespace of each pod's address."""
    found = {}
    for file in NODES.glob("*/containerd/io.containerd.grpc.v1.cri/netns/*"):
        shown = subprocess.run(["nsenter", f"--net={file}", "ip", "-j", "-4", "address"], capture_output=True, text=True)
        if shown.returncode:
            continue  # it went away meanwhile
        for link in json.loads(shown.stdout):
            for address in link["addr_info"]:
                if address["scope"] == "global":
                    found[address["local"]] = file
    return found


def answers(protocol, address, port):
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as one:
        one.settimeout(SECONDS)
        try:
            one.connect((address, port))
            if protocol == "udp":
                one.send(QUESTION)
                return bool(one.recv(512))
            return True
        except OSError:
            return False


def probe(targets):
    found = []
    threads = [threading.Thread(target=lambda n=name, t=target: answers(*t) and found.append(n))
               for name, target in targets.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found)


def listen(ports):
    def stream(port):
        with socket.create_server(("", port), backlog=64) as server:
            while True:
                server.accept()[0].close()

    def packets(port):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("", port))
            while True:
                server.sendto(*server.recvfrom(512))

    threads = [threading.Thread(target=serve, args=[port]) for port in ports for serve in (stream, packets)]
    for thread in threads:
        thread.start()


def main():
    if sys.argv[1:2] == ["--listen"]:
        address, ports = sys.argv[2], sys.argv[3:]
        inside = ["nsenter", f"--net={namespaces()[address]}"]
        subprocess.run([*inside, sys.executable, __file__, "--here", *ports])
    elif sys.argv[1:2] == ["--here"]:
        listen([int(port) for port in sys.argv[2:]])
    elif sys.argv[1:2] == ["--probe"]:
        print(json.dumps(probe(json.load(sys.stdin))))
    else:
        asked = json.load(sys.stdin)
        files = namespaces()
        running = {}
        for name, address in asked["from"].items():
            inside = [] if address is None else ["nsenter", f"--net={files[address]}"]
            running[name] = subprocess.Popen([*inside, sys.executable, __file__, "--probe"], text=True,
                                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            running[name].stdin.write(json.dumps(asked["to"]))
            running[name].stdin.close()
        print(json.dumps({name: json.loads(one.stdout.read()) for name, one in running.items()}))


main()
