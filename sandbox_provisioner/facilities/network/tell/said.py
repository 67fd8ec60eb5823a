"""said.py - any process outside; pure: in words, what went over a sandbox's network.

Names are those that code in the kernel has asked for: whoever prints them makes them printable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.units import format_bytes

_MOST_NAMED = 5
_MOST_KEPT = 100


def summary(traffic: Traffic) -> str:
    """One line of it, for a log."""
    parts = [
        f"{format_bytes(traffic.down_bytes)} down",
        f"{format_bytes(traffic.up_bytes)} up",
        _number(traffic.connections, "connection"),
    ]
    if traffic.refusals:
        named = _named(refused(traffic.names))
        parts.append(f"{traffic.refusals} refused{named and ': '}{named}")
    if traffic.quota_used_up:
        parts.append("the quota is used up")
    return ", ".join(parts)


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _named(names: Mapping[str, OfName]) -> str:
    shown = [f"{name} ({found.refusals})" for name, found in list(names.items())[:_MOST_NAMED]]
    more = len(names) - len(shown)
    return ", ".join([*shown, *([f"{more} more"] if more else [])])


def refused(names: Mapping[str, OfName]) -> dict[str, OfName]:
    """Those of *names* that were refused, the most wanted first."""
    found = [(name, counts) for name, counts in names.items() if counts.refusals]
    return dict(sorted(found, key=lambda pair: (-pair[1].refusals, pair[0])))


def by_traffic(names: Mapping[str, OfName]) -> dict[str, OfName]:
    """*names*, those with most traffic first, those that were only refused last."""

    def place(pair: tuple[str, OfName]) -> tuple[int, int, str]:
        name, found = pair
        return -(found.up_bytes + found.down_bytes), -found.connections, name

    return dict(sorted(names.items(), key=place))


def most_used(traffic: Traffic) -> dict[str, OfName]:
    """As many of its names as a message can hold."""
    kept = [*by_traffic(traffic.names).items()][:_MOST_KEPT]
    kept += [pair for pair in [*refused(traffic.names).items()][:_MOST_KEPT] if pair not in kept]
    return dict(kept)


def as_option(names: Iterable[str]) -> str:
    """*names* as the option that would allow them, to be pasted."""
    return f"network_allow = {json.dumps(sorted(names), ensure_ascii=True)}"
