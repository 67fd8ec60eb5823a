"""root_files.py - any process outside; reads only: what is in a root file system of somebody's.

Whoever made it may have put anything there: links that lead out, devices, files of any size. It is
looked at from a descriptor of its topmost directory, which its links take for "/", as they do for a
kernel that lives there; nothing leads out of it, what is no regular file is not opened, and what is
read is bounded. Nothing is run.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from itertools import islice

from sandbox_provisioner.inside import kernel_calls

_LONGEST_TEXT = 1 << 18
_MOST_NAMES = 20_000
_MOST_LINKS = 40  # path_resolution(7)
_STAYS = (
    kernel_calls.RESOLVE_IN_ROOT | kernel_calls.RESOLVE_NO_MAGICLINKS | kernel_calls.RESOLVE_NO_XDEV
)


@dataclass(frozen=True, slots=True)
class RootFiles:
    """The files below *fd*, by paths as they are inside."""

    fd: int

    def _open(self, path: str, flags: int) -> int:
        if not flags & os.O_PATH:  # to open what is no file may wait, or act on something
            flags |= os.O_NONBLOCK | os.O_NOCTTY
        return kernel_calls.openat2(self.fd, path.lstrip("/") or ".", flags, _STAYS)

    def status(self, path: str) -> os.stat_result | None:
        """What is at *path*, behind links; None for nothing."""
        try:
            fd = self._open(path, os.O_PATH)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def kind_at(self, path: str) -> int:
        """The same as a type of file (inode(7)); 0 for nothing."""
        found = self.status(path)
        return stat.S_IFMT(found.st_mode) if found else 0

    def is_program(self, path: str) -> bool:
        """Whether everybody may execute it."""
        found = self.status(path)
        return bool(found and stat.S_ISREG(found.st_mode) and found.st_mode & 0o001)

    def read(self, path: str, most_bytes: int) -> bytes:
        """The first bytes of the file *path*, b"" where it is none, or is closed to us."""
        if self.kind_at(path) != stat.S_IFREG:
            return b""
        try:
            fd = self._open(path, os.O_RDONLY)
        except OSError:
            return b""
        try:
            return os.read(fd, most_bytes) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        except OSError:  # of a damaged image
            return b""
        finally:
            os.close(fd)

    def text(self, path: str) -> str:
        """The file *path*, "" if it is none, or longer than any that we look at."""
        found = self.read(path, _LONGEST_TEXT)
        return "" if len(found) == _LONGEST_TEXT else found.decode(errors="replace")

    def names(self, path: str) -> list[str]:
        """What is in the directory *path*, in order, the first of many; none if it is none."""
        try:
            fd = self._open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return []
        try:
            with os.scandir(fd) as entries:
                return sorted(entry.name for entry in islice(entries, _MOST_NAMES))
        except OSError:
            return []
        finally:
            os.close(fd)

    def real_path(self, path: str) -> str:
        """Where *path* leads inside, "" if nowhere: each of its links taken apart, as a kernel of
        that root would (path_resolution(7))."""
        left, here, links = _names(path), "", 0
        while left:
            name = left.pop()
            if name == "..":
                here = os.path.dirname(here).rstrip("/")
                continue
            text = self._link(f"{here}/{name}")
            if text is None:
                here = f"{here}/{name}"
                continue
            links += 1
            if links > _MOST_LINKS:
                return ""
            here = "" if text.startswith("/") else here
            left += _names(text)
        return here if self.status(here) else ""

    def _link(self, path: str) -> str | None:
        """The text of the link *path*, whose folder is no link; None if it is none."""
        flags = os.O_PATH | os.O_NOFOLLOW
        try:
            fd = self._open(path, flags)
        except OSError:
            return None
        try:
            is_link = stat.S_ISLNK(os.fstat(fd).st_mode)
            return os.readlink("", dir_fd=fd) if is_link else None
        finally:
            os.close(fd)


def _names(path: str) -> list[str]:
    """The names in *path*, the last one first."""
    return [name for name in path.split("/") if name not in {"", "."}][::-1]
