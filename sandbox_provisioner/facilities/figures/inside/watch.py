"""watch.py - PID 1: writes the figures anew just before somebody reads them.

It holds a lease on each file (fcntl(2), F_SETLEASE): who opens one waits until we have let go, and
we do when the text is what is so now. While it is open there is no lease to be had: then it is
written every second. Nobody reads: nothing happens, and nothing wakes us up. Who opens one in a
loop makes us write at most ten times a second, and reads what is as old as that.

A lease belongs to who has the file's owner as its user for files; the kernel has the file on a
mount that is read-only, and neither a descriptor to write by nor leases. While PID 1 is stopped,
who opens one waits, at most as long as /proc/sys/fs/lease-break-time says, 45 s.
"""

from __future__ import annotations

import os
import select
import time

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from sandbox_provisioner.inside.watcher import Init

SIGIO = 29
_AGAIN_SECONDS = 0.1
_OPEN_SECONDS = 1.0


class _File:
    """One of them: *fd* to write by, and when to try for a lease again; None while we have it, or
    somebody waits for us to leave it."""

    def __init__(self, fd: int, text: Callable[[], bytes], *, is_leased: bool) -> None:
        self.fd = fd
        self.text = text
        self.due: float | None = None if is_leased else 0.0

    def write(self) -> None:
        """All of it in one go."""
        try:
            os.pwrite(self.fd, self.text(), 0)
        except (OSError, ValueError):
            return  # old figures are better than no kernel: a group that goes away tells nothing

    def is_waited_for(self) -> bool:
        """Whether somebody opens it, and waits for us."""
        return self.due is None and not kernel.has_lease(self.fd)

    def try_lease(self, now: float) -> None:
        """Have one, unless somebody has it open."""
        if kernel.take_lease(self.fd):
            self.due = None
            return
        self.write()
        self.due = now + _OPEN_SECONDS

    def let_go(self, now: float) -> None:
        """With what is so now. Whatever happens, nobody waits on."""
        try:
            self.write()
        finally:
            kernel.leave_lease(self.fd)
        self.due = now + _AGAIN_SECONDS


class Figures(Watcher):
    """The files by their descriptors, with what makes the text of each; *look* comes before. A
    lease on *leased* was had before."""

    def __init__(
        self,
        files: dict[int, Callable[[], bytes]],
        look: Callable[[], None],
        leased: Collection[int] = (),
    ) -> None:
        self._files = [_File(fd, text, is_leased=fd in leased) for fd, text in files.items()]
        self._look = look
        self._signals = kernel.signal_fd((SIGIO,))

    def waits(self) -> Iterable[tuple[int, int]]:
        """signalfd(2): the signal of a lease that somebody waits for."""
        return ((self._signals, select.POLLIN),)

    def _try_to_look(self) -> None:
        try:
            self._look()
        except (OSError, ValueError):
            return  # as in `_File.write`

    def patience(self) -> int | None:
        """Nothing as long as we have every lease."""
        times = [file.due for file in self._files if file.due is not None]
        return max(0, round(1000 * (min(times) - time.monotonic())) + 1) if times else None

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """One look for all that is due."""
        if self._signals in ready:
            os.read(self._signals, 128)
        now = time.monotonic()
        waited_for = [file for file in self._files if file.is_waited_for()]
        due = [file for file in self._files if file.due is not None and file.due <= now]
        if waited_for or due:
            self._try_to_look()
        for file in waited_for:
            file.let_go(now)
        for file in due:
            file.try_lease(now)
