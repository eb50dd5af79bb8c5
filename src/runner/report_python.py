"""Runs pytest, and tells the runner about each test on a descriptor that is nobody else's.

The descriptor comes with a word that is new for each run. It is the first line that can be read
there, and the first word of every line that is written: what is written without it is not from
here. The last line says that pytest has ended, after everything of the program's that pytest runs.
"""

import os
import sys

DESCRIPTOR = 3
MOST_MESSAGE = 8192


def channel():
    import json

    # Whatever the tests start has no use for it.
    os.set_inheritable(DESCRIPTOR, False)
    word = b""
    while not word.endswith(b"\n"):
        byte = os.read(DESCRIPTOR, 1)
        if not byte:
            raise SystemExit("the runner has gone")
        word += byte
    word, write, encode = word[:-1] + b" ", os.write, json.dumps

    def say(**what):
        line = word + encode(what).encode() + b"\n"
        while line:
            line = line[write(DESCRIPTOR, line) :]

    return say


def named(nodeid):
    """As in JUnit's XML: the folders, file and classes with dots, then the test."""
    path, bracket, parameters = nodeid.partition("[")
    names = path.split("::")
    names[0] = names[0].replace("/", ".")
    if names[0].endswith(".py"):
        names[0] = names[0][:-3]
    names[-1] += bracket + parameters
    group = ".".join(names[:-1])
    return group + "::" + names[-1] if group else names[-1]


class Reporter:
    def __init__(self, say):
        self.say = say
        self.ended = set()
        self.tests = {}

    def pytest_collection_finish(self, session):
        self.say(collected=len(session.items))

    def pytest_collectreport(self, report):
        if report.failed:
            self.tell(report.nodeid, "failed", 0, report.longreprtext)

    def pytest_runtest_logreport(self, report):
        test = self.tests.setdefault(report.nodeid, ["passed", 0.0, ""])
        test[1] += report.duration
        if report.failed:
            if test[0] == "failed":
                test[2] += "\n"
            test[0] = "failed"
            test[2] += report.longreprtext
        # A test that was expected to fail has run.
        elif report.skipped and test[0] == "passed" and not hasattr(report, "wasxfail"):
            test[0] = "skipped"
        if report.when == "teardown":
            outcome, seconds, message = self.tests.pop(report.nodeid)
            self.ended.add(report.nodeid)
            self.tell(report.nodeid, outcome, seconds, message)

    def tell(self, nodeid, outcome, seconds, message):
        test = {"name": named(nodeid), "outcome": outcome, "ms": int(seconds * 1000)}
        if outcome == "failed":
            test["message"] = message[:MOST_MESSAGE]
        self.say(test=test)


def main():
    say = channel()
    # The folder of this file; `python -m pytest` has the current one there, once pytest is found.
    del sys.path[0]
    try:
        import pytest
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        print(f"{sys.executable}: No module named pytest", file=sys.stderr)
        return 1
    sys.path.insert(0, os.getcwd())
    reporter = Reporter(say)
    code = int(pytest.main(sys.argv[1:], plugins=[reporter]))
    say(end=len(reporter.ended))
    return code


if __name__ == "__main__":
    sys.exit(main())
