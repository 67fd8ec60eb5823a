"""facilities/layer/inside.py - runs in PID 1: takes a part of what is kept.

May import: os, inside.kernel_calls.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


def take_base(box: Box, layer: str, base: str) -> None:
    """Take for *base* the folder "base" of what was taken for *layer*, and let go of the rest.

    open_tree(2) clones only what is mounted: so it is, for as long as that takes.
    """
    mount_fd = box.mounts.taken.pop(layer)
    box.mounts.put(mount_fd, layer)
    box.mounts.taken[base] = kernel.open_tree("base", dir_fd=mount_fd)
    os.close(mount_fd)
    name = layer.lstrip("/")
    kernel.detach(name)
    os.rmdir(name)


VERBS = (take_base,)
