"""warm/claim.py - in the launching process: a start that is bound to a spare (`launcher/claim.py`).

::

    server    connects ─▶ PID 1 of a spare        it is ours; takes its folder over
    launcher  opens the work directory ─▶ us
    server    "go" + plan, mounts ─▶ PID 1        attaches, covers, wakes the kernel
    LocalHandle
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner import orders
from sandbox_provisioner.cgroup import CgroupTree
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import LocalHandle, readable_within
from sandbox_provisioner.launch import Start
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.records import Record, RecordFolder, open_init
from sandbox_provisioner.spawn import WORD_SECONDS
from sandbox_provisioner.warm.opener import Opener
from sandbox_provisioner.warm.process import DistantProcess


class ClaimStart(Start):
    """A `Start` of what runs already."""

    opener: Opener
    sealed = True

    def __init__(
        self, request: LaunchRequest, process: ClaimedProcess, runtime: Path, labels: Labels
    ) -> None:
        super().__init__(request, process, runtime, labels)
        self.claimed = process

    async def run(self, site: Site, _tree: CgroupTree) -> LocalHandle:
        """The groups are those that the spare has: `tree`."""
        assert self.tree
        site = replace(site, first_id=self.claimed.record.first_id)
        outside, inside = orders.compile_claim(self.request, site)
        await self.opener.begin(outside, site.descriptors)
        folder = await off_loop(self.take_over, site)
        if self.record.cgroup_manager:
            self.tree.take_over(await self.claimed.string())
        fds = await self.opener.opened()
        if not fds:
            self.check(self.opener.report, outside, site)
        self.claimed.begin(inside, fds)
        await self.claimed.performed()
        self.check(self.claimed.report, inside, site)
        return await off_loop(self.hand_over, self.tree, folder)

    def take_over(self, site: Site) -> RecordFolder:
        """Make its folder that of this start."""
        spare = self.claimed.record
        kept = {name: getattr(spare, name) for name in ("first_id", "init_pid", "init_start")}
        self.record = replace(
            self.new_record(site), **kept, nursery=spare.nursery, group=spare.tree
        )
        self.folder = self.claimed.folder.take_over(self.record)
        return self.folder


class ClaimedProcess(DistantProcess):
    """PID 1 of a spare, at the other end of *channel*."""

    patience_seconds = 3.0  # it attaches, covers, and wakes

    def __init__(
        self, channel: socket.socket, folder: RecordFolder, record: Record, stdio: Stdio
    ) -> None:
        super().__init__(channel, stdio)
        self.record = record
        self.folder = folder
        self.pid, self.init_start = record.init_pid, record.init_start
        found = open_init(record)
        self.pidfd = -1 if found is None else found

    async def string(self) -> int:
        """What holds its groups; LaunchError if it has ended."""
        fds: list[int] = []
        if await readable_within(self._control.fileno(), WORD_SECONDS):
            _, fds, _, _ = socket.recv_fds(self._control, 64, 1)
        if not fds:
            raise LaunchError(
                attempt="start the sandbox",
                answer="the spare has ended, or does not answer",
                remedy="Kernels start without it.",
                step="claim",
            )
        os.set_inheritable(fds[0], False)
        return fds[0]
