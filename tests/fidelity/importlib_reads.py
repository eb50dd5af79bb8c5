import importlib
import importlib.metadata
import importlib.util
import pkgutil
import runpy
import site

print(importlib.util.find_spec("sitecustomize"), importlib.util.find_spec("sibling"))
print([m.name for m in pkgutil.iter_modules(["."])], site.getsitepackages(), site.ENABLE_USER_SITE)
print(runpy.run_path("sibling.py", run_name="other")["NAME"])
importlib.reload(site)
