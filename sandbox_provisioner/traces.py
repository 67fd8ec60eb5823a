"""traces.py - any process outside: what a sandbox has of this host, and the one way to remove it.

Whoever undoes a start that has failed, closes a handle, sweeps after a dead server or is asked to
clean up removes the same, in the same order: `Traces.removing`. They differ in how they wait for
processes to leave the groups: a server does it without its event loop.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack
from dataclasses import dataclass

from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.stand_ins import remove_stand_ins

_AGAIN_SECONDS = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Of a sandbox that is ours, or nobody's any more, and has ended: its groups, with *kill* what
    may be left in them; its *folder* with sockets, links and ids, and by its *record* its
    stand-ins. What is None was not made."""

    tree: CgroupTree | None
    kill: bool
    folder: RecordFolder | None = None
    record: Record | None = None

    def removing(self) -> Generator[float]:
        """Remove them, each whatever becomes of the others; gives, as often as processes are still
        in the groups, the seconds that one may wait for them."""
        with ExitStack() as stack:
            stack.push(self._end_folder)
            if self.folder and self.record:
                stack.callback(remove_stand_ins, self.folder.path.parent, self.record)
            if self.tree:
                try:
                    if self.kill:
                        self.tree.kill()
                finally:
                    yield from self.tree.removing()

    def _end_folder(self, failed: type[BaseException] | None, *_: object) -> None:
        """The folder goes last, and stays where anything else does: by it the next sweep finds
        what is left."""
        if self.folder and failed:
            self.folder.release()
        elif self.folder:
            self.folder.remove()

    async def remove(self) -> None:
        """Remove them, off the event loop."""
        steps = self.removing()
        try:
            while (left := await off_loop(next, steps, None)) is not None:
                assert self.tree
                await self.tree.pause(left)
        finally:
            await off_loop(steps.close)  # where it was cancelled

    def remove_now(self) -> None:
        """Remove them, where there is no event loop and nothing else to do."""
        for left in self.removing():
            time.sleep(min(_AGAIN_SECONDS, left))
