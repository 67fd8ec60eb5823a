"""gateway/settings.py - pure, in the gateway: what the server says of one box.

May import: facilities.network.wish.rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sandbox_provisioner.facilities.network.wish.rules import Rules

_MOST = 1 << 62
_TEXTS = ("allow", "deny", "own_addresses")
_NUMBERS = ("up_bits", "down_bits", "quota_bytes", "used_bytes", "connections", "new_per_second")


@dataclass(frozen=True, slots=True)
class Settings:
    """One box: its rules, and of its limits 0 for none. *used_bytes* of the quota were used by
    former boxes of the same kernel."""

    id: str
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    own_addresses: tuple[str, ...] = ()
    up_bits: int = 0
    down_bits: int = 0
    quota_bytes: int = 0
    used_bytes: int = 0
    connections: int = 0
    new_per_second: int = 0
    audit: bool = False

    def rules(self) -> Rules:
        """As the judge has them; SpecError, ValueError."""
        return Rules.read(self.allow, self.deny, self.own_addresses)


def read_settings(text: str) -> Settings:
    """Those of a new box, as JSON; ValueError."""
    told = _told(text)
    if not isinstance(told.get("id"), str) or not told["id"] or " " in told["id"]:
        raise ValueError("it has no id")
    return _with(Settings(told.pop("id")), told)


def _told(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except RecursionError:
        told = None
    if not isinstance(told, dict):
        raise ValueError("it is no JSON object")
    return told


def _with(settings: Settings, told: dict[str, Any]) -> Settings:
    known: dict[str, Callable[[str, Any], Any]] = {
        **dict.fromkeys(_TEXTS, _texts),
        **dict.fromkeys(_NUMBERS, _number),
        "audit": _yes_or_no,
    }
    if unknown := set(told) - set(known):
        raise ValueError(f"nobody knows {min(unknown)!r}")
    return replace(settings, **{name: known[name](name, value) for name, value in told.items()})


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{name!r} is no list of texts")
    return tuple(value)


def _number(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{name!r} is no number of a limit")
    return value


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name!r} is neither true nor false")
    return value
