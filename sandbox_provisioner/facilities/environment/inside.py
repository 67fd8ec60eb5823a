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
    """Directories in the private home, by the kernel itself: so they are its own. What an earlier
    kernel has left in their place, where that is kept, is this one's to deal with: it starts."""
    for path in paths:
        try:
            os.makedirs(path, exist_ok=True)
        except OSError:
            continue


def own_note(_box: Box, path: str, text: str) -> None:
    """A file there; what is kept there of an earlier kernel gives way. Where that one has left no
    room for it there is none."""
    try:
        if os.path.lexists(path):
            os.unlink(path)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except OSError:
        return
    try:
        os.write(fd, os.fsencode(text))
    except OSError:
        return
    finally:
        os.close(fd)


VERBS = (own_folders, own_note)
