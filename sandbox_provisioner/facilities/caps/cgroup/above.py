"""above.py - in the launching process, reads only: the groups above ours, whose memory ours
is a part of.

A hub, Slurm or a container engine may cap them below what a kernel's own limit says, and the Linux
kernel counts an OOM kill where the process is, whoever had no memory left. So what each group above
counts of its own fullness is read before a start and after the end::

    v1   memory.failcnt, memory.memsw.failcnt     how often the group's limit was met
    v2   oom in memory.events.local               how often it was met in vain
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox_provisioner.facilities.caps.cgroup import files
from sandbox_provisioner.facilities.caps.cgroup.survey import CgroupFacts
from sandbox_provisioner.units import format_bytes

# Where v1 has no cap it tells the largest number of bytes in whole pages.
UNLIMITED_BYTES = 1 << 62

_LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}
_USAGES = {
    1: ("memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.current", "inactive_file"),
}
# What every group of the memory controller has, its root too.
_MARKS = {1: "memory.failcnt", 2: "cgroup.controllers"}
# A person's, below which are the groups of what runs for him.
_OF_PERSON = re.compile(rf"/{files.PARENT}/{files.HUB}/(?P<name>[^/]+)(/(?P<kind>[^/]+))?$")
_MACHINE = "the machine's memory"
_UNSEEN = "the memory of the machine, or of a group around it that cannot be seen from here,"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A group above with a cap on memory."""

    group: str
    limit_bytes: int

    def __str__(self) -> str:
        """Before "was full": whose limit it is."""
        limit = format_bytes(self.limit_bytes)
        if of_person := _OF_PERSON.search(self.group):
            name, kind = of_person["name"], of_person["kind"]
            whose = f"all of {name}'s {kind}" if kind else f"all that {name} runs here"
            return f"the memory of {whose} together, for which a limit of {limit} is set,"
        return f"the group {self.group}, with a memory limit of {limit},"


def narrowest_bound(facts: CgroupFacts) -> Bound | None:
    """The smallest cap on memory of the group that ours go below, and of those above it; where we
    can make none, of the one that we are in."""
    version, group = facts.surroundings
    if base := facts.bases.get("memory", ""):
        version, group = facts.version, base
    found = [bound for path in _upwards(version, group) if (bound := bound_of(version, path))]
    return min(found, key=lambda bound: bound.limit_bytes, default=None)


def allows_less(limit_bytes: int | None, above: Bound | None) -> str:
    """A sentence where *above*, the narrowest, is a smaller cap than *limit_bytes*; else ""."""
    if above is None or above.limit_bytes >= (limit_bytes or 0):
        return ""
    return (
        f"mem_limit is {format_bytes(limit_bytes or 0)}, but the group {above.group} above allows "
        f"{format_bytes(above.limit_bytes)} to all in it together."
    )


def bound_of(version: int, group: str) -> Bound | None:
    """The cap on memory that *group* itself has."""
    limit = files.read_number(f"{group}/{_LIMITS[version]}")
    if limit is None or limit >= UNLIMITED_BYTES:
        return None
    return Bound(group=group, limit_bytes=limit)


def free_bytes(facts: CgroupFacts) -> int | None:
    """How much memory is left below the narrowest bound, what the Linux kernel has read of files
    and can forget counted as free; None without a bound."""
    if (above := narrowest_bound(facts)) is None:
        return None
    version = facts.version if facts.bases.get("memory", "") else facts.surroundings[0]
    used, inactive = _USAGES[version]
    forgettable = files.read_keyed(f"{above.group}/memory.stat").get(inactive, 0)
    return above.limit_bytes - (files.read_number(f"{above.group}/{used}") or 0) + forgettable


def times_full(version: int, group: str) -> int:
    """How often the limit of *group* itself was met."""
    if version == 1:
        counters = ("memory.failcnt", "memory.memsw.failcnt")
        return sum(files.read_number(f"{group}/{name}") or 0 for name in counters)
    # memory.events also counts for groups below it.
    for name in ("memory.events.local", "memory.events"):
        events = files.read_keyed(f"{group}/{name}")
        if "oom" in events:
            return events["oom"]
    return 0


class Above:
    """*group* and those above it, from now on."""

    def __init__(self, version: int, group: str) -> None:
        self._version = version
        self._groups = tuple(_upwards(version, group))
        self._before = {path: times_full(version, path) for path in self._groups}

    def full(self) -> str:
        """The nearest one with a cap that was met since, or else the machine, in words."""
        if capped := self.full_cap():
            return capped
        # The true root is the one without cgroup.type (admin-guide/cgroup-v2.rst).
        top = self._groups[-1] if self._groups else ""
        seen = self._version == 1 or not os.path.exists(f"{top}/cgroup.type")
        return _MACHINE if seen else _UNSEEN

    def full_cap(self) -> str:
        """The nearest one with a cap that was met since, in words; "" if there is none."""
        for path, before in self._before.items():
            bound = bound_of(self._version, path)
            if bound and times_full(self._version, path) > before:
                return str(bound)
        return ""


def _upwards(version: int, group: str) -> Iterator[str]:
    """*group* and those above it, without what is not made yet; none for version 0."""
    if not version:
        return
    while not (known := os.path.exists(f"{group}/{_MARKS[version]}")) and len(group) > 1:
        group = os.path.dirname(group)
    while known:
        yield group
        group = os.path.dirname(group)
        known = os.path.exists(f"{group}/{_MARKS[version]}")
