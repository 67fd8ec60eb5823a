"""layers/keep.py - the command `keep`, with the rights of the work directory's owner: writes a
kernel's changes into it.

Each change is finished beside its place, under a name of ours, and then swapped with what stands
there, which is looked at once more: what it takes away is what was compared, or it is put back, and
told. So nothing of anybody's is overwritten unseen, and whoever is stopped in the middle, however
it is done, starts again: what is kept already is no change any more.

Nothing is ever reached by a path of several names but below a descriptor, without links and mounts.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from sandbox_provisioner import removal
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.layers.changes import (
    OPAQUE,
    Change,
    What,
    attributes,
    changed_below,
    open_below,
)
from sandbox_provisioner.layers.guard import UNFINISHED
from sandbox_provisioner.layers.owner import as_owner

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_CHUNK_BYTES = 1 << 20
_OF_OVERLAY = "user.overlay."
_ACCESS_LISTS = "system.posix_acl_"
_BUSY = "somebody else has changed it"
_MOST_TOLD = 10_000
_FULL = {os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)}


class NotKept(Exception):
    """The text is why, for a person."""


@dataclass(slots=True)
class Outcome:
    """What has become of changes: how many are *kept*, and of others why they are not; of how many
    more nobody is told that."""

    kept: int = 0
    left: list[tuple[Change, str]] = field(default_factory=list)
    more_left: int = 0

    def add_left(self, change: Change, why: str) -> None:
        """One that is not kept."""
        if len(self.left) < _MOST_TOLD:
            self.left.append((change, why))
        else:
            self.more_left += 1


class Keeping:
    """Writes changes of *upper* into *real*, two descriptors, whose owner is *owner*; *word* is in
    all names of what is not finished. Without *overwrite* nothing goes that somebody has changed
    after *since_ns*."""

    def __init__(
        self, upper: int, real: int, owner: tuple[int, int], word: str, since_ns: int, *,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        self.upper, self.real, self.owner = upper, real, owner
        self.since_ns, self.overwrite = since_ns, overwrite
        self._prefix = f"{UNFINISHED}{word}-"
        self._number = 0
        # By the file of a kernel's: the path that it was kept at, and what stands there.
        self._links: dict[tuple[int, int], tuple[str, tuple[int, int]]] = {}
        # Directories that get their mode when all that goes into them is there, and which they are.
        self._open: list[tuple[Change, tuple[int, int]]] = []
        self._forgets = True

    def keep(self, changes: Iterable[Change], wanted: Callable[[Change], bool]) -> Outcome:
        """Keep those of *changes* that are *wanted*."""
        outcome = Outcome()
        try:
            for change in filter(wanted, changes):
                why = change.refusal or ("" if self.overwrite else change.conflict)
                if not why:
                    why = self._tried(change, self._keep)
                if why:
                    outcome.add_left(change, why)
                else:
                    outcome.kept += 1
                    self._forget(change)
                if why in _FULL:
                    break  # all that follows would fail as well
        finally:
            self._close_all(outcome)
        return outcome

    def _tried(self, change: Change, way: Callable[[Change], None]) -> str:
        """Why it could not be kept this *way*, "" where it is."""
        try:
            way(change)
        except NotKept as error:
            return str(error)
        except OSError as error:
            taken = error.errno in {errno.EEXIST, errno.ENOENT}
            return _BUSY if taken else error.strerror or str(error)
        return ""

    def _close_all(self, outcome: Outcome) -> None:
        """Give directories their modes, those first that are in others."""
        while self._open:
            change, identity = self._open.pop()
            if why := self._tried(change, partial(self._close, identity=identity)):
                outcome.kept -= 1
                outcome.add_left(change, why)

    def _close(self, change: Change, identity: tuple[int, int]) -> None:
        fd = open_below(self.real, change.path, os.O_PATH | os.O_DIRECTORY)
        try:
            found = os.fstat(fd)
            if _identity(found) != identity:
                raise NotKept(_BUSY)
            # A new one has that of the directory above: mkdir(2).
            inherited = 0 if change.old else found.st_mode & stat.S_ISGID
            with self._as_owner():
                os.chmod(f"/proc/self/fd/{fd}", change.mode | inherited)
        finally:
            os.close(fd)

    def _forget(self, change: Change) -> None:
        """Take *change*, which is kept, from what the kernel has laid aside: what a person makes of
        it later is no conflict, and not to be overwritten. Where the kernel has replaced a
        directory as a whole, all that is not laid aside counts as removed: there it stays."""
        if change.new is None or change.hides or not self._forgets:
            return
        above, _, name = change.path.rpartition("/")
        try:
            if change.kind == "directory" and change.what is not What.REMOVED:
                if change.what is What.ADDED:
                    self._show_below(change.path)
                return
            folder = open_below(self.upper, above, _FOLDER)
            try:
                if _identity(_look(folder, name)) == _identity(change.new):
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError:
            self._forgets = False

    def _show_below(self, path: str) -> None:
        """An overlay marks new directories too as the replacement of what may have been there."""
        fd = open_below(self.upper, path, _FOLDER)
        try:
            if OPAQUE in os.listxattr(fd):
                os.removexattr(fd, OPAQUE)
        finally:
            os.close(fd)

    def _keep(self, change: Change) -> None:
        if change.what is What.MODE:
            self._set_mode(change)
            return
        above, _, name = change.path.rpartition("/")
        folder = open_below(self.real, above, _FOLDER)
        try:
            if change.what is What.REMOVED:
                self._remove(change, folder, name)
            elif change.kind == "directory":
                with self._as_owner():
                    os.mkdir(name, 0o700, dir_fd=folder)
                slim = replace(change, new=None)  # there may be a million of them
                self._open.append((slim, _identity(_look(folder, name))))
            else:
                self._write(change, folder, name)
        finally:
            os.close(folder)

    def _as_owner(self) -> contextlib.AbstractContextManager[None]:
        """With the owner's rights to files, and no more: what is made is the owner's. Root reads
        with its own what the kernel has left."""
        return as_owner(*self.owner)

    def _new_name(self) -> str:
        self._number += 1
        return f"{self._prefix}{self._number}"

    def clear(self, unfinished: Iterable[str]) -> list[tuple[Change, str]]:
        """Remove what is ours of *unfinished*, where somebody was stopped in the middle; what
        cannot be removed, and why."""
        stuck = []
        for path in unfinished:
            above, _, name = path.rpartition("/")
            if name.startswith(self._prefix):
                try:
                    folder = open_below(self.real, above, _FOLDER)
                    try:
                        self._throw_away(folder, name)
                    finally:
                        os.close(folder)
                except OSError as error:
                    left = Change(path=path, what=What.REMOVED, kind="directory")
                    stuck.append((left, f"it is left of what was removed: {error.strerror}"))
                self._avoid(name)
        return stuck

    def _avoid(self, name: str) -> None:
        """Use no name that stands there already."""
        number = name.removeprefix(self._prefix)
        if number.isascii() and number.isdigit():
            self._number = max(self._number, int(number))

    def _throw_away(self, folder: int, name: str) -> None:
        with self._as_owner():
            if stat.S_ISDIR(_look(folder, name).st_mode):
                removal.empty(Path(f"/proc/self/fd/{folder}/{name}"))
            else:
                os.unlink(name, dir_fd=folder)

    # -- what was there

    def _remove(self, change: Change, folder: int, name: str) -> None:
        aside = self._new_name()
        with self._as_owner():
            _move(folder, name, aside)
        found = _look(folder, aside)
        why = "" if _is_still(change, found) else _BUSY
        if stat.S_ISDIR(found.st_mode) and not (why or self.overwrite):
            why = changed_below(folder, aside, self.since_ns).replace(aside, change.path)
        if why:
            with self._as_owner():
                _move(folder, aside, name)
            raise NotKept(why)
        try:
            self._throw_away(folder, aside)
        except OSError as error:
            raise NotKept(
                f"it is removed, and some of it is left beside it as {aside}: {error.strerror}"
            ) from None

    def _put(self, change: Change, folder: int, name: str, new: str) -> None:
        """Let what is finished under the name *new* stand at *name*."""
        with self._as_owner():
            if change.old is None:
                _move(folder, new, name)
                return
            if not _swap(folder, new, name):
                # There is a moment in which somebody else's file would be lost.
                if not _is_still(change, _look(folder, name)):
                    raise NotKept(_BUSY)
                os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
                return
            if not _is_still(change, _look(folder, new)):
                _swap(folder, new, name)
                raise NotKept(_BUSY)
        self._throw_away(folder, new)

    # -- what comes

    def _write(self, change: Change, folder: int, name: str) -> None:
        new = self._new_name()
        try:
            if change.kind == "link":
                with self._as_owner():
                    os.symlink(change.text, new, dir_fd=folder)
            elif not self._linked(change, folder, new):
                self._copied(change, folder, name, new)
            made = _look(folder, new)
            self._put(change, folder, name, new)
        finally:
            with contextlib.suppress(FileNotFoundError):
                self._throw_away(folder, new)
        assert change.new
        if change.new.st_nlink > 1:
            self._links[_identity(change.new)] = change.path, _identity(made)

    def _linked(self, change: Change, folder: int, new: str) -> bool:
        """Make *new* another name of what is kept already, where for the kernel both were one."""
        assert change.new
        path, wanted = self._links.get(_identity(change.new), ("", (0, 0)))
        if not path:
            return False
        above, _, name = path.rpartition("/")
        with contextlib.suppress(OSError), self._as_owner():
            first = open_below(self.real, above, _FOLDER)
            try:
                os.link(name, new, src_dir_fd=first, dst_dir_fd=folder, follow_symlinks=False)
            finally:
                os.close(first)
            if _identity(_look(folder, new)) == wanted:
                return True
            os.unlink(new, dir_fd=folder)
        return False

    def _copied(self, change: Change, folder: int, name: str, new: str) -> None:
        source = open_below(self.upper, change.path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            found = os.fstat(source)
            assert change.new
            if not stat.S_ISREG(found.st_mode) or _identity(found) != _identity(change.new):
                raise NotKept("it is not what was looked at")
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with self._as_owner():
                target = os.open(new, flags, 0o600, dir_fd=folder)
            try:
                _copy(source, target, found.st_size)
                self._copy_attributes(source, target)
                if change.old is not None:
                    _copy_access_lists(folder, name, target)
                with self._as_owner():
                    os.fchmod(target, change.mode)
                os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _copy_attributes(self, source: int, target: int) -> None:
        """Those of the kernel's own; none of overlay's."""
        for attribute in os.listxattr(source):
            if attribute.startswith("user.") and not attribute.startswith(_OF_OVERLAY):
                try:
                    os.setxattr(target, attribute, os.getxattr(source, attribute))
                except OSError as error:
                    if error.errno != errno.ENOTSUP:  # as cp(1): not every file system has them
                        raise

    def _set_mode(self, change: Change) -> None:
        fd = open_below(self.real, change.path, os.O_PATH)
        try:
            found = os.fstat(fd)
            if not _is_still(change, found):
                raise NotKept(_BUSY)
            is_directory = stat.S_ISDIR(found.st_mode)
            with self._as_owner():
                os.chmod(f"/proc/self/fd/{fd}", change.mode | (0o700 if is_directory else 0))
            if is_directory:
                self._open.append((replace(change, new=None), _identity(found)))
        finally:
            os.close(fd)


def _copy(source: int, target: int, size: int) -> None:
    """All bytes, and none for a hole: lseek(2), SEEK_DATA."""
    os.ftruncate(target, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # what follows is one hole
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        while start < end:
            copied = _copy_some(source, target, start, min(end - start, _CHUNK_BYTES))
            if not copied:
                return
            start += copied


def _copy_some(source: int, target: int, start: int, size: int) -> int:
    """copy_file_range(2), which may share what is on the disk, where both are on one file system of
    a kind that can; sendfile(2) else."""
    try:
        return os.copy_file_range(source, target, size, start, start)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
    os.lseek(target, start, os.SEEK_SET)
    return os.sendfile(target, source, start, size)


def _move(folder: int, old: str, new: str) -> None:
    """To a name that nobody has; EEXIST. Some file systems (NFS) cannot make sure of that."""
    try:
        kernel.rename(folder, old, folder, new, kernel.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        with contextlib.suppress(FileNotFoundError):
            _look(folder, new)
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), new) from None
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)


def _swap(folder: int, one: str, other: str) -> bool:
    """Exchange both; whether this file system can."""
    try:
        kernel.rename(folder, one, folder, other, kernel.RENAME_EXCHANGE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _copy_access_lists(folder: int, name: str, target: int) -> None:
    """acl(5): whom else the owner lets in stays so."""
    for attribute in attributes(folder, name):
        if attribute.startswith(_ACCESS_LISTS):
            path = f"/proc/self/fd/{folder}/{name}"
            os.setxattr(target, attribute, os.getxattr(path, attribute, follow_symlinks=False))


def _look(folder: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_still(change: Change, found: os.stat_result) -> bool:
    """Whether *found* is what the change was compared with; its time of change is not asked, since
    to rename a file may change it."""
    old = change.old
    if old is None or _identity(old) != _identity(found):
        return False
    if stat.S_ISDIR(found.st_mode):
        return stat.S_ISDIR(old.st_mode)
    return (old.st_size, old.st_mtime_ns, old.st_mode) == (
        found.st_size, found.st_mtime_ns, found.st_mode,
    )  # fmt: skip
