"""records.py - any process outside: a folder for each sandbox, and what a dead server left.

::

    <runtime directory>/
      lock                      held while a record is made or swept away
      <first id>.ids            a link to the sandbox that has this range of ids
      <sandbox id>/
        record.json             who, where, which limits: `Record`
        owner                   locked by the server for as long as it lives
        exit                    written by PID 1 when the kernel ends
        activity                "busy" or "idle", written by its server when it changes
        network                 what it has sent and received, written by the network gateway
        sockets/                the kernel's own: shows inside as /run/kernel
        private/                its home, /tmp and connection file, where it shares our mounts
      <...>.trash/              what is left of one that was removed: see `removal.py`

A kernel can write to the last two of a sandbox, and a name in a record may be its invention: what
is read here is small and regular, and what is wrong with one folder concerns no other.
The Linux kernel lets go of a dead process's locks, so "is its server still there" needs no pids.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import signal
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from sandbox_provisioner import removal
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.descriptors import for_clean_up, is_readable, keep_from_children
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, IDS, LAST_ID
from sandbox_provisioner.facilities.network.tell.counts import Traffic, read_counts
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.places import open_again
from sandbox_provisioner.spec import WRITTEN_THROUGH, Covers, relative

# sun_path of unix(7) less its final NUL; the longest name of a socket is "/s-5".
LONGEST_SOCKET_PATH = 107
_ID_LENGTH = 12
_RANGE = ".ids"
BUSY, IDLE = "busy", "idle"
BUILDING = ".building"  # locked by who makes a nursery
# What a record that is not (yet) whole, or somebody else's file, is read as.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
# A record names some hundred paths; nobody waits for the reading of more.
_MOST_BYTES = 1 << 22
# How long is spent on a kernel's many files while somebody waits for its end, or for a start. What
# there is more goes with the next starts, or with `jupyter sandbox gc`.
_AN_END_SECONDS = 0.02
_A_SWEEP_SECONDS = 0.1
# The texts of files that are made for covers.
_UNTOUCHED = {b"", *(text.encode() for _, text in Covers().repository_placed)}
# It is held for a few reads and writes of small files.
_LOCK_SECONDS = 10
_LOCK_AGAIN_SECONDS = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What somebody who did not start a sandbox needs to find, show, stop or clean it up.

    *made* are (kind, path) of stand-ins' mount points that did not exist before, and that go with
    this sandbox; *planned*, while it starts, those that its plan would make.
    *notebook* is what its front end says that it is for (JPY_SESSION_NAME), "" where none does.
    *init_start* is the start time of PID 1 in clock ticks (proc(5)), which makes a pid unique.
    *kind* is "kernel", "nursery" for a process that kernels are forked from, "spare" for a kernel
    that waits for a start, or "gateway" for what serves the network of kernels; *nursery* is the id
    of the one that this kernel is forked from. *network* is which one it has, as `spec.Network`.
    *group* is the name of its control groups where that is not its id: a spare keeps its own.
    *workdir* is the real path of its work directory, which shows inside as *shown_at*; *device* and
    *inode* tell that directory from whatever may stand at that path later; *repositories* are those
    that were in it before.
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
    repositories: tuple[str, ...] = ()
    made: tuple[tuple[str, str], ...] = ()
    planned: tuple[tuple[str, str], ...] = ()
    confinement: str = "namespaces"
    kind: str = "kernel"
    nursery: str = ""
    network: str = "none"
    group: str = ""

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
    def create(cls, runtime: Path, record: Record, *, ids: bool) -> tuple[RecordFolder, Record]:
        """Make the folder and lock it; with *ids* also pick a free range of ids for the record."""
        folder = cls(runtime / record.sandbox_id)
        _refuse_too_long(folder)
        with _locked(runtime):
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
        if ids:
            self._first_id = _take_range(self.path.parent, record.sandbox_id)
            record = replace(record, first_id=self._first_id)
        self._hold(_lock_soon(self.path / "owner"))  # a sweep looks at it for a moment
        self.sockets.mkdir(mode=0o700)
        self.write(record)
        return record

    def write(self, record: Record) -> None:
        """Save *record*, whole or not at all."""
        text = json.dumps(asdict(record))
        new = self.path / "record.json.new"
        new.write_text(text)
        new.replace(self.path / "record.json")

    def finish(self, record: Record) -> Record:
        """Save *record* of a sandbox that runs now: what it has really made in place of what was
        planned, and what others have left to it meanwhile."""
        with _locked(self.path.parent):
            record = replace(record, made=_joined(record.made, self.read().made), planned=())
            self.write(record)
        return record

    def remember(self, kind: str, path: str) -> None:
        """Note down a stand-in that was made while the sandbox runs; OSError or ValueError."""
        with _locked(self.path.parent):
            record = self.read()
            self.write(replace(record, made=(*record.made, (kind, path))))

    def read(self) -> Record:
        """Load the record; OSError or ValueError where it is not (yet) there whole."""
        found: dict[str, Any] = json.loads(_read_small(self.path / "record.json"))
        for name in ("made", "planned"):
            found[name] = tuple((kind, path) for kind, path in found.get(name, ()))
        # A record of an earlier version lacks what has come since.
        found["repositories"] = tuple(map(str, found.get("repositories", ())))
        return _checked(Record(**found))

    @property
    def exit_file(self) -> Path:
        """Where PID 1 writes down how the kernel ended."""
        return self.path / "exit"

    def read_exit_file(self) -> bytes:
        """What PID 1 wrote, b"" if it did not live to."""
        try:
            return _read_small(self.exit_file)
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

    def read_counts(self) -> Traffic | None:
        """What has gone over its network so far; None where nobody counts that."""
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

    def note_activity(self, *, busy: bool) -> None:
        """Tell `list` what the kernel's messages say; where that cannot be written nobody does."""
        with contextlib.suppress(OSError):
            (self.path / "activity").write_text(BUSY if busy else IDLE)

    def read_activity(self) -> str:
        """`BUSY`, `IDLE`, or "" where nobody listens to its messages, or has not yet."""
        try:
            found = _read_small(self.path / "activity").decode()
        except (OSError, ValueError):
            return ""
        return found if found in {BUSY, IDLE} else ""

    def own_if_orphan(self) -> bool:
        """Make it ours, until `release` or `remove`, if no server holds it (any more); whether it
        is now.

        Without an owner's file it is being made, or removed, by somebody: see `_sweep_unwritten`.
        """
        try:
            owner = _lock(self.path / "owner", fcntl.LOCK_EX | fcntl.LOCK_NB, make=False)
        except (BlockingIOError, FileNotFoundError):
            return False
        if not os.fstat(owner).st_nlink:
            # It was removed before we had it; what has the name now may be a new start's.
            _unlock(owner)
            return False
        self._owner = owner
        return True

    def turn_into(self, record: Record) -> RecordFolder:
        """Make this folder, which is nobody's, ours and that of *record*; HostError if it has gone.

        Who finds it meanwhile sees a sandbox that outlives servers, and leaves it alone.
        """
        runtime = self.path.parent
        ours = RecordFolder(runtime / record.sandbox_id)
        with _locked(runtime):
            try:
                ours._hold(_lock_soon(self.path / "owner", make=False))
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
        _held.add(self)

    def release(self) -> None:
        """Let go of the lock and leave the folder, for a sandbox that outlives its server."""
        _held.discard(self)
        if self._owner >= 0:
            _unlock(self._owner)
            self._owner = -1

    def forget(self) -> None:
        """In a child that was forked: a lock is held until the last copy of it is closed."""
        _held.discard(self)
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
        with contextlib.suppress(*_UNREADABLE):
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


# Those that this process owns, with the sandboxes in them. Not the weak set of those that have a
# descriptor: who owns one may have dropped it without closing it.
_held: set[RecordFolder] = set()


def _remove_held() -> None:
    """At the end of this process: end and remove what it still owns.

    A Jupyter server that is interrupted ends its event loop at once, and a script may end without a
    shutdown: then nobody waits for a kernel, and nobody closes its handle. Without us it would end
    all the same, but what is around it would stay until the next start.
    """
    held = list(_held)
    if not held:
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # a hub sends the second when it is impatient
        with contextlib.suppress(ValueError):  # only the main thread may
            signal.signal(number, signal.SIG_IGN)
    with for_clean_up():
        for act in (_end_held, _sweep_held):  # all of them end while one is waited for
            for folder in held:
                with contextlib.suppress(Exception):  # what is left goes with the next sweep
                    act(folder)
        for runtime in {folder.path.parent for folder in held}:
            with contextlib.suppress(Exception):  # spares are nobody's, and end with their nursery
                sweep(runtime)


def _end_held(folder: RecordFolder) -> None:
    record = folder.read()
    pidfd = None if record.survives_server else open_init(record)
    if pidfd is not None:
        try:
            signal.pidfd_send_signal(pidfd, record.end_signal)
        finally:
            os.close(pidfd)


def _sweep_held(folder: RecordFolder) -> None:
    _sweep_one(folder.path.parent, folder, folder.read())


atexit.register(_remove_held)


def _read_small(path: Path) -> bytes:
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
    "memory_limit_bytes": (int, type(None)),
    "cpu_cores": (int, float, type(None)),
}


def remove_stand_ins(runtime: Path, record: Record) -> None:
    """Remove the mount points that *record*'s sandbox made in its work directory, and those that
    others have left to it.

    Not while another sandbox works in the same tree: rmdir(2) of a directory that is a mount point
    in another namespace takes the mount away there, and what it covered would be open.
    """
    if not record.made and not (runtime / record.sandbox_id).exists():
        return  # it was refused before there was a record, and nobody can have left it anything
    with _locked(runtime):
        record = _leaving(RecordFolder(runtime / record.sandbox_id), record)
        if not record.made:
            return
        others = [o for _, o in all_records(runtime) if o.sandbox_id != record.sandbox_id]
        if any(_same_tree(record, other) for other in others):
            _bequeath(runtime, record)
            return
        try:
            workdir = open_again(record.workdir, record.device, record.inode)
        except OSError:
            return  # it has gone, or is somewhere else: what stands at its path is not ours
        try:
            # What was written through links lies in a directory: that one goes after them.
            made = sorted(reversed(record.made), key=lambda pair: pair[0] == "directory")
            for kind, path in made:
                with contextlib.suppress(OSError):
                    _remove_empty(kind, _below(record, path), workdir)
        finally:
            os.close(workdir)


async def remove_traces(
    runtime: Path,
    record: Record,
    folder: RecordFolder | None,
    tree: cgroup.CgroupTree | None,
    *,
    kill: bool,
) -> None:
    """Remove what *record*'s sandbox, which is ours and has ended, has of this host: its groups,
    with *kill* what may be left in them; its stand-ins; its *folder*, with sockets, links and ids.
    Each whatever becomes of the others.

    `_sweep_one` does the same for one that is somebody else's.
    """
    async with contextlib.AsyncExitStack() as stack:
        if folder:
            stack.push_async_callback(off_loop, folder.remove)
        stack.push_async_callback(off_loop, remove_stand_ins, runtime, record)
        if tree:
            stack.push_async_callback(tree.remove)
        if tree and kill:
            stack.push_async_callback(off_loop, tree.kill)


def _below(record: Record, path: str) -> str:
    """*path* of a stand-in as seen from the work directory, "" if it lies elsewhere: who made it
    knew the path inside, who planned it the real one."""
    return relative(path, record.workdir) or relative(path, record.shown_at) or ""


def _leaving(folder: RecordFolder, record: Record) -> Record:
    """*record* with what others have left to it; from now on nobody leaves it anything."""
    try:
        found = folder.read()
    except _UNREADABLE:
        return record
    if not found.workdir:
        return record
    with contextlib.suppress(OSError):  # on a full disk it may be left something, and lose it
        folder.write(replace(found, workdir="", made=()))
    return replace(record, made=_joined(record.made, found.made))


def _joined(*parts: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """All stand-ins of *parts*, a directory before what is in it."""
    return tuple(sorted({pair for part in parts for pair in part}, key=lambda pair: pair[1]))


def _bequeath(runtime: Path, record: Record) -> None:
    """Let another living sandbox of the same tree remove them at its own end."""
    for folder, other in all_records(runtime):
        is_other = other.sandbox_id != record.sandbox_id
        if is_other and _same_tree(record, other):
            folder.write(replace(other, made=(*record.made, *other.made)))
            return


def _same_tree(one: Record, other: Record) -> bool:
    """Whether one work directory is the other, by whatever name, or lies in it; a nursery has
    none."""
    if not one.workdir or not other.workdir:
        return False
    if one.inode and (one.device, one.inode) == (other.device, other.inode):
        return True
    pairs = (one.workdir, other.workdir), (other.workdir, one.workdir)
    return any(relative(path, base) is not None for path, base in pairs)


def _remove_empty(kind: str, path: str, workdir: int) -> None:
    """rmdir or unlink *path* below the descriptor *workdir* if it is as empty as it was made; no
    symbolic link is followed."""
    names = path.split("/")
    fd = os.dup(workdir)
    try:
        for name in names[:-1]:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = below
        if kind == "directory":
            os.rmdir(names[-1], dir_fd=fd)
        elif kind == "link":
            _remove_link(names[-1], fd)
        elif kind == "socket":
            if stat.S_ISSOCK(os.stat(names[-1], dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(names[-1], dir_fd=fd)
        elif _is_untouched(names[-1], fd):
            os.unlink(names[-1], dir_fd=fd)
    finally:
        os.close(fd)


def _is_untouched(name: str, dir_fd: int) -> bool:
    """Whether the file still holds what we put into it, so that nothing of anybody's is lost."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
        return regular and file.read(4096) in _UNTOUCHED


def _remove_link(name: str, home_fd: int) -> None:
    """A link that stands in for the file *name* of a home gives way to what a program outside has
    written through it, if any has."""
    if os.readlink(name, dir_fd=home_fd) != f"{WRITTEN_THROUGH}/{name}":
        return
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fd = home_fd
            for part in WRITTEN_THROUGH.split("/"):
                fd = os.open(part, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                stack.callback(os.close, fd)
            if stat.S_ISREG(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode):
                os.rename(name, name, src_dir_fd=fd, dst_dir_fd=home_fd)
                return
        os.unlink(name, dir_fd=home_fd)


def all_records(runtime: Path) -> list[tuple[RecordFolder, Record]]:
    """Every sandbox with a record, oldest first."""
    found = []
    for path in _folders(runtime):
        folder = RecordFolder(path)
        with contextlib.suppress(*_UNREADABLE):
            found.append((folder, folder.read()))
    return sorted(found, key=lambda pair: pair[1].started)


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc(5)); 0 where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])


def open_init(record: Record) -> int | None:
    """A pidfd of the record's PID 1, or None if it has ended: never of a stranger.

    The pidfd is opened first and compared then, so that a pid that is given away in between
    cannot deceive us.
    """
    if not record.init_pid:
        return None
    try:
        pidfd = os.pidfd_open(record.init_pid)
    except ProcessLookupError:
        return None
    # Who has ended but was not waited for still has a pid: a pidfd is then readable.
    has_ended = is_readable(pidfd)
    if has_ended or start_time(record.init_pid) != record.init_start:
        os.close(pidfd)
        return None
    return pidfd


def sweep(
    runtime: Path,
    warn: Callable[[str], None] = lambda _: None,
    seconds: float = _A_SWEEP_SECONDS,
) -> list[str]:
    """Remove what servers left that were killed; the ids of the sandboxes that are gone now.

    Safe at any time: what a living server owns is locked, and sandboxes that were asked to outlive
    their server are left alone while they live. Whose server lives costs one look at a lock, and
    what is our own nothing: a server's starts must not take the longer the more kernels it has.

    What cannot be removed is told by *warn*, once in the life of this process, and stops nothing
    else. For what was set aside it takes *seconds*, more or less.
    """
    gone = []
    for path in _not_held(runtime):
        folder = RecordFolder(path)
        with _told(path, warn):
            if folder.own_if_orphan() and _sweep_orphan(runtime, folder):
                gone.append(path.name)
        folder.release()
    _sweep_unwritten(runtime, warn)
    deadline = time.monotonic() + seconds
    for path in _aside(runtime):
        with _told(path, warn):
            removal.empty(path, deadline - time.monotonic())
    return gone


@contextlib.contextmanager
def _told(path: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Whatever is wrong with *path* is a warning: every start sweeps first, and must not fail of
    what some other sandbox has left."""
    try:
        yield
    except _Locked:
        raise  # this concerns the whole directory, and whoever starts a sandbox
    except FileNotFoundError:
        return  # somebody else has removed it
    except Exception as error:
        if path not in _told_of:
            _told_of.add(path)
            warn(f"Could not remove {path}, which a sandbox has left: {error}. Remove it by hand.")


_told_of: set[Path] = set()


def _sweep_orphan(runtime: Path, folder: RecordFolder) -> bool:
    try:
        record = folder.read()
    except FileNotFoundError:
        return False  # `_sweep_unwritten` looks at it again, under the lock
    except RecursionError:
        raise ValueError("its record is no record") from None
    return _sweep_one(runtime, folder, record)


def _sweep_one(runtime: Path, folder: RecordFolder, record: Record) -> bool:
    pidfd = open_init(record)
    if pidfd is not None and record.survives_server:
        os.close(pidfd)
        return False
    if pidfd is not None:
        _end(pidfd, record.end_signal)
    cgroup.remove_leftovers(cgroup_facts(record), record.tree)
    remove_stand_ins(runtime, replace(record, made=_joined(record.made, record.planned)))
    folder.remove()
    return True


def _folders(runtime: Path) -> list[Path]:
    if not runtime.is_dir():
        return []
    with os.scandir(runtime) as entries:
        found = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return [path for path in found if not removal.is_aside(path.name)]


def _not_held(runtime: Path) -> list[Path]:
    """The folders that are not this process's own."""
    ours = {folder.path for folder in list(_held)}
    return [path for path in _folders(runtime) if path not in ours]


def _aside(runtime: Path) -> list[Path]:
    return [runtime / name for name in os.listdir(runtime) if removal.is_aside(name)]


def _sweep_unwritten(runtime: Path, warn: Callable[[str], None]) -> None:
    """Remove the folders whose server was killed before it had written a record into them, or while
    it removed them; links that lead to nothing: to nurseries, and to the owners of ranges of ids;
    and the locks of those who were killed while they made a nursery."""
    with _locked(runtime):
        for path in _not_held(runtime):
            folder = RecordFolder(path)
            with _told(path, warn):
                if not (path / "owner").exists():
                    folder.remove()  # who makes one has the lock; who removes one does not mind
                elif not (path / "record.json").exists() and folder.own_if_orphan():
                    folder.remove()
        with os.scandir(runtime) as entries:
            for entry in entries:
                dangling = entry.is_symlink() and not os.path.exists(entry.path)
                if dangling or (entry.name.endswith(BUILDING) and _is_free(Path(entry.path))):
                    with _told(Path(entry.path), warn):
                        # Who removes a record does it too.
                        Path(entry.path).unlink(missing_ok=True)


def _is_free(path: Path) -> bool:
    """Whether nobody holds the lock *path*."""
    try:
        _unlock(_lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def cgroup_facts(record: Record) -> cgroup.CgroupFacts:
    """Where the record's groups are: its server may have lived in another cgroup than we do."""
    return cgroup.CgroupFacts(
        version=record.cgroup_version,
        bases=record.cgroup_bases,
        missing={},
        manager=record.cgroup_manager,
    )


def _end(pidfd: int, number: int) -> None:
    """End PID 1 by *number*, by force if need be, and wait until it and all inside are gone."""
    for attempt in (number, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, attempt)
        if is_readable(pidfd, 5):
            break
    os.close(pidfd)


def _take_range(runtime: Path, sandbox_id: str) -> int:
    """The first id of a range that no sandbox in *runtime* has, nor one of a server with another
    directory; a link says who has it now.

    By the names in one directory, not by the records, which may be hundreds of files.
    """
    taken = {name for name in os.listdir(runtime) if name.endswith(_RANGE)}
    for first in range(FIRST_ID, LAST_ID - IDS, IDS):
        if f"{first}{_RANGE}" not in taken and not _has_processes(first):
            runtime.joinpath(f"{first}{_RANGE}").symlink_to(sandbox_id)
            return first
    raise HostError(
        attempt="find free user ids for a sandbox",
        answer=f"all {len(taken)} ranges are taken",
        remedy="End some kernels, or run: jupyter sandbox gc",
    )


def _has_processes(uid: int) -> bool:
    """getpriority(2) answers ESRCH for a user who has none; a sandbox's PID 1 has its first id."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


class _Locked(HostError):
    """Somebody holds a lock for too long."""


def _lock(path: Path, operation: int, *, make: bool = True) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | os.O_RDWR | (os.O_CREAT if make else 0), 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        fd = os.open(path, flags | os.O_RDONLY)  # it was made before, and can still be locked
    try:
        fcntl.flock(fd, operation)
    except OSError:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def _locked(runtime: Path) -> Iterator[None]:
    try:
        fd = _lock_soon(runtime / "lock")
    except FileNotFoundError:
        # The whole directory has gone, and with it everybody whom the lock is for.
        yield
        return
    try:
        yield
    finally:
        _unlock(fd)


def _lock_soon(path: Path, *, make: bool = True) -> int:
    """Lock *path*; HostError if somebody holds it for longer than any of us ever needs to."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB, make=make)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise _Locked(
                    attempt=f"lock {path}",
                    answer=f"another process has held it for {_LOCK_SECONDS} s",
                    remedy="See /proc/locks for who it is; end it if it hangs.",
                ) from None
        time.sleep(_LOCK_AGAIN_SECONDS)  # flock(2) has no timeout, and no event to wait for


def _unlock(fd: int) -> None:
    """flock(2): closing is not enough, since a child that somebody forked meanwhile (a thread with
    multiprocessing) has the same open file, and would hold the lock for as long as it lives."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def age_seconds(record: Record) -> float:
    """How long the sandbox has been running, by the wall clock."""
    return max(0.0, time.time() - record.started)


__all__: Sequence[str] = (
    "Record", "RecordFolder", "age_seconds", "all_records", "open_init", "remove_stand_ins",
    "runtime_directory", "start_time", "sweep",
)  # fmt: skip
