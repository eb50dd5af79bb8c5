"""The module server, run for real and asked over gRPC."""

import contextlib
import json
import os
import pathlib
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
from gantry_module import calls, pool, wire
from gantry_module import module_service_pb2 as pb
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import run

HERE = pathlib.Path(__file__).resolve().parent

#: No answer for this long is a failure; a busy machine is slow, not this slow.
PATIENCE_S = 30
SERVICE = "gantry.module.v1.ModuleService"

TOKEN = "0123456789abcdefghijklmnopqrstuvwxyzABCDEF_"


class Server:
    """A server of its own, and a client of it."""

    def __init__(self, module: str, **variables: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = tempfile.TemporaryFile()
        environment = {
            **os.environ,
            "MODULE_NAME": module, "PORT": str(self.port), "MODULE_HOST": "127.0.0.1",
            "MODULE_PACKAGES": str(HERE / "packages"), "OPENBLAS_NUM_THREADS": "1",
            **variables,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gantry_module"], env=environment, stdout=self.log, stderr=subprocess.STDOUT
        )
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        grpc.channel_ready_future(self.channel).result(PATIENCE_S)

    def stop(self) -> str:
        self.channel.close()
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        with self.log:
            self.log.seek(0)
            return self.log.read().decode(errors="replace")

    def ask(self, method, request, answer, timeout=PATIENCE_S):
        ask = self.channel.unary_unary(
            f"/{SERVICE}/{method}", request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString
        )
        return ask(request, timeout=timeout)

    def call(self, method, *args, timeout_ms=0, timeout=PATIENCE_S, **kwargs):
        request = pb.CallRequest(
            method=method, args=json.dumps(args).encode(), kwargs=json.dumps(kwargs).encode(), timeout_ms=timeout_ms
        )
        return self.ask("Call", request, pb.CallReply, timeout)

    def stream(self, method, *args, timeout_ms=0):
        ask = self.channel.unary_stream(
            f"/{SERVICE}/Stream",
            request_serializer=pb.CallRequest.SerializeToString, response_deserializer=pb.StreamEvent.FromString,
        )
        return ask(pb.CallRequest(method=method, args=json.dumps(args).encode(), timeout_ms=timeout_ms), timeout=PATIENCE_S)

    def describe(self, namespace=""):
        return self.ask("Describe", pb.DescribeRequest(namespace=namespace), pb.Description)


class OfOneServer(unittest.TestCase):
    """Tests that share a server: what one of them does to it must not reach the next."""

    module = "shop"

    @classmethod
    def setUpClass(cls):
        cls.server = Server(cls.module)

    @classmethod
    def tearDownClass(cls):
        cls.said = cls.server.stop()

    def result(self, method, *args, **kwargs):
        reply = self.server.call(method, *args, **kwargs)
        self.assertEqual(reply.WhichOneof("outcome"), "result", reply.failure)
        return json.loads(reply.result)

    def failure(self, kind, method, *args, **kwargs):
        reply = self.server.call(method, *args, **kwargs)
        self.assertEqual(reply.WhichOneof("outcome"), "failure", reply.result[:200])
        self.assertEqual(pb.Kind.Name(reply.failure.kind), kind, reply.failure)
        self.assertTrue(reply.failure.message)
        return reply.failure

    def still_answers(self):
        self.assertEqual(self.result("add", 1, 2), 3)


class Late(unittest.TestCase):
    """The pool's side of a worker, at a time when the call's own is over."""

    def setUp(self):
        ours, self.worker = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(self.worker.close)
        looks = select.poll()
        looks.register(ours, select.POLLIN)
        reader = wire.Reader(ours, 1 << 20)
        self.seen = types.SimpleNamespace(sock=ours, poll=looks, reader=reader, out=-1, err=-1, wake=-1)
        self.run_of_it = pool.Run(time.monotonic() - 1)

    def follow(self):
        return object.__new__(pool.Pool).follow(self.seen, self.run_of_it)

    def test_an_answer_that_is_there_counts(self):
        self.worker.sendall(wire.pack(wire.RESULT, b"\0[1]"))
        self.assertEqual(self.follow(), (wire.RESULT, b"\0[1]"))

    def test_no_answer_and_half_of_one_are_too_late(self):
        for there in (b"", wire.pack(wire.RESULT, b"\0[1]")[:-1]):
            self.worker.sendall(there)
            with self.assertRaises(calls.Failed) as failed:
                self.follow()
            self.assertEqual(failed.exception.kind, calls.DEADLINE)


class Calls(OfOneServer):
    def test_arguments_are_bound_as_in_python(self):
        self.assertEqual(self.result("add", 1), 2)
        self.assertEqual(self.result("add", 1, 2, c=3), 6)
        self.assertEqual(self.result("Till.count", [1, 2]), 3)
        self.assertEqual(self.result("later", "now"), "now")

    def test_a_list_that_does_not_fit_is_passed_as_one_argument(self):
        reply = self.server.call("total", 16, 20, 24)
        self.assertEqual((json.loads(reply.result), reply.called_with), (60, "list"))
        self.assertEqual(self.server.call("total", [16, 20, 24]).called_with, "")
        failed = self.failure("ARGUMENTS_WRONG", "total", 1, 2, extra=3)
        self.assertIn("total(numbers)", failed.message)
        self.failure("ARGUMENTS_WRONG", "when_imported", 1, 2)

    def test_names_that_cannot_be_called_are_refused(self):
        self.assertIn("total", self.failure("METHOD_NOT_FOUND", "totl").message)
        for private in ("_private", "__dict__", "add.__globals__", "Till.__init__"):
            self.failure("METHOD_PRIVATE", private)
        self.assertEqual(self.failure("METHOD_NOT_CALLABLE", "price").type, "int")
        for strange in ("", ".", "a b", "a;b", "x" * 300, "total.", "a.b.c.d.e.f.g.h.i.j.k"):
            self.failure("METHOD_NOT_FOUND", strange)

    def test_arguments_that_are_not_json_of_the_right_shape_are_refused(self):
        for args, kwargs in ((b"{", b""), (b"{}", b""), (b"[]", b"[]"), (b"\xff", b""), (b"[" * 100_000, b"")):
            request = pb.CallRequest(method="add", args=args, kwargs=kwargs)
            reply = self.server.ask("Call", request, pb.CallReply)
            self.assertEqual(pb.Kind.Name(reply.failure.kind), "ARGUMENTS_WRONG", reply)
        self.still_answers()

    def test_an_exception_comes_back_with_its_traceback(self):
        failed = self.failure("RAISED", "fail", "no tea")
        self.assertEqual((failed.type, failed.message), ("ValueError", "no tea"))
        self.assertIn("in fail\n", failed.traceback)
        self.assertNotIn("gantry_module", failed.traceback)
        self.assertEqual(self.failure("RAISED", "leave").type, "SystemExit")

    def test_values_are_converted_as_documented(self):
        self.assertEqual(self.result("values"), {
            "tuple": [1, 2], "set": [1, 3], "bytes": "AP8=", "date": "2026-01-31", "moment": "2026-01-31T12:00:00+00:00",
            "took": 90.0, "decimal": "1.10", "item": {"name": "tea", "cost": "2.50"}, "range": [0, 1, 2], "5": None,
        })
        self.assertEqual(self.result("not_a_number"), ["NaN", "Infinity", "-Infinity"])

    def test_values_that_json_cannot_hold_are_named(self):
        for method in ("lock", "lock_inside"):
            self.assertEqual(self.failure("RESULT_NOT_JSON", method).type, "_thread.lock")
        self.assertIn("stream", self.failure("RESULT_NOT_JSON", "steps", 3).message)
        self.failure("RESULT_NOT_JSON", "itself")
        self.failure("RESULT_NOT_JSON", "deep", 100_000)
        self.assertEqual(len(json.dumps(self.result("deep", 50))), 102)

    def test_a_result_that_is_too_large_is_refused_and_a_large_one_is_not(self):
        self.assertEqual(len(self.result("large", 10)), 10 << 20)
        for method, size in (("large", 100), ("many", 5_000_000)):
            self.failure("RESULT_TOO_LARGE", method, size)
        self.still_answers()

    def test_it_is_imported_once(self):
        self.assertEqual(len({self.result("when_imported") for _ in range(20)}), 1)


class Isolation(OfOneServer):
    def test_a_call_that_ends_its_process_ends_itself_only(self):
        failed = self.failure("CRASHED", "segfault")
        self.assertEqual(failed.type, "SIGSEGV")
        self.assertIn("in segfault", failed.output)
        self.still_answers()
        failed = self.failure("CRASHED", "vanish")
        self.assertIn("exit code 7", failed.message)
        self.assertIn("last words", failed.output)
        self.still_answers()
        self.assertEqual(self.failure("CRASHED", "abort").type, "SIGABRT")
        self.still_answers()
        self.failure("CRASHED", "close_everything")
        self.still_answers()

    def test_a_call_that_does_not_end_is_ended_at_its_time(self):
        begun = time.monotonic()
        self.failure("DEADLINE", "spin", timeout_ms=500)
        self.assertLess(time.monotonic() - begun, 3)
        self.still_answers()
        with self.assertRaises(grpc.RpcError) as refused:
            self.server.call("wait", 20, timeout=0.5)
        self.assertEqual(refused.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.still_answers()

    def test_a_call_that_ended_in_time_is_answered_after_a_pause_of_the_server(self):
        # The worker goes on meanwhile, and answers before the call's time is over.
        with ThreadPoolExecutor(1) as callers:
            call = callers.submit(self.server.call, "wait", 0.5, timeout_ms=1500)
            time.sleep(0.25)
            self.server.process.send_signal(signal.SIGSTOP)
            try:
                time.sleep(2)
            finally:
                self.server.process.send_signal(signal.SIGCONT)
            reply = call.result(PATIENCE_S)
        self.assertEqual(reply.WhichOneof("outcome"), "result", reply.failure)
        self.still_answers()

    def test_a_call_that_takes_too_much_memory_is_told_so(self):
        self.failure("OUT_OF_MEMORY", "hold", 1000)
        self.still_answers()
        self.failure("OUT_OF_MEMORY", "hold_shared", 600)
        self.still_answers()
        self.assertEqual(self.result("hold", 50), 50)

    def test_what_a_call_leaves_behind_goes_with_its_worker(self):
        pid = self.result("start", 60)
        far = self.result("start_far", 60)
        self.result("start_thread")
        deadline = time.monotonic() + 10
        while self.result("lives", pid) or self.result("lives", far):
            self.assertLess(time.monotonic(), deadline, "it lives on")
            time.sleep(0.1)

    def test_a_caller_that_leaves_ends_its_call(self):
        calls = [self.server.stream("spin", timeout_ms=60_000) for _ in range(8)]
        time.sleep(0.5)
        for call in calls:
            call.cancel()
        begun = time.monotonic()
        self.still_answers()
        self.assertLess(time.monotonic() - begun, 5)

    def test_calls_run_beside_each_other(self):
        with ThreadPoolExecutor(8) as callers:
            begun = time.monotonic()
            pids = list(callers.map(lambda _: self.result("wait", 1), range(8)))
            self.assertLess(time.monotonic() - begun, 6)
        self.assertGreater(len(set(pids)), 4)

    def test_the_nursery_is_started_again(self):
        self.failure("CRASHED", "kill_nursery")
        deadline = time.monotonic() + PATIENCE_S
        reply = self.server.call("add", 1, 2)
        while reply.WhichOneof("outcome") != "result":
            self.assertLess(time.monotonic(), deadline, reply)
            time.sleep(0.1)
            reply = self.server.call("add", 1, 2)
        self.still_answers()

    def test_many_callers_are_answered_each_with_its_own(self):
        with ThreadPoolExecutor(32) as callers:
            sums = list(callers.map(lambda number: self.result("add", number, number), range(500)))
        self.assertEqual(sums, [2 * number for number in range(500)])


class Streams(OfOneServer):
    def test_what_is_yielded_and_printed_comes_while_it_runs(self):
        events = list(self.server.stream("steps", 3))
        items = [json.loads(event.item) for event in events if event.WhichOneof("event") == "item"]
        self.assertEqual(items, [{"step": 0}, {"step": 1}, {"step": 2}])
        output = b"".join(event.output.data for event in events if event.WhichOneof("event") == "output")
        self.assertEqual(output, b"step 0\nstep 1\nstep 2\n")
        self.assertEqual(json.loads(events[-1].end.result), "done")

    def test_a_generator_that_fails_says_so_behind_what_it_yielded(self):
        events = list(self.server.stream("steps_that_fail"))
        self.assertEqual([event.WhichOneof("event") for event in events], ["item", "end"])
        self.assertEqual(events[-1].end.failure.type, "KeyError")

    def test_a_generator_without_end_is_ended_at_its_time(self):
        last = None
        for last in self.server.stream("for_ever", timeout_ms=500):
            continue
        self.assertEqual(pb.Kind.Name(last.end.failure.kind), "DEADLINE")
        self.still_answers()

    def test_a_plain_function_streams_its_result(self):
        events = list(self.server.stream("add", 1))
        self.assertEqual([json.loads(event.end.result) for event in events], [2])


class AroundTheModule(unittest.TestCase):
    def test_descriptions_tell_signatures_and_docstrings(self):
        with contextlib.closing(Stopped(Server("shop"))) as server:
            told = server.describe()
            by_name = {one.name: one for one in told.functions}
            self.assertEqual((by_name["add"].signature, by_name["add"].doc), ("(a, b=1, *, c=0)", "Adds them."))
            self.assertTrue(by_name["Till"].is_class)
            self.assertNotIn("_private", by_name)
            self.assertNotIn("price", by_name)
            self.assertEqual(list(told.namespaces), [])

    def test_parts_of_a_package_are_described_and_called(self):
        with contextlib.closing(Stopped(Server("os"))) as server:
            self.assertIn("path", server.describe().namespaces)
            self.assertEqual(json.loads(server.call("path.join", "a", "b").result), "a/b")
        with contextlib.closing(Stopped(Server("xml"))) as server:
            # Not imported by the package itself.
            self.assertEqual(server.call("etree.ElementTree.iselement", 1).result, b"false")

    def test_a_module_that_cannot_be_imported_is_told_apart(self):
        for module, kind, word in (
            ("no_such_module", "MODULE_NOT_FOUND", "no_such_module"), ("shop.inside", "MODULE_NOT_FOUND", "shop"),
            ("broken", "MODULE_BROKEN", "does not want to"), ("needs_more", "MODULE_BROKEN", "a_module_that_is_not_there"),
        ):
            with self.subTest(module), contextlib.closing(Stopped(Server(module))) as server:
                for failed in (server.describe().failure, server.call("add", 1).failure):
                    self.assertEqual(pb.Kind.Name(failed.kind), kind, failed)
                    self.assertIn(word, failed.message)

    def test_the_standard_health_service_and_reflection_answer(self):
        for module, status in (("math", "SERVING"), ("broken", "NOT_SERVING")):
            with contextlib.closing(Stopped(Server(module))) as server:
                server.describe()
                asked = health_pb2.HealthCheckRequest(service=SERVICE)
                told = health_pb2_grpc.HealthStub(server.channel).Check(asked, timeout=PATIENCE_S)
                self.assertEqual(health_pb2.HealthCheckResponse.ServingStatus.Name(told.status), status)
                pool = DescriptorPool(ProtoReflectionDescriptorDatabase(server.channel))
                methods = pool.FindServiceByName(SERVICE).methods_by_name
                self.assertEqual(sorted(methods), ["Call", "Describe", "Stream"])

    def test_with_a_token_nobody_else_is_let_in_and_probes_are(self):
        with contextlib.closing(Stopped(Server("os", MODULE_TOKEN=TOKEN))) as server:
            for wrong in (None, "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x"):
                with self.subTest(wrong):
                    for refused in asked(server.channel, wrong):
                        self.assertEqual(refused.code(), grpc.StatusCode.UNAUTHENTICATED, refused)
                        self.assertIn("create_pod", refused.details())
            for right in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
                self.assertEqual(asked(server.channel, right), [])
            probed, health_service = health_pb2.HealthCheckRequest(), health_pb2_grpc.HealthStub(server.channel)
            self.assertEqual(health_service.Check(probed, timeout=PATIENCE_S).status, health_pb2.HealthCheckResponse.SERVING)
            with self.assertRaises(grpc.RpcError) as refused:
                next(health_service.Watch(probed, timeout=PATIENCE_S))
            self.assertEqual(refused.exception.code(), grpc.StatusCode.UNAUTHENTICATED)

    def test_a_call_does_not_find_the_token_in_its_environment(self):
        with contextlib.closing(Stopped(Server("os", MODULE_TOKEN=TOKEN))) as server:
            ask = server.channel.unary_unary(
                f"/{SERVICE}/Call", request_serializer=pb.CallRequest.SerializeToString, response_deserializer=pb.CallReply.FromString
            )
            request = pb.CallRequest(method="getenv", args=b'["MODULE_TOKEN"]')
            self.assertEqual(ask(request, timeout=PATIENCE_S, metadata=bearer(f"Bearer {TOKEN}")).result, b"null")

    def test_the_manager_is_told(self):
        told = []

        class Manager(BaseHTTPRequestHandler):
            def do_POST(self):
                told.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                return

        manager = HTTPServer(("127.0.0.1", 0), Manager)
        threading.Thread(target=manager.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{manager.server_port}/"
        with contextlib.closing(Stopped(Server("math", POD_MANAGER_URL=url))) as server:
            server.describe()
            deadline = time.monotonic() + PATIENCE_S
            while not told:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.02)
        manager.shutdown()
        manager.server_close()
        self.assertEqual((told[0]["module"], told[0]["state"]), ("math", "ready"))

    def test_a_wrong_setting_stops_the_start(self):
        for name, value in (
            ("MODULE_NAME", "../x"), ("PORT", "0"), ("MODULE_WORKERS", "many"), ("MODULE_TOKEN", ""), ("MODULE_TOKEN", "short"),
        ):
            variables = {**os.environ, "MODULE_NAME": "math", name: value}
            ended = subprocess.run(
                [sys.executable, "-m", "gantry_module"], env=variables, capture_output=True, text=True, timeout=PATIENCE_S
            )
            self.assertEqual(ended.returncode, 1)
            self.assertIn(name, ended.stderr)

    def test_the_generated_messages_are_those_of_the_proto(self):
        with tempfile.TemporaryDirectory() as folder:
            run.generated(pathlib.Path(sys.executable), pathlib.Path(folder))
            made = (pathlib.Path(folder) / "module_service_pb2.py").read_text()
        self.assertEqual(made, (run.IMAGE / "gantry_module" / "module_service_pb2.py").read_text())


def bearer(text):
    return None if text is None else (("authorization", text),)


def asked(channel, authorization):
    """Asks one of everything; those that were refused."""
    metadata = {"timeout": PATIENCE_S, "metadata": bearer(authorization)}
    call, describe = pb.CallRequest(method="getpid"), pb.DescribeRequest()
    reflected = reflection_pb2.ServerReflectionRequest(list_services="")

    def unary(name, request, answer):
        ask = channel.unary_unary(f"/{SERVICE}/{name}", type(request).SerializeToString, answer.FromString)
        return ask(request, **metadata)

    def stream():
        ask = channel.unary_stream(f"/{SERVICE}/Stream", pb.CallRequest.SerializeToString, pb.StreamEvent.FromString)
        return list(ask(call, **metadata))

    def reflect():
        return list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([reflected]), **metadata))

    refused = []
    for ask in (
        lambda: unary("Call", call, pb.CallReply), lambda: unary("Describe", describe, pb.Description), stream, reflect,
    ):
        try:
            if not ask():
                raise AssertionError("an empty answer")
        except grpc.RpcError as error:
            refused.append(error)
    if refused and len(refused) != 4:
        raise AssertionError(f"let in by some: {refused}")
    return refused


class Stopped:
    """A server that `closing` stops."""

    def __init__(self, server: Server):
        self.server = server

    def close(self):
        self.server.stop()

    def __getattr__(self, name):
        return getattr(self.server, name)


class Science(OfOneServer):
    module = "numpy"

    def test_arrays_and_numbers_are_plain_json(self):
        reply = self.server.call("array", 16, 20, 24)
        self.assertEqual((json.loads(reply.result), reply.called_with), ([16, 20, 24], "list"))
        self.assertEqual(self.result("zeros", [2, 2]), [[0.0, 0.0], [0.0, 0.0]])
        self.assertEqual(self.result("linalg.norm", [3, 4]), 5.0)
        self.assertEqual(self.result("int64", 5), 5)
        self.assertEqual(self.result("float32", 0.5), 0.5)
        self.assertEqual(self.result("bool_", 1), True)
        self.assertEqual(self.result("longdouble", 2), 2.0)
        self.assertEqual(self.result("datetime64", "2026-01-31"), "2026-01-31")
        self.assertEqual(self.result("array", ["2026-01-31", "NaT"], dtype="datetime64[D]"), ["2026-01-31", None])
        self.assertEqual(self.result("divide", [1, -1, 0], 0), ["Infinity", "-Infinity", "NaN"])

    def test_what_is_no_number_is_named(self):
        self.assertEqual(self.failure("RESULT_NOT_JSON", "random.default_rng").type, "numpy.random._generator.Generator")
        self.assertIn("complex", self.failure("RESULT_NOT_JSON", "sqrt", [1], dtype="complex128").type)
        self.failure("RESULT_TOO_LARGE", "zeros", 13_107_200)
        self.failure("RAISED", "zeros", -1)

    def test_a_megabyte_comes_whole(self):
        self.assertEqual(len(self.result("arange", 131_072, dtype="float64")), 131_072)


class Frames(OfOneServer):
    module = "pandas"

    def test_frames_are_lists_of_rows(self):
        rows = self.result("DataFrame", {"a": [1, None], "b": ["x", "y"]})
        self.assertEqual(rows, [{"a": 1.0, "b": "x"}, {"a": None, "b": "y"}])
        self.assertEqual(self.result("Series", [1, None]), [1.0, None])
        self.assertEqual(self.result("to_datetime", "2026-01-31"), "2026-01-31T00:00:00")
        self.assertEqual(self.result("to_datetime", ["2026-01-31"]), ["2026-01-31T00:00:00"])


if __name__ == "__main__":
    unittest.main()
