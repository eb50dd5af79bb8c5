import subprocess
import sys

print(sys.flags.hash_randomization, sys.hash_info)
other = subprocess.run([sys.executable, "-c", "print(hash('a'))"], capture_output=True, text=True).stdout
print(int(other) == hash("a"))
