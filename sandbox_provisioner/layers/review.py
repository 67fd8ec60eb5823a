"""layers/review.py - any process outside: what a kernel's folder says, for whoever decides.

`settle` is called at each end of a kernel, whoever ends it: without a change there is nothing to
decide, and the folder goes. What was launched for another user is compared with that one's rights
alone, and else not at all: a work directory is the user's to change, and may lie by now on a file
system that answers root nothing, or something else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sandbox_provisioner.errors import SandboxError, SpecError
from sandbox_provisioner.host import HostFacts, WorkdirFacts
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers.changes import Walk, open_below
from sandbox_provisioner.layers.folders import OURS, About, ReviewFolder
from sandbox_provisioner.layers.guard import Guard
from sandbox_provisioner.places import open_again
from sandbox_provisioner.records import UNREADABLE

_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_AN_END_SECONDS = 0.02
# At an end nobody waits longer to know whether anything has changed: then it counts as changed.
_LOOK_SECONDS = 0.5


class Folder(Protocol):
    """Where one kernel's changes lie, for who decides: `ReviewFolder`, or what a broker has."""

    @property
    def told(self) -> str:
        """Where the upper directory is, for people; "" for one that no path leads to."""
        ...

    @property
    def is_running(self) -> bool:
        """Whether a box writes there."""
        ...

    @property
    def ended(self) -> float:
        """When its last box began, or ended."""
        ...

    def read(self) -> About:
        """What it is about; `UNREADABLE`."""
        ...

    def open_upper(self) -> int:
        """A descriptor of what the kernel has written; OSError."""
        ...

    def take(self) -> bool:
        """Lock it, until `forget`; whether it is ours now."""
        ...

    def forget(self) -> None:
        """Let go of it; more than once is fine."""
        ...

    def discard(self) -> None:
        """Throw away what is there, which we have taken."""
        ...

    def settle(self) -> None:
        """The same where nothing is left to decide about."""
        ...


class SeenBy(Protocol):
    """Calls a function with somebody's rights over files; HostError if that takes too long."""

    def __call__(self, look: Callable[..., bool], *arguments: object) -> bool:
        """Whatever *look* raises is raised."""
        ...


@dataclass(frozen=True, slots=True)
class Review:
    """A folder with the work directory beside it: two descriptors, and what of both counts."""

    folder: Folder
    about: About
    upper: int
    real: int
    guard: Guard

    @property
    def walk(self) -> Walk:
        """A new look at it."""
        return Walk(self.upper, self.real, self.about.since_ns, self.guard)


@contextlib.contextmanager
def reviewed(folder: Folder, about: About) -> Iterator[Review]:
    """*folder*, and the work directory as it is now; SpecError where that is another, or nobody may
    work there any more. What is closed is so by what was found at the start, and is found now."""
    with ExitStack() as opened:
        host = HostFacts.probe()
        found = WorkdirFacts.probe(about.workdir, host, about.rules, opened)
        if found.place.inode != about.inode:
            raise SpecError(
                attempt=f"find the work directory of kernel {about.short_id}",
                answer=f"another directory stands at {one_line(about.workdir)} now",
                remedy="Move that away and the old one back, or discard the changes.",
            )
        hidden = (path.removeprefix(f"{found.source}/") for path in found.out_of_reach)
        placed = (path for path, _ in found.covered.placed)
        guard = Guard((*about.closed, *hidden, *placed), about.rules)
        real = open_below(found.place.fd, "", _FOLDER)
        opened.callback(os.close, real)
        upper = folder.open_upper()
        opened.callback(os.close, upper)
        yield Review(folder, about, upper, real, guard)


def settle(path: str, seen_by: SeenBy | None = None) -> None:
    """A box that wrote to the folder at *path* has ended: remove that, if nothing has changed.
    *seen_by* looks for whom it was launched, where that is another user."""
    folder = ReviewFolder(Path(path))
    if not folder.take():
        return  # it was restarted, or somebody decides already
    try:
        if _has_changed(folder, seen_by):
            folder.touch()
        else:
            folder.remove(_AN_END_SECONDS)
    finally:
        folder.forget()


def _has_changed(folder: ReviewFolder, seen_by: SeenBy | None) -> bool:
    """Whether anything has, or nobody can tell."""
    with ExitStack() as opened:
        try:
            about = folder.read()
            upper = folder.open_upper()
            opened.callback(os.close, upper)
            if about.uid == OURS:
                return _differs(upper, about)
            return seen_by(_differs, upper, about) if seen_by else _has_any(upper)
        except (*UNREADABLE, SandboxError):
            return True


def _has_any(upper: int) -> bool:
    with os.scandir(upper) as entries:
        return next(entries, None) is not None


def _differs(upper: int, about: About) -> bool:
    """Whether *upper* has anything that the real directory has not."""
    with ExitStack() as opened:
        workdir = open_again(about.workdir, about.device, about.inode)
        opened.callback(os.close, workdir)
        real = open_below(workdir, "", _FOLDER)
        opened.callback(os.close, real)
        guard = Guard(about.closed, about.rules)
        walk = Walk(upper, real, about.since_ns, guard, _LOOK_SECONDS)
        return next(walk.changes(), None) is not None


def waiting(path: str, name: str, workdir: str) -> str:
    """A sentence where what kernel *name* has changed waits for a decision, else ""."""
    if not path or not os.path.exists(path):
        return ""
    return (
        f"What kernel {name} has changed in {one_line(workdir)} waits for a decision. Look at it: "
        f"jupyter sandbox diff {name}; then: jupyter sandbox keep {name}, or discard {name}."
    )
