#: stdin where\nnext\np x\nup\nq\n
def work():
    x = 1
    breakpoint()
    x = 2
    return x


work()
