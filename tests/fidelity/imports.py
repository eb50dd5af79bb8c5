import sibling
import package
import package.inner
import sys

print(sibling.NAME, sibling.WHERE, package.VALUE, sys.modules["sibling"].__spec__)
try:
    import not_there
except ModuleNotFoundError as error:
    print(error, error.name)
try:
    import sitecustomize
except ImportError as error:
    print(type(error), error)
sibling.fail()
