import sys


class Code(int):
    pass


try:
    sys.exit(True)
finally:
    print(Code(2))
