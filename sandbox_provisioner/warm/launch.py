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
from sandbox_provisioner.cgroup import CgroupTree, open_to_join
from sandbox_provisioner.contract import Labels, Stdio, WarmUnavailable
from sandbox_provisioner.descriptors import afford_a_start
from sandbox_provisioner.errors import SandboxError, told_as_host_error, told_as_internal_error
from sandbox_provisioner.handle import LastWord, LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.launch import LocalLauncher, Start, without_a_word
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.plan import Family, LaunchRequest, Plan, Site
from sandbox_provisioner.records import Record, RecordFolder, start_time
from sandbox_provisioner.spawn import (
    WORD_SECONDS,
    LauncherProcess,
    control_pair,
    hear,
    stem,
)
from sandbox_provisioner.warm.claim import ClaimedProcess, ClaimStart
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
from sandbox_provisioner.warm.opener import Opener
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
    start could do. In both cases nothing is left of it.
    """
    if why := _OTHER_COMMAND if Command.of(request.argv) is None else obstacle_anywhere(request):
        raise WarmUnavailable(why, never=True)
    process = LauncherProcess(stem)
    opener, source = Opener(process), Source(launcher, request, labels, stdio, preload, owner)
    try:
        expected = told_as_internal_error("start the sandbox", but=(WarmUnavailable,))
        with told_as_host_error("start the sandbox"), expected, ExitStack() as opened:
            afford_a_start()
            site, tree = await off_loop(source.begin, process, opened)
            assert source.start
            source.start.opener = opener
            handle = await source.start.run(site, tree)
    except BaseException as error:
        await opener.end()  # it makes a file in the folder that goes then
        if source.start is None:
            raise
        await source.start.undo()
        if not isinstance(error, SandboxError):
            raise
        why = f"a start from the nursery failed: {error}"
        raise WarmUnavailable(why, failed=True) from error
    await opener.end()
    return handle


@dataclass(slots=True)
class Source:
    """Where a start may come from; *start* is what was found."""

    launcher: LocalLauncher
    request: LaunchRequest
    labels: Labels
    stdio: Stdio
    preload: tuple[str, ...]
    owner: str
    start: ClaimStart | WarmStart | None = None
    _keys: tuple[str, ...] = ()

    def begin(self, process: LauncherProcess, opened: ExitStack) -> tuple[Site, CgroupTree]:
        """Ask for the launcher, look at the host and find what serves the request: all in one go,
        since each change of threads is waited for. WarmUnavailable, and nobody has looked, where
        there is no nursery at all: the cold start that comes then looks."""
        if not is_any(self.launcher.runtime(), self._owners()):
            raise WarmUnavailable(_NO_NURSERY)
        process.ask()
        site, tree = self.launcher.look(self.request, opened)
        if why := why_cold(self.request, site):
            raise WarmUnavailable(why, never=True)
        self.find(site)
        return site, tree

    def find(self, site: Site) -> None:
        """A spare, or else a nursery; WarmUnavailable without one."""
        made = made_of(self.request, site, self.preload)
        self._keys = tuple(key_of(made, owner) for owner in self._owners())
        if self.stdio.stdin == subprocess.DEVNULL and not spare_obstacle(self.request, site):
            self._claim(site)
        if self.start is None:
            self._fork(site)

    def _owners(self) -> tuple[str, ...]:
        return (self.owner, "") if self.owner else ("",)

    def _claim(self, site: Site) -> None:
        runtime = self.launcher.runtime()
        keys = (spare_key_of(self.request, site, key) for key in self._keys)
        found = next(filter(None, (claim(runtime, key) for key in keys)), None)
        if found:
            process = ClaimedProcess(*found, self.stdio)
            self.start = ClaimStart(self.request, process, runtime, self.labels)
            group = process.record.tree
            tree = self.launcher.tree(self.request, site.facts, site.workdir, group)
            self.start.tree = tree

    def _fork(self, site: Site) -> None:
        runtime = self.launcher.runtime()
        for key in self._keys:
            if found := find(runtime, key):
                break
        else:
            raise WarmUnavailable(_NO_NURSERY)
        channel, record = found
        labels = replace(self.labels, nursery=record.sandbox_id)
        nursery = Nursery(runtime, key, record)
        self.start = WarmStart(
            self.request, ForkedProcess(channel, self.stdio, nursery), runtime, labels
        )


class WarmStart(Start):
    """A `Start` whose plan has two parts."""

    opener: Opener

    def __init__(
        self, request: LaunchRequest, child: ForkedProcess, runtime: Path, labels: Labels
    ) -> None:
        super().__init__(request, child, runtime, labels)
        self.child = child

    async def run(self, site: Site, tree: CgroupTree) -> LocalHandle:
        site, folder, inside = await off_loop(self.prepare, site, tree)
        await self.child.here()
        family = Family(self.child.nursery.record.init_pid, self.child.pid)
        outside = orders.compile_opening(self.request, site, family)
        await self.opener.begin(outside, site.descriptors)
        fds = await self.opener.opened()
        if not fds:
            # Nothing can be opened for one that has ended.
            self.check(self.child.told(), inside, site)
            if self.child.has_ended():
                raise without_a_word(self.child.status)
            self.check(self.opener.report, outside, site)
        self.child.give(fds)
        await self.child.performed()
        self.check(self.child.report, inside, site)
        return await off_loop(self.hand_over, tree, folder)

    def prepare(self, site: Site, tree: CgroupTree) -> tuple[Site, RecordFolder, Plan]:
        """The record, the groups, and the plan: the child finds it when it is there, and waits in
        the middle of it for what is opened."""
        site, folder = self.make_record(site)
        self.create_cgroup(tree)
        inside = self.compile(site)
        self.child.begin(inside, open_to_join(tree), self.held())
        return site, folder, inside

    def held(self) -> tuple[int, ...]:
        """Descriptors of ours that the child shall have as well."""
        return ()

    def compile(self, site: Site) -> Plan:
        """What the nursery's child shall do."""
        return orders.compile_fork(self.request, site)


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
        control, theirs = control_pair()
        super().__init__(control, stdio)
        self.nursery = nursery
        with channel, theirs, contextlib.suppress(ConnectionError):  # then `here` says so
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
