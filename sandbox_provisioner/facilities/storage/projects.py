"""projects.py - who launches, as the machine's root: numbers of projects, and what they promise.

XFS and ext4 count what belongs to a *project*, a number that each file has. Limited work
directories (`quotas.py`) and folders of boxes (`folders.py`) have numbers of their own, each from
one range: one that has a limit, or any file, on that file system is somebody's.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner import removal
from sandbox_provisioner.inside import kernel_calls as kernel

# What administrators choose are small numbers, or those of users.
OF_WORKDIRS = range(0x5A00_0000, 0x5A10_0000)
OF_BOXES = range(0x5A10_0000, 0x5A20_0000)
# Where folders of boxes are, among the images.
FOLDERS = "folders"
_OF_ADMINISTRATOR = ("/etc/projects", "/etc/projid")
_TRIES = 1 << 12
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def free_project(top: int, among: range) -> int:
    """One that nobody has on the file system of *top*. The search begins where two directories
    seldom meet."""
    taken, first = _of_administrator(), os.fstat(top).st_ino
    for step in range(_TRIES):
        project = among[(first + step) % len(among)]
        if project not in taken and kernel.next_project(top, project) != project:
            return project
    raise OSError(errno.ENOSPC, f"{_TRIES} projects from {project - _TRIES} on are in use")


def _of_administrator() -> set[int]:
    """projid(5), projects(5): NAME:NUMBER and NUMBER:PATH."""
    found: set[int] = set()
    for path in _OF_ADMINISTRATOR:
        with contextlib.suppress(FileNotFoundError):
            words = Path(path).read_text(errors="replace").replace("\n", ":").split(":")
            found |= {int(word) for word in words if word.isascii() and word.isdecimal()}
    return found


def opened_box(folder: Path) -> int:
    """A descriptor of what the box of *folder* is given; OSError."""
    return os.open(folder / "box", _DIRECTORY)


def is_something_left(storage: Path) -> bool:
    """Whether not all is removed of what ended boxes left below *storage*."""
    with contextlib.suppress(OSError):
        return any(removal.is_aside(name) for name in os.listdir(storage / FOLDERS))
    return False


def promised(storage: Path, device: int) -> tuple[int, int]:
    """How many bytes and inodes all boxes may still take in their folders below *storage*, as far
    as these are on the file system *device*."""
    found = [*_still_free(storage / FOLDERS, device)]
    return sum(size for size, _ in found), sum(inodes for _, inodes in found)


def _still_free(folders: Path, device: int) -> Iterator[tuple[int, int]]:
    try:
        names = os.listdir(folders)
    except OSError:  # there are none, or it is an ordinary user who asks
        return
    for name in names:
        with contextlib.suppress(OSError):  # it goes meanwhile, or its limit does
            top = opened_box(folders / name)
            try:
                project, _ = kernel.project_of(top)
                if os.fstat(top).st_dev == device and project in OF_BOXES:
                    size, inodes, used, used_inodes = kernel.project_quota(top, project)
                    yield max(0, size - used), max(0, inodes - used_inodes)
            finally:
                os.close(top)
