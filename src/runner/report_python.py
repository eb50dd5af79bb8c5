"""Runs pytest, and tells the runner about each test on a descriptor that is nobody else's.

The descriptor comes with a word that is new for each run. It is the first line that can be read
there, and the first word of every line that is written: what is written without it is not from
here. The last line says that pytest has ended, after everything of the program's that pytest runs.
"""

import os
import sys

DESCRIPTOR = 3
MOST_NAME = 1000
MOST_MESSAGE = 8192
# Bytes of the whole report, of which the runner takes 1 MiB. Tests that held leave room for those that did
# not, and messages for names; beyond that, tests are counted.
MOST_HELD = 400 << 10
MOST_MESSAGES = 800 << 10
MOST_REPORT = 950 << 10


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

    said = 0

    def say(most=None, **what):
        """Whether there was room for it."""
        nonlocal said
        line = word + encode(what).encode() + b"\n"
        if most is not None and said + len(line) > most:
            return False
        said += len(line)
        while line:
            line = line[write(DESCRIPTOR, line) :]
        return True

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
        self.untold = {}
        # Files that hold a test, or say themselves why none of theirs runs.
        self.seen = set()

    def pytest_itemcollected(self, item):
        self.seen.add(item.nodeid.partition("::")[0])

    def pytest_collection_finish(self, session):
        self.say(collected=len(session.items))
        # Without any test pytest's exit code says so.
        for file in session.config.args if session.items else ():
            if os.path.basename(file) in ("conftest.py", "__init__.py"):
                continue
            if os.path.isfile(file) and os.path.relpath(file, session.config.rootpath) not in self.seen:
                # As it was sent.
                self.tell(file, "empty", 0, "")

    def pytest_collectreport(self, report):
        if report.failed or report.skipped:
            self.seen.add(report.nodeid.partition("::")[0])
        if report.failed:
            self.tell(named(report.nodeid), "failed", 0, report.longreprtext)

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
            self.tell(named(report.nodeid), outcome, seconds, message)

    def tell(self, name, outcome, seconds, message):
        test = {"name": name[:MOST_NAME], "outcome": outcome, "ms": int(seconds * 1000)}
        failed = outcome == "failed"
        if failed and self.say(MOST_MESSAGES, test={**test, "message": message[:MOST_MESSAGE]}):
            return
        if not self.say(MOST_REPORT if failed or outcome == "empty" else MOST_HELD, test=test):
            self.untold[outcome] = self.untold.get(outcome, 0) + 1


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
    if reporter.untold:
        say(untold=reporter.untold)
    say(end=len(reporter.ended))
    return code


if __name__ == "__main__":
    sys.exit(main())
