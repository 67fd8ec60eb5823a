"""cgroup/tree.py - in the launching process: what a tree of groups is, and what v1 and v2 share.

A sandbox has one *tree*: one group on cgroup v2, one per hierarchy on v1, always called
``sandbox-provisioner/<name>``; or, where systemd makes it, one in a scope (`systemd.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sandbox_provisioner.cgroup import files
from sandbox_provisioner.cgroup.above import Above
from sandbox_provisioner.cgroup.files import Setting
from sandbox_provisioner.cgroup.survey import CgroupFacts
from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.off_loop import off_loop
from sandbox_provisioner.spec import Limits, format_bytes, format_cpuset, parse_cpuset

CPU_PERIOD_US = 100_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
FREEZE_SECONDS = 2.0

# Which fields of `Limits` are the caps of a facility.
_FIELDS = {
    "memory": ("memory_bytes",),
    "cpu": ("cpu_cores", "cpu_guarantee_cores"),
    "cpuset": ("cpuset",),
    "pids": ("pids",),
    "io": ("io_bytes_per_second",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a sandbox uses now and what happened to it; None where the kernel does not tell.

    *memory_limit_bytes* is None without a cap. *oom_kills* is above 0 if the kernel ended processes
    because of the cap on memory; where it ends all at once (v2) it counts one of them twice.
    *pids_limit_hits* counts the forks that it refused.
    """

    memory_bytes: int | None = None
    memory_peak_bytes: int | None = None
    memory_limit_bytes: int | None = None
    cpu_seconds: float | None = None
    pids: int | None = None
    oom_kills: int | None = None
    pids_limit_hits: int | None = None


class CgroupTree(Protocol):
    """The groups of one sandbox. `launch` opens and creates it, `handle` watches and removes it."""

    @property
    def join_files(self) -> tuple[str, ...]:
        """The files to which a process with one thread writes "0" to move itself into the groups;
        known before `create`."""
        ...

    @property
    def memory_group(self) -> tuple[int, str] | None:
        """The version and the group of a cap on memory, to watch it; None without one."""
        ...

    def create(self, limits: Limits, pid: int = 0) -> None:
        """Make the groups with their caps, all or nothing; before the launcher, *pid*, may start.

        The launcher joins by itself, but only systemd can move it out of a login session's group.
        Raises HostError if the kernel refuses one, SpecError for CPUs that are not there.
        """
        ...

    def usage(self) -> Usage:
        """What is used now; all None after `remove`."""
        ...

    def full_above(self) -> str:
        """The group above with a cap on memory, or the machine, in words, which was full when the
        Linux kernel ended processes of ours; "" if ours was."""
        ...

    def freeze(self) -> None:
        """Stop every process, and return when all have stopped (at most 2 seconds); HostError."""
        ...

    def thaw(self) -> None:
        """Let every process go on; HostError."""
        ...

    def is_frozen(self) -> bool:
        """Whether every process is stopped by `freeze`; False where that is not known."""
        ...

    def give_way(self, *, on: bool) -> None:
        """Let everybody else on this machine have the CPU first, or no more so. Where no group of
        ours shares the CPU by weights with others, nothing changes."""
        ...

    def kill(self) -> None:
        """Send SIGKILL to every process, frozen ones and newly forked ones too; does not wait."""
        ...

    def pids(self) -> list[int]:
        """The processes in the tree."""
        ...

    @property
    def string(self) -> int:
        """A descriptor that has to stay open somewhere for the groups to outlive their processes;
        -1 where they do anyway."""
        ...

    def let_go(self) -> None:
        """Leave the groups to whoever has a duplicate of the `string`; they stay as they are."""
        ...

    def take_over(self, string: int) -> None:
        """Own what another process has let go of, by a duplicate of its `string`."""
        ...

    async def remove(self, timeout_seconds: float = 5.0) -> None:
        """Wait until the last process is gone, and remove the groups. Twice is fine.

        Call it after `kill`. Raises HostError if processes are left when the time is over.
        """
        ...


def facilities_asked(limits: Limits) -> list[str]:
    """The facilities of which *limits* has a cap, in a fixed order."""
    return [
        facility
        for facility, fields in _FIELDS.items()
        if any(getattr(limits, name) is not None for name in fields)
    ]


def without(limits: Limits, facilities: Collection[str]) -> Limits:
    """*limits* minus the caps of *facilities*."""
    dropped: dict[str, Any] = {name: None for facility in facilities for name in _FIELDS[facility]}
    return dataclasses.replace(limits, **dropped)


def describe_cap(facility: str, limits: Limits) -> str:
    """The wish in the words of an error: "cap memory at 512 MiB"."""
    if facility == "memory" and limits.memory_bytes is not None:
        return f"cap memory at {format_bytes(limits.memory_bytes)}"
    if facility == "pids":
        return f"cap processes at {limits.pids}"
    if facility == "cpuset" and limits.cpuset is not None:
        return f"confine to CPUs {format_cpuset(limits.cpuset)}"
    if facility == "io" and limits.io_bytes_per_second is not None:
        return f"cap disk traffic at {format_bytes(limits.io_bytes_per_second)} a second"
    if limits.cpu_cores is not None:
        return f"cap CPU time at {_cores(limits.cpu_cores)}"
    return f"guarantee {_cores(limits.cpu_guarantee_cores)} of CPU time"


def _cores(count: float | None) -> str:
    return f"{count or 0:g} core{'' if count == 1 else 's'}"


def check_name(name: str) -> None:
    """Refuse a name that is not one plain directory name; raises SpecError."""
    if not name or name.startswith(".") or not name.isprintable() or "/" in name:
        raise SpecError(
            attempt="name the cgroup of a sandbox",
            answer=f"{name!r} is not a plain directory name",
            remedy="Use letters, digits, dots, dashes and underscores, and no dot in front.",
        )


def same_cpus(written: str, back: str) -> bool:
    """Whether two lists of CPUs mean the same: the kernel answers "0,1" with "0-1"."""
    return bool(back) and parse_cpuset(written) == parse_cpuset(back)


def is_a_line_of(written: str, back: str) -> bool:
    """Whether a file with a line a device has ours."""
    return written in back.splitlines()


def whole_pages(memory_bytes: int) -> str:
    """A cap on memory as the kernel will tell it: it counts pages and rounds down."""
    return str(memory_bytes - memory_bytes % PAGE_BYTES)


class Tree(ABC):
    """What v1 and v2 share: all-or-nothing creation, removal, and names for errors."""

    def __init__(
        self,
        facts: CgroupFacts,
        name: str,
        limits: Limits,
        waived: Collection[str] = (),
        device: str = "",
    ) -> None:
        """*limits* decides which controllers the tree uses, minus the caps of *waived*. *device* is
        the disk, "MAJOR:MINOR", whose traffic is capped."""
        check_name(name)
        self._facts = facts
        self._name = name
        self._device = device
        self._waived = frozenset(waived)
        self._asked = frozenset(facilities_asked(without(limits, self._waived)))
        self._above = self._look_above()

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The directories of the tree, in the order in which they are made."""

    @property
    @abstractmethod
    def memory_group(self) -> tuple[int, str] | None: ...

    @abstractmethod
    def usage(self) -> Usage: ...

    @abstractmethod
    def full_above(self) -> str: ...

    @abstractmethod
    def _look_above(self) -> Above:
        """What memory of ours is a part of, as it is before a start."""

    @abstractmethod
    def freeze(self) -> None: ...

    @abstractmethod
    def thaw(self) -> None: ...

    @abstractmethod
    def is_frozen(self) -> bool: ...

    @abstractmethod
    def kill(self) -> None: ...

    @property
    @abstractmethod
    def _weight(self) -> tuple[str, str, str]:
        """The file of the group's share of the CPU, the smallest value, and the usual one."""

    @abstractmethod
    async def _pause(self, seconds: float) -> None:
        """Wait for a sign that processes have ended, at most *seconds*."""

    @abstractmethod
    def _prepare(self, parent: str) -> None:
        """Make the directory above ours, *parent*, fit for groups."""

    @abstractmethod
    def _available_cpus(self) -> str:
        """The CPUs below which a cpuset has to stay, in the format of cpuset(7)."""

    @abstractmethod
    def _settings(self, limits: Limits) -> Iterator[Setting]:
        """Every value to write, in order."""

    @property
    def join_files(self) -> tuple[str, ...]:
        return tuple(f"{group}/cgroup.procs" for group in self.groups)

    def create(self, limits: Limits, pid: int = 0) -> None:
        kept = without(limits, self._waived)
        if not self._asked.issuperset(facilities_asked(kept)):
            raise ValueError("create() got caps for which open_tree() chose no controllers")
        self._check_cpus(kept)
        with contextlib.ExitStack() as undo:
            self._make_groups(kept, pid, undo)
            for setting in self._settings(kept):
                setting.apply()
            undo.pop_all()

    def give_way(self, *, on: bool) -> None:
        file, smallest, usual = self._weight
        with contextlib.suppress(OSError):
            files.put(file, smallest if on else usual)

    def pids(self) -> list[int]:
        # Of a tree that was only found, some groups may not be below ours: v1 has a place of its
        # own for each controller, and two servers may share one and not another.
        return sorted({pid for group in self.groups for pid in files.read_pids(group)})

    @property
    def string(self) -> int:
        return -1

    def let_go(self) -> None:  # noqa: B027  # directories stay by themselves
        pass

    def take_over(self, string: int) -> None:  # noqa: B027
        pass

    async def remove(self, timeout_seconds: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not await off_loop(self._remove_now):
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._still_busy()
            await self._pause(left)

    def remove_blocking(self, timeout_seconds: float = 5.0) -> None:
        """`remove` for `remove_leftovers`, which has no event loop and nothing else to do."""
        deadline = time.monotonic() + timeout_seconds
        while not self._remove_now():
            if time.monotonic() >= deadline:
                raise self._still_busy()
            time.sleep(0.01)

    def _make_groups(self, limits: Limits, pid: int, undo: contextlib.ExitStack) -> None:
        """Make all groups, without caps yet; *undo* gets what takes them away."""
        for group in self.groups:
            self._make(group)
            undo.callback(files.remove_group, group)

    def _make(self, group: str) -> None:
        base = group.removesuffix(f"/{files.PARENT}/{self._name}")
        files.make_group(
            base,
            self._name,
            attempt=f"make a cgroup for sandbox {self._name}",
            remedy=self._facts.remedy("memory"),
            prepare=self._prepare,
        )

    def _remove_now(self) -> bool:
        # A list, so that a busy group does not keep the others.
        return all([files.remove_group(group) for group in self.groups])

    def _still_busy(self) -> HostError:
        pids = ", ".join(map(str, self.pids())) or "unknown to this pid namespace"
        return HostError(
            attempt=f"remove the cgroup of sandbox {self._name}",
            answer=f"processes are still in {', '.join(self.groups)} (pids: {pids})",
            remedy="See what they wait for (ps -o pid,stat,wchan), then run: jupyter sandbox gc",
        )

    def _check_cpus(self, limits: Limits) -> None:
        if limits.cpuset is None:
            return
        available = self._available_cpus()
        if available and not limits.cpuset <= parse_cpuset(available):
            raise SpecError(
                attempt=self._attempt("cpuset", limits),
                answer=f"the CPUs available here are {available}",
                remedy="Write some of these into cpuset.",
            )

    def _attempt(self, facility: str, limits: Limits) -> str:
        return f"{describe_cap(facility, limits)} for sandbox {self._name}"

    def _setting(self, path: str, value: str, facility: str, limits: Limits) -> Setting:
        return Setting(
            path=path,
            value=value,
            attempt=self._attempt(facility, limits),
            remedy=self._facts.remedy(facility),
            same=same_cpus if path.endswith("/cpuset.cpus") else files.same_text,
        )


class NullTree:
    """The tree where no cgroup is usable and no cap was asked for, or every one was waived."""

    join_files: tuple[str, ...] = ()
    memory_group: tuple[int, str] | None = None
    string = -1

    def __init__(self, facts: CgroupFacts, name: str) -> None:
        check_name(name)
        self._facts = facts
        self._name = name
        self._above = Above(*facts.surroundings)
        self._kills_before = self._kills()

    def create(self, limits: Limits, pid: int = 0) -> None:
        """Nothing to make: `open_tree` has judged the caps."""

    def usage(self) -> Usage:
        """Of the group that we are in ourselves, only what has happened to it since."""
        kills = self._kills()
        return Usage(oom_kills=None if kills is None else kills - (self._kills_before or 0))

    def full_above(self) -> str:
        return self._above.full()

    def _kills(self) -> int | None:
        version, group = self._facts.surroundings
        name = {1: "memory.oom_control", 2: "memory.events"}.get(version, "")
        return files.read_keyed(f"{group}/{name}").get("oom_kill") if name else None

    def freeze(self) -> None:
        raise HostError(
            attempt=f"freeze sandbox {self._name}",
            answer="no cgroup is usable here",
            remedy=self._facts.remedy("memory"),
        )

    def thaw(self) -> None:
        """Nothing can have been frozen."""

    def is_frozen(self) -> bool:
        return False

    def give_way(self, *, on: bool) -> None:
        """No group to weigh."""

    def kill(self) -> None:
        """Nothing to find processes by; the end of the sandbox's PID 1 ends them all."""

    def pids(self) -> list[int]:
        return []

    def let_go(self) -> None:
        """Nothing was made."""

    def take_over(self, string: int) -> None:
        """Nothing was made."""

    async def remove(self, timeout_seconds: float = 5.0) -> None:
        """Nothing was made."""


def kill_listed(group: str) -> None:
    """Send SIGKILL to the processes of *group* until it lists no further one.

    A descriptor of the process comes first and the second look at the list after it: a number that
    was reused by a stranger in between is then no longer in the list (pidfd_open(2)).
    """
    signalled: set[int] = set()
    while new := [pid for pid in files.read_pids(group) if pid not in signalled]:
        for pid in new:
            _kill_member(group, pid)
        signalled.update(new)


def _kill_member(group: str, pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if pid in files.read_pids(group):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)
