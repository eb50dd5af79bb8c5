import atexit
import weakref

for number in range(3):
    atexit.register(print, "atexit", number)


class Thing:
    def __init__(self, name):
        self.name = name

    def __del__(self):
        print("del", self.name)


one = Thing("module level")
weakref.finalize(one, print, "finalize")
print("end of main")
