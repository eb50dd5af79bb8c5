#: sandbox which signals are ignored is handed down from whoever started the test
import subprocess
import sys

print("before", flush=True)
subprocess.run(["echo", "from echo"], check=True)
print(subprocess.run([sys.executable, "-c", "import sys; print(sys.argv, sys.path[1:])"], capture_output=True, text=True).stdout)
print(subprocess.run("exit 7", shell=True).returncode)
print(subprocess.run(["cat"], input=b"through cat", capture_output=True).stdout)
subprocess.run([sys.executable, "-c", "import signal; print([signal.getsignal(s).__str__() for s in (1, 2, 13, 15, 17)])"])
print(subprocess.run(["grep", "^Sig[BIC]", "/proc/self/status"], capture_output=True, text=True).stdout)
try:
    subprocess.run(["sleep", "5"], timeout=0.05)
except subprocess.TimeoutExpired as error:
    print(error.cmd)
