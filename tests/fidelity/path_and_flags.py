import sys

print(sys.path)
print(sorted(sys.path_importer_cache, key=lambda path: (path.endswith("main.py"), path)))
print(sys.path_hooks, sys.meta_path)
print(sys.warnoptions, sys._xoptions, sys.dont_write_bytecode, sys.pycache_prefix)
print(sys.implementation.cache_tag, sys.platlibdir, sys.base_prefix, sys.exec_prefix)
print(sys.getswitchinterval(), sys.int_info, sys.get_int_max_str_digits())
