"""kept.py - in who launches, with the machine's own root: lets images stay mounted between kernels.

What Linux has read of an image file, and unpacked, goes with the last mount of it, and the next
kernel over it waits until it is read again. So a launcher that lives on has a mount of its own,
attached nowhere, of each of the last few images, and lets go of it when no start has come for a
while. It ends with this process, whoever is killed.

A file that has changed since, or has been removed, is nobody's to keep. Each start looks at its
own, so that it gets what is there now; a thread looks at the others, since a file server may not
answer for hours.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.root.facts.kinds import ImageKind
from sandbox_provisioner.facilities.root.facts.loop import mount_of
from sandbox_provisioner.places import Place

_MOST = 4
_LOOK_SECONDS = 60.0


def _state(fd: int) -> tuple[int, int]:
    # inode(7): the time of the last change is Linux's own, also of its content and its names.
    status = os.fstat(fd)
    return status.st_size, status.st_ctime_ns


class _Image:
    """A mount *mount_fd* of the file that is open as *file_fd*, which was *as_it_was*; until
    then."""

    def __init__(
        self, file_fd: int, mount_fd: int, as_it_was: tuple[int, int], until: float
    ) -> None:
        self.until = until
        self._file_fd, self._mount_fd = file_fd, mount_fd
        self._as_it_was = as_it_was

    def was(self, state: tuple[int, int]) -> bool:
        return state == self._as_it_was

    @property
    def has_changed(self) -> bool:
        """It may wait for a file server."""
        try:
            return not self.was(_state(self._file_fd))
        except OSError:  # ESTALE; or it has been closed meanwhile, and is nobody's any more
            return True

    def close(self) -> None:
        for fd in (self._file_fd, self._mount_fd):
            os.close(fd)


def _mounted(place: Place, kind: ImageKind, attempt: str, until: float) -> _Image:
    """One of its own: the first is the box's, which gives it other attributes."""
    as_it_was, file_fd = _state(place.fd), os.dup(place.fd)
    try:
        return _Image(file_fd, mount_of(place, kind, attempt), as_it_was, until)
    except BaseException:
        os.close(file_fd)
        raise


class _KeptImages:
    """Those of this process, by the device and inode of their file."""

    def __init__(self) -> None:
        self._begin()
        keep_from_children(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._there: dict[tuple[int, int], _Image] = {}
        self._timer: threading.Timer | None = None
        self._is_looking = False

    def forget(self) -> None:
        """In a child that was forked, which has neither the timer nor, perhaps, the lock."""
        there = self._there
        self._begin()
        for image in there.values():
            image.close()

    def mount(self, place: Place, kind: ImageKind, attempt: str, seconds: float) -> int:
        """`mount_of` the file *place*, which stays mounted until there was no start over it for
        *seconds*, where there is what that needs."""
        state, key = _state(place.fd), (place.device, place.inode)
        self._drop(lambda other, image: other == key and not image.was(state))
        fd = mount_of(place, kind, attempt)
        if seconds > 0:
            # No descriptor, device or memory is left for it: a start needs the first one alone.
            with contextlib.suppress(HostError, OSError):
                self._keep(place, kind, attempt, seconds)
        return fd

    def _keep(self, place: Place, kind: ImageKind, attempt: str, seconds: float) -> None:
        key, until = (place.device, place.inode), time.monotonic() + seconds
        with self._lock:
            if found := self._there.get(key):
                found.until = until
                return
        image = _mounted(place, kind, attempt, until)
        with self._lock:
            gone = [self._there.pop(key)] if key in self._there else []
            if len(self._there) == _MOST:
                gone.append(self._there.pop(min(self._there, key=lambda k: self._there[k].until)))
            self._there[key] = image
            self._wait(0.0)
        for one in gone:
            one.close()

    def _wait(self, seconds: float) -> None:
        """So long at the most, and no longer than for the first that is to be let go of."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if not self._there:
            return
        first = min(image.until for image in self._there.values()) - time.monotonic()
        timer = threading.Timer(max(0.0, min(first, seconds)), self._tend)
        timer.daemon = True
        # No thread is left: one more image that is kept asks for it again.
        with contextlib.suppress(RuntimeError):
            timer.start()
            self._timer = timer

    def _tend(self) -> None:
        """Let go of what nobody asked for, and then look at the others. Where that is answered by
        nobody, the next one of these lets go all the same."""
        now = time.monotonic()
        self._drop(lambda _, image: image.until <= now)
        with self._lock:
            self._wait(_LOOK_SECONDS)
            if self._is_looking:
                return
            self._is_looking = True
            others = list(self._there.values())
        changed = {image for image in others if image.has_changed}
        with self._lock:
            self._is_looking = False
        self._drop(lambda _, image: image in changed)

    def _drop(self, is_over: Callable[[tuple[int, int], _Image], bool]) -> None:
        with self._lock:
            gone = [key for key, image in self._there.items() if is_over(key, image)]
            images = [self._there.pop(key) for key in gone]
        for image in images:
            image.close()

    def drop_all(self) -> None:
        """Let go of all of them."""
        self._drop(lambda *_: True)
        with self._lock:
            self._wait(0.0)


_kept = _KeptImages()
mount_and_keep, drop_kept = _kept.mount, _kept.drop_all
