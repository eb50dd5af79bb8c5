import sys

print("out")
sys.exit("a text for stderr ü")
