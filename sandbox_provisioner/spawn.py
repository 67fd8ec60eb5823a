"""spawn.py - in the launching process: launchers as processes, from their fork to their end.

The interpreter that they run in takes some 20 ms to start. So it is started once, as the *stem*
(inside/enter.py), before anything else is known of the first start, and forks a launcher for each::

    server   spawn ─────────────▶ stem       python -SI, imports inside/
             a control socket ──▶ stem       forks a launcher, a child of ours
             ◀────"here"───────── launcher   on its control socket; with it comes its pid
             "go" ──control─────▶            with it the plan in a memfd, the report pipe, stdio;
                                             performs the plan, forks PID 1, ends
             ◀───report pipe────             "pid" · "made" · "failed" (see inside/enter.py)
             ◀───end of file────             the kernel runs, or nothing does

No Python of ours runs between fork and exec in the server, which has threads: `subprocess` spawns a
fresh interpreter, and that one has a single thread.

The stem costs some 6 MB. It ends with the server, whose end of its socket closes then, and when no
start has come for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import readable
from sandbox_provisioner.inside.kernel_calls import MOST_DESCRIPTORS
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.records import start_time

BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.inside.enter import main; main(sys.argv[2:])"
)
FAIL_AT = "SANDBOX_FAIL_AT"
LAUNCH_SECONDS = 60
HERE = "here"
_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7)
_DESCRIPTOR = struct.Struct("i")
_IDLE_SECONDS = 60.0
_MARGIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Stdio:
    """The caller's stdin, stdout and stderr for the kernel, as `subprocess.Popen` takes them."""

    stdin: int | IO[Any] | None = subprocess.DEVNULL
    stdout: int | IO[Any] | None = None
    stderr: int | IO[Any] | None = None


class Streams:
    """What a `Stdio` means in descriptors: *theirs* for 0, 1 and 2, and *pipes*, our ends of those
    that the caller asked for."""

    def __init__(self, stdio: Stdio) -> None:
        self.pipes: list[IO[bytes]] = []
        self.theirs: list[int] = []
        self._made: list[int] = []
        for number, wish in enumerate((stdio.stdin, stdio.stdout, stdio.stderr)):
            self.theirs.append(self._descriptor(number, wish))

    def _descriptor(self, number: int, wish: int | IO[Any] | None) -> int:
        if wish is None and _is_open(number):
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


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@dataclass(slots=True)
class Report:
    """What came through the report pipe until its end."""

    init_pid: int = 0
    made: list[tuple[str, str]] = field(default_factory=list)
    failure: tuple[str, int, str] | None = None

    def add(self, line: bytes) -> None:
        """Take in one record: words that end in NUL."""
        kind, *words = [os.fsdecode(word) for word in line.split(b"\0")[:-1]] or [""]
        if kind == "pid":
            self.init_pid = int(words[0])
        elif kind == "made":
            self.made.append((words[0], words[1]))
        elif kind == "failed" and self.failure is None:
            self.failure = (words[0], int(words[1]), words[2])

    def drain(self, fd: int) -> None:
        """Take in what is there already."""
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            for line in os.read(fd, 1 << 16).split(b"\n"):
                self.add(line)

    async def read(self, fd: int) -> None:
        """Take in everything until the pipe's end."""
        rest = b""
        while True:
            await readable(fd)
            chunk = os.read(fd, 1 << 16)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self.add(line)
            if not chunk:
                return


class LauncherProcess:
    """One launcher; `launch.ColdStart` owns it, and calls `end` when a start fails."""

    def __init__(self, control: socket.socket) -> None:
        """*control* is our end of its socket; it says "here" on it, and waits for its orders."""
        self._pid = 0
        self.report = Report()
        self.pidfd = -1
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self.pipes: tuple[IO[bytes], ...] = ()
        self._report = -1
        self._control = control

    @property
    def pid(self) -> int:
        """Its own, which stays its until we have waited for it; LaunchError if it has none."""
        self._pid = self._pid or hear(self._control, HERE)[0]
        if not self._pid:
            raise LaunchError(
                attempt="start the launcher",
                answer="it ended before it had begun",
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            )
        return self._pid

    async def perform(self, plan: Plan, stdio: Stdio, fds: Sequence[int] = ()) -> None:
        """Let it perform *plan*, to which *fds* belong; returns when the kernel runs, or nothing
        does: see `report`."""
        assert self.pid  # before anything else is said on the socket
        self._go(plan, stdio, fds)
        await self._read_report()
        # It forked PID 1 long before the pipe's end, and has ended or is about to.
        await self._wait()
        self._open_init()

    def begin(self, plan: Plan, fds: Sequence[int]) -> None:
        """Let it perform *plan*, which ends with ``hand-over``, and to which *fds* belong."""
        assert self.pid
        self._go(plan, Stdio(stdout=subprocess.DEVNULL), fds)

    async def opened(self) -> list[int]:
        """The descriptors that it opened, in the plan's order. Empty if a step failed: see
        `report`."""
        await readable(self._control.fileno())
        _, fds, _, _ = socket.recv_fds(self._control, 64, MOST_DESCRIPTORS)
        if not fds:
            await self._read_report()
        return fds

    def _go(self, plan: Plan, stdio: Stdio, fds: Sequence[int]) -> None:
        self._report, report = os.pipe()
        streams = Streams(stdio)
        self.pipes = tuple(streams.pipes)
        try:
            # Without a launcher the report pipe ends at once, and says as much.
            with contextlib.suppress(BrokenPipeError):
                say_go(self._control, plan, (report, *streams.theirs, *fds))
        finally:
            os.close(report)
            streams.sent()

    async def _read_report(self) -> None:
        try:
            async with asyncio.timeout(LAUNCH_SECONDS):
                await self.report.read(self._report)
        except TimeoutError:
            raise LaunchError(
                attempt="start the sandbox",
                answer=f"its launcher was not done after {LAUNCH_SECONDS} s",
                remedy="The machine may be overloaded; try again.",
                step="read-report",
            ) from None

    def _open_init(self) -> None:
        """PID 1 is our child and nobody else reaps it: its pid cannot have been given away."""
        if self.report.init_pid and self.pidfd < 0:
            with contextlib.suppress(ProcessLookupError):
                self.pidfd = os.pidfd_open(self.report.init_pid)

    @property
    def init_pid(self) -> int:
        """PID 1, as we see it."""
        return self.report.init_pid

    @property
    def init_start(self) -> int:
        """The start time of PID 1, in clock ticks."""
        return start_time(self.report.init_pid)

    async def _wait(self) -> None:
        """Learn how it ended; its pid is its own until then."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def hand_over(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for the handle to own."""
        os.close(self._report)
        return self.pidfd, self._control.detach()

    async def end(self) -> None:
        """Kill the launcher and PID 1, and wait for both: a start has failed."""
        with contextlib.suppress(LaunchError):
            if self.status is None:
                os.kill(self.pid, signal.SIGKILL)
            await self._wait()
        if self._report >= 0:
            self.report.drain(self._report)  # a start that was cancelled may not know PID 1
        self._open_init()
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, self.end_signal)
            await readable(self.pidfd)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED)
            os.close(self.pidfd)
        for pipe in self.pipes:
            pipe.close()
        self._control.close()
        if self._report >= 0:
            os.close(self._report)


def hear(control: socket.socket, word: str) -> tuple[int, int]:
    """The sender's pid, as unix(7) translates it for us, once it says *word*, and the descriptor
    that comes with it, -1 without one; (0, -1) at its end."""
    room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(_DESCRIPTOR.size)
    try:
        text, ancillary, _, _ = control.recvmsg(64, room, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:  # it has ended, and left unread what we had told it
        return 0, -1
    found = {kind: data for _, kind, data in ancillary}
    (fd,) = _DESCRIPTOR.unpack(found.get(socket.SCM_RIGHTS, _DESCRIPTOR.pack(-1)))
    if text != word.encode():
        return 0, fd
    return _CREDENTIALS.unpack(found[socket.SCM_CREDENTIALS])[0], fd


def control_pair() -> tuple[socket.socket, socket.socket]:
    """Our end and the other one of a control socket; what we hear comes with its sender's pid."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


def say_go(control: socket.socket, plan: Plan, fds: Sequence[int]) -> None:
    """Send *plan* with *fds*, as `inside.enter.obey` takes them; OSError if nobody is there."""
    memfd = os.memfd_create("plan")
    try:
        os.pwrite(memfd, plan.encode(), 0)
        word = b"go " + os.fsencode(os.environ.get(FAIL_AT, ""))
        socket.send_fds(control, [word], [memfd, *fds])
    finally:
        os.close(memfd)


class Stem:
    """The process that launchers are forked from, as long as it is needed: one for each server."""

    def __init__(self) -> None:
        self._wanted_seconds = _IDLE_SECONDS
        self._forget()
        # Two servers with one stem would both hear its answers.
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None
        self._idle_seconds = 0.0
        self._good_until = 0.0

    def stay(self, seconds: float) -> None:
        """Another start may come within so long: the next one that is made waits for it."""
        self._wanted_seconds = max(self._wanted_seconds, seconds)

    def launcher(self) -> LauncherProcess:
        """A new launcher; LaunchError if the machine has no process left."""
        control, theirs = control_pair()
        with theirs, self._lock:
            try:
                self._ask(theirs)
            except OSError:  # it has ended
                self._end()
                self._ask(theirs)
        return LauncherProcess(control)

    def _ask(self, theirs: socket.socket) -> None:
        if time.monotonic() > self._good_until:
            self._end()
        requests = self._requests or self._spawn()
        socket.send_fds(requests, [b"fork"], [theirs.fileno()])
        # It counts from when it has forked: this is earlier, and leaves no doubt.
        self._good_until = time.monotonic() + self._idle_seconds - _MARGIN_SECONDS

    def _spawn(self) -> socket.socket:
        requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._idle_seconds = self._wanted_seconds
        try:
            self._process = subprocess.Popen(
                [*_command(), str(theirs.fileno()), f"{self._idle_seconds:g}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
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
        self._requests = requests
        return requests

    def end(self) -> None:
        """End it; the next launcher gets another one."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._requests:
            self._requests.close()
        if self._process:
            self._process.wait()
        self._process = self._requests = None


stem = Stem()


def _command() -> list[str]:
    package = os.path.dirname(os.path.dirname(os.path.abspath(sandbox_provisioner.__file__)))
    return [interpreter(), "-SI", "-c", BOOT, package]


def interpreter() -> str:
    """The Python that runs the launcher. Not the virtual environment's: the launcher needs nothing
    of it, and finding it takes 4 ms."""
    return getattr(sys, "_base_executable", "") or sys.executable
