"""admission.py - pure: whether there is room for one more sandbox, for a person and on the host.

What counts is what sandboxes may use, not what they use now: a host whose sandboxes' limits are
more than its memory would keep its promises to some of them by killing others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sandbox_provisioner.policy.policy import KERNELS
from sandbox_provisioner.policy.terms import NoRoom, Terms
from sandbox_provisioner.units import format_bytes

_MEMORY = "limits.memory_bytes"
_KERNEL, _SERVER = "kernel", "server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A sandbox of this *kind* that runs, or is started by somebody else just now: whose it is, its
    memory limit, and that of all that this person runs in one group with it (None: without one)."""

    person: str
    memory_bytes: int | None
    sum_bytes: int | None = None
    kind: str = _KERNEL

    @property
    def noun(self) -> str:
        """As people call it."""
        return self.kind if self.kind == _SERVER else _KERNEL


def counts(terms: Terms) -> bool:
    """Whether there is anything to count."""
    return bool(terms.kernels or terms.host_kernels or terms.host_memory)


def admit(terms: Terms, wish: Running, running: Iterable[Running]) -> None:
    """Raise NoRoom where *running* leave no room for *wish*."""
    others = tuple(running)
    if wish.kind == _KERNEL:
        _check_kernels(terms, [one for one in others if one.kind == _KERNEL])
    if terms.host_memory:
        _check_memory(terms, terms.host_memory.fields, wish, others)


def _check_kernels(terms: Terms, kernels: list[Running]) -> None:
    own = [one for one in kernels if one.person == terms.person.name]
    if terms.kernels and len(own) >= (most := terms.kernels.fields[KERNELS]):
        raise NoRoom(
            attempt="start one more kernel",
            answer=f"{terms.person.name} has {len(own)}, and may have {most} at once "
            f"({terms.kernels.where(terms.file)})",
            remedy=f"Shut one down that you do not need, or ask {terms.ask} for more.",
        )
    if terms.host_kernels and len(kernels) >= (most := terms.host_kernels.fields[KERNELS]):
        raise NoRoom(
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
    if wish.memory_bytes is None and wish.sum_bytes is None:
        raise NoRoom(
            attempt=f"start a {wish.noun} without a limit on its memory",
            answer=f"all sandboxes together may have {format_bytes(most)} ({where})",
            remedy=f"Set mem_limit, or ask {terms.ask}.",
        )
    taken = _may_use(others)
    left, more = max(0, most - taken), _may_use((*others, wish)) - taken
    if more > left:
        raise NoRoom(
            attempt=f"start a {wish.noun} with {format_bytes(more)} of memory",
            answer=f"the host has {format_bytes(left)} left for sandboxes, of "
            f"{format_bytes(most)} ({where}), you asked for {format_bytes(more)}",
            remedy=f"Set a smaller mem_limit, shut down what you do not need, or ask {terms.ask}.",
        )


def _may_use(running: Iterable[Running]) -> int:
    """The memory of all together. What is in one group with others of a person's has no more than
    that group; who has no limit at all was there before the policy, and is not counted."""
    total, by_person = 0, dict[str, list[Running]]()
    for one in running:
        if one.sum_bytes is None:
            total += one.memory_bytes or 0
        else:
            by_person.setdefault(one.person, []).append(one)
    for own in by_person.values():
        limits = [one.memory_bytes for one in own]
        group = min(one.sum_bytes for one in own if one.sum_bytes is not None)
        wished = group if None in limits else sum(limit or 0 for limit in limits)
        total += min(group, wished)
    return total
