"""Ten users work as usual while one user attacks with everything at once; measures what the ten notice.

First the ten alone, then the ten beside the attacker, on one server with its default settings. A
submission of theirs that fails ends the run with an error; a target that is missed is marked.
"""

import argparse
import http.client
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from run import KEY, Server, quantile  # noqa: E402
from wsclient import WebSocket  # noqa: E402

USERS = 10
# Between two submissions of one user: people read what came back.
PAUSE_SECONDS = (0.3, 0.7)
HELLO = "print('Hello')"
MIB = 1 << 20

REPORT_OF_DEPTH = """
import glob, os, sys
def test_nothing():
    for argument in sys.argv:
        if argument.startswith('--junit'):
            open(argument.split('=', 1)[1], 'w').write('<a>' * 100000)
    os._exit(0)
"""
REPORT_OF_ATTRIBUTES = REPORT_OF_DEPTH.replace("'<a>' * 100000", "'<a ' + ' '.join(f'b{i}=\"1\"' for i in range(100000)) + '/>'")
FORK_BOMB = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
MEMORY = "x = []\nwhile True: x.append(bytearray(1 << 20))"
FLOOD = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
BUSY = "while True: pass"
POISON = """
import os
for folder in ('/workspace', '/tmp', '/dev/shm'):
    try: os.setxattr(folder, 'user.kept', b'x' * 1000)
    except OSError: pass
    os.system(f'chmod 000 {folder}')
"""
FILES = "import os\nn = 0\nwhile True:\n    open(f'/tmp/{n}', 'w').close(); n += 1"
FILL_DATA = """
import os, threading, http.server
def fill():
    try:
        with open('/data/big', 'wb') as file:
            while True: file.write(b'x' * (1 << 20))
    except OSError: pass
threading.Thread(target=fill, daemon=True).start()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(('', int(os.environ.get('PORT', 3000))), H).serve_forever()
"""
BUSY_SERVER = """
import os, threading, http.server
def spin():
    while True: pass
for _ in range(4): threading.Thread(target=spin, daemon=True).start()
class H(http.server.BaseHTTPRequestHandler):
    def do_GET(self): self.send_response(200); self.end_headers()
http.server.HTTPServer(('', int(os.environ.get('PORT', 3000))), H).serve_forever()
"""
SWAP_LINKS = BUSY_SERVER.replace("    while True: pass", """    while True:
        for target in ('/etc/passwd', '/etc/hostname'):
            try: os.symlink(target, '/data/database.sqlite')
            except OSError: pass
            try: os.unlink('/data/database.sqlite')
            except OSError: pass""")


class Normal(threading.Thread):
    """One user who submits, waits for the reply, reads it, and submits again."""

    def __init__(self, server, user, key):
        super().__init__(daemon=True)
        self.server, self.user, self.key = server, user, key
        self.took, self.failed, self.phase, self.done = {}, [], "", False

    def run(self):
        ws = None
        while not self.done:
            phase = self.phase
            begin = time.perf_counter()
            try:
                ws = ws or WebSocket(self.server.port, self.key)
                reply = ws.ask({"user_id": self.user, "code": HELLO, "deploy": False})
                if reply["status"] != "tests_passed" or reply["stdout"] != "Hello\n":
                    self.failed.append(reply)
            except OSError as error:
                self.failed.append(repr(error))
                ws = None
            if phase:
                self.took.setdefault(phase, []).append(time.perf_counter() - begin)
            time.sleep(random.uniform(*PAUSE_SECONDS))


class Health(threading.Thread):
    """Asks for the server's health on connections of its own, and how much memory it has."""

    def __init__(self, server):
        super().__init__(daemon=True)
        self.server, self.took, self.failed, self.resident, self.done = server, [], [], 0, False

    def run(self):
        while not self.done:
            begin = time.perf_counter()
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=10)
                connection.request("GET", "/healthz")
                status = connection.getresponse().status
                connection.close()
                if status != 200:
                    self.failed.append(status)
            except OSError as error:
                self.failed.append(repr(error))
            self.took.append(time.perf_counter() - begin)
            self.resident = max(self.resident, self.server.resident())
            time.sleep(0.1)


class Attacker:
    """One user with one key, and a thread for every trick; in a process of its own (see `attack`)."""

    def __init__(self, port, user, key):
        self.port, self.user, self.key, self.done = port, user, key, False
        self.counts = {}

    def start(self, only):
        tricks = [
            self.programs, self.programs, self.queue, self.queue_of_large_ones, self.input, self.unread_answers,
            self.searches, self.searches, self.searches, self.searches, self.sign_ins, self.idle_sockets,
            self.slow_headers, self.releases, self.modules,
        ]
        for trick in tricks:
            if not only or trick.__name__ in only:
                threading.Thread(target=self.repeat, args=(trick,), daemon=True).start()

    def repeat(self, trick):
        while not self.done:
            try:
                trick()
                self.counts[trick.__name__] = self.counts.get(trick.__name__, 0) + 1
            except (OSError, KeyError, ValueError, http.client.HTTPException):
                # Being refused is what is hoped for; the trick is tried again.
                time.sleep(0.05)

    def message(self, code, **fields):
        return {"user_id": self.user, "code": code, "deploy": False, **fields}

    def programs(self):
        ws = WebSocket(self.port, self.key)
        for test in (REPORT_OF_DEPTH, REPORT_OF_ATTRIBUTES):
            ws.ask(self.message(HELLO, tests={"test_it.py": test}))
        for code in (FORK_BOMB, MEMORY, FLOOD, BUSY, POISON, FILES):
            if self.done:
                return
            ws.ask(self.message(code, limits={"output_bytes": 16 * MIB, "processes": 256}))
        ws.close()

    def queue(self):
        ws = WebSocket(self.port, self.key)
        for _ in range(2000):
            ws.send(self.message("import time; time.sleep(9)"))
        ids = [ws.receive().get("submission_id") for _ in range(200)]
        for one in filter(None, ids):
            ws.send({"cancel": one})
        ws.close()

    def queue_of_large_ones(self):
        ws = WebSocket(self.port, self.key)
        for _ in range(100):
            ws.send(self.message("#" + "x" * 900_000))
        ws.close()

    def input(self):
        ws = WebSocket(self.port, self.key)
        ws.send(self.message("import time; time.sleep(9)", stream=True, interactive=True))
        one = ws.receive()["submission_id"]
        for _ in range(40):
            ws.send({"stdin": one, "data": "x" * 900_000})
        ws.close()

    def get(self, path, read=True):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path, headers={"X-API-Key": self.key})
        if not read:
            return connection
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return json.loads(body)

    def unread_answers(self):
        ws = WebSocket(self.port, self.key)
        reply = ws.ask(self.message("print('x' * (15 << 20))", limits={"output_bytes": 16 * MIB}))
        ws.close()
        unread = [self.get(f"/submissions/{reply['submission_id']}", read=False) for _ in range(5)]
        time.sleep(3)
        for connection in unread:
            connection.close()

    def searches(self):
        threads = [threading.Thread(target=self.search, daemon=True) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def search(self):
        try:
            self.get("/logs?limit=1000&q=x")
        except (OSError, ValueError, http.client.HTTPException):
            pass

    def sign_ins(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        for _ in range(1000):
            connection.request("POST", "/session", json.dumps({"key": self.key}),
                               {"Content-Type": "application/json", "Origin": f"http://127.0.0.1:{self.port}"})
            connection.getresponse().read()
        connection.close()

    def idle_sockets(self):
        sockets = []
        try:
            for _ in range(2000):
                sockets.append(socket.create_connection(("127.0.0.1", self.port), timeout=10))
            for _ in range(64):
                sockets.append(WebSocket(self.port, self.key).sock)
        finally:
            time.sleep(5)
            for each in sockets:
                each.close()

    def slow_headers(self):
        sockets = [socket.create_connection(("127.0.0.1", self.port), timeout=10) for _ in range(200)]
        for each in sockets:
            each.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-")
        for _ in range(5):
            time.sleep(1)
            for each in sockets:
                each.sendall(b"a")
        for each in sockets:
            each.close()

    def releases(self):
        ws = WebSocket(self.port, self.key)
        for number in range(10):
            code = [FILL_DATA, SWAP_LINKS, BUSY_SERVER][number % 3]
            ws.ask({"user_id": self.user, "code": code, "repl_id": f"{self.user}-{number}",
                    "serves": False,
                    "tests": {"test_nothing.py": "def test_nothing(): pass"}})
        ws.close()
        time.sleep(1)

    def modules(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", f"/create_pod/json?n={random.random()}", b"", {"X-API-Key": self.key})
        connection.getresponse().read()
        connection.close()


def attack(port, key, only):
    """The attacker's process, until its standard input ends."""
    # Its own computer stands elsewhere: what it takes to send all this is not taken from the server's.
    os.nice(19)
    attacker = Attacker(port, "mallory", key)
    attacker.start(only)
    sys.stdin.read()
    attacker.done = True
    print(json.dumps(attacker.counts), flush=True)
    os._exit(0)


def create_key(programs, data, user):
    made = subprocess.run(
        [os.path.join(programs, "gantry"), "key", "create", "--user", user, "-o", "json"],
        env={**os.environ, "GANTRY_DATA_DIR": data, "API_KEY": KEY}, capture_output=True, check=True,
    )
    return json.loads(made.stdout)["key"]


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default="target/release")
    options.add_argument("--seconds", type=float, default=60, help="length of each of the two phases")
    options.add_argument("--only", nargs="*", default=[], help="these tricks alone, to find what one of them costs")
    options.add_argument("--attack", nargs=2, metavar=("PORT", "KEY"), help=argparse.SUPPRESS)
    options = options.parse_args()
    if options.attack:
        attack(int(options.attack[0]), options.attack[1], options.only)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    data = tempfile.mkdtemp()
    server = Server(options.programs, data)
    attacker = None
    try:
        keys = {user: create_key(options.programs, data, user) for user in [f"user{n}" for n in range(USERS)] + ["mallory"]}
        time.sleep(2)
        users = [Normal(server, user, key) for user, key in keys.items() if user != "mallory"]
        health = Health(server)
        for thread in users:
            thread.start()
        time.sleep(3)
        measure(users, "alone", options.seconds)
        attacker = subprocess.Popen(
            [sys.executable, __file__, "--attack", str(server.port), keys["mallory"], "--only", *options.only],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        health.start()
        measure(users, "attacked", options.seconds)
        counts, _ = attacker.communicate(timeout=60)
        for thread in [*users, health]:
            thread.done = True
        for thread in [*users, health]:
            thread.join(60)
        tell(users, health, json.loads(counts))
    finally:
        if attacker:
            attacker.kill()
        server.stop()
        shutil.rmtree(data, ignore_errors=True)


def measure(users, phase, seconds):
    for user in users:
        user.phase = phase
    time.sleep(seconds)
    for user in users:
        user.phase = ""


def tell(users, health, counts):
    alone = [took * 1e3 for user in users for took in user.took.get("alone", [])]
    attacked = [took * 1e3 for user in users for took in user.took.get("attacked", [])]
    failed = [failure for user in users for failure in user.failed]
    ratio = quantile(attacked, 0.5) / quantile(alone, 0.5)
    slowest, resident = max(health.took) * 1e3, health.resident / 1e6
    rows = [
        ("normal users' p50, attacked / alone", f"{quantile(attacked, 0.5):.1f} / {quantile(alone, 0.5):.1f} ms = {ratio:.2f}", "≤ 1.5", ratio <= 1.5),
        ("normal users' p99, attacked / alone", f"{quantile(attacked, 0.99):.1f} / {quantile(alone, 0.99):.1f} ms", "–", True),
        (f"normal users' submissions that failed, of {len(alone) + len(attacked)}", str(len(failed)), "0", not failed),
        ("server's memory, largest", f"{resident:.0f} MB", "≤ 400 MB", resident <= 400),
        (f"health, slowest of {len(health.took)}", f"{slowest:.0f} ms (p50 {quantile(health.took, 0.5) * 1e3:.1f})", "≤ 100 ms", slowest <= 100 and not health.failed),
    ]
    print("| what | measured | target | holds |\n|---|---|---|---|")
    for what, measured, target, holds in rows:
        print(f"| {what} | {measured} | {target} | {'yes' if holds else 'MISSED'} |")
    print("The attacker's tricks, and how often each was carried through:", json.dumps(counts))
    for failure in failed[:5] + health.failed[:5]:
        print("failed:", failure, file=sys.stderr)
    if failed or health.failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
