"""broker/kept.py - the daemon: what of a user's kernels outlives them, in folders of root's.

What kernels write for review is decided about by its user, with that user's rights: root hands out
descriptors, and follows nothing that a kernel has left. What is written comes as a mount of its
own, in no mount namespace, so that nothing is moved into it, or out of it, by a rename (EXDEV).
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sandbox_provisioner.broker.eyes import Eyes
from sandbox_provisioner.broker.mapped import mapped
from sandbox_provisioner.broker.peer import Peer
from sandbox_provisioner.broker.wishes import Question
from sandbox_provisioner.errors import HostError, LaunchError, SpecError
from sandbox_provisioner.facilities.storage import images
from sandbox_provisioner.facilities.storage.facts import image_obstacle
from sandbox_provisioner.inside import kernel_calls
from sandbox_provisioner.layers import disks
from sandbox_provisioner.layers.folders import REVIEW, About, ReviewFolder, collect, folders_of
from sandbox_provisioner.layers.kept import collect_layers, layers_of, reset, told_of
from sandbox_provisioner.layers.place import all_bases, layer_path, of_person
from sandbox_provisioner.layers.review import settle
from sandbox_provisioner.records import Record
from sandbox_provisioner.removal import is_aside
from sandbox_provisioner.spec import SandboxSpec

Answer = dict[str, Any]
SeenAs = Callable[[int, int], tuple[str, str] | None]
MOST_REVIEWS = 64  # of a user
_SECONDS = 2.0
# By the ids of kernels, for whom each was started: images have their names, and people choose them.
_whose: dict[str, int] = {}
_TOLD = ("sandbox_id", "kernel_id", "name", "notebook", "workdir", "since_ns")


class Kept:
    """All of it, in *layer_dir*; what nobody has decided about for *days* goes."""

    def __init__(self, layer_dir: str, days: float, where: str = "") -> None:
        """*where* tells the desk that it is for from others of the same users."""
        self._where = where
        self._base = layer_path(layer_dir)
        self._days = days
        self._looking: dict[int, threading.Lock] = {}  # of which user

    def base(self, uid: int) -> Path:
        """Where that of the user *uid* lies."""
        return of_person(self._base, uid, self._where)

    def collect(self) -> None:
        """Remove what of anybody's is too old; that of who starts goes at each start."""
        for base in all_bases(self._base):
            collect(base, self._days)
            collect_layers(base)

    def check(self, uid: int, sandbox_id: str, spec: SandboxSpec) -> None:
        """Before a start of that user's: SandboxError where what is kept of it would be another
        one's, or have no bound, or where the user has to decide about something first."""
        self._check_room(uid, sandbox_id, spec)
        if _whose.get(sandbox_id) != uid and images.is_there(sandbox_id):
            raise LaunchError(
                attempt=f"start the sandbox {sandbox_id}",
                answer="there is one of that name, which is not this user's",
                remedy="Start a new kernel.",
                step="ask-broker",
            )
        if spec.keeps_layer and (why := image_obstacle(privileged=True)):
            # In a folder what belongs to nobody would count for nobody's quota.
            raise HostError(
                attempt=f'keep what a kernel installs (layer = "{spec.layer.value}") in an image',
                answer=why,
                remedy='Ask the administrator for it, or set layer to "auto" or "none".',
            )

    def started(self, uid: int, sandbox_id: str) -> None:
        """A kernel of that user's has started: what is kept of it is theirs."""
        _whose[sandbox_id] = uid

    def adopt(self, uid: int, record: Record) -> None:
        """A kernel that another broker has started may be started again by us."""
        _whose[record.sandbox_id] = uid
        if record.layer:
            with suppress(HostError, OSError):
                disks.own(record.sandbox_id, record.layer)

    def ended(self, uid: int, sandbox_id: str) -> bool:
        """Whether that user's kernel, which has ended, has left something for when it is started
        again. Nobody asks whose one was that has left nothing."""
        if images.is_there(sandbox_id):
            return True
        if _whose.get(sandbox_id) == uid:
            del _whose[sandbox_id]
        return False

    def forget(self, uid: int, sandbox_id: str) -> None:
        """That user's kernel will not be started again."""
        if _whose.get(sandbox_id) == uid:
            disks.end(sandbox_id)
            del _whose[sandbox_id]

    def _check_room(self, uid: int, sandbox_id: str, spec: SandboxSpec) -> None:
        if not spec.is_reviewed or self._folder(uid, sandbox_id).path.exists():
            return
        try:
            names = os.listdir(self.base(uid) / REVIEW)
        except FileNotFoundError:
            return
        if sum(not is_aside(name) for name in names) >= MOST_REVIEWS:
            raise SpecError(
                attempt="lay aside what the kernel writes",
                answer=f"the changes of {MOST_REVIEWS} kernels of this user wait for a decision, "
                "which is the most",
                remedy="Decide about some: jupyter sandbox diff, then keep or discard.",
            )

    def _folder(self, uid: int, sandbox_id: str) -> ReviewFolder:
        return ReviewFolder(self.base(uid) / REVIEW / sandbox_id)

    def settle(self, peer: Peer, path: str) -> None:
        """A kernel of the *peer*'s that wrote to the folder at *path* has ended. One is looked at
        at a time: what they look at may not answer."""
        eyes = Eyes.of(peer, _SECONDS)
        with self._turn(peer.uid) as is_ours:
            settle(path, eyes if is_ours else None)

    @contextmanager
    def _turn(self, uid: int) -> Iterator[bool]:
        turn = self._looking.setdefault(uid, threading.Lock())
        is_ours = turn.acquire(timeout=_SECONDS)
        try:
            yield is_ours
        finally:
            if is_ours:
                turn.release()

    # -- what is asked

    def answer(self, peer: Peer, question: Question, seen_as: SeenAs) -> tuple[Answer, int]:
        """What *question* asks of the *peer*'s, and a descriptor, -1 for none; *seen_as* is that of
        the desk where it is asked."""
        if question.ask == "layers":
            found = layers_of(self.base(peer.uid), peer.uid)
            return {"kernels": [told_of(*one) for one in found]}, -1
        if question.ask == "layer-reset":
            self._reset(peer.uid, question.name)
            return {}, -1
        if question.ask == "reviews":
            return {"kernels": [_told(*one) for one in folders_of(self.base(peer.uid))]}, -1
        folder = self._folder(peer.uid, question.sandbox_id)
        try:
            if question.ask == "review-upper":
                return {}, _apart(folder, seen_as)
            return self._answered(folder, peer, question.ask)
        except FileNotFoundError:
            raise _none_left(question.sandbox_id) from None

    def _reset(self, uid: int, name: str) -> None:
        for folder, holder in layers_of(self.base(uid), uid):
            if folder.path.name == name:
                reset(folder, holder, _SECONDS)
                return
        raise LaunchError(
            attempt=f"find the layer {name[:64]!r}",
            answer="none of this user's has that name",
            remedy="See which there are: jupyter sandbox layer list",
            step="ask-broker",
        )

    def _answered(self, folder: ReviewFolder, peer: Peer, ask: str) -> tuple[Answer, int]:
        match ask:
            case "review-about":
                return {}, folder.open_about()
            case "review-take":
                return {}, _locked(folder)
            case "discard":
                self._discard(folder)
            case _:
                self.settle(peer, str(folder.path))
        return {}, -1

    def _discard(self, folder: ReviewFolder) -> None:
        os.close(folder.open_about())
        if not folder.take():
            raise _is_taken(folder)
        try:
            folder.remove(_SECONDS)
        finally:
            folder.forget()


def _told(folder: ReviewFolder, about: About) -> Answer:
    told = {name: getattr(about, name) for name in _TOLD}
    return told | {"running": folder.is_running, "ended": folder.ended}


def _apart(folder: ReviewFolder, seen_as: SeenAs) -> int:
    """What is written in *folder*, as a mount that lies nowhere, and is nobody's way out."""
    about = folder.read()
    maps = seen_as(about.owner_uid, about.owner_gid)
    upper = folder.open_upper()
    try:
        return mapped(upper, maps) if maps else _cloned(upper)
    finally:
        os.close(upper)


def _cloned(upper: int) -> int:
    mount = kernel_calls.open_tree("", dir_fd=upper)
    try:
        kernel_calls.mount_setattr(mount, add=kernel_calls.MOUNT_NOSUID | kernel_calls.MOUNT_NODEV)
    except BaseException:
        os.close(mount)
        raise
    return mount


def _locked(folder: ReviewFolder) -> int:
    """The lock of *folder*, for whoever closes it last; not to be written."""
    os.close(folder.open_about())
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(folder.path / "lock", flags)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            raise _is_taken(folder) from None
        raise
    return fd


def _is_taken(folder: ReviewFolder) -> HostError:
    return HostError(
        attempt=f"decide about the changes of {folder.path.name}",
        answer="it runs, or another command decides at this moment",
        remedy="Shut it down first.",
    )


def _none_left(sandbox_id: str) -> LaunchError:
    return LaunchError(
        attempt=f"find the changes of {sandbox_id}",
        answer="no such kernel of this user has left any",
        remedy="See which there are: jupyter sandbox diff",
        step="ask-broker",
    )
