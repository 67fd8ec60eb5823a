"""netlink.py - in the launching process: speaks netlink(7), in the calling thread's namespace.

Linux has done all that it was told when send(2) returns, and its answers wait. So nobody waits
here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from sandbox_provisioner.facilities.network.card import nft
from sandbox_provisioner.facilities.network.card.nft import Message
from sandbox_provisioner.facilities.network.plan.netlink import NETFILTER, ROUTE, Messages

_CAPPED, _SOL_NETLINK = 10, 270  # NETLINK_CAP_ACK: an answer does not repeat what was asked
_ERROR, _DONE = 2, 3
_LINKS, _STATE, _IS_UP = 1, 16, 6  # RTMGRP_LINK, IFLA_OPERSTATE, IF_OPER_UP
_MOST_BYTES = 1 << 20
_HEADER = struct.Struct("=IHHII")


def _open(protocol: int) -> socket.socket:
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    channel = socket.socket(socket.AF_NETLINK, kind, protocol)
    channel.setsockopt(_SOL_NETLINK, _CAPPED, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    return channel


def tell(messages: Messages) -> None:
    """Let Linux do all of *messages*, which are numbered from 1; OSError with the name of that
    which it refuses first."""
    with _open(messages.protocol) as channel:
        channel.send(messages.data)
        for kind, number, body in _received(channel):
            error = -struct.unpack_from("=i", body)[0] if kind == _ERROR else 0
            if error:
                name = messages.names[number - 1] if number else "do all of it"
                raise OSError(error, f"Linux refuses to {name}: {os.strerror(error)}")


def watch_links() -> socket.socket:
    """One that tells of each change of an interface."""
    channel = _open(ROUTE)
    channel.bind((0, _LINKS))
    return channel


def await_running(changes: socket.socket, seconds: float) -> None:
    """Until an interface runs, as `watch_links` tells. The end of a pair that was up first drops
    what is sent until Linux has noted, in its own time, that there is another one; who sends
    meanwhile waits a second for nothing (TCP's first repetition)."""
    changes.settimeout(seconds)
    with contextlib.suppress(TimeoutError):
        while not any(_runs(body) for _, _, body in _messages(changes.recv(_MOST_BYTES))):
            pass


def _runs(body: bytes) -> bool:
    """Behind struct ifinfomsg; IFLA_OPERSTATE of IF_OPER_UP (RFC 2863)."""
    return attributes(body[16:]).get(_STATE) == bytes([_IS_UP])


def apply(messages: Sequence[Message]) -> None:
    """All of *messages* for nf_tables, or none; OSError."""
    names = tuple(message.what for message in messages)
    tell(Messages(NETFILTER, nft.batch(messages), names))


def read(kind: int, body: bytes = b"", *, every: bool = False) -> list[bytes]:
    """The attributes of what nf_tables has; OSError."""
    message = nft.get(kind, body, every=every)
    found: list[bytes] = []
    with _open(NETFILTER) as channel:
        channel.send(message.encoded(1))
        while True:
            for answer, _, content in _received(channel, wait=every):
                if answer == _ERROR and (error := -struct.unpack_from("=i", content)[0]):
                    raise OSError(error, f"Linux refuses to {message.what}: {os.strerror(error)}")
                if answer in {_ERROR, _DONE}:
                    return found
                found.append(content[4:])


def _received(channel: socket.socket, *, wait: bool = False) -> Iterator[tuple[int, int, bytes]]:
    """Type, number and content of each message that is there."""
    flags = 0 if wait else socket.MSG_DONTWAIT
    while True:
        try:
            text = channel.recv(_MOST_BYTES, flags)
        except BlockingIOError:
            return
        yield from _messages(text)


def _messages(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(text) >= _HEADER.size:
        length, kind, _, number, _ = _HEADER.unpack_from(text)
        yield kind, number, text[_HEADER.size : length]
        text = text[length + -length % 4 :]


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
