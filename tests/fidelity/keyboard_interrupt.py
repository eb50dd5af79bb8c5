import os
import signal

try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
finally:
    print("cleaned up")
