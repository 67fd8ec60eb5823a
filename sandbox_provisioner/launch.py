"""launch.py - in the launching process: `LocalLauncher` starts sandboxes on this machine.

::

    ask for a launcher      stem.py: it is forked while we go on
    survey                  host.py, facilities/*/facts: what is so here, read only
    make the record         ledger.py: the folder, a range of ids
    compile the plan        orders/, from what every facility plans
    create the cgroups      ledger.py, by facilities/caps/cgroup/
    perform                 performer.py: launcher/, in the launcher
    LocalHandle             or an error, and everything made so far is undone: ledger.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.card_life import CardAttachment
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.descriptors import afford_a_start
from sandbox_provisioner.errors import (
    HostError,
    LaunchError,
    SpecError,
)
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_existing
from sandbox_provisioner.facilities.environment.facts.kernel_files import (
    Given,
    KernelFiles,
    find_kernel_files,
)
from sandbox_provisioner.facilities.environment.plan.variables import handed_on
from sandbox_provisioner.facilities.ids.facts import FIRST_ID, IdRange, find_id_range
from sandbox_provisioner.facilities.network.facts.configured import Files
from sandbox_provisioner.facilities.network.facts.name_servers import name_servers
from sandbox_provisioner.facilities.network.facts.packages import (
    Packages,
    expanded_rules,
    find_packages,
)
from sandbox_provisioner.facilities.network.facts.resolver import find_resolver
from sandbox_provisioner.facilities.network.wish.addresses import Address
from sandbox_provisioner.facilities.network.wish.rules import PACKAGES
from sandbox_provisioner.facilities.workdir.facts.run_by_host import look_there_last, notice
from sandbox_provisioner.failures import check
from sandbox_provisioner.gateway_life import GatewayAttachment, gateway_life
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts, count_tasks
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.ledger import Attachment, Ledger, undone_if_it_fails
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.network_trial import catch_obstacle
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.orders import compile_for
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.places import disk_of
from sandbox_provisioner.plan import LaunchRequest, Plan, Site
from sandbox_provisioner.records import (
    Record,
    RecordFolder,
    cgroup_facts,
    open_init,
    runtime_directory,
)
from sandbox_provisioner.spec import (
    NO_WORKDIR,
    Confinement,
    Network,
    NetworkWish,
    SandboxSpec,
    UserIds,
    relative,
    volumes_for,
)
from sandbox_provisioner.stages import stage
from sandbox_provisioner.stem import stem
from sandbox_provisioner.sweeping import sweep

_MOST_TOLD = 1000
Warn = Callable[[str], None]
_Found = TypeVar("_Found")


class SeenBy(Protocol):
    """Calls a function with somebody's rights over files, and returns what it does."""

    def __call__(self, look: Callable[..., _Found], *arguments: object) -> _Found:
        """Whatever *look* raises is raised."""
        ...


def _seen_by_ourselves(look: Callable[..., _Found], *arguments: object) -> _Found:
    return look(*arguments)


class LocalLauncher:
    """Starts sandboxes on this machine, as this user. One can start any number, one after another
    or at once."""

    def __init__(
        self,
        *,
        runtime_dir: str = "",
        warn: Warn = lambda _: None,
        told: set[str] | None = None,
        caller: Callable[[], Caller] = Caller.this_process,
        seen_by: SeenBy = _seen_by_ourselves,
    ) -> None:
        """*told* is what `tell_once` has said already, for launchers that share it. *caller* tells,
        at each start, who asks for it. *seen_by* calls what looks at paths that this one names,
        with their rights."""
        self._caller = caller
        self.seen_by = seen_by
        self._runtime_dir = runtime_dir
        self._warn = warn
        self._told: set[str] = set() if told is None else told

    def warn(self, text: str) -> None:
        """Tell whoever starts sandboxes; what *text* names may have been named by a kernel."""
        self._warn(one_line(text))

    def tell_once(self, text: str) -> None:
        """The same for what is looked for at every start."""
        if text not in self._told:
            if len(self._told) >= _MOST_TOLD:  # kernels can make any number of names
                self._told.clear()
            self._told.add(text)
            self.warn(text)

    def runtime(self) -> Path:
        """Where the records of our sandboxes are."""
        return runtime_directory(self._runtime_dir)

    def meeting_place(self, sandbox_id: str, confinement: Confinement) -> SocketFolder:
        """Where the kernel of *sandbox_id*, which is not there yet, will be met."""
        folder = RecordFolder(self.runtime() / sandbox_id)
        return SocketFolder(folder.sockets, *confiner(confinement).places(str(folder.path)))

    def sweep(self) -> list[str]:
        """Remove what killed servers left; the ids of what is gone."""
        try:
            return sweep(self.runtime(), self.warn)
        except OSError as error:
            self.warn(f"What killed servers left cannot be removed now: {error}")
            return []

    def obstacle(self, spec: SandboxSpec) -> HostError | None:
        """Why this process has not the rights for a box such as *spec*, None if it has them."""
        facts = HostFacts.probe((), self._caller())
        try:
            cgroup.open_tree(facts.cgroups, "", spec.limits, spec.may_lack, lambda _: None, "")
        except HostError as error:
            return error
        return confiner(spec.confinement).obstacle(facts)

    def survey(self, request: LaunchRequest) -> tuple[Site, CgroupTree]:
        """Find out all that `compile_for` needs; starts no sandbox (`network_trial.py` starts a
        launcher), and changes nothing but the order of our own sys.path, so that nothing in the
        work directory comes before a module of ours. The caller closes what has been opened:
        ``site.opened``."""
        with ExitStack() as opened:
            site, tree = self.look(request, opened)
            return replace(site, opened=opened.pop_all()), tree

    def survey_closed(self, request: LaunchRequest) -> tuple[Site, CgroupTree]:
        """The same for a box that is given nothing of what was opened."""
        site, tree = self.survey(request)
        site.opened.close()
        return replace(site, held={}), tree

    def look(self, request: LaunchRequest, opened: ExitStack) -> tuple[Site, CgroupTree]:
        """`survey`, where *opened* closes what it has opened."""
        caller, runtime = self._caller(), self.runtime()
        facts = HostFacts.probe(request.server_places, caller)
        spec = request.spec
        holder = confiner(spec.confinement)
        if obstacle := holder.obstacle(facts):
            raise obstacle
        workdir, volumes = self.seen_by(_given, spec, facts, opened)
        tree = self.tree(request, facts, workdir, request.group)
        for mount in (*workdir.unmapped, *(m for facts in volumes for m in facts.unmapped)):
            self.tell_once(
                f"{mount.path} can only be read: it is a mount of {mount.filesystem}, and Linux "
                "cannot map the ids of all mounts below what a kernel of a root server is given."
            )
        above = cgroup.narrowest_bound(facts.cgroups)
        if less := cgroup.allows_less(spec.limits.memory_bytes, above):
            self.tell_once(less)
        look_there_last(workdir.source, sys.path)
        counts_alone = holder.has_own_processes and not _counts_everywhere(facts)
        files = self.seen_by(self._files, request, facts, caller, workdir, volumes)
        packages = self.seen_by(self._packages, request, facts, files, workdir, volumes)
        network = spec.network.mode
        site = Site(
            facts=facts,
            workdir=workdir,
            files=files,
            volumes=volumes,
            join_files=tree.join_files,
            id_range=_id_range(spec, facts),
            user_tasks=0 if counts_alone else count_tasks(facts.caller.uid),
            memory_group=tree.memory_group,
            memory_above=above,
            catch_obstacle=catch_obstacle(facts) if network is Network.GATEWAY else "",
            resolver=find_resolver() if network is Network.HOST else (),
            name_servers=_name_servers(spec.network),
            server_environment=caller.environment,
            network_allow=expanded_rules(spec.network.allow, packages),
            packages=packages,
        )
        _keep_apart(runtime, site)
        return site, tree

    def _files(
        self,
        request: LaunchRequest,
        facts: HostFacts,
        caller: Caller,
        workdir: WorkdirFacts,
        volumes: tuple[VolumeFacts, ...],
    ) -> KernelFiles:
        """What the kernel's program needs, with a warning for what it does not get."""
        writable = (v.source for v in volumes if not v.volume.readonly)
        given = Given(writable=(workdir.source, *writable), owner_uid=workdir.place.owner_uid)
        environment = handed_on(request.environment, caller.environment, request.env_keep)
        if base := request.environment.get("PYTHONUSERBASE"):
            environment["PYTHONUSERBASE"] = base
        files = find_kernel_files(request.argv, environment, facts, request.extra_files, given)
        for path in files.too_broad:
            self.tell_once(
                f"{path} is on the kernel's path, but would show it more than that: left out. "
                "Name what it needs of it in the option volumes."
            )
        for path in files.doubtful:
            self.tell_once(
                f"{path} is on the kernel's path only since a file says so that a kernel may "
                f"write: left out. If it shall be there: {volumes_for([path])}."
            )
        ours = caller.environment.get("PATH", "").split(os.pathsep)
        if added := [path for path in files.off_path if path not in ours]:
            self.tell_once(
                f"{', '.join(added)} is on the PATH that this kernel was given, and not in its "
                f"box. If it shall be there: {volumes_for(added)}."
            )
        if known := notice(workdir.source, facts.server):
            self.tell_once(known)
        return files

    def _packages(
        self,
        request: LaunchRequest,
        facts: HostFacts,
        files: KernelFiles,
        workdir: WorkdirFacts,
        volumes: tuple[VolumeFacts, ...],
    ) -> Packages:
        """What the rule "packages" means here, if it is asked for."""
        if PACKAGES not in request.spec.network.allow:
            return Packages()
        covers = request.spec.covers
        writable = (v.source for v in volumes if not v.volume.readonly)
        found = find_packages(
            files.program,
            request.environment,
            Files(
                uid=facts.caller.uid,
                home=facts.caller.home,
                guarded=covers.guarded,
                writable=tuple(filter(None, (workdir.source, *writable))),
                covered=workdir.out_of_reach,
            ),
        )
        for text in found.notices:
            self.tell_once(text)
        return found

    def tree(
        self, request: LaunchRequest, facts: HostFacts, workdir: WorkdirFacts, name: str
    ) -> CgroupTree:
        """The groups called *name*, with the caps of *request*; nothing is made yet."""
        spec = request.spec
        limits = (spec.limits, *request.sums.values())
        is_needed = any(cap.needs_disk for each in limits for cap in each.asked)
        disk = disk_of(workdir.place.device) if is_needed else ""
        return cgroup.open_tree(
            facts.cgroups, name, spec.limits, spec.may_lack, self.tell_once, disk, request.sums
        )

    def explain(self, request: LaunchRequest) -> Plan:
        """The plan that `start` would perform; nothing is run."""
        site, _ = self.survey(request)
        with site.opened:
            sockets = str(RecordFolder(self.runtime() / request.sandbox_id).sockets)
            return compile_for(request, replace(site, first_id=FIRST_ID, sockets=sockets))

    def find(self, card: Mapping[str, Any]) -> LocalHandle:
        """The sandbox that a handle's card tells of; LaunchError if it has ended."""
        folder = RecordFolder(Path(card.get("runtime_dir") or self.runtime()) / card["id"])
        try:
            record: Record | None = folder.read()
        except (OSError, ValueError):
            record = None
        named = card.get("init_pid"), card.get("init_start")
        same = record and (record.init_pid, record.init_start) == named
        pidfd = open_init(record) if record and same else None
        if record is None or pidfd is None:
            raise LaunchError(
                attempt=f"find the sandbox {card['id']}",
                answer=f"it has ended; process {named[0]} is gone or somebody else's",
                remedy="Start a new kernel.",
                step="load-provisioner-info",
            )
        tree = open_existing(cgroup_facts(record), record.tree)
        return LocalHandle(pidfd=pidfd, tree=tree, folder=folder, record=record, control=-1)

    def adopt(self, folder: Path) -> LocalHandle | None:
        """The sandbox of *folder*, which outlived who launched it, as our own; None if it is
        somebody's. LaunchError if it has ended; what `records.UNREADABLE` has."""
        record = RecordFolder(folder).read()
        named = {"init_pid": record.init_pid, "init_start": record.init_start}
        handle = self.find({"id": folder.name, "runtime_dir": str(folder.parent), **named})
        if handle.folder.own_if_orphan():
            return handle
        handle.let_go()
        return None

    def attachment(self, request: LaunchRequest) -> Attachment | None:
        """What joins the kernel of *request*, whose start begins, to its network."""
        if request.spec.network.mode is Network.CARD:
            return CardAttachment(request, self.tell_once)
        if request.spec.network.mode is not Network.GATEWAY:
            return None
        life = gateway_life(self.runtime(), perform_whole, self.warn)
        return GatewayAttachment(life, request)

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> LocalHandle:
        """Start *request* and return when its program has been executed.

        Raises SpecError, HostError or LaunchError; then everything made so far is undone.
        """
        return await start_cold(self, request, labels or Labels(), stdio or Stdio())


async def start_cold(
    launcher: LocalLauncher, request: LaunchRequest, labels: Labels, stdio: Stdio
) -> LocalHandle:
    """Start *request* by a launcher of its own; see `LocalLauncher.start`."""
    made = Ledger(launcher.runtime(), request, labels, launcher.attachment(request))
    performer = Performer(stdio)
    async with undone_if_it_fails() as undo, made.told_by_network():
        undo.push_async_callback(made.remove)
        undo.push_async_callback(performer.end)
        with ExitStack() as opened:
            with stage("spawn-launcher"):
                afford_a_start()
                await off_loop(performer.ask, stem)
            with stage("survey"):
                site, tree = await off_loop(launcher.look, request, opened)
            site, plan = await off_loop(_prepare, launcher, made, site)
            handle = await perform_whole(made, performer, site, plan, tree)
            handle.unseen = site.files.unseen
            return handle


def _given(
    spec: SandboxSpec, facts: HostFacts, opened: ExitStack
) -> tuple[WorkdirFacts, tuple[VolumeFacts, ...]]:
    workdir = _workdir(spec, facts, opened)
    return workdir, tuple(VolumeFacts.probe(volume, facts, opened) for volume in spec.volumes)


def _prepare(launcher: LocalLauncher, made: Ledger, site: Site) -> tuple[Site, Plan]:
    site = made.make_record(site)
    with stage("compile-plan"):
        return site, launcher.seen_by(compile_for, made.request, site)


async def perform_whole(
    made: Ledger, performer: Performer, site: Site, plan: Plan, tree: CgroupTree
) -> LocalHandle:
    """Let *performer* perform *plan*, which is a whole one, in the groups of *tree*."""
    made.report = performer.report
    with stage("await-launcher"):
        await performer.here()
    await off_loop(made.make_groups, tree, performer.pid)
    with stage("perform"):
        performer.end_signal = made.record.end_signal
        fds = *site.descriptors, *site.held.values()
        await off_loop(performer.begin, plan, fds, made.request.watched)
        await performer.performed()
        check(performer, plan, site)
    return await made.handle(performer)


def _workdir(spec: SandboxSpec, facts: HostFacts, opened: ExitStack) -> WorkdirFacts:
    if spec.workdir == NO_WORKDIR:
        return WorkdirFacts.nowhere()
    return WorkdirFacts.probe(spec.workdir, facts, spec.covers, opened)


def _keep_apart(runtime: Path, site: Site) -> None:
    """SpecError where a kernel would be given the sockets and records of others, or its own."""
    real, hidden = os.path.realpath(runtime), site.workdir.covered.directories
    for _, place in site.places:
        inside, around = relative(real, place.source), relative(place.source, real)
        if inside is not None and place is site.workdir.place:
            inside = None if any(relative(inside, path) is not None for path in hidden) else inside
        if inside is not None or around is not None:
            where = f"it lies in {place.path}" if around is None else f"{place.path} lies in it"
            raise SpecError(
                attempt=f"keep the sockets of kernels in {runtime}",
                answer=f"{where}, which this kernel is given",
                remedy="Set runtime_dir to a directory of its own, such as one in /run/user/UID.",
            )


def _counts_everywhere(facts: HostFacts) -> bool:
    """Whether RLIMIT_NPROC is needed, and counts more than the box (`facilities/caps/plan`)."""
    return (
        "pids" in facts.cgroups.missing and facts.machine.kernel < (5, 14) and not facts.privileged
    )


def _id_range(spec: SandboxSpec, facts: HostFacts) -> IdRange | None:
    wished = spec.user_ids is UserIds.RANGE and not facts.privileged
    return find_id_range(facts.caller.uid) if wished else None


def _name_servers(wish: NetworkWish) -> tuple[Address, ...]:
    """Whom a box that has a card asks for names."""
    return name_servers(ipv6=wish.ipv6) if wish.mode is Network.CARD else ()
