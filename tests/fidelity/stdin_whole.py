#: stdin a\nb\r\nc\x00d
import sys

data = sys.stdin.buffer.read()
print(data, sys.stdin.read() == "")
