"""warm/plans.py - pure: the plan of a nursery, and the plan of a kernel that one forks.

A nursery is a box as any kernel has, but for what its children need: a /proc without masks (Linux
lets nobody mount a new one where the old one is not whole), the calls that make namespaces, and a
PID 1 that stays as long as a child does, since PID namespaces lie in one another.

A kernel's plan comes in two parts. What touches the host is opened by a launcher, as always, and
handed over as descriptors; all the rest happens in the nursery's child, which has no rights but in
the user namespace that it makes for itself::

    launcher (the server's rights)   exit file, memory group, work directory, volumes, sockets
                                     └── descriptors ──▶ server ──▶ child
    child (nobody's)                 groups, namespaces, programs, meanwhile; with what was opened
                                     root, covers, init, filter: the same steps as ever
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sandbox_provisioner.id_range import FIRST_ID, IDS, LAST_ID, id_map
from sandbox_provisioner.inside.seccomp import NURSERY
from sandbox_provisioner.plan import (
    HOME,
    KERNEL_ID,
    SOCKETS,
    LaunchRequest,
    Plan,
    Site,
    Step,
    check,
    connection_step,
    environment_step,
    find_again_steps,
    given_take_steps,
    kernel_steps,
    late_attach_steps,
    namespace_and_mount_steps,
    owner_map_steps,
    program_take_steps,
    receive_steps,
    root_steps,
    socket_steps,
    unmapped_steps,
    watch_steps,
    workdir_steps,
)
from sandbox_provisioner.spec import Confinement, UserIds, relative

_MEMORY_FILES = {1: 5, 2: 3}
_LEAST_AVAILABLE_PART = 20


def obstacle(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot come from a nursery, "" if it can."""
    if request.survive_server:
        return "it shall outlive its server"
    if request.spec.confinement is not Confinement.NAMESPACES:
        return "a nursery's kernels are held by namespaces, and it asks for Landlock"
    if request.spec.user_ids is UserIds.RANGE and not site.facts.privileged:
        return "it wants a range of user ids"
    if site.facts.privileged and site.workdir.source and not site.workdir.idmappable:
        return f"the ids of {site.workdir.place.filesystem} cannot be mapped"
    return ""


def spare_obstacle(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot be bound to a spare, "" if it can; where `obstacle` knows of nothing."""
    if not request.connection_file or request.argv[-4:-2] != ("-m", "ipykernel_launcher"):
        return "its command line is not that of a usual IPython kernel"
    if "curve_secretkey" in request.connection_file[1]:
        return "its sockets are to be encrypted with keys of its own"
    if site.home != HOME or _overlap(site.workdir.source, HOME):
        return "its home directory is the work directory"
    if any(_overlap(path, site.workdir.path) for path in site.files.readonly):
        return "its environment and its work directory lie in one another"
    return ""


def _overlap(one: str, other: str) -> bool:
    return relative(one, other) is not None or relative(other, one) is not None


def compile_nursery_plan(request: LaunchRequest, site: Site) -> Plan:
    """The plan for a nursery; *request* names its program, *site* has no work directory."""
    steps = (
        Step("exit-file", (site.exit_file,), "where init will write how the nursery ended"),
        Step("join-cgroup", site.join_files, "what it imports is charged to it, not to a kernel"),
        Step("oom-score", ("300",), "if the machine runs out, it goes before the server"),
        *namespace_and_mount_steps(request, site, more_ids=_ids_of_kernels(site)),
        Step("fork-init", (), "a PID namespace begins with a child; that one is PID 1"),
        Step("new-session", (), "no terminal, process group or keyring of the server"),
        *root_steps(request, site, masked=False),
        *late_attach_steps(site),
        Step("pivot", (), "the new root becomes /; of the host's nothing stays reachable"),
        Step("close-root"),
        Step("hostname", (request.spec.hostname,)),
        Step("loopback-up"),
        *_staying_steps(request),
        Step("outlive-kernel", (), "the kernels that it forked live in its PID namespace"),
        Step("stdio", ("pump",)),
        Step("fork-kernel"),
        *kernel_steps(request, site, profile=NURSERY),
    )
    return Plan(tuple(step for step in steps if step.verb != "join-cgroup" or step.words))


def _staying_steps(request: LaunchRequest) -> Iterator[Step]:
    """One that is its maker's alone ends with it, and with its kernels, which do so anyway."""
    if request.survive_server:
        why = "it serves every server of this user, and ends when idle"
        yield Step("survive-server", (), why)


@dataclass(frozen=True, slots=True)
class Family:
    """The pids, as the server sees them, of the nursery's PID 1 and of the child, a PID 1 too."""

    init: int
    child: int


def compile_warm_plan(request: LaunchRequest, site: Site) -> Plan:
    """The plan for *request*, for the nursery's child."""
    check(site)
    inner = _as_seen_inside(site)
    steps = (
        *_box_steps(request, inner, site),
        *workdir_steps(inner),
        *late_attach_steps(inner),
        *socket_steps(request, inner),
        Step("pivot", (), "the new root becomes /; of the nursery's nothing stays reachable"),
        Step("close-root", (), "read-only from here on"),
        *_last_steps(request, inner),
    )
    return Plan(steps)


def compile_spare_plan(
    request: LaunchRequest, site: Site, idle_seconds: float, *, has_string: bool
) -> Plan:
    """The same for a spare, which ends if nobody claims it for *idle_seconds*: a kernel without a
    work directory, whose root stays open for one. With the plan comes the socket through which it
    is claimed, and, if it *has_string*, what holds its groups."""
    check(site)
    inner = _as_seen_inside(site)
    words = (f"{idle_seconds:g}", str(least_available_bytes()))
    held = ("claims", "string") if has_string else ("claims",)
    steps = (
        *_box_steps(request, inner, site, held),
        *late_attach_steps(inner),
        *socket_steps(request, inner),
        Step("pivot", (), "the new root becomes /; of the nursery's nothing stays reachable"),
        Step("stay-unclaimed", words, "nobody's code runs before a server has claimed it"),
        *_last_steps(request, inner),
    )
    return Plan(steps)


def compile_claim_plan(request: LaunchRequest, site: Site) -> tuple[Plan, Plan]:
    """What is left to do where a spare is bound to *request*: for a launcher, and for its PID 1."""
    check(site)
    takes = tuple(step for step in given_take_steps(request, site) if step.words[0] != SOCKETS)
    inner = _as_seen_inside(site)
    assert request.connection_file
    hand_over = (*receive_steps(site), *_rights_over_mounts(site), *takes, Step("hand-over"))
    received = tuple(str(step.words[0]) for step in takes)
    words = (request.cwd, site.files.program, *request.argv[1:])
    inside = (
        Step("receive", received, "opened by a launcher that could"),
        *workdir_steps(inner),
        *(Step("attach", (facts.volume.target,)) for facts in inner.volumes),
        *(step for facts in inner.volumes for step in unmapped_steps(facts.volume.target, facts)),
        connection_step(request.connection_file, inner),
        Step("close-root", (), "read-only from here on"),
        environment_step(request, inner),
        Step("bind-kernel", words, "it goes on when init has no rights left"),
    )
    return Plan(hand_over), Plan(inside)


def least_available_bytes() -> int:
    """With less memory available on this machine, no spare is kept."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _LEAST_AVAILABLE_PART


def compile_opening_plan(request: LaunchRequest, site: Site, family: Family) -> Plan:
    """The plan for the launcher of both: it opens what the nursery's child waits for."""
    steps = (
        *receive_steps(site),
        Step("exit-file", (site.exit_file,), "where init will write how the kernel ended"),
        *_memory_steps(request, site),
        *_rights_over_mounts(site),
        *given_take_steps(request, site),
        *_map_steps(site, family),
        Step("hand-over", (), "for a process that could open none of it"),
    )
    return Plan(steps)


def _memory_steps(request: LaunchRequest, site: Site) -> tuple[Step, ...]:
    return tuple(step for step in watch_steps(request, site) if step.verb == "open-memory")


def _opened(request: LaunchRequest, site: Site) -> Iterator[str]:
    """What comes from the launcher, by the names that ``receive`` knows, in the plan's order."""
    yield "exit-file"
    for step in _memory_steps(request, site):
        yield from ("memory",) * _MEMORY_FILES[int(str(step.words[0]))]
    yield from (str(step.words[0]) for step in given_take_steps(request, site))


def _box_steps(
    request: LaunchRequest, inner: Site, site: Site, held: tuple[str, ...] = ()
) -> Iterator[Step]:
    """From the nursery's child to PID 1 in a root with everything that its kernels share. *held*
    comes with the plan."""
    groups = ("group",) * len(site.join_files)
    yield Step("receive", (*groups, *held), "opened by the server")
    yield Step("join-cgroup", (), "memory, CPU and processes are charged from here on")
    new = ("mount", "network", "ipc", "uts", "cgroup")
    yield Step("unshare", new, "everything below is private; it is PID 1 of its namespace already")
    yield from program_take_steps(inner)
    yield Step("await-opened", (), "from here on it needs what touches the host")
    yield Step("receive", tuple(_opened(request, site)), "opened by a launcher that could")
    yield from _become_inside(site)
    yield from (step for step in watch_steps(request, site) if step.verb == "watch-memory")
    yield Step("new-session", (), "no terminal, process group or keyring of the nursery")
    yield from root_steps(request, inner)


def _last_steps(request: LaunchRequest, inner: Site) -> Iterator[Step]:
    yield Step("hostname", (request.spec.hostname,))
    yield Step("loopback-up", (), "debugpy and forked output use 127.0.0.1, and hang without it")
    yield request.stdio
    yield Step("fork-kernel", (), "PID 1 stays behind as init; the rest is done by the kernel")
    yield from kernel_steps(request, inner, run="run-kernel")


def _rights_over_mounts(site: Site) -> Iterator[Step]:
    """A root server maps the owners; an ordinary user may take mounts in a namespace only."""
    if site.facts.privileged:
        yield from owner_map_steps(site)
        return
    maps = f"{site.uid} {site.facts.uid} 1", f"{site.gid} {site.facts.gid} 1"
    yield Step("unshare-user-namespace", maps)
    yield Step("unshare", ("mount",))
    yield from find_again_steps(site)


def _map_steps(site: Site, family: Family) -> Iterator[Step]:
    """Each kernel of a root server has ids that nobody else has, warm or cold.

    user_namespaces(7): a map is written in the namespace or in its parent, which is the nursery's;
    there the whole of the range that kernels have their ids from appears as it is outside.
    """
    if not site.facts.privileged:
        return
    maps = (
        id_map(KERNEL_ID, site.outside_uid, site.first_id),
        id_map(KERNEL_ID, site.outside_gid, site.first_id),
    )
    words = (str(family.init), str(family.child), *maps)
    yield Step("map-child", words, "an id range of its own: the nursery has no right to give one")


def _become_inside(site: Site) -> Iterator[Step]:
    """The child has made its user namespace before it said that it is there."""
    if site.facts.privileged:
        yield Step("become-root-inside", (), "uid 0 of its own namespace, nobody outside")
        return
    maps = f"{site.uid} {site.uid} 1", f"{site.gid} {site.gid} 1"
    yield Step("map-own-ids", maps, "the user's own ids, as the nursery has them")


def _ids_of_kernels(site: Site) -> str:
    """Lines of uid_map: all ids that sandboxes get, but for the nursery's own, as they are."""
    above = site.first_id + IDS
    parts = ((FIRST_ID, site.first_id - FIRST_ID), (above, LAST_ID + 1 - above))
    return "".join(f"\n{first} {first} {count}" for first, count in parts if count > 0)


def _as_seen_inside(site: Site) -> Site:
    """The nursery's child is an ordinary user, whose ids are what they are inside the nursery."""
    facts = replace(site.facts, privileged=False, uid=site.uid, gid=site.gid)
    return replace(site, facts=facts)
