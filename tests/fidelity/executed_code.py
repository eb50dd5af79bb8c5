def outer():
    exec(compile("def f():\n    raise KeyError('inside exec')\nf()", "<generated>", "exec"), {})


try:
    eval("1 +")
except SyntaxError as error:
    print(error.filename, error.lineno, error.offset, error.text)
outer()
