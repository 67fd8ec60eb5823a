"""inside/lookup.py - runs in the launcher: finds places below a descriptor, and never past a link.

May import: os, kernel_calls. What an earlier kernel left in a work directory cannot lead a mount
elsewhere.
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel

STRAIGHT = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_LOOK = os.O_PATH | os.O_NOFOLLOW


def look(parent: int, name: str) -> int:
    """An O_PATH descriptor of *name* in *parent*, a link itself if it is one; -1 if not there."""
    return kernel.openat2_if_there(parent, name, _LOOK, STRAIGHT)


def rebind(fd: int, attributes: int, path: str = "") -> None:
    """Bind the tree at *fd*, which is that at *path*, onto itself with *attributes* added."""
    clone = kernel.open_tree("", dir_fd=fd)
    kernel.mount_setattr(clone, add=attributes, propagation=kernel.MS_PRIVATE)
    kernel.move_mount(clone, fd, source=path, target=path)
    os.close(clone)
