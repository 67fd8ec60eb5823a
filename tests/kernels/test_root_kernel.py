"""A kernel that is root in its box: it installs from a cell, and attacks the box as root."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import debian
import pip
import pytest
import roots
from attacks import chosen, target, wrong_answers
from test_pip import WHEEL, wheel

from sandbox_provisioner.facilities.ids.facts import FIRST_ID, INIT_ID

MANAGED = "[externally-managed]\nError=of the system\n"
FORCED = f"python3 -m pip install --no-index --force-reinstall ./{WHEEL}"
MAKE_ONE = "python3 -m venv --system-site-packages --without-pip /opt/v"
IN_ONE = f"/opt/v/bin/python -m pip install --no-compile --no-index --force-reinstall ./{WHEEL}"
WHERE = "import tiny_thing; print(tiny_thing.__file__)"

pytestmark = pytest.mark.requires("userns", "root")


@pytest.mark.requires("apt-get", "dpkg")
def test_what_a_cell_installs_is_there_after_a_restart(
    kernel: Any, new_folder: Callable[[], Path]
) -> None:
    folder = new_folder()
    folder.chmod(0o755)
    archive = debian.archive(folder)
    options = {
        "rootfs": str(debian.directory()),
        "kernel_user": "root",
        "layer": "kernel",
        "layer_dir": str(folder / "layers"),
        "volumes": [f"{archive}:{debian.ARCHIVE}"],
    }
    with kernel(**options) as k:
        # No -y: nobody is there to be asked.
        said = k.run("!apt-get -qq update && apt-get install greeter")
        assert "Setting up greeter" in said, said
        assert k.run("!greet && id -un greeter") == "hello\r\ngreeter\r\n"
        k.manager.restart_kernel()
        k.client.wait_for_ready(timeout=60)
        assert k.run("!greet && id -un greeter") == "hello\r\ngreeter\r\n"


def test_root_inside_installs_with_pip_into_the_system_and_into_environments(
    kernel: Any, new_folder: Callable[[], Path], workdir: Path
) -> None:
    root = roots.copy(f"pip-{os.getpid()}")
    try:
        program = Path(pip.__file__).parent
        shutil.copytree(program, root / f"usr/lib/{roots.LIBRARY}/site-packages/pip")
        # As Debian marks it (PEP 668).
        (root / f"usr/lib/{roots.LIBRARY}/EXTERNALLY-MANAGED").write_text(MANAGED)
        (workdir / WHEEL).write_bytes(wheel())
        options = {
            "rootfs": str(root), "kernel_user": "root", "layer": "kernel",
            "layer_dir": str(new_folder()),
        }  # fmt: skip
        with kernel(**options) as k:
            said = k.run(f"!python3 -m pip install --no-compile --no-index ./{WHEEL}")
            assert "Successfully installed tiny-thing" in said, said
            assert k.run(WHERE).startswith("/usr/")
            said = k.run(f"!unset PIP_BREAK_SYSTEM_PACKAGES; {FORCED}")
            assert "of the system" in said, said
            said = k.run(
                f"!python3 -m venv --system-site-packages --without-pip /opt/v && {IN_ONE}"
            )
            assert "Successfully installed tiny-thing" in said, said
            k.manager.restart_kernel()
            k.client.wait_for_ready(timeout=60)
            assert k.run(WHERE).startswith("/usr/")
            assert k.run("!/opt/v/bin/python -c 'import tiny_thing as t; print(t.__file__)'") == (
                f"/opt/v/lib/{roots.LIBRARY}/site-packages/tiny_thing.py\r\n"
            )
    finally:
        shutil.rmtree(root)


# What root inside may, of all that nobody gets away with in a kernel of an ordinary user.
_MADE_IN_ITS_LAYER = {30: "made", 31: "made", 33: "made", 36: "opened", 37: "done"}
_OF_ITS_OWN_IDS = {
    61: "done",
    100: "done",
    101: "done",
    103: "00000000000000eb",
    104: "00000000000000eb",
    # As its peer sees it, which is another process of the box.
    114: "sent",
    # What the namespace above shows it; that of the host is looked at below.
    133: "root's",
}
_OTHER_ERRORS = {32: "ENOENT", 34: "ETXTBSY", 35: "ETXTBSY", 59: "EACCES"}
_OTHER_USERS = {26: "mail,nobody,root"}
MAY = {**_MADE_IN_ITS_LAYER, **_OF_ITS_OWN_IDS, **_OTHER_ERRORS, **_OTHER_USERS}

# What only somebody who is root would try.
_AS_ROOT = """
import ctypes, errno, os, signal, socket, warnings
warnings.simplefilter("ignore")  # of forks beside threads, since Python 3.12
def outcome(act):
    try:
        return act()
    except OSError as error:
        return errno.errorcode[error.errno]
def signalled():
    # The id of init, as it shows here, and the last one below it.
    os.setresuid(65534, 65534, 65534)
    return os.kill(1, signal.SIGSTOP)
def in_child(act):
    ends = os.pipe()
    if not (pid := os.fork()):
        os.write(ends[1], str(outcome(act)).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    return os.read(ends[0], 100).decode()
def program():
    open("/usr/set-id", "w").close()
    os.chmod("/usr/set-id", 0o4755)
    return oct(os.stat("/usr/set-id").st_mode)
# struct vfs_ns_cap_data, version 2
raw_sockets = bytes((1, 0, 0, 2, 0, 32, *[0] * 14))
print({
    "a program with a set-id bit": program(),
    "stop init, as its neighbour": in_child(signalled),
    "kill init by its pidfd": outcome(lambda: signal.pidfd_send_signal(os.pidfd_open(1), 9)),
    "have the id of init": outcome(lambda: os.setresuid(65535, 65535, 65535)),
    "see where init stands": outcome(lambda: os.readlink("/proc/1/root")),
    "list what init has open": outcome(lambda: os.listdir("/proc/1/fd")),
    "write into init": outcome(lambda: open("/proc/1/mem", "wb")),
    "change a device of the host": outcome(lambda: os.chmod("/dev/null", 0o600)),
    "own a device of the host": outcome(lambda: os.chown("/dev/null", 0, 0)),
    "make a device": outcome(lambda: os.mknod("/usr/disk", 0o060600, os.makedev(8, 0))),
    "give capabilities to a file": outcome(
        lambda: os.setxattr("/usr/set-id", "security.capability", raw_sockets)),
    "mark a file for overlayfs": outcome(
        lambda: os.setxattr("/usr/set-id", "trusted.overlay.opaque", b"y")),
    "remove its sockets": outcome(lambda: os.unlink("/run/kernel/s-1")),
    "put something beside them": outcome(lambda: open("/run/kernel/x", "w")),
    "change a setting": outcome(lambda: open("/proc/sys/kernel/hostname", "w")),
    "bind a low port": outcome(lambda: socket.socket().bind(("127.0.0.1", 80))),
})
"""
_ANSWERS = {
    "a program with a set-id bit": "0o100755",
    "stop init, as its neighbour": "EPERM",
    "kill init by its pidfd": "EPERM",
    "have the id of init": "EINVAL",
    "see where init stands": "EACCES",
    "list what init has open": "EACCES",
    "write into init": "EACCES",
    "change a device of the host": "EPERM",
    "own a device of the host": "EPERM",
    "make a device": "EPERM",
    "give capabilities to a file": "EPERM",
    "mark a file for overlayfs": "EPERM",
    "remove its sockets": "EROFS",
    "put something beside them": "EROFS",
    "change a setting": "EROFS",
    "bind a low port": "EACCES",
}


@pytest.mark.timeout(300)
@pytest.mark.requires("setpriv")
def test_root_inside_gets_no_further_than_its_box(kernel: Any, workdir: Path) -> None:
    with kernel(rootfs=str(roots.directory()), kernel_user="root") as k:
        with target(workdir) as stage:
            facts = {"python": roots.PYTHON, "prefix": "/usr"}
            wrong = wrong_answers(stage, k.run, chosen(*MAY), **facts)
            allowed = [a for a in chosen() if a.number in MAY]
            may = wrong_answers(stage, k.run, allowed, **facts)
        assert wrong == {}
        assert {int(name.split()[0]): said.split(", not")[0] for name, said in may.items()} == MAY
        assert k.run(_AS_ROOT) == f"{_ANSWERS}\n"
        init = k.provisioner.handle.record.init_pid
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        first, ids = children[0], {}
        for pid in (first, str(init)):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            ids[pid] = next(int(line.split()[1]) for line in lines if line.startswith("Uid:"))
        # Root inside is the first id of a range, and init the last one.
        assert ids[first] >= FIRST_ID
        assert ids[str(init)] == ids[first] + INIT_ID
