#!/usr/bin/env python3
"""Sends bad code, then good code, to a running Gantry and checks both replies.

Needs nothing but Python: the WebSocket client (RFC 6455) is in this file.

    API_KEY=... python3 scripts/test_backend.py [--url ws://127.0.0.1:8000/ws/code]
"""

import argparse
import base64
import hashlib
import json
import os
import socket
import struct
import sys
import time
import urllib.parse

# A connection on one machine or one network is there within a second; a busy one within ten.
CONNECT_TIMEOUT_S = 10
# The first submission may make a sandbox (30 s), run for 10 s and start a release (60 s).
REPLY_TIMEOUT_S = 120
# RFC 6455 §1.3: what the server must answer the handshake's key with is made from this.
HANDSHAKE_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
# A reply holds at most 16 MiB of output, sixfold as JSON escapes.
MAX_MESSAGE_BYTES = 128 << 20
TEXT, CLOSE, PING, PONG = 0x1, 0x8, 0x9, 0xA

BAD = {"user_id": "test", "code": 'raise ValueError("bad code")'}
GOOD = {"user_id": "test", "code": "print('Hello')"}


class WebSocket:
    """One connection. Every wait has an end."""

    def __init__(self, url, key):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme != "ws" or not parts.hostname:
            raise ValueError(f"{url!r} is not an address such as ws://127.0.0.1:8000/ws/code")
        self.deadline = time.monotonic() + CONNECT_TIMEOUT_S
        self.socket = socket.create_connection((parts.hostname, parts.port or 80), CONNECT_TIMEOUT_S)
        self.buffer = b""
        nonce = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nX-API-Key: {key}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {nonce}\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in self.buffer:
            self._read_some()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        if " 101 " not in lines[0] + " ":
            hint = "; is API_KEY the server's key?" if " 401" in lines[0] else ""
            raise ConnectionError(f"the server refused the WebSocket: {lines[0]}{hint}")
        headers = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])}
        accept = base64.b64encode(hashlib.sha1((nonce + HANDSHAKE_GUID).encode()).digest()).decode()
        if headers.get("sec-websocket-accept") != accept:
            raise ConnectionError("what answered is not a WebSocket server")

    def _read_some(self):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server did not answer in time")
        self.socket.settimeout(left)
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.buffer += data

    def _read(self, count):
        while len(self.buffer) < count:
            self._read_some()
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def send(self, opcode, payload):
        length = len(payload)
        if length < 126:
            size = struct.pack("!B", 0x80 | length)
        elif length < 1 << 16:
            size = struct.pack("!BH", 0x80 | 126, length)
        else:
            size = struct.pack("!BQ", 0x80 | 127, length)
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self.socket.settimeout(CONNECT_TIMEOUT_S)
        self.socket.sendall(bytes([0x80 | opcode]) + size + mask + masked)

    def receive(self):
        """The next text message; pings are answered on the way."""
        message = b""
        while True:
            first, second = self._read(2)
            length = second & 0x7F
            if length == 126:
                (length,) = struct.unpack("!H", self._read(2))
            elif length == 127:
                (length,) = struct.unpack("!Q", self._read(8))
            if second & 0x80 or len(message) + length > MAX_MESSAGE_BYTES:
                raise ConnectionError("the server sent a frame that is masked or too large")
            payload, opcode = self._read(length), first & 0x0F
            if opcode == PING:
                self.send(PONG, payload)
            elif opcode == CLOSE:
                raise ConnectionError(f"the server closed the WebSocket: {payload[2:].decode(errors='replace')!r}")
            elif opcode != PONG:
                message += payload
                if first & 0x80:
                    return message.decode()

    def ask(self, submission):
        self.deadline = time.monotonic() + REPLY_TIMEOUT_S
        self.send(TEXT, json.dumps(submission).encode())
        return json.loads(self.receive())


def wrong(reply, expected):
    """What of the reply is not as expected, in words."""
    return [
        f"expected {name} to be {value!r}, got {reply.get(name)!r}"
        for name, value in expected.items()
        if reply.get(name) != value
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--url", default="ws://127.0.0.1:8000/ws/code")
    url = parser.parse_args().url
    key = os.environ.get("API_KEY", "").strip()
    if not key.isascii() or not key.isprintable() or not key:
        sys.exit("API_KEY is not set to a key: set it to the one the server printed at its first start")
    try:
        connection = WebSocket(url, key)
        bad = connection.ask(BAD)
        print("Bad code response:", json.dumps(bad), flush=True)
        good = connection.ask(GOOD)
        print("Good code response:", json.dumps(good), flush=True)
        connection.send(CLOSE, struct.pack("!H", 1000))
    except (OSError, ValueError) as error:
        sys.exit(f"{url}: {error}\nCheck that the server runs (cargo run --release) and that --url names it.")
    failures = wrong(bad, {"status": "tests_failed", "namespace": "user-test", "exit_code": 1})
    if "ValueError: bad code" not in bad.get("stderr", ""):
        failures.append(f"expected stderr to hold the traceback, got {bad.get('stderr')!r}")
    failures = [f"bad code: {failure}" for failure in failures]
    expected = {"status": "deployed", "namespace": "user-test", "stdout": "Hello\n"}
    failures += [f"good code: {failure}" for failure in wrong(good, expected)]
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
