"""broker/sockets.py - the daemon: a kernel's sockets become those of the user who asked for it.

Whoever connects to a socket needs to write to its file (unix(7)), and the kernel, whose ids nobody
else has, made it. It listens, and init has made the folder read-only inside: nothing can be put in
the place of what is seen here.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack
from pathlib import Path

from sandbox_provisioner.plan import SOCKET_NAMES


def hand_over(folder: Path, uid: int, gid: int) -> None:
    """Let the user *uid* connect to the sockets in *folder*, and nobody else; OSError for what is
    none. Its path, and that of the folder around it, may be walked by all and listed by none: the
    name of a sandbox is known to its server alone, and is no secret that counts."""
    with ExitStack() as opened:
        around = _opened(str(folder.parent), os.O_DIRECTORY, -1, opened)
        inside = _opened(folder.name, os.O_DIRECTORY, around, opened)
        for name in SOCKET_NAMES:
            fd = _opened(name, 0, inside, opened)
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise OSError(f"{folder / name} is no socket")
            os.chmod(f"/proc/self/fd/{fd}", 0o600)
            os.chown(f"/proc/self/fd/{fd}", uid, gid)
        for fd in (inside, around):
            os.chown(f"/proc/self/fd/{fd}", 0, 0)
            os.chmod(f"/proc/self/fd/{fd}", 0o711)


def _opened(name: str, kind: int, directory: int, opened: ExitStack) -> int:
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | kind
    fd = os.open(name, flags, dir_fd=None if directory < 0 else directory)
    opened.callback(os.close, fd)
    return fd
