NAME = __name__
WHERE = __file__


def fail():
    raise LookupError("from the sibling")
