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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sandbox_provisioner.caller import Caller
from sandbox_provisioner.card_life import CardAttachment
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.descriptors import afford_a_start, at_its_end
from sandbox_provisioner.errors import (
    HostError,
    LaunchError,
    SpecError,
)
from sandbox_provisioner.facilities.caps import cgroup
from sandbox_provisioner.facilities.caps.cgroup import CgroupTree, open_existing
from sandbox_provisioner.facilities.devices.facts import Devices, find_devices
from sandbox_provisioner.facilities.environment.facts.image_files import find_image_files
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
from sandbox_provisioner.facilities.root.facts import RootFacts, check_apart
from sandbox_provisioner.facilities.storage import folders, images
from sandbox_provisioner.facilities.storage import tell as storage
from sandbox_provisioner.facilities.storage.facts import (
    STORAGE,
    Storage,
    check_workdir_rights,
    find_storage,
    find_workdir_quota,
    image_obstacle,
)
from sandbox_provisioner.facilities.storage.wish import KEEPING
from sandbox_provisioner.facilities.workdir.facts.run_by_host import look_there_last, notice
from sandbox_provisioner.failures import check
from sandbox_provisioner.gateway_life import GatewayAttachment, gateway_life
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import (
    Ground,
    HostFacts,
    VolumeFacts,
    WorkdirFacts,
    count_tasks,
    is_privileged,
    kernel_release,
)
from sandbox_provisioner.images.store import find_image
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.layers import disks
from sandbox_provisioner.layers.disks import add_ready, storage_for, usual_size
from sandbox_provisioner.layers.folders import REVIEW, REVIEW_DAYS, collect
from sandbox_provisioner.layers.kept import (
    KERNEL,
    USER,
    KeptFolder,
    collect_layers,
    end,
    folder_of,
    is_over_another,
    layer_name,
    left_behind,
    refuse_one_more,
)
from sandbox_provisioner.layers.place import check_upper, layer_directory, layer_path
from sandbox_provisioner.ledger import Attachment, Ledger, limit_workdir, undone_if_it_fails
from sandbox_provisioner.links import real_path
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.network_trial import catch_obstacle
from sandbox_provisioner.off_loop import off_loop, within
from sandbox_provisioner.orders import compile_for
from sandbox_provisioner.performer import Performer
from sandbox_provisioner.places import Place, disk_of
from sandbox_provisioner.plan import LaunchRequest, Plan, Site
from sandbox_provisioner.records import (
    UNREADABLE,
    Record,
    RecordFolder,
    cgroup_facts,
    open_init,
    runtime_directory,
)
from sandbox_provisioner.served_image import answering, served
from sandbox_provisioner.spec import (
    NO_WORKDIR,
    Confinement,
    Layer,
    Network,
    NetworkWish,
    SandboxSpec,
    UserIds,
    Volume,
    VolumeOfDevice,
    relative,
    volumes_for,
)
from sandbox_provisioner.stages import stage
from sandbox_provisioner.stem import stem
from sandbox_provisioner.sweeping import sweep

_MOST_TOLD = 1000
# What is given to a kernel is looked at in milliseconds, of a slow file server in seconds.
_ANSWER_SECONDS = 30.0
Warn = Callable[[str], None]
_Found = TypeVar("_Found")


class SeenBy(Protocol):
    """Calls a function with somebody's rights over files, and returns what it does."""

    def __call__(self, look: Callable[..., _Found], *arguments: object) -> _Found:
        """Whatever *look* raises is raised."""
        ...


def seen_by_ourselves(look: Callable[..., _Found], *arguments: object) -> _Found:
    """With the rights that we have: `SeenBy`."""
    return look(*arguments)


@dataclass(frozen=True, slots=True)
class _Given:
    """What a start is given of the host, and the real path of *home*; and its *files*, if whoever
    looked for it has looked for these, too."""

    workdir: WorkdirFacts
    volumes: tuple[VolumeFacts, ...]
    home: str
    files: KernelFiles | None


class LocalLauncher:
    """Starts sandboxes on this machine, as this user. One can start any number, one after another
    or at once."""

    def __init__(
        self,
        *,
        runtime_dir: str = "",
        layer_dir: str = "",
        review_days: float = REVIEW_DAYS,
        warn: Warn = lambda _: None,
        told: set[str] | None = None,
        caller: Callable[[], Caller] = Caller.this_process,
        ground: Callable[[], Ground] = Ground.probe,
        seen_by: SeenBy = seen_by_ourselves,
        found_by: SeenBy | None = None,
        why_not_ahead: Callable[[Site, Mapping[str, str]], str] = lambda *_: "",
        keep_seconds: float = 0.0,
    ) -> None:
        """*layer_dir* is where lies what outlives kernels, for *review_days* at the most where
        somebody has to decide about it. *told* is what `tell_once` has said already, for launchers
        that share it. *caller* tells, at each start, who asks for it, and *ground* what is so here
        whoever does. *seen_by* calls what looks at paths that this one names, with their rights,
        and *found_by* what looks for a kernel's program and its files, where these are looked for
        by others. *why_not_ahead* tells why
        nothing may be imported before a start at a site, with variables that its user has chosen,
        "" if something may. A process that lives on keeps image files mounted until no start over
        them has come for *keep_seconds*."""
        self._caller = caller
        self._ground = ground
        self.seen_by = seen_by
        self.why_not_ahead = why_not_ahead
        self._found_by = found_by or seen_by
        self._runtime_dir = runtime_dir
        self.layer_dir = layer_dir
        self._review_days = review_days
        self._keep_seconds = keep_seconds
        self._warn = warn
        self._told: set[str] = set() if told is None else told

    def warn(self, text: str) -> None:
        """Tell whoever starts sandboxes; what *text* names may have been named by a kernel."""
        self._warn(one_line(text))

    def tell_once(self, text: str) -> None:
        """The same for what is looked for at every start."""
        mark = sha256(text.encode(errors="surrogatepass")).hexdigest()  # it may be of any length
        if mark not in self._told:
            if len(self._told) >= _MOST_TOLD:  # kernels can make any number of names
                self._told.clear()
            self._told.add(mark)
            self.warn(text)

    def runtime(self) -> Path:
        """Where the records of our sandboxes are."""
        return runtime_directory(self._runtime_dir)

    def meeting_place(self, sandbox_id: str, confinement: Confinement) -> SocketFolder:
        """Where the kernel of *sandbox_id*, which is not there yet, will be met."""
        folder = RecordFolder(self.runtime() / sandbox_id)
        return SocketFolder(folder.sockets, *confiner(confinement).places(str(folder.path)))

    def sweep(self) -> list[str]:
        """Remove what killed servers left, and what nobody has decided about; the ids of what is
        gone."""
        try:
            # Ended first, so that the days of what they have changed begin now.
            gone = sweep(self.runtime(), self.warn)
            collect(layer_path(self.layer_dir), self._review_days)
            collect_layers(layer_path(self.layer_dir))
            with suppress(PermissionError):  # an ordinary user has none, and may not even look
                images.sweep()
                folders.sweep(seconds=folders.AT_A_START_SECONDS)
                folders.remove_on()
            return gone
        except OSError as error:
            self.warn(f"What killed servers left cannot be removed now: {error}")
            return []

    def obstacle(self, spec: SandboxSpec) -> HostError | None:
        """Why this process has not the rights for a box such as *spec*, None if it has them."""
        facts = HostFacts.probe((), self._caller())
        try:
            cgroup.open_tree(facts.cgroups, "nobody", spec.limits, spec.may_lack, lambda _: None)
            find_storage(spec.limits, privileged=facts.privileged, kernel=facts.machine.kernel)
            check_workdir_rights(spec.limits, privileged=facts.privileged)
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
        facts = HostFacts.probe(request.server_places, caller, self._ground())
        spec = request.spec
        holder = confiner(spec.confinement)
        if obstacle := holder.obstacle(facts):
            raise obstacle
        given = self._given(request, facts, caller, opened)
        workdir, volumes = given.workdir, given.volumes
        root = self._root(request, facts, opened)
        tree = self.tree(request, facts, workdir, request.group)
        self._tell_of_unmapped(workdir, volumes)
        above = cgroup.narrowest_bound(facts.cgroups)
        if less := cgroup.allows_less(spec.limits.memory_bytes, above):
            self.tell_once(less)
        look_there_last(workdir.source, sys.path)
        counts_alone = holder.has_own_processes and not _counts_everywhere(facts)
        files = given.files or self._program(request, facts, caller, workdir, volumes, root)
        packages = Packages()
        if PACKAGES in spec.network.allow:
            packages = self.seen_by(self._packages, request, facts, files, workdir, volumes)
        devices = _devices(request, facts, root)
        machine = facts.machine
        shown = () if spec.has_own_root else (*machine.system_directories, *machine.system_files)
        site = Site(
            facts=facts,
            workdir=workdir,
            files=files,
            volumes=(*volumes, *self._of_devices(devices, shown, opened)),
            devices=devices,
            device_group=tree.device_group,
            join_files=tree.join_files,
            id_range=_id_range(spec, facts),
            user_tasks=0 if counts_alone else count_tasks(facts.caller.uid),
            memory_group=tree.memory_group,
            figure_groups=tree.figure_groups,
            memory_above=above,
            catch_obstacle=catch_obstacle(facts) if spec.network.mode is Network.GATEWAY else "",
            resolver=find_resolver() if spec.network.mode is Network.HOST else (),
            name_servers=_name_servers(spec.network),
            server_environment=caller.environment,
            real_home=given.home,
            network_allow=expanded_rules(spec.network.allow, packages),
            packages=packages,
            root=root,
            kernel_user=spec.kernel_user,
            held={wire.IMAGE_SERVER: root.server_fd} if root.server_fd >= 0 else {},
            storage=self._storage(spec, facts),
            layer_storage=self._layer_storage(request, facts, root),
        )
        _keep_apart(runtime, site)
        if not spec.covers.whole:
            self._keep_kept_apart(site)
        return site, tree

    def _keep_kept_apart(self, site: Site) -> None:
        for name in (REVIEW, KERNEL, USER):
            layers = layer_path(self.layer_dir) / name
            _keep_layers_apart(layers, site, "Set layer_dir to a directory of its own.")
        if site.facts.privileged:
            _keep_layers_apart(STORAGE, site, "Work in another directory.")

    def _given(
        self, request: LaunchRequest, facts: HostFacts, caller: Caller, opened: ExitStack
    ) -> _Given:
        """What it is given of the host, and what its work directory may hold; HostError where its
        file system does not answer, or keeps no such limit."""
        spec = request.spec

        def look() -> tuple[_Given, ExitStack]:
            with ExitStack() as own:
                return self.seen_by(self._looked, request, facts, caller, own), own.pop_all()

        if self.seen_by is seen_by_ourselves:
            paths = (spec.workdir, *(volume.source for volume in spec.volumes))
            given, own = answered(look, lambda found: found[1].close(), paths)
        else:  # another's eyes have a thread and a patience of their own
            given, own = look()
        opened.push(own)
        linux, privileged = facts.machine.kernel, facts.privileged
        quota = find_workdir_quota(spec.limits, given.workdir.place, linux, privileged=privileged)
        return replace(given, workdir=replace(given.workdir, quota=quota))

    def _looked(
        self, request: LaunchRequest, facts: HostFacts, caller: Caller, opened: ExitStack
    ) -> _Given:
        """By whoever looks for it. Others' eyes, that look for the program as well, do it all in
        one: each change of threads is waited for."""
        workdir, volumes = _given(request.spec, facts, opened)
        in_one = self._found_by is self.seen_by is not seen_by_ourselves
        files = None
        if in_one and not request.spec.has_own_root:
            files = self._files(request, facts, caller, workdir, volumes)
        return _Given(workdir, volumes, real_path(caller.home), files)

    def _tell_of_unmapped(self, workdir: WorkdirFacts, volumes: tuple[VolumeFacts, ...]) -> None:
        for mount in (*workdir.unmapped, *(m for facts in volumes for m in facts.unmapped)):
            self.tell_once(
                f"{mount.path} can only be read: it is a mount of {mount.filesystem}, and Linux "
                "cannot map the ids of all mounts below what a kernel of a root server is given."
            )

    def _root(self, request: LaunchRequest, facts: HostFacts, opened: ExitStack) -> RootFacts:
        """The root file system that is not the host's, open."""
        spec, is_brokers = request.spec, facts.caller.opened is not None
        if not spec.has_own_root:
            return RootFacts()
        vouched = not is_brokers or _vouches_for_root(request)
        path = self.seen_by(root_path, spec.rootfs, facts.caller)
        probe = partial(RootFacts.probe, vouched=vouched)
        root = self.seen_by(probe, path, facts, opened)
        if root.kind:
            seconds = self._keep_seconds
            privileged = facts.privileged
            root = root.mounted(opened, seconds) if privileged else served(root, facts, opened)
        with answering(root):
            return self.seen_by(root.looked_at)

    def _program(
        self,
        request: LaunchRequest,
        facts: HostFacts,
        caller: Caller,
        workdir: WorkdirFacts,
        volumes: tuple[VolumeFacts, ...],
        root: RootFacts,
    ) -> KernelFiles:
        """What the kernel's program is, and needs."""
        if not root.is_own:
            return self._found_by(self._files, request, facts, caller, workdir, volumes)
        # What came through the broker is its real path, and root looks at no path of a user's.
        wish = "" if facts.caller.opened is not None else request.spec.rootfs
        check_apart(root, wish, workdir, volumes)
        environment = handed_on(
            request.environment, caller.environment, request.env_keep, own_root=True
        )
        machine = facts.machine.architecture
        with answering(root):
            return self.seen_by(
                find_image_files,
                request.argv,
                environment,
                root.files,
                root.wish,
                machine,
                request.extra_files,
            )

    def _storage(self, spec: SandboxSpec, facts: HostFacts) -> Storage | None:
        """What holds a limit of the disk, with a warning where that is memory."""
        found = find_storage(spec.limits, privileged=facts.privileged, kernel=facts.machine.kernel)
        if found and (notice := storage.in_memory(found, spec.limits)):
            self.tell_once(notice)
        return found

    def _layer_storage(
        self, request: LaunchRequest, facts: HostFacts, root: RootFacts
    ) -> Storage | None:
        """The image in which is kept what it installs; None where that is a folder, or nothing."""
        spec, wish = request.spec, request.spec.limits
        if not spec.keeps_layer:
            return None
        why = image_obstacle(privileged=facts.privileged)
        name, base = request.sandbox_id, layer_path(self.layer_dir)
        if spec.layer is Layer.KERNEL:
            self._tell_what_is_of_no_use(KeptFolder(base / KERNEL / name), root)
        if spec.layer is Layer.USER:
            uid = facts.caller.uid
            folder = folder_of(base, spec.layer, name, uid, root.wish, root.identity)
            name = folder.disk
            if facts.caller.opened is not None:
                refuse_one_more(base, uid, folder)
            if before := left_behind(base, uid, spec.rootfs, folder):
                self.tell_once(before)
            if not why and folder.is_folder:
                why = f"the layer that there is, {folder.path}, is none"
        if not why:
            return storage_for(name, wish, base)
        if wish.disk_bytes is None:
            return None
        raise HostError(
            attempt=f'use layer = "{spec.layer.value}" with disk_limit',
            answer=f"what is kept of a kernel is limited in an image alone, and {why}",
            remedy='Set layer to "auto" or "none", or leave out disk_limit. An empty layer may be '
            "another matter: jupyter sandbox layer reset.",
        )

    def _tell_what_is_of_no_use(self, folder: KeptFolder, root: RootFacts) -> None:
        layer = layer_name(root.wish, root.identity)
        in_image = disks.is_over_another(folder.path.name, layer)
        if in_image or is_over_another(folder, layer):
            self.tell_once(
                f"What this kernel has installed lies over another root than {root.wish}, or "
                "another content of it: it begins with an empty layer."
            )

    def _room(self) -> int:
        return usual_size(layers=layer_path(self.layer_dir))

    def prepare_disk(self, request: LaunchRequest, seconds: float) -> None:
        """Make the image of the next start such as *request* ready, for so long."""
        spec, layers = request.spec, layer_path(self.layer_dir)
        if image_obstacle(privileged=is_privileged()):
            return
        if spec.limits.disk_bytes is not None and spec.layer is not Layer.USER:
            storage = find_storage(spec.limits, privileged=True, kernel=kernel_release())
        elif spec.layer is Layer.KERNEL:
            storage = storage_for(request.sandbox_id, spec.limits, layers)
        else:
            return
        if storage and storage.is_image:
            add_ready(storage, layers, seconds)

    def has_installed(self, request: LaunchRequest) -> bool:
        """Whether an earlier start of the same kernel may have left something in its layer."""
        return request.spec.layer is Layer.KERNEL and self._has_layer(request.sandbox_id)

    def _has_layer(self, sandbox_id: str) -> bool:
        folder = layer_path(self.layer_dir) / KERNEL / sandbox_id
        return folder.exists() or images.is_there(sandbox_id)

    def settled(self, request: LaunchRequest) -> LaunchRequest:
        """*request*, where "auto" is decided of what becomes of a layer over another root: it
        outlives restarts, where the kernel may be restarted at all, and that is bounded."""
        spec = request.spec
        open_question = spec.layer is Layer.AUTO and spec.has_own_root
        may_restart = request.connection_file is not None and self._caller().opened is None
        writes = spec.workdir != NO_WORKDIR and spec.confinement is Confinement.NAMESPACES
        if not (open_question and may_restart and writes) or self._is_memory(request):
            return request
        return replace(request, spec=replace(spec, layer=Layer.KERNEL))

    def _is_memory(self, request: LaunchRequest) -> bool:
        """Whether nothing bounds what would be kept of *request*'s layer, with a sentence why."""
        spec, privileged = request.spec, is_privileged()
        if spec.limits.disk_backend not in KEEPING:
            return True
        if not privileged and spec.limits.disk_bytes is not None:
            return True  # which is asked for, and cannot be had but of memory
        if self._has_layer(request.sandbox_id):
            return False  # a restart finds what it had: its room is promised by now
        why = image_obstacle(privileged=privileged) if privileged else ""
        if privileged and not why and spec.limits.disk_bytes is None and not self._room():
            why = f"there is too little room in {STORAGE}"
        if not privileged:
            try:
                # No kernel gets more of this disk than by its work directory: a user's own quota.
                check_upper(layer_directory(self.layer_dir), maps_ids=False)
            except HostError as error:
                why = error.answer
        if why:
            self.tell_once(
                f"What a kernel installs over {spec.rootfs} is gone when it is restarted: {why}."
            )
        return bool(why)

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
        given = Given(
            writable=(workdir.source, *writable),
            owner_uid=workdir.place.owner_uid,
            shown=caller.shown,
        )
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
        """What the rule "packages" means here."""
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

    def _of_devices(
        self, devices: Devices, shown: Sequence[str], opened: ExitStack
    ) -> Iterator[VolumeFacts]:
        """The files that come with devices, as volumes, but for those that are *shown* anyway; with
        a sentence for those that would hide a part of the system. A specification is root's, so
        they are opened with our own rights."""
        kind = Volume if shown else VolumeOfDevice
        for mount in devices.mounts:
            target = os.path.realpath(mount.target)  # as seen in the host's root: /lib is a link
            is_there = any(relative(target, path) is not None for path in shown)
            if is_there and os.path.realpath(mount.source) == target:
                continue
            try:
                volume = kind(source=mount.source, target=mount.target, readonly=mount.readonly)
            except SpecError as error:
                self.tell_once(f"{mount.target}, which a device wants, is left out: {error.answer}")
                continue
            yield VolumeFacts.of_root(volume, opened)

    def tree(
        self, request: LaunchRequest, facts: HostFacts, workdir: WorkdirFacts, name: str
    ) -> CgroupTree:
        """The groups called *name*, with the caps of *request*; nothing is made yet."""
        spec = request.spec
        limits = (spec.limits, *request.sums.values())
        is_needed = any(cap.needs_disk for each in limits for cap in each.asked)
        disk = disk_of(self._written_to(spec, workdir)) if is_needed else ""
        return cgroup.open_tree(
            facts.cgroups, name, spec.limits, spec.may_lack, self.tell_once, disk, request.sums
        )

    def _written_to(self, spec: SandboxSpec, workdir: WorkdirFacts) -> int:
        """The device whose disk the kernel writes to."""
        if spec.is_reviewed:
            return layer_directory(self.layer_dir).stat().st_dev
        return workdir.place.device

    def explain(self, request: LaunchRequest) -> Plan:
        """The plan that `start` would perform; nothing is run."""
        request = self.settled(request)
        site, _ = self.survey(request)
        with site.opened:
            if site.storage and site.storage.is_folder:
                site = replace(site, held={**site.held, wire.DISK: -1})
            if request.spec.is_reviewed:
                site = replace(site, review=Place.nowhere(), held={**site.held, wire.REVIEW: -1})
            if request.spec.keeps_layer and not site.layer_storage:
                site = replace(site, layer=Place.nowhere(), held={**site.held, wire.LAYER: -1})
            sockets = str(RecordFolder(self.runtime() / request.sandbox_id).sockets)
            return compile_for(request, replace(site, first_id=FIRST_ID, sockets=sockets))

    def find(self, card: Mapping[str, Any]) -> LocalHandle:
        """The sandbox that a handle's card tells of; LaunchError if it has ended."""
        folder = RecordFolder(Path(card.get("runtime_dir") or self.runtime()) / card["id"])
        try:
            record: Record | None = folder.read()
        except UNREADABLE:
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
        return _handle_of(folder, record, pidfd)

    def adopt(self, folder: Path) -> LocalHandle | None:
        """The sandbox of *folder*, which outlived who launched it, as our own, also one that has
        ended meanwhile: how, its handle tells. None if it is somebody's, or never ran. What
        `records.UNREADABLE` has."""
        ours = RecordFolder(folder)
        if not ours.own_if_orphan():
            return None
        try:
            record = ours.read()  # now nobody else removes it
            if not record.init_pid:
                ours.release()
                return None
            with suppress(OSError, ValueError):  # it ends just now
                ours.change(lambda record: replace(record, unheard=True))
        except BaseException:
            ours.release()
            raise
        pidfd = open_init(record)
        return _handle_of(ours, record, pidfd)

    def attachment(self, request: LaunchRequest) -> Attachment | None:
        """What joins the kernel of *request*, whose start begins, to its network."""
        if request.spec.network.mode is Network.CARD:
            return CardAttachment(request, self.tell_once)
        if request.spec.network.mode is not Network.GATEWAY:
            return None
        life = gateway_life(self.runtime(), perform_whole, self.warn)
        return GatewayAttachment(life, request)

    def forget(self, sandbox_id: str) -> None:
        """The kernel will not be started again: what was kept for its restarts goes."""
        end(layer_path(self.layer_dir), sandbox_id)
        disks.end(sandbox_id)

    def ledger(self, request: LaunchRequest, labels: Labels) -> Ledger:
        """For all that a start of *request* makes."""
        network = self.attachment(request)
        return Ledger(self.runtime(), request, labels, network, self.layer_dir)

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> LocalHandle:
        """Start *request* and return when its program has been executed.

        Raises SpecError, HostError or LaunchError; then everything made so far is undone.
        """
        request = await off_loop(self.settled, request)
        return await start_cold(self, request, labels or Labels(), stdio or Stdio())


def _handle_of(folder: RecordFolder, record: Record, pidfd: int | None) -> LocalHandle:
    """Of a sandbox that was found; *pidfd* is None where it has ended."""
    return LocalHandle(
        pidfd=at_its_end() if pidfd is None else pidfd,
        tree=open_existing(cgroup_facts(record), record.tree),
        folder=folder,
        record=record,
        control=-1,
        is_old_end=pidfd is None,
    )


async def start_cold(
    launcher: LocalLauncher, request: LaunchRequest, labels: Labels, stdio: Stdio
) -> LocalHandle:
    """Start *request* by a launcher of its own; see `LocalLauncher.start`."""
    made = launcher.ledger(request, labels)
    performer = Performer(stdio)
    async with undone_if_it_fails() as undo, made.told_by_network():
        undo.push_async_callback(made.remove)
        undo.push_async_callback(performer.end)
        with ExitStack() as opened:
            afford_a_start()
            site, tree = await off_loop(_begin, launcher, request, performer, opened)
            await limit_workdir(site)
            site, plan = await off_loop(_prepare, launcher, made, site)
            handle = await perform_whole(made, performer, site, plan, tree)
            handle.unseen = site.files.unseen
            return handle


def answered(
    look: Callable[[], _Found], undo: Callable[[_Found], object], paths: Sequence[str]
) -> _Found:
    """What *look* at *paths* returns; what it returns too late is undone."""
    try:
        return within(_ANSWER_SECONDS, look, undo)
    except TimeoutError:
        raise HostError(
            attempt=f"look at what a kernel is given: {', '.join(paths)}",
            answer=f"a file system of it has not answered for {_ANSWER_SECONDS:g} seconds",
            remedy="See who serves it (findmnt -T PATH): a file server, or a FUSE program, "
            "that does not answer. Try again when it does, or leave it out.",
        ) from None


def _begin(
    launcher: LocalLauncher, request: LaunchRequest, performer: Performer, opened: ExitStack
) -> tuple[Site, CgroupTree]:
    """Ask for a launcher, and look at the host: in one go, since each change of threads is waited
    for."""
    with stage("spawn-launcher"):
        performer.ask(stem)
    with stage("survey"):
        return launcher.look(request, opened)


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


def root_path(wish: str, caller: Caller) -> str:
    """Where the root lies that *wish* names; what other engines keep images in is unpacked."""
    if not wish.startswith("/"):
        return str(find_image(wish, caller))
    if caller.opened is not None:  # through the broker: root reads no archive of a user's
        return wish
    # The kernels of most servers have the host's root: they do not wait for what reads tars.
    from sandbox_provisioner.images.importing import is_oci, unpacked  # noqa: PLC0415

    return str(unpacked(wish, caller)) if is_oci(wish) else wish


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


def _keep_layers_apart(layers: Path, site: Site, remedy: str) -> None:
    """SpecError where a kernel would be given what others have left, and somebody decides about;
    also before any has, since it would make the place itself."""
    real = os.path.realpath(layers)
    for path, place in site.places:
        inside = relative(real, place.source)
        hidden = site.workdir.covered.directories if place is site.workdir.place else ()
        is_hidden = inside and any(relative(inside, one) is not None for one in hidden)
        if (inside is not None and not is_hidden) or relative(place.source, real) is not None:
            raise SpecError(
                attempt=f"keep what kernels write in {layers}",
                answer=f"this kernel would be given that, with {path}",
                remedy=remedy,
            )


def _vouches_for_root(request: LaunchRequest) -> bool:
    """Whether the root is one of root's own store, or an administrator has named it."""
    rootfs, terms = request.spec.rootfs, request.terms
    if not rootfs.startswith("/"):
        return True
    if terms is None:
        return False
    named = (said.get("rootfs") for said in (terms.defaults, terms.ceilings, terms.forced))
    return any(rootfs in _texts(term.fields["rootfs"]) for term in named if term)


def _texts(value: str | frozenset[str]) -> frozenset[str]:
    """Of a ceiling these are all that can be chosen."""
    return value if isinstance(value, frozenset) else frozenset({value})


def _devices(request: LaunchRequest, facts: HostFacts, root: RootFacts) -> Devices:
    """What it is given of the machine's devices, in its root; SpecError."""
    found = find_devices(
        request.spec.devices,
        privileged=facts.privileged,
        granted=_grants_devices(request),
        is_broker=facts.caller.opened is not None,
    )
    return found.in_root(root.files) if root.is_own else found.in_hosts_root()


def _grants_devices(request: LaunchRequest) -> bool:
    """Whether an administrator has said what devices there may be."""
    terms = request.terms
    return terms is not None and ("devices" in terms.ceilings or "devices" in terms.forced)


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
