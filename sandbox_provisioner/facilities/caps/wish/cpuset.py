"""cpuset.py - any process outside; pure: the CPUs that a sandbox runs on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from traitlets import Unicode

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write


class CpusetOptions(Options):
    """What users write."""

    cpuset = Unicode("", help='The CPUs that the kernel may run on, such as "0-3,6".').tag(
        config=True, flag="cpuset", default="all", fields=("limits.cpuset",)
    )


@dataclass(frozen=True, kw_only=True)
class CpusetWish:
    """The numbers of the CPUs."""

    cpuset: frozenset[int] | None = None


class Cpuset(Cap):
    """The choice of CPUs."""

    facility = controller = "cpuset"
    options = ("cpuset",)
    fields = ("cpuset",)
    noun = "choice of CPUs"
    above = MappingProxyType({1: "cpuset.cpus", 2: "cpuset.cpus.effective"})

    def wish(self, options: CpusetOptions) -> CpusetWish:
        return CpusetWish(cpuset=parse_cpuset(options.cpuset) if options.cpuset else None)

    def check(self, limits: CpusetWish) -> None:
        if limits.cpuset is not None and not limits.cpuset:
            raise _bad_cpuset("")

    def describe(self, limits: CpusetWish) -> str:
        return f"confine to CPUs {format_cpuset(limits.cpuset or frozenset())}"

    def v1(self, limits: CpusetWish, disk: str) -> Iterator[Write]:
        if limits.cpuset is not None:
            yield Write("cpuset.cpus", format_cpuset(limits.cpuset), same=_same_cpus)

    v2 = v1

    def properties(self, limits: CpusetWish, disk: str) -> Iterator[Property]:
        if limits.cpuset is not None:
            yield "AllowedCPUs", ("ay", _bitmap(limits.cpuset))

    def beyond(self, limits: CpusetWish, above: str) -> tuple[str, str] | None:
        if not above or limits.cpuset is None or limits.cpuset <= parse_cpuset(above):
            return None
        return f"the CPUs available here are {above}", "Write some of these into cpuset."


def parse_cpuset(value: str) -> frozenset[int]:
    """The CPUs of a list in the format of cpuset(7): "0-3,6" -> {0, 1, 2, 3, 6}."""
    cpus: set[int] = set()
    for part in value.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise _bad_cpuset(value)
        span = range(int(first), int(last if dash else first) + 1)
        if not span or span.stop > 1 << 16:
            raise _bad_cpuset(value)
        cpus.update(span)
    return frozenset(cpus)


def format_cpuset(cpus: frozenset[int]) -> str:
    """The inverse of `parse_cpuset`, without ranges: {0, 1, 6} -> "0,1,6"."""
    return ",".join(str(cpu) for cpu in sorted(cpus))


def _bad_cpuset(value: str) -> SpecError:
    return SpecError(
        attempt="read cpuset",
        answer=f"{value!r} is not a list of CPUs",
        remedy='Write numbers and ranges from low to high, such as "0-3,6".',
    )


def _same_cpus(written: str, back: str) -> bool:
    """Whether two lists of CPUs mean the same: Linux answers "0,1" with "0-1"."""
    return bool(back) and parse_cpuset(written) == parse_cpuset(back)


def _bitmap(cpus: frozenset[int]) -> bytes:
    """CPU 0 is the lowest bit of the first byte."""
    bits = sum(1 << cpu for cpu in cpus)
    return bits.to_bytes(max(cpus) // 8 + 1, "little")
