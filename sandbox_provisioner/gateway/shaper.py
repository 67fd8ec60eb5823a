"""gateway/shaper.py - runs in the gateway: one direction of a box's bytes, at the rate that it has.

Connections that find no room wait in a line, and go on in turn, a small amount each.

May import: connection, loop, meter, mover.
"""

from __future__ import annotations

from collections import deque

from sandbox_provisioner.gateway.connection import Connection
from sandbox_provisioner.gateway.loop import Loop, Timer
from sandbox_provisioner.gateway.meter import Rate
from sandbox_provisioner.gateway.mover import CHUNK_BYTES


class Line:
    """The direction *up*, or down, of one box; *bits* a second, 0 for as many as come."""

    def __init__(self, loop: Loop, bits: int, *, up: bool) -> None:
        self._loop = loop
        self._up = up
        self._waiting: deque[Connection] = deque()
        self._timer: Timer | None = None
        self._is_resuming = False
        self._rate = Rate(bits, loop.now) if bits else None

    def room(self) -> int:
        """How many bytes may pass now: none where others wait already."""
        if self._waiting and not self._is_resuming:
            return 0
        return self._rate.available(self._loop.now) if self._rate else CHUNK_BYTES

    @property
    def turn_bytes(self) -> int:
        """How many of them one connection may move at a time."""
        return self._rate.turn_bytes if self._rate else CHUNK_BYTES

    def passed(self, count: int) -> None:
        """They have."""
        if self._rate:
            self._rate.take(count)

    def park(self, connection: Connection) -> None:
        """Let it go on when there is room."""
        self._waiting.append(connection)
        if self._timer is None and not self._is_resuming:
            self._wake_later()

    def _wake_later(self) -> None:
        self.close()
        if self._waiting:
            seconds = self._rate.seconds_to_turn() if self._rate else 0.0
            self._timer = self._loop.later(seconds, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._is_resuming = True
        try:
            for _ in range(len(self._waiting)):
                if not self.room():
                    break
                self._waiting.popleft().resume(up=self._up)
        finally:
            self._is_resuming = False
        self._wake_later()

    def close(self) -> None:
        """Nobody goes on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
