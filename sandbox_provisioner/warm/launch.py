"""warm/launch.py - in the launching process: a start from a nursery, in place of a new process.

::

    nursery   "fork" ─▶ child                        while we survey and make the record
    launcher  opens what touches the host ─▶ us      (a launcher as always, `spawn.py`)
    child     "here" ─▶ we move it into the groups   "joined"
              performs its part of the plan          it is PID 1 from the beginning
    LocalHandle

Nothing here falls back by itself: `WarmUnavailable` says why there is no start from a nursery, and
the caller starts cold.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sandbox_provisioner.cgroup import CgroupTree
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.handle import LocalHandle, readable
from sandbox_provisioner.launch import Labels, LocalLauncher, Start, hurry
from sandbox_provisioner.plan import LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, start_time
from sandbox_provisioner.spawn import (
    HERE,
    Stdio,
    control_pair,
    hear,
    stem,
)
from sandbox_provisioner.warm import plans
from sandbox_provisioner.warm.claim import ClaimedProcess, ClaimStart
from sandbox_provisioner.warm.found import Command, claim, find, key_of, spare_key_of
from sandbox_provisioner.warm.opener import Opener
from sandbox_provisioner.warm.process import DistantProcess

_HERE_SECONDS = 5


class WarmUnavailable(Exception):
    """No start from a nursery: the text says why, for a log. A cold start may do.

    *failed*: there was one, and it could not.
    """

    def __init__(self, why: str, *, failed: bool = False) -> None:
        super().__init__(why)
        self.failed = failed


async def start_warm(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    stdio: Stdio,
    preload: tuple[str, ...],
) -> LocalHandle:
    """Start *request* from a spare, or else from its nursery.

    Raises WarmUnavailable where there is none that is ready, or it failed; SandboxError for what no
    start could do. In both cases nothing is left of it.
    """
    if Command.of(request.argv) is None:
        raise WarmUnavailable("its command is not one that a nursery knows")
    process = stem.launcher()
    opener = Opener(process)
    try:
        site, tree = launcher.survey(request)
        if why := plans.obstacle(request, site):
            raise WarmUnavailable(why)
        start = _claimed(launcher, request, site, labels, stdio, preload)
        if start is None:
            hurry(process)
            start = _forked(launcher, request, site, labels, stdio, preload)
        start.opener = opener
        return await _run(start, site, tree)
    finally:
        await opener.end()


async def _run(start: ClaimStart | WarmStart, site: Site, tree: CgroupTree) -> LocalHandle:
    try:
        return await start.run(site, tree)
    except SandboxError as error:
        await start.undo()
        why = f"a start from the nursery failed: {error}"
        raise WarmUnavailable(why, failed=True) from error
    except BaseException:
        await start.undo()
        raise


def _claimed(
    launcher: LocalLauncher,
    request: LaunchRequest,
    site: Site,
    labels: Labels,
    stdio: Stdio,
    preload: tuple[str, ...],
) -> ClaimStart | WarmStart | None:
    if plans.spare_obstacle(request, site) or stdio.stdin != subprocess.DEVNULL:
        return None
    found = claim(launcher.runtime(), spare_key_of(request, site, preload))
    if found is None:
        return None
    process = ClaimedProcess(*found, stdio)
    start = ClaimStart(request, process, launcher.runtime(), labels)
    start.tree = launcher.tree(request, site.facts, process.record.tree)
    return start


def _forked(
    launcher: LocalLauncher,
    request: LaunchRequest,
    site: Site,
    labels: Labels,
    stdio: Stdio,
    preload: tuple[str, ...],
) -> WarmStart:
    found = find(launcher.runtime(), key_of(request, site, preload))
    if found is None:
        raise WarmUnavailable("there is no nursery for it (yet)")
    channel, nursery = found
    child = ForkedProcess(channel, stdio)
    labels = replace(labels, nursery=nursery.sandbox_id)
    start = WarmStart(request, child, launcher.runtime(), labels)
    start.nursery = nursery
    return start


class WarmStart(Start):
    """A `Start` whose plan has two parts."""

    nursery: Record
    opener: Opener

    def __init__(
        self, request: LaunchRequest, child: ForkedProcess, runtime: Path, labels: Labels
    ) -> None:
        super().__init__(request, child, runtime, labels)
        self.child = child

    async def run(self, site: Site, tree: CgroupTree) -> LocalHandle:
        site, folder = self.make_record(site)
        self.create_cgroup(tree)
        await self.child.here()
        joined = asyncio.ensure_future(self.child.join(tree.join_files))
        try:
            family = plans.Family(self.nursery.init_pid, self.child.pid)
            outside, inside = self.compile(site, family)
            self.opener.begin(outside)
            fds = await self.opener.opened()
            if not fds:
                self.check(self.opener.report, outside, site)
            fds, self.more_fds = [*fds, *self.more_fds], ()
            await self.child.perform(inside, fds, self.child.say_joined(joined))
        finally:
            await asyncio.wait([joined])  # before anybody else can have the child's pid
        self.check(self.child.report, inside, site)
        return self.hand_over(tree, folder)

    async def undo(self) -> None:
        for fd in self.more_fds:
            os.close(fd)
        await super().undo()

    more_fds: tuple[int, ...] = ()

    def compile(self, site: Site, family: plans.Family) -> tuple[Plan, Plan]:
        """What a launcher, and what the nursery's child shall do."""
        return plans.compile_warm_plan(self.request, site, family)


class ForkedProcess(DistantProcess):
    """The nursery's child from its fork on: PID 1 of a box that is not there yet."""

    def __init__(self, channel: socket.socket, stdio: Stdio) -> None:
        """Ask for the fork."""
        control, theirs = control_pair()
        super().__init__(control, stdio)
        with channel, theirs, contextlib.suppress(BrokenPipeError):  # then `here` says so
            socket.send_fds(channel, [b"fork"], [theirs.fileno()])

    async def here(self) -> None:
        """Wait until it is there; WarmUnavailable if the nursery does not answer soon."""
        try:
            async with asyncio.timeout(_HERE_SECONDS):
                await readable(self._control.fileno())
                self.pid = hear(self._control, HERE)
        except TimeoutError:
            why = f"the nursery has not answered for {_HERE_SECONDS} s"
            raise WarmUnavailable(why, failed=True) from None
        if not self.pid:
            raise WarmUnavailable("the nursery has ended", failed=True)
        # It waits for our word, so its pid is its own until we hold this.
        self.pidfd = os.pidfd_open(self.pid)
        self.init_start = start_time(self.pid)

    async def join(self, files: Sequence[str]) -> None:
        """Move it into its groups: it sees none of their files. That waits for an RCU grace period
        (cgroups v1: some 10 ms), so it begins before anything else."""

        def move() -> None:
            for path in files:
                with open(path, "w") as file:
                    file.write(str(self.pid))

        # Without its process there is nothing to move: it has failed, and its report says why.
        with contextlib.suppress(ProcessLookupError):
            await asyncio.to_thread(move)

    async def say_joined(self, joined: asyncio.Future[None]) -> None:
        """Let it go on once it is in its groups; what it does before needs none of them."""
        await joined
        with contextlib.suppress(OSError):
            self._control.send(plans.JOINED.encode())
