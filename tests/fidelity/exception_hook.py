import sys


def hook(kind, value, traceback):
    print("hook:", kind.__name__, value, traceback.tb_lineno, traceback.tb_frame.f_code.co_filename)


print(sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__)
sys.excepthook = hook
raise ValueError("caught by the hook")
