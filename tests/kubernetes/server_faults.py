"""Faults around a whole server on the bed: killed at every step of a deploy, and without its code store.

    eval "$(scripts/testbed env)"; python3 tests/kubernetes/server_faults.py [--programs target/debug]

GANTRY_TEST_FULL=1: 500 kills.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
import kubernetes as bed  # noqa: E402

PROGRAMS = str(ROOT / "target" / "debug")
KILLS = 500 if os.environ.get("GANTRY_TEST_FULL") else 12
# One command of the bed.
COMMAND_SECONDS = 60


def testbed(*words):
    subprocess.run([ROOT / "scripts" / "testbed", *words], check=True, timeout=COMMAND_SECONDS, capture_output=True)


class Faults(unittest.TestCase):
    def setUp(self):
        self.data = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.data)
        self.addCleanup(bed.forget, bed.USER)

    def test_a_server_killed_at_every_step_of_a_deploy_leaves_one_of_each_and_no_outage(self):
        wrong, watcher = bed.kill_often(PROGRAMS, self.data, KILLS)
        self.assertEqual(wrong, [])
        self.assertGreater(watcher.asked, KILLS, "nobody watched the old release")
        self.assertEqual(watcher.failed, [])

    def test_without_the_code_store_the_verdict_stands_and_deploying_says_why(self):
        server = bed.Server(PROGRAMS, self.data)
        self.addCleanup(server.stop)
        ws = server.connect()
        message = {"user_id": bed.USER, "code": bed.HELLO, "database": False}
        testbed("part", "stop", "s3")
        try:
            passed = ws.ask({**message, "deploy": False})
            failed = ws.ask({**message, "code": "raise SystemExit(3)"})
            waited = ws.ask(message)
        finally:
            testbed("part", "start", "s3")
        self.assertEqual((passed["status"], passed["stdout"]), ("tests_passed", "Hello\n"), passed)
        self.assertEqual((failed["status"], failed["exit_code"]), ("tests_failed", 3), failed)
        self.assertIn(waited["status"], ("deploy_failed", "unavailable"), waited)
        self.assertEqual(waited["exit_code"], 0, waited)
        self.assertIn("store", waited["error"]["message"] + waited["error"]["cause"], waited)
        # Positive control: with the store the same is deployed.
        self.assertEqual(ws.ask(message)["status"], "deployed")
        bed.run.stop(server, f"{bed.USER}-prod")
        ws.close()


if __name__ == "__main__":
    if "--programs" in sys.argv:
        at = sys.argv.index("--programs")
        PROGRAMS = sys.argv[at + 1]
        del sys.argv[at:at + 2]
    unittest.main(verbosity=2)
