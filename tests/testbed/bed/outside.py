"""What answers at the addresses that stand for the rest of the world: run in a network namespace of its own."""

import socketserver
import sys
import threading

from . import network
from .process import Process, wait_for
from .settings import OUTSIDE, SOURCES

PROCESS = Process("outside")
# Seen: under 1 s.
READY_SECONDS = 20
# Names, and what services of clouds and pages on the internet listen on.
PORTS = [53, 80, 443, 8080]
ANSWER = b"outside\n"


class Stream(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(ANSWER)


class Packet(socketserver.BaseRequestHandler):
    def handle(self):
        self.request[1].sendto(ANSWER, self.client_address)


class Streams(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


def start():
    PROCESS.start([sys.executable, "-B", "-m", "bed.outside"], network.OUTSIDE_NAMESPACE, env={"PYTHONPATH": SOURCES})


def ready():
    probe = f"import socket; print(socket.create_connection(('{OUTSIDE}', {PORTS[-1]}), 2).recv(64))"
    return ANSWER.decode().strip() in network.run(
        ["nsenter", f"--net=/run/netns/{network.OUTSIDE_NAMESPACE}", sys.executable, "-c", probe])


def up():
    start()
    wait_for("what stands for the rest of the world", READY_SECONDS, ready, PROCESS)


def main():
    # One socket for each address: an answer to a packet must come from the address that was asked.
    servers = [Streams(("", port), Stream) for port in PORTS]
    servers += [socketserver.ThreadingUDPServer((address, 53), Packet) for address in [OUTSIDE, *network.OUTSIDE_ADDRESSES]]
    for server in servers[1:]:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    servers[0].serve_forever()


if __name__ == "__main__":
    main()
