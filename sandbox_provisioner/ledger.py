"""ledger.py - in the launching process: what a start has made on this host."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

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
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, join_too
from sandbox_provisioner.facilities.caps.plan import enforced
from sandbox_provisioner.facilities.ids.facts import FOREIGN_ID
from sandbox_provisioner.facilities.network.tell import REFUSED_AT
from sandbox_provisioner.facilities.storage import quotas
from sandbox_provisioner.facilities.storage.facts import Storage, WorkdirQuota
from sandbox_provisioner.facilities.storage.folders import BoxFolder, make_folder
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers import disks, kept
from sandbox_provisioner.layers.disks import Disk, Mounts
from sandbox_provisioner.layers.folders import ReviewFolder, about, take_folder
from sandbox_provisioner.layers.kept import Holder, KeptFolder, folder_of, layer_name, take_layer
from sandbox_provisioner.layers.place import layer_directory, layer_path
from sandbox_provisioner.off_loop import Gate, apart, off_loop
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.plan import LaunchRequest, Site
from sandbox_provisioner.policy.admission import Running, admit, counts
from sandbox_provisioner.records import (
    OF_NOBODY,
    SPARE,
    Record,
    RecordFolder,
    all_records,
    folders_in,
    open_init,
    start_time,
)
from sandbox_provisioner.report import Report
from sandbox_provisioner.spec import Layer
from sandbox_provisioner.stages import stage
from sandbox_provisioner.stand_ins import planned_stand_ins
from sandbox_provisioner.traces import Traces

ATTEMPT = "start the sandbox"
_UNDO = "undo a start that has failed"
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


def _of_claim(site: Site) -> Site:
    """Without what is told of the root that was looked at for it: a spare has that of its own."""
    held = {name: fd for name, fd in site.held.items() if name != wire.IMAGE_SERVER}
    return replace(site, held=held)


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
        layer_dir: str = "",
    ) -> None:
        self._runtime = runtime
        self._layer_dir = layer_dir
        self._review: ReviewFolder | None = None
        self._layer: KeptFolder | None = None
        self._opened = ExitStack()
        self.network = network
        self.request = request
        self.labels = labels
        self.record = Record(sandbox_id=request.sandbox_id)
        self.report = Report()
        self._began, self._is_spare = time.monotonic(), False
        self.folder: RecordFolder | None = None
        self.tree: CgroupTree | None = None
        self._image_server = -1
        self._mounts: Mounts | BoxFolder | None = None
        self._disk: Disk | None = None

    def joined(self, site: Site, *, of_spare: bool = False) -> Site:
        """*site*, where PID 1 is given its end of the channel to who serves its network, and what
        is written in the work directory a place on the disk; and what it installs, but *of_spare*,
        which has one."""
        site = self._laid_aside(site)
        site = _of_claim(site) if of_spare else self._with_layer(site)
        if self.network is None:
            return site
        return replace(site, held={**site.held, wire.NETWORK: self.network.fd})

    def _laid_aside(self, site: Site) -> Site:
        """PID 1 holds the lock of that place, for as long as it lives."""
        spec, labels = self.request.spec, self.labels
        if not spec.is_reviewed or not site.workdir.source:
            return site
        named = {"kernel_id": labels.kernel_id, "name": labels.name, "notebook": labels.notebook}
        uid = site.facts.caller.uid
        mine = about(self.request.sandbox_id, site.workdir, spec.covers, uid, **named)
        base, privileged = layer_directory(self._layer_dir), site.facts.privileged
        self._review = take_folder(base, mine, site.workdir.place, maps_ids=privileged)
        place = self._review.open(site.facts.asker, self._opened)
        held = {**site.held, wire.REVIEW: self._review.lock_fd}
        return replace(site, held=held, review=place)

    def _with_layer(self, site: Site) -> Site:
        """The same for what is kept of what it installs; in an image that is one kernel's there is
        room for no other one."""
        spec, labels, sandbox_id = self.request.spec, self.labels, self.request.sandbox_id
        in_image = site.layer_storage is not None
        if not self._keeps_layer or (in_image and spec.layer is Layer.KERNEL):
            return site
        base, uid, root = layer_directory(self._layer_dir), site.facts.caller.uid, site.root
        folder = folder_of(base, spec.layer, sandbox_id, uid, root.wish, root.identity)
        known = (labels.kernel_id or sandbox_id)[:8]
        layer = layer_name(root.wish, root.identity)
        holder = Holder(
            kernel=known, name=labels.name, since=time.time(), root=root.wish, layer=layer,
            asked=spec.rootfs,
        )  # fmt: skip
        maps_ids = site.facts.privileged
        self._layer = take_layer(
            base, folder, holder, maps_ids=maps_ids, in_image=in_image, is_owned=self._owns_layer
        )
        site = replace(site, held={**site.held, wire.LAYER: self._layer.lock_fd})
        if in_image:
            return site
        return replace(site, layer=self._layer.open(site.facts.asker, self._opened))

    @property
    def _keeps_layer(self) -> bool:
        """Whether it has a place for what is kept; a spare, for the kernel that it becomes."""
        return self.request.spec.keeps_layer and self.labels.kind not in OF_NOBODY - {SPARE}

    @property
    def _owns_layer(self) -> bool:
        """Whether this process may start it again."""
        return self.request.spec.layer is Layer.KERNEL and self.labels.kind != SPARE

    def _layer_in_image(self, site: Site) -> str:
        """Over which root it keeps that in an image, "" if it does not."""
        owns = site.layer_storage is not None and self._keeps_layer and self._owns_layer
        return layer_name(site.root.wish, site.root.identity) if owns else ""

    def _let_go_of_folders(self) -> None:
        """Close our copies of what others have by now, or nobody will; more than once is fine."""
        self._opened.close()
        if self._review:
            self._review.forget()
        if self._layer:
            self._layer.forget()

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
        self._image_server = site.root.server_fd
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
        return self._with_image(site)

    def _with_image(self, site: Site) -> Site:
        """*site* with the mounts of an image or folder for what the kernel writes, where its limit
        is held by one, or it is kept in an image: where both is so, in the same."""
        keeps = site.layer_storage is not None and self._keeps_layer
        limited = site.storage is not None and site.storage.is_image
        storage = site.layer_storage if keeps else site.storage
        with stage("make-image"):
            if site.storage and site.storage.is_folder:
                return self._with_box_folder(site, site.storage)
            if storage is None or not (keeps or limited):
                return site
            name = self._layer.disk if self._layer and keeps else self.request.sandbox_id
            self._disk = Disk(
                name,
                storage,
                layer_path(self._layer_dir),
                keeps=keeps,
                lasts=keeps and self._layer is not None,
                owned_over=self._layer_in_image(site),
            )
            self._mounts = mounts = self._disk.mount()
            layer = mounts.layer if keeps else -1
            return replace(site, layer_disk=layer, disk=mounts.scratch if limited else -1)

    def _with_box_folder(self, site: Site, storage: Storage) -> Site:
        """The same with a folder, whose lock PID 1 holds for as long as it lives."""
        layers = layer_path(self._layer_dir)
        self._mounts = made = make_folder(
            self.request.sandbox_id, storage, FOREIGN_ID, layers=layers
        )
        return replace(site, disk=made.mount, held={**site.held, wire.DISK: made.lock})

    def _let_go_of_image(self) -> None:
        """The box has its mounts now, or nobody: then the image or folder can be removed."""
        if self._mounts:
            self._mounts.forget()
            self._mounts = None

    def _forget_layer(self) -> None:
        """What a kernel that has never started would have kept is kept for nobody."""
        is_new = (self._disk and self._disk.is_new) or (self._layer and self._layer.is_new)
        if self._owns_layer and (is_new or self._is_spare):
            disks.end(self.request.sandbox_id)
            kept.end(layer_path(self._layer_dir), self.request.sandbox_id)

    def take_record(self, folder: RecordFolder, spare: Record, site: Site) -> None:
        """Make *folder*, which is that of the *spare*, our own."""
        same = {name: getattr(spare, name) for name in ("first_id", "init_pid", "init_start")}
        new = self._new_record(site)
        self.record = replace(new, **same, nursery=spare.nursery, group=spare.tree)
        self._is_spare = True
        self.folder = folder.turn_into(self.record, self._admit)
        names = spare.sandbox_id, self.record.sandbox_id
        if self._owns_layer and not disks.take_over(*names, self.record.layer):
            base = layer_path(self._layer_dir)
            kept.take_over(base, *names)
        self._register(site)

    def _admit(self, record: Record, runtime: Path) -> None:
        """Ask the policy whether there is room for *record*, beside those of *runtime*."""
        terms = self.request.terms
        if terms and counts(terms) and record.kind not in OF_NOBODY:
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
        self._let_go_of_image()
        await off_loop(self._write_running, performer)
        if self.network:
            with stage("join-network"):
                await self.network.joined()
            self.network.close()
        self._let_go_of_folders()
        assert self.folder and self.tree
        if self._image_server >= 0:
            # It waits for Linux to move it, some 10 ms, and nobody for that.
            apart(partial(join_too, self.tree, os.dup(self._image_server)))
        pidfd, control = performer.detach()
        if self.record.kind not in OF_NOBODY:
            how = "spare" if self._is_spare else "nursery" if self.record.nursery else "cold"
            took = time.monotonic() - self._began
            audit.started(self.record, self.request.asked, self.request.spec, seconds=took, how=how)
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
                made=self._made(),
            )
            if running != self.record:
                self.record = self.folder.finish(running)

    def _made(self) -> tuple[tuple[str, str], ...]:
        """Stand-ins; where what is written is laid aside, these are, too."""
        return () if self._review else tuple(self.report.made)

    def _review_path(self) -> str:
        return str(self._review.path) if self._review else ""

    async def remove(self) -> None:
        """Remove what was made so far: the start has failed, and no process of it is left."""
        if self.network:
            self.network.close()
        self._let_go_of_folders()
        self._let_go_of_image()
        await off_loop(self._forget_layer)
        record = replace(self.record, made=self._made(), review=self._review_path())
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
            planned=() if self._review else planned_stand_ins(site.workdir),
            review=self._review_path(),
            group=request.group if request.below else "",
            person=request.terms.person.name if request.terms else "",
            first_id=request.first_id,
            uid=facts.caller.uid,
            sum_bytes=_sum_bytes(request),
            storage=site.storage.backend.value if site.storage else "",
            box=request.box,
            layer=self._layer_in_image(site),
        )


# Directories whose files are being counted, by device and inode.
_counting: WeakValueDictionary[tuple[int, int], Gate] = WeakValueDictionary()


async def limit_workdir(site: Site) -> None:
    """Let the work directory hold no more than it may; it stays so when the sandbox has ended. To
    count many files takes none of the threads in which all others start, and is done once: who
    starts in the same directory waits for it."""
    place, quota, since = site.workdir.place, site.workdir.quota, time.monotonic()
    if quota is None:
        return
    gate = _counting.setdefault((place.device, place.inode), Gate(1))
    with stage("limit-workdir"):
        async with gate.passed():
            await _held_apart(os.dup(place.fd), quota, since)


async def _held_apart(fd: int, quota: WorkdirQuota, since: float) -> None:
    failed: list[BaseException] = []

    def hold() -> None:
        try:
            quotas.hold(fd, quota, since=since)
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(fd)  # who is cancelled waits no more, and has closed its own

    await apart(hold)
    for error in failed:
        raise error


def _counted(runtime: Path, record: Record) -> Iterator[Record]:
    """Those of *runtime* that have been let in by now, but for *record* itself. One whose record
    cannot be read is one all the same."""
    found = {folder.path: other for folder, other in all_records(runtime)}
    for path in folders_in(runtime):
        if path not in found and (path / "record.json").exists():
            yield Record(sandbox_id=path.name, memory_limit_bytes=0)
    for other in found.values():
        if other.kind not in OF_NOBODY and other.sandbox_id != record.sandbox_id:
            if not other.init_pid:  # it starts
                yield other
            elif (pidfd := open_init(other)) is not None:
                os.close(pidfd)
                yield other


def _running(record: Record) -> Running:
    return Running(
        person=record.person or record.user,
        memory_bytes=record.memory_limit_bytes,
        sum_bytes=record.sum_bytes,
        kind=record.kind,
    )


def _sum_bytes(request: LaunchRequest) -> int | None:
    """The least that the groups of a person's leave to all in them."""
    limits = [sums.memory_bytes for sums in request.sums.values()]
    return min((limit for limit in limits if limit), default=None)
