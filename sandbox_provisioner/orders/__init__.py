"""orders/ - pure: in which order the steps of all facilities come, one list for each confinement.

::

    namespaces.py   the list for namespaces(7), with who performs each line of it
    landlock.py     the list for places that have none
    variables.py    the kernel's environment, to which several facilities add
"""

from __future__ import annotations

from dataclasses import replace

from sandbox_provisioner.facilities.caps import plan as caps
from sandbox_provisioner.facilities.landlock import plan as landlock_plan
from sandbox_provisioner.facilities.network import plan as network
from sandbox_provisioner.facilities.rights import plan as rights
from sandbox_provisioner.facilities.root import plan as root
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.orders import landlock, namespaces
from sandbox_provisioner.plan import Kind, LaunchRequest, NurseryPids, Plan, Site, Start, Step
from sandbox_provisioner.spec import Confinement


def compile_for(request: LaunchRequest, site: Site) -> Plan:
    """The plan of a cold start in the confinement that *request* names; never another one in its
    place. HostError or SpecError if this host cannot do it as asked."""
    start = Start(request, site)
    if request.spec.confinement is Confinement.LANDLOCK:
        return landlock.cold(start)
    return namespaces.cold(start)


def compile_nursery(request: LaunchRequest, site: Site) -> Plan:
    """The plan for a nursery; *request* names its program, *site* has no work directory."""
    return namespaces.whole(Start(request, site, Kind.NURSERY))


def compile_fork(request: LaunchRequest, site: Site) -> Plan:
    """What a nursery's child does for *request*; `compile_opening` is the other part."""
    start = Start(request, site, Kind.FORK)
    namespaces.check(start)
    return namespaces.inside(start)


def compile_opening(request: LaunchRequest, site: Site, family: NurseryPids) -> Plan:
    """The plan for the launcher that opens what a nursery's child, or a spare, waits for."""
    start = Start(request, replace(site, family=family), Kind.FORK)
    return namespaces.opening(start)


def compile_spare(request: LaunchRequest, site: Site) -> Plan:
    """What a nursery's child does to become a spare, which ends if nobody claims it for
    ``site.idle_seconds``. With the plan come `Site.held`."""
    start = Start(request, site, Kind.SPARE)
    namespaces.check(start)
    return namespaces.inside(start)


def compile_claim(request: LaunchRequest, site: Site) -> tuple[Plan, Plan]:
    """What is left to do where a spare is bound to *request*: for a launcher, and for its PID 1."""
    start = Start(request, site, Kind.CLAIM)
    namespaces.check(start)
    return namespaces.opening(start), namespaces.inside(start)


def compile_served_image(facts: HostFacts, program: str) -> Plan:
    """What a launcher does so that *program* reads an image file for an ordinary user, whatever is
    in that file: it can do nothing but that."""
    maps = f"{facts.caller.uid} {facts.caller.uid} 1", f"{facts.caller.gid} {facts.caller.gid} 1"
    steps = (
        Step("receive", (f"place:{root.IMAGE_FILE}",)),
        Step("unshare-user-namespace", maps),
        Step("unshare", ("mount", "network", "ipc", "uts", "cgroup")),
        *root.mount_served(facts),
        *caps.limit_program(),
        *landlock_plan.read_alone(facts, root.IMAGE_FILE),
        Step("renounce"),
        rights.filter_program(facts),
        *root.serve(facts, program),
        Step("hand-over"),
    )
    return Plan(steps)


def compile_mapped_mount(target: str, uid_map: str, gid_map: str) -> Plan:
    """What a launcher does to hand out a mount of the place for *target*, whose ids are mapped."""
    steps = (
        Step("receive", (f"place:{target}",)),
        Step("make-user-namespace", ("mapped", uid_map, gid_map)),
        Step("take-place", (target, "idmap=mapped", "nosuid", "nodev")),
        Step("hand-over"),
    )
    return Plan(steps)


def compile_network_trial(facts: HostFacts) -> Plan:
    """What a launcher tries, for nobody, that a kernel with a gateway needs of this Linux."""
    maps = f"0 {facts.caller.uid} 1", f"0 {facts.caller.gid} 1"
    steps = (
        Step("unshare-user-namespace", maps),
        Step("unshare", ("network",)),
        *network.trial(ipv6=facts.machine.ipv6),
        Step("hand-over"),
    )
    return Plan(steps)
