#: bare
import sys

print(list(sys.modules))
print(sys.modules["site"].__file__, "sitecustomize" in sys.modules, "usercustomize" in sys.modules)
print([name for name, module in sys.modules.items() if "gantry" in str(getattr(module, "__file__", ""))])
