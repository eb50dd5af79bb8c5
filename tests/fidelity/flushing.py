import os
import sys

sys.stdout.write("one ")
sys.stdout.flush()
os.write(1, b"two ")
sys.stdout.write("four ")
os.write(1, b"three ")
sys.stdout.flush()
sys.stdout.buffer.write(b"bytes\n")
print("no newline at the end", end="")
sys.stderr.write("partial err")
