import atexit


def fails():
    raise ValueError("at exit")


atexit.register(print, "registered first, runs last")
atexit.register(fails)
atexit.register(print, "registered last, runs first")
print("end of main")
