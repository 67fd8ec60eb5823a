"""gateway/seats.py - pure, in the gateway: how many connections all boxes may have together.

Each takes two descriptors, of which this process has a number (getrlimit(2), RLIMIT_NOFILE). The
last part of them is kept for boxes that have few.

May import: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

# For pipes, look-ups, a few descriptors of each of some hundred boxes.
_RESERVED_SHARE = 4
_KEPT_SHARE = 8
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

    def has_one_for(self, taken_by_box: int, boxes: int) -> bool:
        """Whether a box that has *taken_by_box*, one of *boxes*, may have another one."""
        if self.taken >= self.most:
            return False
        kept = self.most // _KEPT_SHARE
        return self.taken < self.most - kept or taken_by_box < kept // max(1, boxes)
