"""tree.py - in the launching process: what a tree of groups is, and what v1 and v2 share.

A sandbox has one *tree*: one group on cgroup v2, one per hierarchy on v1, always called
``sandbox-provisioner/<name>``; or, where systemd makes it, one in a scope (`systemd.py`). The name
of one that belongs to a person is ``hub/<person>/<kind>/<id>``, and the groups that it names above
its own may have caps, too: on the sum of what is in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from sandbox_provisioner.errors import HostError, SpecError
from sandbox_provisioner.facilities.caps.cgroup import files
from sandbox_provisioner.facilities.caps.cgroup.above import Above
from sandbox_provisioner.facilities.caps.cgroup.files import Setting
from sandbox_provisioner.facilities.caps.cgroup.survey import CgroupFacts
from sandbox_provisioner.facilities.caps.wish import Cap, Write
from sandbox_provisioner.spec import Limits

FREEZE_SECONDS = 2.0
_NO_SUMS: Mapping[str, Limits] = MappingProxyType({})


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
    processes: int | None = None
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

    @property
    def figure_groups(self) -> Mapping[str, tuple[int, str]]:
        """For "memory" and "cpu", where there is a cap, the version and the group that has it: ours
        or a person's."""
        ...

    @property
    def device_group(self) -> tuple[int, str] | None:
        """The version and the group whose processes Linux may be told what devices to open; None
        without one."""
        ...

    @property
    def is_own(self) -> bool:
        """Whether what it counts happened to processes of the sandbox, and to no others."""
        ...

    def create(self, limits: Limits, pid: int = 0) -> None:
        """Make the groups with their caps, all or nothing; before the launcher, *pid*, may start.

        The launcher joins by itself, but only systemd can move it out of a login session's group.
        Raises HostError if the kernel refuses one, SpecError for CPUs that are not there.
        """
        ...

    def change(self, limits: Limits) -> None:
        """Let the groups, as they run, have the caps that *limits* ask for, and those that these do
        not ask for as they are. HostError, also where more memory is in use than that."""
        ...

    def usage(self) -> Usage:
        """What is used now; all None after `remove`."""
        ...

    def full_above(self) -> str:
        """The group above with a cap on memory, or the machine, in words, which was full when the
        Linux kernel ended processes of ours; "" if ours was."""
        ...

    def full_above_too(self) -> str:
        """Where it was ours that was full, but Linux does not tell at which limit it ended somebody
        (v1): the group above whose limit was met meanwhile, in words; else ""."""
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
    def hold_fd(self) -> int:
        """A descriptor that has to stay open somewhere for the groups to outlive their processes;
        -1 where they do anyway."""
        ...

    def let_go(self) -> None:
        """Leave the groups to whoever has a duplicate of `hold_fd`; they stay as they are."""
        ...

    def own_by(self, hold: int) -> None:
        """Own what another process has let go of, by a duplicate of its `hold_fd`."""
        ...

    def removing(self, timeout_seconds: float = 5.0) -> Iterator[float]:
        """Remove the groups; as long as a process is in one, gives the seconds that are left to
        wait for its end. Twice is fine.

        Call it after `kill`. Raises HostError if processes are left when the time is over.
        """
        ...

    async def pause(self, seconds: float) -> None:
        """Wait for a sign that processes have ended, at most *seconds*."""
        ...


def check_name(name: str) -> None:
    """Refuse a name that is neither one plain directory name nor hub/NAME/KIND/ID of such; raises
    SpecError."""
    top, *below = name.split("/")
    parts = below if top == files.HUB and len(below) == 3 else [name]
    for part in parts:
        plain = part.isprintable() and not part.startswith(".") and "/" not in part
        if not part or not plain or name == files.HUB:
            raise SpecError(
                attempt="name the cgroup of a sandbox",
                answer=f"{part!r} is not a plain directory name",
                remedy="Use letters, digits, dots, dashes and underscores, and no dot in front.",
            )


class Tree(ABC):
    """What v1 and v2 share: all-or-nothing creation, removal, and names for errors."""

    version: int
    #: Which controller counts CPU time.
    _counts_cpu = "cpu"

    def __init__(
        self,
        facts: CgroupFacts,
        name: str,
        asked: Collection[Cap],
        waived: Collection[str] = (),
        disk: str = "",
        sums: Mapping[str, Limits] = _NO_SUMS,
    ) -> None:
        """The caps that are *asked* for, and those of *sums*, decide which controllers the tree
        uses; those of *waived* are dropped from what `create` gets. *disk* is the one of the work
        directory, "MAJOR:MINOR". *sums* are the limits of groups above the tree's own, by their
        names."""
        check_name(name)
        self._facts = facts
        self._name = name
        self._disk = disk
        self._waived = frozenset(waived)
        self._asked = frozenset(cap.facility for cap in asked)
        self._sums = sums
        of_sums = (cap for limits in sums.values() for cap in limits.asked)
        self._controllers = frozenset(cap.controller for cap in (*asked, *of_sums))
        self._above = self._look_above()

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """The directories of the tree, in the order in which they are made."""

    @property
    @abstractmethod
    def memory_group(self) -> tuple[int, str] | None: ...

    @property
    @abstractmethod
    def device_group(self) -> tuple[int, str] | None: ...

    @property
    def figure_groups(self) -> Mapping[str, tuple[int, str]]:
        found = {}
        wanted = ("memory", {"memory"}, "memory"), ("cpu", {"cpu", "cpuset"}, self._counts_cpu)
        for name, facilities, controller in wanted:
            capped = self._capped(facilities)
            if capped is not None and controller in self._facts.bases:
                found[name] = self.version, self._group_of(controller, capped)
        return found

    def _capped(self, facilities: Collection[str]) -> str | None:
        """The name of the nearest group with a cap of one of *facilities*, "" for ours."""
        if self._asked & {*facilities}:
            return ""
        capped = [
            name
            for name, limits in self._sums.items()
            if any(cap.facility in facilities for cap in limits.asked)
        ]
        return max(capped, key=len, default=None)

    @abstractmethod
    def usage(self) -> Usage: ...

    @abstractmethod
    def full_above(self) -> str: ...

    def full_above_too(self) -> str:
        return ""

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
    async def pause(self, seconds: float) -> None: ...

    @abstractmethod
    def _prepare(self, base: str, directory: str) -> None:
        """Make a *directory* above ours, below *base*, fit for groups."""

    @abstractmethod
    def _above_of(self, controller: str) -> str:
        """The directory of the group that tells of a *controller* what ours may have."""

    @abstractmethod
    def _group_of(self, controller: str, name: str = "") -> str:
        """The directory for a *controller* of the group *name*; "" is ours."""

    @abstractmethod
    def _writes(self, cap: Cap, limits: Limits) -> Iterator[Write]:
        """What the *cap* has to write."""

    def _own_settings(self) -> Iterator[Setting]:
        """What groups of this form need in any case."""
        yield from ()

    @property
    def is_own(self) -> bool:
        return True

    @property
    def join_files(self) -> tuple[str, ...]:
        return tuple(f"{group}/cgroup.procs" for group in self.groups)

    def create(self, limits: Limits, pid: int = 0) -> None:
        kept = limits.without(self._waived)
        if not self._asked.issuperset(cap.facility for cap in kept.asked):
            raise ValueError("create() got caps for which open_tree() chose no controllers")
        self._check_above(kept)
        with contextlib.ExitStack() as undo:
            self._make_groups(kept, pid, undo)
            if self._sums:
                self._above = self._look_above()  # only now all of it is there
            for setting in self._settings(kept):
                setting.apply()
            undo.pop_all()

    def change(self, limits: Limits) -> None:
        attempt = f"change limits of sandbox {self._name}"
        groups = {cap: self._known_group(cap, attempt) for cap in limits.asked}
        for cap, group in groups.items():
            told = files.read_keyed(f"{group}/{cap.use}") if cap.use else {}
            if why := cap.below_use(limits, told):
                remedy = "Set more than that, or let it delete variables, or restart it, before."
                raise HostError(attempt=attempt, answer=why, remedy=remedy)
        found = {}
        for cap, group in groups.items():
            for write in self._writes(cap, limits):
                if self._is_due(write, group):
                    setting = self._setting(f"{group}/{write.file}", write, cap, limits)
                    found[setting.path] = setting
        files.apply_again(found.values())

    def _known_group(self, cap: Cap, attempt: str) -> str:
        """Ours, where it has the controller of *cap*."""
        group = self._group_of(cap.controller) if cap.controller in self._facts.bases else ""
        if not group or not os.path.isdir(group):
            raise HostError(
                attempt=attempt,
                answer=f"it was started without a group for its {cap.noun}",
                remedy=f"Start it anew with {cap.options[0]}.",
            )
        return group

    def give_way(self, *, on: bool) -> None:
        file, smallest, usual = self._weight
        with contextlib.suppress(OSError):
            files.put(file, smallest if on else usual)

    def pids(self) -> list[int]:
        # Of a tree that was only found, some groups may not be below ours: v1 has a place of its
        # own for each controller, and two servers may share one and not another.
        return sorted({pid for group in self.groups for pid in files.read_pids(group)})

    @property
    def hold_fd(self) -> int:
        return -1

    def let_go(self) -> None:  # noqa: B027  # directories stay by themselves
        pass

    def own_by(self, hold: int) -> None:  # noqa: B027
        pass

    def removing(self, timeout_seconds: float = 5.0) -> Iterator[float]:
        deadline = time.monotonic() + timeout_seconds
        while not self._remove_now():
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._still_busy()
            yield left

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
            prepare=partial(self._prepare_with_caps, base),
        )

    def _prepare_with_caps(self, base: str, directory: str) -> None:
        """A group that has a sum to hold has it before anything is made in it: whoever makes a
        group there writes it, since whoever made the directory may not have come so far.

        Beside a server of the person's, whose hub has set it, a kernel makes it no wider: a policy
        that the broker has read may allow more."""
        self._prepare(base, directory)
        name = directory.removeprefix(f"{base}/{files.PARENT}/")
        if limits := self._sums.get(name):
            is_kernels = self._name.startswith(f"{name}/kernels/")
            keeps = is_kernels and os.path.isdir(f"{directory}/server")
            files.apply_again(
                setting
                for setting in self.settings_of_sum(name, limits)
                if os.path.dirname(setting.path) == directory and not (keeps and setting.is_kept())
            )

    def settings_of_sum(self, name: str, limits: Limits) -> Iterator[Setting]:
        """What has to be written so that the group *name* above ours holds all in it to *limits*,
        together."""
        for cap in limits.asked:
            group = self._group_of(cap.controller, name)
            for write in self._writes(cap, limits):
                text = write.text if write.shared is None else write.shared
                if text and self._is_due(write, group):
                    yield Setting(
                        path=f"{group}/{write.file}",
                        value=text,
                        attempt=f"{cap.describe(limits)} for all in {name} together",
                        remedy=self._facts.remedy(cap.facility),
                        same=write.same,
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

    def _check_above(self, limits: Limits) -> None:
        for cap in limits.asked:
            file = cap.above.get(self.version)
            above = files.read(f"{self._above_of(cap.controller)}/{file}") if file else None
            if beyond := cap.beyond(limits, above or ""):
                answer, remedy = beyond
                raise SpecError(attempt=self._attempt(cap, limits), answer=answer, remedy=remedy)

    def _settings(self, limits: Limits) -> Iterator[Setting]:
        """Every value to write, in order; of two for one file the later one."""
        found = {setting.path: setting for setting in self._own_settings()}
        for cap in limits.asked:
            group = self._group_of(cap.controller)
            for write in self._writes(cap, limits):
                if self._is_due(write, group):
                    setting = self._setting(f"{group}/{write.file}", write, cap, limits)
                    found[setting.path] = setting
        yield from found.values()

    def _is_due(self, write: Write, group: str) -> bool:
        if write.unless and files.read(f"{group}/{write.unless}") is not None:
            return False
        return not write.optional or files.read(f"{group}/{write.file}") is not None

    def _setting(self, path: str, write: Write, cap: Cap, limits: Limits) -> Setting:
        return Setting(
            path=path,
            value=write.text,
            attempt=self._attempt(cap, limits),
            remedy=self._facts.remedy(cap.facility),
            same=write.same,
        )

    def _attempt(self, cap: Cap, limits: Limits) -> str:
        return f"{cap.describe(limits)} for sandbox {self._name}"


class NullTree:
    """The tree where no cgroup is usable and no cap was asked for, or every one was waived."""

    join_files: tuple[str, ...] = ()
    memory_group: tuple[int, str] | None = None
    figure_groups: Mapping[str, tuple[int, str]] = MappingProxyType({})
    device_group: tuple[int, str] | None = None
    is_own = False
    hold_fd = -1

    def __init__(self, facts: CgroupFacts, name: str) -> None:
        check_name(name)
        self._facts = facts
        self._name = name
        self._above = Above(*facts.surroundings)
        self._kills_before = self._kills()

    def create(self, limits: Limits, pid: int = 0) -> None:
        """Nothing to make: `open_tree` has judged the caps."""

    def change(self, limits: Limits) -> None:
        """There is nothing that could be capped."""
        raise HostError(
            attempt=f"change limits of sandbox {self._name}",
            answer="no cgroup is usable here",
            remedy=self._facts.remedy("memory"),
        )

    def usage(self) -> Usage:
        """Of the group that we are in ourselves, only what has happened to it since."""
        kills = self._kills()
        return Usage(oom_kills=None if kills is None else kills - (self._kills_before or 0))

    def full_above(self) -> str:
        return self._above.full()

    def full_above_too(self) -> str:
        """Nothing of ours can have been full."""
        return ""

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

    def own_by(self, hold: int) -> None:
        """Nothing was made."""

    def removing(self, timeout_seconds: float = 5.0) -> Iterator[float]:
        """Nothing was made."""
        return iter(())

    async def pause(self, seconds: float) -> None:
        """There is nothing to tell it by."""
        await asyncio.sleep(min(0.01, seconds))


def hits_of(group: str) -> int | None:
    """How often *group* had as many processes as it may. v1, and v2 before Linux 6.11, also count
    what a group above has refused (kernel/cgroup/pids.c, pids_event): *group* itself never had as
    many then."""
    hits = files.read_keyed(f"{group}/pids.events").get("max")
    most = files.read_number(f"{group}/pids.peak")  # since Linux 6.1
    limit = files.read_number(f"{group}/pids.max")
    was_full = most is None or (limit is not None and most >= limit)
    return hits if was_full or hits is None else 0


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
