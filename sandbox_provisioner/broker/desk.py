"""broker/desk.py - the daemon, and a hub: where servers ask for kernels, and what they may have.

That of the daemon is for every user of the machine, whom SO_PEERCRED tells. A `BoxDesk` is that of
one server, which a hub has put into a box. Whoever asks there has an id of the box's range, as its
terminals have, so it is the socket that tells for whom: it lies in a folder of root's that this box
alone is shown. A kernel has a box of its own, and never sees it.

All code in such a box may ask, so a kernel is given no more than its server has: what of the host
the box shows, to write what the box may write; and the network that the box has.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from sandbox_provisioner.broker.box import KERNELS
from sandbox_provisioner.broker.eyes import Eyes, look_as_root
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.sockets import hand_over, link_into, listen_in_place
from sandbox_provisioner.broker.wishes import Ahead, Wish, sources_of
from sandbox_provisioner.caller import Caller
from sandbox_provisioner.contract import Warmth
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, FOREIGN_ID, IDS, LAST_ID
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.mounts import read_only
from sandbox_provisioner.places import Place, is_of_system, open_again
from sandbox_provisioner.plan import KERNEL_ID, LaunchRequest
from sandbox_provisioner.policy.narrow import narrower_sum
from sandbox_provisioner.records import (
    UNREADABLE,
    Record,
    RecordFolder,
    open_init,
    pid_of,
    start_time,
)
from sandbox_provisioner.spec import (
    NO_WORKDIR,
    Limits,
    Network,
    NetworkWish,
    SandboxSpec,
    Volume,
    relative,
)

_KINDS = {"kernel", "nursery", "spare"}
_MOST_SPARES = 4  # of a user's kernelspec
_LONGEST_SECONDS = 86400.0
_IN_BOX = kernel_calls.RESOLVE_IN_ROOT | kernel_calls.RESOLVE_NO_SYMLINKS
# What a server in a box may say of a kernel's. All else is as for a server that says nothing.
_SAID = {
    "workdir", "workdir_mode", "covers", "limits", "confinement", "network", "user_ids", "volumes",
    "hostname", "on_missing", "untouched", "rootfs", "layer",
}  # fmt: skip
_OF_WORKDIR = {"workdir_limit": "workdir_bytes", "workdir_inode_limit": "workdir_inodes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A wish as it can be meant: the *spec*, by real paths, and for whom. *seen_by* looks for what
    came opened, *found_by* for a kernel's program and files. *volumes* are given besides, as
    whoever has a desk set up has it; *told* is what the server has to know."""

    spec: SandboxSpec
    caller: Caller
    seen_by: Eyes
    found_by: Eyes
    volumes: tuple[Volume, ...] = ()
    told: tuple[str, ...] = ()


class Desk:
    """The public one: it serves ordinary users, and gives what their files let them have. Of one
    of them *together* kernels start at a time: each start may have a thread wait. Desks of one
    *kept_where* have what outlives kernels in common."""

    together: ClassVar[int] = 4
    kept_where: ClassVar[str] = ""

    def refusal(self, uid: int) -> str:
        """Why a process of *uid* is not listened to, "" if it is."""
        if uid == 0 or FIRST_ID <= uid <= LAST_ID:
            return "it serves ordinary users, who are neither root nor a sandbox"
        return ""

    def peer(self, uid: int, gid: int) -> Peer:
        """For whom a process of these ids asks."""
        return Peer.of(uid, gid)

    def has(self, record: Record) -> bool:
        """Whether that one was asked for here."""
        return bool(record.uid) and record.kind in _KINDS and not record.box

    def judged(
        self, peer: Peer, wish: Wish, fds: Sequence[int], eyes: Eyes, opened: ExitStack
    ) -> Asked:
        """What the *peer* asks for, who has opened *fds*, and whose *eyes* are open; *opened*
        closes what is opened for it."""
        spec, by_path, root = _by_real_paths(wish.spec, fds)
        caller = _caller(peer, wish, by_path, root)
        return Asked(spec=spec, caller=caller, seen_by=eyes, found_by=eyes)

    def request(self, request: LaunchRequest, peer: Peer, watched: int) -> LaunchRequest:
        """*request* where the policy's limits of all that the *peer* runs hold, if there are any.
        It ends with the process *watched*, unless it is to outlive it."""
        if request.terms is None or not request.terms.sum.asked:
            return request
        plain = re.fullmatch(r"[\w-][\w.-]{0,63}", peer.name, re.ASCII)
        person = f"hub/{peer.name if plain else peer.uid}"
        return replace(request, below=f"{person}/kernels", sums={person: request.terms.sum})

    def warmth(self, peer: Peer, wish: Ahead, watched: int, opened: ExitStack) -> Warmth:
        """What is ready for the *peer* alone: with the process *watched* it ends, or by itself.
        *opened* closes what it keeps open."""
        return _warmth(wish, f"{peer.uid}", watched, watched if wish.alone else -1)

    def hand_over(self, folder: RecordFolder, peer: Peer) -> None:
        """Let the *peer* connect to the sockets of the kernel of *folder*; OSError."""
        hand_over(folder.sockets, peer.uid, peer.gid)

    def listen_in_place(self, folder: RecordFolder, peer: Peer) -> int:
        """A socket that listens where the kernel of *folder*, which has ended, showed what it did;
        OSError."""
        return listen_in_place(folder.sockets, peer.uid, peer.gid, 0o600)

    def met_at(self, folder: RecordFolder) -> str:
        """Where the *peer* finds them."""
        return str(folder.path)

    def workdir(self, record: Record) -> str:
        """Where the *peer* finds the kernel's work directory."""
        return record.workdir

    def seen_as(self, uid: int, gid: int) -> tuple[str, str] | None:
        """Lines of uid_map and gid_map by which who asks has what lies on a disk of root's, and
        belongs to *uid* and *gid*, the user's own; None where it is so as it lies there."""
        return None

    def leave(self, sandbox_id: str) -> None:
        """Forget what was handed over of a kernel that has ended."""

    def keep_alone(self, ids: Sequence[str]) -> None:
        """The same of all but the kernels *ids*."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxDesk(Desk):
    """That of the server in the box *box*, which runs for the user *name*, with the ids from
    *first_id* on. *ways* are its places inside and what of the host shows there; kernels have those
    that are *volumes*, too. *shown* is all that it sees of the host, *limits* are those of all that
    the person runs, *network* is what the box has; its work directory holds no more than so many
    *workdir_bytes* and *workdir_inodes*. *folder* shows inside as `KERNELS`; *runtime* has the
    record of the box."""

    box: str
    name: str
    first_id: int
    ways: Mapping[str, str]
    volumes: tuple[Volume, ...]
    shown: tuple[str, ...]
    limits: Limits
    network: NetworkWish
    folder: str
    runtime: str
    workdir_bytes: int | None = None
    workdir_inodes: int | None = None
    together: ClassVar[int] = 2
    # All of a person's boxes are one place: their servers come and go, and have one home. Code in
    # them has no way to what kernels elsewhere leave, which may have been given more.
    kept_where: ClassVar[str] = "-hub"

    def refusal(self, uid: int) -> str:
        """Nobody else has a way to it."""
        return "" if 0 <= uid - self.first_id < IDS else "it serves another user's server"

    def peer(self, uid: int, gid: int) -> Peer:
        """The person of this box, whoever in it asks."""
        entry = pwd.getpwnam(self.name)
        return Peer.of(entry.pw_uid, entry.pw_gid)

    def has(self, record: Record) -> bool:
        """By its record."""
        return record.kind in _KINDS and record.box == self.box

    def allowed(self, spec: SandboxSpec) -> tuple[SandboxSpec, list[str]]:
        """No more than the server has; and where nobody has said how much memory, half of what the
        person has, so that one kernel takes it neither from the server nor from all others."""
        told: list[str] = []
        usual = SandboxSpec(workdir=spec.workdir)
        for name in (field.name for field in fields(spec) if field.name not in _SAID):
            if getattr(spec, name) != getattr(usual, name):
                told.append(f"{name} cannot be had by a server in a box of a hub's: left out.")
                spec = replace(spec, **{name: getattr(usual, name)})
        if spec.network.mode is not Network.NONE or "network" in spec.untouched:
            if spec.network.mode is not Network.NONE and spec.network != self.network:
                told.append("The kernel's network is that of its server: it has no other.")
            spec = replace(spec, network=self.network)
        whole, asked = self.limits.memory_bytes, spec.limits.memory_bytes
        if whole and "mem_limit" in spec.untouched and (asked is None or asked > whole // 2):
            spec = replace(spec, limits=replace(spec.limits, memory_bytes=whole // 2))
        return self._as_full(spec, told), told

    def _as_full(self, spec: SandboxSpec, told: list[str]) -> SandboxSpec:
        """*spec* with no wider limits of a work directory than the server's has: a kernel that
        works there would set those anew."""
        for option, name in _OF_WORKDIR.items():
            most, asked = getattr(self, name), getattr(spec.limits, name)
            if most is not None and asked is not None and asked > most:
                told.append(f"{option} is no more than that of the kernel's server: {most}.")
                spec = replace(spec, limits=replace(spec.limits, **{name: most}))
        return spec

    def judged(
        self, peer: Peer, wish: Wish, fds: Sequence[int], eyes: Eyes, opened: ExitStack
    ) -> Asked:
        """The program and its files are looked for with the eyes of the server: from the root of
        its box, with its ids."""
        root, user = _root_of(Path(self.runtime, self.box), opened), self.first_id + KERNEL_ID
        spec, told = self.allowed(wish.spec)
        spec, outside = self._outside_of(spec, fds, eyes, opened)
        spec, by_path, brought = _by_real_paths(spec, outside)
        granted = self._granted(spec, peer.uid, opened)
        return Asked(
            spec=spec,
            caller=replace(
                _caller(peer, wish, by_path, brought), shown=self.shown, granted=granted
            ),
            seen_by=eyes,
            found_by=Eyes(user, user, frozenset(), root=root),
            volumes=tuple(granted),
            told=tuple(told),
        )

    def _outside_of(
        self, spec: SandboxSpec, fds: Sequence[int], eyes: Eyes, opened: ExitStack
    ) -> tuple[SandboxSpec, Sequence[int]]:
        """Each is opened again outside of the box, with the person's rights, where it shows there;
        and *spec*, where no program can be run from what the box runs none from. SpecError for what
        is not the same, and for what is to be written and cannot be inside."""
        left = list(fds)
        found = []
        if spec.workdir != NO_WORKDIR:
            fd = left.pop(0)
            attempt = f"give the kernel {spec.workdir!r}"
            if (real := os.readlink(f"/proc/self/fd/{fd}")) != spec.workdir:
                raise SpecError(
                    attempt=attempt,
                    answer=f"it is {real}, and leads there by a symbolic link",
                    remedy="Name that directory itself.",
                )
            flags = self._writable(fd, eyes, attempt)
            found.append(self._opened_outside(fd, eyes, attempt))
            opened.callback(os.close, found[-1])
            _check_runs(flags, found[-1], eyes, attempt)
        root = left.pop() if spec.rootfs.startswith("/") else -1
        volumes = []
        for volume, fd in zip(spec.volumes, left, strict=True):
            attempt = f"give the kernel {volume.source!r}"
            if volume.readonly:
                flags = eyes(os.fstatvfs, fd).f_flag
            else:
                flags = self._writable(fd, eyes, attempt)
            volumes.append(replace(volume, noexec=volume.noexec or bool(flags & os.ST_NOEXEC)))
            found.append(self._opened_outside(fd, eyes, attempt))
            opened.callback(os.close, found[-1])
        if root >= 0:
            attempt = f"use {spec.rootfs} as the root file system"
            flags = eyes(os.fstatvfs, root).f_flag
            found.append(self._opened_outside(root, eyes, attempt))
            opened.callback(os.close, found[-1])
            _check_runs(flags, found[-1], eyes, attempt)
        return replace(spec, volumes=tuple(volumes)), found

    def _writable(self, fd: int, eyes: Eyes, attempt: str) -> int:
        """The flags of the mount that *fd* lies on; SpecError where the box cannot write to it, or
        to what lies below it. Outside, where it is opened again, the latter is no mount."""
        flags: int = eyes(os.fstatvfs, fd).f_flag
        path = os.readlink(f"/proc/self/fd/{fd}")
        frozen = _read_only_in(Path(self.runtime, self.box))
        is_moved = os.readlink(f"/proc/self/fd/{fd}") != path
        answer = "its server can only read it" if flags & os.ST_RDONLY else ""
        answer = answer or ("it is being moved" if is_moved else self.frozen_below(path, frozen))
        if answer:
            remedy = "Show it read-only, or work elsewhere."
            raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
        return flags

    def frozen_below(self, path: str, frozen: Sequence[str]) -> str:
        """Why nothing may write to what shows in the box at *path*, where that one has read-only
        mounts *frozen*: outside they are parts of it. "" if it may."""
        outside = self.outside(path)
        for one in frozen:
            below = relative(one, path)
            if below and self.outside(one) == os.path.join(outside, below):
                return f"its server can only read {one}"
        return ""

    def _granted(self, spec: SandboxSpec, uid: int, opened: ExitStack) -> Mapping[Volume, Place]:
        """The volumes of the server, as it has them: but for those in whose place something else
        was asked for, or that the work directory lies in, which they would hide. Root looks for
        them, as long as for what the user *uid* has opened."""
        taken = {volume.target for volume in spec.volumes}
        given = [
            volume
            for volume in self.volumes
            if volume.target not in taken and relative(spec.workdir, volume.target) is None
        ]
        if not given:
            return {}

        def look() -> tuple[Mapping[Volume, Place], ExitStack]:
            with ExitStack() as own:  # it may end after *opened* was closed
                root = _root_of(Path(self.runtime, self.box), own)
                found = dict(_as_given(volume, root, own) for volume in given)
                return found, own.pop_all()

        granted, own = look_as_root(uid, look, lambda late: late[1].close())
        opened.push(own)
        return granted

    def _opened_outside(self, fd: int, eyes: Eyes, attempt: str) -> int:
        status, path = eyes(os.fstat, fd), os.readlink(f"/proc/self/fd/{fd}")
        with contextlib.suppress(OSError):
            outside = self.outside(path)
            if outside:
                found: int = eyes(open_again, outside, status.st_dev, status.st_ino, 0)
                return found
        raise SpecError(
            attempt=attempt,
            answer="that is nothing which the hub shows to this server",
            remedy="Name something in the home directory, or in a volume of the server's.",
        )

    def outside(self, path: str) -> str:
        """Where what the box has at *path* lies outside, "" for what is the box's own."""
        for target in sorted(self.ways, key=len, reverse=True):
            if (below := relative(path, target)) is not None:
                return os.path.join(self.ways[target], below) if below else self.ways[target]
        around = is_of_system(path) or any(relative(path, one) is not None for one in self.shown)
        return path if around else ""

    def request(self, request: LaunchRequest, peer: Peer, watched: int) -> LaunchRequest:
        """In the person's groups; and it always ends with the process that asked for it, which
        ends with the box."""
        terms = request.terms
        sum_of_all = narrower_sum(self.limits, terms) if terms else self.limits
        group = f"hub/{self.name}"
        return replace(
            request,
            watched=watched,
            below=f"{group}/kernels",
            sums={group: sum_of_all},
            box=self.box,
        )

    def warmth(self, peer: Peer, wish: Ahead, watched: int, opened: ExitStack) -> Warmth:
        """For this box alone. What is for all servers in it ends with the box."""
        if wish.alone:
            return _warmth(wish, self.box, watched, watched)
        init = open_init(RecordFolder(Path(self.runtime, self.box)).read())
        if init is None:
            raise _has_ended()
        opened.callback(os.close, init)
        return _warmth(wish, self.box, watched, init)

    def hand_over(self, folder: RecordFolder, peer: Peer) -> None:
        """The same sockets by names in a folder which the box sees."""
        link_into(folder.sockets, self._names_of(folder))

    def listen_in_place(self, folder: RecordFolder, peer: Peer) -> int:
        """Among the names that the box sees."""
        return listen_in_place(self._names_of(folder), 0, 0, 0o666)

    def _names_of(self, folder: RecordFolder) -> Path:
        return Path(self.folder, folder.path.name, "sockets")

    def met_at(self, folder: RecordFolder) -> str:
        """Inside."""
        return f"{KERNELS}/{folder.path.name}"

    def workdir(self, record: Record) -> str:
        """Inside, where it has the path that was asked for."""
        return record.shown_at

    def seen_as(self, uid: int, gid: int) -> tuple[str, str] | None:
        """The server's user there has what is the person's outside."""
        user, marks = self.first_id + KERNEL_ID, f"{FOREIGN_ID} {self.first_id} 1"
        return f"{marks}\n{uid} {user} 1", f"{marks}\n{gid} {user} 1"

    def leave(self, sandbox_id: str) -> None:
        """Its names for the sockets."""
        shutil.rmtree(Path(self.folder, sandbox_id), ignore_errors=True)

    def keep_alone(self, ids: Sequence[str]) -> None:
        """What ended while no hub was there."""
        for name in set(_names(self.folder)) - set(ids):
            self.leave(name)


def _as_given(volume: Volume, root: int, opened: ExitStack) -> tuple[Volume, Place]:
    """A *volume* of the server which has that *root*, opened outside, where it is still the same;
    its kernels run nothing from what it runs nothing from."""
    inside = kernel_calls.openat2(root, volume.target, os.O_PATH, _IN_BOX)
    opened.callback(os.close, inside)
    status = os.fstat(inside)
    outside = open_again(volume.source, status.st_dev, status.st_ino, 0)
    opened.callback(os.close, outside)
    noexec = volume.noexec or bool(os.fstatvfs(inside).f_flag & os.ST_NOEXEC)
    attempt = f"show the server's volume {volume.target!r} to its kernel"
    place = Place.brought(volume.source, outside, opened, attempt=attempt)
    return replace(volume, noexec=noexec), place


def _by_real_paths(
    spec: SandboxSpec, fds: Sequence[int]
) -> tuple[SandboxSpec, dict[str, int], tuple[str, int] | None]:
    """What is asked for, where volumes and a root are called by what they are, and not by what they
    are said to be: a policy judges paths. With the descriptors by path, and that of the root."""
    by_name = dict(zip(sources_of(spec), fds, strict=True))
    opened, root = dict(by_name), None
    if spec.rootfs.startswith("/"):
        root = _real_root(spec.rootfs, opened.pop(spec.rootfs))
        spec = replace(spec, rootfs=root[0])
    found = {v: os.readlink(f"/proc/self/fd/{opened.pop(v.source)}") for v in spec.volumes}
    for volume, path in found.items():
        # The work directory's name is what was said, so it may be what something else is.
        if opened.setdefault(path, by_name[volume.source]) != by_name[volume.source]:
            raise SpecError(
                attempt=f"show the kernel {volume.source!r} at {volume.target}",
                answer=f"it is {path}, and one path is given twice",
                remedy="Name each directory once, by its real path.",
            )
    volumes = tuple(replace(volume, source=path) for volume, path in found.items())
    return replace(spec, volumes=volumes), opened, root


def _check_runs(flags: int, outside: int, eyes: Eyes, attempt: str) -> None:
    """SpecError where a kernel could run what lies there, *outside*, and its server, which has it
    by a mount with *flags*, cannot."""
    if flags & ~eyes(os.fstatvfs, outside).f_flag & os.ST_NOEXEC:
        raise SpecError(
            attempt=attempt,
            answer="its server can run no program there",
            remedy="Name another place.",
        )


def _real_root(name: str, fd: int) -> tuple[str, int]:
    path = os.readlink(f"/proc/self/fd/{fd}")
    if not path.startswith("/"):  # no other text may become the name of an image of root's
        raise SpecError(
            attempt=f"use {name} as the root file system",
            answer="what came for it is neither a directory nor a file",
            remedy="Name a directory, or an image.",
        )
    return path, fd


def _caller(peer: Peer, wish: Wish, opened: dict[str, int], root: tuple[str, int] | None) -> Caller:
    return Caller(
        uid=peer.uid,
        gid=peer.gid,
        home=wish.home,
        cwd=wish.here,
        umask=wish.umask,
        environment=wish.inherited,
        groups=peer.groups,
        server=wish.server,
        opened=opened,
        root=root,
    )


def _warmth(wish: Ahead, user: str, server: int, watched: int) -> Warmth:
    """What *wish* says, within bounds, for the process *server* or for all of the *user*'s."""
    pid = pid_of(server) if wish.alone else 0
    lonely = wish.lonely_seconds
    return Warmth(
        preload=wish.preload,
        spares=min(wish.spares, _MOST_SPARES),
        idle_seconds=min(wish.idle_seconds, _LONGEST_SECONDS),
        lonely_seconds=lonely if lonely is None else min(lonely, _LONGEST_SECONDS),
        owner=f" {pid} {start_time(pid)}" if wish.alone else "",
        waited_for=wish.waited_for,
        user=user,
        watched=watched,
    )


def _root_of(folder: Path, opened: ExitStack) -> int:
    """A descriptor of the root directory of the sandbox which has the record in *folder*."""
    with contextlib.suppress(*UNREADABLE):
        record = RecordFolder(folder).read()
        if (pidfd := open_init(record)) is not None:
            opened.callback(os.close, pidfd)
            root = os.open(f"/proc/{record.init_pid}/root", os.O_PATH | os.O_CLOEXEC)
            opened.callback(os.close, root)
            if not is_readable(pidfd):  # so it was this one's
                return root
    raise _has_ended()


def _read_only_in(folder: Path) -> tuple[str, ...]:
    """Where the sandbox which has the record in *folder* has mounts that it can only read."""
    with contextlib.suppress(*UNREADABLE):
        return read_only(RecordFolder(folder).read().init_pid)
    raise _has_ended()


def _has_ended() -> SpecError:
    return SpecError(
        attempt="start a kernel beside its server",
        answer="that one has ended, or has not begun yet",
        remedy="Try again in a moment.",
    )


def _names(folder: str) -> Iterator[Any]:
    with contextlib.suppress(OSError):
        yield from os.listdir(folder)
