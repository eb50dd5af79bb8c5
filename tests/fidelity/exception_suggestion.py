import sys

variable = 1
try:
    print(sys.versoin)
except AttributeError:
    import traceback

    traceback.print_exc()
print(varaible)
