import sys

for number in range(20_000):
    print(number, "x" * 20)
sys.stderr.write("e" * 100_000)
print("the end")
