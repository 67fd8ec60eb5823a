"""performer.py - in the launching process: who performs a plan, from our first word to the handle.

A `Performer` is the process at the other end of a control socket. It comes from one of three
sources; what becomes of it is the same::

    source             what comes                        who is PID 1
    stem.py            a launcher, forked now            forked by it; the launcher ends
    a nursery          a child of its PID 1, forked now  it is
    a spare            a kernel's PID 1 that waits       it is
    (warm/found.py)

    ask ── here ── begin ── performed ── detach          a handle owns PID 1 from then on
                     └───── opened                       of a launcher that only opens for another
    end                                                  at any time, also twice

A launcher is our child, and so is the PID 1 that it forks as its sibling; of the others only the
nursery's PID 1 can know how they end, and we have a pidfd. Nobody is waited for or signalled by
number: a server may ignore SIGCHLD, or wait for all children itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import IO, Protocol

from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.control import hear, hear_descriptors, say_go, say_opened
from sandbox_provisioner.descriptors import closing, is_readable
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LastWord, readable, readable_within, reap
from sandbox_provisioner.inside import wire
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.records import pid_of, start_time
from sandbox_provisioner.report import Report
from sandbox_provisioner.streams import Streams

# How long to wait for another process's word. It takes a millisecond, some tens on a busy machine.
WORD_SECONDS = 2.0
_OPEN_SECONDS = 10.0
_ENDED = -1  # by `pid_of`: nobody is hit by what is sent there
_SILENT = Stdio(stdout=subprocess.DEVNULL)


class Source(Protocol):
    """Where performers come from."""

    @property
    def is_of_init(self) -> bool:
        """Whether what comes is PID 1 already; a launcher forks it."""
        ...

    @property
    def patience_seconds(self) -> float:
        """How long a plan may take."""
        ...

    def ask(self, performer: Performer) -> None:
        """Give *performer* its control socket, at whose other end one is, or comes."""
        ...

    async def here(self, performer: Performer) -> None:
        """Return when it is there. Raises what there is to say if it does not come."""
        ...


class Performer:
    """Who performs a plan; whoever starts owns it, and calls `end` when the start fails."""

    source: Source
    control: socket.socket
    _last_word: LastWord

    def __init__(self, stdio: Stdio = _SILENT) -> None:
        """*stdio* is what its plan is performed with; a launcher that only opens has no words."""
        self._stdio = stdio
        self.is_asked = False
        self.asked: object = None  # whom its source has asked, for the source to know
        self.pid = 0
        self.init_start = 0
        self.pidfd = -1  # of PID 1
        self.report = Report()
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self.pipes: tuple[IO[bytes], ...] = ()
        self._launcher = -1  # its pidfd
        self._report_fd = -1
        self._has_init = False

    def ask(self, source: Source) -> None:
        """Let it come from *source*, which says what that may raise."""
        self.source = source
        source.ask(self)

    def connect(self, control: socket.socket, last_word: LastWord | None = None) -> None:
        """Called by its source: *control* is our end, in place of one that nobody has answered.
        *last_word* tells when who forks it has last answered anybody."""
        if self.is_asked:
            self.control.close()
        self.control, self.is_asked = control, True
        self._last_word = last_word or LastWord()

    def meet(self, pid: int, init_start: int, pidfd: int) -> None:
        """Called by its source: it is there, and is PID 1."""
        self.pid, self.init_start, self.pidfd = pid, init_start, pidfd

    async def is_heard(self) -> bool:
        """Wait until it says that it is there, as long as its source answers anybody at all."""
        if await self._last_word.awaited(self.control.fileno(), WORD_SECONDS):
            pid, pidfd = hear(self.control, wire.HERE)
            if self.source.is_of_init and pid:
                self._meet_if_itself(pid, pidfd)
            else:
                self.pid, self._launcher = pid, pidfd
        return self.pid > 0

    def _meet_if_itself(self, pid: int, pidfd: int) -> None:
        """Modules have run in a nursery's child: it may send a pidfd of whomever it has one of, and
        what we have of it is signalled at an end. Its pid is Linux's word."""
        if pid_of(pidfd) in {pid, _ENDED}:
            self.meet(pid, start_time(pid), pidfd)
        else:
            os.close(pidfd)

    async def here(self) -> None:
        """Wait until it is there; raises what its source says if it does not come."""
        if not self.pid:
            await self.source.here(self)

    def begin(self, plan: Plan, fds: Sequence[int] = (), watched: int = -1) -> None:
        """Let it perform *plan* with *fds*, which the plan's first `receive` names; they stay the
        caller's, as does *watched*, a pidfd of the server's where that is not ourselves. It may be
        on its way yet."""
        self._has_init = any(step.verb == "fork-init" for step in plan.steps)
        with contextlib.ExitStack() as given:
            self._report_fd, report = os.pipe()
            given.callback(os.close, report)
            streams = Streams(self._stdio)
            given.callback(streams.sent)
            self.pipes = tuple(streams.pipes)
            try:
                say_go(self.control, plan, report, (*streams.theirs, *fds), watched)
            except ConnectionError:
                # Then the report pipe ends at once. Of a launcher that says enough: there is no
                # PID 1. Of who is one it would say that all is performed.
                if self.source.is_of_init:
                    raise _not_done("its PID 1 has ended") from None

    def give(self, fds: Sequence[int]) -> None:
        """Let it go on with *fds*, which are closed then. If it has ended its report says why."""
        with closing(fds):
            say_opened(self.control, fds)

    async def performed(self) -> None:
        """Return when the kernel runs, or nothing does: see `report`."""
        seconds = self.source.patience_seconds
        try:
            async with asyncio.timeout(seconds):
                await self.report.read(self._report_fd)
        except TimeoutError:
            raise _not_done(f"it was not done after {seconds:g} s") from None
        # A launcher forked PID 1 long before the pipe's end, and has ended or is about to.
        await self._wait_for_launcher()
        self._hear_init()

    async def given(self, seconds: float) -> list[int]:
        """The descriptors that come with its next word; none if it has ended before."""
        if not await readable_within(self.control.fileno(), seconds):
            raise _not_done(f"it did not answer for {seconds:g} s")
        return hear_descriptors(self.control)

    async def opened(self) -> list[int]:
        """The descriptors that it opened, in the order of its plan, which ends with ``hand-over``.
        Empty if a step failed, or it has ended before: see `report` and `status`."""
        fds = await self.given(_OPEN_SECONDS)
        if not fds:
            await self.performed()
        return fds

    def has_failed(self) -> bool:
        """Whether it has reported by now that a step failed, or is PID 1 and has ended."""
        self.report.drain(self._report_fd)
        return self.report.failure is not None or is_readable(self.pidfd)

    @property
    def init_pid(self) -> int:
        """PID 1, as we see it."""
        return self.pid if self.source.is_of_init else self.report.init_pid

    async def _wait_for_launcher(self) -> None:
        """Wait until it has ended; learn how, if that can be known."""
        if self._launcher >= 0:
            await readable(self._launcher)
            self.status = reap(self._launcher)
            os.close(self._launcher)
            self._launcher = -1

    def _hear_init(self) -> None:
        """The PID 1 that a launcher forked tells of itself before it does anything else."""
        if self._has_init and self.pidfd < 0 and is_readable(self.control.fileno()):
            _, self.pidfd = hear(self.control, wire.INIT)

    def detach(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for a handle to own."""
        self._close_report()
        pidfd, self.pidfd = self.pidfd, -1
        return pidfd, self.control.detach()

    async def end(self) -> None:
        """Kill it and PID 1, and wait for both; more than once is fine."""
        if not self.is_asked or self.control.fileno() < 0:
            return
        if not self.source.is_of_init:
            await self._end_launcher()
        if self.pidfd >= 0:
            signal_to(self.pidfd, self.end_signal)
            await readable(self.pidfd)
            reap(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        for pipe in self.pipes:
            pipe.close()
        # Whom we do not know yet ends by this.
        self.control.close()
        self._close_report()

    async def _end_launcher(self) -> None:
        """It is a child of ours, so that we have to know it."""
        if not self.pid:
            await self.is_heard()
        if self._launcher >= 0:
            signal_to(self._launcher, signal.SIGKILL)
            await self._wait_for_launcher()
        if self._report_fd >= 0:
            self.report.drain(self._report_fd)  # a start that was cancelled may not know PID 1
        if self._has_init and self.pidfd < 0:
            # Without a launcher, PID 1 speaks, or there is none.
            await readable_within(self.control.fileno(), WORD_SECONDS)
            self._hear_init()

    def _close_report(self) -> None:
        if self._report_fd >= 0:
            os.close(self._report_fd)
            self._report_fd = -1


def signal_to(pidfd: int, number: int) -> None:
    """Send signal *number*; nothing if the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def _not_done(answer: str) -> LaunchError:
    return LaunchError(
        attempt="start the sandbox",
        answer=answer,
        remedy="The machine may be overloaded; try again.",
        step="read-report",
    )
