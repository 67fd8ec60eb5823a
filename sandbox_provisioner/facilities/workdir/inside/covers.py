"""covers.py - runs in PID 1: takes parts of the work directory away.

May import: errno, os, select, stat, inside.kernel_calls, lookup.  What is to be covered is decided
outside (`facts/covers.py`); that it stays so `watch.py` sees to.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import STRAIGHT, look, rebind

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIRECTORY, FILE, LINK, SOCKET, FROZEN = "directory", "file", "link", "socket", "frozen"
_STAND_INS = ".scratch/stand-ins"
_FROZEN = kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV
# How long an editor may take between renaming the old file and writing the new one.
_REPLACED_MS = 50
_MOST_MAPS_BYTES = 1 << 22


class Covers:
    """The covers of the work directory *workdir*, whose owner is *uid* and *gid* inside.

    *made* is told of each mount point that did not exist: its kind, and its path.
    """

    def __init__(
        self, root_fd: int, workdir: str, uid: int, gid: int, made: Callable[[str, str], None]
    ) -> None:
        self.root_fd = root_fd
        self.workdir = workdir
        self.owner = uid, gid
        self.made = made
        self.written_through = ""
        # Made here, where it still can stop a start: Linux gives a user so many.
        self.events = kernel.new_inotify()
        # Each place's kind; and what stands there, as (device, inode), None where nothing may.
        self.kinds: dict[str, str] = {}
        self._expected: dict[str, tuple[int, int] | None] = {}
        self._number = 0

    def as_owner(self, acts: list[tuple[Callable[..., None], *tuple[str, ...]]]) -> None:
        """Call each with its words; what is made belongs to the owner of the work directory."""
        kernel.set_filesystem_ids(*self.owner)
        try:
            self.each(acts)
        finally:
            kernel.set_filesystem_ids(os.geteuid(), os.getegid())

    def each(self, acts: list[tuple[Callable[..., None], *tuple[str, ...]]]) -> None:
        """Call each with its words; an error names them: of many places somebody has to know the
        one that failed."""
        for act, *words in acts:
            try:
                act(*words)
            except OSError as error:
                text = f"{act.__name__} {' '.join(words)}: {error.strerror}"
                raise OSError(error.errno or 0, text) from error

    def cover(self, kind: str, path: str) -> None:
        """Put an empty stand-in over *path*, relative to the work directory.

        What does not exist is made first: a kernel could otherwise make it. Directories on the way
        are bound onto themselves, since a mount point cannot be renamed away, but its parent could.
        """
        self.kinds[path] = kind
        # What we expected before stays, should something fail in here: it is bare then.
        self._expected.setdefault(path, None)
        parent = self._pin(os.path.dirname(path), create=True)
        if parent < 0:
            self._expected[path] = None
            return
        name = os.path.basename(path)
        try:
            found = look(parent, name)
            if found < 0 and self._make(parent, path, kind, ""):
                found = look(parent, name)
            self._expected[path] = self._hide(found) if found >= 0 else None
        finally:
            os.close(parent)

    def protect(self, path: str) -> None:
        """Make what exists at *path* read-only, and pin the way to it."""
        self.kinds[path] = FROZEN
        self._expected.setdefault(path, None)
        parent = self._pin(os.path.dirname(path))
        found = look(parent, os.path.basename(path)) if parent >= 0 else -1
        if found < 0:
            self._expected[path] = None
        else:
            status = os.fstat(found)
            rebind(found, _FROZEN)
            self._expected[path] = status.st_dev, status.st_ino
            os.close(found)
        if parent >= 0:
            os.close(parent)

    def place(self, path: str, text: str) -> None:
        """Make the file *path* with *text* where nothing is yet, for `protect`."""
        parent = self._pin(os.path.dirname(path))
        if parent < 0:
            return
        found = look(parent, os.path.basename(path))
        if found < 0:
            self._make(parent, path, FILE, text)
        else:
            os.close(found)
        os.close(parent)

    def attached(self, target: str, status: os.stat_result) -> None:
        """Something else than a stand-in stands at *target* of the root from here on: a part of the
        kernel's environment, at a place that is covered."""
        path = target.removeprefix(f"{self.workdir.rstrip('/')}/")
        if path in self.kinds:
            self._expected[path] = status.st_dev, status.st_ino

    def make_folder(self, path: str) -> None:
        """Make the directory *path* with those above it, but nothing beyond a link or a file."""
        fd = self._work_directory()
        walked = ""
        for name in path.split("/"):
            walked = os.path.join(walked, name)
            below = look(fd, name)
            if below < 0 and self._make(fd, walked, DIRECTORY, ""):
                below = look(fd, name)
            os.close(fd)
            if below < 0:
                return
            fd = below
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                break
        os.close(fd)

    def _work_directory(self) -> int:
        how = os.O_PATH | os.O_DIRECTORY
        return kernel.openat2(self.root_fd, self.workdir.lstrip("/"), how, STRAIGHT)

    def _hide(self, found: int) -> tuple[int, int]:
        """Mount an empty stand-in over *found*, which is closed; over a symbolic link a file, which
        hides the link. Returns what stands there now."""
        is_directory = stat.S_ISDIR(os.fstat(found).st_mode)
        stand_in = self._stand_in(is_directory=is_directory)
        try:
            status = os.fstat(stand_in)
            kernel.move_mount(stand_in, found)
        finally:
            os.close(stand_in)
            os.close(found)
        return status.st_dev, status.st_ino

    def _stand_in(self, *, is_directory: bool) -> int:
        """A detached mount of something empty. When the root is closed there is no place left for
        files of its own: then it is /dev/null."""
        if not os.path.isdir(_STAND_INS):
            if not is_directory:
                return kernel.open_tree("/dev/null")
            uid, gid = self.owner
            options: dict[str, str | None] = {
                "mode": "0700", "uid": str(uid), "gid": str(gid), "size": "1m", "nr_inodes": "256",
            }  # fmt: skip
            return kernel.new_mount("tmpfs", options, kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV)
        path = f"{_STAND_INS}/{self._number}"
        self._number += 1
        if is_directory:
            os.mkdir(path, 0o700)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return kernel.open_tree(path)

    def _make(self, parent: int, path: str, kind: str, text: str) -> bool:
        """Make the missing *path*; False where nobody can, since the file system is read-only."""
        name = os.path.basename(path)
        try:
            if kind == DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=parent)
            elif kind == LINK:
                os.symlink(f"{self.written_through}/{name}", name, dir_fd=parent)
            elif kind == SOCKET:
                os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=parent)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=parent)
                os.write(fd, os.fsencode(text))
                os.close(fd)
        except FileExistsError:
            return True  # another kernel in the same work directory was quicker
        except OSError as error:
            if error.errno == errno.EROFS:
                return False
            raise
        self.made(kind, os.path.join(self.workdir, path))
        return True

    def _pin(self, path: str, *, create: bool = False) -> int:
        """A descriptor of the directory *path*, every part of it a mount point.

        -1 where there is none: it does not exist (and may not be made), or is no directory. A
        symbolic link on the way is hidden, since the kernel could replace it by a directory of its
        own.
        """
        fd = self._work_directory()
        walked = ""
        for name in filter(None, path.split("/")):
            walked = os.path.join(walked, name)
            found = look(fd, name)
            if found < 0 and create and self._make(fd, walked, DIRECTORY, ""):
                found = look(fd, name)
            if found >= 0 and not stat.S_ISDIR(os.fstat(found).st_mode):
                if stat.S_ISLNK(os.fstat(found).st_mode):
                    self._hide(found)
                found = -1
            if found >= 0 and not kernel.is_mount_point(fd, name):
                rebind(found, 0)
                os.close(found)
                found = look(fd, name)
            os.close(fd)
            if found < 0:
                return -1
            fd = found
        return fd

    # -- while the kernel runs

    def bare(self) -> list[str]:
        """The places where something else stands than we have put there; two calls a place."""
        return [path for path, kind in self.kinds.items() if not self._holds(path, kind)]

    def _holds(self, path: str, kind: str) -> bool:
        there = os.path.join(self.workdir, path)
        expected = self._expected[path]
        try:
            status = os.lstat(there)
        except OSError:
            # What could be made at the start and is gone would be the kernel's to make.
            return expected is None
        if expected != (status.st_dev, status.st_ino):
            return False
        if kind != FROZEN or stat.S_ISLNK(status.st_mode):
            return True
        return bool(os.statvfs(there).f_flag & os.ST_RDONLY)

    def folders(self) -> Iterator[str]:
        """Every directory with a place in it, or on the way to one, relative to the work directory,
        which is ""."""
        found = {""}
        for path in self.kinds:
            while path := os.path.dirname(path):
                found.add(path)
        yield from sorted(found)

    def held(self, paths: list[str]) -> list[str]:
        """Those of *paths* that a process has got hold of, which nothing can mend."""
        for path in paths:
            self._await(os.path.join(self.workdir, path))
        return [path for path in paths if self._is_held(path)]

    def mend(self, paths: list[str]) -> None:
        """Cover *paths* anew, while everybody but us is stopped."""
        for path in paths:
            if self.kinds[path] == FROZEN and self._is_there(path):
                self.protect(path)
            elif self.kinds[path] != FROZEN or self._is_there(os.path.dirname(path)):
                self.cover(FILE if self.kinds[path] == FROZEN else self.kinds[path], path)
            else:
                self._expected[path] = None  # its directory has gone, too

    def _is_there(self, path: str) -> bool:
        return os.path.lexists(os.path.join(self.workdir, path))

    def _await(self, path: str) -> None:
        """Wait a moment for something to be at *path*: who saves a file may have renamed the old
        one just now, and be about to make the new one. Who looks for a stand-in of ours then finds
        one, and cannot make it with O_EXCL."""
        for _ in range(_REPLACED_MS):
            if os.path.lexists(path) or not os.path.lexists(os.path.dirname(path)):
                return
            select.select([], [], [], 0.001)

    def _is_held(self, path: str) -> bool:
        """Whether a process has what stands at *path* now, or a part of it, open, mapped or linked;
        also where one cannot be looked at."""
        there = os.path.join(self.workdir, path)
        try:
            status = os.lstat(there)
        except OSError:
            return False
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            return True
        numbers = (name for name in os.listdir("/proc") if name.isdecimal() and name != "1")
        return any(_has_open(number, there, status) for number in numbers)


def _has_open(process: str, path: str, status: os.stat_result) -> bool:
    folder = f"/proc/{process}"
    try:
        names = [f"{folder}/fd/{name}" for name in os.listdir(f"{folder}/fd")]
        for link in (*names, f"{folder}/cwd", f"{folder}/root"):
            if _leads_to(link, path, status):
                return True
        with open(f"{folder}/maps", "rb", buffering=0) as maps:
            return os.fsencode(path) in maps.read(_MOST_MAPS_BYTES)
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    except OSError:
        return True


def _leads_to(link: str, path: str, status: os.stat_result) -> bool:
    try:
        found = os.stat(link)
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            return True
        below = os.readlink(link).startswith(f"{path}/")
        return below and found.st_dev == status.st_dev
    except FileNotFoundError:
        return False
