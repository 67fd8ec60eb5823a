"""netlink.py - pure: messages of netlink(7), as bytes.

They are made once, outside; PID 1 only sends them, and reads what Linux answers to each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

ROUTE, NETFILTER = 0, 12  # linux/netlink.h: NETLINK_ROUTE, NETLINK_NETFILTER
REQUEST, ACK, EXCLUSIVE, CREATE, APPEND = 0x1, 0x4, 0x200, 0x400, 0x800
_NESTED = 0x8000  # NLA_F_NESTED


@dataclass(frozen=True, slots=True)
class Messages:
    """What one write to a socket of *protocol* tells: *names* are, in their order, of those that
    Linux answers, and stand in an error."""

    protocol: int
    data: bytes
    names: tuple[str, ...]


def attribute(kind: int, data: bytes) -> bytes:
    """struct nlattr: its own length, and padding to four bytes behind."""
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Attributes as the data of one."""
    return attribute(kind | _NESTED, b"".join(attributes))


def numbered(kind: int, flags: int, body: bytes, number: int) -> bytes:
    """struct nlmsghdr with its *number*, and *body*, whose attributes are padded already."""
    return struct.pack("=IHHII", 16 + len(body), kind, flags, number, 0) + body


def attributes(text: bytes) -> dict[int, bytes]:
    """By their kinds, those in *text*; of one kind the last."""
    found: dict[int, bytes] = {}
    while len(text) >= 4:
        length, kind = struct.unpack_from("=HH", text)
        if length < 4:
            break
        found[kind & 0x3FFF] = text[4:length]
        text = text[length + -length % 4 :]
    return found
