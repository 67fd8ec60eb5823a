"""gateway/sentences.py - runs in the gateway: what the person is told, and how often.

PID 1 of the box writes it to the kernel's standard error. If it does not read, what is said is
lost.

May import: facilities.network.tell.pace, inside.printable, inside.wire, loop.
"""

from __future__ import annotations

import contextlib
import socket

from sandbox_provisioner.facilities.network.tell.pace import Pace
from sandbox_provisioner.gateway.loop import Loop
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line

_MOST_BYTES = 1000


class Sentences:
    """Those about one box, to its PID 1 at *channel*."""

    def __init__(self, loop: Loop, channel: socket.socket) -> None:
        self._loop = loop
        self._channel = channel
        self._pace = Pace(loop.now)

    def say(self, about: str, sentence: str) -> None:
        """Say it, unless something was said about the same within a minute, or too much in all."""
        if not self._pace.may_say(about, self._loop.now):
            return
        text = one_line(sentence).encode()[:_MOST_BYTES].decode(errors="ignore")
        with contextlib.suppress(OSError):
            self._channel.send(wire.message(wire.SAY, text), socket.MSG_DONTWAIT)
