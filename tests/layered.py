"""layered.py - in the test process: what lies where kernels keep what they install."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sandbox_provisioner.facilities.ids.facts import FOREIGN_ID
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.images.mounting import mount_image
from sandbox_provisioner.layers.kept import KeptFolder


@contextlib.contextmanager
def opened(folder: KeptFolder) -> Iterator[Path]:
    """Where on this machine what is kept in *folder* can be looked at, while no box has it."""
    if folder.is_folder:
        yield folder.path / "box"
        return
    image = images.open_image(folder.disk)
    assert image is not None
    try:
        images.take_image(image)
        (mount,) = mount_image(image, 1, lasts=True)
    finally:
        os.close(image)
    try:
        yield Path(f"/proc/self/fd/{mount}")
    finally:
        os.close(mount)


def own(path: Path, inside: int) -> None:
    """Let *path* in there belong to who is *inside* in the box, under a root server."""
    top = str(path).startswith("/proc/self/fd/")
    if os.geteuid() == 0:
        owner = inside if top else FOREIGN_ID + inside
        os.chown(path, owner, owner, follow_symlinks=False)
