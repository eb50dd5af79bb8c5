import os
import signal
import sys

print(signal.getsignal(signal.SIGPIPE))
reader, writer = os.pipe()
os.close(reader)
try:
    os.write(writer, b"x")
except BrokenPipeError as error:
    print(error)
sys.stdout.flush()
os.dup2(writer, 1)
print("lost at exit")
