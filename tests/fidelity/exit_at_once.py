import os
import sys

sys.stdout.write("lost, never flushed")
sys.stderr.write("kept")
os._exit(9)
