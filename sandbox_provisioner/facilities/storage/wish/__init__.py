"""wish - any process outside; pure: how much a kernel may write, on what kind of file system."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from sandbox_provisioner.units import at_least

_LEAST_BYTES = 1 << 20
LEAST_INODES = 128


class DiskBackend(StrEnum):
    """What holds a limit of the disk: TMPFS is memory, IMAGE a file system in a file of root's,
    PROJECT a folder of root's with a project quota. AUTO is the best of them that the host has for
    who asks. BTRFS would be a quota group, and is refused with the reason (`facts.py`)."""

    TMPFS = "tmpfs"
    IMAGE = "image"
    PROJECT = "project"
    BTRFS = "btrfs"
    AUTO = "auto"


# What can hold more than one box.
KEEPING = (DiskBackend.AUTO, DiskBackend.IMAGE)


@dataclass(frozen=True, kw_only=True)
class DiskWish:
    """How much all that a kernel can write to, and that nobody has given it, may hold: *disk_bytes*
    in *inodes* files, directories and links; and how much its work directory may, with all that was
    there before and whoever writes it. None means no such limit."""

    disk_bytes: int | None = None
    inodes: int | None = None
    disk_backend: DiskBackend = DiskBackend.AUTO
    workdir_bytes: int | None = None
    workdir_inodes: int | None = None

    @property
    def limits_workdir(self) -> bool:
        """Whether there is a limit of the work directory."""
        return self.workdir_bytes is not None or self.workdir_inodes is not None

    def check_disk(self) -> None:
        """Refuse what is too small for a kernel to start in."""
        at_least("disk_limit", self.disk_bytes, _LEAST_BYTES, 'Use at least "1M".')
        least = f"Use at least {LEAST_INODES}."
        at_least("inode_limit", self.inodes, LEAST_INODES, least)
        at_least("workdir_limit", self.workdir_bytes, _LEAST_BYTES, 'Use at least "1M".')
        at_least("workdir_inode_limit", self.workdir_inodes, LEAST_INODES, least)
