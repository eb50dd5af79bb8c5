#!/usr/bin/env python3
"""Measures calls of Python modules through Gantry beside direct gRPC calls of the same server, in turn.

    python3 tests/bench/modules.py --programs target/release [--short]

Run by the Python that tests/modules/run.py makes (it starts itself with it). Direct calls go to a server of the same code
outside a sandbox, since nobody but Gantry reaches the one inside.
"""

import argparse
import http.client
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "modules"), str(ROOT / "runner-image")]

#: The first module waits for pip.
PATIENCE_S = 300
KEY = "a-key-for-the-benchmark-only"
CALLERS = 32


class Gantry:
    """A server of its own, and one connection to it."""

    def __init__(self, programs: pathlib.Path):
        self.data = tempfile.TemporaryDirectory()
        variables = {**os.environ, "API_KEY": KEY, "PORT": "0", "GANTRY_DATA_DIR": self.data.name, "GANTRY_LOG": "warn"}
        self.process = subprocess.Popen([programs / "gantry", "serve"], env=variables, stdout=subprocess.PIPE, text=True)
        said = next(line for line in self.process.stdout if " is at http://" in line)
        self.port = int(re.search(r":(\d+)/", said).group(1))

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    @staticmethod
    def post(connection, path: str, body: bytes = b"{}") -> bytes:
        connection.request("POST", path, body, {"x-api-key": KEY, "content-type": "application/json"})
        answer = connection.getresponse()
        told = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {told.decode()}")
        return told

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.data.cleanup()


def median_us(call, times: int) -> float:
    """The median of so many calls, in microseconds."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1e6


def in_turn(one, other, rounds: int, times: int):
    """The medians of both, measured in turn so that a busy machine is busy for both."""
    pairs = [(median_us(one, times), median_us(other, times)) for _ in range(rounds)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def rate(make, seconds: float) -> float:
    """Calls per second of 32 callers, each with what `make` gives it."""
    until = time.perf_counter() + seconds

    def caller(_) -> int:
        call, done = make(), 0
        while time.perf_counter() < until:
            call()
            done += 1
        return done

    with ThreadPoolExecutor(CALLERS) as callers:
        return sum(callers.map(caller, range(CALLERS))) / seconds


def measure(programs: pathlib.Path, short: bool) -> None:
    from gantry_module import module_service_pb2 as pb
    from test_server import SERVICE, Server

    rounds, times, seconds = (3, 200, 2) if short else (9, 1_000, 10)
    gantry = Gantry(programs)
    direct = {module: Server(module, PYTHONPATH=str(ROOT / "runner-image"), PYTHONDONTWRITEBYTECODE="1") for module in ("math", "numpy")}
    try:
        connection = gantry.connection()
        Gantry.post(connection, "/create_pod/math")
        begun = time.perf_counter()
        Gantry.post(connection, "/create_pod/itertools")
        first = time.perf_counter() - begun
        Gantry.post(connection, "/create_pod/numpy")

        def through(module, method, args, connection):
            path, body = f"/run_module?module_name={module}&method_name={method}", json.dumps({"args": args}).encode()
            return lambda: Gantry.post(connection, path, body)

        def straight(module, method, args):
            ask = direct[module].channel.unary_unary(
                f"/{SERVICE}/Call",
                request_serializer=pb.CallRequest.SerializeToString, response_deserializer=pb.CallReply.FromString,
            )
            request = pb.CallRequest(method=method, args=json.dumps(args).encode())
            return lambda: ask(request)

        for name, module, method, args, count in (
            ("math.sqrt, warm, p50", "math", "sqrt", [16], times),
            ("numpy.arange, 1 MB, p50", "numpy", "arange", [131_072], max(10, times // 20)),
        ):
            one, other = through(module, method, args, connection), straight(module, method, args)
            median_us(one, 20), median_us(other, 20)
            gantry_us, direct_us = in_turn(one, other, rounds, count)
            print(f"{name}: {gantry_us:.0f} µs through Gantry, {direct_us:.0f} µs direct: {gantry_us / direct_us:.2f}x")
        by_gantry = rate(lambda: through("math", "sqrt", [16], gantry.connection()), seconds)
        by_grpc = rate(lambda: straight("math", "sqrt", [16]), seconds)
        print(f"calls per second, {CALLERS} callers: {by_gantry:.0f} through Gantry, {by_grpc:.0f} direct: {by_gantry / by_grpc:.2f}")
        print(f"create_pod of a module to its first answer: {first * 1000:.0f} ms")
    finally:
        for server in direct.values():
            server.stop()
        gantry.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=pathlib.Path, required=True, help="the folder with the program gantry")
    parser.add_argument("--short", action="store_true", help="fewer calls")
    arguments = parser.parse_args()
    import run

    python = run.environment()
    if pathlib.Path(sys.prefix) != python.parent.parent:
        os.execv(python, [python, __file__, *sys.argv[1:]])
    measure(arguments.programs, arguments.short)


if __name__ == "__main__":
    main()
