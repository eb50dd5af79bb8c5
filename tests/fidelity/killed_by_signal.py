import os
import signal

print("flushed", flush=True)
print("not flushed")
os.kill(os.getpid(), signal.SIGTERM)
signal.pause()
