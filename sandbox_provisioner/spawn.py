"""spawn.py - in the launching process: launchers as processes, from their fork to their end.

The interpreter that they run in takes some 20 ms to start. So it is started once, as the *stem*
(launcher/enter.py), before anything else is known of the first start, and forks a launcher for
each.
A launcher is a child of ours; it performs its plan, forks PID 1, and ends. The words that we and
they say are drawn in inside/wire.py.

A stem that does not answer is ended, and another one asked. Nobody is waited for or signalled by
number: a server may ignore SIGCHLD, or wait for all children itself.

No Python of ours runs between fork and exec in the server, which has threads: `subprocess` spawns a
fresh interpreter, and that one has a single thread.

The stem costs some 6 MB. It ends with the server, whose end of its socket closes then, and when no
start has come for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import sandbox_provisioner
from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.descriptors import is_readable, keep_from_children, occupy_standard_streams
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LastWord, readable, readable_within, reap, when_ended
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.kernel_calls import MOST_DESCRIPTORS
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.records import start_time
from sandbox_provisioner.stages import fail_at

BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.launcher.enter import main; main(sys.argv[2:])"
)
LAUNCH_SECONDS = 60.0
_OPEN_SECONDS = 10.0
# How long to wait for another process's word. It takes a millisecond, some tens on a busy machine.
WORD_SECONDS = 2.0
_INTERPRETER_SECONDS = 10.0
_ORDERLY_SECONDS = 1.0
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7)
_DESCRIPTOR = struct.Struct("i")
_IDLE_SECONDS = 60.0
_MARGIN_SECONDS = 5.0
# Some hundred paths of stand-ins, each of at most 4096 bytes.
_MOST_REPORTED_BYTES = 1 << 22


class Streams:
    """What a `Stdio` means in descriptors: *theirs* for 0, 1 and 2, and *pipes*, our ends of those
    that the caller asked for."""

    def __init__(self, stdio: Stdio) -> None:
        self.pipes: list[IO[bytes]] = []
        self.theirs: list[int] = []
        self._made: list[int] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for number, wish in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)):
                self.theirs.append(self._descriptor(number, wish))
            undo.pop_all()

    def _descriptor(self, number: int, wish: int | IO[Any] | None) -> int:
        if wish is None and _is_stream(number):
            return number
        if wish == subprocess.STDOUT:
            return self.theirs[1]
        if wish == subprocess.PIPE:
            read_end, write_end = os.pipe()
            mine, fd = (write_end, read_end) if number == 0 else (read_end, write_end)
            self.pipes.append(os.fdopen(mine, "rb" if number else "wb", buffering=0))
        elif wish is None or wish == subprocess.DEVNULL:
            fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        else:
            return wish if isinstance(wish, int) else wish.fileno()
        self._made.append(fd)
        return fd

    def sent(self) -> None:
        """Close what was made for the other side, once it has it."""
        for fd in self._made:
            os.close(fd)
        self._made.clear()

    def close(self) -> None:
        """Close all of it: nobody gets it."""
        self.sent()
        for pipe in self.pipes:
            pipe.close()


def _is_stream(number: int) -> bool:
    """Whether *number* is a stream, which children inherit. Where one was closed, a socket or a
    counter of somebody's may lie there now, which they do not."""
    try:
        return os.get_inheritable(number)
    except OSError:
        return False


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


@dataclass(frozen=True, slots=True)
class Failure:
    """What a process said of the step that failed: the step's number in the plan, counted from 1,
    its verb, the error's number, and its text; and whether it *is_ours*, a mistake in our code."""

    step: int
    verb: str
    errno: int
    text: str
    is_ours: bool = False


@dataclass(slots=True)
class Report:
    """What came through the report pipe until its end.

    A nursery's child, in whom modules have run, writes it as well: it has a size, and lines that
    are none are nothing.
    """

    init_pid: int = 0
    made: list[tuple[str, str]] = field(default_factory=list)
    failure: Failure | None = None

    def add(self, words: list[str]) -> None:
        """Take in one record."""
        match words:
            case [wire.PID, number] if _is_number(number):
                self.init_pid = int(number)
            case [wire.MADE, kind, path]:
                self.made.append((kind, path))
            case [wire.FAILED, step, verb, number, text] if self.failure is None and (
                _is_number(step) and _is_number(number)
            ):
                self.failure = Failure(int(step), verb, int(number), text)
            case [wire.MISTAKE, step, verb, text] if self.failure is None and _is_number(step):
                self.failure = Failure(int(step), verb, 0, text, is_ours=True)

    def drain(self, fd: int) -> None:
        """Take in what is there already; does not wait."""
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            for words in wire.records(os.read(fd, 1 << 16))[0]:
                self.add(words)

    async def read(self, fd: int) -> None:
        """Take in everything until the pipe's end. A report that is too long is a failure."""
        rest, left = b"", _MOST_REPORTED_BYTES
        while True:
            await readable(fd)
            chunk = os.read(fd, 1 << 16)
            left -= len(chunk)
            if left < 0:
                text = "it has reported more than there is to report"
                self.failure = Failure(0, "read-report", 0, text)
                return
            found, rest = wire.records(rest + chunk)
            for words in found:
                self.add(words)
            if not chunk:
                return


class LauncherProcess:
    """One launcher; whoever starts owns it, and calls `end` when the start fails."""

    def __init__(self, stem: Stem) -> None:
        """*stem* forks it when it is asked to."""
        self._stem = stem
        self._control: socket.socket | None = None
        self._asked: object = None
        self.pid = 0
        self._own = -1  # its pidfd
        self.report = Report()
        self.pidfd = -1
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self.pipes: tuple[IO[bytes], ...] = ()
        self._report = -1
        self._has_init = False

    def ask(self) -> None:
        """Let it be forked: it says "here" on its control socket, and waits for its orders. Where
        there is no stem yet, one is started. LaunchError if the machine has no process left."""
        if self._control:
            self._stem.replace(self._asked)
            self._control.close()
        self._control, self._asked = self._stem.ask()

    @property
    def control(self) -> socket.socket:
        """Our end of its control socket, once it was asked for."""
        assert self._control
        return self._control

    async def here(self) -> None:
        """Wait until it is there; LaunchError if there is none to be had."""
        if not self.pid and not await self._hear_launcher():
            await off_loop(self.ask)
            await self._hear_launcher()
        if not self.pid:
            raise LaunchError(
                attempt="start the launcher",
                answer="it ended before it had begun, or did not begin",
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            )

    async def _hear_launcher(self) -> bool:
        if await self._stem.last_word.awaited(self.control.fileno(), WORD_SECONDS):
            self.pid, self._own = hear(self.control, wire.HERE)
        return self.pid > 0

    async def perform(self, plan: Plan, stdio: Stdio, fds: Sequence[int] = ()) -> None:
        """Let it perform *plan*, to which *fds* belong; returns when the kernel runs, or nothing
        does: see `report`."""
        await self.here()  # before anything else is said on the socket
        self._has_init = True
        await off_loop(self._go, plan, stdio, fds)
        await self._read_report()
        # It forked PID 1 long before the pipe's end, and has ended or is about to.
        await self._wait()
        self._hear_init()

    async def begin(self, plan: Plan, fds: Sequence[int]) -> None:
        """Let it perform *plan*, which ends with ``hand-over``, and to which *fds* belong."""
        await self.here()
        await off_loop(self._go, plan, Stdio(stdout=subprocess.DEVNULL), fds)

    async def opened(self) -> list[int]:
        """The descriptors that it opened, in the plan's order. Empty if a step failed, or it has
        ended before: see `report` and `status`."""
        if not await readable_within(self.control.fileno(), _OPEN_SECONDS):
            raise _not_done(_OPEN_SECONDS)
        fds: list[int] = []
        with contextlib.suppress(ConnectionResetError):  # it has left unread what we had told it
            _, fds, _, _ = socket.recv_fds(self.control, 64, MOST_DESCRIPTORS)
        if not fds:
            await self._read_report()
            await self._wait()
        return fds

    def _go(self, plan: Plan, stdio: Stdio, fds: Sequence[int]) -> None:
        with contextlib.ExitStack() as given:
            self._report, report = os.pipe()
            given.callback(os.close, report)
            streams = Streams(stdio)
            given.callback(streams.sent)
            self.pipes = tuple(streams.pipes)
            # Without a launcher the report pipe ends at once, and says as much.
            with contextlib.suppress(BrokenPipeError):
                say_go(self.control, plan, report, (*streams.theirs, *fds))

    async def _read_report(self) -> None:
        try:
            async with asyncio.timeout(LAUNCH_SECONDS):
                await self.report.read(self._report)
        except TimeoutError:
            raise _not_done(LAUNCH_SECONDS) from None

    def _hear_init(self) -> None:
        """PID 1 tells of itself before it does anything else."""
        if self.pidfd < 0 and is_readable(self.control.fileno()):
            _, self.pidfd = hear(self.control, wire.INIT)

    @property
    def init_pid(self) -> int:
        """PID 1, as we see it."""
        return self.report.init_pid

    @property
    def init_start(self) -> int:
        """The start time of PID 1, in clock ticks."""
        return start_time(self.report.init_pid)

    async def _wait(self) -> None:
        """Wait until it has ended; learn how, if that can be known."""
        if self._own >= 0:
            await readable(self._own)
            self.status = reap(self._own)
            os.close(self._own)
            self._own = -1

    def detach(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for a handle to own."""
        os.close(self._report)
        self._report = -1
        pidfd, self.pidfd = self.pidfd, -1
        return pidfd, self.control.detach()

    async def end(self) -> None:
        """Kill the launcher and PID 1, and wait for both; more than once is fine."""
        if self._control is None or self._control.fileno() < 0:
            return
        if not self.pid:
            await self._hear_launcher()
        if self._own >= 0:
            signal_to(self._own, signal.SIGKILL)
            await self._wait()
        if self._report >= 0:
            self.report.drain(self._report)  # a start that was cancelled may not know PID 1
        if self._has_init and self.pidfd < 0:
            # Without a launcher, PID 1 speaks, or there is none.
            await readable_within(self.control.fileno(), WORD_SECONDS)
            self._hear_init()
        if self.pidfd >= 0:
            signal_to(self.pidfd, self.end_signal)
            await readable(self.pidfd)
            reap(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        for pipe in self.pipes:
            pipe.close()
        self._control.close()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1


def _not_done(seconds: float) -> LaunchError:
    return LaunchError(
        attempt="start the sandbox",
        answer=f"its launcher was not done after {seconds:g} s",
        remedy="The machine may be overloaded; try again.",
        step="read-report",
    )


def signal_to(pidfd: int, number: int) -> None:
    """Send signal *number*; nothing if the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def hear(control: socket.socket, word: str) -> tuple[int, int]:
    """The sender's pid, as unix(7) translates it for us, once it says *word*, and the descriptor
    that comes with it, -1 without one; (0, -1) at its end."""
    room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_DESCRIPTOR.size)
    try:
        text, ancillary, flags, _ = control.recvmsg(64, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # it has ended, and left unread what we had told it
        return 0, -1
    if flags & socket.MSG_CTRUNC:  # unix(7): there was no descriptor left for it
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    found = {kind: data for _, kind, data in ancillary}
    # The room that is left by rounding takes a second one.
    fds = [fd for (fd,) in _DESCRIPTOR.iter_unpack(found.get(socket.SCM_RIGHTS, b""))]
    for other in fds[1:]:
        os.close(other)
    fd = fds[0] if fds else -1
    if text != wire.message(word):
        return 0, fd
    return _CREDENTIALS.unpack(found[socket.SCM_CREDENTIALS])[0], fd


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Our end and the other one of a control socket; what we hear comes with its sender's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def say_go(control: socket.socket, plan: Plan, report: int, fds: Sequence[int]) -> None:
    """Send *plan* with *fds*, the first of which are standard streams, as
    `launcher.enter.obey` takes them; OSError if nobody is there. By our pidfd PID 1 sees that we
    have ended."""
    with contextlib.ExitStack() as stack:
        memfd = os.memfd_create("plan")
        stack.callback(os.close, memfd)
        ourselves = os.pidfd_open(os.getpid())
        stack.callback(os.close, ourselves)
        os.pwrite(memfd, plan.encode(), 0)
        word = wire.message(wire.GO, fail_at())
        socket.send_fds(control, [word], [memfd, report, ourselves, *fds])


class Stem:
    """The process that launchers are forked from, as long as it is needed: one for each server."""

    def __init__(self) -> None:
        self._wanted_seconds = _IDLE_SECONDS
        self._begin()
        # Two servers with one stem would both hear its answers.
        keep_from_children(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._requests: socket.socket | None = None
        self._idle_seconds = 0.0
        self._good_until = 0.0
        self.last_word = LastWord()

    def forget(self) -> None:
        """In a child that was forked: its first start makes another one."""
        if self._requests:
            self._requests.close()
        self._begin()

    def stay(self, seconds: float) -> None:
        """Let the next stem wait for another start for *seconds*, unless it does so for longer."""
        self._wanted_seconds = max(self._wanted_seconds, seconds)

    def ask(self) -> tuple[socket.socket, object]:
        """Our end of the control socket of a launcher that is forked now, and who forks it."""
        occupy_standard_streams()
        control, theirs = control_pair()
        with theirs, self._lock:
            try:
                self._ask(theirs)
            except OSError:  # it has ended, or takes no request any more
                self._end(0.0)
                self._ask(theirs)
            return control, self._process

    def _ask(self, theirs: socket.socket) -> None:
        if time.monotonic() > self._good_until:
            self._end(_ORDERLY_SECONDS)
        requests = self._requests or self._spawn()
        socket.send_fds(requests, [wire.message(wire.FORK)], [theirs.fileno()], socket.MSG_DONTWAIT)
        # The stem counts from its fork, which is later: it is still there when we think that it is.
        self._good_until = time.monotonic() + self._idle_seconds - _MARGIN_SECONDS

    def replace(self, silent: object) -> None:
        """End the process that does not answer, if it is still the one; the next launcher gets
        another one."""
        with self._lock:
            if self._process is silent:
                self._end(0.0)

    def _spawn(self) -> socket.socket:
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._idle_seconds = self._wanted_seconds
        self.last_word.time = time.monotonic() + _INTERPRETER_SECONDS
        try:
            self._process = subprocess.Popen(
                [*_command(), str(theirs.fileno()), f"{self._idle_seconds:g}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=None if _is_stream(2) else subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # Ctrl-C is for the server
            )
        except OSError as error:
            requests.close()
            raise LaunchError(
                attempt="start the launcher",
                answer=error.strerror or str(error),
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            ) from None
        finally:
            theirs.close()
        with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody waits here
            self._pidfd = os.pidfd_open(self._process.pid)
            process = self._process
            when_ended(self._pidfd, lambda _: process.wait())
        self._requests = requests
        return requests

    def end(self) -> None:
        """End it; the next launcher gets another one."""
        with self._lock:
            self._end(_ORDERLY_SECONDS)

    def _end(self, patience_seconds: float) -> None:
        """Let it do what it was asked for and end; kill it after *patience_seconds*."""
        if self._requests:
            self._requests.close()
        if self._pidfd >= 0:
            if not is_readable(self._pidfd, patience_seconds):
                signal_to(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)
        if self._process:
            self._process.wait()
        self._process = self._requests = None
        self._pidfd = -1


stem = Stem()


def _command() -> list[str]:
    package = os.path.dirname(os.path.dirname(os.path.abspath(sandbox_provisioner.__file__)))
    return [interpreter(), "-SI", "-c", BOOT, package]


def interpreter() -> str:
    """The Python that runs the launcher. Not the virtual environment's: the launcher needs nothing
    of it, and finding it takes 4 ms."""
    return getattr(sys, "_base_executable", "") or sys.executable
