import sys

with open("sitecustomize.py", "w") as file:
    file.write("print('my own', __name__, __file__)")
import sitecustomize

print(sys.modules["sitecustomize"] is sitecustomize, sitecustomize.__spec__.origin)
