"""warm/claim.py - in the launching process: a start that is bound to a spare (`inside/claim.py`).

::

    server    connects ─▶ PID 1 of a spare        it is ours; takes its folder over
    launcher  opens the work directory ─▶ us
    server    "go" + plan, mounts ─▶ PID 1        attaches, covers, wakes the kernel
    LocalHandle
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner.cgroup import CgroupTree
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LocalHandle, readable
from sandbox_provisioner.launch import Labels, Start
from sandbox_provisioner.plan import LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, RecordFolder, open_init
from sandbox_provisioner.spawn import (
    LAUNCH_SECONDS,
    Report,
    Stdio,
    Streams,
    say_go,
)
from sandbox_provisioner.warm import plans
from sandbox_provisioner.warm.opener import Opener


class ClaimStart(Start):
    """A `Start` of what runs already."""

    opener: Opener

    def __init__(
        self, request: LaunchRequest, process: ClaimedProcess, runtime: Path, labels: Labels
    ) -> None:
        super().__init__(request, process, runtime, labels)
        self.claimed = process

    async def run(self, site: Site, _tree: CgroupTree) -> LocalHandle:
        """The groups are those that the spare has: `tree`."""
        assert self.tree
        site = replace(site, first_id=self.claimed.record.first_id)
        outside, inside = plans.compile_claim_plan(self.request, site)
        self.opener.begin(outside)
        folder = self.take_over(site)
        if self.record.cgroup_manager:
            self.tree.take_over(await self.claimed.string())
        fds = await self.opener.opened()
        if not fds:
            self.check(self.opener.report, outside, site)
        await self.claimed.go(inside, fds)
        self.check(self.claimed.report, inside, site)
        return self.hand_over(self.tree, folder)

    def take_over(self, site: Site) -> RecordFolder:
        """Make its folder that of this start."""
        spare = self.claimed.record
        kept = {name: getattr(spare, name) for name in ("first_id", "init_pid", "init_start")}
        self.record = replace(
            self.new_record(site), **kept, nursery=spare.nursery, group=spare.tree
        )
        self.folder = self.claimed.folder.take_over(self.record)
        return self.folder


class ClaimedProcess:
    """PID 1 of a spare: `launch.StartedProcess`. It is a child of its nursery's PID 1."""

    def __init__(
        self, channel: socket.socket, folder: RecordFolder, record: Record, stdio: Stdio
    ) -> None:
        self.record = record
        self.folder = folder
        self.report = Report()
        self.end_signal: int = signal.SIGKILL
        self.status: int | None = None
        self.pidfd = -1 if (pidfd := open_init(record)) is None else pidfd
        self._control = channel
        self._report, self._report_write = os.pipe()
        self._streams = Streams(stdio)
        self.pipes = tuple(self._streams.pipes)

    @property
    def pid(self) -> int:
        """PID 1: what was before it has ended long ago."""
        return self.record.init_pid

    @property
    def init_pid(self) -> int:
        """PID 1, as we see it."""
        return self.record.init_pid

    @property
    def init_start(self) -> int:
        """The start time of PID 1, in clock ticks."""
        return self.record.init_start

    async def string(self) -> int:
        """What holds its groups; LaunchError if it has ended."""
        await readable(self._control.fileno())
        _, fds, _, _ = socket.recv_fds(self._control, 64, 1)
        if not fds:
            raise LaunchError(
                attempt="start the sandbox",
                answer="the spare has ended",
                remedy="Starts do without it.",
                step="claim",
            )
        os.set_inheritable(fds[0], False)
        return fds[0]

    async def go(self, plan: Plan, fds: Sequence[int]) -> None:
        """Let PID 1 perform *plan* with *fds*; returns when it has, or has failed."""
        try:
            say_go(self._control, plan, (self._report_write, *self._streams.theirs, *fds))
        finally:
            self._sent(fds)
        try:
            async with asyncio.timeout(LAUNCH_SECONDS):
                await self.report.read(self._report)
        except TimeoutError:
            raise LaunchError(
                attempt="start the sandbox",
                answer=f"the spare was not bound to it after {LAUNCH_SECONDS} s",
                remedy="The machine may be overloaded; try again.",
                step="read-report",
            ) from None

    def _sent(self, fds: Sequence[int] = ()) -> None:
        if self._report_write >= 0:
            os.close(self._report_write)
            self._report_write = -1
        self._streams.sent()
        for fd in fds:
            os.close(fd)

    def hand_over(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for the handle to own."""
        os.close(self._report)
        return self.pidfd, self._control.detach()

    async def end(self) -> None:
        """Kill PID 1 and wait for its end: the start has failed."""
        self._control.close()
        self._sent()
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, self.end_signal)
            await readable(self.pidfd)
            os.close(self.pidfd)
        for pipe in self.pipes:
            pipe.close()
        os.close(self._report)
