"""warm/opener.py - in the launching process: a launcher that only opens what touches the host."""

from __future__ import annotations

from collections.abc import Sequence

from sandbox_provisioner.plan import Plan
from sandbox_provisioner.spawn import LauncherProcess, Report


class Opener:
    """One launcher for the first part of a plan. It ends when it has handed over what it opened;
    whoever makes this calls `end` when there is time to wait for it."""

    def __init__(self, launcher: LauncherProcess) -> None:
        self._launcher: LauncherProcess | None = launcher
        self.report: Report = launcher.report

    async def begin(self, plan: Plan, fds: Sequence[int]) -> None:
        """Let it open what *plan*, which ends with ``hand-over``, names, or what came as *fds*."""
        assert self._launcher
        await self._launcher.begin(plan, fds)

    async def opened(self) -> list[int]:
        """The descriptors, in the plan's order; none if a step failed: see `report`."""
        assert self._launcher
        return await self._launcher.opened()

    async def end(self) -> None:
        """End the launcher; more than once is fine."""
        launcher, self._launcher = self._launcher, None
        if launcher:
            await launcher.end()
