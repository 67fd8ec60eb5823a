"""options.py - in the server, pure: what users write of a limit of the disk."""

from __future__ import annotations

from traitlets import Enum, HasTraits, Integer, Unicode, Union

from sandbox_provisioner.facilities.storage.wish import DiskBackend, DiskWish
from sandbox_provisioner.units import parse_bytes


class DiskOptions(HasTraits):
    """What users write."""

    disk_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="How much /tmp, /run, the private home directory and whatever else a kernel can write "
        "to may hold together, but for its work directory and volumes. Under a root server it is "
        "on disk; otherwise memory, which counts towards mem_limit (docs/storage.md). None: "
        "tmp_limit.",
    ).tag(
        config=True,
        flag="disk-limit",
        fields=("limits.disk_bytes",),
        default="`tmp_limit`",
    )
    inode_limit = Integer(
        None,
        allow_none=True,
        help="How many files, directories and links there may be in the same places.",
    ).tag(
        config=True,
        flag="inode-limit",
        fields=("limits.inodes",),
        default="one for each 4 KiB in memory, 8 KiB on disk",
    )
    disk_backend = Enum(
        [backend.value for backend in DiskBackend],
        default_value=DiskBackend.AUTO.value,
        help='What holds disk_limit: "tmpfs" is memory, "image" a file system in a file of '
        'root\'s, "project" a folder of root\'s with a project quota of XFS or ext4, "auto" the '
        'best that is to be had; "btrfs" is refused with the reason (docs/storage.md).',
    ).tag(
        config=True,
        flag="disk-backend",
        fields=("limits.disk_backend",),
    )
    workdir_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="How much the work directory may hold, with what is there and whoever writes it: a "
        "project quota of XFS or ext4, which root sets, and which stays when the kernel has ended "
        "(docs/storage.md). Refused where its file system keeps none.",
    ).tag(
        config=True,
        flag="workdir-limit",
        fields=("limits.workdir_bytes",),
        default="none",
    )
    workdir_inode_limit = Integer(
        None,
        allow_none=True,
        help="How many files, directories and links there may be in it.",
    ).tag(
        config=True,
        flag="workdir-inode-limit",
        fields=("limits.workdir_inodes",),
        default="none",
    )


def disk_wish(options: DiskOptions) -> DiskWish:
    """What *options* come to; SpecError."""
    disk, workdir = options.disk_limit, options.workdir_limit
    return DiskWish(
        disk_bytes=None if disk is None else parse_bytes("disk_limit", disk),
        inodes=options.inode_limit,
        disk_backend=DiskBackend(options.disk_backend),
        workdir_bytes=None if workdir is None else parse_bytes("workdir_limit", workdir),
        workdir_inodes=options.workdir_inode_limit,
    )
