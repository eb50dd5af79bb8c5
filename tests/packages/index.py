"""A package index on loopback, of static files: wheels and sources for pip, tarballs for npm, modules for go, crates for cargo.

    index.py FOLDER     writes them there, prints its port and serves them

What is asked for below `/fail/HOW/` is answered by an index that fails: with the status HOW, by a connection that is
`reset`, by an answer that is `cut`, or, for `twice`, with status 503 until it was asked for twice.

    index.py FOLDER ADDRESS CERTIFICATE KEY     serves them on port 443 of the address, under the hosts of the usual indexes
"""
import base64
import collections
import functools
import hashlib
import http.server
import io
import json
import os
import socket
import ssl
import struct
import sys
import tarfile
import zipfile

BACKEND = '''
import json, os, socket, sys, time, zipfile

def tried(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__

def through_proxy(place):
    """The status of the answer of its proxy to a request for a tunnel to this place."""
    proxy = os.environ["https_proxy"].rsplit(":", 1)
    with socket.create_connection(("127.0.0.1", int(proxy[1])), 10) as line:
        line.sendall(f"CONNECT {place} HTTP/1.1\\r\\n\\r\\n".encode())
        return line.recv(64).split()[1].decode()

def direct(host, port):
    socket.create_connection((host, port), 5).close()
    return "reached"

def probe():
    server = int(os.environ["PROBE_SERVER"])
    return {
        "index": through_proxy(os.environ["PROBE_INDEX"]),
        "server": through_proxy(f"127.0.0.1:{server}"),
        "metadata": through_proxy("169.254.169.254:80"),
        "direct server": tried(lambda: direct("127.0.0.1", server)),
        "direct internet": tried(lambda: direct("192.0.2.1", 80)),
        "others' files": tried(lambda: os.listdir(os.environ["PROBE_FOLDER"])),
        "shadow": tried(lambda: open("/etc/shadow").read()),
        "own key": any("gantry_" in value for value in os.environ.values()),
    }

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    kind = open("kind").read()
    if kind == "loud":
        print(("loud " * 200 + "\\n") * 1_500)
        sys.exit(1)
    if kind == "slow":
        time.sleep(600)
    name = f"gantry_{kind}-1.0-py3-none-any.whl"
    info = f"gantry_{kind}-1.0.dist-info"
    with zipfile.ZipFile(os.path.join(wheel_directory, name), "w") as archive:
        archive.writestr(f"gantry_{kind}.py", f"SEEN = {json.dumps(probe())!r}\\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\\nName: gantry-{kind}\\nVersion: 1.0\\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", f"gantry_{kind}.py,,\\n{info}/METADATA,,\\n{info}/WHEEL,,\\n{info}/RECORD,,\\n")
    return name
'''


def write(path, content):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode())


def tarball(files):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue()


def zipped(files):
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return made.getvalue()


def python():
    wheel, info = "gantry_example-1.0-py3-none-any.whl", "gantry_example-1.0.dist-info"
    write(wheel, zipped({
        "gantry_example.py": "WORD = 'installed'\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: gantry-example\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": f"gantry_example.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
    }))
    write("simple/gantry-example/index.html", f'<a href="/{wheel}">{wheel}</a>')
    # Sources whose build runs code of the package's own, and needs nothing else.
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n[project]\nname = "gantry-{0}"\nversion = "1.0"\n'
    for kind in ["curious", "loud", "slow"]:
        top = f"gantry_{kind}-1.0"
        about = f"Metadata-Version: 2.1\nName: gantry-{kind}\nVersion: 1.0\n"
        write(f"{top}.tar.gz", tarball({
            f"{top}/pyproject.toml": project.format(kind), f"{top}/backend.py": BACKEND,
            f"{top}/kind": kind, f"{top}/PKG-INFO": about,
        }))
        write(f"simple/gantry-{kind}/index.html", f'<a href="/{top}.tar.gz">{top}.tar.gz</a>')


def node(at):
    about = {"name": "gantry-example", "version": "1.0.0", "main": "index.js", "types": "index.d.ts"}
    package = tarball({
        "package/package.json": json.dumps(about), "package/index.js": "exports.word = 'installed';\n",
        "package/index.d.ts": "export const word: string;\n",
    })
    write("gantry-example-1.0.0.tgz", package)
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    about["dist"] = {"tarball": f"{at}/gantry-example-1.0.0.tgz", "integrity": f"sha512-{digest}"}
    write("gantry-example", json.dumps({"name": "gantry-example", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": about}}))


def go():
    module, version = "example.org/word", "v1.0.0"
    at, top = f"go/{module}/@v/{version}", f"{module}@{version}"
    write(f"go/{module}/@v/list", f"{version}\n")
    write(f"{at}.info", json.dumps({"Version": version, "Time": "2024-01-01T00:00:00Z"}))
    write(f"{at}.mod", f"module {module}\n")
    write(f"{at}.zip", zipped({f"{top}/go.mod": f"module {module}\n", f"{top}/word.go": 'package word\n\nconst Word = "installed"\n'}))


def rust(at):
    top = "gantry-example-1.0.0"
    crate = tarball({
        f"{top}/Cargo.toml": '[package]\nname = "gantry-example"\nversion = "1.0.0"\nedition = "2021"\n',
        f"{top}/src/lib.rs": 'pub const WORD: &str = "installed";\n',
    })
    write(f"cargo/{top}.crate", crate)
    write("cargo/config.json", json.dumps({"dl": f"{at}/{{crate}}-{{version}}.crate"}))
    entry = {"name": "gantry-example", "vers": "1.0.0", "deps": [], "cksum": hashlib.sha256(crate).hexdigest(), "features": {}, "yanked": False}
    write("cargo/ga/nt/gantry-example", json.dumps(entry) + "\n")


ASKED = collections.Counter()

# Where each of the usual hosts has its files.
FOLDERS = {"proxy.golang.org": "/go", "index.crates.io": "/cargo", "static.crates.io": "/cargo"}


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.path = FOLDERS.get(self.headers["Host"], "") + self.path
        if self.path.startswith("/fail/"):
            _, _, how, rest = self.path.split("/", 3)
            self.path = f"/{rest}"
            if self.fails(how):
                return
        super().do_GET()

    def fails(self, how):
        """Fails so; false when it is to be answered after all."""
        self.close_connection = True
        top = self.path.split("/")[1]
        ASKED[how, top] += 1
        if how == "reset":
            # With this a socket that is closed is reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif how == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b"<a href=")
        elif how != "twice":
            self.send_error(int(how))
        elif ASKED[how, top] <= 2:
            self.send_error(503)
        else:
            return False
        return True

    def do_HEAD(self):
        self.path = FOLDERS.get(self.headers["Host"], "") + self.path
        super().do_HEAD()

    def handle(self):
        try:
            super().handle()
        except (OSError, ValueError):
            pass


def main():
    os.chdir(sys.argv[1])
    usual = len(sys.argv) > 2
    handler = functools.partial(Handler, directory=sys.argv[1])
    address = (sys.argv[2], 443) if usual else ("127.0.0.1", 0)
    server = http.server.ThreadingHTTPServer(address, handler)
    port = server.server_address[1]
    python()
    go()
    if usual:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*sys.argv[3:5])
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        node("https://registry.npmjs.org")
        rust("https://static.crates.io")
    else:
        node(f"http://127.0.0.1:{port}")
        rust(f"http://127.0.0.1:{port}/cargo")
    print(port, flush=True)
    server.serve_forever()


main()
