import atexit
import logging
import sys


@atexit.register
def last():
    import os
    import json

    print(os.sep, json.dumps([1]), "re" in sys.modules, sys.modules.get("os") is os)
    logging.warning("from atexit")


class Late:
    def __del__(self):
        try:
            import colorsys

            print("imported", colorsys.__name__)
        except ImportError as error:
            print("not imported", error)


late = Late()
late.self = late
del late
kept = Late()
