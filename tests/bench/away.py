"""A submission takes as long while Elasticsearch is away as while it is there: the same of two servers, in turn,
one that ships to ELASTICSEARCH_HOST and one whose Elasticsearch does not answer."""

import argparse
import os
import shutil
import sys
import tempfile
import urllib.request
import uuid

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from run import Server, free_port, quantile, timed  # noqa: E402

# Ten lines of output: what is shipped is more than what a submission always has.
MESSAGE = {"user_id": "bench", "code": "for n in range(10): print('line', n)", "deploy": False}
TARGET = 1.1


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--programs", default="target/release")
    options.add_argument("--pairs", type=int, default=400)
    options.add_argument("--rounds", type=int, default=5)
    options = options.parse_args()
    prefix = f"bench-{uuid.uuid4()}"
    there = os.environ["ELASTICSEARCH_HOST"]
    folders = [tempfile.mkdtemp() for _ in range(2)]
    hosts = [there, f"http://127.0.0.1:{free_port()}"]
    servers = [
        Server(options.programs, folder, {"ELASTICSEARCH_HOST": host, "ELASTICSEARCH_INDEX_PREFIX": prefix})
        for folder, host in zip(folders, hosts)
    ]
    try:
        sockets = [server.connect() for server in servers]
        for socket in sockets:
            for _ in range(30):
                socket.ask(MESSAGE)
        ratios = []
        for number in range(options.rounds):
            took = [[], []]
            for pair in range(options.pairs):
                # Each goes first as often as second.
                for side in (0, 1) if pair % 2 else (1, 0):
                    seconds, reply = timed(lambda: sockets[side].ask(MESSAGE))
                    assert reply["status"] == "tests_passed", reply
                    took[side].append(seconds * 1e3)
            p99 = [quantile(each, 0.99) for each in took]
            p50 = [quantile(each, 0.5) for each in took]
            ratios.append(p99[1] / p99[0])
            print(f"round {number + 1}: p99 {p99[0]:.2f} ms with it, {p99[1]:.2f} ms without; "
                  f"p50 {p50[0]:.2f} and {p50[1]:.2f}; ratio of p99 {ratios[-1]:.2f}", flush=True)
        ratio = quantile(ratios, 0.5)
        holds = ratio <= TARGET
        print(f"submission p99, Elasticsearch away / there, median of {options.rounds}: {ratio:.2f} (target ≤ {TARGET}) "
              f"{'holds' if holds else 'MISSED'}")
    finally:
        for server in servers:
            server.stop()
        for folder in folders:
            shutil.rmtree(folder)
        remove(there, prefix)


def remove(host, prefix):
    def call(method, path):
        return urllib.request.urlopen(urllib.request.Request(f"{host}/{path}", method=method), timeout=30).read().decode()

    for path in [*call("GET", f"_cat/indices/{prefix}-*?h=index").split(), *(f"_index_template/{prefix}-{n}" for n in ("logs", "journals"))]:
        call("DELETE", path)


if __name__ == "__main__":
    main()
