import os
import sibling

print(sibling.__cached__, os.path.exists(sibling.__cached__), os.listdir("__pycache__"))
