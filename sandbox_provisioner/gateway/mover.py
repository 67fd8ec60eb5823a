"""gateway/mover.py - runs in the gateway: bytes from one socket to another, unseen.

splice(2) moves them by way of a pipe, and copies none. A pipe is held by a connection only as long
as there is something in it, which a receiver that does not read makes long: so a box has but a
share of all pipes, and who gets none copies a little at a time.

Linux counts the pages of all pipes of a user (pipe(7), /proc/sys/fs/pipe-user-pages-soft: 16384 by
default), and gives one that has more pipes of two pages each; all of ours have a quarter of that.

May import: nothing of ours.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from dataclasses import dataclass, field
from typing import NamedTuple

CHUNK_BYTES = 1 << 18
COPIED_BYTES = 1 << 14
_MOST_PIPES = 64
_SHARE = 8
_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class Pipe(NamedTuple):
    """Its two ends."""

    read: int
    write: int

    def close(self) -> None:
        """Both."""
        os.close(self.read)
        os.close(self.write)


@dataclass(slots=True)
class Pipes:
    """All pipes of this process: the free ones, and how many there are."""

    free: list[Pipe] = field(default_factory=list)
    count: int = 0

    def take(self) -> Pipe | None:
        """An empty one; None where there are enough already, or none can be had."""
        if self.free:
            return self.free.pop()
        if self.count >= _MOST_PIPES:
            return None
        try:
            pipe = Pipe(*os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError:  # no descriptor is left
            return None
        with contextlib.suppress(OSError):  # a small one does as well
            fcntl.fcntl(pipe.write, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        self.count += 1
        return pipe

    def put(self, pipe: Pipe) -> None:
        """It is empty again."""
        self.free.append(pipe)

    def drop(self, pipe: Pipe) -> None:
        """There is something in it that nobody wants."""
        pipe.close()
        self.count -= 1


@dataclass(slots=True)
class Share:
    """The pipes that one box may hold at a time."""

    pipes: Pipes
    held: int = 0

    def take(self) -> Pipe | None:
        """As `Pipes.take`; None also where the box holds its share."""
        pipe = self.pipes.take() if self.held < _SHARE else None
        self.held += pipe is not None
        return pipe

    def put(self, pipe: Pipe) -> None:
        """It is empty again."""
        self.held -= 1
        self.pipes.put(pipe)

    def drop(self, pipe: Pipe) -> None:
        """There is something in it that nobody wants."""
        self.held -= 1
        self.pipes.drop(pipe)


class Way:
    """One direction of a connection: what has left *source* and has not come to *sink* yet."""

    __slots__ = ("_in_pipe", "_pending", "_pipe", "_share", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket, share: Share) -> None:
        self.source = source
        self.sink = sink
        self._share = share
        self._pending = b""
        self._pipe: Pipe | None = None
        self._in_pipe = 0

    @property
    def is_empty(self) -> bool:
        """Whether all has come to the sink."""
        return not self._pending and not self._in_pipe

    def add(self, data: bytes) -> None:
        """Bytes that were read from the source, and judged."""
        self._pending += data

    def take(self, most: int) -> int:
        """Read at most *most* bytes; 0 is the source's end. BlockingIOError if there are none."""
        self._pipe = self._share.take()
        if self._pipe is None:
            data = self.source.recv(min(most, COPIED_BYTES))
            self._pending = data
            return len(data)
        try:
            count = os.splice(
                self.source.fileno(), self._pipe.write, min(most, CHUNK_BYTES), flags=_FLAGS
            )
        except OSError:
            self._put_back()
            raise
        self._in_pipe = count
        if not count:
            self._put_back()
        return count

    def flush(self) -> None:
        """Send what is on its way, as far as the sink takes it."""
        with contextlib.suppress(BlockingIOError):
            if self._pending:
                self._pending = self._pending[self.sink.send(self._pending) :]
            while self._in_pipe and self._pipe is not None:
                self._in_pipe -= os.splice(
                    self._pipe.read, self.sink.fileno(), self._in_pipe, flags=_FLAGS
                )
            if self._pipe is not None:
                self._put_back()

    def _put_back(self) -> None:
        if self._pipe is not None:
            self._share.put(self._pipe)
            self._pipe = None

    def close(self) -> None:
        """Whatever is still on its way is lost."""
        if self._pipe is not None:
            self._share.drop(self._pipe)
            self._pipe = None
        self._pending, self._in_pipe = b"", 0
