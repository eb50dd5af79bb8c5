import os
import tempfile

with tempfile.NamedTemporaryFile() as file:
    print(os.path.dirname(file.name) == tempfile.gettempdir(), oct(os.stat(file.name).st_mode))
with tempfile.TemporaryDirectory() as folder:
    print(os.listdir(folder))
open("made", "w").close()
print(oct(os.stat("made").st_mode), sorted(n for n in os.listdir(".") if n != "__pycache__"))
