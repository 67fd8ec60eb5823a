"""watch.py - runs in PID 1: sees that what is taken out of the work directory stays so.

May import: errno, os, select, time, covers, inside.kernel_calls, watcher, wire.

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
import time

from sandbox_provisioner.facilities.workdir.inside.covers import Covers
from sandbox_provisioner.inside import kernel_calls as kernel
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.watcher import Watcher

TYPE_CHECKING = False  # as typing has it, without its import
if TYPE_CHECKING:
    from collections.abc import Iterable

    from sandbox_provisioner.inside.watcher import Init

_SIGSTOP, _SIGCONT = 19, 18
# Who is held back by its CPU cap, or waits for a disk, heeds a stop late.
_STOPPED_SECONDS = 5
_MOST_TRIES = 20
_MOST_ENTRIES = 4096
_MOST_UNJUDGED = 8192
# A kernel that makes many files beside what is covered would wake us three times for each.
_REST_MS = 1


def _await_stopped() -> None:
    """SIGSTOP is sent to all at once; who runs on another CPU, or in a system call, heeds it when
    that is done. OSError if somebody does not."""
    until = time.monotonic() + _STOPPED_SECONDS
    while not all(_has_stopped(name) for name in os.listdir("/proc") if name.isdecimal()):
        if time.monotonic() > until:
            raise OSError(errno.ETIMEDOUT, "a process could not be stopped")
        select.select([], [], [], 0.001)


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


class Watch(Watcher):
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
        self._handed_on: set[str] = set()
        self._missed = self._forgotten = False
        # Events are numbered; *_batch* is the last one that had been read before.
        self._position = self._batch = 0
        self._names = {os.path.basename(path) for path in covers.kinds} if covers else set()
        self._unjudged: list[tuple[int, int, int, int, str]] = []
        self._entries: dict[str, _Entry] = {}
        self._looked = self._rests_until = 0.0
        # Of what is being renamed: the cookie, its old path, when it was last touched, and whether
        # it was handed on.
        self._moving = 0, "", 0, False
        if covers:
            self._follow(covers)
        # Whether a place was laid bare after it was covered and before we watched: nobody tells
        # what is done there until we have looked.
        self.began_late = self._missed = bool(covers and covers.bare())

    def begin(self, init: Init) -> None:
        """What is made from here on the server is told of; and what was laid bare until now is
        covered."""
        if self.covers:
            self.covers.made = lambda kind, path: init.tell(wire.MADE, kind, path)
        if self.began_late:
            self._mend_or_end(init)

    def waits(self) -> Iterable[tuple[int, int]]:
        """For mounts that go, and for what happens in the directories."""
        mounts = self.mounts, select.POLLPRI
        return (mounts, (self.events, self.mask)) if self.covers else (mounts,)

    def serve(self, init: Init, ready: dict[int, int]) -> None:
        """Look whether anything is bare."""
        heard = self.events in ready and self.heard()
        if heard or (self.mounts in ready and self.lost()):
            self._mend_or_end(init)

    def _mend_or_end(self, init: Init) -> None:
        """Cover again what a program outside has laid bare, or end."""
        try:
            mended = self.mended()
        except CoverLost as lost:
            init.give_up(f"{wire.COVER_LOST} {wire.in_hexadecimal(str(lost))}")
        for path in mended:
            init.tell(wire.COVERED, path)

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
            may_have_been = self._forgotten and not entry.made
            self._moving = cookie, path, entry.last, entry.was_handed_on or may_have_been
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
        moving, source, done, was_handed_on = self._moving
        from_beside = moving == cookie
        since = done if from_beside and done else self._batch
        if self._opened_now(path, since):
            self._touched.add(path)
        if from_beside and was_handed_on:
            self._handed_on.add(path)
        if from_beside:
            self._entries.pop(source, None)  # the next file of that name is another one

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
            raise CoverLost(_first_bare(self.covers) or str(error)) from None
        kernel.signal_all(_SIGCONT)
        return bare

    def _refuse_touched(self, covers: Covers, bare: list[str]) -> None:
        if not self._has_begun():
            return
        touched = [path for path in bare if path in self._touched] or covers.held(bare)
        if touched or (bare and self._missed):
            raise CoverLost((touched or bare)[0])

    def _refuse_handed_on(self) -> None:
        if self._handed_on and self._has_begun():
            raise CoverLost(min(self._handed_on))

    def _has_begun(self) -> bool:
        """Whether anybody's code has run that could have touched anything."""
        return bool(select.select([self._begun], [], [], 0)[0])

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
            # Our mount may go before Linux tells of the rename that took it: it may tell only now.
            self._refuse_handed_on()
            self._expected = self.count()
            if not covers.bare():
                self._forget()
                return
        raise CoverLost(covers.bare()[0])

    def _forget(self) -> None:
        """What has happened to places: they are covered. What became of other files stays, since
        they may replace one later; after an overflow nobody knows that."""
        self._bare.clear()
        self._touched.clear()
        self._handed_on.clear()
        places = self.covers.kinds if self.covers else {}
        kept = {} if self._missed else self._entries
        self._entries = {path: entry for path, entry in kept.items() if path not in places}
        self._forgotten = self._forgotten or self._missed
        self._missed = False


def _first_bare(covers: Covers) -> str:
    """A place that lies bare, "" if none does or nobody can tell."""
    try:
        return next(iter(covers.bare()), "")
    except OSError:
        return ""


class CoverLost(Exception):
    """A place of the host's lay bare for the kernel; the text is its path, or what went wrong."""
