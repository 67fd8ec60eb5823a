"""gateway/sentences.py - runs in the gateway: what the person is told, and how often.

PID 1 of the box writes it to the kernel's standard error. If it does not read, what is said is
lost.

May import: inside.printable, inside.wire, loop, meter.
"""

from __future__ import annotations

import contextlib
import socket

from sandbox_provisioner.gateway.loop import Loop
from sandbox_provisioner.gateway.meter import Bucket
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line

AGAIN_SECONDS = 60.0
_AT_ONCE = 10
_PER_SECOND = 1 / 5
_MOST_KNOWN = 256
_MOST_BYTES = 1000


class Sentences:
    """Those about one box, to its PID 1 at *channel*."""

    def __init__(self, loop: Loop, channel: socket.socket) -> None:
        self._loop = loop
        self._channel = channel
        self._said: dict[str, float] = {}
        self._budget = Bucket(_PER_SECOND, _AT_ONCE, loop.now)

    def say(self, about: str, sentence: str) -> None:
        """Say it, unless something was said about the same within a minute, or too much in all."""
        now = self._loop.now
        if now - self._said.get(about, now - AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        if not self._budget.available(now):
            return
        self._budget.take(1)
        self._said.pop(about, None)
        self._said[about] = now
        if len(self._said) > _MOST_KNOWN:
            del self._said[next(iter(self._said))]
        text = one_line(sentence).encode()[:_MOST_BYTES].decode(errors="ignore")
        with contextlib.suppress(OSError):
            self._channel.send(wire.message(wire.SAY, text), socket.MSG_DONTWAIT)
