#: sandbox ids, groups, priority and session are the sandbox's own
import os
import sys

print(os.getcwd(), oct(os.umask(0o22)), len(set(os.getresuid() + os.getresgid())), os.getgroups())
print(os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), os.nice(0), os.getppid() != os.getpid())
print(os.sched_getscheduler(0), os.sched_getaffinity(0) == set(range(os.cpu_count())))
keys = ("NoNewPrivs", "Seccomp", "CapInh", "CapPrm", "CapEff", "CapAmb", "Groups", "Umask", "Threads", "Name")
with open("/proc/self/status") as status:
    print([line for line in status if line.startswith(keys)])
print(open("/proc/self/comm").read(), os.stat("/proc/self/exe").st_ino == os.stat(sys.executable).st_ino)
print(open("/proc/self/oom_score_adj").read(), os.access("/proc/self/mem", os.W_OK), os.readlink("/proc/self/cwd"))
print(os.listdir("/"), os.readlink("/proc/self/root"))
