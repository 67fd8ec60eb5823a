"""folders.py - who launches, as the machine's root: a folder for each box, with a project quota.

::

    /var/lib/sandbox-provisioner/storage/     as `images/` tells
      lock                      held while a folder is made, or taken away from its name
      folders/<sandbox id>/     root's alone
        lock                    locked by who launches, then by PID 1 of the box while it lives, and
                                by who removes it; in it the number of its project
        box/                    what the box is given, with a project that all in it inherits
      folders/<...>.trash/      what is left of one that was removed: see `removal.py`

A folder whose lock is free is nobody's, whoever was killed, and is removed by the next `sweep`. Its
project is written down before that has a limit, and is there until the limit has gone: so none is
left, unless the quotas of its disk were switched off meanwhile. Until all is removed, what is left
has the least limit that there is: a kernel's last processes, which may end a moment after the lock
is free, write nothing more.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner import removal
from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.storage.facts import BLOCK_BYTES, STORAGE, Storage, not_enforced
from sandbox_provisioner.facilities.storage.images import (
    NoRoom,
    make_directory,
    refuse_without_inodes,
    refuse_without_room,
)
from sandbox_provisioner.facilities.storage.projects import (
    FOLDERS,
    OF_BOXES,
    free_project,
    opened_box,
)
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.locks import is_free, lock_at_once, locked, unlock
from sandbox_provisioner.units import format_bytes

_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
# A box that is restarted: its last PID 1 has just ended, or is about to.
_END_SECONDS = 10.0
_AGAIN_SECONDS = 0.005
AT_A_START_SECONDS = 0.05
_LOCK = "lock"
_ASIDE = re.compile(r"[0-9a-f]{12}-[0-9a-f]{8}\.trash", re.ASCII)
# How long a start waits for the room that is still taken by what others left.
_ROOM_SECONDS = 5.0
# After each turn of removing the thread waits as long. With a low priority (nice(2)) it would keep
# the others of this process waiting: it may have Python's own lock when it is not its turn.
_TURN_SECONDS = 0.05
_removing = threading.Lock()


class BoxFolder:
    """The *mount* of a folder, attached nowhere, and its *lock*."""

    def __init__(self, mount: int, lock: int) -> None:
        self.mount, self.lock = mount, lock
        keep_from_children(self)

    def forget(self) -> None:
        """Close our copies: the box has its own by now, or there will be none."""
        for fd in (self.mount, self.lock):
            os.close(fd)


def make_folder(
    name: str,
    storage: Storage,
    owner: int,
    directory: Path = STORAGE,
    layers: Path | None = None,
) -> BoxFolder:
    """A new folder called *name* that holds no more than *storage*, which the caller forgets; on
    the disk its top is of the user and group *owner*. HostError where there is no room for it,
    besides what others were promised."""
    folder = directory / FOLDERS / name
    attempt = (
        f"give a kernel a folder that holds {format_bytes(storage.size_bytes)}, which disk_limit "
        "asks for"
    )
    try:
        make_directory(make_directory(directory) / FOLDERS)
        with contextlib.suppress(OSError):  # `gc` tells what cannot be removed
            sweep(directory, seconds=AT_A_START_SECONDS)
        _wait_for_end(folder)
        until = time.monotonic() + _ROOM_SECONDS
        while True:
            with _none_while_left(directory, until), locked(directory):
                refuse_without_room(storage.size_bytes, folder, directory, layers, attempt)
                refuse_without_inodes(storage.inodes or 0, folder, directory, attempt)
                made = _made(folder, storage, owner)
                break
        remove_on(directory)
        return made
    except OSError as error:
        raise HostError(
            attempt=attempt,
            answer=f"{folder}: {error.strerror or error}",
            remedy="See the machine's log, and whether its file system still has its quotas. With "
            'disk_backend = "tmpfs" it is memory.',
        ) from None


@contextlib.contextmanager
def _none_while_left(directory: Path, until: float) -> Iterator[None]:
    """Where there is no room, but what others left still takes some, wait for a part of that to
    be removed, but not past *until* (monotonic)."""
    try:
        yield
    except NoRoom:
        if not any(_asides(directory)) or time.monotonic() > until:
            raise
        with contextlib.suppress(OSError):
            sweep(directory, seconds=AT_A_START_SECONDS)
        time.sleep(_AGAIN_SECONDS)  # another process may have it, and tells nobody


def _wait_for_end(folder: Path) -> None:
    """PID 1 of a box lets go of its lock when it ends, which a kernel may still be about to."""
    deadline = time.monotonic() + _END_SECONDS
    while folder.exists():
        if is_free(folder / _LOCK):
            with contextlib.suppress(FileNotFoundError):  # somebody else does
                _finish_if_possible(removal.set_aside(folder))
        elif time.monotonic() > deadline:
            raise TimeoutError(errno.EBUSY, "the last box of that name still has it")
        else:
            time.sleep(_AGAIN_SECONDS)  # flock(2) has no timeout, and no event to wait for


def _made(folder: Path, storage: Storage, owner: int) -> BoxFolder:
    folder.mkdir(mode=0o700)
    (folder / _LOCK).touch(mode=0o600)
    lock = lock_at_once(folder / _LOCK)
    try:
        (folder / "box").mkdir(mode=0o755)
        top = opened_box(folder)
        try:
            if lack := not_enforced(top):  # since who launches has looked
                raise OSError(errno.ENOTSUP, lack)
            os.fchown(top, owner, owner)
            project = free_project(top, OF_BOXES)
            os.write(lock, b"%d" % project)
            kernel.set_project(top, project, inherit=True)
            kernel.limit_project(top, project, storage.size_bytes, storage.inodes)
            return BoxFolder(kernel.open_tree("", dir_fd=top), lock)
        finally:
            os.close(top)
    except BaseException:
        os.close(lock)
        raise


def _finish_if_possible(aside: Path) -> None:
    with contextlib.suppress(OSError):
        _finish(aside, AT_A_START_SECONDS)


def _finish(aside: Path, seconds: float) -> bool:
    """Remove what was set aside, of very many files what *seconds* allow; whether it is gone now.
    OSError, BlockingIOError where somebody else is about to."""
    try:
        lock = lock_at_once(aside / _LOCK)
    except FileNotFoundError:  # it has not got that far, or no limit any more
        return removal.empty(aside, seconds)
    try:
        # Not into a folder of its project: what is moved up there may need a block more.
        _limit(lock, BLOCK_BYTES, 1)
        if not removal.empty(aside, seconds, keep=_LOCK):
            return False
        _limit(lock, 0, 0)
        return removal.empty(aside, seconds)
    finally:
        unlock(lock)


def _limit(lock: int, size_bytes: int, inodes: int) -> None:
    """Limit the project that is written in the file *lock*, which is on the same file system."""
    number = os.pread(lock, 32, 0)
    if number.isdigit() and int(number) in OF_BOXES:
        with contextlib.suppress(OSError):  # quotas were switched off meanwhile
            kernel.limit_project(lock, int(number), size_bytes, inodes)


def end(name: str, seconds: float, directory: Path = STORAGE) -> bool:
    """The box *name* has ended: remove its folder; whether it had one. Of very many files what
    *seconds* allow: the rest goes later (`remove_on`)."""
    folder = directory / FOLDERS / name
    with locked(directory):  # else a start of the same kernel may be making it
        is_ours = folder.exists() and is_free(folder / _LOCK)
        aside = removal.set_aside(folder) if is_ours else None
    if aside:
        with contextlib.suppress(FileNotFoundError, BlockingIOError):  # somebody else does
            _finish(aside, seconds)
    return aside is not None


def is_held(name: str, directory: Path = STORAGE) -> bool:
    """Whether a box has the folder *name*."""
    folder = directory / FOLDERS / name
    return folder.exists() and not is_free(folder / _LOCK)


def sweep(directory: Path = STORAGE, seconds: float = float("inf")) -> tuple[str, ...]:
    """Remove the folders that no box has any more, and what is left of others, of very many files
    what *seconds* allow; the names of the former. OSError for what cannot be removed, once all else
    is."""
    gone, until = [], time.monotonic() + seconds
    problem: OSError | None = None
    for name in _names(directory):
        path = directory / FOLDERS / name
        try:
            if _ASIDE.fullmatch(name):
                _finish(path, until - time.monotonic())
            # Looked at without the lock that each start needs; `end` looks again.
            elif _ID.fullmatch(name) and is_free(path / _LOCK):
                is_gone = end(name, until - time.monotonic(), directory)
                gone += [name] if is_gone else []
        except (FileNotFoundError, BlockingIOError):  # somebody else does
            continue
        except OSError as error:
            problem = problem or OSError(error.errno, error.strerror, str(path))
    if problem:
        raise problem
    return tuple(gone)


def remove_on(directory: Path = STORAGE) -> None:
    """Let a thread, one at a time, remove what is left, however much that is: else kernels would
    leave more than is removed at a start."""
    if not any(_asides(directory)) or not _removing.acquire(blocking=False):
        return
    try:
        threading.Thread(
            target=_remove_all, args=(directory,), name="sandbox-left", daemon=True
        ).start()
    except RuntimeError:  # there can be no more threads
        _removing.release()


def _remove_all(directory: Path) -> None:
    """Each once: what cannot be removed, or somebody else is removing, is left to a later go."""
    tried: set[Path] = set()
    try:
        while new := set(_asides(directory)) - tried:
            tried |= new
            for aside in new:
                with contextlib.suppress(OSError):
                    while not _finish(aside, _TURN_SECONDS):
                        time.sleep(_TURN_SECONDS)
    finally:
        _removing.release()


def _asides(directory: Path) -> Iterator[Path]:
    """What is left of folders."""
    return (directory / FOLDERS / name for name in _names(directory) if _ASIDE.fullmatch(name))


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory / FOLDERS)
    except FileNotFoundError:
        return []
