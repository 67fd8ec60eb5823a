"""mounts.py - reads only, whoever launches: the mount of a descriptor, and those below.

Read from /proc/self/mountinfo (proc_pid_mountinfo(5)), which knows mounts by number: a path can lie
below more than one mount, and a device number is not always that of the mount (btrfs).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sandbox_provisioner.spec import relative

_ESCAPE = re.compile(rb"\\([0-7]{3})")  # of a blank, a tab, a newline and a backslash
_LIMITS_PROJECTS = {b"prjquota", b"pquota"}
# What Linux shows of itself as files: processes, devices, settings, groups. Nobody works in these.
_OF_LINUX = {
    "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs",
    "efivarfs", "fusectl", "mqueue", "nfsd", "nsfs", "proc", "pstore", "resctrl", "rpc_pipefs",
    "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs",
}  # fmt: skip
# Whose files another machine, or a program, has, which may not answer for hours.
_OF_SERVERS = {
    "9p", "afs", "autofs", "beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3",
    "virtiofs",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount: *parent* is the number of that which it is mounted on, at *path*; *filesystem* is
    its type, and *idmapped* whether somebody has mapped its ids already. *private* is a FUSE mount
    without allow_other, where Linux lets nobody in but its owner, not even root (fuse.rst).
    *device* is what holds its files, and *limits_projects* whether it keeps limits of projects."""

    number: int
    parent: int
    path: str
    filesystem: str
    idmapped: bool = False
    private: bool = False
    device: str = ""
    limits_projects: bool = False

    @property
    def shows_host(self) -> bool:
        """Whether its files are the host itself."""
        return self.filesystem in _OF_LINUX

    @property
    def may_hang(self) -> bool:
        """Whether a look at its files may wait for long."""
        return self.filesystem in _OF_SERVERS or self.filesystem.startswith("fuse.")


UNKNOWN = Mount(0, 0, "", "unknown")


def mounts_around(fd: int, source: str) -> tuple[Mount, tuple[Mount, ...]]:
    """The mount that *fd* lies on, whose real path is *source*, and the mounts below it: all that a
    recursive clone of it has."""
    number, known = _number_of(fd), _mounts()
    here = next((mount for mount in known if mount.number == number), UNKNOWN)
    return here, tuple(_below(here, source, known))


def mount_at(path: str) -> Mount:
    """That which the real *path* lies on, by the list alone: nothing there is looked at."""
    over = [mount for mount in _mounts() if relative(path, mount.path) is not None]
    return max(reversed(over), key=lambda mount: len(mount.path), default=UNKNOWN)  # the newest


def origins(process: int, path: str) -> frozenset[str]:
    """Which directories *process* has mounted at *path*, by their paths in their file systems, as
    these are now: one that was removed ends in "//deleted". Empty where that cannot be read."""
    try:
        lines = Path(f"/proc/{process}/mountinfo").read_bytes().splitlines()
    except OSError:
        return frozenset()
    found = (line.split(b" ", 5)[3:5] for line in lines)
    return frozenset(_unescaped(root) for root, point in found if _unescaped(point) == path)


def read_only(process: int) -> tuple[str, ...]:
    """Where *process* has mounts that it can only read, as paths from its root; OSError."""
    lines = Path(f"/proc/{process}/mountinfo").read_bytes().splitlines()
    found = (line.split(b" ", 6)[4:6] for line in lines)
    return tuple(_unescaped(point) for point, options in found if b"ro" in options.split(b","))


def _below(here: Mount, source: str, known: Iterable[Mount]) -> Iterator[Mount]:
    """A parent is not always listed before what is mounted on it, since mounts can be moved."""
    children: dict[int, list[Mount]] = {}
    for mount in known:
        children.setdefault(mount.parent, []).append(mount)
    inside = (m for m in children.get(here.number, ()) if relative(m.path, source) is not None)
    waiting = [mount for mount in inside if mount.number != here.number]
    while waiting:
        mount = waiting.pop(0)
        yield mount
        waiting += children.get(mount.number, ())


def _number_of(fd: int) -> int:
    told = Path(f"/proc/self/fdinfo/{fd}").read_bytes()
    return int(told.partition(b"mnt_id:")[2].split()[0])


def _mounts() -> tuple[Mount, ...]:
    return _listed(Path("/proc/self/mountinfo").read_bytes())


@lru_cache(maxsize=4)  # a start reads the list several times, and it is nearly always the same
def _listed(table: bytes) -> tuple[Mount, ...]:
    return tuple(map(_mount, table.splitlines()))


def _mount(line: bytes) -> Mount:
    left, _, right = line.partition(b" - ")
    number, parent, _, _, path, options = left.split(b" ")[:6]
    kind, device, more = right.split(b" ", 2)
    return Mount(
        int(number),
        int(parent),
        _unescaped(path),
        os.fsdecode(kind),
        b"idmapped" in options.split(b","),
        kind.startswith(b"fuse") and b"allow_other" not in more.split(b","),
        _unescaped(device),
        # xfs(5), ext4(5); "pqnoenforce" and ext4's feature alone only count.
        not _LIMITS_PROJECTS.isdisjoint(more.split(b",")),
    )


def _unescaped(path: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8)]), path))
