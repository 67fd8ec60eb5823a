"""layers/folders.py - any process outside: a folder for each kernel whose changes somebody reviews.

::

    <layer directory>/
      lock                      held while a folder is made or removed
      review/<sandbox id>/
        about.json              whose, of which directory, since when: `About`
        lock                    locked by PID 1 of the box for as long as it lives; touched at
                                its end
        box/upper, box/work     what an overlay keeps: the only part that a box is given
        begun                   there from a start until somebody has seen that it has ended
      review/<...>.trash/       what is left of one that was removed: see `removal.py`

It is there from the first start of a kernel, over its restarts, until all that it had changed is
kept or discarded. The Linux kernel lets go of the lock of a box that is gone, however it went.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sandbox_provisioner import removal
from sandbox_provisioner.descriptors import keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.ids.facts import FOREIGN_ID
from sandbox_provisioner.host import WorkdirFacts
from sandbox_provisioner.layers.guard import UNFINISHED
from sandbox_provisioner.layers.owner import as_owner
from sandbox_provisioner.layers.place import check_upper
from sandbox_provisioner.locks import is_free, lock_at_once, locked
from sandbox_provisioner.mounts import mounts_around
from sandbox_provisioner.places import Asker, Place
from sandbox_provisioner.records import UNREADABLE
from sandbox_provisioner.spec import Covers

REVIEW = "review"
OURS = -1
_MOST_BYTES = 1 << 22
# CLOCK_REALTIME_COARSE of clock_gettime(2), by which files get their times.
_COARSE = 5
_DAY_SECONDS = 86400.0
# File systems whose times another machine, or another kernel, tells.
_CLOCKS_OF_OTHERS = {"9p", "afs", "ceph", "cifs", "nfs", "nfs4", "smb3", "virtiofs"}
# With every start folders are looked at: nobody's age is more than that by a clock that was right.
_YEAR_SECONDS = 366 * _DAY_SECONDS
REVIEW_DAYS = 14.0
_AT_A_START_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a folder is about: *workdir* is the real path of the work directory, *device* and
    *inode* tell that one from whatever stands there later. *since_ns* is when the kernel began, by
    the clock that files have their times from. *closed* are the places in it that this kernel was
    not given, relative to it, and *covers* by which rules that was decided. *uid* is who asked for
    it, where that is somebody else than who launched it, else `OURS`."""

    sandbox_id: str
    kernel_id: str = ""
    name: str = ""
    notebook: str = ""
    workdir: str = ""
    shown_at: str = ""
    device: int = 0
    inode: int = 0
    owner_uid: int = 0
    owner_gid: int = 0
    since_ns: int = 0
    uid: int = OURS
    closed: tuple[str, ...] = ()
    covers: dict[str, Any]

    @property
    def short_id(self) -> str:
        """As people see it in lists and sentences."""
        return (self.kernel_id or self.sandbox_id)[:8]

    def is_of_same(self, other: About) -> bool:
        """Whether both are of one directory, with one owner."""
        mine, theirs = (
            (one.workdir, one.device, one.inode, one.owner_uid, one.owner_gid)
            for one in (self, other)
        )
        return mine == theirs

    @property
    def rules(self) -> Covers:
        """The covers as the spec has them."""
        known = {one.name for one in fields(Covers)}
        given = {name: value for name, value in self.covers.items() if name in known}
        placed = tuple((path, text) for path, text in given.pop("repository_placed", ()))
        whole = bool(given.pop("whole", False))
        lists = {name: tuple(map(str, value)) for name, value in given.items()}
        return Covers(whole=whole, repository_placed=placed, **lists)


def about(sandbox_id: str, workdir: WorkdirFacts, covers: Covers, uid: int, **labels: str) -> About:
    """What a start with that *workdir* is about, which *uid* asks for."""
    place, found = workdir.place, workdir.covered
    hidden = (*found.directories, *found.files, *found.links, *found.sockets, *found.frozen)
    return About(
        sandbox_id=sandbox_id,
        workdir=place.source,
        shown_at=place.path,
        device=place.device,
        inode=place.inode,
        owner_uid=place.owner_uid,
        owner_gid=place.owner_gid,
        since_ns=_now_ns(place, f"{UNFINISHED}{sandbox_id}-0"),
        closed=(*hidden, *(path for path, _ in found.placed)),
        covers=asdict(covers),
        uid=OURS if uid == os.geteuid() else uid,
        **labels,
    )


def _now_ns(place: Place, name: str) -> int:
    """Now, by the clock that files of *place* get their times from. That of a file server is the
    server's: it is read off a new file *name*, which `keep` removes should it stay. Nobody can tell
    what has changed since where none can be made: all that there is has, then."""
    mount, _ = mounts_around(place.fd, place.source)
    kind = mount.filesystem
    if kind not in _CLOCKS_OF_OTHERS and not kind.startswith("fuse"):
        return time.clock_gettime_ns(_COARSE)
    try:
        with as_owner(place.owner_uid, place.owner_gid):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=place.fd)
            try:
                return os.fstat(fd).st_ctime_ns
            finally:
                os.close(fd)
                os.unlink(name, dir_fd=place.fd)
    except OSError:
        return 0


class ReviewFolder:
    """The folder at *path*; who has taken it has its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock_fd = -1
        self.is_new = False
        keep_from_children(self)

    @property
    def upper(self) -> Path:
        """What the kernel has written, as an overlay keeps it."""
        return self.path / "box/upper"

    @property
    def told(self) -> str:
        """Where that is, for people."""
        return str(self.upper)

    def open_upper(self) -> int:
        """A descriptor of it; OSError."""
        return os.open(self.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)

    def forget(self) -> None:
        """Close our copy of the lock; PID 1 may have another."""
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    def read(self) -> About:
        """What it is about; `UNREADABLE` where that cannot be told."""
        return read_about(self.open_about())

    def open_about(self) -> int:
        """A descriptor of the file that tells it; OSError."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(self.path / "about.json", flags)

    def take(self) -> bool:
        """Lock it, until `forget`; whether it is ours now."""
        try:
            self.lock_fd = lock_at_once(self.path / "lock")
        except (BlockingIOError, FileNotFoundError):
            return False
        return True

    @property
    def is_running(self) -> bool:
        """Whether a box writes there."""
        return not is_free(self.path / "lock")

    @property
    def ended(self) -> float:
        """When its last box began, or ended."""
        return (self.path / "lock").stat().st_mtime

    def begin(self) -> None:
        """A box is about to write there."""
        (self.path / "begun").touch(mode=0o600)
        os.utime(self.path / "lock")

    def touch(self) -> None:
        """From now on it waits for somebody's decision."""
        os.utime(self.path / "lock")
        (self.path / "begun").unlink(missing_ok=True)

    @property
    def has_begun(self) -> bool:
        """Whether nobody has seen the end of its last box yet, as where the machine went down."""
        return (self.path / "begun").exists()

    def open(self, asker: Asker, opened: ExitStack) -> Place:
        """What a box is given of it."""
        return Place.open(str(self.path / "box"), asker, opened, attempt="lay changes aside")

    def remove(self, seconds: float = float("inf")) -> None:
        """Remove all of it, of very much what *seconds* allow; the rest goes with the next
        sweep."""
        with contextlib.suppress(FileNotFoundError):
            aside = removal.set_aside(self.path)
            with contextlib.suppress(OSError):
                removal.empty(aside, seconds)

    def discard(self) -> None:
        """Throw away what is there, which we have taken."""
        self.remove()

    def settle(self) -> None:
        """The same where nothing is left to decide about."""
        self.remove()


def read_about(fd: int) -> About:
    """What the file *fd*, which is closed, tells; `UNREADABLE` where it tells nothing."""
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no file")
        found = json.loads(file.read(_MOST_BYTES))
    found["closed"] = tuple(map(str, found["closed"]))
    return About(**found)


def take_folder(base: Path, mine: About, workdir: Place, *, maps_ids: bool) -> ReviewFolder:
    """The folder for a start that is about *mine*, made where this is the kernel's first start, and
    locked; HostError if there can be none."""
    folder = ReviewFolder(base / REVIEW / mine.sandbox_id)
    attempt = f"lay aside what the kernel writes in {mine.shown_at}"
    try:
        (base / REVIEW).mkdir(mode=0o700, exist_ok=True)
        check_upper(base / REVIEW, maps_ids=maps_ids)
        with locked(base):
            folder.is_new = not (folder.path / "about.json").exists()
            if folder.is_new:
                _make(folder, mine, workdir, maps_ids=maps_ids)
            if not folder.take():
                raise HostError(
                    attempt=attempt,
                    answer=f"a kernel, or a command, is at work in {folder.path}",
                    remedy="Wait for its end, and start again.",
                )
    except OSError as error:
        raise HostError(
            attempt=attempt,
            answer=f"{folder.path}: {error.strerror or error}",
            remedy="Set layer_dir to a directory with free space.",
        ) from None
    try:
        _check_same(folder, mine, attempt)
        folder.begin()
    except BaseException:
        folder.forget()
        raise
    return folder


def _check_same(folder: ReviewFolder, mine: About, attempt: str) -> None:
    """HostError where what was written before a restart is about something else, or nobody can
    tell."""
    if folder.is_new:
        return
    answer = "what it wrote before its restart was in another directory"
    try:
        if folder.read().is_of_same(mine):
            return
    except UNREADABLE as error:
        answer = f"{folder.path}/about.json cannot be read: {error}"
    raise HostError(
        attempt=attempt,
        answer=answer,
        remedy=f"Decide about that first: jupyter sandbox diff {mine.short_id}",
    )


def _make(folder: ReviewFolder, mine: About, workdir: Place, *, maps_ids: bool) -> None:
    """All of it; about.json comes last, since by that it counts. A start that was killed in here
    may have left a part of it."""
    if folder.path.exists():
        folder.remove()
    folder.path.mkdir(mode=0o700)
    (folder.path / "lock").touch(mode=0o600, exist_ok=False)
    mode = stat.S_IMODE(os.fstat(workdir.fd).st_mode) & 0o1777
    box = folder.path / "box"
    for path in (box, box / "upper", box / "work"):
        path.mkdir(mode=0o700)
    if maps_ids:
        for path in (box, box / "work"):
            os.chown(path, FOREIGN_ID, FOREIGN_ID)
        os.chown(box / "upper", workdir.owner_uid, workdir.owner_gid)
    os.chmod(box / "upper", mode)
    new = folder.path / "about.new"
    new.write_text(json.dumps(asdict(mine)))
    new.replace(folder.path / "about.json")


def folders_of(base: Path) -> Iterator[tuple[ReviewFolder, About]]:
    """Every one with what it is about, the oldest first."""
    found = []
    with contextlib.suppress(OSError):
        for path in (base / REVIEW).iterdir():
            if not removal.is_aside(path.name):
                with contextlib.suppress(*UNREADABLE):
                    found.append((ReviewFolder(path), ReviewFolder(path).read()))
    yield from sorted(found, key=lambda pair: pair[1].since_ns)


def collect(base: Path, days: float, seconds: float = _AT_A_START_SECONDS) -> list[str]:
    """Remove what nobody has decided about for *days*, and what killed processes have left
    unfinished; the ids of the former."""
    gone: list[str] = []
    try:
        paths = list((base / REVIEW).iterdir())
    except OSError:
        return gone
    until = time.monotonic() + seconds
    for path in paths:
        with contextlib.suppress(OSError):
            if removal.is_aside(path.name):
                removal.empty(path, until - time.monotonic())
            elif _is_old(ReviewFolder(path), base, days):
                gone.append(path.name)
    return gone


def _is_old(folder: ReviewFolder, base: Path, days: float) -> bool:
    """Whether it was, and is gone now."""
    if (folder.path / "about.json").exists():
        age = time.time() - folder.ended
        was_wrong = not 0 <= age < days * _DAY_SECONDS + _YEAR_SECONDS
        if (age < days * _DAY_SECONDS and not was_wrong) or not folder.take():
            return False
        try:
            # Its end is seen now, however long it ran, or this machine's clock was set meanwhile:
            # the days begin.
            if folder.has_begun or was_wrong:
                folder.touch()
                return False
            folder.remove(_AT_A_START_SECONDS)
            return True
        finally:
            folder.forget()
    with locked(base):  # who makes one has this lock
        if not (folder.path / "about.json").exists():
            folder.remove(_AT_A_START_SECONDS)
    return False
