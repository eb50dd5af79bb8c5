import sys


def hook(unraisable):
    print("unraisable:", unraisable.exc_type.__name__, unraisable.exc_value, unraisable.err_msg)


class Thing:
    def __del__(self):
        1 / 0


print(sys.unraisablehook is sys.__unraisablehook__)
sys.unraisablehook = hook
Thing()
print("done")
