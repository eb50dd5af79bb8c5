"""The images: built with buildah on a base made by debootstrap, and a containerd store that holds them unpacked."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from .build import digest, own
from .process import Process, run, wait_for
from .settings import BASE_IMAGE, CACHE, DATABASE_IMAGE, IMAGE_STORE, PAUSE_IMAGE, REPOSITORY, RUN, RUNNER_IMAGE, SERVER_IMAGE, SOURCES, STATE

# debootstrap: seen 40 s; packages of an image: seen 60 s. The rest is for a slow network.
BASE_SECONDS = 900
IMAGE_SECONDS = 900
CONTAINERD_SECONDS = 30
BASE_RECIPE = ["--variant=minbase", "bookworm"]


class Image:
    def __init__(self, name, reference, folder, prepare=None, program=None, arguments=()):
        self.name, self.reference, self.folder, self.prepare, self.program = name, reference, folder, prepare, program
        self.arguments = [f"--build-arg={argument}" for argument in arguments]


def add_pause(context):
    run(["cc", "-static", "-Os", "-s", "-o", context / "pause", context / "pause.c"])


def add_wheels(context):
    """The Python packages: this machine's pip knows the way to an index, the build's own may not."""
    run([REPOSITORY / "scripts" / "wheels", context / "wheels"], seconds=IMAGE_SECONDS)


PAUSE = Image("pause", PAUSE_IMAGE, SOURCES / "images" / "pause", add_pause)
DATABASE = Image("postgres", DATABASE_IMAGE, SOURCES / "images" / "postgres")
# A language of each kind: the whole image has 2.7 GB, and this one is unpacked by every test run.
RUNNER = Image("gantry-runner", RUNNER_IMAGE, REPOSITORY / "runner-image", add_wheels, program="gantry-runner",
               arguments=["LANGUAGES=gcc libc6-dev lua5.4 lua-socket", "LIBRARIES=python3-requests"])
# Only what tests an installation needs it: `images --server`.
SERVER = Image("gantry", SERVER_IMAGE, REPOSITORY / "infrastructure", program="gantry")
IMAGES = [PAUSE, DATABASE, RUNNER]


def archive(image):
    inputs = [image.folder, *BASE_RECIPE, *image.arguments] + ([own(image.program)] if image.program else [])
    return CACHE / "images" / f"{image.name}-{digest(*inputs)}.tar"


def base_archive():
    return CACHE / "images" / f"base-{digest(*BASE_RECIPE)}.tar"


@contextlib.contextmanager
def buildah():
    """A buildah with a store of its own, which keeps the layers: a new runner program costs one copy, no packages."""
    store = STATE / "buildah"
    store.mkdir(parents=True, exist_ok=True)

    def call(*arguments, seconds=IMAGE_SECONDS):
        return run(["buildah", "--root", store / "root", "--runroot", store / "run", "--storage-driver", "overlay", *arguments],
                   seconds=seconds, env={**os.environ, "TMPDIR": str(store)})

    try:
        yield call
    finally:
        run(["sh", "-c", f"grep -o ' {store}[^ ]*' /proc/self/mounts | sort -r | xargs -r umount -l"])


def build_base():
    target = base_archive()
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with buildah() as call:
        root = pathlib.Path(tempfile.mkdtemp(prefix="base-", dir=STATE))
        try:
            run(["debootstrap", *BASE_RECIPE, root], seconds=BASE_SECONDS)
            for cache in ("var/cache/apt/archives", "var/lib/apt/lists", "dev"):
                shutil.rmtree(root / cache, ignore_errors=True)
                (root / cache).mkdir()
            root.chmod(0o755)
            container = call("from", "scratch").strip()
            call("add", "--quiet", container, str(root), "/")
            call("config", "--cmd", "/bin/bash", container)
            call("commit", "--quiet", "--rm", container, BASE_IMAGE)
            push(call, BASE_IMAGE, target)
        finally:
            shutil.rmtree(root, ignore_errors=True)


def push(call, reference, target):
    partial = target.with_suffix(".part")
    partial.unlink(missing_ok=True)
    call("push", "--quiet", reference, f"docker-archive:{partial}:{reference}")
    for old in target.parent.glob(f"{target.name.rpartition('-')[0]}-" + "?" * 16 + ".tar"):
        old.unlink()
    partial.rename(target)


def build(image):
    target = archive(image)
    if target.exists():
        return
    with buildah() as call:
        context = pathlib.Path(tempfile.mkdtemp(prefix="context-", dir=STATE))
        try:
            shutil.copytree(image.folder, context, dirs_exist_ok=True)
            if image.prepare:
                image.prepare(context)
            if image.program:
                shutil.copy(own(image.program), context / image.program)
            if image is not PAUSE:
                call("pull", "--quiet", f"docker-archive:{base_archive()}")
            call("build", "--isolation=chroot", "--network=host", "--pull=never", "--layers", "--quiet", "--format=docker",
                 "--tag", image.reference, *image.arguments, str(context))
            push(call, image.reference, target)
        finally:
            shutil.rmtree(context, ignore_errors=True)


def build_all():
    build_base()
    for image in IMAGES:
        build(image)


def store_key():
    return digest(*archives().values())


def archives():
    """The name of each image's archive as it is to be."""
    return {image.name: archive(image).name for image in IMAGES}


def load(socket, wanted=None):
    for image in wanted or IMAGES:
        run(["ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", archive(image)], seconds=IMAGE_SECONDS)


def make_store():
    """Unpacks every image once, in a containerd of its own."""
    store = IMAGE_STORE / store_key()
    if store.exists():
        return
    shutil.rmtree(IMAGE_STORE, ignore_errors=True)
    partial, state = IMAGE_STORE / "partial", RUN / "image-store"
    for folder in (partial, state):
        folder.mkdir(parents=True, exist_ok=True)
    config, socket = IMAGE_STORE / "containerd.toml", state / "containerd.sock"
    config.write_text(
        f'version = 2\nroot = "{partial}"\nstate = "{state}"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
        f'[grpc]\n  address = "{socket}"\n'
    )
    containerd = Process("image-store")
    containerd.start(["containerd", "--config", config])
    try:
        wait_for("the image store's containerd", CONTAINERD_SECONDS, socket.exists, containerd)
        load(socket)
    finally:
        containerd.stop()
        shutil.rmtree(state, ignore_errors=True)
    partial.rename(store)


def clone_store(target):
    """A node's own copy. An image's files are only ever read and shared by hard links; the databases are copied."""
    target.parent.mkdir(parents=True, exist_ok=True)
    store = next(folder for folder in IMAGE_STORE.iterdir() if len(folder.name) == 16)  # make_store leaves exactly one
    run(["cp", "-al", store, target])
    for database in target.rglob("*.db"):
        copied = database.with_suffix(".copy")
        shutil.copy2(store / database.relative_to(target), copied)
        copied.rename(database)
