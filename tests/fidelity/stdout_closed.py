import sys

print("lost or not")
sys.stdout.close()
sys.stderr.write("after\n")
print("to a closed file")
