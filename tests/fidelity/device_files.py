#: stdin through the device
#: sandbox root may open what a sandbox's user may
with open("/dev/stdin") as file:
    print(file.read())
with open("/dev/fd/1", "w") as file:
    file.write("to fd 1\n")
with open("/proc/self/fd/2", "w") as file:
    file.write("to fd 2\n")
with open("/dev/stdout", "w") as file:
    file.write("to stdout\n")
with open("/dev/null", "w") as file:
    print(file.write("nothing"))
with open("/dev/urandom", "rb") as file:
    print(len(file.read(4)))
