"""A package index on loopback whose packages attack whoever installs them.

    index.py FOLDER TOOLS MARK    serves the wheels it makes in FOLDER and those in TOOLS, and prints its port.
                                  What a package runs while it is installed tries to write to MARK.

Each request is a line of FOLDER/log.
"""
import http.server
import io
import os
import sys
import tarfile
import time
import zipfile

BACKEND = '''
import json, os, socket, zipfile

def tried(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__

def write(path):
    with open(path, "w") as file:
        file.write("ran as %%d" %% os.getuid())
    return "written"

def direct():
    socket.create_connection(("127.0.0.1", %(port)d), 5).close()
    return "reached"

SEEN = {
    "mark": tried(lambda: write(%(mark)r)),
    "uid_map": open("/proc/self/uid_map").read().split(),
    "uid": os.getuid(),
    "secrets": [name for name, value in os.environ.items() if "gantry_" in value or "hush" in value],
    "direct": tried(direct),
    "shadow": tried(lambda: open("/etc/shadow").read()),
}

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    name, info = "dropper-1.0-py3-none-any.whl", "dropper-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        archive.writestr("dropper.py", "def seen():\\n    return %%r\\n" %% (SEEN,))
        archive.writestr(info + "/METADATA", "Metadata-Version: 2.1\\nName: dropper\\nVersion: 1.0\\n")
        archive.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(info + "/RECORD", "dropper.py,,\\n%%s/METADATA,,\\n%%s/WHEEL,,\\n%%s/RECORD,,\\n" %% (info, info, info))
    return name
'''
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'

folder, tools, mark = sys.argv[1:4]
log = open(os.path.join(folder, "log"), "a", buffering=1)


def wheel(name, files, requires=""):
    info = f"{name}-1.0.dist-info"
    files = dict(files)
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(os.path.join(folder, f"{name}-1.0-py3-none-any.whl"), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def normal(name):
    return name.replace("_", "-").replace(".", "-").lower()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"

    def log_message(self, *_):
        pass

    def answer(self):
        log.write(f"{self.command} {self.path} {self.headers.get('Host')}\n")
        parts = self.path.strip("/").split("/")
        if parts[0] == "simple" and len(parts) == 2:
            if parts[1] == "slow":
                time.sleep(600)
            names = [*os.listdir(folder), *os.listdir(tools)]
            found = [name for name in names if name.endswith(".whl") and normal(name.split("-")[0]) == parts[1]]
            body = "".join(f'<a href="/files/{name}">{name}</a>\n' for name in found).encode()
            return self.send(200 if found else 404, body, "text/html")
        for place in (folder, tools):
            file = os.path.join(place, parts[-1])
            if parts[0] == "files" and os.path.isfile(file):
                return self.send(200, open(file, "rb").read(), "application/octet-stream")
        self.send(404, b"", "text/plain")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
server.daemon_threads = True
port = server.server_address[1]
made = io.BytesIO()
with tarfile.open(fileobj=made, mode="w:gz") as archive:
    for name, text in {"pyproject.toml": PROJECT, "backend.py": BACKEND % {"port": port, "mark": mark}}.items():
        entry = tarfile.TarInfo(f"dropper-1.0/{name}")
        entry.size = len(text)
        archive.addfile(entry, io.BytesIO(text.encode()))
with open(os.path.join(folder, "dropper-1.0.tar.gz"), "wb") as file:
    file.write(made.getvalue())
wheel("evil", {"evil.py": ""}, f"Requires-Dist: dropper @ http://127.0.0.1:{port}/files/dropper-1.0.tar.gz\n")
wheel("victim_pkg", {"shared_name.py": "def whose():\n    return 'victim'\n"})
wheel("attacker_" + "a" * 60, {"shared_name.py": "def whose():\n    return 'attacker'\n"})
wheel("spelled_pkg", {"spelled_module.py": "def word():\n    return 'spelled'\n"})
print(port, flush=True)
server.serve_forever()
