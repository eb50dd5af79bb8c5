"""The process that holds the gRPC port."""

import hmac
import json
import os
import queue
import signal
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gantry_module import calls, module_service_pb2 as pb, wire
from gantry_module.pool import Cancelled, Pool, Run
from gantry_module.settings import CALL_MS, MAX_ARGUMENT_BYTES, MAX_CALL_MS, Settings

SERVICE = pb.DESCRIPTOR.services_by_name["ModuleService"].full_name

#: One for each call that runs or waits, and some for the health service and reflection, which must answer beside them.
THREADS = 72
MAX_RPCS = 128

#: How long calls may go on after the pod was asked to end.
END_S = 5

#: Longest wait for the manager, and how often it is tried.
TELL_S, TELL_TIMES = 2, 3

#: Events of a stream that wait for a slow reader; after that the call waits.
MAX_WAITING_EVENTS = 16

#: Descriptions that are kept, one for each namespace.
MAX_DESCRIPTIONS = 64


#: Open to everybody: a probe has no token to send. Not `Watch`: who holds its streams takes the place of calls.
OPEN = f"/{health.SERVICE_NAME}/Check"


class OnlyWithToken(grpc.ServerInterceptor):
    """Lets nobody in who does not send the module's token, `authorization: Bearer …`; reflection asks for it as well."""

    def __init__(self, token: str):
        self.token = token.encode()
        self.refused = grpc.stream_stream_rpc_method_handler(refuse)

    def intercept_service(self, continuation, details):
        if details.method == OPEN or self.admits(details.invocation_metadata):
            return continuation(details)
        return self.refused

    def admits(self, metadata) -> bool:
        sent = next((value for name, value in metadata or () if name == "authorization"), "")
        scheme, _, token = sent.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self.token)


def refuse(_requests, context):
    context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the module's token is missing or wrong: send the metadata authorization: Bearer TOKEN, with the token that POST /create_pod tells",
    )


class ModuleService:
    def __init__(self, settings: Settings, pool: Pool):
        self.settings = settings
        self.pool = pool
        self.descriptions = {}

    def handlers(self) -> grpc.GenericRpcHandler:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        reply = {"response_serializer": lambda message: message.SerializeToString()}
        return grpc.method_handlers_generic_handler(SERVICE, {
            "Call": unary(self.call, request_deserializer=pb.CallRequest.FromString, **reply),
            "Stream": stream(self.stream, request_deserializer=pb.CallRequest.FromString, **reply),
            "Describe": unary(self.describe, request_deserializer=pb.DescribeRequest.FromString, **reply),
        })

    def call(self, request, context):
        run = Run(deadline(request, context))
        context.add_callback(run.cancel)
        return self.outcome(wire.CALL, request, run)

    def stream(self, request, context):
        events = queue.Queue(MAX_WAITING_EVENTS)

        def put(event) -> None:
            # A reader that does not read has the call wait, until its time is over.
            while not run.cancelled:
                try:
                    return events.put(event, timeout=max(0.001, min(1.0, run.deadline + 1 - time.monotonic())))
                except queue.Full:
                    if time.monotonic() > run.deadline:
                        return None

        run = Run(
            deadline(request, context),
            on_item=lambda body: put(pb.StreamEvent(item=body)),
            on_output=lambda name, data: put(pb.StreamEvent(output=pb.Output(stream=name, data=data))),
        )
        context.add_callback(run.cancel)

        def work() -> None:
            end = pb.StreamEvent(end=self.outcome(wire.STREAM, request, run))
            try:
                events.put(end, timeout=MAX_CALL_MS / 1000)
            except queue.Full:
                return

        threading.Thread(target=work, daemon=True).start()
        while True:
            event = events.get()
            yield event
            if event.WhichOneof("event") == "end":
                return

    def outcome(self, kind: int, request, run: Run):
        try:
            if len(request.args) + len(request.kwargs) > MAX_ARGUMENT_BYTES:
                raise calls.Failed(calls.ARGUMENTS_WRONG, f"the arguments are longer than {MAX_ARGUMENT_BYTES} bytes")
            flags, result = self.pool.call(kind, request.method, request.args, request.kwargs, run)
        except calls.Failed as failed:
            return pb.CallReply(failure=failure(failed))
        except Cancelled:
            return pb.CallReply(failure=pb.Failure(kind=calls.DEADLINE, message="the caller is gone"))
        return pb.CallReply(result=result, called_with="list" if flags & wire.CALLED_WITH_LIST else "")

    def describe(self, request, context):
        known = self.descriptions.get(request.namespace)
        if known is not None:
            return known
        until = time.monotonic() + MAX_CALL_MS / 1000
        left = context.time_remaining()
        run = Run(until if left is None else min(until, time.monotonic() + left))
        context.add_callback(run.cancel)
        try:
            _, told = self.pool.call(wire.DESCRIBE, request.namespace, b"", b"", run)
        except calls.Failed as failed:
            return pb.Description(module=self.settings.module, failure=failure(failed))
        except Cancelled:
            return pb.Description(module=self.settings.module)
        told = json.loads(told)
        functions = [pb.Function(**one) for one in told.pop("functions")]
        description = pb.Description(functions=functions, **told)
        if len(self.descriptions) < MAX_DESCRIPTIONS:
            self.descriptions[request.namespace] = description
        return description


def deadline(request, context) -> float:
    wanted = min(request.timeout_ms or CALL_MS, MAX_CALL_MS) / 1000
    left = context.time_remaining()
    if left is not None:
        wanted = min(wanted, left)
    return time.monotonic() + wanted


def failure(failed: calls.Failed):
    output = getattr(failed, "output", "")
    return pb.Failure(kind=failed.kind, type=failed.type_name, message=str(failed), traceback=failed.trace, output=output)


def tell_manager(settings: Settings, state: str, told) -> None:
    """Tells whoever manages pods, when somebody does."""
    body = {"module": settings.module, "pod": os.uname().nodename, "state": state, "failure": told}
    request = urllib.request.Request(
        settings.manager, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
    )
    for _ in range(TELL_TIMES):
        try:
            with urllib.request.urlopen(request, timeout=TELL_S):
                return
        except (OSError, ValueError) as error:
            print(f"gantry_module: POD_MANAGER_URL was not told: {error}", flush=True)
            time.sleep(TELL_S)


def main(settings: Settings) -> None:
    status = health.HealthServicer()
    names = ("", SERVICE)
    for name in names:
        status.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)

    def on_state(state: str, told) -> None:
        serving = health_pb2.HealthCheckResponse.SERVING
        for name in names:
            status.set(name, serving if state == "ready" else health_pb2.HealthCheckResponse.NOT_SERVING)
        print(f"gantry_module: {settings.module} is {state}", flush=True)
        if settings.manager:
            threading.Thread(target=tell_manager, args=(settings, state, told), daemon=True).start()

    most = settings.max_result + wire.SLACK
    server = grpc.server(
        ThreadPoolExecutor(THREADS),
        maximum_concurrent_rpcs=MAX_RPCS,
        interceptors=[OnlyWithToken(settings.token)] if settings.token else [],
        options=[
            ("grpc.max_receive_message_length", MAX_ARGUMENT_BYTES + wire.SLACK),
            ("grpc.max_send_message_length", most),
            ("grpc.so_reuseport", 0),
            # A client that keeps its connection asks now and then whether the pod lives.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    service = ModuleService(settings, Pool(settings, on_state))
    server.add_generic_rpc_handlers((service.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    server.add_insecure_port(f"{settings.host}:{settings.port}")
    server.start()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    signal.signal(signal.SIGINT, lambda *_: ended.set())
    ended.wait()
    server.stop(END_S).wait()
    # Calls that still run go with the nursery, which ends when its supervisor does.
    os._exit(0)
