"""A small WebSocket client over a plain socket, for measuring: no threads, no dependencies."""

import base64
import json
import os
import socket
import struct


class WebSocket:
    def __init__(self, port, key, path="/ws/code", timeout=60, host="127.0.0.1", named=None):
        self.sock = socket.create_connection((host, port), timeout=timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = base64.b64encode(os.urandom(16)).decode()
        self.sock.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {named or f'{host}:{port}'}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {nonce}\r\nSec-WebSocket-Version: 13\r\n"
            f"X-API-Key: {key}\r\n\r\n".encode()
        )
        self.buffer = b""
        while b"\r\n\r\n" not in self.buffer:
            self._more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            self.sock.close()
            raise ConnectionError(head.decode())

    def _more(self):
        data = self.sock.recv(65536)
        if not data:
            raise ConnectionError("closed")
        self.buffer += data

    def send(self, message):
        self.send_bytes(json.dumps(message).encode(), 0x81)

    def send_bytes(self, data, kind=0x82):
        if len(data) < 126:
            head = struct.pack("!BB", kind, 0x80 | len(data))
        elif len(data) < 65536:
            head = struct.pack("!BBH", kind, 0xFE, len(data))
        else:
            head = struct.pack("!BBQ", kind, 0xFF, len(data))
        # A mask of zeroes is a mask, and leaves the measuring to what is measured.
        self.sock.sendall(head + b"\0\0\0\0" + data)

    def _frame(self):
        while True:
            have = self.buffer
            if len(have) >= 2:
                length, start = have[1] & 0x7F, 2
                if length == 126 and len(have) >= 4:
                    length, start = struct.unpack("!H", have[2:4])[0], 4
                elif length == 127 and len(have) >= 10:
                    length, start = struct.unpack("!Q", have[2:10])[0], 10
                elif length >= 126:
                    self._more()
                    continue
                if len(have) >= start + length:
                    self.buffer = have[start + length :]
                    return have[0] & 0x80, have[0] & 0xF, have[start : start + length]
            self._more()

    def receive(self):
        """The next message: JSON, or bytes."""
        begun, parts = 0, []
        while True:
            last, kind, data = self._frame()
            if kind < 8:
                # Large messages come in several frames, of which only the first one says what they are.
                begun = kind or begun
                parts.append(data)
                if not last:
                    continue
                data, parts = b"".join(parts), []
                return json.loads(data) if begun == 1 else data
            if kind == 8:
                raise ConnectionError(f"closed: {data[:2].hex()} {data[2:].decode()}")
            if kind == 9:
                self.sock.sendall(struct.pack("!BB", 0x8A, 0x80 | len(data)) + b"\0\0\0\0" + data)

    def ask(self, message):
        self.send(message)
        while True:
            frame = self.receive()
            if "status" in frame:
                return frame

    def close(self):
        self.sock.close()
