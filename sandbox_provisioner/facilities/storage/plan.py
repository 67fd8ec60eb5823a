"""facilities/storage/plan.py - pure: the file system that holds a limit of the disk."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import DISK, SCRATCH, Kind, Start, Step
from sandbox_provisioner.units import format_bytes

_REMEDY = (
    "See what the machine's log tells of its file systems and loop devices; with disk_backend = "
    '"tmpfs" it is memory.'
)


def _is_mounted(start: Start) -> bool:
    """Whether the launcher is given the mount of an image or a folder for it."""
    storage = start.site.storage
    return bool(storage and storage.is_on_disk and start.kind is not Kind.CLAIM)


def receive(start: Start) -> tuple[str, ...]:
    """The name of what the launcher is given for it."""
    return (f"mount:{SCRATCH}",) if _is_mounted(start) else ()


def mount(start: Start) -> Iterator[Step]:
    """Its ids as the box has them. A spare has it from before it is claimed."""
    if _is_mounted(start):
        storage = start.site.storage
        assert storage
        size = format_bytes(storage.size_bytes)
        why = f"a file system of {size} for all that it writes: disk_limit"
        if storage.is_folder:
            why = f"a folder that holds {size}, by a project quota, for all that it writes"
        ids = DISK if storage.is_folder else start.map_of_box
        words = (SCRATCH, f"idmap-top={ids}", "nosuid", "nodev")
        yield Step("take-mount", words, why, _REMEDY)
