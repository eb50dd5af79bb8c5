import builtins
import sys

print(sorted(vars(builtins)), exit, quit)
print(help, license, sep="\n")
print(sys.flags.no_site, sys.flags.no_user_site, hasattr(sys, "ps1"), hasattr(sys, "last_value"))
exit(4)
