"""reach.py - any process outside; pure: from rules to destinations that a packet can be
compared with.

A packet has no name: names are looked up once, when the card is made, and what they lead to then is
judged. Hosts *of a domain* cannot be had so: `wish/network.py` refuses such a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network

from sandbox_provisioner.facilities.network.card.ruleset import Reach
from sandbox_provisioner.facilities.network.wish.addresses import SPECIAL_IPV4, Special
from sandbox_provisioner.facilities.network.wish.rules import Rule, Rules

Resolve = Callable[[str], Iterable[IPv4Address]]
_EVERYWHERE = IPv4Network("0.0.0.0/0")


def reaches(rules: Rules, resolve: Resolve) -> list[Reach]:
    """What *rules* say of packets that go through this host, in the order in which it counts."""
    return [
        *_denied(rules, resolve),
        *_named(rules, resolve),
        *_special(rules),
        *(Reach(_EVERYWHERE, r.ports) for r in rules.allow if r.everything),
        *(Reach(block, rule.ports) for rule, block in _blocks(rules.allow)),
    ]


def reaches_at_host(rules: Rules, resolve: Resolve) -> list[Reach]:
    """The same for packets to this host itself, whichever of its addresses they have: only a rule
    for one address names that."""
    single = [
        Reach(block, rule.ports) for rule, block in _blocks(rules.allow) if block.prefixlen == 32
    ]
    return [*_denied(rules, resolve), *single]


def _blocks(rules: Iterable[Rule]) -> Iterator[tuple[Rule, IPv4Network]]:
    """Those that are about addresses of IPv4, which is all that a card has."""
    for rule in rules:
        if isinstance(rule.block, IPv4Network):
            yield rule, rule.block


def _denied(rules: Rules, resolve: Resolve) -> Iterator[Reach]:
    for rule in rules.deny:
        if rule.everything:
            yield Reach(_EVERYWHERE, rule.ports, allowed=False)
        if isinstance(rule.block, IPv4Network):
            yield Reach(rule.block, rule.ports, allowed=False)
        if rule.name:
            for address in resolve(rule.name):
                yield Reach(IPv4Network(address), rule.ports, allowed=False)


def _named(rules: Rules, resolve: Resolve) -> Iterator[Reach]:
    """What names lead to, as far as it may be reached by its name."""
    for rule in rules.allow:
        for address in resolve(rule.name) if rule.name else ():
            ports = rule.ports or (None,)
            if all(rules.judge(rule.name, str(address), port or 1).allowed for port in ports):
                yield Reach(IPv4Network(address), rule.ports)


def _special(rules: Rules) -> Iterator[Reach]:
    """What is not public, the narrowest blocks first: rules that name it, and then no others."""
    for special in (*rules.own, *SPECIAL_IPV4):
        if isinstance(special.block, IPv4Network):
            yield from _in_special(rules, special, special.block)


def _in_special(rules: Rules, special: Special, whole: IPv4Network) -> Iterator[Reach]:
    for rule, block in _blocks(rules.allow):
        if rule.names(special):
            yield Reach(block, rule.ports)
    yield Reach(whole, allowed=False)
