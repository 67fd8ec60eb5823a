"""facilities/sockets/inside.py - runs in PID 1: the folder of the kernel's sockets is to be sealed.

May import: os, inside.kernel_calls, lookup.  May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import STRAIGHT

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


class Sockets:
    """The folder *fd*, whose *path* the kernel of user *uid* knows it by, the *names* that it binds
    there, and what tells of them."""

    def __init__(self) -> None:
        self.fd = self.events = self.uid = -1
        self.path = ""
        self.names: tuple[str, ...] = ()


def seal_after(box: Box, path: str, uid: str, *names: str) -> None:
    """Once the kernel of user *uid* listens on all sockets *names*, init makes *path* read-only."""
    sockets = box.part(Sockets)
    sockets.uid, sockets.names, sockets.path = int(uid), names, path
    if box.namespaces:
        flags = os.O_RDONLY | os.O_DIRECTORY
        sockets.fd = kernel.openat2(box.mounts.root_fd, path.lstrip("/"), flags, STRAIGHT)
    else:
        sockets.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


VERBS = (seal_after,)
