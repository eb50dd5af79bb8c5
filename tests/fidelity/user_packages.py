#: cold
#: packages
import sys

print(sys.modules["usercustomize"].WHERE)
