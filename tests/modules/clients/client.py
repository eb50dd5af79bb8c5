#!/usr/bin/env python3
"""Calls a Python module straight, without Gantry in between: an example of a gRPC client.

    pip install grpcio grpcio-tools grpcio-reflection
    export MODULE_TOKEN=…                      # "token" of POST /create_pod/math
    python3 client.py HOST call sqrt 16        # HOST: "authority" of POST /create_pod/math
    python3 client.py HOST stream FUNCTION ARGUMENT…
    python3 client.py HOST describe
    python3 client.py HOST services            # by reflection: nothing has to be known of the module

Arguments are JSON. `--plain ADDRESS` goes to an ingress controller that has no TLS.
"""

import argparse
import json
import os
import pathlib
import sys

import grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

# The messages and the client are made when this starts; `python3 -m grpc_tools.protoc` writes them into files.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "runner-image"))
messages, services = grpc.protos_and_services("module_service.proto")

#: A call may run for 60 s; the rest is for the way.
TIMEOUT_S = 65

#: A result has at most 16 MiB, and something goes with it.
OPTIONS = [("grpc.max_receive_message_length", 17 << 20)]


def connect(host: str, plain: str):
    if plain:
        return grpc.insecure_channel(plain, options=[*OPTIONS, ("grpc.default_authority", host)])
    return grpc.secure_channel(f"{host}:443", grpc.ssl_channel_credentials(), options=OPTIONS)


def told(reply):
    """The result, or why there is none: a function that fails is no failure of gRPC's."""
    if reply.WhichOneof("outcome") == "failure":
        sys.exit(f"{messages.Kind.Name(reply.failure.kind)}: {reply.failure.message}")
    return json.loads(reply.result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--plain", default="", metavar="ADDRESS")
    parser.add_argument("host")
    parser.add_argument("action", choices=["call", "stream", "describe", "services"])
    parser.add_argument("function", nargs="?", default="")
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    token = os.environ.get("MODULE_TOKEN", "")
    how = {"timeout": TIMEOUT_S, "metadata": [("authorization", f"Bearer {token}")] if token else []}
    arguments = json.dumps([json.loads(text) for text in options.arguments]).encode()
    request = messages.CallRequest(method=options.function, args=arguments)
    with connect(options.host, options.plain) as channel:
        module = services.ModuleServiceStub(channel)
        if options.action == "call":
            print(json.dumps(told(module.Call(request, **how))))
        elif options.action == "stream":
            for event in module.Stream(request, **how):
                if event.WhichOneof("event") == "item":
                    print("item", json.dumps(json.loads(event.item)), flush=True)
                elif event.WhichOneof("event") == "end":
                    print("end", json.dumps(told(event.end)))
                else:
                    print(event.output.stream, json.dumps(event.output.data.decode(errors="replace")), flush=True)
        elif options.action == "describe":
            for function in module.Describe(messages.DescribeRequest(), **how).functions:
                print(function.name + function.signature)
        else:
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            for answer in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), **how):
                for service in answer.list_services_response.service:
                    print(service.name)


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
