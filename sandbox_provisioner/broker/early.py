"""broker/early.py - the daemon: what an answer needs that can be found out before all is heard.

Who asks is looked up while the question is on its way. A server calls before it has made its wish
(`launcher.py`), which takes it some milliseconds; what is no wish comes with the connection. So
where nothing has come when it is known who asks, a start is on its way, and the host is
looked at meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future, wait

from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.host import Ground

# A wish that takes its writer longer finds the host as it is by then.
_FRESH_SECONDS = 1.0


class Early:
    """For one question, and who asks it, until it is closed."""

    def __init__(self) -> None:
        self._peer: Future[Peer] = Future()
        self._ground: Future[Ground] | None = None
        self._eyes: Eyes | None = None
        self._since = 0.0

    def look(self, who: Callable[[], Peer], starts: Callable[[], bool]) -> None:
        """In a thread: look up *who* asks, and, if a start is on its way then, all the rest: beside
        one that has come it would only take the interpreter from it. What cannot be had now the
        start itself looks for, and tells."""
        try:
            self._peer.set_result(peer := who())
        except BaseException as error:
            self._peer.set_exception(error)
            return
        if starts():
            self._look_on(peer)

    def _look_on(self, peer: Peer) -> None:
        self._since, ground = time.monotonic(), Future[Ground]()
        self._ground = ground
        try:
            found = Ground.probe()
            with contextlib.suppress(Exception):  # such as that no thread is to be had
                eyes = Eyes.of(peer)
                eyes.begin()
                self._eyes = eyes
            ground.set_result(found)
        except Exception as error:
            ground.set_exception(error)

    async def peer(self) -> Peer:
        """Who asks; raises what was wrong with that."""
        return await asyncio.wrap_future(self._peer)

    def ground(self) -> Ground:
        """What is so here, as it was seen a moment before, or is now; in a thread."""
        if self._ground and time.monotonic() - self._since < _FRESH_SECONDS:
            return self._ground.result()
        return Ground.probe()

    def eyes(self, peer: Peer) -> Eyes:
        """Those of the *peer*, who asks; nobody else has them. In a thread."""
        if self._ground:
            wait([self._ground])
        eyes, self._eyes = self._eyes, None
        return eyes or Eyes.of(peer)

    def close(self) -> None:
        """Let eyes that nobody has taken end."""
        if self._eyes:
            self._eyes.end()
