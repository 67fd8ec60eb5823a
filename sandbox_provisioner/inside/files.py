"""inside/files.py - runs in the launcher: files of /proc and of cgroups that Linux is told by.

May import: os, kernel_calls.
"""

from __future__ import annotations

import os

from sandbox_provisioner.inside import kernel_calls as kernel


def write(path: str, text: str) -> None:
    """Write *text* in one go; CallFailed names both."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    except OSError as error:
        raise kernel.CallFailed("write", error.errno or 0, file=path, text=text) from None
    finally:
        os.close(fd)
