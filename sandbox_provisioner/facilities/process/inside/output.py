"""output.py - runs in PID 1: passes the kernel's output on, and remembers the end of it.

May import: os, select, time, inside.printable, watcher.

What ends up in the server's own log or terminal is made printable, and has a budget: somebody has
to store it, and to read it. What is beyond is dropped, counted, and told in one line. The kernel
waits for none of it, but for a reader that has stopped. (What Jupyter shows of a kernel's output
goes through its sockets, and not through here.)
"""

from __future__ import annotations

import os
import select
import time

from sandbox_provisioner.inside.printable import printable_bytes, whole_letters
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.watcher import Init

# A mebibyte at once, then 64 KiB a second: 5 GiB a day of each output.
BURST_BYTES = 1 << 20
BYTES_PER_SECOND = 1 << 16
TAIL_BYTES = 8192
_CHUNK = 4096  # PIPE_BUF: what a pipe that polls as writable takes without blocking
# What a pipe holds at most (pipe(7), /proc/sys/fs/pipe-max-size): who goes on writing when all is
# over is not listened to for ever.
_LAST_READS = (1 << 20) // _CHUNK
# Who asked for all of it may be slow, as who reads a log is not: a file's pager, a busy machine.
_LAST_SECONDS = 5.0


class Pump(Watcher):
    """One of the kernel's outputs, on its way from *read_fd* to *write_fd*; it either reads or
    writes, and never blocks in between."""

    def __init__(self, read_fd: int, write_fd: int, budget: Budget | None) -> None:
        """Without a *budget* all of it is passed on, as it is."""
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.budget = budget
        self.waiting = b""
        self.tail = b""

    def waits(self) -> Iterable[tuple[int, int]]:
        """For our reader while there is something for it; nothing after the kernel's last word."""
        if self.waiting:
            return ((self.write_fd, select.POLLOUT),)
        return ((self.read_fd, select.POLLIN),) if self.read_fd >= 0 else ()

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """One step."""
        if self.waiting:
            if self.write_fd in ready:
                self.drain()
        elif self.read_fd in ready:
            if not self.fill():
                self.end()
                self.close()
        elif self.patience() == 0:
            self.report()

    def close(self) -> None:
        """There comes no more; our reader has had what it took at once."""
        os.close(self.read_fd)
        self.read_fd, self.waiting, self.budget = -1, b"", None

    def fill(self) -> bool:
        """Read once; False at the end."""
        found = os.read(self.read_fd, _CHUNK)
        self.tail = (self.tail + found)[-TAIL_BYTES:]
        self.waiting = self.budget.passed(found) if self.budget else found
        return bool(found)

    def drain(self) -> None:
        """Write once. A reader that has gone loses what comes, the kernel must not stop for it."""
        try:
            self.waiting = self.waiting[os.write(self.write_fd, self.waiting[:_CHUNK]) :]
        except OSError:
            self.waiting = b""

    def patience(self) -> int | None:
        """In how many milliseconds `report` has something to say, None if it has not."""
        return self.budget.patience() if self.budget and not self.waiting else None

    def report(self) -> None:
        """Tell what was dropped, once there is room again."""
        if self.budget and not self.waiting:
            self.waiting = self.budget.notice()

    def finish(self) -> None:
        """Pass on what is still in the pipe: as far as our reader takes it at once, or soon where
        all of it was asked for."""
        if self.read_fd < 0:
            return
        until = time.monotonic() + (0 if self.budget else _LAST_SECONDS)
        os.set_blocking(self.read_fd, False)
        for _ in range(_LAST_READS):
            self._drain_all(until)
            try:
                if not self.fill():
                    break
            except BlockingIOError:
                break
        self.end(until)

    def end(self, until: float = 0.0) -> None:
        """Say the last: there comes no more. Our reader has *until* then to take it."""
        self._drain_all(until)
        if self.budget and not self.waiting:
            self.waiting = self.budget.rest() + self.budget.notice(now=True)
            self._drain_all(until)

    def _drain_all(self, until: float) -> None:
        writable = select.poll()
        writable.register(self.write_fd, select.POLLOUT)
        while self.waiting and writable.poll(max(0, int(1000 * (until - time.monotonic())))):
            self.drain()


class Budget:
    """How much of one output may still be passed on: a bucket that fills with time."""

    def __init__(self) -> None:
        self.left = float(BURST_BYTES)
        self.since = time.monotonic()
        self.dropped = 0
        self.begun = b""  # of a letter that has not come whole

    def passed(self, found: bytes) -> bytes:
        """What of *found* goes on, made printable; nothing until what was dropped has been told."""
        if self.dropped and self.patience():
            self.dropped += len(found)
            return b""
        notice = self.notice()
        whole, begun = whole_letters(self.begun + found)
        shown = printable_bytes(whole)
        self._refill()
        if len(shown) > self.left:
            self.dropped, self.begun = len(self.begun) + len(found), b""
            return notice
        self.left -= len(shown)
        self.begun = begun
        return notice + shown

    def patience(self) -> int | None:
        """In how many milliseconds a second's worth has gathered; None if nothing was dropped."""
        if not self.dropped:
            return None
        self._refill()
        missing = max(0.0, BYTES_PER_SECOND - self.left)
        return int(1000 * missing / BYTES_PER_SECOND + 0.999)

    def notice(self, *, now: bool = False) -> bytes:
        """The line about what was dropped, b"" if nothing was, or it is too soon."""
        if not self.dropped or (self.patience() and not now):
            return b""
        dropped, self.dropped = self.dropped, 0
        return (
            f"\n[sandbox: {dropped} bytes of the kernel's output were dropped here: it wrote more "
            f"than {BYTES_PER_SECOND >> 10} KiB a second]\n"
        ).encode()

    def rest(self) -> bytes:
        """The letter that never came whole."""
        begun, self.begun = self.begun, b""
        return printable_bytes(begun)

    def _refill(self) -> None:
        now = time.monotonic()
        self.left = min(float(BURST_BYTES), self.left + (now - self.since) * BYTES_PER_SECOND)
        self.since = now
