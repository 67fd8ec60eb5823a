"""spawn.py - in the launching process: the launcher as a process, from its spawn to its end.

It is spawned before anything else is known, so that its interpreter starts (some 20 ms) while the
server looks around, and waits for the word::

    server   spawn ─────────────▶ launcher   python -SI, imports inside/
             plan ──memfd───────▶
             "go" ──control─────▶            reads the plan, performs it, forks PID 1, ends
             ◀───report pipe────             "pid" · "made" · "failed" (see inside/enter.py)
             ◀───end of file────             the kernel runs, or nothing does

No Python of ours runs between fork and exec in the server, which has threads: `subprocess` spawns a
fresh interpreter, and that one has a single thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import sandbox_provisioner
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import readable
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.records import start_time

BOOT = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from sandbox_provisioner.inside.enter import main; main(sys.argv[2:])"
)
FAIL_AT = "SANDBOX_FAIL_AT"
MOST_DESCRIPTORS = 253  # unix(7): SCM_MAX_FD, in one message
LAUNCH_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Stdio:
    """The caller's stdin, stdout and stderr for the launcher, as `subprocess.Popen` takes them."""

    stdin: int | IO[Any] | None = subprocess.DEVNULL
    stdout: int | IO[Any] | None = None
    stderr: int | IO[Any] | None = None


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

    def __init__(self, stdio: Stdio) -> None:
        """Spawn it; LaunchError if the machine has no process left."""
        self.report = Report()
        self.pidfd = -1
        self.end_signal: int = signal.SIGKILL
        self._plan = os.memfd_create("plan")
        self._report, report_write = os.pipe()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        passed = (self._plan, report_write, theirs.fileno())
        words = [*map(str, passed), os.environ.get(FAIL_AT, "")]
        try:
            self._process = subprocess.Popen(
                [*_command(), *words],
                stdin=stdio.stdin,
                stdout=stdio.stdout,
                stderr=stdio.stderr,
                env={},
                cwd="/",
                pass_fds=passed,
            )
        except OSError as error:
            self._close_ours()
            raise LaunchError(
                attempt="start the launcher",
                answer=error.strerror or str(error),
                remedy="The machine may be out of processes or memory.",
                step="spawn-launcher",
            ) from None
        finally:
            theirs.close()
            os.close(report_write)

    @property
    def pid(self) -> int:
        """The launcher's own; it is not waited for before `perform` or `end`, and so stays its."""
        return self._process.pid

    async def perform(self, plan: Plan, join_files: Sequence[str]) -> None:
        """Let it perform *plan*; returns when the kernel runs, or nothing does: see `report`."""
        content = plan.encode()
        os.pwrite(self._plan, content, 0)
        self._control.send(b"go")
        await asyncio.gather(asyncio.to_thread(self._join, join_files[:1]), self._read_report())
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It has ended or is about to: it forked PID 1 long before the pipe's end.
            self._process.wait(1)
        self._open_init()

    async def open(self, plan: Plan) -> list[int]:
        """Let it perform *plan*, which ends with ``hand-over``: the descriptors that it opened, in
        the plan's order. Empty if a step failed: see `report`."""
        os.pwrite(self._plan, plan.encode(), 0)
        self._control.send(b"go")
        await readable(self._control.fileno())
        _, fds, _, _ = socket.recv_fds(self._control, 64, MOST_DESCRIPTORS)
        if not fds:
            await self._read_report()
        return fds

    def _join(self, files: Sequence[str]) -> None:
        """Move the launcher into its first cgroup while it is still starting.

        The first move costs the wait for an RCU grace period, some 10 ms, the later ones next to
        nothing; the launcher still joins by itself, and fails if it cannot. Its pid is its own, as
        we wait for it only later.
        """
        for path in files:
            with contextlib.suppress(OSError), open(path, "w") as file:
                file.write(str(self._process.pid))

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

    def _drain_report(self) -> None:
        """Take in what nobody has read yet: a start that was cancelled may not know PID 1."""
        os.set_blocking(self._report, False)
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self._report, 1 << 16).split(b"\n"):
                self.report.add(line)

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

    @property
    def status(self) -> int | None:
        """The exit status of the launcher itself."""
        return self._process.poll()

    @property
    def pipes(self) -> tuple[IO[bytes], ...]:
        """Our ends of the pipes that the caller asked for as stdin, stdout or stderr."""
        streams = (self._process.stdin, self._process.stdout, self._process.stderr)
        return tuple(stream for stream in streams if stream)

    def hand_over(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for the handle to own."""
        os.close(self._plan)
        os.close(self._report)
        return self.pidfd, self._control.detach()

    async def end(self) -> None:
        """Kill the launcher and PID 1, and wait for both: a start has failed."""
        self._process.kill()
        self._process.wait()
        self._drain_report()
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
        self._close_ours()

    def _close_ours(self) -> None:
        self._control.close()
        os.close(self._plan)
        os.close(self._report)


def _command() -> list[str]:
    package = os.path.dirname(os.path.dirname(os.path.abspath(sandbox_provisioner.__file__)))
    return [interpreter(), "-SI", "-c", BOOT, package]


def interpreter() -> str:
    """The Python that runs the launcher. Not the virtual environment's: the launcher needs nothing
    of it, and finding it takes 4 ms."""
    return getattr(sys, "_base_executable", "") or sys.executable
