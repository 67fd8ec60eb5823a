"""broker/patient.py - the daemon: its standard error, which nobody waits for.

Who reads it may stop: a pager, a terminal that is held by Ctrl-S, a journal on a slow disk. A write
waits then (pipe(7), termios(3)), and a daemon that waits serves nobody.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import threading
from collections.abc import Callable, Iterator
from typing import TextIO, cast

# What Linux takes at once if poll(2) has told that it takes something (pipe(7), PIPE_BUF).
_AT_ONCE_BYTES = select.PIPE_BUF
# Of what nobody has read yet; some thousand lines.
_MOST_BYTES = 1 << 20
_LAST_SECONDS = 1.0


class PatientStream(io.TextIOBase):
    """Writes to *fd* from any thread. What it does not take yet is kept, and goes on in a thread of
    its own; above a mebibyte what comes more is left out, and *left_out* tells how many writes."""

    def __init__(self, fd: int, left_out: Callable[[int], str]) -> None:
        self._fd = fd
        self._left_out = left_out
        self._lost = 0
        self._kept = bytearray()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def writable(self) -> bool:
        """As `io.IOBase`."""
        return True

    def write(self, text: str) -> int:
        """As `io.TextIOBase`, at once if somebody reads; a write is kept whole or left out."""
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if not self._kept and self._takes():
                data = data[self._written(data) :]
            if data:
                self._keep(data)
        return len(text)

    def _takes(self, milliseconds: int | None = 0) -> bool:
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return bool(poll.poll(milliseconds))

    def _written(self, data: bytes) -> int:
        """How much of *data* is done with: all of it, if nobody will read it any more."""
        try:
            return os.write(self._fd, data[:_AT_ONCE_BYTES])
        except BlockingIOError:  # somebody who has it too may have set O_NONBLOCK, and filled it
            return 0
        except OSError:
            return len(data)

    def _keep(self, data: bytes) -> None:
        if len(self._kept) + len(data) > _MOST_BYTES:
            self._lost += 1
        else:
            self._kept += data
        if self._thread is None:
            # A daemon's: it may never come back from its write.
            thread = threading.Thread(target=self._pass_on, name="stderr", daemon=True)
            with contextlib.suppress(RuntimeError):  # there is none to be had: with the next write
                thread.start()
                self._thread = thread

    def _pass_on(self) -> None:
        while data := self._next():
            self._takes(None)
            written = self._written(data)
            with self._changed:
                del self._kept[:written]

    def _next(self) -> bytes:
        """What goes on next; b"" if this thread has nothing to do any more."""
        with self._changed:
            if not self._kept and self._lost:
                self._kept += self._left_out(self._lost).encode()
                self._lost = 0
            if not self._kept:
                self._thread = None
                self._changed.notify_all()
            return bytes(self._kept[:_AT_ONCE_BYTES])

    def finish(self) -> None:
        """Wait a moment until all has gone on."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None, _LAST_SECONDS)


@contextlib.contextmanager
def patient_stderr(left_out: Callable[[int], str]) -> Iterator[None]:
    """Let `sys.stderr` be such a stream, for a moment longer than this lasts."""
    stream = PatientStream(2, left_out)
    with contextlib.redirect_stderr(cast("TextIO", stream)):
        try:
            yield
        finally:
            stream.finish()
