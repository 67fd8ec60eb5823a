"""cgroup/v1.py - in the launching process: a sandbox's groups in the hierarchies of cgroup v1.

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
from dataclasses import replace

from sandbox_provisioner.cgroup import files
from sandbox_provisioner.cgroup.above import UNLIMITED_BYTES, Above, times_full
from sandbox_provisioner.cgroup.files import Setting
from sandbox_provisioner.cgroup.survey import V1_CONTROLLERS
from sandbox_provisioner.cgroup.tree import (
    CPU_PERIOD_US,
    FREEZE_SECONDS,
    PAGE_BYTES,
    Tree,
    Usage,
    is_a_line_of,
    kill_listed,
    whole_pages,
)
from sandbox_provisioner.errors import HostError
from sandbox_provisioner.spec import Limits, format_cpuset

_SHARES_PER_CORE = 1024
_SMALLEST_SHARES, _LARGEST_SHARES = 2, 1 << 18

# "cpu" also without a cap: by its weight, all that spins in sandboxes counts as one process of the
# group above, not as many.
_ALWAYS = frozenset({"memory", "cpu", "cpuacct", "pids", "freezer"})


class V1Tree(Tree):
    """The tree of one sandbox on cgroup v1; `open_tree` makes it, `CgroupTree` documents it."""

    _delay = 0.0005

    @property
    def groups(self) -> tuple[str, ...]:
        bases = self._facts.bases
        used = (c for c in V1_CONTROLLERS if c in bases and c in _ALWAYS | self._asked)
        return tuple(dict.fromkeys(self._group(controller) for controller in used))

    @property
    def join_files(self) -> tuple[str, ...]:
        """The `tasks` of each group: a process with one thread moves itself through it at once,
        where a move through cgroup.procs waits for an RCU grace period, some 8 ms."""
        return tuple(f"{group}/tasks" for group in self.groups)

    @property
    def memory_group(self) -> tuple[int, str] | None:
        return (1, self._group("memory")) if "memory" in self._asked else None

    def _look_above(self) -> Above:
        group = self._group("memory") if "memory" in self._facts.bases else ""
        return Above(1 if group else 0, os.path.dirname(group))

    def usage(self) -> Usage:
        limit = self._number("memory", "memory.limit_in_bytes")
        cpu_nanoseconds = self._number("cpuacct", "cpuacct.usage")
        return Usage(
            memory_bytes=self._number("memory", "memory.usage_in_bytes"),
            memory_peak_bytes=self._number("memory", "memory.max_usage_in_bytes"),
            memory_limit_bytes=limit if limit is not None and limit < UNLIMITED_BYTES else None,
            cpu_seconds=None if cpu_nanoseconds is None else cpu_nanoseconds / 1e9,
            pids=self._number("pids", "pids.current"),
            oom_kills=self._event("memory", "memory.oom_control", "oom_kill"),
            pids_limit_hits=self._event("pids", "pids.events", "max"),
        )

    def full_above(self) -> str:
        group = self._group("memory") if "memory" in self._facts.bases else ""
        if not group or ("memory" in self._asked and _was_full(group)):
            return ""
        return self._above.full()

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
        file = f"{self._group('cpu')}/cpu.shares" if "cpu" in self._facts.bases else ""
        return file, str(_SMALLEST_SHARES), str(_SHARES_PER_CORE)

    async def _pause(self, seconds: float) -> None:
        # v1 has no event that a group has become empty, short of release_agent, which is the
        # machine's and not ours.
        self._delay = min(2 * self._delay, 0.1)
        await asyncio.sleep(min(self._delay, seconds))

    def _prepare(self, parent: str) -> None:
        """A new cpuset is empty and lets nobody join before it has CPUs and memory nodes."""
        base = parent.removesuffix(f"/{files.PARENT}")
        if base != self._facts.bases.get("cpuset"):
            return
        for file in ("cpuset.cpus", "cpuset.mems"):
            above = files.read(f"{base}/{file}") or ""
            # Again where it differs: the group above may have got more since.
            if files.read(f"{parent}/{file}") != above:
                self._fill_cpuset(f"{parent}/{file}", above)

    def _available_cpus(self) -> str:
        return files.read(f"{self._facts.bases['cpuset']}/cpuset.cpus") or ""

    def _settings(self, limits: Limits) -> Iterator[Setting]:
        if "memory" in self._facts.bases:
            yield from self._memory(limits)
        if limits.cpu_cores is not None or limits.cpu_guarantee_cores is not None:
            yield from self._cpu(limits)
        if limits.pids is not None:
            yield self._setting(f"{self._group('pids')}/pids.max", str(limits.pids), "pids", limits)
        if limits.io_bytes_per_second is not None:
            yield from self._io(limits)
        if self._facts.bases.get("cpuset") in self._used_bases():
            yield from self._cpuset(limits)

    def _memory(self, limits: Limits) -> Iterator[Setting]:
        group = self._group("memory")
        # Always so since Linux 5.11; before, a group below ours would not have been counted.
        if files.read(f"{group}/memory.use_hierarchy") == "0":
            yield self._setting(f"{group}/memory.use_hierarchy", "1", "memory", limits)
        if limits.memory_bytes is None:
            return
        value = whole_pages(limits.memory_bytes)
        yield self._setting(f"{group}/memory.limit_in_bytes", value, "memory", limits)
        # Memory plus swap may not be less than memory, so it comes second; equal means no swap.
        memsw = f"{group}/memory.memsw.limit_in_bytes"
        if files.read(memsw) is not None:
            yield self._setting(memsw, value, "memory", limits)
        else:
            # Without swap accounting, 0 keeps a group at its limit from swapping (memory.rst 5.3).
            swappiness = f"{group}/memory.swappiness"
            yield self._setting(swappiness, "0", "memory", limits).if_present()
        # Buffers of TCP are counted apart, and only where they have a cap (memory.rst, 2.7).
        tcp = f"{group}/memory.kmem.tcp.limit_in_bytes"
        yield self._setting(tcp, value, "memory", limits).if_present()

    def _cpu(self, limits: Limits) -> Iterator[Setting]:
        group = self._group("cpu")
        if limits.cpu_cores is not None:
            quota = str(round(limits.cpu_cores * CPU_PERIOD_US))
            period = str(CPU_PERIOD_US)
            yield self._setting(f"{group}/cpu.cfs_period_us", period, "cpu", limits)
            yield self._setting(f"{group}/cpu.cfs_quota_us", quota, "cpu", limits)
        if limits.cpu_guarantee_cores is not None:
            shares = round(limits.cpu_guarantee_cores * _SHARES_PER_CORE)
            shares = max(_SMALLEST_SHARES, min(shares, _LARGEST_SHARES))
            yield self._setting(f"{group}/cpu.shares", str(shares), "cpu", limits)

    def _io(self, limits: Limits) -> Iterator[Setting]:
        """blkio-controller.rst: v1 sees what goes to the disk at once, so reading, and writing with
        O_DIRECT or O_SYNC; what the page cache writes later it does not know whose it is."""
        for file in ("blkio.throttle.read_bps_device", "blkio.throttle.write_bps_device"):
            value = f"{self._device} {limits.io_bytes_per_second}"
            path = f"{self._group('io')}/{file}"
            yield replace(self._setting(path, value, "io", limits), same=is_a_line_of)

    def _cpuset(self, limits: Limits) -> Iterator[Setting]:
        base, group = self._facts.bases["cpuset"], self._group("cpuset")
        mems = files.read(f"{base}/cpuset.mems") or ""
        cpus = self._available_cpus() if limits.cpuset is None else format_cpuset(limits.cpuset)
        facility = "memory" if limits.cpuset is None else "cpuset"
        yield self._setting(f"{group}/cpuset.mems", mems, facility, limits)
        yield self._setting(f"{group}/cpuset.cpus", cpus, facility, limits)

    def _fill_cpuset(self, path: str, value: str) -> None:
        Setting(
            path=path,
            value=value,
            attempt=f"make a cpuset for sandbox {self._name}",
            remedy=self._facts.remedy("cpuset"),
        ).apply()

    def _used_bases(self) -> set[str]:
        return {group.removesuffix(f"/{files.PARENT}/{self._name}") for group in self.groups}

    def _group(self, controller: str) -> str:
        return f"{self._facts.bases[controller]}/{files.PARENT}/{self._name}"

    def _number(self, controller: str, file: str) -> int | None:
        known = controller in self._facts.bases
        return files.read_number(f"{self._group(controller)}/{file}") if known else None

    def _event(self, controller: str, file: str, key: str) -> int | None:
        known = controller in self._facts.bases
        return files.read_keyed(f"{self._group(controller)}/{file}").get(key) if known else None

    @property
    def _freezer(self) -> str:
        base = self._facts.bases.get("freezer")
        if base is None:
            raise HostError(
                attempt=f"freeze sandbox {self._name}",
                answer="the controller 'freezer' is not usable here",
                remedy="Mount it: mount -t cgroup -o freezer none /sys/fs/cgroup/freezer",
            )
        return f"{self._group('freezer')}/freezer.state"

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
