"""layer.py - PID 1 of the sandbox: another root than the host's, and what is written over it.

::

    holder, a tmpfs     .image      the other root, read-only
                        .scratch    every writable place, and of an overlay "upper" and "work"
                        .layer      in place of these two, where they are kept on the disk
                        dev         what shows as /dev
    the root            an overlay of .scratch/upper over .image, on top of the holder

What the box has of its own is put into "upper" before the two are merged: so no path is ever looked
up in the image, whatever lies there is hidden, and nothing has to be copied up. Mounts go on top
of the overlay, which knows none of its layers.
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import look
from sandbox_provisioner.inside.mounts import attach, mount

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box

_SCRATCH = ".scratch"
_LINKS = "work/links"  # beside what overlayfs has there; no kernel comes to it
_LONGEST_LIST = 1 << 20


class Layer:
    """*holder_fd* is where the parts of the overlay are, until all of them are in their place."""

    def __init__(self) -> None:
        self.holder_fd = -1
        self.folder = _SCRATCH
        self._moved = 0

    def begin(self, box: Box, room: str, kept: str, base: str) -> None:
        """Let the root be an upper part, which is built on until it is merged: an empty one in the
        scratch, for which *room* is; or, where there is one, what was taken for *kept*, of which
        another part is for *base*."""
        self.holder_fd = box.mounts.root_fd
        new_scratch(box, room)
        if kept:
            attach(box, kept)
            self.folder = kept.lstrip("/")
            box.mounts.taken[base] = kernel.open_tree(f"{self.folder}/base")
        else:
            for name in ("upper", "work"):
                os.mkdir(f"{_SCRATCH}/{name}")
        how = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        box.mounts.root_fd = os.open(f"{self.folder}/upper", how)
        os.fchdir(box.mounts.root_fd)

    def clean(self, box: Box, path: str, kind: str) -> None:
        """Let nothing of the upper part stand at *path* but, if that is its *kind*, a "directory"
        or a "kept-file", nor on the way to it: what an earlier kernel has left there, a link above
        all, or a mark by which something is removed. Of an "old-link" only a link goes."""
        names = path.strip("/").split("/")
        fd = os.dup(box.mounts.root_fd)
        try:
            for position, name in enumerate(names, 1):
                found = look(fd, name)
                if found < 0:
                    return
                mode = os.fstat(found).st_mode
                is_last = position == len(names)
                wanted = stat.S_ISLNK if is_last else stat.S_ISDIR
                if kind == "old-link" and not wanted(mode):
                    os.close(found)
                    return
                if not stat.S_ISDIR(mode):
                    os.close(found)
                    if is_last and kind == "kept-file" and stat.S_ISREG(mode):
                        return
                    os.unlink(name, dir_fd=fd)
                    return
                if is_last and kind != "directory":
                    os.close(found)
                    self._move_away(name, fd)
                    return
                os.close(fd)
                fd = found
        finally:
            os.close(fd)

    def replace_links(self, box: Box, paths: list[str]) -> None:
        """Remove the links that an earlier box had, for devices that this one may not have, and
        write down that it has those at *paths*."""
        where = f"{self.folder}/{_LINKS}"
        noted = self._noted(where)
        for path in filter(None, noted):
            self.clean(box, path, "old-link")
        if noted:
            os.unlink(where, dir_fd=self.holder_fd)
        if paths:
            how = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(where, how, 0o600, dir_fd=self.holder_fd)
            try:
                os.write(fd, b"".join(os.fsencode(path) + b"\0" for path in paths))
            finally:
                os.close(fd)

    def _noted(self, where: str) -> list[str]:
        try:
            fd = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.holder_fd)
        except FileNotFoundError:
            return []
        try:
            return os.fsdecode(os.read(fd, _LONGEST_LIST)).split("\0")
        finally:
            os.close(fd)

    def _move_away(self, name: str, folder: int) -> None:
        """A directory may hold anything: whoever removes the layer removes it."""
        trash = os.open(f"{self.folder}/trash", os.O_PATH | os.O_DIRECTORY, dir_fd=self.holder_fd)
        try:
            while True:
                self._moved += 1
                try:
                    os.rename(name, str(self._moved), src_dir_fd=folder, dst_dir_fd=trash)
                    return
                except OSError as error:
                    if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                        raise
        finally:
            os.close(trash)

    def merge(self, box: Box) -> None:
        """Let the root be both parts, with a /dev that neither of them has."""
        os.close(box.mounts.root_fd)
        os.fchdir(self.holder_fd)
        # overlayfs.rst: in a user namespace its marks are user.overlay.*, and there are no
        # redirects.
        upper, work = f"{self.folder}/upper", f"{self.folder}/work"
        options = {"lowerdir": ".image", "upperdir": upper, "workdir": work, "userxattr": None}
        root = kernel.new_mount("overlay", options, kernel.MOUNT_NODEV | kernel.MOUNT_NOSUID)
        kernel.move_mount(root, self.holder_fd, source="overlay", target="/")
        box.mounts.root_fd = root
        os.mkdir("dev")
        fd = kernel.open_tree("dev", dir_fd=self.holder_fd)
        os.fchdir(root)
        box.mounts.put(fd, "/dev")
        os.close(fd)

    def show_scratch(self, box: Box) -> None:
        """Where it is in a root without a layer."""
        fd = kernel.open_tree(".scratch", dir_fd=self.holder_fd)
        box.mounts.put(fd, "/.scratch")
        os.close(fd)
        os.close(self.holder_fd)
        self.holder_fd = -1


def new_scratch(box: Box, room: str) -> None:
    """What was taken for it, or else a tmpfs with the options *room*, at /.scratch of the root."""
    if "/.scratch" in box.mounts.taken:
        attach(box, "/.scratch")
    else:
        mount(box, "tmpfs", "/.scratch", f"mode=0755,{room}", "nosuid", "nodev")
