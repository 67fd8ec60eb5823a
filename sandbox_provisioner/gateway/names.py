"""gateway/names.py - pure, in the gateway: the addresses that stand for names, of one box.

A program gets an address that nobody has (`SYNTHETIC_IPV4`, `SYNTHETIC_IPV6`) for each name that it
may speak with. The address that it then connects to is that name. An address is given to another
name only when no connection has it, it was not answered for a long time, and all others had their
turn.

May import: facilities.network.wish.addresses.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from sandbox_provisioner.facilities.network.wish.addresses import SYNTHETIC_IPV4, SYNTHETIC_IPV6

_FIRST_OF_V4 = int(SYNTHETIC_IPV4.network_address)
_FIRST_OF_V6 = int(SYNTHETIC_IPV6.network_address)
_ADDRESSES = SYNTHETIC_IPV4.num_addresses
# 198.18.0.1 is the name server, and its neighbours may become something too.
_FIRST = 256
MOST_NAMES = 4096
# Programs keep an address for longer than its TTL says.
REST_SECONDS = 600.0
# What comes so soon after a look-up goes where that led.
FRESH_SECONDS = 10.0
_MOST_LOOKED_AT = 64


@dataclass(slots=True)
class Binding:
    """A name and its number among the addresses; who uses it, and where its look-up has led."""

    name: str
    number: int
    used_at: float
    connections: int = 0
    addresses: tuple[str, ...] = ()
    looked_up_at: float = 0.0

    def is_fresh(self, now: float) -> bool:
        """Whether its look-up was a moment ago."""
        return bool(self.addresses) and now - self.looked_up_at < FRESH_SECONDS

    @property
    def v4(self) -> str:
        """The address that stands for it."""
        return str(IPv4Address(_FIRST_OF_V4 + self.number))

    @property
    def v6(self) -> str:
        """The same in IPv6."""
        return str(IPv6Address(_FIRST_OF_V6 + self.number))


class Names:
    """All that are bound in one box."""

    def __init__(self, most: int = MOST_NAMES) -> None:
        self._most = most
        self._by_name: dict[str, Binding] = {}  # who was used last stands last
        self._by_number: dict[int, Binding] = {}
        self._by_address: dict[str, Binding] = {}
        self._next = _FIRST

    def bind(self, name: str, now: float) -> Binding | None:
        """The binding of *name*, new or not; None where all addresses are in use."""
        binding = self._by_name.pop(name, None)
        if binding is None:
            if len(self._by_name) >= self._most and not self._drop_oldest(now):
                return None
            binding = Binding(name, self._free_number(), now)
            self._by_number[binding.number] = binding
            self._by_address[binding.v4] = self._by_address[binding.v6] = binding
        binding.used_at = now
        self._by_name[name] = binding
        return binding

    def forget(self, binding: Binding) -> None:
        """It led nowhere, and nobody was given its address."""
        del self._by_name[binding.name], self._by_number[binding.number]
        del self._by_address[binding.v4], self._by_address[binding.v6]

    def _drop_oldest(self, now: float) -> bool:
        for _ in range(min(_MOST_LOOKED_AT, len(self._by_name))):
            oldest = next(iter(self._by_name.values()))
            if oldest.connections:
                self._by_name[oldest.name] = self._by_name.pop(oldest.name)
                oldest.used_at = now
                continue
            if now - oldest.used_at < REST_SECONDS:
                return False
            self.forget(oldest)
            return True
        return False

    def _free_number(self) -> int:
        """They go round: the one that was given back last is the last to be given again."""
        while self._next in self._by_number:
            self._advance()
        number = self._next
        self._advance()
        return number

    def _advance(self) -> None:
        self._next = self._next + 1 if self._next + 1 < _ADDRESSES else _FIRST

    def at(self, address: str) -> Binding | None:
        """What *address*, as Linux writes it, stands for now."""
        return self._by_address.get(address)


def is_synthetic(address: str) -> bool:
    """Whether *address* stands for a name, or could."""
    if ":" in address:
        return IPv6Address(address) in SYNTHETIC_IPV6
    return IPv4Address(address) in SYNTHETIC_IPV4
