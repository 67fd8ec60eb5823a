"""ends_file.py - in the server: the file that the option ``ends_file`` names, a line for each end.

It is opened when a kernel starts, by a path without symbolic links, and not in a directory that the
kernel may write to: there a kernel could have put a link to another file of the server's, or could
write lines of its own.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.inside import kernel_calls

_RESOLVE = kernel_calls.RESOLVE_NO_SYMLINKS | kernel_calls.RESOLVE_NO_MAGICLINKS
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY


class EndsFile:
    """An open file to add lines to; more than one kernel, and more than one server, may have it."""

    def __init__(self, path: str, writable: Iterable[str]) -> None:
        """Open or make *path*; SpecError where that fails, or it lies in one of the *writable*
        directories of the kernel."""
        self._begin = ""
        if not os.path.isabs(path):
            raise _refused(path, "it is no absolute path")
        if _is_below(os.path.dirname(path), writable):
            raise _refused(path, "the kernel may write to its directory")
        try:
            self._fd = kernel_calls.openat2(kernel_calls.AT_FDCWD, path, _FLAGS, _RESOLVE, 0o600)
        except OSError as error:
            raise _refused(path, error.strerror or str(error)) from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise _refused(path, "it is no regular file")

    def add(self, end: Mapping[str, Any]) -> None:
        """One write(2), which O_APPEND keeps apart from those of others; OSError, also where there
        was room for a part only: then the next one begins a line of its own."""
        line = f"{self._begin}{json.dumps(end)}\n".encode()
        written = os.write(self._fd, line)
        self._begin = "" if written == len(line) else "\n"
        if self._begin:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """More than once is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_below(folder: str, directories: Iterable[str]) -> bool:
    """Whether *folder*, or a directory above it, is one of *directories*, by whatever name."""
    found = {(status.st_dev, status.st_ino) for path in directories if (status := _stat(path))}
    while True:
        status = _stat(folder)
        if status and (status.st_dev, status.st_ino) in found:
            return True
        if folder == (folder := os.path.dirname(folder)):
            return False


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _refused(path: str, answer: str) -> SpecError:
    return SpecError(
        attempt=f"write the ends of kernels to {path}, which ends_file names",
        answer=answer,
        remedy="Name a file by its real path, in a directory of the server's own, such as "
        "/var/log/kernel-ends.jsonl.",
    )
