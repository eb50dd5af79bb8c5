import sys

sys.stdout = None
print("nothing")
sys.stderr = sys.__stdout__
raise ValueError("to stdout")
