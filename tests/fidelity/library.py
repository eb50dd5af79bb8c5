import asyncio
import collections
import csv
import ctypes
import datetime
import decimal
import hashlib
import json
import random
import re
import resource
import signal
import socket
import ssl
import struct
import sys
import unittest
import zlib

print(json.dumps({"a": [1, None, "ü"]}), re.findall(r"\w+", "so it is"), decimal.Decimal("0.1") * 3)
print(ctypes.CDLL(None).strlen(b"four"), ctypes.sizeof(ctypes.c_long), struct.pack("<I", 7))
print(hashlib.sha256(b"x").hexdigest(), zlib.crc32(b"x"), random.Random(7).random())
a, b = socket.socketpair()
a.send(b"hello")
print(b.recv(10), socket.getdefaulttimeout(), type(a))
print([sys.modules[n].__name__ for n in ("ctypes", "_ctypes", "_socket", "resource", "posix", "_signal")])
print(resource.getrlimit(resource.RLIMIT_STACK) == resource.getrlimit(resource.RLIMIT_STACK))
