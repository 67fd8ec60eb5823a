"""channel.py - runs in PID 1: hears what the gateway has to say, and of its end.

May import: os, select, time, inside.printable, watcher, wire. The gateway reads what programs of
the box send, so what it says is no more than text to be shown: short, printable and seldom.
"""

from __future__ import annotations

import os
import select
import time

from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.watcher import Init

_MOST_LETTERS = 1000
# So many sentences at once, and then one in so many seconds.
_SENTENCES = 10
_SECONDS_EACH = 6.0
_LOST = (
    "This kernel has no network any more: who dialed for it has ended. The kernel goes on without; "
    "a new one gets a new network."
)


class Channel(Watcher):
    """The channel to the gateway, or to who has made the box's card, as long as it is there."""

    def __init__(self, fd: int, *, is_network: bool) -> None:
        """*is_network*: with its end the network has ended, too."""
        self._fd = fd
        self._is_network = is_network
        self._left = float(_SENTENCES)
        self._since = time.monotonic()

    def waits(self) -> Iterable[tuple[int, int]]:
        """Nothing when the gateway has ended."""
        return ((self._fd, select.POLLIN),) if self._fd >= 0 else ()

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Pass on what it says, and tell of its end, once."""
        if self._fd not in ready:
            return
        if told := self._read():
            word, sentence = wire.parts(told)
            if word == wire.SAY and self._may_speak():
                init.say(one_line(sentence[:_MOST_LETTERS]))
            return
        os.close(self._fd)
        self._fd = -1
        if self._is_network:
            init.say(_LOST)
            init.tell(wire.NETWORK_LOST)

    def _read(self) -> bytes:
        """A message; b"" at the end, also where it has left unread what we had told it."""
        try:
            return os.read(self._fd, wire.LONGEST)
        except ConnectionResetError:
            return b""

    def _may_speak(self) -> bool:
        now = time.monotonic()
        self._left = min(_SENTENCES, self._left + (now - self._since) / _SECONDS_EACH)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
