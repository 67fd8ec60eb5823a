"""launch.py - in the launching process: `LocalLauncher` starts sandboxes on this machine.

::

    spawn the launcher      spawn.py: its interpreter starts while we go on
    survey                  host.py, kernel_files.py: facts, read only
    make the record         records.py: the folder, a range of ids
    create the cgroups      cgroup/
    compile the plan        plan.py
    perform                 inside/, in the launcher
    LocalHandle             or an error, and everything made so far is undone
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

from sandbox_provisioner import cgroup
from sandbox_provisioner.cgroup import CgroupTree, open_existing
from sandbox_provisioner.confinement import confiner
from sandbox_provisioner.contract import Labels, Stdio
from sandbox_provisioner.descriptors import afford_a_start, for_clean_up
from sandbox_provisioner.errors import (
    HostError,
    InternalError,
    LaunchError,
    SandboxError,
    SpecError,
    told_as_host_error,
    told_as_internal_error,
)
from sandbox_provisioner.facilities.caps.plan import enforced
from sandbox_provisioner.handle import LocalHandle
from sandbox_provisioner.host import HostFacts, VolumeFacts, WorkdirFacts, count_tasks
from sandbox_provisioner.id_range import FIRST_ID, IdRange, find_id_range
from sandbox_provisioner.inside import wire
from sandbox_provisioner.inside.printable import one_line
from sandbox_provisioner.kernel_files import Given, KernelFiles, find_kernel_files
from sandbox_provisioner.meeting import SocketFolder
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.orders import compile_for
from sandbox_provisioner.places import disk_of
from sandbox_provisioner.plan import LaunchRequest, Plan, Site, Step
from sandbox_provisioner.records import (
    Record,
    RecordFolder,
    cgroup_facts,
    open_init,
    remove_stand_ins,
    runtime_directory,
    sweep,
)
from sandbox_provisioner.run_by_host import look_there_last, notice
from sandbox_provisioner.spawn import Failure, LauncherProcess, Report, stem
from sandbox_provisioner.spec import (
    WRITTEN_THROUGH,
    Confinement,
    SandboxSpec,
    UserIds,
    relative,
    volumes_for,
)
from sandbox_provisioner.surroundings import (
    Cause,
    Surroundings,
    cause_of,
    masked_proc_cause,
    mount_cause,
)
from sandbox_provisioner.variables import handed_on


def planned_stand_ins(workdir: WorkdirFacts) -> tuple[tuple[str, str], ...]:
    """(kind, path) of what the covers of *workdir* will have to make, outermost first.

    It stands in the record before it is done: if the server is killed meanwhile, `sweep` finds it.
    """
    covered = workdir.covered
    wanted = dict.fromkeys((*covered.files, *(path for path, _ in covered.placed)), "file")
    wanted |= dict.fromkeys(covered.links, "link") | dict.fromkeys(covered.sockets, "socket")
    wanted |= dict.fromkeys(covered.directories, "directory")
    homes = {os.path.dirname(link) for link in covered.links}
    wanted |= {os.path.join(home, WRITTEN_THROUGH): "directory" for home in homes}
    for path in tuple(wanted):
        while path := os.path.dirname(path):
            wanted[path] = "directory"
    full = ((kind, os.path.join(workdir.source, path)) for path, kind in sorted(wanted.items()))
    return tuple((kind, path) for kind, path in full if not os.path.lexists(path))


# Steps of a start that happen here and not in the launcher; a fault injection may name them too.
SERVER_STEPS = ("spawn-launcher", "make-record", "create-cgroup", "write-record")

_ATTEMPT = "start the sandbox"
_MOST_TOLD = 1000
Warn = Callable[[str], None]


class LocalLauncher:
    """Starts sandboxes on this machine, as this user. One can start any number, one after another
    or at once."""

    def __init__(
        self,
        *,
        runtime_dir: str = "",
        warn: Warn = lambda _: None,
        told: set[str] | None = None,
    ) -> None:
        """*told* is what `tell_once` has said already, for launchers that share it."""
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

    def survey(self, request: LaunchRequest) -> tuple[Site, CgroupTree]:
        """Find out all that `compile_plan` needs; starts and changes nothing but the order of our
        own sys.path, so that nothing in the work directory comes before a module of ours. The
        caller closes what has been opened: ``site.opened``."""
        with ExitStack() as opened:
            site, tree = self.look(request, opened)
            return replace(site, opened=opened.pop_all()), tree

    def look(self, request: LaunchRequest, opened: ExitStack) -> tuple[Site, CgroupTree]:
        """`survey`, where *opened* closes what it has opened."""
        facts, runtime = HostFacts.probe(request.server_places), self.runtime()
        spec = request.spec
        holder = confiner(spec.confinement)
        if obstacle := holder.obstacle(facts):
            raise obstacle
        workdir = WorkdirFacts.probe(spec.workdir, facts, spec.covers, opened)
        tree = self.tree(request, facts, workdir, request.sandbox_id)
        volumes = tuple(VolumeFacts.probe(volume, facts, opened) for volume in spec.volumes)
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
        site = Site(
            facts=facts,
            workdir=workdir,
            files=self._files(request, facts, workdir, volumes),
            volumes=volumes,
            join_files=tree.join_files,
            id_range=_id_range(spec, facts),
            user_tasks=0 if counts_alone else count_tasks(facts.uid),
            memory_group=tree.memory_group,
            memory_above=above,
            server_environment=dict(os.environ),
        )
        _keep_apart(runtime, site)
        return site, tree

    def _files(
        self,
        request: LaunchRequest,
        facts: HostFacts,
        workdir: WorkdirFacts,
        volumes: tuple[VolumeFacts, ...],
    ) -> KernelFiles:
        """What the kernel's program needs, with a warning for what it does not get."""
        writable = (v.source for v in volumes if not v.volume.readonly)
        given = Given(writable=(workdir.source, *writable), owner_uid=workdir.place.owner_uid)
        environment = handed_on(request.environment, os.environ, request.env_keep)
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
        ours = os.environ.get("PATH", "").split(os.pathsep)
        if added := [path for path in files.off_path if path not in ours]:
            self.tell_once(
                f"{', '.join(added)} is on the PATH that this kernel was given, and not in its "
                f"box. If it shall be there: {volumes_for(added)}."
            )
        if known := notice(workdir.source, facts.server):
            self.tell_once(known)
        return files

    def tree(
        self, request: LaunchRequest, facts: HostFacts, workdir: WorkdirFacts, name: str
    ) -> CgroupTree:
        """The groups called *name*, with the caps of *request*; nothing is made yet."""
        spec = request.spec
        device = disk_of(workdir.place.device) if spec.limits.io_bytes_per_second else ""
        return cgroup.open_tree(
            facts.cgroups, name, spec.limits, spec.may_lack, self.tell_once, device
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

    async def start(
        self, request: LaunchRequest, labels: Labels | None = None, stdio: Stdio | None = None
    ) -> LocalHandle:
        """Start *request* and return when its program has been executed.

        Raises SpecError, HostError or LaunchError; then everything made so far is undone.
        """
        runtime = self.runtime()
        with _told():
            _fail_here("spawn-launcher")
        process = LauncherProcess(stem)
        start = ColdStart(request, process, runtime, labels or Labels())
        start.stdio = stdio or Stdio()
        try:
            with _told(), ExitStack() as opened:
                afford_a_start()
                await off_loop(process.ask)
                site, tree = await off_loop(self.look, request, opened)
                return await start.run(site, tree)
        except BaseException:
            await start.undo()
            raise


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What goes wrong meanwhile is told as an error of ours."""
    with told_as_host_error(_ATTEMPT), told_as_internal_error(_ATTEMPT):
        yield


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
    """Whether RLIMIT_NPROC is needed, and counts more than the box (plan.py)."""
    return "pids" in facts.cgroups.missing and facts.kernel < (5, 14) and not facts.privileged


def _id_range(spec: SandboxSpec, facts: HostFacts) -> IdRange | None:
    wished = spec.user_ids is UserIds.RANGE and not facts.privileged
    return find_id_range(facts.uid) if wished else None


def _fail_here(step: str) -> None:
    try:
        wire.fail_as_wished(os.environ.get(wire.FAIL_AT, ""), step)
    except OSError as error:
        raise LaunchError(
            attempt=_ATTEMPT,
            answer=str(error.strerror),
            remedy=f"Unset {wire.FAIL_AT}.",
            step=step,
        ) from None


class StartedProcess(Protocol):
    """Who performs a plan, and becomes PID 1: a launcher, or a nursery's child."""

    report: Report
    pidfd: int
    end_signal: int

    @property
    def pid(self) -> int:
        """Its own, from the start to the fork of PID 1."""
        ...

    @property
    def init_pid(self) -> int:
        """PID 1, as we see it."""
        ...

    @property
    def init_start(self) -> int:
        """The start time of PID 1, in clock ticks."""
        ...

    @property
    def status(self) -> int | None:
        """How it ended itself, where that can be known."""
        ...

    @property
    def pipes(self) -> tuple[IO[bytes], ...]:
        """Our ends of the pipes that the caller asked for."""
        ...

    def hand_over(self) -> tuple[int, int]:
        """The pidfd of PID 1 and our end of its control socket, for the handle to own."""
        ...

    async def end(self) -> None:
        """Kill it, and PID 1, and wait for both: a start has failed."""
        ...


class Start:
    """One start, step by step, with what has to be undone if a later step fails."""

    sealed = False  # before it was started

    def __init__(
        self, request: LaunchRequest, process: StartedProcess, runtime: Path, labels: Labels
    ) -> None:
        self.request = request
        self.process = process
        self.runtime = runtime
        self.labels = labels
        self.tree: CgroupTree | None = None
        self.folder: RecordFolder | None = None
        self.record = Record(sandbox_id=request.sandbox_id)

    def hand_over(self, tree: CgroupTree, folder: RecordFolder) -> LocalHandle:
        """Write down what runs now; from here on the handle owns it."""
        self.write_record(folder)
        pidfd, control = self.process.hand_over()
        return LocalHandle(
            pidfd=pidfd,
            tree=tree,
            folder=folder,
            record=self.record,
            control=control,
            pipes=self.process.pipes,
            sealed=self.sealed,
        )

    def make_record(self, site: Site) -> tuple[Site, RecordFolder]:
        """Make the folder with the record, and tell the site what stands in them."""
        _fail_here("make-record")
        record = self.new_record(site)
        self.folder, self.record = RecordFolder.create(
            self.runtime, record, ids=site.facts.privileged
        )
        site = self.site_with(site, self.folder)
        if site.facts.privileged:
            # The directory belongs to the kernel's user; only they (and we) look into it.
            os.chown(self.folder.sockets, site.outside_uid, site.outside_gid)
        return site, self.folder

    def new_record(self, site: Site) -> Record:
        """What is known before anything runs."""
        facts = site.facts
        limits = enforced(self.request.spec.limits, facts)
        return Record(
            sandbox_id=self.request.sandbox_id,
            kernel_id=self.labels.kernel_id,
            name=self.labels.name,
            notebook=self.labels.notebook,
            user=self.labels.user,
            started=time.time(),
            survives_server=self.request.survive_server,
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
            confinement=self.request.spec.confinement.value,
            kind=self.labels.kind,
            nursery=self.labels.nursery,
            planned=planned_stand_ins(site.workdir),
        )

    def site_with(self, site: Site, folder: RecordFolder) -> Site:
        """*site* with what the record tells."""
        return replace(
            site,
            first_id=self.record.first_id,
            sockets=str(folder.sockets),
            exit_file=str(folder.exit_file),
        )

    def create_cgroup(self, tree: CgroupTree) -> None:
        _fail_here("create-cgroup")
        tree.create(self.request.spec.limits, self.process.pid)
        self.tree = tree

    def check(self, report: Report, plan: Plan, site: Site) -> None:
        """Raise what *report* tells of, if the kernel does not run."""
        if report.failure:
            raise _failure_told_by(report.failure, plan, site)
        if self.process.pidfd < 0:
            raise without_a_word(self.process.status)

    def write_record(self, folder: RecordFolder) -> None:
        _fail_here("write-record")
        report = self.process.report
        running = replace(
            self.record,
            init_pid=self.process.init_pid,
            init_start=self.process.init_start,
            made=tuple(report.made),
        )
        if running != self.record:
            self.record = folder.finish(running)

    async def undo(self) -> None:
        """Leave nothing behind, in the reverse order of making; each whatever became of the others,
        since the next start may use the same names."""
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(told_as_host_error("undo a start that has failed"))
            stack.enter_context(for_clean_up())
            if self.folder:
                stack.push_async_callback(off_loop, self.folder.remove)
            stack.push_async_callback(off_loop, self._remove_stand_ins)
            if self.tree:
                stack.push_async_callback(self.tree.remove)
                stack.push_async_callback(off_loop, self.tree.kill)
            stack.push_async_callback(self.process.end)

    def _remove_stand_ins(self) -> None:
        made = tuple(self.process.report.made)
        remove_stand_ins(self.runtime, replace(self.record, made=made))


def without_a_word(status: int | None) -> LaunchError:
    """The error for a process that has ended, with *status* if that is known, before its plan was
    performed, and has not said why."""
    if status is not None and status < 0:
        return LaunchError(
            attempt=_ATTEMPT,
            answer=f"its launcher was killed by signal {-status}",
            remedy="Look for who did that: the machine's log tells of memory that was short.",
            step="spawn-launcher",
        )
    how = "" if status is None else f" with status {status}"
    return LaunchError(
        attempt="start the sandbox",
        answer=f"its launcher ended{how} and did not say why",
        remedy="A cap may be too small for it; raise mem_limit or pids_limit.",
        step="spawn-launcher",
    )


def _failed_step(failure: Failure, plan: Plan) -> Step:
    """The very step that *failure* tells of. Whoever ran modules before may tell anything."""
    if 0 < failure.step <= len(plan.steps):
        step = plan.steps[failure.step - 1]
        if step.verb == failure.verb:
            return step
    return Step(failure.verb)


def _failure_told_by(failure: Failure, plan: Plan, site: Site) -> SandboxError:
    step = _failed_step(failure, plan)
    places = places_of(step, site)
    if failure.is_ours:
        where = f"{step.verb} {places}" if places else step.verb
        return InternalError(attempt=_ATTEMPT, answer=f"[{where}] {failure.text}")
    return failure_of(step, failure.errno, failure.text, site, places)


def places_of(step: Step, site: Site) -> str:
    """What *step* was about to touch, as a person knows it; the first few of many."""
    words = [word for word in step.words if isinstance(word, str)]
    if step.verb in _IN_WORKDIR:
        found = words[_IN_WORKDIR[step.verb]]
    else:
        found = [word for word in words if word.startswith("/")]
    shown, more = found[:_MOST_PLACES], len(found) - _MOST_PLACES
    for target, place in site.places:
        if shown[:1] == [target] and place.path != target:
            shown.append(f"(from {place.path})")
    return " ".join(shown) + (f" and {more} more" if more > 0 else "")


class ColdStart(Start):
    """A start by a launcher of its own."""

    stdio = Stdio()

    def __init__(
        self, request: LaunchRequest, process: LauncherProcess, runtime: Path, labels: Labels
    ) -> None:
        super().__init__(request, process, runtime, labels)
        self.launcher = process

    async def run(self, site: Site, tree: CgroupTree) -> LocalHandle:
        site, folder, plan = await off_loop(self.prepare, site)
        await self.launcher.here()
        await off_loop(self.create_cgroup, tree)
        self.process.end_signal = self.record.end_signal
        await self.launcher.perform(plan, self.stdio, site.descriptors)
        self.check(self.process.report, plan, site)
        handle = await off_loop(self.hand_over, tree, folder)
        handle.unseen = site.files.unseen
        return handle

    def prepare(self, site: Site) -> tuple[Site, RecordFolder, Plan]:
        """The record, and the plan, for which it has to be there."""
        site, folder = self.make_record(site)
        return site, folder, self.compile(site)

    def compile(self, site: Site) -> Plan:
        """What the launcher shall do."""
        return compile_for(self.request, site)


# Which of their words are places, where these are relative to the work directory.
_IN_WORKDIR = {
    "cover": slice(1, None),
    "place": slice(0, None, 2),
    "make-folders": slice(None),
    "protect": slice(None),
}
_MOST_PLACES = 3
_REMEDIES: Mapping[str, str] = {
    "execute": "Correct argv in its kernel.json, or install what is missing.",
    "chdir": "Start the notebook in a directory that its user may enter.",
    "chdir-place": "Start the notebook in a directory that its user may enter.",
    "join-cgroup": "See: jupyter sandbox doctor",
    "make-folders": "Make the work directory writable for its owner, or choose another one.",
    "covers-of": "If it tells of EMFILE, raise the sysctl fs.inotify.max_user_instances: a kernel "
    "whose work directory has a home or a repository in it needs one.",
    "cover": "Make the work directory writable for its owner, or choose another one with workdir.",
    "watch-memory": "Set mem_interrupt = 0 to do without.",
    "take": "Make the path readable, or correct the option that names it.",
    "find-again": "Start again when nobody moves or replaces it.",
}
_NAMESPACE_VERBS = (
    "make-user-namespace", "unshare-user-namespace", "map-user-namespace", "unshare", "fork-init",
)  # fmt: skip
_TAKE_VERBS = ("take", "take-place")
_MOUNT_VERBS = (
    *_TAKE_VERBS, "new-root", "attach", "mount", "scratch", "mask", "show-only", "freeze-paths",
    "pivot",
)  # fmt: skip
_REFUSALS = {errno.EPERM, errno.EACCES, errno.ENOSPC, errno.ENOSYS, errno.EINVAL}


def failure_of(step: Step, number: int, text: str, site: Site, places: str = "") -> SandboxError:
    """The error for a failed step of the launcher: what it was about to touch, its own words, and
    what to do about it."""
    cause = _cause_of(step.verb, number, text, site.facts) if number in _REFUSALS else None
    if cause:
        return HostError(
            attempt="make namespaces for a sandbox",
            answer=f"[{step.verb}{places and ' '}{places}] {text}: {cause.found}",
            remedy=cause.steps,
        )
    if step.verb == "execute" and number in {errno.EACCES, errno.ENOENT}:
        installation = os.path.dirname(os.path.dirname(site.files.program))
        return LaunchError(
            attempt=f"run {site.files.program} in the sandbox",
            answer=text,
            remedy="It, its interpreter or its libraries are missing inside or are not readable "
            f"for others: try chmod -R o+rX on {installation}.",
            step=step.verb,
        )
    return LaunchError(
        attempt=_ATTEMPT,
        answer=text,
        remedy=_REMEDIES.get(step.verb, "See: jupyter sandbox doctor"),
        step=step.verb,
        places=places,
    )


def _cause_of(verb: str, number: int, text: str, facts: HostFacts) -> Cause | None:
    """Who of this machine forbade a step, None if it was not of those that somebody forbids."""
    if verb == "map-user-namespace" and text.startswith("new"):
        return Cause(
            "its rules are those of subuid(5)",
            "See that /etc/subuid and /etc/subgid give this user ids that exist here (compare "
            '/proc/self/uid_map), or set user_ids to "single".',
        )
    made = verb != "fork-init" and text.startswith(("unshare(", "clone("))
    if number == errno.EINVAL and not made:
        return None
    if verb in _NAMESPACE_VERBS:
        return cause_of(number, text, Surroundings.probe(), privileged=facts.privileged)
    # What is taken is the server's to read: EACCES means a closed path there.
    forbids = {errno.EPERM} if verb in _TAKE_VERBS else {errno.EPERM, errno.EACCES}
    if verb not in _MOUNT_VERBS or number not in forbids:
        return None
    around = Surroundings.probe()
    if text.startswith("fsmount(name='proc'"):
        return masked_proc_cause(around)
    return mount_cause(around, privileged=facts.privileged)
