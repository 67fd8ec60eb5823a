"""gateway/seats.py - pure, in the gateway: how many connections all boxes may have together.

Each takes two descriptors, of which this process has a number (getrlimit(2), RLIMIT_NOFILE). A box
may have as many as are free, and no more: one alone gets half of them, and of *n* that want all
each gets one part of *n* + 1. So whoever comes last finds as many as each other one has.

May import: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

# For pipes, look-ups, a few descriptors of each of some hundred boxes.
_RESERVED_SHARE = 4
# Each takes 2 KB here, and more of Linux: what this process may take is bounded.
_MOST = 40_000


@dataclass(slots=True)
class Seats:
    """*most* connections, of which *taken* are there."""

    most: int
    taken: int = 0

    @classmethod
    def of(cls, descriptors: int) -> Seats:
        """As many as so many descriptors are good for."""
        return cls(min(_MOST, (descriptors - descriptors // _RESERVED_SHARE) // 2))

    def has_one_for(self, taken_by_box: int) -> bool:
        """Whether a box that has *taken_by_box* may have another one."""
        return taken_by_box < self.most - self.taken
