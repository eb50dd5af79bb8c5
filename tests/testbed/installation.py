"""Gantry installed in the bed's cluster from infrastructure/: two replicas, side by side and one at a time.

Needs the bed up, its variables set and the server's image loaded (`scripts/testbed images --server`).
Leaves the installation there with --keep.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "bench"))

from wsclient import WebSocket  # noqa: E402

NAMESPACE = "gantry-two-replicas"
BUCKET = "gantry-installation-test"
KEY = "an-admin-key-for-the-installation"
PORT = 8000
# Seen: 6 s to start, 3 s for a lost pod to be there again. The rest is for a busy machine.
READY_SECONDS = 120
ANSWER_SECONDS = 60


def kubectl(*arguments, stdin=None, check=True):
    program = os.environ.get("TESTBED_KUBECTL", "kubectl")
    done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, timeout=READY_SECONDS)
    if check and done.returncode != 0:
        raise RuntimeError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def eventually(what, is_so, seconds=READY_SECONDS):
    ends = time.monotonic() + seconds
    while True:
        found = is_so()
        if found:
            return found
        if time.monotonic() > ends:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.2)


def install():
    make_bucket()
    settings = {
        "S3_BUCKET": BUCKET,
        **{name: os.environ[name] for name in ("AWS_ENDPOINT_URL", "AWS_REGION", "RUNNER_IMAGE", "DATABASE_IMAGE",
                                              "ELASTICSEARCH_HOST")},
    }
    secrets = {
        "API_KEY": KEY,
        "GANTRY_PEER_KEY": "a-secret-of-both-replicas-that-is-long-enough",
        **{name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")},
    }
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "gantry", "namespace": NAMESPACE}, "stringData": secrets}
    kubectl("apply", "-f", "-", stdin=json.dumps(secret))
    # An overlay, as an operator writes one.
    with tempfile.TemporaryDirectory() as folder:
        base = os.path.relpath(REPOSITORY / "infrastructure", folder)
        overlay = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "namespace": NAMESPACE, "resources": [base],
            "images": [{"name": "gantry", "newName": "docker.io/library/gantry"}],
            "configMapGenerator": [{"name": "gantry-settings", "behavior": "merge",
                                    "literals": [f"{name}={value}" for name, value in settings.items()]}],
        }
        pathlib.Path(folder, "kustomization.yaml").write_text(json.dumps(overlay))
        kubectl("apply", "-k", folder)
    for pod in ("gantry-0", "gantry-1"):
        eventually(f"{pod} is ready", lambda: ready(pod))
        eventually(f"{pod} knows the other one", lambda: get(pod, f"/submissions/{uuid7()}")[0] == 404, ANSWER_SECONDS)


def make_bucket():
    """The bed's S3 server keeps a bucket as a folder; a bucket that is there is as good."""
    sys.path.insert(0, str(REPOSITORY / "tests" / "testbed"))
    from bed.settings import STATE
    folder = STATE / "s3" / BUCKET
    if folder.parent.is_dir():
        folder.mkdir(exist_ok=True)


def ready(pod):
    path = "{.status.podIP} {.status.conditions[?(@.type=='Ready')].status} {.metadata.deletionTimestamp}"
    words = kubectl("get", "pod", pod, "-n", NAMESPACE, "--ignore-not-found", "-o", f"jsonpath={path}").split(" ")
    return words[0] if len(words) == 3 and words[1:] == ["True", ""] else None


def connect(pod):
    return WebSocket(PORT, KEY, host=eventually(f"{pod} is ready", lambda: ready(pod)), timeout=ANSWER_SECONDS)


def get(pod, path):
    request = urllib.request.Request(f"http://{ready(pod)}:{PORT}{path}", headers={"X-API-Key": KEY})
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def to_the_reply(socket):
    frames = []
    while True:
        frames.append(socket.receive())
        if "status" in frames[-1]:
            return frames


def uuid7():
    milliseconds = int(time.time() * 1000)
    number = (milliseconds << 80) | (0x7 << 76) | (int.from_bytes(os.urandom(2), "big") & 0xFFF) << 64
    return str(uuid.UUID(int=number | (0b10 << 62) | (int.from_bytes(os.urandom(8), "big") & ((1 << 62) - 1))))


def message(code, **more):
    return {"user_id": "two", "code": code, "deploy": False, "submission_id": uuid7(), "stream": True, **more}


def the_other_answers_all_the_same():
    first, second = connect("gantry-0"), connect("gantry-1")
    sent = message("print('Hello')")
    first.send(sent)
    whole = to_the_reply(first)
    assert whole[-1]["status"] == "tests_passed", whole[-1]
    second.send({"resume": sent["submission_id"], "after": 0})
    assert to_the_reply(second) == whole
    second.send(sent)
    assert to_the_reply(second) == whole
    path = f"/submissions/{sent['submission_id']}"
    assert get("gantry-0", path) == get("gantry-1", path)


def the_same_id_at_both_runs_once():
    sockets = [connect("gantry-0"), connect("gantry-1")]
    for _ in range(10):
        sent = message("import random; print(random.random())")
        replies = [None, None]

        def ask(index):
            sockets[index].send(sent)
            replies[index] = to_the_reply(sockets[index])

        threads = [threading.Thread(target=ask, args=(index,)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies[0] == replies[1] and replies[0][-1]["status"] == "tests_passed", replies


def a_release_of_one_is_the_others():
    socket = connect("gantry-0")
    socket.send(message("print('Hello')", deploy=True, database=False))
    reply = to_the_reply(socket)[-1]
    assert reply["status"] == "deployed", reply

    def seen():
        repls = get("gantry-1", "/repls")[1]["repls"]
        return [repl for repl in repls if repl["replId"] == "two-prod" and repl["release"] == reply["release"]]

    eventually("the other replica sees the release", seen, ANSWER_SECONDS)


def both_find_what_either_did():
    """Every record is in the index, and there once: also what a program wrote, which both replicas see."""
    sent = [message(f"print('from {pod}')") for pod in ("gantry-0", "gantry-1")]
    for pod, one in zip(("gantry-0", "gantry-1"), sent):
        socket = connect(pod)
        socket.send(one)
        to_the_reply(socket)
    wanted = {one["submission_id"] for one in sent}
    for pod in ("gantry-0", "gantry-1"):
        eventually(f"{pod} lists both", lambda: wanted <= {
            one["submission_id"] for one in get(pod, "/submissions?user_id=two&limit=50")[1]["submissions"]}, ANSWER_SECONDS)
    socket = connect("gantry-0")
    word = f"word{uuid7()[:13].replace('-', '')}"
    socket.send(message(f"print('{word}')", deploy=True, database=False))
    assert to_the_reply(socket)[-1]["status"] == "deployed"

    def written(pod):
        records = get(pod, f"/logs?user_id=two&q={word}&limit=100")[1]["records"]
        return [one for one in records if one["event.action"] == "output.stdout" and "gantry.submission_id" not in one]

    eventually("the program's output is found", lambda: written("gantry-1"), ANSWER_SECONDS)
    time.sleep(5)  # Twice what shipping takes: a second one would be here.
    assert len(written("gantry-0")) == len(written("gantry-1")) == 1, written("gantry-0")


def a_killed_replica_loses_nothing():
    socket = connect("gantry-0")
    sent = message("import time\nfor i in range(8):\n    print(i, flush=True)\n    time.sleep(1)", limits={"wall_ms": 30000})
    socket.send(sent)
    seen = []
    while len([frame for frame in seen if frame.get("event") == "output"]) < 2:
        seen.append(socket.receive())
    kubectl("delete", "pod", "gantry-0", "-n", NAMESPACE, "--grace-period=0", "--force")
    answers = []

    def whole():
        other = connect("gantry-1")
        other.send({"resume": sent["submission_id"], "after": seen[-1]["seq"]})
        try:
            frames = to_the_reply(other)
        except (ConnectionError, TimeoutError):
            return None
        answers.append(frames[-1]["status"])
        return frames if frames[-1]["status"] != "unavailable" else None

    rest = eventually("the run's reply comes by the other replica", whole)
    output = "".join(frame["data"] for frame in seen + rest if frame.get("event") == "output")
    assert rest[-1]["status"] == "tests_passed", rest[-1]
    assert output == "".join(f"{i}\n" for i in range(8)), output
    numbers = [frame["seq"] for frame in seen + rest]
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    assert set(answers) <= {"unavailable", "tests_passed"}, answers


def a_lost_replica_loses_no_record_once_its_volume_is_back():
    socket = connect("gantry-1")
    sent = message("print('kept')")
    socket.send(sent)
    whole = to_the_reply(socket)
    scale = ("scale", "statefulset", "gantry", "-n", NAMESPACE)
    kubectl(*scale, "--replicas=1")
    eventually("the second replica is gone", lambda: not kubectl("get", "pod", "gantry-1", "-n", NAMESPACE, "--ignore-not-found"))
    path = f"/submissions/{sent['submission_id']}"
    eventually("it is missed", lambda: get("gantry-0", path)[0] == 503, ANSWER_SECONDS)
    left = connect("gantry-0")
    left.send(sent)
    assert to_the_reply(left)[-1]["error"]["code"] == "replica_away"
    left.send({"user_id": "two", "code": "print('Hello')", "deploy": False})
    assert to_the_reply(left)[-1]["status"] == "tests_passed"
    kubectl(*scale, "--replicas=2")
    eventually("the second replica is back", lambda: ready("gantry-1"))
    eventually("its records are back", lambda: get("gantry-0", path)[0] == 200, ANSWER_SECONDS)
    left.send({"resume": sent["submission_id"], "after": 0})
    assert to_the_reply(left) == whole


TESTS = [
    the_other_answers_all_the_same, the_same_id_at_both_runs_once, a_release_of_one_is_the_others,
    both_find_what_either_did, a_killed_replica_loses_nothing, a_lost_replica_loses_no_record_once_its_volume_is_back,
]


def remove():
    for namespace in (NAMESPACE, "user-two"):
        kubectl("delete", "namespace", namespace, "--wait=false", check=False)
    for kind in ("clusterrole", "clusterrolebinding"):
        kubectl("delete", kind, "gantry", check=False)


def main():
    install()
    print("installed", flush=True)
    try:
        for test in TESTS:
            began = time.monotonic()
            test()
            print(f"ok {test.__name__} ({time.monotonic() - began:.1f} s)", flush=True)
    finally:
        if "--keep" not in sys.argv:
            remove()


if __name__ == "__main__":
    main()
