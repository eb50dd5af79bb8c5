import os

os.close(1)
print("nobody gets this")
