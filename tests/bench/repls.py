"""Measures repls on the bed, against kubectl and a local terminal, in pairs; and that they leave nothing.

    eval "$(scripts/testbed env)"; python3 tests/bench/repls.py [--programs target/release] [--rounds 10] [--cycles 100]

Figures, not verdicts: a target that is missed is marked and does not fail the run; a wrong answer does.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import pty
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT / "tests" / "testbed")]
import kubernetes as cluster  # noqa: E402
import run  # noqa: E402
from bed import s3  # noqa: E402
from bed.settings import S3_BUCKET  # noqa: E402
from kubernetes import INGRESS, PATIENCE_S, Server, kubectl, wait_for_page  # noqa: E402
from run import KEY, quantile, row  # noqa: E402
from wsclient import WebSocket  # noqa: E402

USER = f"w-bench-{uuid.uuid4().hex[:6]}"
NAMESPACE = f"user-{USER}"
CODE = "print('Hello')\n"
# As many starts at once as the issue names.
MANY = 20
PRESSES = 400


def put(repl, name, text):
    s3.request("PUT", f"/{S3_BUCKET}/code/{repl}/{name}", text.encode())


def stored(repl, name):
    """What the store has of a file, or None."""
    try:
        return s3.request("GET", f"/{S3_BUCKET}/code/{repl}/{name}").decode()
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return None


def post(server, path, body):
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}{path}", json.dumps(body).encode(),
        {"X-API-Key": KEY, "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def start(server, repl):
    return post(server, "/start", {"replId": repl, "userId": USER})


def host(repl):
    return f"{repl}.apps.localhost"


def named(repls):
    """What there is of these repls, of every kind that can be listed."""
    kinds = kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    kinds = ",".join(kind for kind in kinds if not kind.startswith("events"))
    found = kubectl("get", kinds, "-n", NAMESPACE, "-o", "name", check=False).split()
    return [one for one in found if any(repl in one for repl in repls)]


def gone(repls):
    """Waits until nothing is left of them: what ends beside the other side's start slows it."""
    end = time.time() + PATIENCE_S
    while left := named(repls):
        assert time.time() < end, f"left: {left}"
        time.sleep(0.2)


def rendered(model, name):
    """The objects that /start made, under another name; its files are the model's."""
    found = json.loads(kubectl("get", "deployment,service,ingress,secret", "-n", NAMESPACE,
                               "-l", f"gantry.dev/repl={model}", "-o", "json"))
    kept = []
    for item in found["items"]:
        item.pop("status", None)
        metadata = item["metadata"]
        item["metadata"] = {key: metadata[key] for key in ("name", "namespace", "annotations") if key in metadata}
        item["metadata"].get("annotations", {}).pop("deployment.kubernetes.io/revision", None)
        for key in ("clusterIP", "clusterIPs"):
            item.get("spec", {}).pop(key, None)
        kept.append(item)
    text = json.dumps(kept)
    prefix = f"code/{model}/"
    return json.loads(text.replace(prefix, "FILES/").replace(model, name).replace("FILES/", prefix))


def applied(items, repls):
    """kubectl apply, and how long until every Deployment is rolled out, and until every page is served."""
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    begin = time.perf_counter()
    kubectl("apply", "-f", "-", given=text)
    if len(repls) == 1:
        kubectl("rollout", "status", "-n", NAMESPACE, f"deployment/{repls[0]}", f"--timeout={PATIENCE_S}s")
    else:
        # One command for all of them: as many as there are would be slower by their own starts.
        names = [f"deployment/{repl}" for repl in repls]
        kubectl("wait", "-n", NAMESPACE, "--for=condition=Available", *names, f"--timeout={PATIENCE_S}s")
    rolled_out = time.perf_counter() - begin
    for repl in repls:
        wait_for_page(host(repl), b"Hello")
    served = time.perf_counter() - begin
    kubectl("delete", "-f", "-", "--wait=false", given=text)
    gone(repls)
    return rolled_out, served


def stop(server, repls):
    for repl in repls:
        assert post(server, "/stop", {"replId": repl}) == {"success": True}
    gone(repls)


def one_start(server, model, rounds):
    ours, rolled_out, served = [], [], []
    for number in range(rounds):
        name = f"{USER}-d{number}"
        one, other = applied(rendered(model, name), [name])
        rolled_out.append(one)
        served.append(other)
        repl = f"{USER}-o{number}"
        put(repl, "main.py", CODE)
        begin = time.perf_counter()
        assert start(server, repl)["podCreated"]
        wait_for_page(host(repl), b"Hello")
        ours.append(time.perf_counter() - begin)
        stop(server, [repl])
    o, r, s = (quantile(values, 0.5) for values in (ours, rolled_out, served))
    row("/start → first 200 through the ingress, p50, against apply + rollout status",
        f"{o:.2f}", f"{r:.2f}", "s", f"{o / r:.2f}", "≤ 1.20", o <= 1.2 * r)
    row("the same, against apply → first 200", f"{o:.2f}", f"{s:.2f}", "s", f"{o / s:.2f}", "–", True)


def many_starts(server, model, rounds):
    ours, rolled_out, served = [], [], []
    with concurrent.futures.ThreadPoolExecutor(MANY) as pool:
        def by_hand(number):
            names = [f"{USER}-m{number}-d{one}" for one in range(MANY)]
            items = [item for name in names for item in rendered(model, name)]
            one, other = applied(items, names)
            rolled_out.append(one)
            served.append(other)

        def by_start(number):
            repls = [f"{USER}-m{number}-o{one}" for one in range(MANY)]
            for repl in repls:
                put(repl, "main.py", CODE)
            begin = time.perf_counter()
            made = list(pool.map(lambda repl: start(server, repl), repls))
            assert all(one["podCreated"] for one in made), made
            list(pool.map(lambda repl: wait_for_page(host(repl), b"Hello"), repls))
            ours.append(time.perf_counter() - begin)
            stop(server, repls)

        for number in range(rounds):
            # Each side is first as often as the other.
            for act in (by_hand, by_start)[:: 1 if number % 2 == 0 else -1]:
                act(number)
    o, r, s = (quantile(values, 0.5) for values in (ours, rolled_out, served))
    row(f"/start of {MANY} at once → all served, against apply of {MANY} + rollout status",
        f"{o:.1f}", f"{r:.1f}", "s", f"{o / r:.2f}", "≤ 1.30", o <= 1.3 * r)
    row("the same, against apply → all served", f"{o:.1f}", f"{s:.1f}", "s", f"{o / s:.2f}", "–", True)


def local_echo():
    """Key press to echo of a terminal on this machine, in milliseconds."""
    child, terminal = pty.fork()
    if child == 0:
        os.execvp("cat", ["cat"])
    time.sleep(0.2)
    took = []
    for _ in range(PRESSES):
        begin = time.perf_counter()
        os.write(terminal, b"k")
        while b"k" not in os.read(terminal, 64):
            pass
        took.append((time.perf_counter() - begin) * 1e3)
    os.close(terminal)
    os.waitpid(child, 0)
    return took


def sees(ws, text):
    shown = b""
    while text not in shown:
        message = ws.receive()
        if isinstance(message, bytes):
            shown += message[1 + message[0]:]


def terminal(repl, url):
    """The repl's runner through the ingress, by the URL that /start gave."""
    address, port = INGRESS.rsplit(":", 1)
    name, path = url.removeprefix("ws://").split("/", 1)
    return WebSocket(int(port), "", f"/{path}", host=address, named=name)


def echo(server, repl):
    ws = terminal(repl, start(server, repl)["terminalUrl"])
    ws.send({"id": 1, "op": "terminal.open", "terminal": "one"})
    ws.send_bytes(b"\x03onecat\n")
    sees(ws, b"cat\r\n")
    took = []
    for number in range(PRESSES):
        # Another key than the one before: a late echo is not taken for this one's.
        key = bytes([ord("d") + number % 20])
        begin = time.perf_counter()
        ws.send_bytes(b"\x03one" + key)
        sees(ws, key)
        took.append((time.perf_counter() - begin) * 1e3)
    ws.close()
    local = local_echo()
    ours, base = quantile(took, 0.5), quantile(local, 0.5)
    row("key press → echo through the ingress, p50, against a local terminal",
        f"{ours:.2f}", f"{base:.2f}", "ms", f"+{ours - base:.2f} ms", "≤ 5 ms more", ours - base <= 5)
    print(f"    p95 {quantile(took, 0.95):.2f} ms, p99 {quantile(took, 0.99):.2f} ms")


def asked(ws, request):
    ws.send(request)
    while True:
        answer = ws.receive()
        if isinstance(answer, dict) and answer.get("id") == request["id"]:
            assert answer.get("ok"), answer
            return answer


def cycles(server, count):
    """Stop and start again: nothing is left over, and no edit is lost."""
    repl = f"{USER}-cycle"
    put(repl, "main.py", CODE)
    took = []
    for number in range(count):
        begin = time.perf_counter()
        assert start(server, repl)["podCreated"]
        wait_for_page(host(repl), b"Hello")
        took.append(time.perf_counter() - begin)
        ws = WebSocket(server.port, KEY, f"/repls/{repl}/terminal")
        if number:
            kept = asked(ws, {"id": 1, "op": "files.read", "path": "edited.txt"})
            assert kept["text"] == f"edit {number - 1}", (number, kept)
        asked(ws, {"id": 2, "op": "files.write", "path": "edited.txt", "text": f"edit {number}"})
        ws.close()
        stop(server, [repl])
        assert stored(repl, "edited.txt") == f"edit {number}", number
        assert stored(repl, "main.py") == CODE
    left = named([repl])
    row(f"stop and start {count} times: left of it, of every kind", f"{len(left)}", "–", "objects", "–", "0", not left)
    row("edits lost meanwhile", "0", f"{count}", "edits", "–", "0", True)
    print(f"    /start → served: p50 {quantile(took, 0.5):.2f} s, slowest {max(took):.2f} s")


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default="target/release")
    options.add_argument("--rounds", type=int, default=10)
    full = bool(os.environ.get("GANTRY_TEST_FULL"))
    options.add_argument("--cycles", type=int, default=100 if full else 5)
    options = options.parse_args()
    data = tempfile.mkdtemp()
    server = Server(options.programs, data)
    model = f"{USER}-model"
    try:
        put(model, "main.py", CODE)
        start(server, model)
        wait_for_page(host(model), b"Hello")
        one_start(server, model, options.rounds)
        echo(server, model)
        many_starts(server, model, max(2, options.rounds // 5))
        stop(server, [model])
        row("/stop: left of it, of every kind in the namespace", "0", "–", "objects", "–", "0", not named([model]))
        cycles(server, options.cycles)
    finally:
        server.stop()
        cluster.forget(USER)
    shutil.rmtree(data)
    print("\n| what | measured | baseline | ratio | target | holds |\n|---|---|---|---|---|---|")
    for values in run.rows:
        print("| " + " | ".join(values) + " |")


if __name__ == "__main__":
    main()
