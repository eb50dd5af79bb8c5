#: bare
def f():
pass
