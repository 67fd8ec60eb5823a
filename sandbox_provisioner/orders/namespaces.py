"""orders/namespaces.py - pure: THE order of a start in namespaces, as one list.

This list is the theory of operation. Whether a start is cold, comes from a nursery, or is bound to
a spare, its steps come in this order; what differs is who performs a line::

    cold      a launcher; PID 1, which it forks; the kernel, which PID 1 forks
    nursery   the same, but without a work directory, and with a nursery as the program
    fork      a nursery's child is PID 1 from the beginning. What needs the server's rights, or
              touches the host, a launcher opens meanwhile, and hands over
    spare     the same, up to what only one notebook's start knows
    claim     the rest of it: a launcher opens the work directory and volumes, PID 1 of the spare
              attaches them, and lets the kernel go on

Before "pivot" the host's files can be reached, after it nothing of them: what comes then is in
descriptors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from sandbox_provisioner.facilities.caps import plan as caps
from sandbox_provisioner.facilities.devices import plan as devices
from sandbox_provisioner.facilities.environment import plan as environment
from sandbox_provisioner.facilities.environment.plan.variables import files_from_caps
from sandbox_provisioner.facilities.figures import plan as figures
from sandbox_provisioner.facilities.ids import plan as ids
from sandbox_provisioner.facilities.layer import plan as layer
from sandbox_provisioner.facilities.namespaces import plan as namespaces
from sandbox_provisioner.facilities.network import plan as network
from sandbox_provisioner.facilities.process import plan as process
from sandbox_provisioner.facilities.rights import plan as rights
from sandbox_provisioner.facilities.root import plan as root
from sandbox_provisioner.facilities.root.facts import IMAGE
from sandbox_provisioner.facilities.sockets import plan as sockets
from sandbox_provisioner.facilities.storage import plan as storage
from sandbox_provisioner.facilities.volumes import plan as volumes
from sandbox_provisioner.facilities.workdir import plan as workdir
from sandbox_provisioner.orders.variables import variables_for
from sandbox_provisioner.plan import Kind, Plan, Start, Step

LAUNCHER, INIT, KERNEL, NOBODY = "L", "1", "K", "-"


def receive_places(start: Start) -> Iterator[Step]:
    """What was opened for this one start; a cold one has all that it is given from here on."""
    names = tuple(f"place:{target}" for target, _ in start.site.places)
    names += (f"mount:{IMAGE}",) if start.site.root.kind else ()
    names += (*storage.receive(start), *layer.receive(start))
    if start.kind in {Kind.COLD, Kind.NURSERY}:
        names += tuple(start.site.held)
    if names:
        yield Step("receive", names, "opened and judged before; no path is looked up again")


def find_places_again(start: Start) -> Iterator[Step]:
    """For an ordinary user, who takes mounts in a mount namespace of its own."""
    if start.site.facts.privileged:
        return
    for target, place in start.site.places:
        why = "of the mounts that we now have a copy of; it must be the very same file"
        remedy = "Start again when nobody moves or replaces it."
        yield Step("find-again", (target, place.source), why, remedy)


def receive_groups(start: Start) -> Iterator[Step]:
    """The files of its groups, and what the server gives it besides: a spare what claims it."""
    names = ("group",) * len(start.site.join_files)
    yield Step("receive", (*names, *start.site.held), "opened by the server")


def receive_opened(start: Start) -> Iterator[Step]:
    """What the launcher's lines of this very list have opened, in their order; where a spare is
    claimed, with what the server gives it besides."""
    names = tuple(_opened_by(steps_of(start, LAUNCHER)))
    if start.kind is Kind.CLAIM:
        names += tuple(start.site.held)
    yield Step("receive", names, "opened by a launcher that could")


_TAKING = {"take", "take-place", "take-mount", "take-device", "make-devices"}


def _opened_by(steps: Iterable[Step]) -> Iterator[str]:
    """In the order of `hand_over`: mounts come last."""
    mounts = list[str]()
    for step in steps:
        if step.verb == "exit-file":
            yield "exit-file"
        elif step.verb == "open-memory":
            yield from ("memory",) * caps.MEMORY_FILES[int(str(step.words[0]))]
        elif step.verb == "open-figures":
            yield from ("figures",) * len(step.words)
        elif step.verb == "take-all":
            mounts += map(str, step.words[1:])
        elif step.verb in _TAKING:
            mounts.append(str(step.words[0]))
    yield from mounts


def set_variables(start: Start) -> Iterator[Step]:
    """Facilities tell programs of themselves by variables: so it is put together here."""
    yield environment.variables_step(start, variables_for(start.request, start.site))


def tell_caps(start: Start) -> Iterator[Step]:
    """By files what the variables tell: in a nursery, whose own caps are others, its kernels'."""
    for path, text in files_from_caps(variables_for(start.request, start.site)).items():
        yield Step("file", (path, text), "for programs that look for their caps there")


def clean_layer(start: Start) -> Iterator[Step]:
    """For the files that come next, whoever has them."""
    lines = (
        ids.files(start), network.files(start), tell_caps(start), root.apt_settings(start),
        devices.links(start),
    )  # fmt: skip
    steps = [step for line in lines for step in line]
    own, kept, links = (
        [str(step.words[0]) for step in steps if step.verb == verb]
        for verb in ("file", "file-if-none", "symlink")
    )
    yield from root.clean(start, own, kept, links)


# cold, nursery, fork, spare, claim: who performs the line. L: a launcher, with the server's rights;
# 1: PID 1; K: the kernel, after PID 1 forked it; -: nobody.
ORDER: tuple[tuple[str, Callable[[Start], Iterable[Step]]], ...] = (
    ("L L L L L", receive_places),
    ("- - 1 1 -", receive_groups),
    ("L L L L -", process.exit_file),
    ("L L - - -", caps.join),
    ("- - 1 1 -", caps.join_opened),
    ("L - L L -", caps.open_memory),
    ("L - L L -", figures.open_usage),
    ("L L - - -", caps.oom_score),
    ("L L - - -", caps.limit_maker),
    # An ordinary user has rights over mounts from here on.
    ("L - - - -", ids.make),
    ("- L - - -", ids.make_for_nursery),
    ("- - L L L", ids.have_rights_over_mounts),
    ("L - - - -", caps.limit_ids),
    ("L - - - -", ids.make_for_root_as_user),
    ("L L - - -", namespaces.unshare_as_user),
    ("- - L L L", namespaces.unshare_mounts),
    ("- - 1 1 -", namespaces.unshare_as_init),
    ("L L L L L", find_places_again),
    ("L L L L L", ids.map_owners),
    ("L L L L -", root.take_image),
    ("L - L L -", storage.mount),
    ("L L 1 1 -", root.take),
    ("L L 1 1 -", environment.take),
    ("L L - - -", network.take),
    ("L - L - L", workdir.take),
    ("L - L - L", volumes.take),
    ("L - L L -", layer.take),
    ("L - L L -", devices.take),
    ("L - L L -", sockets.take),
    # Whatever of the host is opened for a start has been by now.
    ("L L L L -", devices.limit),
    # A root server has none from here on.
    ("L L - - -", ids.enter),
    ("L - - - -", ids.make_for_root_as_root),
    ("L L - - -", namespaces.unshare_as_root),
    ("- - L L -", ids.map_child),
    ("- - L L L", process.hand_over),
    ("- - 1 1 -", process.await_opened),
    ("- - 1 1 1", receive_opened),
    ("- - 1 1 -", ids.become_inside),
    ("L L - - -", namespaces.fork_init),
    ("1 - 1 1 -", caps.watch_memory),
    ("1 1 1 1 -", namespaces.new_session),
    ("1 1 1 1 -", root.new),
    ("1 - 1 1 -", clean_layer),
    ("1 1 1 1 -", ids.files),
    ("1 1 1 1 -", network.files),
    ("1 1 1 1 -", tell_caps),
    ("1 - - - -", root.apt_settings),
    ("1 1 1 1 -", devices.links),
    ("1 1 1 1 -", root.merge),
    ("1 1 1 1 -", root.system_files),
    ("1 1 1 1 -", root.devices),
    ("1 - 1 1 -", devices.attach),
    ("1 1 1 1 -", root.proc),
    ("1 - 1 1 -", caps.limit_settings),
    ("1 - 1 1 -", root.hide_of_proc),
    ("1 - 1 1 -", figures.show),
    ("1 1 1 1 -", root.scratch),
    ("1 - 1 1 -", layer.attach),
    ("1 1 - - -", network.attach),
    ("1 1 1 1 -", root.pivot),
    ("1 - 1 - -", environment.attach_around_workdir),
    ("1 - 1 - 1", workdir.attach),
    ("1 - 1 - 1", workdir.cover),
    ("1 - 1 - 1", root.watch_workdir),
    ("1 1 1 1 -", environment.attach_with_volumes),
    ("- - - - 1", volumes.attach),
    ("1 - 1 - 1", volumes.freeze_unmapped),
    ("1 - 1 1 -", sockets.attach),
    ("1 - 1 1 1", sockets.connection_file),
    ("1 - 1 1 -", sockets.seal),
    ("1 1 1 - 1", root.close),
    ("- - - 1 -", process.stay_unclaimed),
    ("1 1 1 1 -", namespaces.hostname),
    ("1 1 1 1 -", network.bring_up),
    ("1 - 1 - 1", network.hand_out),
    ("1 1 1 - 1", process.survive_server),
    ("- 1 - - -", process.outlive_kernel),
    ("1 1 1 1 -", process.stdio),
    ("1 - - - -", ids.stand_aside),
    ("1 - - - -", rights.answer_modes),
    ("1 1 1 1 -", process.fork_kernel),
    ("K - K K -", process.terminal),
    ("K - K K -", caps.limit_kernel),
    ("K - K K -", process.umask),
    ("K - - - -", ids.join_for_root),
    ("K K K K -", rights.become),
    ("K K K K -", environment.own_packages),
    ("K K K K 1", set_variables),
    ("K K K K -", process.chdir),
    ("K - K K -", rights.filter_kernel),
    ("- K - - -", rights.filter_nursery),
    ("K K - - -", process.execute),
    ("- - K K -", process.run_kernel),
    ("- - - - 1", process.bind_kernel),
)


def steps_of(start: Start, who: str) -> Iterator[Step]:
    """The steps of *start* that are *who*'s, in their order."""
    for performers, line in ORDER:
        if performers.split()[start.kind] in who:
            yield from line(start)


def whole(start: Start) -> Plan:
    """The plan of a start that one launcher begins."""
    return Plan(tuple(steps_of(start, LAUNCHER + INIT + KERNEL)))


def opening(start: Start) -> Plan:
    """What a launcher does for PID 1 of a nursery's kernel."""
    return Plan(tuple(steps_of(start, LAUNCHER)))


def inside(start: Start) -> Plan:
    """What that one does."""
    return Plan(tuple(steps_of(start, INIT + KERNEL)))


def check(start: Start) -> None:
    """Raise what no plan can do at this site: HostError, SpecError."""
    if start.site.facts.obstacle:
        raise start.site.facts.obstacle
    ids.check(start)
    network.check(start)
    layer.check(start)
    workdir.check(start)
    volumes.check(start.site)


def cold(start: Start) -> Plan:
    """`whole`, for a kernel; HostError or SpecError if this host cannot do it as asked."""
    assert start.kind is Kind.COLD
    check(start)
    return whole(start)
