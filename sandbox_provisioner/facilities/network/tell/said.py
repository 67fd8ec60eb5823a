"""said.py - any process outside; pure: in words, what went over a sandbox's network.

Names are those that code in the kernel has asked for: whoever prints them makes them printable.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from ipaddress import ip_network

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.tell.counts import OfName, Traffic
from sandbox_provisioner.facilities.network.wish.addresses import meant_by, read_address
from sandbox_provisioner.facilities.network.wish.names import host_name
from sandbox_provisioner.facilities.network.wish.rules import Rule, parse
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


def as_rules(labels: Iterable[str]) -> list[str]:
    """What would allow those of *labels* that name one host, or address and port, and nothing else:
    code in the kernel can ask for a name that is a rule of another meaning, such as "all"."""
    return sorted({rule for label in labels if (rule := _as_rule(label))})


def _as_rule(label: str) -> str:
    """As `Target.label` writes it, or a name alone; "" where it is none."""
    whom, colon, port = label.rpartition(":") if ":" in label else (label, "", "")
    try:
        ports = (int(port),) if colon else ()
        address = read_address(whom.removeprefix("[").removesuffix("]")) if colon else None
        if address is not None:
            rule = Rule(block=ip_network(meant_by(address)), ports=ports)
        else:
            rule = Rule(name=host_name(whom), ports=ports)
        return rule.text if parse(rule.text, label) == rule else ""
    except (ValueError, SpecError):
        return ""


def only_refused(names: Mapping[str, OfName]) -> dict[str, OfName]:
    """Those of *names* that were refused, and no byte of which has passed."""
    return {
        name: found for name, found in refused(names).items()
        if not found.up_bytes + found.down_bytes
    }  # fmt: skip


def as_option(rules: Iterable[str]) -> str:
    """*rules* as the option that has them, to be pasted."""
    return f"network_allow = {json.dumps([*rules], ensure_ascii=True)}"
