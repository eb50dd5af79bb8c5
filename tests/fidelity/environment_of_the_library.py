#: sandbox the variables are the sandbox's own
import ctypes
import os

getenv = ctypes.CDLL(None).getenv
getenv.restype = ctypes.c_char_p
print([getenv(name) for name in (b"HOME", b"PATH", b"LANG", b"GANTRY_WARM_FD", b"PYTHONPATH")])
print(os.path.expanduser("~"), os.get_exec_path())
