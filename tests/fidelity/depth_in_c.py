import json


def deepest(text):
    low, high = 1, 200_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            json.loads(text(middle))
            low = middle
        except RecursionError:
            high = middle
    return low


print(deepest(lambda n: "[" * n + "]" * n))
nested = []
for _ in range(2000):
    nested = [nested]
try:
    print(len(repr(nested)))
except RecursionError as error:
    print(error)
