"""reach.py - any process outside; pure: from rules to destinations that a packet can be
compared with.

A packet has no name: names are looked up once, when the card is made, and what they lead to then is
judged. Hosts *of a domain* cannot be had so: `wish/network.py` refuses such a rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network

from sandbox_provisioner.facilities.network.card.ruleset import Reach
from sandbox_provisioner.facilities.network.wish.addresses import (
    CARRIERS,
    SPECIAL_IPV4,
    SPECIAL_IPV6,
    Address,
    Block,
)
from sandbox_provisioner.facilities.network.wish.rules import Rule, Rules

Resolve = Callable[[str], Iterable[Address]]


@dataclass(frozen=True, slots=True)
class _Reaching:
    """What *rules* mean for packets of the *families*; names *resolve* to addresses."""

    rules: Rules
    resolve: Resolve
    families: tuple[int, ...]

    def blocks(self, rules: Iterable[Rule]) -> Iterator[tuple[Rule, Block]]:
        """Of each of *rules* that is about addresses of the families, the block."""
        for rule in rules:
            if rule.block is not None and rule.block.version in self.families:
                yield rule, rule.block

    def everywhere(self, rules: Iterable[Rule], *, allowed: bool) -> Iterator[Reach]:
        """Those of *rules* that are about everything."""
        for rule in rules:
            if rule.everything:
                for family in self.families:
                    yield Reach(_EVERYWHERE[family], rule.ports, allowed)

    def denied(self) -> Iterator[Reach]:
        """Whom none may reach."""
        yield from self.everywhere(self.rules.deny, allowed=False)
        for rule, block in self.blocks(self.rules.deny):
            yield Reach(block, rule.ports, allowed=False)
        for rule in self.rules.deny:
            for address in self.resolve(rule.name) if rule.name else ():
                yield Reach(ip_network(address), rule.ports, allowed=False)

    def named(self) -> Iterator[Reach]:
        """What names lead to, as far as it may be reached by its name."""
        for rule in self.rules.allow:
            for address in self.resolve(rule.name) if rule.name else ():
                ports = rule.ports or (None,)
                judge = self.rules.judge
                if all(judge(rule.name, str(address), port or 1).allowed for port in ports):
                    yield Reach(ip_network(address), rule.ports)

    def special(self) -> Iterator[Reach]:
        """What is not public, the narrowest blocks first: rules that name it, and then no others.
        What carries an address of IPv4 is not that, for a packet."""
        for special in (*self.rules.own, *SPECIAL_IPV4, *SPECIAL_IPV6):
            if special.block.version in self.families:
                for rule, block in self.blocks(self.rules.allow):
                    if rule.names(special):
                        yield Reach(block, rule.ports)
                yield Reach(special.block, allowed=False)
        if 6 in self.families:
            yield from (Reach(carrier, allowed=False) for carrier in CARRIERS)


_EVERYWHERE: dict[int, Block] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}


def reaches(rules: Rules, resolve: Resolve, *, ipv6: bool = False) -> list[Reach]:
    """What *rules* say of packets that go through this host, in the order in which it counts."""
    found = _Reaching(rules, resolve, _families(ipv6=ipv6))
    return [
        *found.denied(),
        *found.named(),
        *found.special(),
        *found.everywhere(rules.allow, allowed=True),
        *(Reach(block, rule.ports) for rule, block in found.blocks(rules.allow)),
    ]


def reaches_at_host(rules: Rules, resolve: Resolve, *, ipv6: bool = False) -> list[Reach]:
    """The same for packets to this host itself, whichever of its addresses they have: only a rule
    for one address names that."""
    found = _Reaching(rules, resolve, _families(ipv6=ipv6))
    single = [
        Reach(block, rule.ports)
        for rule, block in found.blocks(rules.allow)
        if block.prefixlen == block.max_prefixlen
    ]
    return [*found.denied(), *single]


def _families(*, ipv6: bool) -> tuple[int, ...]:
    return (4, 6) if ipv6 else (4,)
