def inner(depth):
    if depth == 0:
        return {}["missing"]
    return inner(depth - 1)


inner(6)
