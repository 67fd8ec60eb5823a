"""off_loop.py - any process outside: what may block, in threads beside the event loop.

A server's loop serves all its users. Files of /proc, of cgroups and of a runtime directory may take
long where the machine is busy or short of memory; no event tells when they would not.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sandbox_provisioner.descriptors import keep_from_children

_Value = TypeVar("_Value")
# They wait more than they compute; more of them would only keep the interpreter from the loop.
_THREADS = 4


class _Pool:
    """A few threads for all event loops of this process: jupyter_client's blocking managers bring a
    new loop with every call, whose own executor would start its threads anew."""

    def __init__(self) -> None:
        self.forget()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked there are no threads."""
        self.executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="sandbox")


_pool = _Pool()


async def off_loop(function: Callable[..., _Value], *arguments: object) -> _Value:
    """What *function* returns or raises, called in a thread.

    Who is cancelled meanwhile gets to know it when *function* has returned: what it has made can be
    undone only then.
    """
    loop = asyncio.get_running_loop()
    future = loop.run_in_executor(_pool.executor, lambda: function(*arguments))
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([future])
        if not future.cancelled():
            future.exception()  # or it would be logged as one that nobody has seen
        raise
