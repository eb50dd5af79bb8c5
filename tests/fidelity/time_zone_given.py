#: cold
#: env TZ=Asia/Tokyo
import time

print(time.tzname, time.localtime(0)[:6])
