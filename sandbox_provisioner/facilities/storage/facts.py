"""facts.py - who launches, reads only: what can hold a limit of the disk here.

Of what the host has, `find_storage` takes the first of this order:

    image    root: the limit holds against whatever a kernel does to the files, as that of a disk
             does; costs no memory
    project  root: a folder on XFS or ext4 with project quotas, which count what is written; shares
             the journal of the host's file system
    tmpfs    anybody: holds as well, but is memory, and counts towards the cap on it
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from sandbox_provisioner.errors import HostError, joined
from sandbox_provisioner.facilities.storage.wish import LEAST_INODES, DiskBackend, DiskWish
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import Mount, mounts_around
from sandbox_provisioner.places import Place
from sandbox_provisioner.state import STATE
from sandbox_provisioner.units import format_bytes

# The name of a folder of a layer directory with one for each person for whom root keeps something.
PEOPLE = "people"
# Where an administrator mounts a larger disk.
STORAGE = STATE / "storage"
_PROGRAMS = ("/usr/sbin", "/sbin", "/usr/bin")
PROJECT_FILESYSTEMS = ("xfs", "ext4")
_QUOTACTL_FD_SINCE = (5, 14)
_LOOP_CONTROL = "/dev/loop-control"
BLOCK_BYTES = 4096  # mke2fs(8)
_BLOCKS_OF_GROUP = 8 * BLOCK_BYTES  # a bit of one block for each
_INODES_OF_BLOCK = BLOCK_BYTES // 256
_BYTES_OF_INODE = 8192
# btrfs-subvolume(8), btrfs_ioctl_snap_create_v2: with a list of groups of its own, and no right at
# all, a process makes a subvolume that is in none of those that it should be in.
_OF_BTRFS = (
    "a program that makes a subvolume of its own leaves a quota group of btrfs, from which nothing "
    "but the system call filter would keep a kernel; nor does such a group limit inodes"
)
_ORDER = (DiskBackend.IMAGE, DiskBackend.PROJECT, DiskBackend.TMPFS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What holds the limit: *size_bytes* and *inodes*, of an image those that it is made with.
    *limits_inodes* is whether somebody has asked for so few, *lacks* why what would have been
    better cannot be had, *formatter* the program that makes file systems."""

    backend: DiskBackend
    size_bytes: int
    inodes: int | None = None
    limits_inodes: bool = False
    lacks: Mapping[DiskBackend, str] = field(default_factory=dict)
    formatter: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is a file of the host's, mounted."""
        return self.backend is DiskBackend.IMAGE

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder of the host's."""
        return self.backend is DiskBackend.PROJECT

    @property
    def is_on_disk(self) -> bool:
        """Whether it is no memory."""
        return self.is_image or self.is_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkdirQuota:
    """How much the work directory *path*, which lies on *filesystem*, may hold; None is no
    wish."""

    path: str
    filesystem: str
    size_bytes: int | None = None
    inodes: int | None = None

    @property
    def told(self) -> str:
        """The limits for people."""
        size = [format_bytes(self.size_bytes)] if self.size_bytes is not None else []
        files = [f"{self.inodes} files"] if self.inodes is not None else []
        return joined([*size, *files])


def find_storage(
    wish: DiskWish, *, privileged: bool, kernel: tuple[int, int], storage: Path = STORAGE
) -> Storage | None:
    """What holds *wish* here, with folders below *storage* and a Linux *kernel* of that version;
    None where nothing is limited, HostError where what it names cannot."""
    if wish.disk_bytes is None:
        return None
    forced = wish.disk_backend
    lacks: dict[DiskBackend, str] = {}
    for backend in _ORDER if forced is DiskBackend.AUTO else (forced,):
        lack = obstacle(backend, privileged=privileged, kernel=kernel, storage=storage)
        if not lack:
            return replace(_storage_of(backend, wish.disk_bytes, wish.inodes, storage), lacks=lacks)
        lacks[backend] = lack
    raise HostError(
        attempt=f'keep disk_limit by disk_backend = "{forced.value}"',
        answer=lacks[forced],
        remedy='Use disk_backend = "auto", which takes what there is: see jupyter sandbox doctor.',
    )


def obstacle(
    backend: DiskBackend, *, privileged: bool, kernel: tuple[int, int], storage: Path = STORAGE
) -> str:
    """Why *backend* cannot be had here, "" where it can."""
    if backend is DiskBackend.IMAGE:
        return image_obstacle(privileged=privileged)
    if backend is DiskBackend.PROJECT:
        return project_obstacle(storage, kernel, privileged=privileged)
    return _OF_BTRFS if backend is DiskBackend.BTRFS else ""


def _storage_of(
    backend: DiskBackend, size_bytes: int, inodes: int | None, storage: Path
) -> Storage:
    if backend is DiskBackend.IMAGE:
        return image_of(size_bytes, inodes)
    if backend is DiskBackend.PROJECT:
        # Quotas are in whole blocks. All folders' inodes are the host's, whoever asked for a limit.
        size = size_bytes - size_bytes % BLOCK_BYTES
        most = _usual_inodes(size, storage) if inodes is None else inodes
        return Storage(backend=backend, size_bytes=size, inodes=most)
    return Storage(backend=backend, size_bytes=size_bytes, inodes=inodes)


def _usual_inodes(size_bytes: int, storage: Path) -> int:
    """No more than is the share of *size_bytes* of what the disk has: with more, those who fill it
    by halves would have all of its inodes."""
    disk = os.statvfs(_there(storage))
    share = disk.f_files * size_bytes // max(1, disk.f_blocks * disk.f_frsize)
    return max(LEAST_INODES, min(size_bytes // _BYTES_OF_INODE, share))


def _there(path: Path) -> Path:
    """*path*, or of what it lies in the first that is there."""
    return next(one for one in (path, *path.parents) if one.exists())


def project_obstacle(storage: Path, kernel: tuple[int, int], *, privileged: bool) -> str:
    """Why no project quota can hold a folder below *storage*, "" where one can."""
    if not privileged:
        return "only the machine's root may set a project quota"
    there = _there(storage)
    fd = os.open(there, os.O_PATH | os.O_CLOEXEC)
    try:
        mount, _ = mounts_around(fd, str(there))
        lack = workdir_obstacle(mount, kernel) or not_enforced(fd)
    finally:
        os.close(fd)
    return f"there can be none in {storage}: {lack}" if lack else ""


def not_enforced(fd: int) -> str:
    """Why Linux would not hold the limit of a project on the file system of *fd*, "" where it
    would. What a file system is mounted with tells neither that nor whether one may ask."""
    try:
        enforced = kernel_calls.enforces_projects(fd)
    except OSError as error:
        return f"Linux does not tell whether it holds such a limit ({error})"
    return "" if enforced else "limits of projects are switched off there (quotaoff)"


def image_obstacle(*, privileged: bool) -> str:
    """Why there can be no images here, "" where there can."""
    if not privileged:
        return "only the machine's root may mount a file system that is in a file"
    if not formatter():
        return "mkfs.ext4 is not installed (the package e2fsprogs)"
    if not _is_device(_LOOP_CONTROL):
        return f"{_LOOP_CONTROL} is missing: this machine has no loop devices"
    return ""


def formatter() -> str:
    """The absolute path of mkfs.ext4, "" where there is none."""
    return tool("mkfs.ext4")


def tool(name: str) -> str:
    """The same of a program of e2fsprogs: a PATH is no place to look for what root runs."""
    paths = (f"{folder}/{name}" for folder in _PROGRAMS)
    return next((path for path in paths if os.access(path, os.X_OK)), "")


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def find_workdir_quota(
    wish: DiskWish, workdir: Place, kernel: tuple[int, int], *, privileged: bool
) -> WorkdirQuota | None:
    """What *wish* asks for *workdir*, None where it asks for nothing; HostError where that cannot
    be held here."""
    if not wish.limits_workdir or not workdir.source:
        return None
    check_workdir_rights(wish, privileged=privileged)
    if obstacle := workdir_obstacle(workdir.mount, kernel):
        raise HostError(
            attempt=f"limit the work directory {workdir.path}",
            answer=obstacle,
            remedy="Leave out workdir_limit, or have what jupyter sandbox doctor tells of it.",
        )
    return WorkdirQuota(
        path=workdir.path,
        filesystem=workdir.filesystem,
        size_bytes=wish.workdir_bytes,
        inodes=wish.workdir_inodes,
    )


def check_workdir_rights(wish: DiskWish, *, privileged: bool) -> None:
    """HostError where who launches may set no limit of a directory."""
    if wish.limits_workdir and not privileged:
        raise HostError(
            attempt="limit the work directory",
            answer="only the machine's root may set such a limit",
            remedy='Use launcher = "broker", or leave out workdir_limit.',
        )


def workdir_obstacle(mount: Mount, kernel: tuple[int, int]) -> str:
    """Why a directory on *mount* can have no limit, "" if it can."""
    if mount.filesystem not in PROJECT_FILESYSTEMS:
        return f"its file system, {mount.filesystem}, keeps no limit of one directory"
    if not mount.limits_projects:
        return f"its {mount.filesystem} at {mount.path} is mounted without prjquota"
    if kernel < _QUOTACTL_FD_SINCE:
        return "Linux 5.14 or newer is needed for it"
    return ""


def image_of(size_bytes: int, inodes: int | None = None) -> Storage:
    """An image of that size. ext4 has as many inodes in each group of blocks, in whole blocks:
    rounded down, it has never more than asked for."""
    size = size_bytes - size_bytes % BLOCK_BYTES
    groups = -(-size // (BLOCK_BYTES * _BLOCKS_OF_GROUP))
    step = groups * _INODES_OF_BLOCK
    wished = size // _BYTES_OF_INODE if inodes is None else inodes
    if inodes is not None and inodes < step:
        raise HostError(
            attempt=f"keep inode_limit = {inodes} in an image of {format_bytes(size)}",
            answer=f"its file system has at least {step}",
            remedy=f"Use inode_limit = {step} or more, a smaller disk_limit, or "
            'disk_backend = "tmpfs".',
        )
    return Storage(
        backend=DiskBackend.IMAGE,
        size_bytes=size,
        inodes=max(step, wished - wished % step),
        limits_inodes=inodes is not None,
        formatter=formatter(),
    )
