#: bare
print("never")
if True
    pass
