import os
import sys

print("before", flush=True)
pid = os.fork()
if pid == 0:
    print("child", os.getppid() > 0)
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.register_at_fork(before=lambda: print("about to fork"), after_in_parent=lambda: print("parent"))
if os.fork() == 0:
    os._exit(0)
os.wait()
