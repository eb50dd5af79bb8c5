import os
import tempfile


class Folder:
    def __init__(self):
        self.path = tempfile.mkdtemp()

    def __del__(self):
        os.rmdir(self.path)
        print("removed", os.path.exists(self.path), tempfile is not None)


folder = Folder()
cycle = [Folder()]
cycle.append(cycle)
