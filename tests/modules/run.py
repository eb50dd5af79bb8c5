#!/usr/bin/env python3
"""Runs the module server's own tests: makes an environment with its pinned requirements, and the tests in it.

    python3 tests/modules/run.py            the tests
    python3 tests/modules/run.py --generate writes module_service_pb2.py anew from module_service.proto
    python3 tests/modules/run.py --environment tells the environment's Python, in which clients/client.py runs as well
"""

import os
import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
IMAGE = ROOT / "runner-image"

#: The compiler of the .proto, of the server's own version.
TOOLS = "grpcio-tools==1.85.1"

#: Longest run of all tests; they take about a minute.
TESTS_S = 600


def environment() -> pathlib.Path:
    """The Python of an environment with everything in it, made once for each set of requirements."""
    wanted = (IMAGE / "requirements.txt").read_text() + (IMAGE / "modules.txt").read_text() + TOOLS + sys.version
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "module-tests"
    python = target / "bin" / "python"
    done = target / "requirements"
    if done.is_file() and done.read_text() == wanted:
        return python
    venv.create(target, clear=True, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    subprocess.run([*install, "-r", IMAGE / "requirements.txt", "-r", IMAGE / "modules.txt", TOOLS], check=True)
    done.write_text(wanted)
    return python


def generated(python: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes module_service_pb2.py into the folder."""
    command = [python, "-m", "grpc_tools.protoc", f"-I{IMAGE}", f"--python_out={folder}", IMAGE / "module_service.proto"]
    subprocess.run(command, check=True)


def main() -> None:
    python = environment()
    if sys.argv[1:] == ["--generate"]:
        generated(python, IMAGE / "gantry_module")
        return
    if sys.argv[1:] == ["--environment"]:
        print(python)
        return
    variables = {**os.environ, "PYTHONPATH": f"{IMAGE}:{HERE}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, "-m", "unittest", "discover", "-s", HERE, "-t", HERE, *sys.argv[1:]]
    sys.exit(subprocess.run(command, env=variables, timeout=TESTS_S).returncode)


if __name__ == "__main__":
    main()
