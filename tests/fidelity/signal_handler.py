import os
import signal


def handler(number, frame):
    print("got", signal.Signals(number).name, frame.f_code.co_name)


for name in ("SIGUSR1", "SIGCHLD", "SIGTERM"):
    signal.signal(getattr(signal, name), handler)
    os.kill(os.getpid(), getattr(signal, name))
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.02)
signal.pause()
print(signal.default_int_handler is signal.getsignal(signal.SIGINT))
