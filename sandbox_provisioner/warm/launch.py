"""warm/launch.py - in the launching process: a start from a nursery, in place of a new process.

::

    nursery   "fork" ─▶ child                        while we make the record and the groups
    child     "here" ─▶ us                           it is PID 1 from the beginning
    child     joins the groups, begins with its part of the plan, and at the same time
    launcher  opens what touches the host ─▶ us ─▶ child      (a launcher as always, `spawn.py`)
    child     does the rest
    LocalHandle

Nothing here falls back by itself: `WarmUnavailable` says why there is no start from a nursery, and
the caller starts cold.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox_provisioner import orders
from sandbox_provisioner.contract import Labels, Stdio, WarmUnavailable
from sandbox_provisioner.descriptors import afford_a_start
from sandbox_provisioner.errors import SandboxError
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_to_join
from sandbox_provisioner.failures import without_a_word
from sandbox_provisioner.handle import LastWord, LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher, check
from sandbox_provisioner.ledger import Ledger, NotUndone, undone_if_it_fails
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import Family, LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, start_time
from sandbox_provisioner.spawn import WORD_SECONDS, LauncherProcess, control_pair, hear, stem
from sandbox_provisioner.stages import stage
from sandbox_provisioner.warm.claim import ClaimedProcess
from sandbox_provisioner.warm.found import (
    Command,
    claim,
    dismiss,
    find,
    is_any,
    key_of,
    made_of,
    spare_key_of,
)
from sandbox_provisioner.warm.obstacles import obstacle, obstacle_anywhere, spare_obstacle
from sandbox_provisioner.warm.process import DistantProcess

_HERE_SECONDS = WORD_SECONDS
_NO_NURSERY = "there is no nursery for it (yet)"
_OTHER_COMMAND = "its command is not that of a usual IPython kernel"


def why_cold(request: LaunchRequest, site: Site) -> str:
    """Why no start of *request* can be warm, "" if one can."""
    return _OTHER_COMMAND if Command.of(request.argv) is None else obstacle(request, site)


async def start_warm(
    launcher: LocalLauncher,
    request: LaunchRequest,
    labels: Labels,
    stdio: Stdio,
    preload: tuple[str, ...],
    owner: str = "",
) -> LocalHandle:
    """Start *request* from a spare, or else from its nursery; of those that belong to a process
    only from its *owner*'s.

    Raises WarmUnavailable where there is none that is ready, or it failed; SandboxError for what no
    start could do. In both cases nothing is left of it, unless it is NotUndone.
    """
    if why := _OTHER_COMMAND if Command.of(request.argv) is None else obstacle_anywhere(request):
        raise WarmUnavailable(why, never=True)
    made, opener = Ledger(launcher.runtime(), request, labels), LauncherProcess(stem)
    source = Source(launcher, made, stdio, preload, owner)
    try:
        async with undone_if_it_fails() as undo:
            undo.push_async_callback(made.remove)
            undo.push_async_callback(opener.end)  # it makes a file in the folder
            undo.push_async_callback(source.end)
            with ExitStack() as opened:
                afford_a_start()
                site, tree = await off_loop(source.begin, opener, opened)
                if source.spare:
                    return await start_from_spare(made, source.spare, opener, site)
                assert source.fork
                return await start_from_nursery(made, source.fork, opener, site, tree)
    except SandboxError as error:
        # A cold start would have the same names as what is left of this one.
        if isinstance(error, NotUndone) or not (source.spare or source.fork):
            raise
        why = f"a start from the nursery failed: {error}"
        raise WarmUnavailable(why, failed=True) from error


@dataclass(slots=True)
class Source:
    """Where the start *made* may come from; *spare* or *fork* is what was found."""

    launcher: LocalLauncher
    made: Ledger
    stdio: Stdio
    preload: tuple[str, ...]
    owner: str
    spare: ClaimedProcess | None = None
    fork: ForkedProcess | None = None
    _keys: tuple[str, ...] = ()

    def begin(self, process: LauncherProcess, opened: ExitStack) -> tuple[Site, CgroupTree]:
        """Ask for the launcher, look at the host and find what serves the request: all in one go,
        since each change of threads is waited for. WarmUnavailable, and nobody has looked, where
        there is no nursery at all: the cold start that comes then looks."""
        if not is_any(self.launcher.runtime(), self._owners()):
            raise WarmUnavailable(_NO_NURSERY)
        request = self.made.request
        with stage("spawn-launcher"):
            process.ask()
        with stage("survey"):
            site, tree = self.launcher.look(request, opened)
        if why := why_cold(request, site):
            raise WarmUnavailable(why, never=True)
        with stage("find-source"):
            self.find(site)
        return site, tree

    def find(self, site: Site) -> None:
        """A spare, or else a nursery; WarmUnavailable without one."""
        made = made_of(self.made.request, site, self.preload)
        self._keys = tuple(key_of(made, owner) for owner in self._owners())
        silent = self.stdio.stdin == subprocess.DEVNULL
        if silent and not spare_obstacle(self.made.request, site):
            self._claim(site)
        if self.spare is None:
            self._fork(site)

    async def end(self) -> None:
        """End what was found."""
        for process in (self.spare, self.fork):
            if process:
                await process.end()

    def _owners(self) -> tuple[str, ...]:
        return (self.owner, "") if self.owner else ("",)

    def _claim(self, site: Site) -> None:
        runtime, request = self.launcher.runtime(), self.made.request
        keys = (spare_key_of(request, site, key) for key in self._keys)
        found = next(filter(None, (claim(runtime, key) for key in keys)), None)
        if found:
            self.spare = ClaimedProcess(*found, self.stdio)
            group = self.spare.record.tree
            self.made.tree = self.launcher.tree(request, site.facts, site.workdir, group)

    def _fork(self, site: Site) -> None:
        runtime = self.launcher.runtime()
        for key in self._keys:
            if found := find(runtime, key):
                break
        else:
            raise WarmUnavailable(_NO_NURSERY)
        channel, record = found
        self.made.labels = replace(self.made.labels, nursery=record.sandbox_id)
        self.fork = ForkedProcess(channel, self.stdio, Nursery(runtime, key, record))


async def start_from_nursery(
    made: Ledger, child: ForkedProcess, opener: LauncherProcess, site: Site, tree: CgroupTree
) -> LocalHandle:
    """Let *child* become the kernel, with what *opener* opens for it."""
    site, plan = await off_loop(_prepare, made, child, site, tree)
    return await perform_in_two(made, child, opener, site, plan)


def _prepare(made: Ledger, child: ForkedProcess, site: Site, tree: CgroupTree) -> tuple[Site, Plan]:
    """The record, the groups, and the plan: the child finds it when it is there, and waits in the
    middle of it for what is opened."""
    site = made.make_record(site)
    made.make_groups(tree, child.pid)
    with stage("compile-plan"):
        plan = orders.compile_fork(made.request, site)
    child.begin(plan, open_to_join(tree))
    return site, plan


async def perform_in_two(
    made: Ledger, child: ForkedProcess, opener: LauncherProcess, site: Site, inside: Plan
) -> LocalHandle:
    """Let *child*, which has its plan already, perform it with what *opener* opens meanwhile."""
    made.report = child.report
    with stage("await-child"):
        await child.here()
    with stage("open"):
        family = Family(child.nursery.record.init_pid, child.pid)
        outside = orders.compile_opening(made.request, site, family)
        await opener.begin(outside, site.descriptors)
        fds = await opener.opened()
        if not fds:
            # Nothing can be opened for one that has ended.
            check(child.told(), child, inside, site)
            if child.has_ended():
                raise without_a_word(child.status)
            check(opener.report, child, outside, site)
            raise without_a_word(opener.status)
    child.give(fds)
    with stage("perform"):
        await child.performed()
        check(child.report, child, inside, site)
    await opener.end()
    return await made.handle(child)


async def start_from_spare(
    made: Ledger, spare: ClaimedProcess, opener: LauncherProcess, site: Site
) -> LocalHandle:
    """Bind *spare*, which runs already in groups of its own, to the start *made*."""
    made.report = spare.report
    site = replace(site, first_id=spare.record.first_id)
    with stage("compile-plan"):
        outside, inside = orders.compile_claim(made.request, site)
    await opener.begin(outside, site.descriptors)
    with stage("take-record"):
        await off_loop(made.take_record, spare.folder, spare.record, site)
    if made.tree and made.record.cgroup_manager:
        made.tree.hold_by(await spare.string_fd())
    with stage("open"):
        fds = await opener.opened()
        if not fds:
            check(opener.report, spare, outside, site)
            raise without_a_word(opener.status)
    spare.begin(inside, fds)
    with stage("perform"):
        await spare.performed()
        check(spare.report, spare, inside, site)
    await opener.end()
    return await made.handle(spare, sealed=True)


# By the nursery's id.
_last_words: dict[str, LastWord] = {}


@dataclass(frozen=True, slots=True)
class Nursery:
    """Where a fork is asked for: what was found for *key*."""

    runtime: Path
    key: str
    record: Record

    @property
    def last_word(self) -> LastWord:
        """When it has last answered this process."""
        return _last_words.setdefault(self.record.sandbox_id, LastWord())

    def dismiss(self) -> None:
        """It does not answer: nobody shall ask it any more."""
        _last_words.pop(self.record.sandbox_id, None)
        dismiss(self.runtime, self.key, self.record)


class ForkedProcess(DistantProcess):
    """The nursery's child from its fork on: PID 1 of a box that is not there yet."""

    def __init__(self, channel: socket.socket, stdio: Stdio, nursery: Nursery) -> None:
        """Ask for the fork."""
        self.nursery = nursery
        with channel, contextlib.suppress(ConnectionError):  # then `here` says so
            control, theirs = control_pair()
            with theirs:
                super().__init__(control, stdio)
                socket.send_fds(channel, [wire.message(wire.FORK)], [theirs.fileno()])

    async def here(self) -> None:
        """Wait until it is there; WarmUnavailable if the nursery does not answer soon."""
        if not await self.nursery.last_word.awaited(self._control.fileno(), _HERE_SECONDS):
            await off_loop(self.nursery.dismiss)
            why = f"the nursery has not answered for {_HERE_SECONDS:g} s, and is given up"
            raise WarmUnavailable(why, failed=True)
        self.pid, self.pidfd = hear(self._control, wire.HERE)
        if not self.pid:
            raise WarmUnavailable("the nursery has ended", failed=True)
        # Of one that has ended this may be somebody else's; then it is not used any more.
        self.init_start = start_time(self.pid)

    def give(self, fds: Sequence[int]) -> None:
        """Let it go on with *fds*, which are closed then."""
        try:
            # If it has ended its report says why.
            with contextlib.suppress(ConnectionError):
                socket.send_fds(self._control, [wire.message(wire.OPENED)], fds)
        finally:
            for fd in fds:
                os.close(fd)
