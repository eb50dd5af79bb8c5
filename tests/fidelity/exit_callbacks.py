import sys
import threading
import weakref


class Thing:
    def __del__(self):
        print("__del__", sys is not None, threading.main_thread().name if threading else None)


thing = Thing()
reference = weakref.ref(thing, lambda _: print("weakref callback"))
local = threading.local()
local.thing = Thing()
sys.kept = Thing()
print("end of main")
