"""inside - runs in the launcher and in PID 1: builds the root file system.

May import: errno, os, stat, layer, inside.kernel_calls, lookup.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_provisioner.facilities.root.inside.folders import Folders
from sandbox_provisioner.facilities.root.inside.layer import Layer, new_scratch
from sandbox_provisioner.facilities.root.inside.served import Served
from sandbox_provisioner.inside import kernel_calls as kernel

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


def new_layer(box: Box, room: str, kept: str = "", base: str = "") -> None:
    """What is made from here on is the upper part of an overlay; *room* is as for `scratch`, which
    it is in, or it was taken for *kept*."""
    box.part(Layer).begin(box, room, kept, base)


def clean_layer(box: Box, *words: str) -> None:
    """Clear the way for what the box has of its own in an upper part that was kept: KIND:PATH."""
    cleaned, layer = [word.partition(":") for word in words], box.part(Layer)
    layer.replace_links(box, [path for kind, _, path in cleaned if kind == "link"])
    for kind, _, path in cleaned:
        layer.clean(box, path, kind)


def merge_layer(box: Box, *places: str) -> None:
    """Make the directories *places* in it; then the root is the overlay."""
    for path in places:
        os.close(box.mounts.walk(path))
    box.part(Layer).merge(box)


def scratch(box: Box, uid: str, gid: str, room: str, option: str, *targets: str) -> None:
    """One file system, and so one limit, for every place that the kernel may write to.

    It is what was taken for it, or else a tmpfs, whose options are *room*; *option* is what limits
    it. Each target is "MODE:PATH". It stays reachable at /.scratch for `cover`, until `close_root`.
    """
    box.part(Folders).limited_by(option)
    layer = box.part(Layer)
    if layer.holder_fd >= 0:
        layer.show_scratch(box)
    else:
        new_scratch(box, room)
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


def watch_folder(box: Box, path: str, option: str) -> None:
    """Look at *path*, which *option* limits, from time to time whether it is full."""
    box.part(Folders).also(path, option)


def mount_served(box: Box, target: str, uid: str, gid: str) -> None:
    """A mount for *target* that a program is going to answer for."""
    box.part(Served).mount(box, target, uid, gid)


def serve(box: Box, place: str, program: str, *words: str) -> None:
    """The *program* does, called with *words*, the file *place* and that mount."""
    box.part(Served).serve(box, place, program, *words)


def mask(box: Box, *paths: str) -> None:
    """Hide files of /proc behind /dev/null and directories behind an empty read-only tmpfs."""
    for path in paths:
        inside = path.lstrip("/")
        try:
            mode = os.lstat(inside).st_mode
        except FileNotFoundError:
            continue  # what this kernel does not have needs no mask
        _hide(box, inside, is_directory=stat.S_ISDIR(mode), is_link=stat.S_ISLNK(mode))


def show_only(box: Box, directory: str, *names: str) -> None:
    """Mask all that is in *directory* of /proc but *names*, and processes."""
    inside = directory.lstrip("/")
    with os.scandir(inside) as entries:
        hidden = [one for one in entries if one.name not in names and not one.name.isdigit()]
    for entry in hidden:
        try:
            is_directory, is_link = entry.is_dir(follow_symlinks=False), entry.is_symlink()
            _hide(box, f"{inside}/{entry.name}", is_directory=is_directory, is_link=is_link)
        except OSError as error:
            if error.errno != errno.ENOENT:  # a module may have been unloaded meanwhile
                raise


def _hide(box: Box, inside: str, *, is_directory: bool, is_link: bool) -> None:
    """By its path in the new root: in /proc nobody but Linux makes names."""
    empty = box.part(_Masks).directory
    if is_directory and not empty:  # a file system costs ten mounts
        cover_fd = kernel.new_mount("tmpfs", {"size": "0"}, kernel.MOUNT_RDONLY)
        box.part(_Masks).directory = inside
    elif is_link:
        cover_fd = kernel.open_tree("dev/null")
    else:
        kernel.bind(empty if is_directory else "dev/null", inside)
        return
    kernel.move_mount(cover_fd, box.mounts.root_fd, inside, source="an empty one")
    os.close(cover_fd)


def pivot(box: Box) -> None:
    """pivot_root(2): the new root becomes "/", and the host's is let go of."""
    os.fchdir(box.mounts.root_fd)
    kernel.pivot_root(".", ".")
    kernel.detach(".")
    os.chdir("/")


def close_root(box: Box, *writable: str) -> None:
    """Everything is in its place: "/" is read-only from here on, or, with "writable", the kernel
    writes into the layer over it."""
    os.chdir("/")
    kernel.detach("/.scratch")
    try:
        os.rmdir("/.scratch")
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:  # another root has something of that name
            raise
    added = kernel.MOUNT_NOSUID | (0 if writable else kernel.MOUNT_RDONLY)
    kernel.mount_setattr(box.mounts.root_fd, add=added, recursive=False)
    if not box.mounts.when_attached:  # who looks after covers does it from there
        os.close(box.mounts.root_fd)


VERBS = (
    new_root,
    new_layer,
    clean_layer,
    merge_layer,
    mount_served,
    serve,
    scratch,
    watch_folder,
    mask,
    show_only,
    pivot,
    close_root,
)
