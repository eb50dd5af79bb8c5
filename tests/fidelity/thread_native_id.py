import os
import threading

print(threading.main_thread().native_id == os.getpid() == threading.get_native_id())
print(os.getpid() > 0, threading.main_thread().is_alive())
