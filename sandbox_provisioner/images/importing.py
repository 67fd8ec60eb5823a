"""importing.py - in who makes images, with that person's rights: of an OCI image one of ours."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.images import oci
from sandbox_provisioner.images.oci import is_oci
from sandbox_provisioner.images.squash import squash
from sandbox_provisioner.images.store import Image, Store, check_name, store_of
from sandbox_provisioner.images.tree import Bounds

__all__ = ["import_image", "is_oci", "unpacked"]
Progress = Callable[[int, int], None]
# The names that `rootfs = PATH` gives.
_OF_PATHS = "oci-"


def import_image(
    name: str, path: str, store: Store, bounds: Bounds, tell: Progress
) -> tuple[Image, int]:
    """Make what lies at *path* the image *name* of *store*; it, and how many entries of it no box
    could use. SandboxError, and nothing of it is kept then."""
    check_name(name)
    store.prepare()
    with store.building(name), store.workplace() as work, oci.opened(path, bounds) as source:
        tree, left_out = oci.tree_of(source, bounds)
        file = work / "image"
        squash(tree, source.layers, file, tree.latest(), tell)
        image = store.add(
            file,
            name=name,
            origin=f"{os.path.abspath(path)} (sha256:{source.digest[:12]})",
            python=oci.python_in(tree, source.environment),
        )
    return image, left_out


def unpacked(path: str, caller: Caller) -> Path:
    """What the OCI image at *path* comes to, made if it is not there from before: it is
    found again by the digest of what lies there. SandboxError.

    Who launches for somebody else makes none of that one's: it would be done with other rights.
    """
    if caller.groups is not None:
        raise SpecError(
            attempt=f"use {path} as a root",
            answer="an OCI image has to be imported first, where the broker starts kernels",
            remedy="Ask the administrator: jupyter sandbox image import NAME ARCHIVE, as root.",
        )
    store, bounds = store_of(caller), Bounds()
    with oci.opened(path, bounds) as source:
        name = f"{_OF_PATHS}{source.digest[:40]}"
    image = store.image(name)
    if image is None:
        image, _ = import_image(name, path, store, bounds, lambda *_: None)
    return store.root(image)
