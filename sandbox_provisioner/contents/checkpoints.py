"""contents/checkpoints.py - the Jupyter server: checkpoints of files, through no link."""

from __future__ import annotations

import os

from anyio.to_thread import run_sync
from jupyter_core.paths import jupyter_runtime_dir
from jupyter_server.services.contents.filecheckpoints import AsyncFileCheckpoints

from sandbox_provisioner.contents.beneath import Beneath, move
from sandbox_provisioner.contents.manager import ByDescriptor


class SandboxCheckpoints(ByDescriptor, AsyncFileCheckpoints):
    """AsyncFileCheckpoints, whose directory a kernel can replace by a link as any other."""

    def beneath(self, os_path: str) -> Beneath:
        """The files' own root, or that for files in directories that cannot be written to."""
        own = Beneath(_own_root())
        return own if own.holds(os_path) else Beneath(self.root_dir)

    def checkpoint_path(self, checkpoint_id: str, path: str) -> str:
        """Called for all that is done with a checkpoint; its directory is made."""
        os_path = self._get_os_path(path.strip("/"))
        folder, name = os.path.split(os_path)
        stem, extension = os.path.splitext(name)
        directory = os.path.join(folder, self.checkpoint_dir)
        if not os.access(folder, os.W_OK):
            # The base class takes a folder of a fixed name in /tmp, which is everybody's.
            os.makedirs(_own_root(), mode=0o700, exist_ok=True)
            directory = os.path.join(_own_root(), os.path.relpath(folder, self.root_dir))
        with self.perm_to_403(directory):
            self.beneath(directory).make_directories(directory)
        return os.path.join(directory, f"{stem}-{checkpoint_id}{extension}")

    async def rename_checkpoint(self, checkpoint_id: str, old_path: str, new_path: str) -> None:
        """Called when a file was renamed."""
        old_path = self.checkpoint_path(checkpoint_id, old_path)
        new_path = self.checkpoint_path(checkpoint_id, new_path)
        with self.entry(old_path) as old, self.entry(new_path) as new:
            if old.status():
                await run_sync(move, old, new)

    async def delete_checkpoint(self, checkpoint_id: str, path: str) -> None:
        """Called when a file was deleted, and by a person."""
        with self.entry(self.checkpoint_path(checkpoint_id, path)) as entry:
            if not entry.status():
                self.no_such_checkpoint(path, checkpoint_id)
            await run_sync(entry.remove)


def _own_root() -> str:
    return os.path.join(jupyter_runtime_dir(), "sandbox-checkpoints")
