"""ledger.py - in the launching process: what a start has made on this host."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from sandbox_provisioner import audit
from sandbox_provisioner.contract import Labels, WarmUnavailable
from sandbox_provisioner.descriptors import for_clean_up
from sandbox_provisioner.errors import (
    HostError,
    LaunchError,
    SandboxError,
    told_as_host_error,
    told_as_internal_error,
)
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree
from sandbox_provisioner.facilities.caps.plan import enforced
from sandbox_provisioner.facilities.network.tell import REFUSED_AT
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.policy.admission import Running, admit, counts
from sandbox_provisioner.records import (
    OF_NOBODY,
    SERVER,
    Record,
    RecordFolder,
    all_records,
    open_init,
    start_time,
)
from sandbox_provisioner.report import Report
from sandbox_provisioner.stages import stage
from sandbox_provisioner.stand_ins import planned_stand_ins
from sandbox_provisioner.traces import Traces

ATTEMPT = "start the sandbox"
_UNDO = "undo a start that has failed"
_KERNEL = "kernel"
# What serves kernels, or waits to be one.
_UNCOUNTED = OF_NOBODY | {SERVER}
_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def undone_if_it_fails() -> AsyncIterator[AsyncExitStack]:
    """A start: what it pushes on the stack undoes it, the last first, each whatever becomes of the
    others, since the next start may use the same names."""
    undo = AsyncExitStack()
    try:
        ours = told_as_internal_error(ATTEMPT, but=(WarmUnavailable,))
        with told_as_host_error(ATTEMPT), ours:
            yield undo
    except BaseException as failed:
        await _undone(undo.aclose, failed)
        raise


@contextlib.asynccontextmanager
async def closed_if_it_fails(handle: LocalHandle) -> AsyncIterator[None]:
    """What is started for nobody, until somebody can find it."""
    try:
        yield
    except BaseException as failed:
        handle.kill()  # at the end of this process there is no thread any more for the rest
        await _undone(handle.close, failed)
        raise


class NotUndone(HostError):
    """Something of a start that has failed is still there: no other start may use its names."""


async def _undone(undo: Callable[[], Awaitable[None]], failed: BaseException) -> None:
    """*undo* what *failed*; who was cancelled is so, whatever becomes of it."""
    try:
        with told_as_host_error(_UNDO), for_clean_up():
            await undo()
    except Exception as error:
        if not isinstance(failed, Exception):
            _log.warning("%s", one_line(str(error)))
        elif isinstance(error, SandboxError):
            raise NotUndone(attempt=_UNDO, answer=error.answer, remedy=error.steps) from error
        else:
            raise


class Attachment(Protocol):
    """What joins a sandbox to a network outside of it, from the first moment of its start until
    somebody has a handle. *fd* is PID 1's end of a channel to whoever serves that network."""

    @property
    def fd(self) -> int:
        """PID 1's end."""
        ...

    def register(self, folder: RecordFolder, site: Site) -> None:
        """Let it be known of there; it is not waited for."""
        ...

    async def joined(self) -> None:
        """Return when it is served; SandboxError if it cannot be."""
        ...

    def close(self) -> None:
        """Close our copies of what others have by now; more than once is fine."""
        ...


class Ledger:
    """The folder with the record, the groups, the stand-ins that *report* tells of, and its
    *network*, if it has one outside: each stands here as soon as it is made."""

    def __init__(
        self,
        runtime: Path,
        request: LaunchRequest,
        labels: Labels,
        network: Attachment | None = None,
    ) -> None:
        self._runtime = runtime
        self.network = network
        self.request = request
        self.labels = labels
        self.record = Record(sandbox_id=request.sandbox_id)
        self.report = Report()
        self.folder: RecordFolder | None = None
        self.tree: CgroupTree | None = None

    def joined(self, site: Site) -> Site:
        """*site*, where PID 1 is given its end of the channel to who serves its network."""
        if self.network is None:
            return site
        return replace(site, held={**site.held, wire.NETWORK: self.network.fd})

    @contextlib.asynccontextmanager
    async def told_by_network(self) -> AsyncIterator[None]:
        """A start: what PID 1 has found ended is told by who has ended it."""
        try:
            yield
        except LaunchError as error:
            if self.network and error.step == REFUSED_AT:
                await self.network.joined()
            raise

    def make_record(self, site: Site) -> Site:
        """Make the folder with the record; *site* with what the plan has to know of them."""
        site = self.joined(site)
        with stage("make-record"):
            ids = site.facts.privileged
            record = self._new_record(site)
            self.folder, self.record = RecordFolder.create(
                self._runtime, record, ids=ids, admit=self._admit
            )
            site = replace(
                site,
                first_id=self.record.first_id,
                sockets=str(self.folder.sockets),
                exit_file=str(self.folder.exit_file),
            )
            if site.facts.privileged:
                # The directory belongs to the kernel's user; only they (and we) look into it.
                os.chown(self.folder.sockets, site.outside_uid, site.outside_gid)
            self._register(site)
            return site

    def take_record(self, folder: RecordFolder, spare: Record, site: Site) -> None:
        """Make *folder*, which is that of the *spare*, our own."""
        kept = {name: getattr(spare, name) for name in ("first_id", "init_pid", "init_start")}
        new = self._new_record(site)
        self.record = replace(new, **kept, nursery=spare.nursery, group=spare.tree)
        self.folder = folder.turn_into(self.record, self._admit)
        self._register(site)

    def _admit(self, record: Record, runtime: Path) -> None:
        """Ask the policy whether there is room for *record*, beside those of *runtime*."""
        terms = self.request.terms
        if terms and counts(terms) and record.kind not in _UNCOUNTED:
            admit(terms, _running(record), map(_running, _counted(runtime, record)))

    def _register(self, site: Site) -> None:
        if self.network:
            assert self.folder
            self.network.register(self.folder, site)

    def make_groups(self, tree: CgroupTree, pid: int) -> None:
        """Make the groups, and where somebody else moves processes into them, put *pid* there."""
        with stage("create-cgroup"):
            tree.create(self.request.spec.limits, pid)
            self.tree = tree

    async def handle(self, performer: Performer, *, sealed: bool = False) -> LocalHandle:
        """Write down what runs now; from here on the handle owns it.

        Who is cancelled is so before there is a handle: nobody else would close one that he never
        got. So nothing is awaited from here to whoever asked for the start.
        """
        await off_loop(self._write_running, performer)
        if self.network:
            with stage("join-network"):
                await self.network.joined()
            self.network.close()
        assert self.folder and self.tree
        pidfd, control = performer.detach()
        if self.record.kind not in OF_NOBODY:
            audit.started(self.record, self.request.asked, self.request.spec)
        return LocalHandle(
            pidfd=pidfd,
            tree=self.tree,
            folder=self.folder,
            record=self.record,
            control=control,
            pipes=performer.pipes,
            sealed=sealed,
        )

    def _write_running(self, performer: Performer) -> None:
        assert self.folder
        with stage("write-record"):
            running = replace(
                self.record,
                init_pid=performer.init_pid,
                init_start=performer.init_start or start_time(performer.init_pid),
                made=tuple(self.report.made),
            )
            if running != self.record:
                self.record = self.folder.finish(running)

    async def remove(self) -> None:
        """Remove what was made so far: the start has failed, and no process of it is left."""
        if self.network:
            self.network.close()
        record = replace(self.record, made=tuple(self.report.made))
        traces = Traces(record=record, folder=self.folder, tree=self.tree, kill=True)
        await traces.remove()

    def _new_record(self, site: Site) -> Record:
        """What is known before anything runs."""
        facts, labels, request = site.facts, self.labels, self.request
        limits = enforced(request.spec.limits, facts)
        return Record(
            sandbox_id=request.sandbox_id,
            kernel_id=labels.kernel_id,
            name=labels.name,
            notebook=labels.notebook,
            user=labels.user,
            started=time.time(),
            survives_server=request.survive_server,
            cgroup_version=facts.cgroups.version,
            cgroup_manager=facts.cgroups.manager,
            cgroup_bases=dict(facts.cgroups.bases),
            memory_limit_bytes=limits.memory_bytes,
            cpu_cores=limits.cpu_cores,
            workdir=site.workdir.source,
            shown_at=site.workdir.path,
            device=site.workdir.place.device,
            inode=site.workdir.place.inode,
            repositories=site.workdir.covered.repositories,
            confinement=request.spec.confinement.value,
            kind=labels.kind,
            nursery=labels.nursery,
            network=request.spec.network.mode.value,
            planned=planned_stand_ins(site.workdir),
            group=request.group if request.below else "",
            person=request.terms.person.name if request.terms else "",
            first_id=request.first_id,
            uid=facts.caller.uid,
        )


def _counted(runtime: Path, record: Record) -> Iterator[Record]:
    """Those of *runtime* that have been let in by now, but for *record* itself."""
    for _, other in all_records(runtime):
        if other.kind not in _UNCOUNTED and other.sandbox_id != record.sandbox_id:
            if not other.init_pid:  # it starts
                yield other
            elif (pidfd := open_init(other)) is not None:
                os.close(pidfd)
                yield other


def _running(record: Record) -> Running:
    return Running(
        person=record.person or record.user,
        memory_bytes=record.memory_limit_bytes,
        is_kernel=record.kind == _KERNEL,
    )
