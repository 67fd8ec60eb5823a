"""v1.py - in the launching process: a sandbox's groups in the hierarchies of cgroup v1.

One group per hierarchy, all of the same name. The kernel facts are from the kernel's
admin-guide/cgroup-v1 (memory.rst, cpusets.rst, pids.rst, cpuacct.rst, freezer-subsystem.rst) and
scheduler/sched-bwc.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.facilities.caps.cgroup import files
from sandbox_provisioner.facilities.caps.cgroup.above import UNLIMITED_BYTES, Above, times_full
from sandbox_provisioner.facilities.caps.cgroup.files import Setting
from sandbox_provisioner.facilities.caps.cgroup.survey import V1_CONTROLLERS
from sandbox_provisioner.facilities.caps.cgroup.tree import (
    FREEZE_SECONDS,
    Tree,
    Usage,
    hits_of,
    kill_listed,
)
from sandbox_provisioner.facilities.caps.wish import Cap, Write
from sandbox_provisioner.facilities.caps.wish.cpu import V1_SHARES
from sandbox_provisioner.spec import Limits
from sandbox_provisioner.units import PAGE_BYTES

# "cpu" also without a cap: by its weight, all that spins in sandboxes counts as one process of the
# group above, not as many.
_ALWAYS = frozenset({"memory", "cpu", "cpuacct", "pids", "freezer", "devices"})
# A new cpuset is empty and lets nobody join before it has both.
_CPUSET_FILES = ("cpuset.mems", "cpuset.cpus")


class V1Tree(Tree):
    """The tree of one sandbox on cgroup v1; `open_tree` makes it, `CgroupTree` documents it."""

    version = 1
    _counts_cpu = "cpuacct"
    _delay = 0.0005

    @property
    def groups(self) -> tuple[str, ...]:
        bases = self._facts.bases
        used = (c for c in V1_CONTROLLERS if c in bases and c in _ALWAYS | self._controllers)
        return tuple(dict.fromkeys(self._group_of(controller) for controller in used))

    @property
    def join_files(self) -> tuple[str, ...]:
        """The `tasks` of each group: a process with one thread moves itself through it at once,
        where a move through cgroup.procs waits for an RCU grace period, some 8 ms."""
        return tuple(f"{group}/tasks" for group in self.groups)

    @property
    def memory_group(self) -> tuple[int, str] | None:
        return (1, self._group_of("memory")) if "memory" in self._asked else None

    @property
    def device_group(self) -> tuple[int, str] | None:
        return (1, self._group_of("devices")) if "devices" in self._facts.bases else None

    def _look_above(self) -> Above:
        group = self._group_of("memory") if "memory" in self._facts.bases else ""
        return Above(1 if group else 0, os.path.dirname(group))

    def usage(self) -> Usage:
        limit = self._number("memory", "memory.limit_in_bytes")
        cpu_nanoseconds = self._number("cpuacct", "cpuacct.usage")
        return Usage(
            memory_bytes=self._number("memory", "memory.usage_in_bytes"),
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            memory_limit_bytes=limit if limit is not None and limit < UNLIMITED_BYTES else None,
            cpu_seconds=None if cpu_nanoseconds is None else cpu_nanoseconds / 1e9,
            processes=self._number("pids", "pids.current"),
            oom_kills=self._event("memory", "memory.oom_control", "oom_kill"),
            pids_limit_hits=self._hits("pids"),
        )

    def full_above(self) -> str:
        group = self._group_of("memory") if "memory" in self._facts.bases else ""
        if not group or ("memory" in self._asked and _was_full(group)):
            return ""
        return self._above.full()

    def full_above_too(self) -> str:
        """Limits are met as well where the cache of files gives way, and nobody is ended."""
        return self._above.full_cap()

    def freeze(self) -> None:
        self._write_freezer("FROZEN", "freeze")
        deadline = time.monotonic() + FREEZE_SECONDS
        delay = 0.0005
        # v1 has no event for it, and a process in an uninterruptible call keeps it FREEZING.
        while files.read(self._freezer) != "FROZEN":
            if time.monotonic() >= deadline:
                self.thaw()
                raise self._never_froze()
            time.sleep(delay)
            delay = min(2 * delay, 0.05)

    def thaw(self) -> None:
        self._write_freezer("THAWED", "thaw")

    def is_frozen(self) -> bool:
        try:
            return files.read(self._freezer) == "FROZEN"
        except HostError:
            return False

    def kill(self) -> None:
        """Frozen processes cannot fork away from the list; they die when they are thawed."""
        frozen = False
        with contextlib.suppress(HostError):
            self.freeze()
            frozen = True
        # One that is still on its way in may have joined only some of them.
        for group in self.groups:
            kill_listed(group)
        if frozen:
            self.thaw()

    @property
    def _weight(self) -> tuple[str, str, str]:
        file, smallest, usual = V1_SHARES
        known = "cpu" in self._facts.bases
        return f"{self._group_of('cpu')}/{file}" if known else "", smallest, usual

    async def pause(self, seconds: float) -> None:
        # v1 has no event that a group has become empty, short of release_agent, which is the
        # machine's and not ours.
        self._delay = min(2 * self._delay, 0.1)
        await asyncio.sleep(min(self._delay, seconds))

    def _prepare(self, base: str, directory: str) -> None:
        """Give a group of cpusets what the one above has, but for what it is capped at."""
        if base != self._facts.bases.get("cpuset"):
            return
        limits = self._sums.get(directory.removeprefix(f"{base}/{files.PARENT}/"))
        capped = limits is not None and limits.cpuset is not None
        for file in _CPUSET_FILES[:1] if capped else _CPUSET_FILES:
            above = _text(f"{os.path.dirname(directory)}/{file}")
            # Again where it differs: the group above may have got more since.
            if files.read(f"{directory}/{file}") != above:
                self._own_setting(f"{directory}/{file}", above, "cpuset").apply()

    def _above_of(self, controller: str) -> str:
        return self._facts.bases[controller]

    def _group_of(self, controller: str, name: str = "") -> str:
        return f"{self._facts.bases[controller]}/{files.PARENT}/{name or self._name}"

    def _writes(self, cap: Cap, limits: Limits) -> Iterator[Write]:
        return cap.v1(limits, self._disk)

    def _own_settings(self) -> Iterator[Setting]:
        if "memory" in self._facts.bases:
            path = f"{self._group_of('memory')}/memory.use_hierarchy"
            # Always so since Linux 5.11; before, a group below ours would not have been counted.
            if files.read(path) == "0":
                yield self._own_setting(path, "1", "memory")
        if "cpuset" not in self._facts.bases:
            return
        group = self._group_of("cpuset")
        if group in self.groups:
            for file in _CPUSET_FILES:
                above = _text(f"{os.path.dirname(group)}/{file}")
                yield self._own_setting(f"{group}/{file}", above, "cpuset")

    def _own_setting(self, path: str, value: str, facility: str) -> Setting:
        return Setting(
            path=path,
            value=value,
            attempt=f"make a cgroup for sandbox {self._name}",
            remedy=self._facts.remedy(facility),
        )

    def _number(self, controller: str, file: str) -> int | None:
        known = controller in self._facts.bases
        return files.read_number(f"{self._group_of(controller)}/{file}") if known else None

    def _hits(self, controller: str) -> int | None:
        known = controller in self._facts.bases
        return hits_of(self._group_of(controller)) if known else None

    def _event(self, controller: str, file: str, key: str) -> int | None:
        known = controller in self._facts.bases
        return files.read_keyed(f"{self._group_of(controller)}/{file}").get(key) if known else None

    @property
    def _freezer(self) -> str:
        base = self._facts.bases.get("freezer")
        if base is None:
            raise HostError(
                attempt=f"freeze sandbox {self._name}",
                answer="the controller 'freezer' is not usable here",
                remedy="Mount it: mount -t cgroup -o freezer none /sys/fs/cgroup/freezer",
            )
        return f"{self._group_of('freezer')}/freezer.state"

    def _write_freezer(self, state: str, verb: str) -> None:
        files.write(
            self._freezer,
            state,
            attempt=f"{verb} sandbox {self._name}",
            remedy="It may have ended already.",
        )

    def _never_froze(self) -> HostError:
        return HostError(
            attempt=f"freeze sandbox {self._name}",
            answer=f"{self._freezer} is still FREEZING after {FREEZE_SECONDS:g} seconds",
            remedy="A process waits for a device or a file server; try again when it goes on.",
        )


def _was_full(group: str) -> bool:
    """memory.failcnt stays 0 where the cap on memory plus swap is met, which is as high; the most
    that was used tells then, but for what a CPU takes in one go (64 pages)."""
    if times_full(1, group):
        return True
    peak = files.read_number(f"{group}/memory.max_usage_in_bytes") or 0
    limit = files.read_number(f"{group}/memory.limit_in_bytes")
    return limit is not None and peak + 64 * PAGE_BYTES >= limit


def _text(path: str) -> str:
    return files.read(path) or ""
