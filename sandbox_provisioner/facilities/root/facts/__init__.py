"""facts - reads only, whoever launches: the root file system of a kernel, where it is not the
host's; opened once, and looked at by descriptor.

An image file is mounted to be looked at, in no mount namespace (`loop.py`): the mount goes to the
launcher, and ends with whoever has it last; where more starts are to come, another one stays
(`kept.py`). Nothing in an image is run, and no link of it leads out.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.root.facts.kept import mount_and_keep
from sandbox_provisioner.facilities.root.facts.kinds import KINDS, ImageKind, kind_of
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts, is_idmappable
from sandbox_provisioner.places import Place
from sandbox_provisioner.root_files import RootFiles
from sandbox_provisioner.spec import HOST_ROOT, relative
from sandbox_provisioner.trust import is_roots_alone

# Where apt.conf(5) has files of packages and administrators.
APT_SETTINGS = "etc/apt/apt.conf.d"
# By which the box's mounts know what it is made from.
IMAGE = "/.image"


@dataclass(frozen=True, slots=True, kw_only=True)
class RootFacts:
    """What is true of the root file system *wish*: of the host's own nothing. *place* is the
    directory or the image file, *mount_fd* what that file holds, mounted nowhere. *identity*
    changes with what it is; *users* and *groups* are the texts of passwd(5) and group(5) in it, and
    *server_fd* is a pidfd of the program that reads the file for Linux, -1 where Linux does it, and
    *has_apt* tells whether apt is configured there. In one that *is_callers* nothing belongs to
    anybody in the box but what is the caller's own."""

    wish: str = HOST_ROOT
    place: Place | None = None
    kind: ImageKind | None = None
    mount_fd: int = -1
    server_fd: int = -1
    identity: tuple[int, ...] = ()
    users: str = ""
    groups: str = ""
    is_callers: bool = False
    has_apt: bool = False

    @property
    def is_own(self) -> bool:
        """Whether it is not the host's."""
        return self.place is not None

    @property
    def files(self) -> RootFiles:
        """What is in it."""
        assert self.place
        return RootFiles(self.mount_fd if self.kind else self.place.fd)

    @classmethod
    def probe(
        cls, path: str, facts: HostFacts, opened: ExitStack, *, vouched: bool = True
    ) -> RootFacts:
        """Open *path* until *opened* closes, with the rights of who asks; SpecError or HostError
        where it cannot be a kernel's root. It is *vouched* for where root's own policy or store
        names it, or who asks is who launches."""
        attempt = f"use {path} as the root file system"
        place = _place(path, facts, opened, attempt, vouched=vouched)
        found = cls(wish=path, place=place, identity=_identity(place.fd))
        if place.is_directory:
            _check_directory(found, facts, attempt)
            return replace(found, is_callers=not vouched or _may_be_callers(place, facts))
        fd = _readable(place, attempt)
        opened.callback(os.close, fd)
        kind = kind_of(fd, attempt)
        _check_file(place, kind, facts, attempt, vouched=vouched)
        return replace(found, kind=kind)

    def mounted(self, opened: ExitStack, keep_seconds: float) -> RootFacts:
        """With the image file mounted, by who may mount, and who keeps it so for *keep_seconds*."""
        assert self.place
        assert self.kind
        attempt = f"mount {self.wish} as a root file system"
        fd = mount_and_keep(self.place, self.kind, attempt, keep_seconds)
        opened.callback(os.close, fd)
        return replace(self, mount_fd=fd)

    def looked_at(self) -> RootFacts:
        """With what it tells of its users; SpecError where it is the root of nothing."""
        files = self.files
        if not any(files.kind_at(name) == stat.S_IFDIR for name in ("usr", "bin")):
            raise SpecError(
                attempt=f"use {self.wish} as the root file system",
                answer="there is neither a directory usr nor bin in it",
                remedy="Name the directory, or the image, whose topmost level has them.",
            )
        return replace(
            self,
            users=files.text("etc/passwd"),
            groups=files.text("etc/group"),
            has_apt=files.kind_at(APT_SETTINGS) == stat.S_IFDIR,
        )


def check_apart(
    root: RootFacts, wish: str, workdir: WorkdirFacts, volumes: Iterable[VolumeFacts]
) -> None:
    """SpecError where a kernel that has it would be given it, or a part of it, to write, or what
    *wish* names, of which it was made. In a home the store of images is hidden from a kernel."""
    if root.place is None:
        return
    writable = (workdir.source, *(v.source for v in volumes if not v.volume.readonly))
    hidden = [os.path.join(workdir.source, path) for path in workdir.covered.directories]
    sources = {root.place.source, os.path.realpath(wish) if wish.startswith("/") else ""} - {""}
    for source, path in itertools.product(sources, filter(None, writable)):
        covers = hidden if path == workdir.source else ()
        is_hidden = any(relative(source, one) is not None for one in covers)
        inside = relative(source, path) is not None and not is_hidden
        if inside or relative(path, source) is not None:
            raise SpecError(
                attempt=f"use {root.wish} as the root file system",
                answer=f"{path}, which the kernel may write to, lies in it or around it",
                remedy="Keep roots where no kernel works.",
            )


def _place(path: str, facts: HostFacts, opened: ExitStack, attempt: str, *, vouched: bool) -> Place:
    """What root's own policy or store names we open, whatever a user of the broker has brought."""
    brought = facts.caller.root
    if vouched or brought is None:
        return Place.open(path, facts.asker, opened, attempt=attempt)
    place = Place.brought(path, brought[1], opened, attempt=attempt)
    if place.source != path:  # what a policy has judged is the path
        answer, remedy = f"it is {place.source} now", "Name that, or start again."
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    return place


def _may_be_callers(place: Place, facts: HostFacts) -> bool:
    """Whether, of a caller of the broker, others than root can have put anything into it: another
    person's file, moved there, would belong to an id of the box."""
    return facts.caller.groups is not None and not is_roots_alone(os.fstat(place.fd))


def _identity(fd: int) -> tuple[int, ...]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_directory(found: RootFacts, facts: HostFacts, attempt: str) -> None:
    place = found.place
    assert place
    if answer := _is_the_hosts(place) or place.shows_host():
        remedy = 'Name the topmost directory of another system, or use rootfs = "host".'
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    if facts.privileged and not is_idmappable(place.mount, facts.machine.kernel):
        image = "Make an image file of it (mksquashfs DIRECTORY FILE), or keep it"
        raise HostError(
            attempt=attempt,
            answer=f"Linux {'.'.join(map(str, facts.machine.kernel))} cannot map the ids of a "
            f"mount of {place.filesystem}",
            remedy=f"{'Keep it' if facts.caller.groups is not None else image} on a file system "
            "such as ext4, xfs or btrfs.",
        )


def _is_the_hosts(place: Place) -> str:
    """Why a directory is no other root, "" if it may be one."""
    top = os.stat("/")
    if (place.device, place.inode) == (top.st_dev, top.st_ino):
        return "it is the root of the host"
    return ""


def _readable(place: Place, attempt: str) -> int:
    try:
        if not stat.S_ISREG(os.stat(f"/proc/self/fd/{place.fd}").st_mode):
            raise OSError(errno.EINVAL, "it is neither a directory nor a file")
        return os.open(f"/proc/self/fd/{place.fd}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        remedy = "Name a directory, or an image file that the server may read."
        answer = error.strerror or str(error)
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy) from None


def _check_file(
    place: Place, kind: ImageKind, facts: HostFacts, attempt: str, *, vouched: bool
) -> None:
    if not facts.privileged:  # what a program reads for such a user, that user may have made
        return
    if not vouched:
        # That root owns a file does not say that root has made it: daemons copy files of users,
        # such as a login's picture, to where they are root's.
        unpack = f"unsquashfs -d DIRECTORY {place.source}" if kind.filesystem == "squashfs" else ""
        raise SpecError(
            attempt=attempt,
            answer="no policy names it, and Linux is not made to withstand a file system that "
            "somebody has made to break it",
            remedy=(
                "Unpack it, and name that directory:" if unpack else "Unpack it, as its tools do.",
                *filter(None, (f"  {unpack}",)),
                "Or ask the administrator for it: as an image of root's, or in the policy:",
                f'  rootfs = ["host", "{place.source}"]',
            ),
        )
    if not is_roots_alone(os.fstat(place.fd)):
        raise SpecError(
            attempt=attempt,
            answer="others than root may write to it, and Linux is not made to withstand a file "
            "system that somebody has made to break it",
            remedy=(
                "Look where it comes from; then give it to root:",
                f"  sudo chown root: {place.source} && sudo chmod go-w {place.source}",
            ),
        )
    since = KINDS[kind.filesystem].idmapped_since
    if facts.machine.kernel < since:
        raise HostError(
            attempt=attempt,
            answer=f"Linux {'.'.join(map(str, facts.machine.kernel))} cannot map the ids of a "
            f"mount of {kind.filesystem}",
            remedy=f"Linux {'.'.join(map(str, since))} can. An ext4 file works with any.",
        )
