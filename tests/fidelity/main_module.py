"""The documentation of main."""
import sys

x: int = 1
main = sys.modules["__main__"]
for name in ("__name__", "__doc__", "__file__", "__package__", "__spec__", "__cached__", "__annotations__"):
    print(name, repr(getattr(main, name, "absent")))
print(type(main.__loader__), main.__loader__.name, main.__loader__.path)
print(sorted(vars(main)), __builtins__)
print(main.__loader__.get_source("__main__").splitlines()[-1])
