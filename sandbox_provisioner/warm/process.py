"""warm/process.py - in the launching process: a PID 1 that is no child of ours, from our first word
to it to the handle.

It is a child of its nursery's PID 1: nobody but that one can wait for it, we have a pidfd.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Sequence

from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.descriptors import is_readable
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import readable
from sandbox_provisioner.plan import Plan
from sandbox_provisioner.spawn import Report, Streams, say_go


class DistantProcess:
    """What a fork of a nursery and a spare have in common: `ledger.StartedProcess`."""

    pid = 0
    init_start = 0
    pidfd = -1
    # Its part of a start takes some tens of milliseconds; without it one starts cold.
    patience_seconds = 10.0

    def __init__(self, control: socket.socket, stdio: Stdio) -> None:
        """*control* is our end of its control socket; it is closed where this fails."""
        self.report = Report()
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self._control = control
        with contextlib.ExitStack() as undo:
            undo.callback(control.close)
            self._streams = Streams(stdio)
            undo.callback(self._streams.close)
            self._report, self._report_write = os.pipe()
            undo.pop_all()
        self.pipes = tuple(self._streams.pipes)

    @property
    def init_pid(self) -> int:
        """It is PID 1 already."""
        return self.pid

    def begin(self, plan: Plan, fds: Sequence[int], kept: Sequence[int] = ()) -> None:
        """Let it perform *plan* with *fds*, which are closed then, and *kept*, which are not."""
        try:
            streams = (*self._streams.theirs, *fds, *kept)
            say_go(self._control, plan, self._report_write, streams)
        except ConnectionError:
            raise LaunchError(
                attempt="start the sandbox",
                answer="its PID 1 has ended",
                remedy="Kernels start without it.",
                step="perform",
            ) from None
        finally:
            self._sent()
            for fd in fds:
                os.close(fd)

    def told(self) -> Report:
        """What it has reported so far."""
        self.report.drain(self._report)
        return self.report

    def has_ended(self) -> bool:
        """Whether it is no more."""
        return is_readable(self.pidfd)

    async def performed(self) -> None:
        """Return when it has performed its plan, or has failed: see `report`."""
        try:
            async with asyncio.timeout(self.patience_seconds):
                await self.report.read(self._report)
        except TimeoutError:
            raise LaunchError(
                attempt="start the sandbox",
                answer=f"it was not made ready in {self.patience_seconds:g} s",
                remedy="Kernels start without it.",
                step="read-report",
            ) from None

    def _sent(self) -> None:
        if self._report_write >= 0:
            os.close(self._report_write)
            self._report_write = -1
        self._streams.sent()

    def detach(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for a handle to own."""
        os.close(self._report)
        self._report = -1
        pidfd, self.pidfd = self.pidfd, -1
        return pidfd, self._control.detach()

    async def end(self) -> None:
        """Kill it and wait for its end: the start has failed. More than once is fine."""
        self._control.close()
        self._sent()
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, self.end_signal)
            await readable(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
        for pipe in self.pipes:
            pipe.close()
        if self._report >= 0:
            os.close(self._report)
            self._report = -1
