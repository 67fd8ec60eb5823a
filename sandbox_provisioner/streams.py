"""streams.py - in the launching process: what a `Stdio` means in descriptors."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import IO, Any

from sandbox_provisioner.contract import Stdio


class Streams:
    """What a `Stdio` means in descriptors: *theirs* for 0, 1 and 2, and *pipes*, our ends of those
    that the caller asked for."""

    def __init__(self, stdio: Stdio) -> None:
        self.pipes: list[IO[bytes]] = []
        self.theirs: list[int] = []
        self._made: list[int] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for number, wish in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)):
                self.theirs.append(self._descriptor(number, wish))
            undo.pop_all()

    def _descriptor(self, number: int, wish: int | IO[Any] | None) -> int:
        if wish is None and is_stream(number):
            return number
        if wish == subprocess.STDOUT:
            return self.theirs[1]
        if wish == subprocess.PIPE:
            read_end, write_end = os.pipe()
            mine, fd = (write_end, read_end) if number == 0 else (read_end, write_end)
            self.pipes.append(os.fdopen(mine, "rb" if number else "wb", buffering=0))
        elif wish is None or wish == subprocess.DEVNULL:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        else:
            return wish if isinstance(wish, int) else wish.fileno()
        self._made.append(fd)
        return fd

    def sent(self) -> None:
        """Close what was made for the other side, once it has it."""
        for fd in self._made:
            os.close(fd)
        self._made.clear()

    def close(self) -> None:
        """Close all of it: nobody gets it."""
        self.sent()
        for pipe in self.pipes:
            pipe.close()


def is_stream(number: int) -> bool:
    """Whether *number* is a stream, which children inherit. Where one was closed, a socket or a
    counter of somebody's may lie there now, which they do not."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False
