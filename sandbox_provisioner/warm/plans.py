"""warm/plans.py - pure: the plan of a nursery, and the plan of a kernel that one forks.

A nursery is a box as any kernel has, but for what its children need: a /proc without masks (Linux
lets nobody mount a new one where the old one is not whole), the calls that make namespaces, and a
PID 1 that stays as long as a child does, since PID namespaces lie in one another.

A kernel's plan comes in two parts. What touches the host is opened by a launcher, as always, and
handed over as descriptors; all the rest happens in the nursery's child, which has no rights but in
the user namespace that it makes for itself::

    launcher (the server's rights)   exit file, memory group, work directory, volumes, sockets
                                     └── descriptors ──▶ server ──▶ child
    child (nobody's)                 namespaces, root, covers, init, filter: the same steps as ever
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sandbox_provisioner.id_range import FIRST_ID, IDS, LAST_ID, id_map
from sandbox_provisioner.inside.seccomp import NURSERY
from sandbox_provisioner.plan import (
    KERNEL_ID,
    LaunchRequest,
    Plan,
    Site,
    Step,
    check,
    given_take_steps,
    kernel_steps,
    late_attach_steps,
    namespace_and_mount_steps,
    owner_map_steps,
    program_take_steps,
    root_steps,
    socket_steps,
    watch_steps,
    workdir_steps,
)
from sandbox_provisioner.spec import UserIds

HERE, INIT, JOINED, KNOWN = "here", "init", "joined", "known"
_MEMORY_FILES = {1: 4, 2: 3}


def obstacle(request: LaunchRequest, site: Site) -> str:
    """Why *request* cannot come from a nursery, "" if it can."""
    if request.survive_server:
        return "it shall outlive its server"
    if request.spec.user_ids is UserIds.RANGE and not site.facts.privileged:
        return "it wants a range of user ids"
    if site.facts.privileged and site.workdir.source and not site.workdir.idmappable:
        return f"the ids of {site.workdir.filesystem} cannot be mapped"
    return ""


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
        Step("hostname", (request.spec.hostname,)),
        Step("loopback-up"),
        Step("survive-server", (), "it serves every server of this user, and ends when idle"),
        Step("outlive-kernel", (), "the kernels that it forked live in its PID namespace"),
        Step("stdio", ("pump",)),
        Step("fork-kernel"),
        *kernel_steps(request, site, profile=NURSERY),
    )
    return Plan(tuple(step for step in steps if step.verb != "join-cgroup" or step.words))


@dataclass(frozen=True, slots=True)
class Family:
    """The pids, as the server sees them, of the nursery's PID 1 and of the child."""

    init: int
    child: int


def compile_warm_plan(request: LaunchRequest, site: Site, family: Family) -> tuple[Plan, Plan]:
    """The two parts of the plan for *request*: for the launcher, and for the nursery's child."""
    check(site)
    watch = tuple(watch_steps(request, site))
    opened = tuple(step for step in watch if step.verb == "open-memory")
    takes = tuple(given_take_steps(request, site))
    outside = (
        Step("exit-file", (site.exit_file,), "where init will write how the kernel ended"),
        *opened,
        *_rights_over_mounts(site),
        *takes,
        *_map_steps(site, family),
        Step("hand-over", (), "for a process that could open none of it"),
    )
    memory = ("memory",) * (_MEMORY_FILES[int(str(opened[0].words[0]))] if opened else 0)
    received = ("exit-file", *memory, *(str(step.words[0]) for step in takes))
    inner = _as_seen_inside(site)
    new = ("mount", "pid", "network", "ipc", "uts")
    inside = (
        Step("receive", received, "opened by a launcher that could"),
        *_become_inside(site),
        *(step for step in watch if step.verb == "watch-memory"),
        Step("unshare", new, "everything below is private"),
        *program_take_steps(inner),
        Step("await-word", (JOINED,), "memory, CPU and processes are charged from here on"),
        Step("unshare", ("cgroup",), "its own group is the root of those that it sees"),
        Step("fork-init", (), "a PID namespace begins with a child; that one is PID 1"),
        Step("tell", (INIT,), "the server learns its pid from the message's credentials"),
        Step("new-session", (), "no terminal, process group or keyring of the nursery"),
        *root_steps(request, inner),
        *workdir_steps(inner),
        *late_attach_steps(inner),
        *socket_steps(request, inner),
        Step("pivot", (), "the new root becomes /; of the nursery's nothing stays reachable"),
        Step("hostname", (request.spec.hostname,)),
        Step("loopback-up", (), "debugpy and forked output use 127.0.0.1, and hang without it"),
        Step("stdio", ("pump" if request.pump else "inherit",)),
        Step("await-word", (KNOWN,), "the server holds a pidfd, which no other process can get"),
        Step("fork-kernel", (), "PID 1 stays behind as init; the rest is done by the kernel"),
        *kernel_steps(request, inner, run="run-kernel"),
    )
    return Plan(outside), Plan(inside)


def _rights_over_mounts(site: Site) -> Iterator[Step]:
    """A root server maps the owners; an ordinary user may take mounts in a namespace only."""
    if site.facts.privileged:
        yield from owner_map_steps(site)
        return
    maps = f"{site.uid} {site.facts.uid} 1", f"{site.gid} {site.facts.gid} 1"
    yield Step("unshare-user-namespace", maps)
    yield Step("unshare", ("mount",))


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
