"""Frames between the supervisor and a worker: four bytes of length, one that says what it is, and the rest."""

import socket
import struct

HEAD = struct.Struct("<IB")

CALL, STREAM, DESCRIBE = 1, 2, 3
RESULT, FAILURE, ITEM = 4, 5, 6

#: Set in a reply's first byte: the list was passed as one argument; the worker is not used again.
CALLED_WITH_LIST, RETIRES = 1, 2

#: The longest frame: a result or the arguments, and what goes with them.
SLACK = 64 << 10


class Closed(Exception):
    """The other side is gone, or does not speak this protocol."""


def pack(kind: int, *parts: bytes) -> bytes:
    return HEAD.pack(sum(map(len, parts)), kind) + b"".join(parts)


def request(kind: int, method: str, args: bytes, kwargs: bytes) -> bytes:
    name = method.encode()
    return pack(kind, struct.pack("<II", len(name), len(args)), name, args, kwargs)


def parse_request(body) -> tuple:
    name, args = struct.unpack_from("<II", body)
    name_end = 8 + name
    args_end = name_end + args
    return body[8:name_end].decode(), body[name_end:args_end], body[args_end:]


class Reader:
    """Frames from a socket."""

    def __init__(self, sock: socket.socket, most: int):
        self.sock = sock
        self.most = most
        self.held = bytearray()

    def frame(self):
        """The next frame, if all of it is held."""
        if len(self.held) < HEAD.size:
            return None
        length, kind = HEAD.unpack_from(self.held)
        if length > self.most:
            raise Closed(f"a frame of {length} bytes")
        end = HEAD.size + length
        if len(self.held) < end:
            return None
        body = bytes(memoryview(self.held)[HEAD.size : end])
        del self.held[:end]
        return kind, body

    def take(self) -> None:
        """Reads what is there; waits on a socket that blocks."""
        piece = self.sock.recv(1 << 18)
        if not piece:
            raise Closed("the other side is gone")
        self.held += piece

    def next(self):
        """The next frame, waited for."""
        while True:
            frame = self.frame()
            if frame is not None:
                return frame
            self.take()
