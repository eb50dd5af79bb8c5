"""Builds the bed's programs from pinned Go modules and fetches Elasticsearch; each is kept under a hash of its inputs."""

import functools
import hashlib
import json
import os
import pathlib
import re
import tempfile
import zipfile

from .process import installed, run
from .settings import CACHE, ELASTICSEARCH, GO, KUBERNETES, REPOSITORY, SOURCES, BedError

# The whole of Kubernetes from nothing on two cores takes 7 to 10 minutes; the rest is for slower machines.
BUILD_SECONDS = 2400
DOWNLOAD_SECONDS = 900
VERSION = "k8s.io/component-base/version"
# name: (module folder, package, linker flags)
PROGRAMS = {
    "kubernetes": ("kubernetes", "./kubernetes", f"-X {VERSION}.gitVersion=v{KUBERNETES} -X {VERSION}.gitMajor=1 -X {VERSION}.gitMinor=34"),
    "coredns": ("kubernetes", "./coredns", ""),
    "volumes": ("kubernetes", "./volumes", ""),
    "versitygw": ("versitygw", "github.com/versity/versitygw/cmd/versitygw", ""),
    "skipper": ("skipper", "./ingress", ""),
    "policies": ("kube-router", "./policies", ""),
    "metrics-server": ("metrics-server", "sigs.k8s.io/metrics-server/cmd/metrics-server", ""),
}
PACKAGES = {
    "etcd": "etcd-server", "containerd": "containerd", "runc": "runc", "ip": "iproute2", "nft": "nftables",
    "iptables": "iptables", "ipset": "ipset", "conntrack": "conntrack", "go": "golang-go", "debootstrap": "debootstrap", "buildah": "buildah",
    "openssl": "openssl", "setpriv": "util-linux", "java": "openjdk-17-jre-headless", "javac": "openjdk-17-jdk-headless", "mvn": "maven", "cc": "build-essential",
    "sysctl": "procps", "mkfs.ext4": "e2fsprogs",
}


def packages():
    """Installs what Debian has and this machine lacks."""
    missing = sorted({package for program, package in PACKAGES.items() if not installed(program)})
    if not pathlib.Path("/usr/lib/cni/bridge").exists():
        missing.append("containernetworking-plugins")
    if missing:
        if not installed("apt-get"):
            raise BedError(f"missing: {' '.join(missing)}. This machine has no apt-get: install them with its package manager")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update", "-qq"], seconds=DOWNLOAD_SECONDS, env=environment)
        run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], seconds=DOWNLOAD_SECONDS, env=environment)
    go()


@functools.cache
def go():
    """A go command that fetches, by itself, the version that a module asks for: Go 1.21 or newer.

    Debian 12's is older, but it can fetch a newer one as what every Go release is as well: a module.
    """
    if not installed("go"):
        raise BedError("Go is not installed, and there was no apt-get to install it with: see https://go.dev/dl")
    version = re.search(r"go1\.(\d+)", run(["go", "version"]))
    if version and int(version[1]) >= 21:
        return "go"
    module = f"golang.org/toolchain@v0.0.1-go{GO}.linux-{'arm64' if os.uname().machine == 'aarch64' else 'amd64'}"
    # Outside of any module, so that no go.mod that the old one cannot read is in its way.
    found = run(["go", "mod", "download", "-json", module], seconds=DOWNLOAD_SECONDS, cwd="/")
    folder = pathlib.Path(json.loads(found)["Dir"])
    # Modules carry no modes.
    for program in [*folder.glob("bin/*"), *folder.glob("pkg/tool/*/*")]:
        program.chmod(0o555)
    return folder / "bin" / "go"


def digest(*things):
    total = hashlib.sha256()
    for thing in things:
        if isinstance(thing, pathlib.Path):
            for file in sorted([thing] if thing.is_file() else [f for f in thing.rglob("*") if f.is_file()]):
                total.update(file.name.encode() + b"\0" + file.read_bytes())
        else:
            total.update(str(thing).encode() + b"\0")
    return total.hexdigest()[:16]


def binary(name):
    """Where the program is, or will be once it is built."""
    module, package, flags = PROGRAMS[name]
    folder = SOURCES / "go" / module
    inputs = [folder / "go.mod", folder / "go.sum", package, flags]
    if package.startswith("./"):
        inputs.append(folder / package[2:])
    return CACHE / "bin" / f"{name}-{digest(*inputs)}"


def outdated(program):
    """Whether a program of this file name is one of the bed's, built from other sources than those of now."""
    return any(re.fullmatch(f"{name}-[0-9a-f]{{16}}", program or "") and program != binary(name).name for name in PROGRAMS)


def build(name):
    target = binary(name)
    if target.exists():
        return
    module, package, flags = PROGRAMS[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".part")
    run(
        # Niced: a build takes every core for minutes, and other work on the machine goes on.
        ["nice", "-n", "10", go(), "build", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false",
         "-ldflags", f"-s -w {flags}".strip(), "-o", temporary, package],
        cwd=SOURCES / "go" / module, seconds=BUILD_SECONDS, env={**os.environ, "CGO_ENABLED": "0"},
    )
    for old in target.parent.glob(f"{name}-" + "?" * 16):
        old.unlink()
    temporary.rename(target)


def elasticsearch():
    """The folder of the unpacked server; Maven Central has it as the distribution for integration tests."""
    folder = CACHE / f"elasticsearch-{ELASTICSEARCH}"
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=CACHE.parent) as temporary:
        run(["mvn", "-q", "-B", "dependency:copy", f"-DoutputDirectory={temporary}",
             f"-Dartifact=org.elasticsearch.distribution.integ-test-zip:elasticsearch:{ELASTICSEARCH}:zip"],
            seconds=DOWNLOAD_SECONDS, cwd=temporary)
        with zipfile.ZipFile(pathlib.Path(temporary) / f"elasticsearch-{ELASTICSEARCH}.zip") as archive:
            archive.extractall(temporary)
        unpacked = pathlib.Path(temporary) / folder.name
        for program in (unpacked / "bin").iterdir():
            program.chmod(0o755)
        # The server runs as a user without rights and reads its folder.
        run(["chmod", "-R", "a+rX", unpacked])
        CACHE.mkdir(parents=True, exist_ok=True)
        unpacked.rename(folder)
    return folder


@functools.cache
def own(name):
    """A program of this repository as it is now, for its image."""
    run(["cargo", "build", "--release", "--bin", name], cwd=REPOSITORY, seconds=BUILD_SECONDS)
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or REPOSITORY / "target") / "release" / name
