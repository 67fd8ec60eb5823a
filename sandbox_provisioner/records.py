"""records.py - any process outside: a folder for each sandbox, and the record in it.

::

    <runtime directory>/
      lock                      held while a record is made or swept away
      <first id>.ids            a link to the sandbox that has this range of ids
      <sandbox id>/
        record.json             who, where, which limits: `Record`
        owner                   locked by the server for as long as it lives
        server                  the process that asked a broker or a hub for it
        exit                    written by PID 1 when the kernel ends
        activity                "busy" or "idle", written by its server when it changes
        network                 what it has sent and received, written by the network gateway
        card                    the address of its network card, where it has one, and the names
                                that are known of addresses
        sockets/                the kernel's own: shows inside as /run/kernel
        private/                its home, /tmp and connection file, where it shares our mounts
      <...>.trash/              what is left of one that was removed: see `removal.py`

A kernel can write to the last two of a sandbox, and a name in a record may be its invention: what
is read here is small and regular, and what is wrong with one folder concerns no other.
The Linux kernel lets go of a dead process's locks, so "is its server still there" needs no pids.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from sandbox_provisioner import removal
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.descriptors import is_readable, keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, FIRST_PERSONS_ID, IDS, INIT_ID
from sandbox_provisioner.facilities.network.card import counts
from sandbox_provisioner.facilities.network.tell.counts import Traffic, Writer, read_counts
from sandbox_provisioner.locks import lock, lock_soon, locked, unlock

# sun_path of unix(7) less its final NUL; the longest name of a socket is "/s-5".
LONGEST_SOCKET_PATH = 107
_ID_LENGTH = 12
_RANGE = ".ids"
BUSY, IDLE = "busy", "idle"
SERVER = "server"  # the kind of a hub user's Jupyter server
# The kinds of what serves kernels, or waits to be one.
SPARE = "spare"
OF_NOBODY = frozenset({"nursery", SPARE, "gateway"})
BUILDING = ".building"  # locked by who makes a nursery
# What reading a record raises that is not (yet) whole, or is somebody else's file.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
# A record names some hundred paths; nobody waits for the reading of more.
_MOST_BYTES = 1 << 22
# Raised where an older version would do harm that does not know what is new in a record. What is
# merely new it keeps, and does not look at.
VERSION = 1


class LaterVersion(ValueError):
    """Somebody who is newer than us has written a record that we cannot mean: it is let alone."""


# Whether there is room for one more record in a runtime directory; raises where there is none.
Admit = Callable[["Record", Path], None]
# How long is spent on a kernel's many files while somebody waits for its end. What there is more
# goes with the next starts, or with `jupyter sandbox gc`.
_AN_END_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What somebody who did not start a sandbox needs to find, show, stop or clean it up.

    *made* are (kind, path) of stand-ins' mount points that did not exist before, and that go with
    this sandbox; *planned*, while it starts, those that its plan would make.
    *notebook* is what its front end says that it is for (JPY_SESSION_NAME), "" where none does.
    *init_start* is the start time of PID 1 in clock ticks (proc(5)), which makes a pid unique.
    *kind* is "kernel", "nursery" for a process that kernels are forked from, "spare" for a kernel
    that waits for a start, "gateway" for what serves the network of kernels, or "server" for a
    whole Jupyter server of a hub's user; *nursery* is the id
    of the one that this kernel is forked from. *network* is which one it has, as `spec.Network`.
    *group* is the name of its control groups where that is not its id: a spare keeps its own, and
    a person's are below others. *person* is for whom it runs by the administrator's policy, ""
    where there was none. *changed* tells what has been changed since it started.
    *sum_bytes* is the memory limit of all that this person runs in one group with it. *unheard*:
    who started it has gone, and whoever has found it since cannot speak to its PID 1.
    *workdir* is the real path of its work directory, which shows inside as *shown_at*; *device* and
    *inode* tell that directory from whatever may stand at that path later; *repositories* are those
    that were in it before. *review* is the folder in which lies what it has changed there, where
    somebody looks at that first. *uid* is the user whose server asked for it, *box* the sandbox
    that this server is in, "" if it is in none; *storage* what holds a limit of its disk, "" where
    there is none. *stopped_by* is the user who has stopped it, "" if nobody has. *layer* is the
    root over which its image keeps what it installs for restarts, "" where it keeps nothing.
    *version* is that of the record, *later* what a later version has written into it, which goes on
    with it.
    """

    sandbox_id: str
    kernel_id: str = ""
    name: str = ""
    notebook: str = ""
    user: str = ""
    started: float = 0.0
    init_pid: int = 0
    init_start: int = 0
    survives_server: bool = False
    cgroup_version: int = 0
    cgroup_manager: str = ""
    cgroup_bases: Mapping[str, str] = field(default_factory=dict)
    memory_limit_bytes: int | None = None
    cpu_cores: float | None = None
    first_id: int = 0
    workdir: str = ""
    shown_at: str = ""
    device: int = 0
    inode: int = 0
    review: str = ""
    repositories: tuple[str, ...] = ()
    made: tuple[tuple[str, str], ...] = ()
    planned: tuple[tuple[str, str], ...] = ()
    confinement: str = "namespaces"
    kind: str = "kernel"
    nursery: str = ""
    network: str = "none"
    group: str = ""
    person: str = ""
    uid: int = 0
    box: str = ""
    changed: str = ""
    sum_bytes: int | None = None
    unheard: bool = False
    storage: str = ""
    stopped_by: str = ""
    layer: str = ""
    version: int = VERSION
    later: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tree(self) -> str:
        """The name of its control groups, as `cgroup.open_existing` wants it."""
        return self.group or self.sandbox_id

    @property
    def end_signal(self) -> int:
        """What ends all of it, sent to its init."""
        return confiner(self.confinement).end_signal


def runtime_directory(configured: str = "") -> Path:
    """Where the records live: *configured*, or the place that systemd gives to this user.

    Short, since the paths of sockets are limited; made with mode 0700 if it is missing.
    """
    path = Path(os.path.abspath(configured)) if configured else _default_directory()
    _refuse_too_long(RecordFolder(path / ("x" * _ID_LENGTH)))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise _cannot_keep(path, error.strerror or str(error)) from None
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise _cannot_keep(path, "others than this user can write to it")
    return path


def _default_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/run/sandbox-provisioner")
    given = os.environ.get("XDG_RUNTIME_DIR")
    if given and os.access(given, os.W_OK):
        return Path(given, "sandbox-provisioner")
    # Below a place that the covers of a home directory always hide.
    return Path.home() / ".local/share/jupyter/sandboxes"


def _cannot_keep(path: Path, answer: str) -> HostError:
    return HostError(
        attempt=f"keep the sockets of kernels in {path}",
        answer=answer,
        remedy="Set runtime_dir to a short path on a writable file system with free space.",
    )


def _refuse_too_long(folder: RecordFolder) -> None:
    socket_path = str(folder.sockets / "s-5")
    if len(os.fsencode(socket_path)) > LONGEST_SOCKET_PATH:
        raise HostError(
            attempt=f"bind the kernel's sockets at {socket_path}",
            answer=f"the path of a socket may have {LONGEST_SOCKET_PATH} bytes at most",
            remedy="Set runtime_dir to a shorter path, such as /run/sandbox-provisioner.",
        )


class RecordFolder:
    """The folder of one sandbox, made by the server that starts it and removed by `remove`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._owner = -1
        self._first_id = 0  # of a record that may not have been written
        # Symbolic links elsewhere that lead into it, and go with it.
        self.links: list[Path] = []
        keep_from_children(self)

    @property
    def sockets(self) -> Path:
        """The directory that the kernel sees as /run/kernel."""
        return self.path / "sockets"

    @classmethod
    def create(
        cls, runtime: Path, record: Record, *, ids: bool, admit: Admit | None = None
    ) -> tuple[RecordFolder, Record]:
        """Make the folder and lock it; with *ids* also pick a free range of ids for the record,
        unless it has one. *admit* is asked first, when nobody else makes one, and raises where
        there is no room."""
        folder = cls(runtime / record.sandbox_id)
        _refuse_too_long(folder)
        with locked(runtime):
            if admit:
                admit(record, runtime)
            try:
                folder.path.mkdir(mode=0o700)
            except OSError as error:  # where it is there already, it is another sandbox's
                raise _cannot_keep(folder.path, error.strerror or str(error)) from None
            try:
                record = folder._fill(record, ids=ids)
            except OSError as error:
                folder.remove()
                raise _cannot_keep(folder.path, error.strerror or str(error)) from None
            except HostError:
                folder.remove()
                raise
        return folder, record

    def _fill(self, record: Record, *, ids: bool) -> Record:
        if ids and not record.first_id:
            self._first_id = _take_range(self.path.parent, record.sandbox_id)
            record = replace(record, first_id=self._first_id)
        self._hold(lock_soon(self.path / "owner"))  # a sweep looks at it for a moment
        self.sockets.mkdir(mode=0o700)
        self.write(record)
        return record

    def write(self, record: Record) -> None:
        """Save *record*, whole or not at all; OSError, also for more than anybody reads."""
        told = asdict(record)
        text = json.dumps(told.pop("later") | told)
        if len(text) > _MOST_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "record.json")
        new = self.path / "record.json.new"
        new.write_text(text)
        new.replace(self.path / "record.json")

    def finish(self, record: Record) -> Record:
        """Save *record* of a sandbox that runs now: what it has really made in place of what was
        planned, and what others have left to it meanwhile."""
        with locked(self.path.parent):
            record = replace(
                record, made=joined_stand_ins(record.made, self.read().made), planned=()
            )
            self.write(record)
        return record

    def remember(self, kind: str, path: str) -> None:
        """Note down a stand-in that was made while the sandbox runs; OSError or ValueError."""
        with locked(self.path.parent):
            record = self.read()
            self.write(replace(record, made=(*record.made, (kind, path))))

    def change(self, update: Callable[[Record], Record]) -> None:
        """Write down what has become another while the sandbox runs; OSError or ValueError."""
        with locked(self.path.parent):
            self.write(update(self.read()))

    def written(self) -> tuple[int, ...]:
        """What tells one state of the record from another; () where there is none."""
        try:
            status = (self.path / "record.json").stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns

    def read(self) -> Record:
        """Load the record; OSError or ValueError where it is not (yet) there whole, and
        `LaterVersion` where we could not mean it."""
        found: dict[str, Any] = json.loads(read_small(self.path / "record.json"))
        if (version := found.get("version", VERSION)) != VERSION:
            raise LaterVersion(f"its record is of version {version!r:.20}, and we know {VERSION}")
        for name in ("made", "planned"):
            found[name] = tuple((kind, path) for kind, path in found.get(name, ()))
        # A record of an earlier version lacks what has come since.
        found["repositories"] = tuple(map(str, found.get("repositories", ())))
        later = {name: found.pop(name) for name in found.keys() - _NAMES}
        return _checked(Record(**found, later=later))

    @property
    def exit_file(self) -> Path:
        """Where PID 1 writes down how the kernel ended."""
        return self.path / "exit"

    def read_exit_file(self) -> bytes:
        """What PID 1 wrote, b"" if it did not live to."""
        try:
            return read_small(self.exit_file)
        except OSError:
            return b""

    @property
    def counts_file(self) -> Path:
        """Where the network gateway counts what the kernel has sent and received."""
        return self.path / "network"

    def make_counts(self) -> int:
        """Make that file, which nobody else may open: the gateway gets this descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.counts_file, flags, 0o600)

    def note_card(self, address: IPv4Address, names: Mapping[str, str]) -> None:
        """Note down the address of its network card, whose counts Linux has, and the *names* that
        are known of addresses."""
        text = json.dumps({"address": str(address), "names": names})
        (self.path / "card").write_text(text)

    def write_last_counts(self, traffic: Traffic) -> None:
        """Keep what was counted of a sandbox that has ended, if there still is a folder."""
        new = self.path / "network.new"
        with contextlib.suppress(OSError):
            with new.open("wb", buffering=0) as file:
                Writer(partial(os.pwrite, file.fileno())).all(traffic)
            new.replace(self.counts_file)

    def read_counts(self) -> Traffic | None:
        """What has gone over its network so far; None where nobody counts that."""
        found = self._read_counts_file() or self._ask_card()
        return found or self._read_counts_file()  # the card may have ended in between

    def _ask_card(self) -> Traffic | None:
        try:
            card = json.loads(read_small(self.path / "card"))
            found = counts.counts(IPv4Address(card["address"]))
            return found.traffic(card["names"]) if found else None
        except UNREADABLE:
            return None

    def _read_counts_file(self) -> Traffic | None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            fd = os.open(self.counts_file, flags)
        except OSError:
            return None
        try:
            is_file = stat.S_ISREG(os.fstat(fd).st_mode)
            return read_counts(partial(os.pread, fd)) if is_file else None
        except OSError:
            return None
        finally:
            os.close(fd)

    def note_asker(self, pid: int) -> None:
        """Note down the process *pid*, which has asked somebody else for it, and to whom its end is
        to be told; OSError."""
        (self.path / "server").write_text(f"{pid} {start_time(pid)}")

    def open_asker(self) -> int | None:
        """A pidfd of that process; -1 if it has ended, None if none is noted down."""
        try:
            pid, start = map(int, read_small(self.path / "server").split())
        except (OSError, ValueError):
            return None
        return _open_same(pid, start)

    def forget_asker(self) -> None:
        """It is nobody's to hear of."""
        (self.path / "server").unlink(missing_ok=True)

    def is_asked_for(self) -> bool:
        """Whether that process lives, and may still want to know how it has ended."""
        asker = self.open_asker()
        if asker is None or asker < 0:
            return False
        os.close(asker)
        return True

    def note_activity(self, *, busy: bool) -> None:
        """Tell `list` what the kernel's messages say; where that cannot be written nobody does."""
        with contextlib.suppress(OSError):
            (self.path / "activity").write_text(BUSY if busy else IDLE)

    def read_activity(self) -> str:
        """`BUSY`, `IDLE`, or "" where nobody listens to its messages, or has not yet."""
        try:
            found = read_small(self.path / "activity").decode()
        except (OSError, ValueError):
            return ""
        return found if found in {BUSY, IDLE} else ""

    def own_if_orphan(self) -> bool:
        """Make it ours, until `release` or `remove`, if no server holds it (any more); whether it
        is now.

        Without an owner's file it is being made, or removed, by somebody: see `_sweep_unwritten`.
        """
        try:
            owner = lock(self.path / "owner", fcntl.LOCK_EX | fcntl.LOCK_NB, make=False)
        except (BlockingIOError, FileNotFoundError):
            return False
        if not os.fstat(owner).st_nlink:
            # It was removed before we had it; what has the name now may be a new start's.
            unlock(owner)
            return False
        self._owner = owner
        return True

    def turn_into(self, record: Record, admit: Admit | None = None) -> RecordFolder:
        """Make this folder, which is nobody's, ours and that of *record*; HostError if it has gone.

        Who finds it meanwhile sees a sandbox that outlives servers, and leaves it alone. *admit* as
        in `create`.
        """
        runtime = self.path.parent
        ours = RecordFolder(runtime / record.sandbox_id)
        with locked(runtime):
            if admit:
                admit(record, runtime)
            try:
                ours._hold(lock_soon(self.path / "owner", make=False))
                self.path.rename(ours.path)
                if record.first_id:
                    link = runtime / f"{record.first_id}{_RANGE}"
                    link.unlink(missing_ok=True)
                    link.symlink_to(record.sandbox_id)
                ours.write(record)
            except OSError as error:
                ours.remove()  # what has not been renamed goes with the next sweep
                raise _cannot_keep(ours.path, error.strerror or str(error)) from None
        return ours

    def _hold(self, owner: int) -> None:
        """Own it from now on, by the lock that is open as *owner*."""
        self._owner = owner
        held.add(self)

    def release(self) -> None:
        """Let go of the lock and leave the folder, for a sandbox that outlives its server."""
        held.discard(self)
        if self._owner >= 0:
            unlock(self._owner)
            self._owner = -1

    def forget(self) -> None:
        """In a child that was forked: a lock is held until the last copy of it is closed."""
        held.discard(self)
        if self._owner >= 0:
            os.close(self._owner)
            self._owner = -1

    def remove(self) -> None:
        """Remove the folder, and give its range of ids back; more than once is fine.

        What cannot be removed, or is too much to wait for, is set aside for the next `sweep`.
        """
        while self.links:
            with contextlib.suppress(OSError):
                self.links.pop().unlink()
        with contextlib.suppress(*UNREADABLE):
            first_id = self._first_id or self.read().first_id
            link = self.path.parent / f"{first_id}{_RANGE}"
            if os.readlink(link) == self.path.name:  # somebody who removed us as well gave it back
                link.unlink()
        with contextlib.suppress(OSError):
            aside = removal.set_aside(self.path)
            # First of all, since who waits for this lock knows by that what he has got.
            (aside / "owner").unlink(missing_ok=True)
            removal.empty(aside, _AN_END_SECONDS)
        self.release()


# Those that this process owns, with the sandboxes in them: `sweeping.py` ends them. Not the weak
# set of those that have a descriptor: who owns one may have dropped it without closing it.
held: set[RecordFolder] = set()


def read_small(path: Path) -> bytes:
    """What the regular file *path* holds; OSError for what is none, or is big."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", os.fspath(path))
        with open(fd, "rb", closefd=False) as file:
            text = file.read(_MOST_BYTES + 1)
    finally:
        os.close(fd)
    if len(text) > _MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fspath(path))
    return text


def _checked(record: Record) -> Record:
    """*record*, whose fields have come from a file; ValueError if one is not of its kind, or says
    that it is held by what we do not know."""
    for known in fields(Record):
        value = getattr(record, known.name)
        wanted = _KINDS.get(known.name) or type(known.default)
        if not isinstance(value, wanted):
            raise ValueError(f"{known.name} is {type(value).__name__}")
    confiner(record.confinement)
    return record


# Of the fields whose kind is not that of their default.
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "sandbox_id": str,
    "started": (int, float),
    "cgroup_bases": dict,
    "later": dict,
    "memory_limit_bytes": (int, type(None)),
    "sum_bytes": (int, type(None)),
    "cpu_cores": (int, float, type(None)),
}


_NAMES = frozenset(known.name for known in fields(Record)) - {"later"}


def joined_stand_ins(*parts: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """All stand-ins of *parts*, a directory before what is in it."""
    return tuple(sorted({pair for part in parts for pair in part}, key=lambda pair: pair[1]))


def all_records(runtime: Path) -> list[tuple[RecordFolder, Record]]:
    """Every sandbox with a record that can be read, oldest first."""
    found = []
    for path in folders_in(runtime):
        folder = RecordFolder(path)
        with contextlib.suppress(*UNREADABLE):
            found.append((folder, folder.read()))
    return sorted(found, key=lambda pair: pair[1].started)


def of_later_versions(runtime: Path) -> list[str]:
    """The ids of the sandboxes whose records only a later version of us can mean."""
    found = []
    for path in folders_in(runtime):
        try:
            RecordFolder(path).read()
        except LaterVersion:
            found.append(path.name)
        except UNREADABLE:
            continue
    return found


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc(5)); 0 where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def pid_of(pidfd: int) -> int:
    """The pid of the process that *pidfd* is of, as we see it; -1 once it was waited for, and 0 for
    what is no pidfd (proc_pid_fdinfo(5))."""
    found = re.search(r"^Pid:\s*(-?\d+)$", Path(f"/proc/self/fdinfo/{pidfd}").read_text(), re.M)
    return int(found[1]) if found else 0


def open_init(record: Record) -> int | None:
    """A pidfd of the record's PID 1, or None if it has ended: never of a stranger.

    The pidfd is opened first and compared then, so that a pid that is given away in between
    cannot deceive us.
    """
    pidfd = _open_same(record.init_pid, record.init_start)
    return None if pidfd < 0 else pidfd


def has_ended(record: Record) -> bool:
    """Whether its PID 1 has."""
    pidfd = open_init(record)
    if pidfd is not None:
        os.close(pidfd)
    return pidfd is None


def _open_same(pid: int, start: int) -> int:
    """A pidfd of the process *pid* that began at *start*, -1 if it has ended."""
    if pid <= 0:
        return -1
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return -1
    # Who has ended but was not waited for still has a pid: a pidfd is then readable.
    has_ended = is_readable(pidfd)
    if has_ended or start_time(pid) != start:
        os.close(pidfd)
        return -1
    return pidfd


def folders_in(runtime: Path) -> list[Path]:
    """Those of sandboxes, with a record or not."""
    if not runtime.is_dir():
        return []
    with os.scandir(runtime) as entries:
        found = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [path for path in found if not removal.is_aside(path.name)]


def cgroup_facts(record: Record) -> cgroup.CgroupFacts:
    """Where the record's groups are: its server may have lived in another cgroup than we do."""
    return cgroup.CgroupFacts(
        version=record.cgroup_version,
        bases=record.cgroup_bases,
        missing={},
        manager=record.cgroup_manager,
    )


def _take_range(runtime: Path, sandbox_id: str) -> int:
    """The first id of a range that no sandbox in *runtime* has, nor one of a server with another
    directory; a link says who has it now.

    By the names in one directory, not by the records, which may be hundreds of files.
    """
    taken = {name for name in os.listdir(runtime) if name.endswith(_RANGE)}
    for first in range(FIRST_ID, FIRST_PERSONS_ID, IDS):
        if f"{first}{_RANGE}" not in taken and not _is_in_use(first):
            runtime.joinpath(f"{first}{_RANGE}").symlink_to(sandbox_id)
            return first
    raise HostError(
        attempt="find free user ids for a sandbox",
        answer=f"all {len(taken)} ranges are taken",
        remedy="End some kernels, or run: jupyter sandbox gc",
    )


def _is_in_use(first: int) -> bool:
    """Whether a sandbox runs in the range from *first* on: its PID 1 has the first id, or `INIT_ID`
    where the kernel is root, which may take any other."""
    return _has_processes(first) or _has_processes(first + INIT_ID)


def _has_processes(uid: int) -> bool:
    """getpriority(2) answers ESRCH for a user who has none."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def age_seconds(record: Record) -> float:
    """How long the sandbox has been running, by the wall clock."""
    return max(0.0, time.time() - record.started)
