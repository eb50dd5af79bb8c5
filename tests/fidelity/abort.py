import os
import sys

print("before", flush=True)
sys.stderr.write("err")
os.abort()
