"""swap.py - any process outside; pure: how much swap comes on top of the memory.

Without a wish for it, none does, as far as this Linux can tell (`memory.py`). With one it has to be
able to: admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/memory.rst (2.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from traitlets import Integer, Unicode, Union

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.caps.wish.cap import Cap, Options, Property, Write
from sandbox_provisioner.units import format_bytes, parse_bytes, whole_pages


class SwapOptions(Options):
    """What users write."""

    swap_limit = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="How much swap a kernel may use when it has all the memory that mem_limit allows: "
        '"1G". With some it is not interrupted close to mem_limit, unless mem_interrupt is set. '
        "None: no swap, as far as Linux counts it.",
    ).tag(config=True, flag="swap-limit", fields=("limits.swap_bytes",))


@dataclass(frozen=True, kw_only=True)
class SwapWish:
    """*swap_bytes* come on top of the memory."""

    swap_bytes: int | None = None


class _WithMemory(Protocol):
    """The fields of `spec.Limits` that matter here: v1 caps the sum of both."""

    @property
    def memory_bytes(self) -> int | None: ...

    @property
    def swap_bytes(self) -> int | None: ...


class Swap(Cap):
    """The cap on swap."""

    facility = "swap"
    controller = "memory"
    options = ("swap_limit",)
    fields = ("swap_bytes",)
    noun = "swap"
    needs = MappingProxyType({1: "memory.memsw.limit_in_bytes", 2: "memory.swap.max"})
    remedy = (
        "As administrator, boot a Linux that counts swap: with CONFIG_SWAP, and with swapaccount=1 "
        "on its command line where that is not the default. Or remove swap_limit.",
    )

    def wish(self, options: SwapOptions) -> SwapWish:
        limit = options.swap_limit
        return SwapWish(swap_bytes=None if limit is None else parse_bytes("swap_limit", limit))

    def check(self, limits: _WithMemory) -> None:
        if limits.swap_bytes is not None and limits.memory_bytes is None:
            raise SpecError(
                attempt="set swap_limit",
                answer="there is no mem_limit on top of which swap would come",
                remedy="Set mem_limit too.",
            )

    def describe(self, limits: SwapWish) -> str:
        return f"cap swap at {format_bytes(limits.swap_bytes or 0)}"

    def v1(self, limits: _WithMemory, disk: str) -> Iterator[Write]:
        if limits.memory_bytes is not None and limits.swap_bytes is not None:
            both = whole_pages(limits.memory_bytes) + whole_pages(limits.swap_bytes)
            yield Write("memory.memsw.limit_in_bytes", str(both))

    def v2(self, limits: SwapWish, disk: str) -> Iterator[Write]:
        if limits.swap_bytes is not None:
            yield Write("memory.swap.max", str(whole_pages(limits.swap_bytes)))

    def properties(self, limits: SwapWish, disk: str) -> Iterator[Property]:
        if limits.swap_bytes is not None:
            yield "MemorySwapMax", ("t", whole_pages(limits.swap_bytes))

    def eases_memory(self, limits: SwapWish) -> bool:
        return bool(limits.swap_bytes)
