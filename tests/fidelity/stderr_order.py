import os
import sys

os.dup2(1, 2)
print("1 out", flush=True)
print("2 err", file=sys.stderr)
print("4 out, late")
sys.stderr.write("3 err without newline ")
