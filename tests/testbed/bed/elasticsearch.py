"""Elasticsearch: the real server, with security off or on."""

import base64
import json
import os
import shutil
import urllib.request

from . import build
from .process import Process, installed, kill_cgroup, run, wait_for
from .settings import ELASTICSEARCH_PASSWORD, ELASTICSEARCH_PORT, ELASTICSEARCH_TRANSPORT_PORT, HOST, STATE, BedError

# A group of its own: the launcher starts the server as a second process, and both end together.
PROCESS = Process("elasticsearch", group="elasticsearch")
# Seen: 20 to 60 s, by how busy the machine is.
READY_SECONDS = 180
# It refuses to run as root; no account is needed, and this number has no other use.
USER = 19200
HOME = STATE / "elasticsearch"
HEAP = "512m"


def secure():
    return (HOME / "secure").exists()


def host():
    login = f"elastic:{ELASTICSEARCH_PASSWORD}@" if secure() else ""
    return f"http://{login}{HOST}:{ELASTICSEARCH_PORT}"


def request(method, path, body=None, content_type="application/json", seconds=30):
    call = urllib.request.Request(
        f"http://{HOST}:{ELASTICSEARCH_PORT}{path}", method=method, data=body, headers={"Content-Type": content_type}
    )
    if secure():
        token = base64.b64encode(f"elastic:{ELASTICSEARCH_PASSWORD}".encode()).decode()
        call.add_header("Authorization", f"Basic {token}")
    with urllib.request.urlopen(call, timeout=seconds) as answer:
        return json.loads(answer.read())


def configure(security):
    write_configuration(HOME, {
        "network.host": HOST, "http.port": ELASTICSEARCH_PORT, "transport.port": ELASTICSEARCH_TRANSPORT_PORT,
        "xpack.security.enabled": security, "xpack.security.http.ssl.enabled": False,
    })
    (HOME / "secure").touch() if security else (HOME / "secure").unlink(missing_ok=True)


def write_configuration(home, own):
    """A server's folder with these settings besides the usual ones, ready to be started in."""
    source = build.elasticsearch()
    shutil.rmtree(home / "config", ignore_errors=True)
    for folder in ("config", "data", "logs", "tmp"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "config", home / "config", dirs_exist_ok=True)
    settings = {
        "cluster.name": "testbed", "node.name": "testbed", "discovery.type": "single-node",
        "path.data": str(home / "data"), "path.logs": str(home / "logs"),
        "xpack.security.transport.ssl.enabled": False, "xpack.security.enrollment.enabled": False,
        # The machine's disk is the developer's: its fill level is no reason to refuse documents here.
        "cluster.routing.allocation.disk.threshold_enabled": False,
        **own,
    }
    lines = (f"{name}: {json.dumps(value)}" for name, value in settings.items())
    (home / "config" / "elasticsearch.yml").write_text("\n".join(lines) + "\n")
    # The quick compiler and the simple collector: ready in a third of the time on two cores.
    (home / "config" / "jvm.options.d").mkdir(exist_ok=True)
    (home / "config" / "jvm.options").write_text(
        f"-Xms{HEAP}\n-Xmx{HEAP}\n-XX:+UseSerialGC\n-XX:TieredStopAtLevel=1\n-XX:+ExitOnOutOfMemoryError\n"
        # Every module may read the folder for temporary files, and none may read the programs: with /tmp here,
        # a copy of the project below /tmp would not start.
        f"-Djava.io.tmpdir={home}/tmp\n"
        f"-XX:ErrorFile={home}/logs/hs_err_pid%p.log\n"
    )
    security = settings["xpack.security.enabled"]
    if security and not (source / "modules" / "x-pack-security").exists():
        raise BedError("this build of Elasticsearch has no x-pack-security module: --secure cannot be had")
    if security:
        keystore = source / "bin" / "elasticsearch-keystore"
        variables = {**os.environ, **environment(home)}
        run([keystore, "create"], env=variables)
        run([keystore, "add", "--stdin", "bootstrap.password"], input=ELASTICSEARCH_PASSWORD, env=variables)
    run(["chown", "-R", f"{USER}:{USER}", home])


def environment(home=HOME):
    java = os.path.dirname(os.path.dirname(os.path.realpath(installed("java"))))
    return {
        "ES_JAVA_HOME": java, "ES_PATH_CONF": str(home / "config"), "ES_TMPDIR": str(home / "tmp"),
        "HOME": str(home), "CLI_JAVA_OPTS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    }


def start():
    if PROCESS.pid():
        return
    PROCESS.start([build.elasticsearch() / "bin" / "elasticsearch"], user=USER, env=environment(), cwd=HOME)


def stop():
    PROCESS.stop()
    kill_cgroup(PROCESS.group)


def ready():
    return request("GET", "/_cluster/health?timeout=1s", seconds=5)["status"] in ("green", "yellow")


def wait():
    wait_for("elasticsearch", READY_SECONDS, ready, PROCESS)


def up(security=False):
    if not PROCESS.pid():
        stop()  # a server whose launcher died still holds the data
        configure(security)
    start()
    wait()
