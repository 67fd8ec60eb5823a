"""facilities/figures/plan.py - pure: which files tell the caps in place of the machine's figures.

Those that a cap concerns, and no others: what nobody has capped is the machine's, as Linux tells.
/proc/uptime stays Linux's too, since the start times of processes are counted from there.
"""

from __future__ import annotations

from collections.abc import Iterator

from sandbox_provisioner.plan import Start, Step
from sandbox_provisioner.spec import Limits

MEMORY, CPU = "memory", "cpu"
# What each tells, in the order in which they are opened, by the version of cgroups.
_OF_MEMORY = {
    1: ("memory.usage_in_bytes", "memory.stat", "memory.limit_in_bytes"),
    2: ("memory.current", "memory.stat", "memory.max"),
}
_OF_CPU = {1: "cpuacct.usage", 2: "cpu.stat"}
_OF_SWAP = "memory.swap.current"  # v1 has it in memory.stat


def files(start: Start) -> dict[str, str]:
    """What PID 1 looks at, by the names that `inside` has for it; empty where nothing is told."""
    found: dict[str, str] = {}
    groups = start.site.figure_groups
    if _memory_bytes(start):
        version, group = groups[MEMORY]
        names = ("usage", "stat", "limit")
        found |= {n: f"{group}/{f}" for n, f in zip(names, _OF_MEMORY[version], strict=True)}
        if version == 2 and _swap_bytes(start):
            found["swap"] = f"{group}/{_OF_SWAP}"
    if _cpus(start):
        version, group = groups[CPU]
        found["cpu"] = f"{group}/{_OF_CPU[version]}"
    return found


def open_usage(start: Start) -> Iterator[Step]:
    """While the host's groups can be reached."""
    if found := files(start):
        yield Step("open-figures", tuple(found.values()), "for what the box's /proc tells of them")


def show(start: Start) -> Iterator[Step]:
    """When /proc has what it has of Linux."""
    site, found = start.site, files(start)
    if not found:
        return
    memory, cpus = _memory_bytes(start), _cpus(start)
    words = (str(site.uid), str(site.gid), str(memory), str(_swap_bytes(start)), str(cpus))
    told = [name for name, is_told in (("meminfo", memory), ("cpuinfo, stat, loadavg", cpus))
            if is_told]  # fmt: skip
    why = f"/proc tells the caps: {', '.join(told)}"
    why += ", and so do the CPUs in /sys" if cpus else ""
    yield Step("show-figures", (*words, *found), why)


def _memory_bytes(start: Start) -> int:
    """The most that the box has, 0 without a cap: PID 1 looks at the group's own later."""
    if MEMORY not in start.site.figure_groups:
        return 0
    above = start.site.memory_above
    caps = [limits.memory_bytes for limits in _limits(start)]
    return min(cap for cap in (*caps, above.limit_bytes if above else None) if cap)


def _swap_bytes(start: Start) -> int:
    missing = "swap" in start.site.facts.cgroups.missing
    return 0 if missing else start.request.spec.limits.swap_bytes or 0


def _cpus(start: Start) -> int:
    """How many CPUs the caps come to, 0 without one."""
    if CPU not in start.site.figure_groups:
        return 0
    missing = {name for name in (CPU, "cpuset") if name in start.site.facts.cgroups.missing}
    counts = (limits.without(missing).cpu_count for limits in _limits(start))
    return min((count for count in counts if count), default=0)


def _limits(start: Start) -> tuple[Limits, ...]:
    """Its own, and those of groups that it is in with others of the same person."""
    return start.request.spec.limits, *start.request.sums.values()
