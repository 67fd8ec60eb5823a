"""broker/mapped.py - the daemon: a mount of something of root's, with the ids that a box has.

A launcher makes it, as it makes those of a start: it takes a process in a user namespace. The mount
is attached nowhere, and ends with whoever has it last.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sandbox_provisioner import orders
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.stem import stem

_TARGET = "/.mapped"


def mapped(directory: int, maps: tuple[str, str]) -> int:
    """A descriptor of a mount of *directory*, whose ids are mapped by *maps*, lines of uid_map and
    of gid_map; HostError. Not on an event loop."""
    with ThreadPoolExecutor(1) as own:
        return own.submit(asyncio.run, _mapped(directory, maps)).result()


async def _mapped(directory: int, maps: tuple[str, str]) -> int:
    performer = Performer()
    try:
        performer.ask(stem)
        await performer.here()
        plan = orders.compile_mapped_mount(_TARGET, *maps)
        performer.begin(plan, (directory,))
        fds = await performer.opened()
        if not fds:
            failure = performer.report.failure
            raise HostError(
                attempt="show what was laid aside",
                answer=failure.text if failure else "the launcher for it has ended",
                remedy="Ask the administrator: jupyter sandbox doctor",
            )
        return fds[0]
    finally:
        await performer.end()
