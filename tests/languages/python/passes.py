import sys

name = input()
print(f"Hello {name} {sum(int(word) for word in sys.argv[1:])}")
