import faulthandler
import os
import signal
import sys

print(faulthandler.is_enabled())
faulthandler.enable()
faulthandler.dump_traceback()
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGSEGV)
