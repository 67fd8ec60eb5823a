"""layers/changes.py - any process outside; reads only: what a kernel has changed in its work
directory.

An overlay keeps in its upper directory what was written (overlayfs.rst): a file whole, a directory
with what is new in it; what was removed as a character device 0:0, a *whiteout*; and a directory
that has taken the place of another one with the attribute *opaque*. Directories are walked without
recursion, by descriptors below the two that were opened, never through a link or a mount.

The kernel wrote all of it. What tells of somebody else's changes meanwhile is the time of change of
the real files (inode(7)), which nobody can set.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import IO, Any

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.layers.guard import UNFINISHED, Guard, is_repository

MOST_ENTRIES = 1 << 20
# Of the paths of all of them: each of those that wait to be looked at is kept whole.
MOST_PATH_BYTES = 1 << 28
MOST_DEPTH = 128
_MOST_PATH = 4000
# With more in it, nobody looks at all of a directory that the kernel has removed.
_MOST_REMOVED = 1 << 16
_STRAIGHT = (
    kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
    | kernel.RESOLVE_NO_XDEV
)  # fmt: skip
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_FILE = os.O_RDONLY | os.O_NONBLOCK
_CHUNK_BYTES = 1 << 20
_MOST_IN_MEMORY_BYTES = 1 << 24
_MOST_COMPARED_BYTES = 1 << 30
OPAQUE, _WHITEOUT = "user.overlay.opaque", "user.overlay.whiteout"
_TIMES = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns")
_SET_ID = stat.S_ISUID | stat.S_ISGID
_KINDS = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link", stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
}  # fmt: skip
_KEPT_KINDS = {"file", "directory", "link"}


class What(StrEnum):
    """What has become of a path."""

    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    MODE = "mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One. *kind* is that of what stands there by the kernel's will, or stood there, if that is
    removed; *mode* what it has to have, *size_bytes* and *text* of a file and of a link. *refusal*
    is why it is never kept, *conflict* what somebody else did there meanwhile, *note* what of it is
    not kept. *new* and *old* tell the very files; *hides* is whether the kernel has replaced a
    directory around it, so that what is not in the upper one counts as removed."""

    path: str
    what: What
    kind: str
    mode: int = 0
    old_mode: int = 0
    size_bytes: int = 0
    text: str = ""
    refusal: str = ""
    conflict: str = ""
    note: str = ""
    new: os.stat_result | None = field(default=None, repr=False)
    old: os.stat_result | None = field(default=None, repr=False)
    hides: bool = field(default=False, repr=False)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A directory of the upper one that has to be looked at: whether the real one has it too, and
    whether it has taken that one's place as a whole; *hides* is whether it or one around it has.
    *refusal* is why nothing in it is ever kept."""

    path: str
    is_real: bool
    opaque: bool
    in_bare: tuple[str, ...] = ()
    hides: bool = False
    refusal: str = ""


class Walk:
    """Compares *upper* with *real*, two descriptors of directories; *since_ns* is when the kernel
    began, 0 where nobody knows. Who has no more than some *seconds* for it gets HostError after
    that."""

    def __init__(
        self, upper: int, real: int, since_ns: int, guard: Guard, seconds: float = float("inf")
    ) -> None:
        self.upper = upper
        self.real = real
        self.since_ns = since_ns
        self.guard = guard
        self._left, self._left_bytes = MOST_ENTRIES, MOST_PATH_BYTES
        self._until = time.monotonic() + seconds
        # Real paths that a `keep` has left which was stopped in the middle.
        self.unfinished: list[str] = []
        # Directories that may be there for stand-ins alone.
        self._held: dict[str, Change] = {}

    def changes(self) -> Iterator[Change]:
        """All of them, a directory before what is in it; HostError for too many, OSError."""
        yield from self._of_mode("", os.fstat(self.upper), os.fstat(self.real))
        waiting = [_Folder("", is_real=True, opaque=False)]
        while waiting:
            folder = waiting.pop()
            try:
                pair = _Pair(self, folder)
            except OSError as error:
                yield _unseen(folder.path, error.strerror or str(error))
                continue
            with closing(pair):
                below: list[_Folder] = []
                for change in pair.changes(below):
                    yield from self._with_held(change)
                waiting += reversed(below)

    def count(self, path: str) -> None:
        """One more, *path*. HostError where there are more than anybody looks at, or the time is
        over."""
        self.hurry()
        self._left -= 1
        self._left_bytes -= len(os.fsencode(path))
        many = f"more than {MOST_ENTRIES} files" if self._left < 0 else ""
        if not many and self._left_bytes < 0:
            many = f"files whose paths come to more than {MOST_PATH_BYTES >> 20} MiB"
        if many:
            raise HostError(
                attempt="look at what the kernel has changed",
                answer=f"it has left {many}",
                remedy="Discard all of it, or look at parts of it in the upper directory by hand.",
            )

    def hurry(self) -> None:
        """HostError where the time is over."""
        if time.monotonic() > self._until:
            raise HostError(
                attempt="look at what the kernel has changed",
                answer="there is more of it than there is time for now",
                remedy="Look at it with jupyter sandbox diff.",
            )

    def _with_held(self, change: Change) -> Iterator[Change]:
        """*change*, after the new directories around it; one that has only closed places in it is
        a stand-in's, and told with the first other thing that is in it."""
        is_new = change.kind == "directory" and change.what is What.ADDED
        if is_new and not change.refusal and self.guard.is_around(change.path):
            self._held[change.path] = change
            return
        if self._held:
            path = change.path
            above = [path[:end] for end, letter in enumerate(path) if letter == "/"]
            yield from filter(None, [self._held.pop(one, None) for one in above])
        yield change

    def _of_mode(
        self, path: str, new: os.stat_result, old: os.stat_result, pair: _Pair | None = None
    ) -> Iterator[Change]:
        mode, note = kept_mode(new, old)
        if mode != stat.S_IMODE(old.st_mode):
            yield Change(
                path=path, what=What.MODE, kind=_kind(new), mode=mode,
                old_mode=stat.S_IMODE(old.st_mode), note=note, new=new, old=old,
                refusal=self.guard.refusal(path, is_directory=_is_dir(new), in_bare=pair.in_bare)
                if pair else "",
                conflict="" if _is_dir(old) else self._conflict(old),
                hides=pair.folder.hides if pair else False,
            )  # fmt: skip

    def _conflict(self, old: os.stat_result) -> str:
        if not self.since_ns:
            return "whether somebody else has changed it cannot be told"
        return "somebody else has changed it" if old.st_ctime_ns > self.since_ns else ""


class _Pair:
    """A directory of the upper one, and the real one at the same path, if there is one."""

    def __init__(self, walk: Walk, folder: _Folder) -> None:
        self.walk, self.guard, self.folder = walk, walk.guard, folder
        self.upper = _open(walk.upper, folder.path, _FOLDER)
        self.real = -1
        try:
            if folder.is_real:
                self.real = _open(walk.real, folder.path, _FOLDER)
            self.names = _listed(self.upper, lambda name: walk.count(self._path(name)))
            # A person's own directory may have any number of files.
            self.real_names = frozenset(
                _listed(self.real, lambda _: walk.hurry()) if self.real >= 0 else ()
            )
        except BaseException:
            self.close()
            raise
        left = (name for name in self.real_names if name.startswith(UNFINISHED))
        walk.unfinished += map(self._path, sorted(left))
        self.is_bare = is_repository({*self.names, *self.real_names})
        self.in_bare = (*folder.in_bare, folder.path) if self.is_bare else folder.in_bare

    def close(self) -> None:
        for fd in (self.upper, self.real):
            if fd >= 0:
                os.close(fd)

    def changes(self, below: list[_Folder]) -> Iterator[Change]:
        """Those of this directory; *below* gets the directories in it that are to be looked at."""
        for name in self.names:
            self.walk.hurry()
            yield from self._seen(name, self._of_name(name, below))
        if self.folder.opaque:
            for name in sorted(self.real_names.difference(self.names)):
                if not name.startswith(UNFINISHED):
                    yield from self._seen(name, self._hidden(name))

    def _seen(self, name: str, changes: Iterator[Change]) -> Iterator[Change]:
        """*changes* of *name*, which may have gone meanwhile, or which nobody may look at."""
        try:
            yield from changes
        except FileNotFoundError:
            return
        except OSError as error:
            yield _unseen(self._path(name), error.strerror or str(error))

    def _hidden(self, name: str) -> Iterator[Change]:
        yield self._removed(name, _look(self.real, name))

    def _of_name(self, name: str, below: list[_Folder]) -> Iterator[Change]:
        new = _look(self.upper, name)
        old = _look(self.real, name) if name in self.real_names else None
        path = self._path(name)
        if self._is_whiteout(name, new):
            if old:
                yield self._removed(name, old, new)
            return
        if self.guard.is_closed(path) and self._is_stand_in(name, new):
            return
        if old and _is_dir(old) != _is_dir(new):
            yield self._removed(name, old)
            old = None
        if _is_dir(new):
            yield from self._of_directory(name, new, old, below)
        else:
            yield from self._of_file(name, new, old)

    def _of_directory(
        self, name: str, new: os.stat_result, old: os.stat_result | None, below: list[_Folder]
    ) -> Iterator[Change]:
        path = self._path(name)
        if old:
            yield from self.walk._of_mode(path, new, old, self)
        else:
            yield self._added(name, new, None)
        if path.count("/") + 1 >= MOST_DEPTH or len(os.fsencode(path)) > _MOST_PATH:
            yield _unseen(path, f"it lies deeper than {MOST_DEPTH} directories")
            return
        opaque = self.folder.opaque or self._has(name, OPAQUE)
        opaque = opaque and old is not None
        hides = opaque or self.folder.hides
        refusal = self._refusal_of_place(name)
        below.append(_Folder(path, old is not None, opaque, self.in_bare, hides, refusal))

    def _of_file(
        self, name: str, new: os.stat_result, old: os.stat_result | None
    ) -> Iterator[Change]:
        if old and _kind(old) == _kind(new) and self._is_same(name, new, old):
            yield from self.walk._of_mode(self._path(name), new, old, self)
        else:
            yield self._added(name, new, old)

    def _added(self, name: str, new: os.stat_result, old: os.stat_result | None) -> Change:
        path, kind = self._path(name), _kind(new)
        refusal = self.guard.refusal(path, is_directory=_is_dir(new), in_bare=self.in_bare)
        refusal = refusal or self._refusal_of_place(name)
        if kind not in _KEPT_KINDS:
            refusal = f"a {kind} is never kept"
        mode, note = kept_mode(new, old)
        return Change(
            path=path,
            what=What.CHANGED if old else What.ADDED,
            kind=kind,
            mode=mode,
            size_bytes=new.st_size if kind == "file" else 0,
            text=os.readlink(name, dir_fd=self.upper) if kind == "link" else "",
            refusal=refusal,
            conflict=self.walk._conflict(old) if old else "",
            note=note if kind == "file" else "",
            new=new,
            old=old,
            hides=self.folder.hides,
        )

    def _refusal_of_place(self, name: str) -> str:
        makes_one = self.is_bare and self.guard.makes_repository(name, self.real_names)
        return "git would run what stands beside it" if makes_one else self.folder.refusal

    def _removed(
        self, name: str, old: os.stat_result, whiteout: os.stat_result | None = None
    ) -> Change:
        path = self._path(name)
        refusal = self.guard.refusal(path, is_directory=_is_dir(old), in_bare=self.in_bare)
        if self.guard.is_around(path):
            refusal = "something in it was closed to the kernel"
        if path.split("/")[-1] == ".git":
            refusal = refusal or "the repository would be gone"
        conflict = self.walk._conflict(old)
        if not conflict and _is_dir(old):
            conflict = changed_below(self.walk.real, path, self.walk.since_ns)
        return Change(
            path=path, what=What.REMOVED, kind=_kind(old), refusal=refusal, conflict=conflict,
            new=whiteout, old=old, hides=self.folder.hides,
        )  # fmt: skip

    def _path(self, name: str) -> str:
        return f"{self.folder.path}/{name}" if self.folder.path else name

    def _is_whiteout(self, name: str, new: os.stat_result) -> bool:
        if stat.S_ISCHR(new.st_mode):
            return new.st_rdev == 0
        return stat.S_ISREG(new.st_mode) and not new.st_size and self._has(name, _WHITEOUT)

    def _has(self, name: str, attribute: str) -> bool:
        return attribute in attributes(self.upper, name)

    def _is_stand_in(self, name: str, new: os.stat_result) -> bool:
        if _is_dir(new):
            fd = _open(self.upper, name, _FOLDER)
            try:
                below = (f"{self._path(name)}/{found}" for found in os.listdir(fd))
                return all(p in self.guard.closed or self.guard.is_around(p) for p in below)
            finally:
                os.close(fd)
        if stat.S_ISLNK(new.st_mode):
            return self.guard.is_stand_in(os.readlink(name, dir_fd=self.upper), None)
        if stat.S_ISREG(new.st_mode) and new.st_size < _CHUNK_BYTES:
            with open(_open(self.upper, name, _FILE), "rb") as file:
                return self.guard.is_stand_in(None, file.read(_CHUNK_BYTES))
        return stat.S_ISSOCK(new.st_mode)

    def _is_same(self, name: str, new: os.stat_result, old: os.stat_result) -> bool:
        """Whether both hold the same; of what is very large that is not found out."""
        if stat.S_ISLNK(new.st_mode):
            return os.readlink(name, dir_fd=self.upper) == os.readlink(name, dir_fd=self.real)
        if not stat.S_ISREG(new.st_mode):
            return False
        if new.st_size != old.st_size:
            return False
        with ExitStack() as opened:
            fds = []
            for directory in (self.upper, self.real):
                try:
                    fds.append(_open(directory, name, _FILE))
                except OSError:
                    return False
                opened.callback(os.close, fds[-1])
            return _hold_the_same(fds[0], fds[1], new.st_size, self.walk.hurry)


@contextlib.contextmanager
def set_down(changes: Iterable[Change]) -> Iterator[Callable[[], Iterator[Change]]]:
    """All of *changes*, looked at now; what is given reads them again, from a file without a name
    where there are very many. HostError where that has no room."""
    with tempfile.SpooledTemporaryFile(_MOST_IN_MEMORY_BYTES) as file:
        for change in changes:
            _note_down(change, file)
        yield lambda: _read_again(file)


def _note_down(change: Change, file: IO[bytes]) -> None:
    try:
        file.write(f"{json.dumps(_packed(change))}\n".encode())
        file.flush()
    except OSError as error:
        raise HostError(
            attempt=f"note down in {tempfile.gettempdir()} what the kernel has changed",
            answer=error.strerror or str(error),
            remedy="Make room there, or set TMPDIR to another directory.",
        ) from None


def _read_again(file: IO[bytes]) -> Iterator[Change]:
    file.seek(0)
    for line in file:
        yield _unpacked(json.loads(line))


def _packed(change: Change) -> dict[str, Any]:
    told = {one.name: getattr(change, one.name) for one in fields(Change)}
    for name in ("new", "old"):
        if status := told[name]:
            told[name] = [tuple(status)[:10], {time: getattr(status, time) for time in _TIMES}]
    return told


def _unpacked(told: dict[str, Any]) -> Change:
    stats = {name: os.stat_result(*told[name]) for name in ("new", "old") if told[name]}
    return Change(**{**told, **stats, "what": What(told["what"])})


def changed_below(directory: int, path: str, since_ns: int) -> str:
    """What somebody else has done since then in the real directory at *path* below *directory*,
    which the kernel has removed; "" where nobody has done anything."""
    waiting, left = [path], _MOST_REMOVED
    while waiting:
        path = waiting.pop()
        try:
            for name, status in _entries(directory, path):
                left -= 1
                if status.st_ctime_ns > since_ns:
                    return f"somebody else has changed {path}/{name}"
                if _is_dir(status):
                    waiting.append(f"{path}/{name}")
                if left < 0:
                    return "more lies in it than is looked at"
        except OSError as error:
            return f"{path} cannot be looked at: {error.strerror}"
    return ""


def _unseen(path: str, why: str) -> Change:
    return Change(
        path=path, what=What.CHANGED, kind="directory",
        refusal=f"what is in it is not looked at: {why}",
    )  # fmt: skip


def _entries(directory: int, path: str) -> Iterator[tuple[str, os.stat_result]]:
    fd = _open(directory, path, _FOLDER)
    try:
        for name in os.listdir(fd):
            yield name, _look(fd, name)
    finally:
        os.close(fd)


def _hold_the_same(mine: int, theirs: int, size: int, hurry: Callable[[], None]) -> bool:
    """Compares what is there of two files of this *size*, and no holes."""
    position, left = 0, _MOST_COMPARED_BYTES
    try:
        while (position := min(_next_data(fd, position, size) for fd in (mine, theirs))) < size:
            hurry()
            chunk = os.pread(mine, _CHUNK_BYTES, position)
            left -= len(chunk)
            if not chunk or left < 0 or chunk != os.pread(theirs, _CHUNK_BYTES, position):
                return False
            position += len(chunk)
    except OSError:
        return False
    return True


def _next_data(fd: int, position: int, size: int) -> int:
    """lseek(2), SEEK_DATA; *size* where the rest is a hole."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise


def kept_mode(new: os.stat_result, old: os.stat_result | None) -> tuple[int, str]:
    """The mode that is kept, and a note of what is not: nobody is given a program that runs with
    somebody's rights, but that it already was."""
    mode, allowed = stat.S_IMODE(new.st_mode), stat.S_IMODE(old.st_mode) & _SET_ID if old else 0
    kept = mode & ~_SET_ID | mode & _SET_ID & allowed
    return kept, "" if kept == mode else "without its set-id bits"


def attributes(directory: int, name: str) -> list[str]:
    """The extended attributes of *name*, [] where there are none to be had."""
    try:
        return os.listxattr(f"/proc/self/fd/{directory}/{name}", follow_symlinks=False)
    except OSError as error:
        if error.errno in {errno.ENOTSUP, errno.ENOENT}:
            return []
        raise


def open_below(directory: int, path: str, flags: int) -> int:
    """A descriptor of *path* below *directory*, which nothing leads out of: no link, no mount."""
    return _open(directory, path, flags)


def _open(directory: int, path: str, flags: int) -> int:
    try:
        return kernel.openat2(directory, path or ".", flags | os.O_NOFOLLOW, _STRAIGHT)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return _by_names(directory, path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)


def _by_names(directory: int, path: str, flags: int) -> int:
    """The same where a filter has no openat2(2), as that of a server which a hub has put into a
    box."""
    *above, last = [name for name in path.split("/") if name] or ["."]
    if ".." in (*above, last):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    way = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(".", way, dir_fd=directory)
    try:
        mount = _mount_id(fd)
        for name in above:
            inner = os.open(name, way, dir_fd=fd)
            os.close(fd)
            fd = inner
        found = os.open(last, flags, dir_fd=fd)
    finally:
        os.close(fd)
    if _mount_id(found) != mount:
        os.close(found)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    return found


def _mount_id(fd: int) -> str:
    """Of proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(line for line in file if line.startswith("mnt_id:"))


def _listed(directory: int, count: Callable[[str], None]) -> list[str]:
    """The names in it, in order, each of which is counted."""
    names = []
    with os.scandir(directory) as entries:
        for entry in entries:
            count(entry.name)
            names.append(entry.name)
    return sorted(names)


def _look(directory: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=directory, follow_symlinks=False)


def _is_dir(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode)


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "device")
