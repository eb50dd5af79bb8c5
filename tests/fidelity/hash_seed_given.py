#: cold
#: env PYTHONHASHSEED=42
import sys

print(sys.flags.hash_randomization, hash("a"), hash(b"bytes"), list({"x", "y", "z", "gantry"}))
