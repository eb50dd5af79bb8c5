#: stdin first\nsecond ü\n\nlast without end
import sys

print(input(), input("prompt> "))
for line in sys.stdin:
    print(repr(line))
try:
    input()
except EOFError as error:
    print("EOF", error)
