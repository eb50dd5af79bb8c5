import atexit
import threading
import time


def forever():
    while True:
        import os
        import weakref
        import collections.abc


for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
atexit.register(time.sleep, 0.02)
print("end of main")
