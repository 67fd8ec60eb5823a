"""gateway/meter.py - pure, in the gateway: how much may pass, and what did, of one box.

May import: facilities.network.tell.counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sandbox_provisioner.facilities.network.tell.counts import OTHERS, NamesRoom, OfName, Traffic

# No burst is longer than what passes in that time.
BURST_SECONDS = 0.2
_BITS = 8
# One segment of Ethernet: less is not worth a turn.
_LEAST_BYTES = 1460
# Waiting for a whole turn's worth keeps the rate smooth, and turns few.
_TURN_SECONDS = 0.02
_NO_QUOTA = 1 << 62


class Bucket:
    """Tokens that come at *per_second*, and are kept for *burst* at the most."""

    def __init__(self, per_second: float, burst: float, now: float) -> None:
        self.per_second = per_second
        self._burst = burst
        self._level = burst
        self._at = now

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._at) * self.per_second)
        self._at = now

    def available(self, now: float) -> int:
        """How many tokens there are."""
        self._fill(now)
        return max(0, int(self._level))

    def take(self, count: int) -> None:
        """*count* are used up; more than there are is a debt."""
        self._level -= count

    def seconds_to(self, count: float) -> float:
        """How long it takes until there are *count*."""
        return max(0.0, (count - self._level) / self.per_second)


class Rate(Bucket):
    """Bytes in one direction."""

    def __init__(self, bits: int, now: float) -> None:
        per_second = bits / _BITS
        super().__init__(per_second, max(_LEAST_BYTES, per_second * BURST_SECONDS), now)
        self._turn = max(_LEAST_BYTES, per_second * _TURN_SECONDS)

    def available(self, now: float) -> int:
        """As many as are worth a turn, or none."""
        found = super().available(now)
        return found if found >= min(self._turn, self._burst) - 1 else 0

    @property
    def turn_bytes(self) -> int:
        """What one connection takes at a time where others wait."""
        return int(self._turn)

    def seconds_to_turn(self) -> float:
        """How long it takes until a turn is worth it."""
        return self.seconds_to(min(self._turn, self._burst))


@dataclass(slots=True)
class OfOne:
    """What went to one name, or address, and port."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    refusals: int = 0


@dataclass(slots=True)
class Tally:
    """What has passed, in all and by name. Those that have *room* are told apart; of the others
    there is but the sum, under `OTHERS`, and how many times one of them was met. *used_bytes* of
    the quota were used before."""

    quota_bytes: int
    used_bytes: int = 0
    totals: OfOne = field(default_factory=OfOne)
    by_name: dict[str, OfOne] = field(default_factory=dict)
    room: NamesRoom = field(default_factory=NamesRoom)
    unnamed: int = 0
    is_used_up: bool = False

    def __post_init__(self) -> None:
        self.room.take(OTHERS)
        self.is_used_up = not self.left_bytes

    def of(self, name: str) -> OfOne:
        """The counts of *name*."""
        found = self.by_name.get(name)
        if found is None:
            if not self.room.take(name):
                self.unnamed += 1
                name = OTHERS
            found = self.by_name.setdefault(name, OfOne())
        return found

    def connected(self, name: str) -> OfOne:
        """A connection to *name* begins."""
        found = self.of(name)
        found.connections += 1
        self.totals.connections += 1
        return found

    def refused(self, name: str) -> None:
        """It was refused."""
        self.of(name).refusals += 1
        self.totals.refusals += 1

    def passed(self, one: OfOne, *, up: int = 0, down: int = 0) -> None:
        """Bytes of a connection."""
        for counts in (one, self.totals):
            counts.up_bytes += up
            counts.down_bytes += down

    @property
    def left_bytes(self) -> int:
        """What of the quota is left; where there is none, more than anybody moves."""
        if not self.quota_bytes:
            return _NO_QUOTA
        used = self.used_bytes + self.totals.up_bytes + self.totals.down_bytes
        return max(0, self.quota_bytes - used)

    def traffic(self, *, with_names: bool) -> Traffic:
        """All of it, for the file of counts."""
        told = self.by_name if with_names else {}
        return Traffic(
            **_fields(self.totals),
            quota_used_up=self.is_used_up,
            unnamed=self.unnamed,
            names={name: OfName(**_fields(one)) for name, one in told.items()},
        )


def _fields(one: OfOne) -> dict[str, Any]:
    return {
        "up_bytes": one.up_bytes,
        "down_bytes": one.down_bytes,
        "connections": one.connections,
        "refusals": one.refusals,
    }
