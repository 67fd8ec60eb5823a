"""inside - runs in the launcher and in PID 1: builds the root file system.

May import: os, stat, inside.kernel_calls, lookup, mounts.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import look
from sandbox_provisioner.inside.mounts import mount

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


class _Masks:
    """*directory* is where a masked one stands: a mount of that one masks the next."""

    def __init__(self) -> None:
        self.directory = ""


def new_root(box: Box, staging: str, size: str) -> None:
    """An empty tmpfs that will be the root; built over *staging*, in our own mount namespace."""
    kernel.make_mounts_private()
    root = kernel.new_mount("tmpfs", {"mode": "0755", "size": size}, kernel.MOUNT_NODEV)
    over = os.open(staging, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    kernel.move_mount(root, over)
    os.close(over)
    box.mounts.root_fd = root
    os.umask(0o022)
    os.fchdir(root)


def scratch(box: Box, uid: str, gid: str, room: str, *targets: str) -> None:
    """One tmpfs, and so one cap, for every place that the kernel may write to.

    *room* are the tmpfs's options. Each target is "MODE:PATH". The tmpfs stays reachable at
    /.scratch for `cover`, until `close_root`.
    """
    mount(box, "tmpfs", "/.scratch", f"mode=0755,{room}", "nosuid", "nodev")
    for number, word in enumerate(("0700:stand-ins", *targets)):
        mode, _, target = word.partition(":")
        inside = f".scratch/{number if number else target}"
        os.mkdir(inside)
        os.chmod(inside, int(mode, 8))
        os.chown(inside, int(uid), int(gid))
        if number:
            mount_fd = kernel.open_tree(inside)
            box.mounts.put(mount_fd, target)
            os.close(mount_fd)


def mask(box: Box, *paths: str) -> None:
    """Hide files of /proc behind /dev/null and directories behind an empty read-only tmpfs."""
    for path in paths:
        fd = look(box.mounts.root_fd, path.lstrip("/"))
        if fd < 0:
            continue  # what this kernel does not have needs no mask
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            cover_fd = _empty_directory(box)
            box.part(_Masks).directory = path.lstrip("/")
        else:
            cover_fd = kernel.open_tree("dev/null")
        kernel.move_mount(cover_fd, fd, source="an empty one", target=path)
        os.close(cover_fd)
        os.close(fd)


def _empty_directory(box: Box) -> int:
    """A mount of it; of the one that there is, if there is one: a file system costs ten mounts."""
    if box.part(_Masks).directory:
        return kernel.open_tree(box.part(_Masks).directory)
    return kernel.new_mount("tmpfs", {"size": "0"}, kernel.MOUNT_RDONLY)


def show_only(box: Box, directory: str, *names: str) -> None:
    """Mask all that is in *directory* of /proc but *names*, and processes."""
    there = os.listdir(directory.lstrip("/"))
    hidden = (name for name in there if name not in names and not name.isdigit())
    mask(box, *(f"{directory}/{name}" for name in hidden))


def pivot(box: Box) -> None:
    """pivot_root(2): the new root becomes "/", and the host's is let go of."""
    os.fchdir(box.mounts.root_fd)
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")


def close_root(box: Box) -> None:
    """Everything is in its place: "/" is read-only from here on."""
    os.chdir("/")
    kernel.detach("/.scratch")
    os.rmdir("/.scratch")
    kernel.mount_setattr(
        box.mounts.root_fd, add=kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID, recursive=False
    )
    if not box.mounts.when_attached:  # who looks after covers does it from there
        os.close(box.mounts.root_fd)


VERBS = (
    new_root,
    scratch,
    mask,
    show_only,
    pivot,
    close_root,
)
