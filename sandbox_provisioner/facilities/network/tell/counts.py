"""counts.py - any process outside, and the gateway; pure: the file of counts.

Whoever serves a sandbox's network writes it, in the folder of its record, through one descriptor;
whoever shows it reads it at any time::

    0    ten numbers of 64 bits, little-endian: see `_HEADER`; always current
    80   JSON: by name, what went there; written once a second at most, and at the end

Who writes keeps the names that `NamesRoom` has room for: all of these are written.

The gateway, in which bytes of strangers are parsed, may write anything there: what is read is of a
bounded size, and what is no counts counts as none. A reader takes no lock: the number of changes is
odd while the names are written, and another one afterwards.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MOST_BYTES = 1 << 20
MOST_NAMES = 4096
# The name of all those that there is no room for.
OTHERS = "(others)"
_VERSION = 1
# Version, bytes up, bytes down, connections, refusals, whether the quota is used up, how often one
# of the names that have no room was met, changes of the names, their length in bytes, whether
# nothing is written any more.
_HEADER = struct.Struct("<10Q")
_LONGEST_NAME = 300  # a name of 253 letters, and its port
_TRIES = 5
_MOST = 1 << 63
_LONGEST_NUMBERS = len(":[,,,],") + 4 * len(str(_MOST))


@dataclass(frozen=True, slots=True, kw_only=True)
class OfName:
    """What went to one name, or address, and port. *refusals*: how often it was refused."""

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    refusals: int = 0


def added(counts: Iterable[OfName]) -> OfName:
    """Their sums."""
    found = [*counts]
    return OfName(
        up_bytes=sum(one.up_bytes for one in found),
        down_bytes=sum(one.down_bytes for one in found),
        connections=sum(one.connections for one in found),
        refusals=sum(one.refusals for one in found),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a sandbox has sent (*up_bytes*) and received, over which connections, and what it was
    refused. *names* has it by name, "data.example.org:443"; *unnamed* more times it was a name
    that had no room. *is_last*: the sandbox has ended, and nothing comes after it.
    """

    up_bytes: int = 0
    down_bytes: int = 0
    connections: int = 0
    refusals: int = 0
    quota_used_up: bool = False
    unnamed: int = 0
    names: Mapping[str, OfName] = field(default_factory=dict)
    is_last: bool = False


def header(traffic: Traffic, changes: int = 0, length: int = 0) -> bytes:
    """The numbers of *traffic*, for the beginning of the file."""
    return _HEADER.pack(
        _VERSION,
        traffic.up_bytes,
        traffic.down_bytes,
        traffic.connections,
        traffic.refusals,
        int(traffic.quota_used_up),
        traffic.unnamed,
        changes,
        length,
        int(traffic.is_last),
    )


@dataclass(slots=True)
class NamesRoom:
    """What there is room for behind the header, whatever the numbers of each name come to be."""

    names: int = MOST_NAMES
    bytes: int = MOST_BYTES - _HEADER.size - len("{}")

    def take(self, name: str) -> bool:
        """Room for *name*; False where there is none."""
        size = len(json.dumps(name)) + _LONGEST_NUMBERS
        if not self.names or size > self.bytes:
            return False
        self.names -= 1
        self.bytes -= size
        return True


def names_text(names: Mapping[str, OfName]) -> bytes:
    """The names, for what comes behind the header."""
    found = {
        name: [counts.up_bytes, counts.down_bytes, counts.connections, counts.refusals]
        for name, counts in names.items()
    }
    return json.dumps(found, separators=(",", ":")).encode()


class Writer:
    """Writes the file by *write*, which is called with bytes and where they belong."""

    def __init__(self, write: Callable[[bytes, int], object]) -> None:
        self._write = write
        self._changes = 0
        self._length = 0

    def numbers(self, traffic: Traffic) -> None:
        """Bring the numbers up to date."""
        self._write(header(traffic, self._changes, self._length), 0)

    def all(self, traffic: Traffic) -> None:
        """The numbers and the names."""
        text = names_text(traffic.names)
        self._changes |= 1  # it is odd already where writing failed, as on a full disk
        self.numbers(traffic)
        self._write(text, _HEADER.size)
        self._changes, self._length = self._changes + 1, len(text)
        self.numbers(traffic)


def read_counts(read: Callable[[int, int], bytes]) -> Traffic:
    """What the file holds, by *read*, which is called with how many bytes, and from where on. What
    is no counts is `Traffic` of nothing."""
    head = read(_HEADER.size, 0)
    for _ in range(_TRIES):
        if len(head) != _HEADER.size or _HEADER.unpack(head)[0] != _VERSION:
            return Traffic()
        *_, changes, length, _ = _HEADER.unpack(head)
        text = read(min(length, MOST_BYTES - _HEADER.size), _HEADER.size)
        again = read(_HEADER.size, 0)
        if changes % 2 == 0 and _HEADER.unpack(again)[-3] == changes:
            return _traffic(again, _names(text))
        head = again
    return _traffic(head, {})  # it is written all the time; the numbers are whole nevertheless


def _traffic(head: bytes, names: Mapping[str, OfName]) -> Traffic:
    _, up, down, connections, refusals, used_up, unnamed, _, _, last = _HEADER.unpack(head)
    return Traffic(
        up_bytes=up,
        down_bytes=down,
        connections=connections,
        refusals=refusals,
        quota_used_up=bool(used_up),
        unnamed=unnamed,
        names=names,
        is_last=bool(last),
    )


def _names(text: bytes) -> dict[str, OfName]:
    try:
        found = json.loads(text) if text else {}
        pairs = [_pair(name, counts) for name, counts in list(found.items())[:MOST_NAMES]]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return dict(pairs)


def _pair(name: str, counts: Any) -> tuple[str, OfName]:
    up, down, connections, refusals = counts
    for number in counts:
        if type(number) is not int or not 0 <= number < _MOST:
            raise ValueError(f"{number!r} is no count")
    return name[:_LONGEST_NAME], OfName(
        up_bytes=up, down_bytes=down, connections=connections, refusals=refusals
    )
