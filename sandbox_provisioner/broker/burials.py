"""broker/burials.py - the daemon: what is being ended and removed, which nobody finds any more.

Who waits for an end may be cancelled: a connection is closed, a server that has ended takes with it
whoever was ending its kernels. Who removes something is not: nobody else would do it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine
from typing import Any


class Burials:
    """Those that have begun, each in a task of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, burial: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
        """Let it be done; what waits for it, and may be cancelled."""
        task = asyncio.create_task(burial)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return asyncio.shield(task)

    async def over(self) -> None:
        """Return when all are, also those that others have begun."""
        while self._tasks:
            await asyncio.wait(self._tasks)


async def broken_off(tasks: Collection[asyncio.Task[None]]) -> None:
    """Have *tasks* undo what they are at, and wait for it; by whoever comes here first, since a
    second cancellation, which `asyncio.gather` hands on as well, would break off the undoing."""
    for task in tasks:
        if not task.cancelling():
            task.cancel()
    if tasks:
        await asyncio.wait(tasks)
