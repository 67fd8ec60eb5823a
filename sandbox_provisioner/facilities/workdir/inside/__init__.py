"""inside - runs in PID 1: takes parts of the work directory away.

May import: os, covers, watch, inside.kernel_calls, wire.
May raise: OSError (with every operand in its text).
"""

from __future__ import annotations

import os

from sandbox_provisioner.facilities.workdir.inside.covers import Covers
from sandbox_provisioner.facilities.workdir.inside.watch import Watch
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from sandbox_provisioner.inside.box import Box


class Workdir:
    """The covers, and who looks after them; *begun* ends when another program runs than ours."""

    def __init__(self) -> None:
        self.covers: Covers | None = None
        self.watch: Watch | None = None
        self.begun = -1

    def watch_covers(self, box: Box) -> None:
        """Before anything of the kernel's runs. Where the mounts are the host's nothing is covered,
        and what changes is not ours."""
        if box.namespaces:
            self.watch = Watch(self.covers, self.begun)


def attach_review(box: Box, target: str, aside: str) -> None:
    """Attach at *target* an overlay: below what was taken for it, above the folder "upper" of what
    was taken for *aside*.

    overlayfs.rst: "userxattr" is for mounters in user namespaces, and never follows what an upper
    directory says of renamed directories. overlay keeps clones of its layers, of which nothing
    stays reachable.
    """
    lower, layer = box.mounts.taken.pop(target), box.mounts.taken.pop(aside)
    noexec = kernel.MOUNT_NOEXEC if os.fstatvfs(lower).f_flag & os.ST_NOEXEC else 0
    for name, mount_fd in (("lower", lower), ("layer", layer)):
        box.mounts.put(mount_fd, f"{aside}/{name}")
        os.close(mount_fd)
    options = {
        "lowerdir": f"{aside}/lower",
        "upperdir": f"{aside}/layer/upper",
        "workdir": f"{aside}/layer/work",
        "userxattr": None,
    }
    attributes = kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV | noexec
    overlay = kernel.new_mount("overlay", options, attributes)
    for name in ("lower", "layer"):
        kernel.detach(f"{aside}/{name}")
        os.rmdir(f"{aside}/{name}")
    os.rmdir(aside)
    box.mounts.put(overlay, target)
    os.close(overlay)


def covers_of(box: Box, workdir: str, uid: str, gid: str, written_through: str) -> None:
    """Parts of *workdir*, which is *uid*'s and *gid*'s inside, are going to be taken away. What a
    program outside writes through a link that stands in for a file goes to *written_through*."""
    owner = int(uid), int(gid)
    covers = Covers(box.mounts.root_fd, workdir, *owner, lambda *made: box.report(wire.MADE, *made))
    covers.written_through = written_through
    box.part(Workdir).covers = covers
    box.mounts.when_attached = covers.attached
    box.files_as = owner
    # To mount, and to look who has what open.
    box.lasting_rights = kernel.CAP_SYS_ADMIN, kernel.CAP_SYS_PTRACE


def _covers(box: Box) -> Covers:
    covers = box.part(Workdir).covers
    assert covers
    return covers


def cover(box: Box, kind: str, *paths: str) -> None:
    """Put private empty stand-ins over *paths* of the work directory; see `Covers.cover`."""
    covers = _covers(box)
    covers.as_owner([(covers.cover, kind, path) for path in paths])


def place(box: Box, *words: str) -> None:
    """Make files, a path and a text each, where there are none."""
    covers = _covers(box)
    pairs = zip(words[::2], words[1::2], strict=True)
    covers.as_owner([(covers.place, *pair) for pair in pairs])


def make_folders(box: Box, *paths: str) -> None:
    """Make directories in the work directory."""
    covers = _covers(box)
    covers.as_owner([(covers.make_folder, path) for path in paths])


def protect(box: Box, *paths: str) -> None:
    """Make what exists at *paths* of the work directory read-only, and pin the way to it."""
    covers = _covers(box)
    covers.each([(covers.protect, path) for path in paths])


VERBS = (
    attach_review,
    covers_of,
    cover,
    place,
    make_folders,
    protect,
)
