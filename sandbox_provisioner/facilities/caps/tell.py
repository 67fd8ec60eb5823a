"""facilities/caps/tell.py - pure: which caps can be had, what they come to, and do."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.checks import Check, Findings, State, lines
from sandbox_provisioner.errors import joined
from sandbox_provisioner.facilities.caps.cgroup import allows_less, narrowest_bound
from sandbox_provisioner.facilities.caps.cgroup.remedies import FAVOR_MOVES
from sandbox_provisioner.facilities.caps.plan import beyond_memory, enforced, interrupt_share
from sandbox_provisioner.facilities.caps.wish import CAPS, Cap
from sandbox_provisioner.host import HostFacts
from sandbox_provisioner.inside import wire
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.told import EndCause, EndKind, Subject
from sandbox_provisioner.units import format_bytes

CORE_PATTERN = "kernel.core_pattern"
_FAVORS_MOVES = 6, 0  # before, no move waits

ENDS = (
    EndCause(
        EndKind.MEMORY_CAP,
        "{name} was killed: it reached its memory limit of {limit}{peak}. Raise "
        "mem_limit, or work on less data at once.",
        wire.MEMORY_CAP,
    ),
    EndCause(
        EndKind.SURROUNDINGS_MEMORY,
        "{name} was killed{used}: {full_above} was full, which it shares "
        "with other programs. Ask who manages it for more, or end some of them.",
    ),
    EndCause(
        EndKind.PROCESSES_CAP,
        "{name} ended just after it was refused another process or thread: it "
        "has as many as pids_limit allows. Raise pids_limit, or start fewer at once.",
    ),
    EndCause(
        EndKind.INTERRUPTED,
        "{name} ended when it was interrupted close to its memory limit of "
        "{limit}. Raise mem_limit, or set mem_interrupt to 0 for a kernel that ends at every "
        "interrupt.",
        wire.INTERRUPTED,
    ),
    EndCause(
        EndKind.GROUP_LOST,
        "{name} was ended: another program has removed its control group, and with "
        "it its limits. Look for who manages the groups of this machine, then start it again.",
        wire.GROUP_LOST,
    ),
)
# To the person at the notebook, while the kernel lives.
REFUSED = (
    "The kernel was refused another process or thread: it has as many as pids_limit allows. What "
    "needs more fails, or waits for ever. End some of them, or raise pids_limit."
)


def _interrupted(used: str, of: Subject) -> str:
    if not used.isdecimal():
        return ""
    limit = format_bytes(of.memory_limit_bytes)
    return (
        f"{of.who} was interrupted: it uses {format_bytes(int(used))} of its "
        f"memory limit of {limit}."
    )


def _child_killed(count: str, of: Subject) -> str:
    if not count.isdecimal():
        return ""
    limit = format_bytes(of.memory_limit_bytes)
    why = f"together they reached the memory limit of {limit}"
    return f"A child process of {of.whom} was killed: {of.full_above or why}."


NOTICES = {wire.MEMORY: _interrupted, wire.KILLED: _child_killed}


def caps(found: Findings) -> Iterator[Check]:
    """Each cap, and where its groups are."""
    yield from (_cap(cap, found.host) for cap in CAPS)


def _cap(cap: Cap, host: HostFacts) -> Check:
    facility = cap.facility
    reason = host.cgroups.missing.get(facility)
    name = f"{facility} cap"
    if reason is None:
        base = host.cgroups.bases.get(cap.controller, "")
        found = f"cgroup v{host.cgroups.version} in {base}"
        if host.cgroups.manager:
            found += f", scopes by systemd's {host.cgroups.manager} manager"
        return Check(facility=name, state=State.OK, found=found)
    return Check(
        facility=name,
        state=State.MISSING,
        found=reason,
        effect=f"Kernels that set {' or '.join(cap.options)} do not start{cap.otherwise}. "
        f'With on_missing = {{"{facility}": "warn"}} all start.',
        remedy=lines(host.cgroups.remedy(facility)),
    )


def joining(found: Findings) -> Iterator[Check]:
    """Whether each start waits until Linux has moved its process into a group."""
    cgroups = found.host.cgroups
    if cgroups.version != 2 or cgroups.favors_moves or found.host.machine.kernel < _FAVORS_MOVES:
        return
    yield Check(
        facility="joining a group",
        state=State.NOTE,
        found="cgroup v2 without the mount option favordynmods",
        effect="Each start waits 8 to 16 ms for Linux, which moves a process into a group as if "
        "that were rare.",
        remedy=lines(FAVOR_MOVES),
    )


def core_dumps(found: Findings) -> Check:
    """Who receives them."""
    pattern = found.sysctls.get(CORE_PATTERN, "")
    if not pattern.startswith("|"):
        return Check(facility="core dumps", state=State.OK, found=f"core_pattern is {pattern!r}")
    return Check(
        facility="core dumps",
        state=State.NOTE,
        found=f"a program of the host receives them: {pattern[1:].split()[0]}",
        effect="Not from sandboxes: they switch core dumps off (RLIMIT_CORE = 1).",
    )


def memory_words(limits: Limits, facts: HostFacts) -> str:
    """What mem_limit comes to on this machine."""
    if limits.memory_bytes is None:
        return "Without mem_limit nothing but the machine caps a kernel's memory."
    text = f"mem_limit is {format_bytes(limits.memory_bytes)} here"
    if enforced(limits, facts).memory_bytes is None:
        return f"{text}, by default, and is given up: {facts.cgroups.missing['memory']}."
    less = allows_less(limits.memory_bytes, narrowest_bound(facts.cgroups))
    return " ".join(filter(None, (f"{text}.", less, _interrupt(limits, facts))))


def _interrupt(limits: Limits, facts: HostFacts) -> str:
    share, beyond = interrupt_share(limits, facts), beyond_memory(limits, facts)
    if share is None and beyond:
        return f"The kernel is not interrupted before it, since it has {joined(beyond)} beyond it."
    if share is None:
        return (
            "The kernel is not interrupted before it: by default only IPython's is, whose cell "
            "then fails."
        )
    return f"At {share:g} of it the cell is interrupted."
