"""pace.py - any process outside, and the gateway; pure: how often a person is told of one thing,
and of how many in all: code in a kernel can want any number of names and addresses."""

from __future__ import annotations

AGAIN_SECONDS = 60.0
_AT_ONCE = 10
_PER_SECOND = 1 / 5
_MOST_KNOWN = 256


class Pace:
    """Of one kernel: the same once a minute, and ten at once, then one in five seconds."""

    def __init__(self, now: float) -> None:
        self._said: dict[str, float] = {}  # what was said last stands last
        self._left = float(_AT_ONCE)
        self._since = now

    def may_say(self, about: str, now: float) -> bool:
        """Whether something may be said *about* that now; then it counts as said."""
        if now - self._said.get(about, now - AGAIN_SECONDS) < AGAIN_SECONDS:
            return False
        self._left = min(_AT_ONCE, self._left + (now - self._since) * _PER_SECOND)
        self._since = now
        if self._left < 1:
            return False
        self._left -= 1
        self._said.pop(about, None)
        self._said[about] = now
        if len(self._said) > _MOST_KNOWN:
            del self._said[next(iter(self._said))]
        return True
