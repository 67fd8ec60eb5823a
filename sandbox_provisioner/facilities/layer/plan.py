"""facilities/layer/plan.py - pure: what a kernel installs, where that is kept on the disk.

It is one folder of `layers/kept.py`, or an image of `layers/disks.py`: "base" shows as ~/.local,
and over another root than the host's "upper" and "work" are the upper part of its overlay
(`facilities/root/inside/layer.py`). An earlier kernel may have written anything into it.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.plan import HOME, LAYER, OWN_BASE, Start, Step
from sandbox_provisioner.spec import relative
from sandbox_provisioner.units import format_bytes

REMEDY = "Begin with an empty one: jupyter sandbox layer reset. See docs/layers.md."


def check(start: Start) -> None:
    """SpecError for a work directory that would hide it."""
    workdir = start.site.workdir.path
    if start.request.spec.keeps_layer and workdir and relative(OWN_BASE, workdir) is not None:
        raise SpecError(
            attempt=f"keep what is installed in {OWN_BASE}",
            answer=f"the work directory {workdir} shows in place of {HOME}",
            remedy='Work in another directory, or set layer to "auto".',
        )


def receive(start: Start) -> tuple[str, ...]:
    """The name of what the launcher is given for it, where it is an image."""
    return (f"mount:{LAYER}",) if start.keeps_layer and start.site.layer_storage else ()


def take(start: Start) -> Iterator[Step]:
    """Its ids as the box has them."""
    if not start.keeps_layer:
        return
    why = f'what is installed, kept on the disk: layer = "{start.request.spec.layer.value}"'
    storage, words = start.site.layer_storage, ("nosuid", "nodev")
    if storage:
        why += f", in a file system of {format_bytes(storage.size_bytes)}"
        yield Step("take-mount", (LAYER, f"idmap-top={start.map_of_box}", *words), why, REMEDY)
    else:
        mapped = ("idmap=layer",) if start.site.facts.privileged else ()
        yield Step("take-place", (LAYER, *mapped, *words), why, REMEDY)


def attach(start: Start) -> Iterator[Step]:
    """When there is a home."""
    if not start.keeps_layer:
        return
    if not start.site.root.is_own:
        yield Step("take-base", (LAYER, OWN_BASE), "of a layer over the host's root no more counts")
    yield Step("attach", (OWN_BASE,), "what is installed is found there, and kept", REMEDY)
    storage = start.site.storage
    if start.site.layer_storage and not (storage and storage.is_on_disk):
        yield Step("watch-folder", (OWN_BASE, "disk_limit"), "it has a file system of its own")
