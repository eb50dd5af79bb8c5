#: env GREETING=hello EMPTY= UMLAUT=ü
#: sandbox the variables are the sandbox's own
import os

hidden = {"PYTHON_COLD"}
print({k: v for k, v in os.environ.items() if k not in hidden})
print(sorted(k for k in os.environb if os.fsdecode(k) not in hidden))
print(os.getenv("GREETING"), os.environ.get("GANTRY_WARM_FD"), os.environ.get("PYTHONPATH"))
os.environ["NEW"] = "set"
os.system("echo $NEW $GREETING $UMLAUT; env | sort | grep -v -e PYTHON_COLD -e '^_='")
os.unsetenv("GREETING")
os.system("echo [$GREETING]")
