"""memory.py - any process outside; pure: the most memory, and when the cell is interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from traitlets import Float, Integer, Unicode, Union, default

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write
from sandbox_provisioner.units import (
    PAGE_BYTES,
    at_least,
    format_bytes,
    parse_bytes,
    parse_share,
    whole_pages,
)

# The launcher and PID 1 are charged to the cap as well; below this no kernel could start.
SMALLEST_MEMORY_BYTES = 32 << 20


class MemoryOptions(Options):
    """What users write."""

    mem_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value="50%",
        help='The most memory a kernel may use, as in JupyterHub: "512M", "1G", or bytes; or a '
        'share of the machine\'s, or of what a group above allows: "50%". Where no cap can be had '
        "the default is given up. None: no cap.",
    ).tag(
        config=True,
        flag="mem-limit",
        fields=("limits.memory_bytes",),
        readme='The most memory: `"512M"`, `"1G"` (JupyterHub\'s notation), bytes, or a share of '
        "the machine's (or of what a group above allows); `/tmp` and `/dev/shm` count, and no swap "
        "comes on top. "
        "Where no cap can be had only the default is given up, one that was asked for is a "
        "refusal. None: no cap.",
    )
    mem_interrupt = Float(
        0.92,
        allow_none=True,
        help="The share of mem_limit at which the kernel is interrupted, so that the cell ends and "
        "the variables stay; 0.5 to 0.99, 0 or None: never. The default holds for IPython's "
        "kernel, of which it is known that the cell then fails; what is set, for every kernel that "
        "takes interrupts as signals.",
    ).tag(
        config=True,
        readme="The share of `mem_limit` at which the cell is interrupted, so that the variables "
        "stay; 0.5 to 0.99, 0 is never. The default holds for IPython's kernel, whose cell then "
        "fails with an error; of others that is not known, and a cell cut short might pass for a "
        "whole one: set it for a kernel that you know.",
    )

    @default("mem_limit")
    def _usual_limit(self) -> str:
        return str(self.usual("mem_limit"))

    @default("mem_interrupt")
    def _usual_share(self) -> float:
        return float(self.usual("mem_interrupt"))

    def machine_bytes(self) -> int:
        """The memory of which mem_limit may be a share; for who knows the machine to override."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class MemoryWish:
    """*memory_bytes* includes the sandbox's tmpfs and shared memory, and no swap comes on top. At
    *interrupt_share* of it the kernel gets an interrupt; None means that it does not. Nobody has
    asked for an interrupt *by default*: there is none where the kernel goes on beyond the cap."""

    memory_bytes: int | None = None
    interrupt_share: float | None = None
    interrupt_by_default: bool = False


class Memory(Cap):
    """The cap on memory."""

    facility = controller = "memory"
    options = ("mem_limit",)
    fields = ("memory_bytes",)
    noun = "memory"
    otherwise = "; others have no memory cap"
    use = "memory.stat"

    def wish(self, options: MemoryOptions) -> MemoryWish:
        share = options.mem_interrupt or None  # reading it notes whether its default was taken
        return MemoryWish(
            memory_bytes=_memory_bytes(options),
            interrupt_share=share,
            interrupt_by_default="mem_interrupt" in options.untouched,
        )

    def check(self, limits: MemoryWish) -> None:
        at_least("mem_limit", limits.memory_bytes, SMALLEST_MEMORY_BYTES, "Use at least 32M.")
        share = limits.interrupt_share
        if share is not None and not 0.5 <= share <= 0.99:
            raise SpecError(
                attempt="set mem_interrupt",
                answer=f"{share:g} is not a share of mem_limit that makes sense",
                remedy="Use 0.5 to 0.99, or 0 to turn it off.",
            )

    def describe(self, limits: MemoryWish) -> str:
        return f"cap memory at {format_bytes(limits.memory_bytes or 0)}"

    def below_use(self, limits: MemoryWish, told: Mapping[str, int]) -> str:
        """Where the limit is less than what Linux cannot get back, it ends somebody (v2), or says
        that the group is busy (v1)."""
        names = ("total_rss", "total_shmem") if "total_rss" in told else ("anon", "shmem")
        used, limit = sum(told.get(name, 0) for name in names), limits.memory_bytes or 0
        if used <= limit:
            return ""
        return (
            f"it uses {format_bytes(used)} now, which is more than the {format_bytes(limit)} that "
            "it shall have, and nothing was changed"
        )

    def v1(self, limits: MemoryWish, disk: str) -> Iterator[Write]:
        if limits.memory_bytes is None:
            return
        value = str(whole_pages(limits.memory_bytes))
        yield Write("memory.limit_in_bytes", value)
        # Memory plus swap may not be less than memory, so it comes second; equal means no swap.
        memsw = "memory.memsw.limit_in_bytes"
        # A group of many is as good as without: where memory alone meets its limit Linux counts it,
        # and that tells whose limit it was. 64 pages are what a CPU takes in one go.
        room = str(int(value) + 64 * PAGE_BYTES)
        yield Write(memsw, value, optional=True, shared=room)
        # Without swap accounting, 0 keeps a group at its limit from swapping (memory.rst 5.3).
        yield Write("memory.swappiness", "0", optional=True, unless=memsw)
        # Buffers of TCP are counted apart, and only where they have a cap (memory.rst, 2.7).
        yield Write("memory.kmem.tcp.limit_in_bytes", value, optional=True)

    def v2(self, limits: MemoryWish, disk: str) -> Iterator[Write]:
        if limits.memory_bytes is None:
            return
        yield Write("memory.max", str(whole_pages(limits.memory_bytes)))
        # Absent without CONFIG_SWAP.
        yield Write("memory.swap.max", "0", optional=True)
        # All or none: a kernel whose helper alone was ended would go on half dead. Linux 4.19.
        yield Write("memory.oom.group", "1", optional=True, shared="")

    def properties(self, limits: MemoryWish, disk: str) -> Iterator[Property]:
        if limits.memory_bytes is not None:
            yield "MemoryMax", ("t", whole_pages(limits.memory_bytes))
            yield "MemorySwapMax", ("t", 0)


def _memory_bytes(options: MemoryOptions) -> int | None:
    if options.mem_limit is None:
        return None
    share = parse_share(options.mem_limit)
    if share is None:
        return parse_bytes("mem_limit", options.mem_limit)
    if not 0 < share <= 1:
        raise SpecError(
            attempt="read mem_limit",
            answer=f"{options.mem_limit!r} is no share of a machine",
            remedy="Use more than 0% and at most 100%.",
        )
    return max(round(options.machine_bytes() * share), SMALLEST_MEMORY_BYTES)
