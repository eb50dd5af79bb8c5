import datetime
import time

print(time.tzname, time.timezone, time.daylight, time.localtime(0)[:6])
print(datetime.datetime.fromtimestamp(0), datetime.datetime.fromtimestamp(0).astimezone().tzname())
print(time.process_time() < 1, time.thread_time() < 1, time.get_clock_info("monotonic"))
