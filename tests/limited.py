"""limited.py - in the test process, as root: what is asked of each limit by a project quota, that
of a box's folder and that of a work directory."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from writing import try_a_way

from sandbox_provisioner.facilities.storage import folders, quotas
from sandbox_provisioner.inside import kernel_calls

MIB = 1 << 20
SIZE = 16 * MIB
INODES = 512
# XFS does not count what tells where the pieces of a file are before they are on the disk: 16 bytes
# for each piece, which has a block at least.
MOST = SIZE * 1.005
_FULL = {errno.ENOSPC, errno.EDQUOT}  # XFS, ext4


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def held(folder: Path) -> quotas.Held | None:
    """What limit holds for a work directory."""
    with opened(folder, os.O_PATH) as fd:
        return quotas.look(fd, str(folder))


def project_of(path: Path) -> int:
    with opened(path) as fd:
        return kernel_calls.project_of(fd)[0]


def files_when_stopped(box: Any, way: Callable[..., None], place: str) -> int:
    """How many files there are where a limit has stopped the *way* to write to *place*, at the
    latest when it was reached."""
    number, used, files = box.call(try_a_way, way.__name__, SIZE, place, using=(way,))
    assert number in _FULL, way
    assert used <= MOST, way
    return int(files)


def sweep_folders() -> None:
    """What boxes have left, also where a thread of ours is still at it."""
    for thread in threading.enumerate():
        if thread.name == "sandbox-left":
            thread.join()
    folders.sweep()
