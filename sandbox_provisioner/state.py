"""state.py - whoever launches or makes images, as root: the directory of what root keeps.

Users come through it, to root's images. What else lies there is closed itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path

STATE = Path("/var/lib/sandbox-provisioner")
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_THROUGH = 0o055


def make_state(path: Path = STATE) -> None:
    """Make it where it is missing, and open for all to read, whoever comes first; OSError, also
    where others than its owner may write to it."""
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o755, parents=True)
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & _BY_OTHERS:
        raise PermissionError(errno.EPERM, f"others than root can write to {path}")
    if status.st_mode & _THROUGH != _THROUGH:  # by a umask, or an earlier release
        path.chmod(stat.S_IMODE(status.st_mode) | _THROUGH)
