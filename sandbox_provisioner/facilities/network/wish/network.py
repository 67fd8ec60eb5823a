"""network.py - any process outside; pure: which network one sandbox has, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from sandbox_provisioner.errors import SpecError
from sandbox_provisioner.facilities.network.wish.pool import (
    POOL,
    POOL_IPV6,
    parse_pool,
    parse_pool_ipv6,
)
from sandbox_provisioner.facilities.network.wish.rules import EVERYTHING, Rule, parse, place
from sandbox_provisioner.units import at_least

MOST_RULES = 1000
CONNECTIONS = 512
NEW_PER_SECOND = 100
# Below these no program gets anywhere: a packet takes seconds.
_LEAST_BITS = 8_000
_LEAST_BYTES = 1 << 10


class Network(StrEnum):
    """Which network a sandbox has: NONE is a loopback interface of its own and nothing else,
    GATEWAY lets a process outside dial what its rules allow, CARD is an interface of its own. HOST
    is the machine's, for the gateway's own box; nobody can ask for it."""

    NONE = "none"
    GATEWAY = "gateway"
    CARD = "card"
    HOST = "host"


OFFERED = (Network.NONE, Network.GATEWAY, Network.CARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkWish:
    """The network of one sandbox. *allow* and *deny* are rules as `rules.parse` reads them.

    *up* is what the kernel sends. Of rates and *quota_bytes*, which counts both directions, 0 is
    no limit; *used_bytes* are what former starts of the same kernel have used of it. With *audit*
    every name that was wanted is noted down. *pool* is what a card has its address from, and
    *pool_ipv6*, with *ipv6*, one of that; a gateway has both families anyway.
    """

    mode: Network = Network.NONE
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    up_bits: int = 0
    down_bits: int = 0
    quota_bytes: int = 0
    used_bytes: int = 0
    connections: int = CONNECTIONS
    new_per_second: int = NEW_PER_SECOND
    audit: bool = False
    pool: str = POOL
    ipv6: bool = False
    pool_ipv6: str = POOL_IPV6

    def __post_init__(self) -> None:
        if self.mode in {Network.NONE, Network.HOST}:
            if asked := next(self._asked(), ""):
                raise _without_network(asked)
            return
        allow, deny = _checked("network_allow", self.allow), _checked("network_deny", self.deny)
        for number, rule in enumerate(deny):
            _check_denied(rule, place("network_deny", number))
        self._check_limits()
        if self.mode is Network.CARD:
            parse_pool(self.pool)
            parse_pool_ipv6(self.pool_ipv6)
            self._check_card((*allow, *deny))

    def _check_card(self, rules: Iterable[Rule]) -> None:
        """A packet has no name: names are looked up once, when the card is made."""
        if rule := next((rule for rule in rules if rule.below), None):
            raise SpecError(
                attempt=f'use {rule.text!r} with network = "card"',
                answer="names are looked up when the kernel starts, and a domain has no list of "
                "its hosts",
                remedy='Name the hosts, or their addresses, or set network = "gateway".',
            )
        if self.audit:
            raise SpecError(
                attempt='use network_audit with network = "card"',
                answer="packets have addresses and no names",
                remedy="Leave it out: jupyter sandbox network shows which addresses a kernel "
                'wants. Or set network = "gateway" to learn the names.',
            )

    def _asked(self) -> Iterator[str]:
        """The options that say something of a network."""
        if self.allow:
            yield "network_allow"
        if self.deny:
            yield "network_deny"
        if self.up_bits or self.down_bits:
            yield "network_rate"
        if self.quota_bytes:
            yield "network_quota"
        if (self.connections, self.new_per_second) != (CONNECTIONS, NEW_PER_SECOND):
            yield "network_connections"
        if self.audit:
            yield "network_audit"
        if self.ipv6:
            yield "network_ipv6"

    def _check_limits(self) -> None:
        for bits in (self.up_bits, self.down_bits):
            remedy = 'Use at least "8K", or leave it out for no limit.'
            at_least("network_rate", bits or None, _LEAST_BITS, remedy)
        remedy = 'Use at least "1K", or leave it out for no limit.'
        at_least("network_quota", self.quota_bytes or None, _LEAST_BYTES, remedy)
        for number in (self.connections, self.new_per_second):
            at_least("network_connections", number, 1, 'Use at least 1; network = "none" is none.')


def _without_network(option: str) -> SpecError:
    return SpecError(
        attempt=f"use {option}",
        answer='network = "none" has no network that it could be about',
        remedy=f'Set network = "gateway" (or "card") too, or leave {option} out.',
    )


def _checked(option: str, texts: tuple[str, ...]) -> list[Rule]:
    if len(texts) > MOST_RULES:
        raise SpecError(
            attempt=f"read {option}",
            answer=f"it has {len(texts)} rules, and each connection is judged by all of them",
            remedy=f'Use at most {MOST_RULES}: "*.example.org" is one rule for a whole domain.',
        )
    return [parse(text, place(option, number)) for number, text in enumerate(texts)]


def _check_denied(rule: Rule, where: str) -> None:
    attempt = f"read {where}, {rule.text!r}"
    if rule.preset:
        answer, remedy = "a preset only allows", "Write the rules themselves."
    elif rule.everything and not rule.ports:
        answer = "nothing would be left"
        remedy = f'Set network = "none", or name ports: "{EVERYTHING}:25".'
    else:
        return
    raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
