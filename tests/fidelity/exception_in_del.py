class Thing:
    def __del__(self):
        raise RuntimeError("in __del__")

    def __repr__(self):
        return "<Thing>"


def make():
    thing = Thing()


make()
print("goes on")
keep = Thing()
