"""options.py - in the server, pure: what users write of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from traitlets import Bool, Dict, Enum, HasTraits, Integer, List, Unicode, Union

from sandbox_provisioner.errors import SpecError, did_you_mean
from sandbox_provisioner.facilities.network.wish.network import (
    CONNECTIONS,
    NEW_PER_SECOND,
    OFFERED,
    Network,
    NetworkWish,
)
from sandbox_provisioner.facilities.network.wish.pool import POOL, POOL_IPV6
from sandbox_provisioner.units import parse_bits, parse_bytes


class NetworkOptions(HasTraits):
    """What users write."""

    network = Enum(
        [mode.value for mode in OFFERED],
        default_value=Network.NONE.value,
        help='"none": a loopback interface of its own, and nothing else; "gateway": TCP and names, '
        'by a process outside that dials what network_allow has; "card": an interface of its own, '
        "for kernels of a root server (docs/network.md).",
    ).tag(
        config=True,
        flag="network",
        fields=("network.mode",),
    )
    network_allow = List(
        Unicode(),
        help="With whom a kernel may speak: hosts, hosts of a domain, ranges of addresses, each "
        'with ports or without; "packages", where this machine\'s pip, conda, npm, R and apt get '
        'theirs; "all". Nothing: with nobody (docs/network.md).',
    ).tag(
        config=True,
        flag="network-allow",
        fields=("network.allow",),
        readme="With whom a kernel may speak: "
        '`["data.example.org", "*.example.edu:443", "10.1.0.0/16:5432", "packages"]`; '
        "`packages` is where this machine's pip, conda, npm, R and apt get theirs, `all` every "
        "public address. Nothing: with nobody. [More of it](docs/network.md).",
    )
    network_deny = List(
        Unicode(), help="With whom it may not, whatever network_allow has; the same rules."
    ).tag(
        config=True,
        flag="network-deny",
        fields=("network.deny",),
        restricts=True,
    )
    network_rate = Union(
        [Integer(), Unicode(), Dict()],
        allow_none=True,
        default_value=None,
        help='The most bits a second in each direction: "10M", or {"up": "2M", "down": "20M"}, on '
        "a command line up=2M,down=20M. None: no limit.",
    ).tag(
        config=True,
        flag="network-rate",
        fields=("network.up_bits", "network.down_bits"),
        readme='The most bits a second: `"10M"`, or for what the kernel sends and receives '
        '`{"up": "2M", "down": "20M"}` (on a command line `up=2M,down=20M`). None: no limit.',
    )
    network_quota = Union(
        [Integer(), Unicode()],
        allow_none=True,
        default_value=None,
        help="The most bytes that a kernel sends and receives together, over all its "
        'restarts: "5G". None: no limit.',
    ).tag(
        config=True,
        flag="network-quota",
        fields=("network.quota_bytes",),
    )
    network_connections = Union(
        [Integer(), Unicode(), Dict()],
        allow_none=True,
        default_value=None,
        help="How many connections a kernel has at once, and how many new ones a second: a number "
        'for the first, or {"at_once": 512, "new_per_second": 100}, which is the default; on a '
        "command line at_once=512,new_per_second=100.",
    ).tag(
        config=True,
        flag="network-connections",
        fields=("network.connections", "network.new_per_second"),
        default=f"{CONNECTIONS}, {NEW_PER_SECOND}",
        readme="How many connections a kernel has at once, and how many new ones a second: a "
        'number for the first, or `{"at_once": 512, "new_per_second": 100}` (on a command line '
        "`at_once=512,new_per_second=100`).",
    )
    network_audit = Bool(
        False,
        help="Note down every name that a kernel wanted, for jupyter sandbox network KERNEL, "
        "which prints them as network_allow takes them. Nothing more is allowed by it.",
    ).tag(
        config=True,
        flag="network-audit",
        fields=("network.audit",),
    )
    network_pool = Unicode(
        POOL,
        help="Private addresses that neither this machine nor its network uses, which cards have "
        "theirs from.",
    ).tag(
        config=True,
        fields=("network.pool",),
    )
    network_ipv6 = Bool(
        False,
        help="Whether a card has an address of IPv6 as well, for which this machine has to forward "
        "IPv6. A gateway has it anyway.",
    ).tag(
        config=True,
        flag="network-ipv6",
        fields=("network.ipv6",),
    )
    network_pool_ipv6 = Unicode(
        POOL_IPV6,
        help="The unique local addresses (in fd00::/8) that cards have theirs of IPv6 from.",
    ).tag(
        config=True,
        fields=("network.pool_ipv6",),
    )


def network_wish(options: NetworkOptions) -> NetworkWish:
    """What *options* come to; SpecError."""
    rates = _rates(options.network_rate)
    counts = _parts("network_connections", options.network_connections, _COUNTS)
    quota = options.network_quota
    return NetworkWish(
        mode=Network(options.network),
        allow=tuple(options.network_allow),
        deny=tuple(options.network_deny),
        up_bits=rates["up"],
        down_bits=rates["down"],
        quota_bytes=0 if quota is None else parse_bytes("network_quota", quota),
        connections=_count(counts.get("at_once", CONNECTIONS)),
        new_per_second=_count(counts.get("new_per_second", NEW_PER_SECOND)),
        audit=options.network_audit,
        pool=options.network_pool,
        ipv6=options.network_ipv6,
        pool_ipv6=options.network_pool_ipv6,
    )


# The parts of an option, and an example for a command line.
_RATES = {"up": "2M", "down": "20M"}
_COUNTS = {"at_once": "512", "new_per_second": "100"}


def _rates(value: Any) -> dict[str, int]:
    """Bits a second by direction. One number is meant for each of them."""
    parts = _parts("network_rate", value, _RATES)
    if _is_single(value):
        parts["down"] = parts["up"]
    return {way: parse_bits("network_rate", parts.get(way, 0)) for way in _RATES}


def _is_single(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping) and "=" not in str(value)


def _parts(option: str, value: Any, example: Mapping[str, str]) -> dict[str, Any]:
    """A dictionary, or what a command line has for it, by the names of *example*; of a single value
    it is the first of these."""
    if value is None:
        return {}
    if _is_single(value):
        return {next(iter(example)): value}
    pairs = value if isinstance(value, Mapping) else _pairs(str(value))
    for name in pairs:
        if name not in example:
            written = ",".join(f"{known}={number}" for known, number in example.items())
            remedy = did_you_mean(str(name), example, f"Write it as in: {written}")
            raise SpecError(attempt=f"read {option}", answer=f"it has no {name!r}", remedy=remedy)
    return dict(pairs)


def _pairs(text: str) -> dict[str, str]:
    """ "up=2M,down=20M" as a dictionary."""
    parts = (part.partition("=") for part in text.split(","))
    return {name.strip(): value.strip() for name, _, value in parts}


def _count(value: Any) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise SpecError(
            attempt="read network_connections",
            answer=f"{value!r} is not a number of connections",
            remedy='Write a whole number, such as 512, or {"at_once": 512, "new_per_second": 100}.',
        )
    return int(text)
