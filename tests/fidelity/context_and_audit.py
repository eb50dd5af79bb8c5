import contextvars
import sys

print(len(contextvars.copy_context()), sys.get_asyncgen_hooks(), sys.get_coroutine_origin_tracking_depth())
events = []
sys.addaudithook(lambda event, arguments: events.append(event) if len(events) < 20 else None)
open("/dev/null").close()
print(events)
