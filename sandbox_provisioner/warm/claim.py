"""warm/claim.py - in the launching process: the PID 1 of a spare, which a start claims.

::

    server    connects ─▶ PID 1 of a spare        it is ours; takes its folder over
    launcher  opens the work directory ─▶ us
    server    "go" + plan, mounts ─▶ PID 1        attaches, covers, wakes the kernel
    LocalHandle
"""

from __future__ import annotations

import contextlib
import os
import socket

from sandbox_provisioner.contract import Stdio
from sandbox_provisioner.errors import LaunchError
from sandbox_provisioner.handle import readable_within
from sandbox_provisioner.records import Record, RecordFolder, open_init
from sandbox_provisioner.spawn import WORD_SECONDS
from sandbox_provisioner.warm.process import DistantProcess


class ClaimedProcess(DistantProcess):
    """PID 1 of a spare, at the other end of *channel*."""

    patience_seconds = 3.0  # it attaches, covers, and wakes

    def __init__(
        self, channel: socket.socket, folder: RecordFolder, record: Record, stdio: Stdio
    ) -> None:
        with contextlib.ExitStack() as undo:
            undo.callback(channel.close)
            found = open_init(record)
            if found is not None:
                undo.callback(os.close, found)
            super().__init__(channel, stdio)
            undo.pop_all()
        self.record = record
        self.folder = folder
        self.pid, self.init_start = record.init_pid, record.init_start
        self.pidfd = -1 if found is None else found

    async def string_fd(self) -> int:
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
