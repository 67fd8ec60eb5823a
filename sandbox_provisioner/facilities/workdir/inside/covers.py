"""covers.py - runs in PID 1: takes parts of the work directory away, and sees that it stays
so.

May import: errno, os, select, stat, time, kernel_calls, lookup.  What is to be covered is decided
outside (`facts/covers.py`).

A cover is a mount at its place, and a mount belongs to the entry of a directory, not to a name. A
program *outside*, which does not see our mounts, may replace or remove that entry, and Linux takes
our mount away (rename(2), unlink(2)), or rename it, and our mount goes along: a new file is then
bare for the kernel. inotify(7) on the directory tells of it, in order::

    program outside   renames its new file to .bashrc     "moved to"
    kernel            may open it                         "opened"
    PID 1             stops everybody, reads on, covers .bashrc anew, and lets all go on;
                      or ends the sandbox, if somebody has opened or moved it in between
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time

from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside.lookup import STRAIGHT, look, rebind

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DIRECTORY, FILE, LINK, SOCKET, FROZEN = "directory", "file", "link", "socket", "frozen"
_STAND_INS = ".scratch/stand-ins"
_FROZEN = kernel.MOUNT_RDONLY | kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV
_SIGSTOP, _SIGCONT = 19, 18
# How long an editor may take between renaming the old file and writing the new one.
_REPLACED_MS = 50
_STOPPED_MS = 200
_MOST_TRIES = 20
_MOST_ENTRIES = 4096
_MOST_UNJUDGED = 8192
# A kernel that makes many files beside what is covered would wake us three times for each.
_REST_MS = 1
_MOST_MAPS_BYTES = 1 << 22


class Covers:
    """The covers of the work directory *workdir*, whose owner is *uid* and *gid* inside.

    *made* is told of each mount point that did not exist: its kind, and its path.
    """

    def __init__(
        self, root_fd: int, workdir: str, uid: int, gid: int, made: Callable[[str, str], None]
    ) -> None:
        self.root_fd = root_fd
        self.workdir = workdir
        self.owner = uid, gid
        self.made = made
        self.written_through = ""
        # Made here, where it still can stop a start: Linux gives a user so many.
        self.events = kernel.new_inotify()
        # Each place's kind; and what stands there, as (device, inode), None where nothing may.
        self.kinds: dict[str, str] = {}
        self._expected: dict[str, tuple[int, int] | None] = {}
        self._number = 0

    def as_owner(self, acts: list[tuple[Callable[..., None], *tuple[str, ...]]]) -> None:
        """Call each with its words; what is made belongs to the owner of the work directory."""
        kernel.set_filesystem_ids(*self.owner)
        try:
            self.each(acts)
        finally:
            kernel.set_filesystem_ids(os.geteuid(), os.getegid())

    def each(self, acts: list[tuple[Callable[..., None], *tuple[str, ...]]]) -> None:
        """Call each with its words; an error names them: of many places somebody has to know the
        one that failed."""
        for act, *words in acts:
            try:
                act(*words)
            except OSError as error:
                text = f"{act.__name__} {' '.join(words)}: {error.strerror}"
                raise OSError(error.errno or 0, text) from error

    def cover(self, kind: str, path: str) -> None:
        """Put an empty stand-in over *path*, relative to the work directory.

        What does not exist is made first: a kernel could otherwise make it. Directories on the way
        are bound onto themselves, since a mount point cannot be renamed away, but its parent could.
        """
        self.kinds[path] = kind
        # What we expected before stays, should something fail in here: it is bare then.
        self._expected.setdefault(path, None)
        parent = self._pin(os.path.dirname(path), create=True)
        if parent < 0:
            self._expected[path] = None
            return
        name = os.path.basename(path)
        try:
            found = look(parent, name)
            if found < 0 and self._make(parent, path, kind, ""):
                found = look(parent, name)
            self._expected[path] = self._hide(found) if found >= 0 else None
        finally:
            os.close(parent)

    def protect(self, path: str) -> None:
        """Make what exists at *path* read-only, and pin the way to it."""
        self.kinds[path] = FROZEN
        self._expected.setdefault(path, None)
        parent = self._pin(os.path.dirname(path))
        found = look(parent, os.path.basename(path)) if parent >= 0 else -1
        if found < 0:
            self._expected[path] = None
        else:
            status = os.fstat(found)
            rebind(found, _FROZEN)
            self._expected[path] = status.st_dev, status.st_ino
            os.close(found)
        if parent >= 0:
            os.close(parent)

    def place(self, path: str, text: str) -> None:
        """Make the file *path* with *text* where nothing is yet, for `protect`."""
        parent = self._pin(os.path.dirname(path))
        if parent < 0:
            return
        found = look(parent, os.path.basename(path))
        if found < 0:
            self._make(parent, path, FILE, text)
        else:
            os.close(found)
        os.close(parent)

    def attached(self, target: str, status: os.stat_result) -> None:
        """Something else than a stand-in stands at *target* of the root from here on: a part of the
        kernel's environment, at a place that is covered."""
        path = target.removeprefix(f"{self.workdir.rstrip('/')}/")
        if path in self.kinds:
            self._expected[path] = status.st_dev, status.st_ino

    def make_folder(self, path: str) -> None:
        """Make the directory *path* with those above it, but nothing beyond a link or a file."""
        fd = self._work_directory()
        walked = ""
        for name in path.split("/"):
            walked = os.path.join(walked, name)
            below = look(fd, name)
            if below < 0 and self._make(fd, walked, DIRECTORY, ""):
                below = look(fd, name)
            os.close(fd)
            if below < 0:
                return
            fd = below
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                break
        os.close(fd)

    def _work_directory(self) -> int:
        how = os.O_PATH | os.O_DIRECTORY
        return kernel.openat2(self.root_fd, self.workdir.lstrip("/"), how, STRAIGHT)

    def _hide(self, found: int) -> tuple[int, int]:
        """Mount an empty stand-in over *found*, which is closed; over a symbolic link a file, which
        hides the link. Returns what stands there now."""
        is_directory = stat.S_ISDIR(os.fstat(found).st_mode)
        stand_in = self._stand_in(is_directory=is_directory)
        try:
            status = os.fstat(stand_in)
            kernel.move_mount(stand_in, found)
        finally:
            os.close(stand_in)
            os.close(found)
        return status.st_dev, status.st_ino

    def _stand_in(self, *, is_directory: bool) -> int:
        """A detached mount of something empty. When the root is closed there is no place left for
        files of its own: then it is /dev/null."""
        if not os.path.isdir(_STAND_INS):
            if not is_directory:
                return kernel.open_tree("/dev/null")
            uid, gid = self.owner
            options: dict[str, str | None] = {
                "mode": "0700", "uid": str(uid), "gid": str(gid), "size": "1m", "nr_inodes": "256",
            }  # fmt: skip
            return kernel.new_mount("tmpfs", options, kernel.MOUNT_NOSUID | kernel.MOUNT_NODEV)
        path = f"{_STAND_INS}/{self._number}"
        self._number += 1
        if is_directory:
            os.mkdir(path, 0o700)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return kernel.open_tree(path)

    def _make(self, parent: int, path: str, kind: str, text: str) -> bool:
        """Make the missing *path*; False where nobody can, since the file system is read-only."""
        name = os.path.basename(path)
        try:
            if kind == DIRECTORY:
                os.mkdir(name, 0o700, dir_fd=parent)
            elif kind == LINK:
                os.symlink(f"{self.written_through}/{name}", name, dir_fd=parent)
            elif kind == SOCKET:
                os.mknod(name, stat.S_IFSOCK | 0o600, dir_fd=parent)
            else:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(name, flags, 0o600, dir_fd=parent)
                os.write(fd, os.fsencode(text))
                os.close(fd)
        except FileExistsError:
            return True  # another kernel in the same work directory was quicker
        except OSError as error:
            if error.errno == errno.EROFS:
                return False
            raise
        self.made(kind, os.path.join(self.workdir, path))
        return True

    def _pin(self, path: str, *, create: bool = False) -> int:
        """A descriptor of the directory *path*, every part of it a mount point.

        -1 where there is none: it does not exist (and may not be made), or is no directory. A
        symbolic link on the way is hidden, since the kernel could replace it by a directory of its
        own.
        """
        fd = self._work_directory()
        walked = ""
        for name in filter(None, path.split("/")):
            walked = os.path.join(walked, name)
            found = look(fd, name)
            if found < 0 and create and self._make(fd, walked, DIRECTORY, ""):
                found = look(fd, name)
            if found >= 0 and not stat.S_ISDIR(os.fstat(found).st_mode):
                if stat.S_ISLNK(os.fstat(found).st_mode):
                    self._hide(found)
                found = -1
            if found >= 0 and not kernel.is_mount_point(fd, name):
                rebind(found, 0)
                os.close(found)
                found = look(fd, name)
            os.close(fd)
            if found < 0:
                return -1
            fd = found
        return fd

    # -- while the kernel runs

    def bare(self) -> list[str]:
        """The places where something else stands than we have put there; two calls a place."""
        return [path for path, kind in self.kinds.items() if not self._holds(path, kind)]

    def _holds(self, path: str, kind: str) -> bool:
        there = os.path.join(self.workdir, path)
        expected = self._expected[path]
        try:
            status = os.lstat(there)
        except OSError:
            # What could be made at the start and is gone would be the kernel's to make.
            return expected is None
        if expected != (status.st_dev, status.st_ino):
            return False
        if kind != FROZEN or stat.S_ISLNK(status.st_mode):
            return True
        return bool(os.statvfs(there).f_flag & os.ST_RDONLY)

    def folders(self) -> Iterator[str]:
        """Every directory with a place in it, or on the way to one, relative to the work directory,
        which is ""."""
        found = {""}
        for path in self.kinds:
            while path := os.path.dirname(path):
                found.add(path)
        yield from sorted(found)

    def held(self, paths: list[str]) -> list[str]:
        """Those of *paths* that a process has got hold of, which nothing can mend."""
        for path in paths:
            self._await(os.path.join(self.workdir, path))
        return [path for path in paths if self._is_held(path)]

    def mend(self, paths: list[str]) -> None:
        """Cover *paths* anew, while everybody but us is stopped."""
        for path in paths:
            if self.kinds[path] == FROZEN and self._is_there(path):
                self.protect(path)
            elif self.kinds[path] != FROZEN or self._is_there(os.path.dirname(path)):
                self.cover(FILE if self.kinds[path] == FROZEN else self.kinds[path], path)
            else:
                self._expected[path] = None  # its directory has gone, too

    def _is_there(self, path: str) -> bool:
        return os.path.lexists(os.path.join(self.workdir, path))

    def _await(self, path: str) -> None:
        """Wait a moment for something to be at *path*: who saves a file may have renamed the old
        one just now, and be about to make the new one. Who looks for a stand-in of ours then finds
        one, and cannot make it with O_EXCL."""
        for _ in range(_REPLACED_MS):
            if os.path.lexists(path) or not os.path.lexists(os.path.dirname(path)):
                return
            select.select([], [], [], 0.001)

    def _is_held(self, path: str) -> bool:
        """Whether a process has what stands at *path* now, or a part of it, open, mapped or linked;
        also where one cannot be looked at."""
        there = os.path.join(self.workdir, path)
        try:
            status = os.lstat(there)
        except OSError:
            return False
        if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
            return True
        numbers = (name for name in os.listdir("/proc") if name.isdecimal() and name != "1")
        return any(_has_open(number, there, status) for number in numbers)


def _has_open(process: str, path: str, status: os.stat_result) -> bool:
    folder = f"/proc/{process}"
    try:
        names = [f"{folder}/fd/{name}" for name in os.listdir(f"{folder}/fd")]
        for link in (*names, f"{folder}/cwd", f"{folder}/root"):
            if _leads_to(link, path, status):
                return True
        with open(f"{folder}/maps", "rb", buffering=0) as maps:
            return os.fsencode(path) in maps.read(_MOST_MAPS_BYTES)
    except (FileNotFoundError, ProcessLookupError):
        return False  # it has ended
    except OSError:
        return True


def _leads_to(link: str, path: str, status: os.stat_result) -> bool:
    try:
        found = os.stat(link)
        if (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino):
            return True
        below = os.readlink(link).startswith(f"{path}/")
        return below and found.st_dev == status.st_dev
    except FileNotFoundError:
        return False


def _await_stopped() -> None:
    """SIGSTOP is sent to all at once; who runs on another CPU, or in a system call, heeds it when
    that is done. OSError if somebody does not."""
    for _ in range(_STOPPED_MS):
        if all(_has_stopped(name) for name in os.listdir("/proc") if name.isdecimal()):
            return
        select.select([], [], [], 0.001)
    raise OSError(errno.ETIMEDOUT, "a process could not be stopped")


def _has_stopped(process: str) -> bool:
    if process == "1":
        return True
    try:
        threads = os.listdir(f"/proc/{process}/task")
        return all(_state_of(f"/proc/{process}/task/{thread}") in "TtZX" for thread in threads)
    except (FileNotFoundError, ProcessLookupError):
        return True  # it has ended


def _state_of(thread: str) -> str:
    """proc_pid_stat(5): the third word; the second, in parentheses, may have anything in it."""
    with open(f"{thread}/stat", "rb", buffering=0) as file:
        return file.read(4096).rpartition(b")")[2].split()[0].decode()


class _Entry:
    """How often a name of a directory was made, opened and moved, and when last."""

    def __init__(self) -> None:
        self.made = self.opened = self.moved = self.last = self.last_opened = 0

    @property
    def was_handed_on(self) -> bool:
        """Whether somebody has made it while we looked, and others have had it since; who makes a
        file has opened it once."""
        return self.made > 0 and (self.made > 1 or self.opened > 1 or self.moved > 0)


class Watch:
    """Notices when a place has become bare, and what was done with it until everybody was stopped.

    *bare* holds those places, and how often each was opened since; by whom nobody tells. What
    happens to names that are no place's is kept, and judged only when a place is at stake: then it
    tells what became of the file that has taken its place.
    """

    def __init__(self, covers: Covers | None, begun: int) -> None:
        """*begun* can be read when the kernel's own program runs, and not before."""
        self.covers = covers
        self._begun = begun
        self.mounts = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._expected = self.count()
        self._folders: dict[int, str] = {}
        self._bare: dict[str, int] = {}
        self._touched: set[str] = set()
        self._missed = self._forgotten = False
        # Events are numbered; *_batch* is the last one that had been read before.
        self._position = self._batch = 0
        self._names = {os.path.basename(path) for path in covers.kinds} if covers else set()
        self._unjudged: list[tuple[int, int, int, int, str]] = []
        self._entries: dict[str, _Entry] = {}
        self._looked = self._rests_until = 0.0
        # Of what is being renamed: the cookie, when it was last touched, whether it was handed on.
        self._moving = 0, 0, False
        if covers:
            self._follow(covers)
        # Whether a place was laid bare after it was covered and before we watched: nobody tells
        # what is done there until we have looked.
        self.began_late = self._missed = bool(covers and covers.bare())

    @property
    def events(self) -> int:
        """What to poll for POLLIN, -1 for nothing."""
        return self.covers.events if self.covers else -1

    @property
    def mask(self) -> int:
        """What to poll `events` for: nothing while we rest. A mount that goes is told at once all
        the same, by `mounts`; only a place that is renamed away takes its mount along."""
        return 0 if self.patience() else select.POLLIN

    def patience(self) -> int | None:
        """How many milliseconds we rest, None if we do not."""
        left = self._rests_until - time.monotonic()
        return int(1000 * left) + 1 if left > 0 else None

    def _follow(self, covers: Covers) -> None:
        """Hear of all directories with a place in them; of one that is new, too."""
        for folder in covers.folders():
            try:
                watch = kernel.watch_entries(covers.events, os.path.join(covers.workdir, folder))
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTDIR}:
                    raise
            else:
                self._folders[watch] = folder

    def count(self) -> int:
        """How many mounts there are; reading the file is what arms its next event."""
        os.lseek(self.mounts, 0, os.SEEK_SET)
        lines = 0
        while chunk := os.read(self.mounts, 1 << 16):
            lines += chunk.count(b"\n")
        return lines

    def lost(self) -> bool:
        """Whether a mount of ours has gone; nobody inside could have done that."""
        return self.count() < self._expected

    def heard(self) -> bool:
        """Take in what has happened in the directories; whether a place is bare now."""
        self._batch, at_stake = self._position, self._take_in()
        if at_stake:
            self._judge()
        elif len(self._unjudged) > _MOST_UNJUDGED:
            del self._unjudged[: _MOST_UNJUDGED // 2]
            self._forgotten = True
        if not (at_stake or self._missed):
            self._rest()
        return bool(self._bare) or self._missed

    def _take_in(self) -> bool:
        """Whether a place may be at stake in what has happened until now: a kernel that goes on
        making files cannot keep us here."""
        at_stake, left = False, kernel.waiting_bytes(self.events)
        while left > 0:
            changes, size = kernel.read_changes(self.events)
            left -= size
            for watch, mask, cookie, name in changes:
                if name:
                    self._position += 1
                    self._unjudged.append((self._position, watch, mask, cookie, name))
                    at_stake = at_stake or name in self._names
                elif mask & kernel.IN_Q_OVERFLOW:
                    self._missed = True
        return at_stake

    def _rest(self) -> None:
        """After two looks in a row that found nothing at stake."""
        now, seconds = time.monotonic(), _REST_MS / 1000
        if now - self._looked < seconds:
            self._rests_until = now + seconds
        self._looked = now

    def _judge(self) -> None:
        for position, watch, mask, cookie, name in self._unjudged:
            self._note(position, os.path.join(self._folders[watch], name), mask, cookie)
        self._unjudged.clear()

    def _note(self, position: int, path: str, mask: int, cookie: int) -> None:
        guarded = self.covers is not None and path in self.covers.kinds
        if mask & kernel.IN_MOVED_FROM:
            entry = self._entries.get(path, _Entry())
            self._moving = cookie, entry.last, entry.was_handed_on
        if mask & kernel.IN_MOVED_TO and guarded:
            self._judge_source(path, cookie)
        if mask & kernel.IN_DELETE and guarded and self._opened_now(path, self._batch):
            self._touched.add(path)
        self._remember(position, path, mask)
        if guarded:
            self._note_bare(path, mask)

    def _note_bare(self, path: str, mask: int) -> None:
        if not mask & (kernel.IN_OPEN | kernel.IN_CLOSE_WRITE):
            # The first is a program outside, for a kernel cannot move or remove a mount point.
            if path in self._bare and mask & (kernel.IN_MOVED_FROM | kernel.IN_DELETE):
                self._touched.add(path)
            # Who makes a file has opened it.
            self._bare[path] = -1 if mask & kernel.IN_CREATE else 0
        elif mask & kernel.IN_OPEN and path in self._bare:
            self._bare[path] += 1
            if self._bare[path] > 0:
                self._touched.add(path)

    def _remember(self, position: int, path: str, mask: int) -> None:
        """What becomes of a file before it may replace a covered one."""
        if len(self._entries) >= _MOST_ENTRIES and path not in self._entries:
            self._entries.clear()
            self._forgotten = True
        entry = self._entries.setdefault(path, _Entry())
        entry.last = position
        if mask & kernel.IN_OPEN:
            entry.opened += 1
            entry.last_opened = position
        elif mask & kernel.IN_CREATE:
            entry.made += 1
        elif mask & (kernel.IN_MOVED_FROM | kernel.IN_MOVED_TO):
            entry.moved += 1

    def _judge_source(self, path: str, cookie: int) -> None:
        """rename(2) takes our mount away, then puts the new file in its place, and tells of it last
        of all: whoever opened *path* after the new file was done may have been let in. And who but
        its maker has opened or moved the new file itself may have written to it; where so much has
        happened that we do not know any more, somebody may have."""
        moving, done, was_handed_on = self._moving
        is_known = moving == cookie and done
        if self._opened_now(path, done if is_known else self._batch):
            self._touched.add(path)
        if was_handed_on if is_known else moving == cookie and self._forgotten:
            self._touched.add(path)

    def _opened_now(self, path: str, since: int) -> bool:
        entry = self._entries.get(path)
        return entry is not None and entry.last_opened > since

    def mended(self) -> list[str]:
        """Stop everybody, cover what is bare and let them go on; returns the places that were bare.
        Raises CoverLost if somebody has touched one, or it cannot be covered."""
        kernel.signal_all(_SIGSTOP)
        if self.covers is None:
            raise CoverLost("")
        try:
            _await_stopped()
            self.heard()
            bare = self.covers.bare()
            self._refuse_touched(self.covers, bare)
            self._mend(self.covers)
        except OSError as error:
            raise CoverLost(str(error)) from None
        kernel.signal_all(_SIGCONT)
        return bare

    def _refuse_touched(self, covers: Covers, bare: list[str]) -> None:
        if not select.select([self._begun], [], [], 0)[0]:
            return  # nobody's code has run that could have touched anything
        touched = [path for path in bare if path in self._touched] or covers.held(bare)
        if touched or (bare and self._missed):
            raise CoverLost((touched or bare)[0])

    def _mend(self, covers: Covers) -> None:
        """Until nothing is bare: the program outside may do it again meanwhile. We look last at
        what stands there, so that no event of a later change has been read and forgotten."""
        for _ in range(_MOST_TRIES):
            try:
                covers.mend(covers.bare())
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                # What we had found was replaced before we could mount on it, or is about to go:
                # rmdir(2) takes the mount away first, and the entry some moments later.
                select.select([], [], [], 0.001)
            self._follow(covers)
            self.heard()
            self._expected = self.count()
            if not covers.bare():
                self._forget()
                return
        raise CoverLost(covers.bare()[0])

    def _forget(self) -> None:
        self._bare.clear()
        self._touched.clear()
        self._entries.clear()
        self._missed = self._forgotten = False


class CoverLost(Exception):
    """A place of the host's lay bare for the kernel; the text is its path, or what went wrong."""
