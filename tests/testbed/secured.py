"""An Elasticsearch of its own with security and TLS on, beside the bed: what a server must be allowed there,
and how it is known to be itself. Runs `cargo test` against it, or the command that is given."""

import contextlib
import os
import pathlib
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile

from bed import build, elasticsearch
from bed.process import run
from bed.settings import ELASTICSEARCH, ELASTICSEARCH_PASSWORD, SOURCES, BedError

HOST = "127.0.0.1"
PORT = 19201
TRANSPORT_PORT = 19301
# It has nothing to save.
STOP_SECONDS = 10
SUITE = ["cargo", "test", "--quiet", "--lib", "--", "--ignored", "logs::", "--skip", "load", "--test-threads", "2"]


def make_certificates(folder):
    """A private authority, and the server's certificate of it."""
    authority, own = folder / "ca", folder / "server"
    for name in (authority, own):
        run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.raw"])
        run(["openssl", "pkcs8", "-topk8", "-nocrypt", "-in", f"{name}.raw", "-out", f"{name}.key"])
    run(["openssl", "req", "-x509", "-new", "-key", f"{authority}.key", "-subj", "/CN=a private authority",
         "-days", "2", "-out", f"{authority}.crt"])
    request = run(["openssl", "req", "-new", "-key", f"{own}.key", "-subj", "/CN=elasticsearch"])
    extensions = folder / "extensions"
    extensions.write_text(f"basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\nsubjectAltName=IP:{HOST}\n")
    run(["openssl", "x509", "-req", "-CA", f"{authority}.crt", "-CAkey", f"{authority}.key", "-set_serial", "1",
         "-days", "2", "-extfile", extensions, "-out", f"{own}.crt"], input=request)
    return authority.with_suffix(".crt")


def make_program(folder):
    """A copy of the server with what keeps API keys: their index needs text analysis that this distribution
    leaves out, so it is added as a plugin."""
    source = build.elasticsearch()
    program = folder / "program"
    shutil.copytree(source, program)
    classes = folder / "classes"
    run(["javac", "--release", "17", "-cp", f"{source}/lib/*", "-d", classes, SOURCES / "java" / "Analysis.java"])
    plugin = program / "plugins" / "analysis"
    plugin.mkdir(parents=True)
    with zipfile.ZipFile(plugin / "analysis.jar", "w") as jar:
        for file in classes.iterdir():
            jar.write(file, file.name)
    (plugin / "plugin-descriptor.properties").write_text(
        f"name=analysis\ndescription=What the index of API keys needs\nversion=1\nclassname=Analysis\n"
        f"java.version=17\nelasticsearch.version={ELASTICSEARCH}\n"
    )
    run(["chmod", "-R", "a+rX", program])
    return program


def wait(authority, child, log):
    deadline = time.monotonic() + elasticsearch.READY_SECONDS
    trusted = ssl.create_default_context(cafile=str(authority))
    while True:
        try:
            urllib.request.urlopen(f"https://{HOST}:{PORT}/_cluster/health", timeout=5, context=trusted)
        except urllib.error.HTTPError as error:
            if error.code == 401:  # it serves, and asks who is there
                return
        except OSError:
            pass
        if child.poll() is not None or time.monotonic() > deadline:
            raise BedError(f"the secured Elasticsearch does not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


@contextlib.contextmanager
def server():
    """The variables that lead to it, while it runs."""
    with tempfile.TemporaryDirectory(prefix="gantry-secured-") as folder:
        home = pathlib.Path(folder).resolve()
        certificates = home / "certificates"
        certificates.mkdir()
        authority = make_certificates(certificates)
        program = make_program(home)
        elasticsearch.write_configuration(home, {
            "network.host": HOST, "http.port": PORT, "transport.port": TRANSPORT_PORT,
            "xpack.security.enabled": True, "xpack.security.http.ssl.enabled": True,
            "xpack.security.http.ssl.key": "server.key", "xpack.security.http.ssl.certificate": "server.crt",
        })
        for name in ("server.key", "server.crt"):
            (certificates / name).rename(home / "config" / name)
        log = home / "out"
        user = elasticsearch.USER
        with open(log, "wb") as out:
            child = subprocess.Popen(
                ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", program / "bin" / "elasticsearch"],
                stdout=out, stderr=out, cwd=home, env={"PATH": os.environ["PATH"], **elasticsearch.environment(home)},
            )
        try:
            wait(authority, child, log)
            yield {
                "ELASTICSEARCH_HOST": f"https://elastic:{ELASTICSEARCH_PASSWORD}@{HOST}:{PORT}",
                "ELASTICSEARCH_CA": str(authority),
            }
        finally:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def main():
    with server() as variables:
        return subprocess.run(sys.argv[1:] or SUITE, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
