"""broker/sockets.py - the daemon: a kernel's sockets become those of the user who asked for it.

Whoever connects to a socket needs to write to its file (unix(7)), and the kernel, whose ids nobody
else has, made it. It listens, and init has made the folder read-only inside: nothing can be put in
the place of what is seen here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

from sandbox_provisioner.meeting import PORTS
from sandbox_provisioner.plan import SOCKET_NAMES

_IOPUB = SOCKET_NAMES[PORTS.index("iopub_port")]
_BACKLOG = 100  # as libzmq has it


def hand_over(folder: Path, uid: int, gid: int) -> None:
    """Let the user *uid* connect to the sockets in *folder*, and nobody else; OSError for what is
    none. Its path, and that of the folder around it, may be walked by all and listed by none: the
    name of a sandbox is known to its server alone, and is no secret that counts."""
    with ExitStack() as opened:
        around, inside, _ = _given_to(uid, gid, 0o600, folder, opened)
        for fd in (inside, around):
            os.chown(f"/proc/self/fd/{fd}", 0, 0)
            os.chmod(f"/proc/self/fd/{fd}", 0o711)


def link_into(folder: Path, shown: Path) -> None:
    """The same for everybody who sees *shown*, which is made, on the same file system, and nothing
    of *folder*: a socket is found by whatever name (unix(7)). Whose it is there depends on whether
    Linux maps the ids of that mount, so it is root's, and its modes let them."""
    with ExitStack() as opened:
        _, _, sockets = _given_to(0, 0, 0o666, folder, opened)
        shown.mkdir(mode=0o755, parents=True, exist_ok=True)
        there = _opened(str(shown), os.O_DIRECTORY, -1, opened)
        for name, fd in zip(SOCKET_NAMES, sockets, strict=True):
            with contextlib.suppress(FileNotFoundError):  # of a try that did not come to its end
                os.unlink(name, dir_fd=there)
            # With a descriptor Python calls linkat(2), which follows it, and not link(2).
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=there)
        for place in (shown, shown.parent):
            place.chmod(0o755)  # whatever our umask


def listen_in_place(folder: Path, uid: int, gid: int, mode: int) -> int:
    """A listening socket of the user's, in *folder*, under the name by which the kernel that has
    ended published; OSError."""
    with ExitStack() as opened, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        there = _opened(str(folder), os.O_DIRECTORY, -1, opened)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_IOPUB, dir_fd=there)
        path = f"/proc/self/fd/{there}/{_IOPUB}"
        made.bind(path)
        os.chmod(path, mode)
        os.chown(path, uid, gid)
        made.listen(_BACKLOG)
        return made.detach()


def _given_to(
    uid: int, gid: int, mode: int, folder: Path, opened: ExitStack
) -> tuple[int, int, list[int]]:
    """Make its sockets the user's, with *mode*; descriptors of the folder around it, of itself, and
    of them."""
    around = _opened(str(folder.parent), os.O_DIRECTORY, -1, opened)
    inside = _opened(folder.name, os.O_DIRECTORY, around, opened)
    sockets = [_opened(name, 0, inside, opened) for name in SOCKET_NAMES]
    for name, fd in zip(SOCKET_NAMES, sockets, strict=True):
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise OSError(f"{folder / name} is no socket")
        os.chmod(f"/proc/self/fd/{fd}", mode)
        os.chown(f"/proc/self/fd/{fd}", uid, gid)
    return around, inside, sockets


def _opened(name: str, kind: int, directory: int, opened: ExitStack) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind
    fd = os.open(name, flags, dir_fd=None if directory < 0 else directory)
    opened.callback(os.close, fd)
    return fd
