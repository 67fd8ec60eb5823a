"""handle.py - in the launching process: a running sandbox; the only object with methods that wait.

Waiting is on a pidfd, never by polling, and on whichever event loop calls: jupyter_client's
blocking managers bring a new loop with every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import IO, Any

from sandbox_provisioner import audit
from sandbox_provisioner.confinement import Confiner, confiner
from sandbox_provisioner.contract import Labels
from sandbox_provisioner.descriptors import (
    at_its_end,
    for_clean_up,
    is_readable,
    keep_from_children,
)
from sandbox_provisioner.errors import HostError, in_lines, told_as_host_error
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, Usage
from sandbox_provisioner.facilities.caps.plan import words_of_cap
from sandbox_provisioner.facilities.caps.tell import REFUSED
from sandbox_provisioner.facilities.network.tell.counts import Traffic
from sandbox_provisioner.facilities.network.tell.notices import Refusals
from sandbox_provisioner.facilities.workdir import tell
from sandbox_provisioner.facilities.workdir.facts.covers import repositories
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import printable
from sandbox_provisioner.layers.review import settle, waiting
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.mounts import origins
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.places import TooManyFolders, find_shown, open_again
from sandbox_provisioner.records import OF_NOBODY, SERVER, UNREADABLE, Record, RecordFolder
from sandbox_provisioner.spec import Network
from sandbox_provisioner.story import NOTICES, ExitFile, ExitStory, with_reason
from sandbox_provisioner.told import EndKind, Subject
from sandbox_provisioner.traces import Traces

_OUTLIVED_SECONDS = 1.0
_COUNTS_SECONDS = 0.1
_COUNTS_AGAIN_SECONDS = 0.001
# How long a kernel has to end by itself that somebody stops, and how long Linux has to end one.
_STOP_SECONDS = 5.0
_KILL_SECONDS = 10.0
# Ends that are as whoever stops a kernel wants them.
_OF_A_STOP = {
    EndKind.EXIT, EndKind.SIGNAL, EndKind.ASKED, EndKind.OUTSIDE, EndKind.PROCESSES_CAP,
}  # fmt: skip
_FULL = {EndKind.SHM_FULL, EndKind.TMP_FULL, EndKind.DISK_FULL, EndKind.WORKDIR_FULL}
_MOST_WORDS = 64  # of init's, at a time
_MESSAGE_BYTES = 8192
_MOST_SAID_BYTES = 3000  # of `wire.LONGEST`, which PID 1 reads
_REAPER = "sandbox-reaper"


class LocalHandle:
    """A sandbox on this machine: PID 1 by its pidfd, its groups, its folder.

    *left_behind* are sentences, when it is closed, of what the host should be careful with.
    *unseen* are paths that the kernel's command names and that are not in the box.
    *pipes* are our ends of what the caller asked to be pipes; a kernel that still wrote to a closed
    one would be told of it, so they stay open as long as it lives. *sealed*: its sockets listened
    before it was ours. *is_old_end*: it had ended before, and *pidfd*, in place of that of PID 1,
    which nobody can have any more, is any descriptor that is at its end.
    """

    def __init__(
        self,
        *,
        pidfd: int,
        tree: CgroupTree,
        folder: RecordFolder,
        record: Record,
        control: int,
        pipes: Sequence[IO[bytes]] = (),
        sealed: bool = False,
        is_old_end: bool = False,
    ) -> None:
        self.record = record
        self.folder = folder
        self._pidfd = pidfd
        self._tree = tree
        self._control = control
        self._pipes = pipes
        self._sealed = sealed
        self._story: ExitStory | None = None
        self._telling = threading.Lock()
        self._speaking = threading.Lock()  # to PID 1, by a descriptor that may be closed meanwhile
        self._closed = False
        self._is_old_end = is_old_end
        self._killed_by_us = False
        self._last_usage = Usage()
        self._heard: list[str] = []
        self._was_told_of_refusals = self._was_told_of_place = False
        self._origins: frozenset[str] | None = None  # of the mounts at the work directory
        self.left_behind: tuple[str, ...] = ()
        self.narrowed = ""  # whoever has us has read the policy
        self.unseen: tuple[str, ...] = ()
        # Who launches for others looks at what they have laid aside with their rights.
        self.settle: Callable[[str], None] = settle
        # Of the kills for want of memory, and of the processes that were refused, those that the
        # kernel has outlived; and how many there were when they changed last.
        self._outlived = _Counts()
        self._seen = _Counts(), time.monotonic()
        capped = record.memory_limit_bytes and tree and tree.memory_group
        self._watched = bool(capped) and self.confiner.has_own_processes
        self._is_counted = record.network != Network.NONE
        self._refusals = Refusals()
        self._written = folder.written() if folder else ()
        keep_from_children(self)

    def forget(self) -> None:
        """In a child that was forked: the end of the control socket is a word to PID 1."""
        control, self._control = self._control, -1
        if control >= 0:
            os.close(control)

    @property
    def pid(self) -> int:
        """The host's pid of PID 1; for people, not for signals."""
        return self.record.init_pid

    @property
    def confiner(self) -> Confiner:
        """What holds it."""
        return confiner(self.record.confinement)

    @property
    def labels(self) -> Labels:
        """What it was started with."""
        return Labels(**{known.name: getattr(self.record, known.name) for known in fields(Labels)})

    @property
    def meeting(self) -> SocketFolder:
        """Where its clients meet it."""
        places = self.confiner.places(str(self.folder.path))
        return SocketFolder(self.folder.sockets, *places, self.folder.links)

    def _has_ended(self) -> bool:
        return self._story is not None or self._closed or is_readable(self._pidfd)

    def poll(self) -> ExitStory | None:
        if self._story is None and self._has_ended():
            with self._telling:
                self._story = self._story or self._tell()
        return self._story

    def end_descriptor(self) -> int:
        """One more descriptor of PID 1, the caller's to close: by it anybody sees the end."""
        return os.dup(self._pidfd)

    def when_ended(self, act: Callable[[int], object]) -> None:
        """Call *act* in a thread, with a descriptor of PID 1, as soon as it has ended."""
        when_ended(self._pidfd, act)

    async def look(self) -> ExitStory | None:
        """`poll`, off the event loop where there is something to read."""
        if self._has_ended():
            return await off_loop(self.poll)
        await off_loop(self._look_after)
        return None

    def _look_after(self) -> None:
        self._note_counts()
        self._note_place()
        self._note_changes()
        if self._is_counted:
            self._heard += self._refusals.new(self.folder.read_counts(), _subject(self.record))

    def _note_counts(self) -> None:
        """What the kernel has outlived for a while is not why it ends. A kill is counted a moment
        before the kernel has ended; PID 1, where it watches, tells of those of others."""
        counts, now = _Counts.of(self._tree.usage()), time.monotonic()
        if counts != self._seen[0]:
            self._seen = counts, now
        elif now - self._seen[1] >= _OUTLIVED_SECONDS:
            kills = self._outlived.kills if self._watched else counts.kills
            self._outlived = replace(counts, kills=kills)
            self._was_told_of_refusals = False
        if counts.refused > self._outlived.refused and not self._was_told_of_refusals:
            self._was_told_of_refusals = True
            self._say(REFUSED)

    def _note_changes(self) -> None:
        """Somebody may have changed its limits (`jupyter sandbox limits`): PID 1, which interrupts
        before the cap, has to know."""
        written = self.folder.written()
        if not written or written == self._written:
            return
        self._written = written
        try:
            record = self.folder.read()
        except UNREADABLE:
            return
        if record.changed == self.record.changed:
            return
        self.record = replace(
            self.record,
            changed=record.changed,
            memory_limit_bytes=record.memory_limit_bytes,
            cpu_cores=record.cpu_cores,
            network=record.network,
        )
        self._heard.append(f"Kernel {short_id(record)} has other limits now: {record.changed}.")
        if record.memory_limit_bytes:
            self._tell_init(wire.CAP, *words_of_cap(record.memory_limit_bytes))

    def _note_place(self) -> None:
        """Tell once that the work directory is not where it was. A file server that is asked might
        not answer; what Linux knows of a mount it tells at once."""
        if self._was_told_of_place:
            return
        found = origins(self.record.init_pid, self.record.shown_at)
        if not found:  # of a process that is about to be gone Linux tells nothing
            return
        before, self._origins = self._origins, found
        if before is not None and found != before and not self._has_ended():
            self._was_told_of_place = True
            self._say(tell.moved(self.record.shown_at))

    def _say(self, sentence: str) -> None:
        """To the log, and to the person at the notebook while the kernel lives."""
        self._heard.append(f"Kernel {short_id(self.record)}: {sentence}")
        if self.record.kind != "kernel":
            return
        self._tell_init(wire.SAY, in_lines(sentence))

    def _tell_init(self, word: str, *rest: str) -> None:
        text = wire.message(word, *rest)
        # A PID 1 that somebody has stopped hears nothing; nobody here waits for it.
        with self._speaking, contextlib.suppress(OSError):
            if self._control >= 0:
                with socket.socket(fileno=os.dup(self._control)) as control:
                    control.send(text, socket.MSG_DONTWAIT)

    async def wait(self) -> ExitStory:
        if not self._has_ended():
            await readable(self._pidfd)
        story = await self.look()
        assert story is not None
        return story

    def signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            self.kill()
        elif number and not self._has_ended():
            self._send(wire.relayed(number))

    def kill(self) -> None:
        if not self._has_ended():
            self._killed_by_us = True
            self._send(self.record.end_signal)
            with contextlib.suppress(HostError):
                self._tree.thaw()  # on v1 a frozen process dies only then

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def stop(self, by: str) -> bool:
        """End it since the user *by* asks for that, of which its person is told: as a manager does
        whose kernel does not end by itself. Whether it did, at SIGTERM; HostError if it stays."""
        end = self.end_descriptor()
        try:
            await off_loop(self._note_stop, by)
            if not await off_loop(self._tree.is_frozen):
                self.signal(signal.SIGTERM)
                if await readable_within(end, _STOP_SECONDS):
                    return True
            await off_loop(self.kill)
            if await readable_within(end, _KILL_SECONDS):
                return False
        finally:
            os.close(end)
        raise HostError(
            attempt=f"stop kernel {short_id(self.record)}",
            answer=f"it was killed, and is still there after {_KILL_SECONDS:g} s",
            remedy="A process of it waits for a device or a file server; it is in state D: "
            "ps -eo pid,stat,wchan:32,args",
        )

    def _note_stop(self, by: str) -> None:
        """Nothing where it ends just now, or where somebody holds the records."""
        with contextlib.suppress(*UNREADABLE, HostError):
            self.folder.change(lambda record: replace(record, stopped_by=by))

    def give_way(self, *, on: bool) -> None:
        """Let everybody else have the CPU first, where groups share it, or no more so."""
        self._tree.give_way(on=on)

    def freeze(self) -> None:
        """Stop every process of it."""
        self._tree.freeze()

    def thaw(self) -> None:
        """Let every process of it go on."""
        self._tree.thaw()

    def usage(self) -> Usage:
        if not self._closed:
            self._last_usage = self._tree.usage()
        return self._last_usage

    async def ready(self) -> str | None:
        """Wait until the kernel listens on all sockets: "" then. Another text is what is wrong with
        its folder; None: it has ended before."""
        answer = await self.sealed()
        if not answer:
            return None
        return self.meeting.mistake() if answer == wire.SEALED else answer

    async def sealed(self) -> str:
        """Wait for PID 1's word that all sockets listen: `wire.SEALED`; another text is an error.

        "" if it ended before.
        """
        if self._sealed:
            return wire.SEALED
        while True:
            await readable(self._control)
            try:
                word, rest = wire.parts(os.read(self._control, _MESSAGE_BYTES))
            except OSError:
                return ""
            if not self._take_in(word, rest):
                return rest if word == wire.UNSEALED else word

    def notices(self) -> list[str]:
        """What PID 1 has told besides "sealed", as sentences for a log; does not block."""
        self._listen()
        told, self._heard = self._heard, []
        return told

    def note_activity(self, *, busy: bool) -> None:
        """Let `list` show what the kernel's messages say."""
        self.folder.note_activity(busy=busy)

    def say(self, text: str) -> None:
        """Show *text*, which may be a stranger's, under the cell that runs."""
        said = in_lines(printable(text)).encode()[:_MOST_SAID_BYTES]
        if not self._has_ended():
            self._tell_init(wire.SAY, said.decode(errors="ignore"))

    def seen(self) -> tuple[str, Usage]:
        """What it does now, in the words of `jupyter sandbox list`, and what it uses."""
        if self._has_ended():
            return "ended", Usage()
        state = "asleep" if self._tree.is_frozen() else self.folder.read_activity() or "running"
        return state, self._tree.usage()

    def visible(self, path: str) -> str | None:
        """Where we find the kernel's *path*: only the work directory is shared."""
        record = self.record
        return find_shown(path, record.shown_at, record.workdir, (record.device, record.inode))

    def listen_in_place(self) -> int:
        """Whoever has us may write to that folder."""
        return -1

    def card(self) -> dict[str, Any]:
        """What `LocalLauncher.find` of another process needs to find it; JSON can hold it."""
        return {
            "id": self.record.sandbox_id,
            "runtime_dir": str(self.folder.path.parent),
            "init_pid": self.record.init_pid,
            "init_start": self.record.init_start,
        }

    def _listen(self) -> None:
        for _ in range(_MOST_WORDS):  # the rest is for the next time
            if self._control < 0 or self._closed or not is_readable(self._control):
                break
            try:
                word, rest = wire.parts(os.read(self._control, _MESSAGE_BYTES))
            except OSError:
                break
            if not self._take_in(word, rest):
                break  # its end

    def _take_in(self, word: str, rest: str) -> bool:
        """Whether *word* is one that PID 1 may say at any time, of a place in the work directory or
        of memory."""
        if word == wire.MADE:
            self._remember(rest)
            return True
        notice = NOTICES.get(word)
        sentence = notice(rest, self._subject(word)) if notice else ""
        if sentence and word == wire.KILLED:
            self._outlived = replace(self._outlived, kills=int(rest))
        if sentence:
            self._heard.append(sentence)
        return bool(sentence)

    def _subject(self, word: str) -> Subject:
        """Who is spoken of by *word*; of a kill also, whose limit was met."""
        subject = _subject(self.record)
        full_above = self._tree.full_above() if word == wire.KILLED and self._tree.is_own else ""
        return replace(subject, full_above=f"{full_above} was full") if full_above else subject

    def _remember(self, words: str) -> None:
        """A stand-in to remove at the end, made while the kernel runs."""
        kind, _, path = words.partition(" ")
        with contextlib.suppress(OSError, ValueError, HostError):
            self.folder.remember(kind, path)

    async def end(self) -> None:
        """Kill what is left, and return when it has ended; what it has stays until `close`."""
        with self._ending():
            await off_loop(self.kill)
            await self.wait()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        with told_as_host_error(f"end kernel {short_id(self.record)}"), for_clean_up():
            yield

    async def close(self) -> None:
        if self._closed:
            return
        await self.end()
        with self._ending():
            await off_loop(self.usage)
            self._closed = True
            is_first = self.folder.path.exists()  # nobody has swept what we had only found
            await self._remove()
            if self._story and is_first and self.record.kind not in OF_NOBODY:
                await off_loop(audit.ended, self.record, self._story)

    async def _remove(self) -> None:
        """Each whatever becomes of the others."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._close_ours)
            stack.push_async_callback(self._look_for_repositories)
            # An init that somebody killed from outside has ended nobody else.
            kill = not self.confiner.has_own_processes
            traces = Traces(
                record=self.record,
                folder=self.folder,
                tree=self._tree,
                kill=kill,
                settle=self.settle,
            )
            await traces.remove()
        sentence = waiting(self.record.review, short_id(self.record), self.record.workdir)
        self.left_behind += tuple(filter(None, (sentence,)))

    async def _look_for_repositories(self) -> None:
        self.left_behind = await off_loop(_new_repositories, self.record)

    def let_go(self) -> None:
        """Leave it to live on for whoever finds its record; the handle is of no use any more."""
        self._closed = True
        self._tree.let_go()
        self.folder.release()
        self._close_ours()

    def _close_ours(self) -> None:
        os.close(self._pidfd)
        with self._speaking:
            self.forget()
        for pipe in self._pipes:
            pipe.close()

    def _tell(self) -> ExitStory:
        status = reap(self._pidfd)
        self._listen()
        usage = self.usage()
        told = ExitFile.of(self.folder.read_exit_file(), status)
        kind = self._kind(told, usage)
        stopped_by = self._stopped_by() if kind in _OF_A_STOP else ""
        killed = kind in {EndKind.MEMORY_CAP, EndKind.SURROUNDINGS_MEMORY, EndKind.ASKED}
        number = told.signal or (signal.SIGKILL if told.code is None and killed else 0)
        story = ExitStory(
            kind=EndKind.STOPPED if stopped_by else kind,
            stopped_by=stopped_by,
            code=-number if number else told.code,
            signal=number,
            memory_limit_bytes=usage.memory_limit_bytes or self.record.memory_limit_bytes,
            memory_peak_bytes=usage.memory_peak_bytes,
            cpu_seconds=usage.cpu_seconds,
            pids_limit_hits=usage.pids_limit_hits or 0,
            full_bytes=told.number if kind in _FULL else 0,
            full_above=self._full_above(kind, usage),
            lost_path=told.text if kind is EndKind.COVER_LOST else "",
            network=self._last_counts(),
            mistake=told.text if kind is EndKind.INTERNAL_ERROR else "",
            stderr_tail=printable(told.tail.decode(errors="replace")),
        )
        return told_of(self.record, story)

    def _stopped_by(self) -> str:
        with contextlib.suppress(*UNREADABLE):
            return self.folder.read().stopped_by
        return ""

    def _last_counts(self) -> Traffic | None:
        """What has gone over its network. The gateway hears of the end when we do, and writes it
        down then; no event tells when it has."""
        if not self._is_counted:
            return None
        until = time.monotonic() + (0 if self._is_old_end else _COUNTS_SECONDS)
        while (traffic := self.folder.read_counts()) and not traffic.is_last:
            if time.monotonic() > until:
                break
            time.sleep(_COUNTS_AGAIN_SECONDS)
        return traffic

    def _kind(self, told: ExitFile, usage: Usage) -> EndKind:
        """What PID 1 says, and what it cannot know: who sent a SIGKILL, and what ended PID 1."""
        counts = _Counts.of(usage)
        if told.kind is EndKind.ASKED:
            return told.kind
        if told.code is not None and told.signal != signal.SIGKILL:
            failed = told.kind is EndKind.SIGNAL or (told.kind is EndKind.EXIT and told.code > 0)
            refused = counts.refused > self._outlived.refused
            return EndKind.PROCESSES_CAP if failed and refused else told.kind
        if self._killed_by_us:
            return EndKind.ASKED
        # PID 1 tells the kill of a kernel from that of its children, unless it went with them.
        untold = self._tree.is_own and (told.code is None or not self._watched)
        if told.kind is EndKind.MEMORY_CAP or (self._new_kills(usage) and untold):
            full_above = self._tree.full_above()
            return EndKind.SURROUNDINGS_MEMORY if full_above else EndKind.MEMORY_CAP
        return told.kind

    def _new_kills(self, usage: Usage) -> bool:
        return _Counts.of(usage).kills > self._outlived.kills

    def _full_above(self, kind: EndKind, usage: Usage) -> str:
        if kind is EndKind.MEMORY_CAP:
            return self._tree.full_above_too()
        return self._tree.full_above() if self._lacked_memory(kind, usage) else ""

    def _lacked_memory(self, kind: EndKind, usage: Usage) -> bool:
        """Whether memory around us was full, or may have been: of kills in a group that is not ours
        alone nobody tells whose they were."""
        may_be = kind in {EndKind.SIGNAL, EndKind.OUTSIDE} and not self._tree.is_own
        return kind is EndKind.SURROUNDINGS_MEMORY or (may_be and self._new_kills(usage))


@dataclass(frozen=True, slots=True)
class _Counts:
    """What may be why a kernel ends: kills for want of memory, processes that were refused."""

    kills: int = 0
    refused: int = 0

    @classmethod
    def of(cls, usage: Usage) -> _Counts:
        return cls(usage.oom_kills or 0, usage.pids_limit_hits or 0)


def _new_repositories(record: Record) -> tuple[str, ...]:
    """A sentence for each repository that is in the work directory now and was not before."""
    if not record.workdir or record.kind == SERVER:  # all who run git there are in the box, too
        return ()
    try:
        workdir = open_again(record.workdir, record.device, record.inode)
    except OSError:
        return ()
    try:
        new = set(repositories(f"/proc/self/fd/{workdir}")) - set(record.repositories)
    except TooManyFolders as error:
        return (tell.repositories_unknown(str(error), record.workdir, _subject(record)),)
    finally:
        os.close(workdir)
    return tuple(
        tell.new_repository(path, record.workdir, _subject(record)) for path in sorted(new)
    )


def _subject(record: Record) -> Subject:
    limit = record.memory_limit_bytes or 0
    if record.kind == SERVER:
        return Subject(name=record.user, memory_limit_bytes=limit, what="The server of")
    return Subject(name=short_id(record), memory_limit_bytes=limit)


def story_of(record: Record, folder: RecordFolder, tree: CgroupTree) -> ExitStory:
    """How the sandbox of *folder*, which stays whose it is, has ended, if nobody has watched it:
    PID 1 has left some of it, and the groups tell more."""
    pidfd = at_its_end()
    try:
        found = LocalHandle(
            pidfd=pidfd, tree=tree, folder=folder, record=record, control=-1, is_old_end=True
        )
        story = found.poll()
    finally:
        os.close(pidfd)
    assert story is not None
    return story


def told_of(record: Record, story: ExitStory) -> ExitStory:
    """*story* with its sentence for people, of what *record* is."""
    of = _subject(record)
    return with_reason(story, of.name, of.what)


def short_id(record: Record) -> str:
    """The id of a kernel as people see it in lists and sentences."""
    return (record.kernel_id or record.sandbox_id)[:8]


async def readable(fd: int) -> None:
    """Wait on the running event loop until *fd* can be read, or has ended."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    # A duplicate: two coroutines may wait for the same descriptor, a loop has one reader for each.
    own = os.dup(fd)

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    loop.add_reader(own, wake)
    try:
        await done
    finally:
        loop.remove_reader(own)
        os.close(own)


async def readable_within(fd: int, seconds: float) -> bool:
    """Whether *fd* can be read, or has ended, before the time is over. A loop that was held up
    meanwhile, by somebody else's work, looks once more."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await readable(fd)
    return is_readable(fd)


class LastWord:
    """When a process that answers many, one after another, has last answered anybody: who waits
    for his turn is not waiting for one that hangs."""

    def __init__(self) -> None:
        self.time = 0.0

    async def awaited(self, fd: int, seconds: float) -> bool:
        """Whether its word comes on *fd*; not when it has been silent to everybody for so long."""
        until = time.monotonic() + seconds
        while not await readable_within(fd, max(0.0, until - time.monotonic())):
            until = self.time + seconds
            if time.monotonic() >= until:
                return False
        self.time = max(self.time, time.monotonic())
        return True


def when_ended(pidfd: int, act: Callable[[int], object]) -> None:
    """Call *act* in a thread, with a descriptor of the process *pidfd*, as soon as that has ended:
    a child that ends when nobody waits for it would stay as a zombie.

    Where there is no descriptor or thread to be had, nobody does until the next start.
    """

    def look(own: int) -> None:
        try:
            poll = select.poll()
            poll.register(own, select.POLLIN)
            poll.poll()
            act(own)
        finally:
            os.close(own)

    with contextlib.suppress(OSError), contextlib.ExitStack() as undo:
        own = os.dup(pidfd)
        undo.callback(os.close, own)
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=look, args=(own,), name=_REAPER, daemon=True).start()
            undo.pop_all()  # it is the thread's now


def reap(pidfd: int) -> int | None:
    """waitid(2): take in the end of *pidfd*, a child of ours; its exit status, negative for a
    signal. None while it runs, and where that is not known: of somebody else's child, if the server
    ignores SIGCHLD or has waited for it itself, or of one that had ended before we came."""
    with contextlib.suppress(OSError):
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return None
