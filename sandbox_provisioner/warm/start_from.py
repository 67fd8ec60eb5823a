"""warm/start_from.py - in the launching process: a start from a spare or a nursery.

::

    nursery   "fork" ─▶ child                        while we make the record and the groups
    child     "here" ─▶ us                           it is PID 1 from the beginning
    child     joins the groups, begins with its part of the plan, and at the same time
    launcher  opens what touches the host ─▶ us ─▶ child      (a launcher as always, `stem.py`)
    child     does the rest
    LocalHandle

    we        connect ─▶ PID 1 of a spare            it is ours; we take its folder over
    launcher  opens the work directory ─▶ us
    we        "go" + plan, mounts ─▶ PID 1           attaches, covers, wakes the kernel
    LocalHandle

Nothing here falls back by itself: `WarmUnavailable` says why there is no such start, and the caller
starts cold.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from sandbox_provisioner import orders
from sandbox_provisioner.contract import Labels, Stdio, Warmth, WarmUnavailable
from sandbox_provisioner.descriptors import afford_a_start, closing
from sandbox_provisioner.errors import LaunchError, SandboxError
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_to_join
from sandbox_provisioner.failures import check, told_by
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.launch import LocalLauncher
from sandbox_provisioner.ledger import Ledger, NotUndone, limit_workdir, undone_if_it_fails
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import WORD_SECONDS, Performer
from sandbox_provisioner.plan import LaunchRequest, NurseryPids, Plan, Site
from sandbox_provisioner.stages import stage
from sandbox_provisioner.stem import stem
from sandbox_provisioner.warm.found import Nursery, Spare, Whose, claim, find, is_any
from sandbox_provisioner.warm.keys import key_of, made_of, spare_key_of
from sandbox_provisioner.warm.why_cold import (
    INSTALLED,
    why_no_nursery,
    why_no_nursery_anywhere,
    why_no_spare,
)

NO_NURSERY = "there is no nursery for it (yet)"
# Who starts what; what is needed for that may take long.
Asked = Callable[[], tuple[LocalLauncher, LaunchRequest]]
Compiled = Callable[[LaunchRequest, Site], Plan]


async def start_warm(
    launcher: LocalLauncher, request: LaunchRequest, labels: Labels, stdio: Stdio, warmth: Warmth
) -> LocalHandle:
    """Start *request*, which is known; see `start_warm_as`."""
    return await start_warm_as(lambda: (launcher, request), labels, stdio, warmth)


async def start_warm_as(asked: Asked, labels: Labels, stdio: Stdio, warmth: Warmth) -> LocalHandle:
    """Start what is *asked* for, which a thread finds out, from a spare, or else from its nursery;
    of those that belong to a process only from the owner's.

    Raises WarmUnavailable where there is none that is ready, or it failed; SandboxError for what no
    start could do. In both cases nothing is left of it, unless it is NotUndone.
    """
    performer, opener = Performer(stdio), Performer()
    begin = _Beginning(asked, labels, stdio, warmth)
    try:
        async with undone_if_it_fails() as undo:
            undo.push_async_callback(begin.undo)
            undo.push_async_callback(opener.end)  # it makes a file in the folder
            undo.push_async_callback(performer.end)
            with ExitStack() as opened:
                made, site, tree, source = await off_loop(begin, performer, opener, opened)
                async with made.told_by_network():
                    if isinstance(source, Spare):
                        return await start_from_spare(made, source, performer, opener, site)
                    return await start_from_nursery(made, source, performer, opener, site, tree)
    except SandboxError as error:
        # A cold start would have the same names as what is left of this one.
        if isinstance(error, NotUndone) or not performer.is_asked:
            raise
        why = f"a start from the nursery failed: {error}"
        raise WarmUnavailable(why, failed=True) from error


@dataclass(slots=True)
class _Beginning:
    """What a start does before anybody waits for another process: all in one go, since each change
    of threads is waited for. What it has *made* stands there as soon as there is a ledger."""

    asked: Asked
    labels: Labels
    stdio: Stdio
    warmth: Warmth
    made: Ledger | None = None

    async def undo(self) -> None:
        """Remove what was made."""
        if self.made:
            await self.made.remove()

    def __call__(
        self, performer: Performer, opener: Performer, opened: ExitStack
    ) -> tuple[Ledger, Site, CgroupTree, Nursery | Spare]:
        """Find out what is asked for, ask for the launcher, look at the host, and ask what serves
        the request. WarmUnavailable, and nobody has looked, where there is no nursery at all: the
        cold start that comes then looks."""
        launcher, request = self.asked()
        if why := why_no_nursery_anywhere(request):
            raise WarmUnavailable(why, never=True)
        afford_a_start()
        made = self.made = launcher.ledger(request, self.labels)
        if not is_any(launcher.runtime(), self.warmth.owners):
            raise WarmUnavailable(NO_NURSERY)
        if launcher.has_installed(request):
            raise WarmUnavailable(INSTALLED)
        with stage("spawn-launcher"):
            opener.ask(stem)
        with stage("survey"):
            site, tree = launcher.look(request, opened)
        if why := why_no_nursery(request, site):
            raise WarmUnavailable(why, never=True)
        with stage("find-source"):
            source = self._source(launcher, request, site)
            performer.ask(source)
        if isinstance(source, Nursery):
            made.labels = replace(made.labels, nursery=source.record.sandbox_id)
            return made, site, tree, source
        made.tree = launcher.tree(request, site.facts, site.workdir, source.record.tree)
        return made, site, made.tree, source

    def _source(
        self, launcher: LocalLauncher, request: LaunchRequest, site: Site
    ) -> Nursery | Spare:
        """A spare, or else a nursery; WarmUnavailable without one."""
        runtime = launcher.runtime()
        what = made_of(request, site, self.warmth.preload)
        keys = [key_of(what, owner) for owner in self.warmth.owners]
        whose = Whose.of(request, site)
        if self.stdio.stdin == subprocess.DEVNULL and not why_no_spare(request, site):
            for key in keys:
                if spare := claim(runtime, spare_key_of(request, site, key), whose):
                    return spare
        for key in keys:
            if nursery := find(runtime, key, whose):
                return nursery
        raise WarmUnavailable(NO_NURSERY)


async def start_from_nursery(
    made: Ledger,
    nursery: Nursery,
    child: Performer,
    opener: Performer,
    site: Site,
    tree: CgroupTree,
) -> LocalHandle:
    """Let *child* of the *nursery* become the kernel, with what *opener* opens for it."""
    await limit_workdir(site)
    site, plan = await off_loop(_prepare, made, child, site, tree)
    return await perform_in_two(made, nursery, child, opener, site, plan)


def _prepare(made: Ledger, child: Performer, site: Site, tree: CgroupTree) -> tuple[Site, Plan]:
    site = made.make_record(site)
    made.make_groups(tree, child.pid)
    return site, begin_inside(made, child, site, orders.compile_fork)


def begin_inside(made: Ledger, child: Performer, site: Site, compiled: Compiled) -> Plan:
    """Let *child* begin, in the groups that are *made*: it finds its plan when it is there, and
    waits in the middle of it for what is opened."""
    assert made.tree
    with stage("compile-plan"):
        plan = compiled(made.request, site)
    with closing(open_to_join(made.tree)) as groups:
        child.begin(plan, (*groups, *site.held.values()), made.request.watched)
    return plan


async def perform_in_two(
    made: Ledger, nursery: Nursery, child: Performer, opener: Performer, site: Site, inside: Plan
) -> LocalHandle:
    """Let *child*, which has its plan already, perform it with what *opener* opens meanwhile."""
    made.report = child.report
    with stage("await-child"):
        await child.here()
    with stage("open"):
        await opener.here()
        family = NurseryPids(nursery.record.init_pid, child.pid)
        outside = await off_loop(_begin_opening, made, opener, site, family)
        fds = await opener.opened()
        if not fds and child.has_failed():  # nothing can be opened for one that has ended
            raise told_by(child, inside, site)
        if not fds:
            raise told_by(opener, outside, site)
    child.give(fds)
    await _performed(child, opener, site, inside)
    return await made.handle(child)


async def start_from_spare(
    made: Ledger, source: Spare, spare: Performer, opener: Performer, site: Site
) -> LocalHandle:
    """Bind *spare*, which runs already in groups of its own, to the start *made*."""
    made.report = spare.report
    await opener.here()
    await limit_workdir(site)
    site, outside, inside = await off_loop(_take_over, made, source, opener, site)
    if made.tree and made.record.cgroup_manager:
        made.tree.own_by(await _hold_of(spare))
    with stage("open"):
        fds = await opener.opened()
        if not fds:
            raise told_by(opener, outside, site)
    with closing(fds):
        spare.begin(inside, (*fds, *site.held.values()), made.request.watched)
    await _performed(spare, opener, site, inside)
    return await made.handle(spare, sealed=True)


def _begin_opening(made: Ledger, opener: Performer, site: Site, family: NurseryPids) -> Plan:
    outside = orders.compile_opening(made.request, site, family)
    opener.begin(outside, site.descriptors)
    return outside


def _take_over(
    made: Ledger, source: Spare, opener: Performer, site: Site
) -> tuple[Site, Plan, Plan]:
    """Let *opener* begin, and meanwhile make the spare's record our own."""
    site = replace(made.joined(site, of_spare=True), first_id=source.record.first_id)
    with stage("compile-plan"):
        outside, inside = orders.compile_claim(made.request, site)
    opener.begin(outside, site.descriptors)
    with stage("take-record"):
        made.take_record(source.folder, source.record, site)
    return site, outside, inside


async def _performed(performer: Performer, opener: Performer, site: Site, plan: Plan) -> None:
    with stage("perform"):
        await performer.performed()
        check(performer, plan, site)
    await opener.end()


async def _hold_of(spare: Performer) -> int:
    """What holds its groups; LaunchError if it has ended."""
    fds = await spare.given(WORD_SECONDS)
    if not fds:
        raise LaunchError(
            attempt="start the sandbox",
            answer="the spare has ended",
            remedy="Kernels start without it.",
            step="claim",
        )
    return fds[0]
