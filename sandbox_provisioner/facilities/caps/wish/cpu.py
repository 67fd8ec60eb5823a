"""cpu.py - any process outside; pure: the most CPU time, and the share while others want it.

What Linux does with it is told in its scheduler/sched-bwc.rst and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from traitlets import Float

from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write
from sandbox_provisioner.units import at_least

_PERIOD_US = 100_000
_SHARES_PER_CORE = 1024
_SMALLEST_SHARES, _LARGEST_SHARES = 2, 1 << 18
# The kernel's default weight is 100, so a guaranteed core weighs as much as a default group.
_WEIGHT_PER_CORE = 100
_SMALLEST_WEIGHT, _LARGEST_WEIGHT = 1, 10_000
# For the file of the group, its smallest value, and that of a group which nobody has asked about:
# what a tree of each version gives way by.
V1_SHARES = ("cpu.shares", str(_SMALLEST_SHARES), str(_SHARES_PER_CORE))
V2_WEIGHT = ("cpu.weight", str(_SMALLEST_WEIGHT), str(_WEIGHT_PER_CORE))


class CpuOptions(Options):
    """What users write."""

    cpu_limit = Float(
        None, allow_none=True, help="The most CPU time, in cores: 0.5 is half of one core."
    ).tag(config=True, flag="cpu-limit", fields=("limits.cpu_cores",))
    cpu_guarantee = Float(
        None,
        allow_none=True,
        help="The CPU time, in cores, that it gets while others want the CPU, too.",
    ).tag(config=True, flag="cpu-guarantee", fields=("limits.cpu_guarantee_cores",))


@dataclass(frozen=True, kw_only=True)
class CpuWish:
    """*cpu_cores* is bandwidth (1.5 is 150 % of one core); *cpu_guarantee_cores* is a share that
    counts only while the machine is busy."""

    cpu_cores: float | None = None
    cpu_guarantee_cores: float | None = None


class Cpu(Cap):
    """The caps on CPU time."""

    facility = controller = "cpu"
    options = ("cpu_limit", "cpu_guarantee")
    fields = ("cpu_cores", "cpu_guarantee_cores")
    noun = "CPU time"

    def wish(self, options: CpuOptions) -> CpuWish:
        return CpuWish(cpu_cores=options.cpu_limit, cpu_guarantee_cores=options.cpu_guarantee)

    def check(self, limits: CpuWish) -> None:
        at_least("cpu_limit", limits.cpu_cores, 0.01, "Use at least 0.01 (cores).")
        at_least("cpu_guarantee", limits.cpu_guarantee_cores, 0.01, "Use at least 0.01 (cores).")

    def describe(self, limits: CpuWish) -> str:
        if limits.cpu_cores is not None:
            return f"cap CPU time at {_cores(limits.cpu_cores)}"
        return f"guarantee {_cores(limits.cpu_guarantee_cores)} of CPU time"

    def v1(self, limits: CpuWish, disk: str) -> Iterator[Write]:
        if limits.cpu_cores is not None:
            yield Write("cpu.cfs_period_us", str(_PERIOD_US))
            yield Write("cpu.cfs_quota_us", str(round(limits.cpu_cores * _PERIOD_US)))
        if limits.cpu_guarantee_cores is not None:
            shares = round(limits.cpu_guarantee_cores * _SHARES_PER_CORE)
            shares = max(_SMALLEST_SHARES, min(shares, _LARGEST_SHARES))
            yield Write("cpu.shares", str(shares))

    def v2(self, limits: CpuWish, disk: str) -> Iterator[Write]:
        if limits.cpu_cores is not None:
            yield Write("cpu.max", f"{round(limits.cpu_cores * _PERIOD_US)} {_PERIOD_US}")
        if limits.cpu_guarantee_cores is not None:
            yield Write("cpu.weight", str(_weight_of(limits.cpu_guarantee_cores)))

    def properties(self, limits: CpuWish, disk: str) -> Iterator[Property]:
        if limits.cpu_cores is not None:
            yield "CPUQuotaPerSecUSec", ("t", round(limits.cpu_cores * 1_000_000))
        if limits.cpu_guarantee_cores is not None:
            yield "CPUWeight", ("t", _weight_of(limits.cpu_guarantee_cores))


def _weight_of(cores: float) -> int:
    """The cpu.weight that stands for a guarantee of *cores*."""
    return max(_SMALLEST_WEIGHT, min(round(cores * _WEIGHT_PER_CORE), _LARGEST_WEIGHT))


def _cores(count: float | None) -> str:
    return f"{count or 0:g} core{'' if count == 1 else 's'}"
