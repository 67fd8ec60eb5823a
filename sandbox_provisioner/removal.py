"""removal.py - any process outside: removes folders, whatever a kernel has put into them.

A folder is first moved away, whole and at once, to where nobody takes it for a sandbox's; what is
in it goes after that, as much at a time as whoever removes it can wait for::

    <sandbox id>                    set_aside
    <sandbox id>-<random>.trash     empty, perhaps again and again

Nothing here walks down a tree: a folder in a folder is moved up, beside the one that it lay in,
until all lie side by side. So nothing is too deep and no path too long, and three descriptors are
enough. Every name is a single one in a folder that is open: no symbolic link is ever followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_ASIDE = ".trash"
# So many files and folders are removed however long it takes: no usual kernel leaves more.
ALWAYS = 256
_SOME = 1 << 12
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_aside(name: str) -> bool:
    """Whether *name* in a runtime directory is that of a folder that was set aside."""
    return name.endswith(_ASIDE)


def set_aside(folder: Path) -> Path:
    """Move *folder* away from its name, and tell where to; OSError if it has gone, or stays."""
    # Its name may come again, with a restart, before all of it is removed.
    aside = folder.with_name(f"{folder.name}-{secrets.token_hex(4)}{_ASIDE}")
    return folder.rename(aside)


def empty(aside: Path, seconds: float = float("inf"), keep: str = "") -> bool:
    """Remove what was set aside, but of a great many no more than *seconds* allow; whether it is
    gone now. With a file to *keep* in it, whether all else is gone.

    False also where somebody else is about to. OSError for what cannot be removed, once everything
    else is.
    """
    fd = os.open(aside, os.O_RDONLY | _FOLDER)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    try:
        gone = _Emptying(fd, time.monotonic() + seconds, keep).run()
        if gone and not keep:
            aside.rmdir()
        return gone
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)  # a fork of somebody's may hold the same open file
        os.close(fd)


class _Emptying:
    """One go at the folder that is open as *fd*."""

    def __init__(self, fd: int, deadline: float, keep: str) -> None:
        self.fd = fd
        self.deadline = deadline
        self.keep = keep
        self.removed = 0
        self.problem: OSError | None = None
        # Names of our own: what an earlier go has moved up is still there.
        self.prefix = secrets.token_hex(8)
        self.moved = 0

    def run(self) -> bool:
        """Whether nothing is left; again and again, since a listing may miss what was moved up
        meanwhile, and whoever is still at work in there may take away, or rename, what was listed:
        a problem is what is still there at the next look."""
        last: list[str] = []
        while not self._is_enough():
            before, names, self.problem = self.removed, self._names(), None
            for name in names:
                with self._noted():
                    self._remove(name)
            if not names:
                return True
            # Without a problem the time has run out just now.
            if self.removed == before and names == last and self.problem:
                raise self.problem
            last = names
        return False

    def _is_enough(self) -> bool:
        return self.removed >= ALWAYS and time.monotonic() >= self.deadline

    def _names(self) -> list[str]:
        """Some of those side by side: there may be millions."""
        with os.scandir(self.fd) as entries:
            names = (entry.name for entry in entries if entry.name != self.keep)
            return [name for name, _ in zip(names, range(_SOME), strict=False)]

    def _remove(self, name: str) -> None:
        if self._is_enough():
            return
        try:
            found = os.open(name, os.O_PATH | _FOLDER, dir_fd=self.fd)
        except NotADirectoryError:
            os.unlink(name, dir_fd=self.fd)
            self.removed += 1
            return
        try:
            _open_up(found)
            folder = os.open(".", os.O_RDONLY | _FOLDER, dir_fd=found)
        finally:
            os.close(found)
        try:
            self._clear(folder)
        finally:
            os.close(folder)
        if not self._is_enough():
            os.rmdir(name, dir_fd=self.fd)
            self.removed += 1

    def _clear(self, folder: int) -> None:
        """Remove the files in *folder*, and move the folders in it up."""
        with os.scandir(folder) as entries:
            for entry in entries:
                if self._is_enough():
                    return
                with self._noted():
                    if entry.is_dir(follow_symlinks=False):
                        self._move_up(entry.name, folder)
                    else:
                        os.unlink(entry.name, dir_fd=folder)
                    self.removed += 1

    def _move_up(self, name: str, folder: int) -> None:
        self.moved += 1
        new = f"{self.prefix}-{self.moved}"
        try:
            os.rename(name, new, src_dir_fd=folder, dst_dir_fd=self.fd)
        except PermissionError:  # its entry ".." changes, which takes the right to write to it
            found = os.open(name, os.O_PATH | _FOLDER, dir_fd=folder)
            try:
                _open_up(found)
            finally:
                os.close(found)
            os.rename(name, new, src_dir_fd=folder, dst_dir_fd=self.fd)

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error


def _open_up(folder: int) -> None:
    """A kernel may have left *folder* so that not even its owner can look in. It is open as a path
    only; chmod(2) by that (fchmod(2) does not take one) changes it and nothing else."""
    if stat.S_IMODE(os.fstat(folder).st_mode) & 0o700 != 0o700:
        os.chmod(f"/proc/self/fd/{folder}", 0o700)
