"""refusals.py - any process outside; pure: what a person reads of what a card has refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from sandbox_provisioner.facilities.network.card.counts import Destination
from sandbox_provisioner.facilities.network.tell.counts import OTHERS
from sandbox_provisioner.facilities.network.tell.pace import Pace
from sandbox_provisioner.facilities.network.wish.addresses import Address
from sandbox_provisioner.facilities.network.wish.network import NetworkWish
from sandbox_provisioner.facilities.network.wish.rules import Rules, Verdict


def names_of(addresses: Mapping[str, Iterable[Address]]) -> dict[str, str]:
    """By address the name that leads there, where one name alone does."""
    leading: dict[str, set[str]] = {}
    for name, found in addresses.items():
        for address in found:
            leading.setdefault(str(address), set()).add(name)
    return {address: next(iter(names)) for address, names in leading.items() if len(names) == 1}


class Refusals:
    """Those of one card with *rules*, as far as they have been told; *names* are known of
    addresses. Linux alone counts: here is only what was seen there last."""

    def __init__(
        self, rules: Rules, wish: NetworkWish, names: Mapping[str, str], pace: Pace
    ) -> None:
        self._rules = rules
        self._wish = wish
        self._names = names
        self._pace = pace
        self._seen: Mapping[Destination, int] = {}
        self._others = 0

    def new(self, refused: int, found: Mapping[Destination, int], now: float) -> Iterator[str]:
        """Sentences for what is new, of *refused* in all and *found* by destination."""
        for destination, count in found.items():
            if count > self._seen.get(destination, 0):
                label = destination.label(self._names)
                if self._pace.may_say(label, now):
                    yield self._judge(destination).sentence(label)
        self._seen = found
        others = refused - sum(found.values())
        if others > self._others and self._pace.may_say(OTHERS, now):
            yield _OTHERS
        self._others = max(others, self._others)

    def _judge(self, destination: Destination) -> Verdict:
        """Why Linux has refused it: it has the rules, and how many connections there may be."""
        name = self._names.get(str(destination.address))
        protocol = "tcp" if destination.has_port else "other"
        verdict = self._rules.judge(name, str(destination.address), destination.port, protocol)
        if name and not verdict.allowed:
            by_address = self._rules.judge(
                None, str(destination.address), destination.port, protocol
            )
            verdict = by_address if by_address.allowed else verdict
        return self._too_many() if verdict.allowed else verdict

    def _too_many(self) -> Verdict:
        why = (
            f"network_connections allows this kernel {self._wish.connections} at once, and "
            f"{self._wish.new_per_second} new ones a second"
        )
        return Verdict(allowed=False, why=why)


_OTHERS = (
    "More was refused than can be told apart: jupyter sandbox network shows what this kernel has "
    "wanted first."
)
