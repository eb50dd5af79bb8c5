import sys
import warnings

print(warnings.filters)
warnings.warn("a warning")
warnings.warn("old", DeprecationWarning)
warnings.warn("shown twice?")
for _ in range(2):
    warnings.warn("once per place")
"\d"
open("main.py")
print(sys.warnoptions)
