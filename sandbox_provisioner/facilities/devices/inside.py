"""facilities/devices/inside.py - runs in the launcher and in PID 1: device nodes, and their list.

May import: errno, os, stat, inside.files, kernel_calls, mounts.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.files import write

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

_NO_LINKS = kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_MAGICLINKS
_CLOSED = kernel.MOUNT_NOSUID | kernel.MOUNT_NOEXEC


def make_devices(box: Box, folder: str, gid: str, *nodes: str) -> None:
    """A tmpfs with *nodes*, each "MAJOR:MINOR:ACCESS", for the group *gid*, called by their places.

    Made in the machine's user namespace, since those of another one open no device (user_namespaces
    (7)). They are nobody's inside, so that nobody there changes their modes.
    """
    mount = kernel.new_mount("tmpfs", {"mode": "0755", "size": "64K"}, _CLOSED)
    for number, node in enumerate(nodes):
        major, minor, access = node.split(":")
        mode = (0o440 if "r" in access else 0) | (0o220 if "w" in access else 0)
        device = os.makedev(int(major), int(minor))
        os.mknod(str(number), stat.S_IFCHR | 0o600, device, dir_fd=mount)
        os.chown(str(number), 0, int(gid), dir_fd=mount)
        os.chmod(str(number), mode, dir_fd=mount)
    kernel.mount_setattr(mount, add=kernel.MOUNT_RDONLY, propagation=kernel.MS_PRIVATE)
    box.mounts.taken[folder] = mount


def attach_devices(box: Box, folder: str, *targets: str) -> None:
    """Put the nodes that were made to their places; their *folder* shows nowhere then."""
    mount = box.mounts.taken.pop(folder)
    box.mounts.put(mount, folder)
    os.close(mount)
    inside = folder.lstrip("/")
    for number, target in enumerate(targets):
        node = kernel.open_tree(f"{inside}/{number}")
        box.mounts.put(node, target)
        os.close(node)
    kernel.detach(inside)
    os.rmdir(inside)


def take_device(box: Box, target: str, path: str, major: str, minor: str) -> None:
    """Clone the node at *path*, which is a real one, for *target*; it has to be the very device
    that was judged."""
    fd = kernel.openat2(kernel.AT_FDCWD, path, os.O_PATH, _NO_LINKS)
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != os.makedev(int(major), int(minor)):
        os.close(fd)
        raise OSError(errno.ESTALE, f"{path!r} is not the device {major}:{minor} any more")
    clone = kernel.open_tree("", dir_fd=fd)
    os.close(fd)
    kernel.mount_setattr(clone, add=_CLOSED, propagation=kernel.MS_PRIVATE)
    box.mounts.taken[target] = clone


def limit_devices(_box: Box, asked: str, version: str, group: str, *entries: str) -> None:
    """What *entries* do not have nobody in *group* opens: lines for cgroup v1, of which so many as
    *asked* says, the last ones, were asked for; a program for v2.

    Where Linux refuses root such a list, a box without devices has the /dev that it has.
    """
    try:
        if version == "1":
            write(f"{group}/devices.deny", "a")  # cgroup-v1/devices.rst: first nothing
        else:
            kernel.limit_devices(group, os.fsencode(entries[0]))  # the bytes that it was read from
    except OSError:
        if int(asked):
            raise
        return
    if version == "1":
        _allow(group, entries, usual=len(entries) - int(asked))


def _allow(group: str, entries: tuple[str, ...], usual: int) -> None:
    """A group cannot have what the one above has not: that of a container has a list of its own,
    and what is usual may not be in it."""
    for number, entry in enumerate(entries):
        try:
            write(f"{group}/devices.allow", entry)
        except OSError as error:
            if number >= usual or error.errno != errno.EPERM:
                raise


VERBS = (
    make_devices,
    attach_devices,
    take_device,
    limit_devices,
)
