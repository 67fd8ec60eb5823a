"""admission.py - pure: whether there is room for one more kernel, for a person and on the host.

What counts is what kernels may use, not what they use now: a host whose kernels' limits are more
than its memory would keep its promises to some of them by killing others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sandbox_provisioner.errors import HostError
from sandbox_provisioner.policy.policy import KERNELS
from sandbox_provisioner.policy.terms import Terms
from sandbox_provisioner.units import format_bytes

_MEMORY = "limits.memory_bytes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A kernel that runs, or is started by somebody else just now: whose it is, its memory limit
    (None: without one), and whether it is a kernel of the person's, not a server."""

    person: str
    memory_bytes: int | None
    is_kernel: bool = True


def counts(terms: Terms) -> bool:
    """Whether there is anything to count."""
    return bool(terms.kernels or terms.host_kernels or terms.host_memory)


def admit(terms: Terms, wish: Running, running: Iterable[Running]) -> None:
    """Raise HostError where *running* leave no room for *wish*."""
    others = tuple(running)
    if wish.is_kernel:
        _check_kernels(terms, [one for one in others if one.is_kernel])
    if terms.host_memory:
        _check_memory(terms, terms.host_memory.fields, wish, others)


def _check_kernels(terms: Terms, kernels: list[Running]) -> None:
    own = [one for one in kernels if one.person == terms.person.name]
    if terms.kernels and len(own) >= (most := terms.kernels.fields[KERNELS]):
        raise HostError(
            attempt="start one more kernel",
            answer=f"{terms.person.name} has {len(own)}, and may have {most} at once "
            f"({terms.kernels.where(terms.file)})",
            remedy=f"Shut one down that you do not need, or ask {terms.ask} for more.",
        )
    if terms.host_kernels and len(kernels) >= (most := terms.host_kernels.fields[KERNELS]):
        raise HostError(
            attempt="start one more kernel",
            answer=f"this machine has {len(kernels)}, and may have {most} at once "
            f"({terms.host_kernels.where(terms.file)})",
            remedy=f"Try again when others have shut theirs down, or ask {terms.ask}.",
        )


def _check_memory(
    terms: Terms, fields: Mapping[str, int | None], wish: Running, others: tuple[Running, ...]
) -> None:
    assert terms.host_memory
    most, where = fields[_MEMORY] or 0, terms.host_memory.where(terms.file)
    if wish.memory_bytes is None:
        raise HostError(
            attempt="start a kernel without a limit on its memory",
            answer=f"all sandboxes together may have {format_bytes(most)} ({where})",
            remedy=f"Set mem_limit, or ask {terms.ask}.",
        )
    left = max(0, most - sum(one.memory_bytes or 0 for one in others))
    if wish.memory_bytes > left:
        raise HostError(
            attempt=f"start a kernel with {format_bytes(wish.memory_bytes)} of memory",
            answer=f"the host has {format_bytes(left)} left for sandboxes, of "
            f"{format_bytes(most)} ({where}), you asked for {format_bytes(wish.memory_bytes)}",
            remedy="Set a smaller mem_limit, shut down kernels that you do not need, or ask "
            f"{terms.ask}.",
        )
