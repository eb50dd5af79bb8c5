import tracemalloc

print(tracemalloc.is_tracing(), tracemalloc.get_traceback_limit())
tracemalloc.start()
data = [bytes(1000) for _ in range(100)]
top = [s for s in tracemalloc.take_snapshot().statistics("lineno") if s.traceback[0].filename.endswith("main.py")][0]
print(top.traceback, top.count)
