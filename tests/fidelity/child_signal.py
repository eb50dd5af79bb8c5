import os
import signal

if os.fork() == 0:
    os._exit(3)
print(os.waitstatus_to_exitcode(os.wait()[1]), signal.getsignal(signal.SIGCHLD))
try:
    os.wait()
except ChildProcessError as error:
    print(error)
