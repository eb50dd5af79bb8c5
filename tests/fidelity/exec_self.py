import os
import sys

if len(sys.argv) == 1:
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "main.py", "again"])
print(sys.argv, sys.orig_argv[1:], sys.path[0])
