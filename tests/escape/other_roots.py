"""other_roots.py - on the host: what somebody has put into a root, or into a file of one.

A control is who does by paths what a start does by descriptors, or who uses the root as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid

import roots
from frame import Kind, between
from tools import SECRET

MADE = "a root that somebody has made"
FOR_ALL = ("root", "user")


def hostile(stage):
    """A root that is this test's own, and goes with it."""
    root = roots.copy(f"hostile-{uuid.uuid4().hex}")
    stage.closing.callback(shutil.rmtree, root)
    return root


def in_place_of(path, target):
    """A link there to *target*."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def with_leak(stage):
    root = hostile(stage)
    in_place_of(root / "leak", stage.place / "other/secret")
    return root


@between(
    840, "read a file of the host by a link in the root", Kind.ROOTS, MADE,
    expect="FileNotFoundError", variants=FOR_ALL, control=SECRET,
    without=lambda stage: (with_leak(stage) / "leak").read_text(),
)  # fmt: skip
def follow_link(stage):
    code = "try: print(open('/leak').read())\nexcept OSError as e: print(type(e).__name__)"
    return stage.tries(stage.workdir, code, rootfs=str(with_leak(stage)))


def with_workdir_elsewhere(stage):
    """The first folder on the way to the work directory is a link out of the root."""
    root = hostile(stage)
    in_place_of(root / stage.workdir.parts[1], stage.place / "other")
    return root


def made_elsewhere(stage):
    return "elsewhere" if sorted(os.listdir(stage.place / "other")) != ["secret"] else "nowhere"


def make_by_path(stage):
    root = with_workdir_elsewhere(stage)
    os.makedirs(f"{root}{stage.workdir}", exist_ok=True)
    return made_elsewhere(stage)


@between(
    841, "have the place of the work directory made elsewhere, by a link on the way", Kind.ROOTS,
    MADE, expect="nowhere", variants=FOR_ALL, without=make_by_path, control="elsewhere",
)  # fmt: skip
def make_place(stage):
    root = with_workdir_elsewhere(stage)
    code = "import os; open('made', 'w').close(); print(os.path.realpath('.') == os.getcwd())"
    assert stage.tries(stage.workdir, code, rootfs=str(root)) == "True"
    assert (stage.workdir / "made").exists()
    return made_elsewhere(stage)


def with_users_elsewhere(stage):
    root = hostile(stage)
    in_place_of(root / "etc/passwd", stage.place / "open/file")
    return root


def write_by_path(stage):
    (with_users_elsewhere(stage) / "etc/passwd").write_text("written")
    return (stage.place / "open/file").read_text()


@between(
    842, "have /etc/passwd written to a file of the host, by a link in its place", Kind.ROOTS, MADE,
    expect="as it was", variants=FOR_ALL, without=write_by_path, control="written",
)  # fmt: skip
def write_users(stage):
    root = with_users_elsewhere(stage)
    code = "print('jovyan' in open('/etc/passwd').read())"
    assert stage.tries(stage.workdir, code, rootfs=str(root)) == "True"
    return (stage.place / "open/file").read_text()


def with_device(stage):
    root = hostile(stage)
    os.mknod(root / "device", 0o020666, os.makedev(1, 9))
    (root / "device").chmod(0o666)
    return root


def open_device(stage):
    os.close(os.open(with_device(stage) / "device", os.O_RDONLY))
    return "opened"


@between(
    843, "use a device node of the root", Kind.ROOTS, MADE, expect="PermissionError",
    variants=("root",), without=open_device, control="opened",
)  # fmt: skip
def use_device(stage):
    code = "try: open('/device'); print('opened')\nexcept OSError as e: print(type(e).__name__)"
    return stage.tries(stage.workdir, code, rootfs=str(with_device(stage)))


def with_set_id(stage):
    root = hostile(stage)
    shutil.copy(shutil.which("id"), root / "usr/bin/set-id")
    (root / "usr/bin/set-id").chmod(0o6755)
    return root


def run_set_id(stage):
    program = with_set_id(stage) / "usr/bin/set-id"
    command = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", program, "-u"]
    return subprocess.check_output(command, text=True).strip()


@between(
    844, "become root by a set-id program of the root", Kind.ROOTS, MADE, expect="1000",
    variants=("root",), needs=("setpriv",), without=run_set_id, control="0",
)  # fmt: skip
def become_root(stage):
    code = "import subprocess; print(subprocess.check_output(['set-id', '-u'], text=True))"
    return stage.tries(stage.workdir, code, rootfs=str(with_set_id(stage)))


def of_somebody(stage):
    """A file system that is a user's to change."""
    path = stage.place / "other/image"
    shutil.copy(roots.image("squashfs"), path)
    os.chown(path, 4321, 4321)
    return path


def mount_it(stage):
    script = 'mount -o loop,ro "$1" /mnt && test -d /mnt/usr && echo mounted'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", of_somebody(stage)]
    return subprocess.check_output(command, text=True).strip()


@between(
    845, "have root's Linux read a file system that somebody may change", Kind.ROOTS, MADE,
    expect="refused", variants=("root",), needs=("mksquashfs",), without=mount_it,
    control="mounted",
)  # fmt: skip
def have_it_mounted(stage):
    return stage.tries(stage.workdir, "print('mounted')", rootfs=str(of_somebody(stage)))
