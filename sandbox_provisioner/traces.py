"""traces.py - any process outside: what a sandbox has of this host, and the one way to remove it.

Whoever undoes a start that has failed, closes a handle, sweeps after a dead server or is asked to
clean up removes the same, in the same order: `Traces.removing`. They differ in how they wait for
processes to leave the groups: a server does it without its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass

from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.facilities.storage import folders, images
from sandbox_provisioner.facilities.storage.wish import DiskBackend
from sandbox_provisioner.layers.review import settle
from sandbox_provisioner.locks import Locked
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.records import Record, RecordFolder
from sandbox_provisioner.stand_ins import remove_stand_ins

_AGAIN_SECONDS = 0.01
_IMAGE_SECONDS = 1.0
# A kernel may have left millions of files. What takes longer a thread goes on with.
_FOLDER_SECONDS = 1.0


def _sweep_images() -> None:
    """Whoever has the folder locked sweeps as well; and the next start finds images without us."""
    with contextlib.suppress(Locked):
        images.sweep()


def _remove_folder(name: str) -> None:
    """The same of a folder."""
    with contextlib.suppress(Locked, FileNotFoundError):
        folders.end(name, _FOLDER_SECONDS)
    folders.remove_on()


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Of a sandbox that is ours, or nobody's any more, and has ended: its groups, with *kill* what
    may be left in them; its *folder* with sockets, links and ids, and by its *record* its
    stand-ins. What is None was not made. *settle* looks at what was laid aside."""

    tree: CgroupTree | None
    kill: bool
    folder: RecordFolder | None = None
    record: Record | None = None
    settle: Callable[[str], None] = settle

    def removing(self) -> Generator[float]:
        """Remove them, each whatever becomes of the others; gives, as often as processes are still
        in the groups or the image is still mounted, the seconds that one may wait for them."""
        with ExitStack() as stack:
            stack.push(self._end_folder)
            if self.record and self.record.review:
                stack.callback(self.settle, self.record.review)
            if self.folder and self.record:
                stack.callback(remove_stand_ins, self.folder.path.parent, self.record)
            if self._image:
                stack.callback(_sweep_images)
            if self._folder:
                stack.callback(_remove_folder, self._folder)
            if self.tree:
                try:
                    if self.kill:
                        self.tree.kill()
                finally:
                    yield from self.tree.removing()
            yield from self._without_image()

    @property
    def _image(self) -> str:
        """The name of its image, "" where it has none: of what limits its disk, or of a layer."""
        if self.record is None:
            return ""
        name = os.path.basename(self.record.tree)
        has_limit = self.record.storage == DiskBackend.IMAGE
        return name if has_limit or images.is_there(name) else ""

    @property
    def _folder(self) -> str:
        """The name of the folder with a limit that its box writes to, "" where it has none."""
        if self.record is None or self.record.storage != DiskBackend.PROJECT:
            return ""
        return os.path.basename(self.record.tree)

    def _without_image(self) -> Generator[float]:
        """Wait until nobody has its image, or folder, which Linux lets go of a moment after the
        last process has ended: `_sweep_images` finds it then. One that is had for longer the next
        start sweeps."""
        deadline = time.monotonic() + _IMAGE_SECONDS
        while (
            (self._image and images.is_held(self._image))
            or (self._folder and folders.is_held(self._folder))
        ) and (left := deadline - time.monotonic()) > 0:
            yield left

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
                if self.tree:
                    await self.tree.pause(left)
                else:
                    await asyncio.sleep(min(_AGAIN_SECONDS, left))
        finally:
            await off_loop(steps.close)  # where it was cancelled

    def remove_now(self) -> None:
        """Remove them, where there is no event loop and nothing else to do."""
        for left in self.removing():
            time.sleep(min(_AGAIN_SECONDS, left))
