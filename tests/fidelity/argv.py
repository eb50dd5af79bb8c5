#: args one "two three" -x --long=ünï
import sys

print(sys.argv, sys.orig_argv, sys.flags, sys.executable, sys.prefix, sep="\n")
