import resource
import time

start = resource.getrusage(resource.RUSAGE_SELF)
print(start.ru_maxrss > 1000, start.ru_utime < 1, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(time.process_time() < 1, time.get_clock_info("process_time").monotonic)
