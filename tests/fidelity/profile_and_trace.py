import sys
import threading

print(sys.getprofile(), sys.gettrace(), threading.gettrace(), sys.getrefcount(object()))
lines = []


def trace(frame, event, argument):
    lines.append((event, frame.f_code.co_name, frame.f_lineno))
    return trace


def traced():
    return 1


sys.settrace(trace)
traced()
sys.settrace(None)
print(lines, sys.getallocatedblocks() > 0, sys.is_finalizing(), sys.exc_info())
