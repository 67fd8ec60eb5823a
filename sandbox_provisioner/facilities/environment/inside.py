"""facilities/environment/inside.py - runs in the kernel, before its program: what it may change.

May import: os.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


def own_folders(_box: Box, *paths: str) -> None:
    """Directories in the private home, by the kernel itself: so they are its own."""
    for path in paths:
        os.makedirs(path, exist_ok=True)


def own_note(_box: Box, path: str, text: str) -> None:
    """A file there."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    os.write(fd, os.fsencode(text))
    os.close(fd)


VERBS = (own_folders, own_note)
