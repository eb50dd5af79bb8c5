"""Measures what Gantry promises about speed and size, against baselines of the same run.

Pairs are interleaved, so that a machine whose speed drifts slows both sides. Figures, not verdicts:
a target that is missed is marked and does not fail the run; a wrong answer does.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from wsclient import WebSocket  # noqa: E402

KEY = "benchmark-key-benchmark-key"
HELLO = "print('Hello')"
PYTHON = subprocess.run(
    ["python3", "-c", "import sys; print(sys.executable)"], capture_output=True, text=True, check=True
).stdout.strip()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    def __init__(self, programs, data, variables=(), port=None):
        self.port = port or free_port()
        self.data = data
        environment = {**os.environ, "API_KEY": KEY, "PORT": str(self.port), "GANTRY_DATA_DIR": data, **dict(variables)}
        self.log = open(os.path.join(data, "out"), "w")
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [os.path.join(programs, "gantry"), "serve"], env=environment, stdout=self.log, stderr=self.log
        )
        while not self.answers():
            if self.process.poll() is not None or time.perf_counter() - begin > 30:
                self.process.kill()
                raise RuntimeError("the server did not start; see " + self.log.name)
            time.sleep(0.001)
        self.ready = time.perf_counter() - begin

    def answers(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def resident(self):
        with open(f"/proc/{self.process.pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024

    def connect(self):
        return WebSocket(self.port, KEY)

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


rows = []


def row(what, ours, baseline, unit, ratio, target, holds):
    rows.append((what, ours, baseline, ratio, target, "yes" if holds else "MISSED"))
    print(f"{what}: {ours} {unit}, baseline {baseline}, ratio {ratio} (target {target}) "
          f"{'holds' if holds else 'MISSED'}", flush=True)


def timed(act):
    begin = time.perf_counter()
    result = act()
    return time.perf_counter() - begin, result


def latency(server, pairs):
    folder = tempfile.mkdtemp()
    path = os.path.join(folder, "hello.py")
    with open(path, "w") as file:
        file.write(HELLO + "\n")
    ws = server.connect()
    message = {"user_id": "bench", "code": HELLO, "deploy": False}
    for _ in range(20):
        ws.ask(message)
    ours, direct = [], []
    for _ in range(pairs):
        took, result = timed(lambda: subprocess.run([PYTHON, path], capture_output=True))
        assert result.stdout == b"Hello\n"
        direct.append(took * 1e3)
        took, reply = timed(lambda: ws.ask(message))
        assert reply["status"] == "tests_passed" and reply["stdout"] == "Hello\n", reply
        ours.append(took * 1e3)
    ws.close()
    shutil.rmtree(folder)
    p50, d50, p99, d99 = (quantile(v, q) for q in (0.5, 0.99) for v in (ours, direct))
    row("hello, frame → reply, p50", f"{p50:.2f}", f"{d50:.2f}", "ms", f"{p50 / d50:.2f}", "≤ 0.20", p50 <= d50 / 5)
    row("hello, frame → reply, p99", f"{p99:.2f}", f"{d99:.2f}", "ms", f"{p99 / d99:.2f}", "≤ 1.00", p99 <= d99)


LOOP = """
import subprocess, sys, time
end, count = time.time() + float(sys.argv[1]), 0
while time.time() < end:
    subprocess.run([sys.executable, sys.argv[2]], stdout=subprocess.DEVNULL)
    count += 1
print(count)
"""


def direct_rate(path, seconds):
    loops = [
        subprocess.Popen([PYTHON, "-c", LOOP, str(seconds), path], stdout=subprocess.PIPE) for _ in range(2)
    ]
    return sum(int(loop.communicate()[0]) for loop in loops) / seconds


def gantry_rate(server, seconds, connections=16):
    message = {"user_id": "bench", "code": HELLO, "deploy": False}
    sockets = [server.connect() for _ in range(connections)]
    by_fd = {ws.sock.fileno(): ws for ws in sockets}
    for ws in sockets:
        ws.send(message)
    count, end = 0, time.time() + seconds
    while time.time() < end:
        for fd in select.select(list(by_fd), [], [], 5)[0]:
            reply = by_fd[fd].receive()
            assert reply["status"] == "tests_passed", reply
            count += 1
            by_fd[fd].send(message)
    for ws in sockets:
        assert ws.receive()["status"] == "tests_passed"
        ws.close()
    return count / seconds


def throughput(server, rounds, seconds):
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(HELLO + "\n")
        file.flush()
        gantry_rate(server, 1)
        ours, direct = [], []
        for _ in range(rounds):
            direct.append(direct_rate(file.name, seconds))
            ours.append(gantry_rate(server, seconds))
    o, d = quantile(ours, 0.5), quantile(direct, 0.5)
    row("runs per second, 16 connections", f"{o:.0f}", f"{d:.0f}", "runs/s", f"{o / d:.2f}", "≥ 4.00", o >= 4 * d)


def get(port, host):
    """The status of GET /, or None when nothing answers."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            s.sendall(f"GET / HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = s.makefile("rb").readline().split()
            return int(answer[1]) if len(answer) > 1 else None
    except OSError:
        return None


def poll(port, host):
    end = time.time() + 30
    while get(port, host) != 200:
        assert time.time() < end, f"{host} never answered 200"
        time.sleep(0.001)


def by_hand():
    port = free_port()
    folder = tempfile.mkdtemp()
    begin = time.perf_counter()
    process = subprocess.Popen(
        [PYTHON, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    poll(port, "localhost")
    took = time.perf_counter() - begin
    process.kill()
    process.wait()
    os.rmdir(folder)
    return took


def deploy(server, pairs):
    ws = server.connect()
    ours, direct = [], []
    for number in range(pairs):
        direct.append(by_hand() * 1e3)
        repl = f"bench-{number}"
        begin = time.perf_counter()
        ws.send({"user_id": "bench", "code": HELLO, "repl_id": repl})
        poll(server.port, f"{repl}.apps.localhost:{server.port}")
        ours.append((time.perf_counter() - begin) * 1e3)
        reply = ws.receive()
        assert reply["status"] == "deployed", reply
        stop(server, repl)
    ws.close()
    o, d = quantile(ours, 0.5), quantile(direct, 0.5)
    o99, d99 = quantile(ours, 0.99), quantile(direct, 0.99)
    row("good code → URL answers 200, p50", f"{o:.1f}", f"{d:.1f}", "ms", f"{o / d:.2f}", "≤ 1.50", o <= 1.5 * d)
    row("good code → URL answers 200, p99", f"{o99:.1f}", f"{d99:.1f}", "ms", f"{o99 / d99:.2f}", "–", True)


def stop(server, repl):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/stop",
        json.dumps({"replId": repl}).encode(),
        {"X-API-Key": KEY, "Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=30).read()


def idle_sockets(server, count):
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The server keeps a quarter of its open files for other things; here and there the bound is the same.
    count = min(count, (hard - 512) * 7 // 10)
    server.connect().close()
    time.sleep(0.5)
    before = server.resident()
    sockets = [server.connect() for _ in range(count)]
    time.sleep(1)
    each = (server.resident() - before) / count / 1024
    for ws in sockets:
        ws.close()
    row(f"memory of one idle WebSocket, of {count}", f"{each:.1f}", "–", "KiB", "–", "≤ 16 KiB", each <= 16)


def start(programs, data, times):
    ready, resident = [], []
    for _ in range(times):
        server = Server(programs, data)
        ready.append(server.ready * 1e3)
        time.sleep(0.5)
        resident.append(server.resident() / 1e6)
        server.stop()
    r, m = quantile(ready, 0.5), quantile(resident, 0.5)
    row("start → ready, warm data folder", f"{r:.0f}", "–", "ms", "–", "≤ 300 ms", r <= 300)
    row("resident at rest", f"{m:.1f}", "–", "MB", "–", "≤ 40 MB", m <= 40)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default="target/release")
    options.add_argument("--short", action="store_true", help="fewer rounds and deploys")
    options = options.parse_args()
    data = tempfile.mkdtemp()
    server = Server(options.programs, data)
    try:
        latency(server, 200 if options.short else 1000)
        throughput(server, 3 if options.short else 7, 3)
        deploy(server, 20 if options.short else 200)
        idle_sockets(server, 10_000)
    finally:
        server.stop()
    start(options.programs, data, 10)
    shutil.rmtree(data)
    print("\n| what | measured | baseline | ratio | target | holds |\n|---|---|---|---|---|---|")
    for values in rows:
        print("| " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
