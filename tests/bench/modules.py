#!/usr/bin/env python3
"""Measures calls of Python modules through Gantry beside direct gRPC calls, in turn.

    python3 tests/bench/modules.py --programs target/release [--short]
    eval "$(scripts/testbed env)"; python3 tests/bench/modules.py --programs target/release --bed [--forward] [--short]

Run by the Python that tests/modules/run.py makes (it starts itself with it). Direct calls are grpcio's. On the bed they go to
the same pods by the same way: to their addresses, or with --forward, as Gantry's then, through a port-forward. On the local
platform they go to a server of the same code outside a sandbox, since nobody but Gantry reaches the one inside.

Figures, not verdicts: a target that is missed is marked and does not fail the run; a wrong answer does.
"""

import argparse
import json
import os
import pathlib
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "modules"), str(ROOT / "runner-image")]

#: The first module of a server waits for pip; a pod for its image.
PATIENCE_S = 300
KEY = "a-key-for-the-benchmark-only"
CALLERS = 32
PORT = 50051
#: On the bed whoever asks first would pay for the namespace; a user of its own, whose namespace is removed in the end.
USER = f"module-bench-{uuid.uuid4().hex[:6]}"
NAMESPACE = f"user-{USER}"
KUBECTL = os.environ.get("TESTBED_KUBECTL", "kubectl")


class Connection:
    """HTTP with as little of a client as there can be: what is measured is Gantry, not Python's http.client."""

    def __init__(self, port: int):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @staticmethod
    def request(method: str, path: str, body: bytes = b"{}") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\n"
        return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    def ask(self, request: bytes, refused=()) -> bytes:
        self.socket.sendall(request)
        data = self.socket.recv(65536)
        while b"\r\n\r\n" not in data:
            data += self.socket.recv(65536)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1])
        if len(body) < length:
            rest = bytearray(length)
            rest[:len(body)] = body
            view, have = memoryview(rest), len(body)
            while have < length:
                have += self.socket.recv_into(view[have:])
            body = bytes(rest)
        status = int(head[9:12])
        if status != 200 and status not in refused:
            raise SystemExit(f"{request[:100]}: {status} {body[:2000].decode()}")
        return body


class Gantry:
    """A server of its own."""

    def __init__(self, programs: pathlib.Path, bed: bool, forward: bool):
        self.data = tempfile.TemporaryDirectory()
        variables = {**os.environ, "API_KEY": KEY, "PORT": "0", "GANTRY_DATA_DIR": self.data.name, "GANTRY_LOG": "warn"}
        variables["ELASTICSEARCH_HOST"] = ""
        if bed:
            variables.update(GANTRY_PLATFORM="kubernetes", GANTRY_NAMESPACE="gantry-bench", GANTRY_MODULE_FORWARD=str(forward).lower())
        self.process = subprocess.Popen([programs / "gantry", "serve"], env=variables, stdout=subprocess.PIPE, text=True)
        said = next(line for line in self.process.stdout if " is at http://" in line)
        self.port = int(re.search(r":(\d+)/", said).group(1))

    def connection(self) -> Connection:
        return Connection(self.port)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.data.cleanup()


def create(connection, module: str) -> dict:
    return json.loads(connection.ask(Connection.request("POST", f"/create_pod/{module}?userId={USER}")))


def call(module: str, method: str, args) -> bytes:
    path = f"/run_module?module_name={module}&method_name={method}&userId={USER}"
    return Connection.request("POST", path, json.dumps({"args": args}).encode())


def kubectl(*arguments: str, given=None) -> str:
    done = subprocess.run([KUBECTL, "-n", NAMESPACE, *arguments], input=given, capture_output=True, text=True, timeout=PATIENCE_S)
    if done.returncode:
        raise SystemExit(f"kubectl {' '.join(arguments)}: {done.stderr}")
    return done.stdout


class Pods:
    """Direct ways to the pods on the bed."""

    def __init__(self, forward: bool):
        self.forward = forward
        self.forwards = []

    def address(self, module: str) -> str:
        path = "jsonpath={.items[0].metadata.name} {.items[0].status.podIP}"
        name, address = kubectl("get", "pods", "-l", f"gantry.dev/module={module}", "-o", path).split()
        if not self.forward:
            return f"{address}:{PORT}"
        process = subprocess.Popen([KUBECTL, "-n", NAMESPACE, "port-forward", name, f":{PORT}"], stdout=subprocess.PIPE, text=True)
        self.forwards.append(process)
        return "127.0.0.1:" + re.search(r":(\d+) ->", process.stdout.readline())[1]

    def stop(self) -> None:
        for process in self.forwards:
            process.terminate()
            process.wait(30)
        subprocess.run([KUBECTL, "delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found"], capture_output=True, check=False)


class Outside:
    """Servers of the same code outside of any sandbox."""

    def __init__(self):
        self.servers = []

    def address(self, module: str) -> str:
        from test_server import Server

        server = Server(module, PYTHONPATH=str(ROOT / "runner-image"), PYTHONDONTWRITEBYTECODE="1")
        self.servers.append(server)
        return f"127.0.0.1:{server.port}"

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


def median_us(act, times: int) -> float:
    """The median of so many calls, in microseconds."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def rate(make, seconds: float) -> float:
    """Calls per second of 32 callers, each with what `make` gives it."""
    until = time.perf_counter() + seconds

    def caller(_) -> int:
        act, done = make(), 0
        while time.perf_counter() < until:
            act()
            done += 1
        return done

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(caller, range(CALLERS))) / seconds


def told(what: str, ours: float, others: float, unit: str, ratio: float, target: float, most: bool) -> None:
    holds = ratio <= target if most else ratio >= target
    print(f"{what}: {ours:.0f} {unit} through Gantry, {others:.0f} {unit} direct: {ratio:.2f}, target {target} "
          f"{'holds' if holds else 'MISSED'}", flush=True)


def calls(gantry: Gantry, direct, short: bool) -> None:
    import grpc
    from gantry_module import module_service_pb2 as pb
    from test_server import SERVICE

    rounds, times, seconds = (3, 200, 2) if short else (9, 1_000, 6)
    connection = gantry.connection()
    tokens = {module: create(connection, module).get("token") for module in ("math", "numpy")}
    addresses = {module: direct.address(module) for module in ("math", "numpy")}

    def through(module, method, args):
        own, request = gantry.connection(), call(module, method, args)
        return lambda: own.ask(request)

    def straight(module, method, args):
        # Its own connection, as every client of its own has one: grpcio shares one among channels that are alike.
        channel = grpc.insecure_channel(addresses[module], options=[
            ("grpc.max_receive_message_length", 64 << 20), ("grpc.use_local_subchannel_pool", 1)])
        ask = channel.unary_unary(
            f"/{SERVICE}/Call",
            request_serializer=pb.CallRequest.SerializeToString, response_deserializer=pb.CallReply.FromString,
        )
        request = pb.CallRequest(method=method, args=json.dumps(args).encode())
        metadata = [("authorization", f"Bearer {tokens[module]}")] if tokens[module] else None
        return lambda: ask(request, metadata=metadata)

    for name, module, method, args, count in (
        ("math.sqrt, warm, p50", "math", "sqrt", [16], times),
        ("numpy.arange, 1 MB, p50", "numpy", "arange", [131_072], max(10, times // 20)),
    ):
        one, other = through(module, method, args), straight(module, method, args)
        median_us(one, 20), median_us(other, 20)
        # In turn, so that a busy machine is busy for both.
        pairs = [(median_us(one, count), median_us(other, count)) for _ in range(rounds)]
        ours, others = (statistics.median(side) for side in zip(*pairs))
        told(name, ours, others, "µs", ours / others, 1.5, most=True)
    pairs = [
        (rate(lambda: through("math", "sqrt", [16]), seconds), rate(lambda: straight("math", "sqrt", [16]), seconds))
        for _ in range(1 if short else 5)
    ]
    ours, others = (statistics.median(side) for side in zip(*pairs))
    told(f"calls per second, {CALLERS} callers", ours, others, "/s", ours / others, 0.8, most=False)


def without_status(text: str) -> str:
    """A manifest as somebody would write it, of what Gantry made."""
    items = []
    for item in json.loads(text)["items"]:
        meta = item["metadata"]
        item["metadata"] = {"name": meta["name"], "namespace": NAMESPACE, "labels": {"app": "by-hand"}}
        item.pop("status", None)
        for field in ("clusterIP", "clusterIPs"):
            item.get("spec", {}).pop(field, None)
        items.append(item)
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": items})


def gone() -> None:
    end = time.monotonic() + PATIENCE_S
    while kubectl("get", "pods", "-l", "gantry.dev/module=numpy", "-o", "name"):
        if time.monotonic() > end:
            raise SystemExit("a pod that was removed is not gone")
        time.sleep(0.1)


def starts(gantry: Gantry, rounds: int) -> None:
    """From POST /create_pod/numpy to the first answer, beside kubectl apply of the same until it is ready."""
    connection = gantry.connection()
    request = call("numpy", "array", [16, 20, 24])
    create(connection, "numpy")
    manifest = without_status(kubectl("get", "service,ingress,secret,deployment", "-l", "gantry.dev/module=numpy", "-o", "json"))
    ours, others = [], []
    for _ in range(rounds):
        connection.ask(Connection.request("DELETE", f"/pod/numpy?userId={USER}"))
        gone()
        begun = time.perf_counter()
        kubectl("apply", "-f", "-", given=manifest)
        kubectl("rollout", "status", "deployment/module-numpy", f"--timeout={PATIENCE_S}s")
        others.append((time.perf_counter() - begun) * 1e3)
        kubectl("delete", "-f", "-", given=manifest)
        gone()
        begun = time.perf_counter()
        create(connection, "numpy")
        answer = connection.ask(request)
        ours.append((time.perf_counter() - begun) * 1e3)
        if json.loads(answer)["result"] != [16, 20, 24]:
            raise SystemExit(f"numpy.array answered {answer}")
    one, other = statistics.median(ours), statistics.median(others)
    told("create_pod of numpy to its first answer, kubectl apply to ready", one, other, "ms", one / other, 1.2, most=True)


def measure(options) -> None:
    direct = Pods(options.forward) if options.bed else Outside()
    gantry = Gantry(options.programs, options.bed, options.forward)
    try:
        calls(gantry, direct, options.short)
        if options.bed:
            starts(gantry, 3 if options.short else 9)
        else:
            connection = gantry.connection()
            begun = time.perf_counter()
            create(connection, "itertools")
            print(f"create_pod of a module to its first answer: {(time.perf_counter() - begun) * 1000:.0f} ms")
    finally:
        direct.stop()
        gantry.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="the folder with the program gantry")
    parser.add_argument("--bed", action="store_true", help="on the bed, instead of on the local platform")
    parser.add_argument("--forward", action="store_true", help="both sides by port-forward; only with --bed")
    parser.add_argument("--short", action="store_true", help="fewer calls")
    options = parser.parse_args()
    import run

    python = run.environment()
    if pathlib.Path(sys.prefix) != python.parent.parent:
        os.execv(python, [python, __file__, *sys.argv[1:]])
    measure(options)


if __name__ == "__main__":
    main()
