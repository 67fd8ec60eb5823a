"""netlink.py - in the launching process: speaks netlink(7), in the calling thread's namespace.

Linux has done all that it was told when send(2) returns, and its answers wait. So nobody waits
here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

from sandbox_provisioner.facilities.network.card import nft
from sandbox_provisioner.facilities.network.card.nft import Message
from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    CREATE,
    EXCLUSIVE,
    NETFILTER,
    REQUEST,
    ROUTE,
    Messages,
    attributes,
    numbered,
)

_CAPPED, _SOL_NETLINK = 10, 270  # NETLINK_CAP_ACK: an answer does not repeat what was asked
_ERROR, _DONE = 2, 3
_INTERRUPTED = 0x10  # NLM_F_DUMP_INTR
_TRIES = 50
_DUMP = 0x300  # NLM_F_DUMP
_TABLES = 1 << 6  # NFNLGRP_NFTABLES
_LINKS, _STATE, _IS_UP = 1, 16, 6  # RTMGRP_LINK, IFLA_OPERSTATE, IF_OPER_UP
_MOST_BYTES = 1 << 20
_HEADER = struct.Struct("=IHHII")


def opened(protocol: int) -> socket.socket:
    """A socket to that part of Linux."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    channel = socket.socket(socket.AF_NETLINK, kind, protocol)
    channel.setsockopt(_SOL_NETLINK, _CAPPED, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
    return channel


def tell(messages: Messages) -> None:
    """Let Linux do all of *messages*, which are numbered from 1; OSError with the name of that
    which it refuses first."""
    with opened(messages.protocol) as channel:
        channel.send(messages.data)
        for kind, number, body in _received(channel):
            error = -struct.unpack_from("=i", body)[0] if kind == _ERROR else 0
            if error:
                name = messages.names[number - 1] if number else "do all of it"
                raise OSError(error, f"Linux refuses to {name}: {os.strerror(error)}")


def watch_links() -> socket.socket:
    """One that tells of each change of an interface."""
    channel = opened(ROUTE)
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


def watch_tables() -> socket.socket:
    """One that tells of each change of what nf_tables has, and of quotas that are used up."""
    channel = opened(NETFILTER)
    channel.bind((0, _TABLES))
    return channel


def names_told(changes: socket.socket, seconds: float | None = None) -> set[str] | None:
    """Of tables that are gone, and of objects that are new or used up, what `watch_tables` tells
    next; None where more was told than could be kept. Waits for it, for *seconds* at the most."""
    changes.settimeout(seconds)
    try:
        told = changes.recv(_MOST_BYTES)
    except TimeoutError:
        return set()
    except OSError:  # ENOBUFS
        return None
    names = set()
    for kind, _, content in _messages(told):
        if name := _NAMES.get(kind & 0xFF):
            found = attributes(content[4:]).get(name, b"")
            names.add(found.rstrip(b"\0").decode(errors="replace"))
    return names


# By the kind of a message the attribute with the name.
_NAMES = {nft.DELETE_TABLE: 1, nft.NEW_OBJECT: 2}


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
    found = _every(message) if every else _one(message)
    return [content[4:] for content in found]  # behind struct nfgenmsg


def read_all(kind: int) -> list[tuple[int, dict[int, bytes]]]:
    """Family and attributes of all that nf_tables has of *kind*, in anybody's tables; OSError."""
    found = _every(nft.get(kind, family=0, every=True))
    return [(content[0], attributes(content[4:])) for content in found]


def _every(message: Message) -> list[bytes]:
    """What a dump has. Where somebody changes the tables meanwhile it may lack something: again."""
    for _ in range(_TRIES):
        with contextlib.suppress(InterruptedError), opened(NETFILTER) as channel:
            channel.send(message.encoded(1))
            return list(dumped(channel))
    raise OSError(errno.EAGAIN, f"Linux changes what it is to tell: {message.what}")


def _one(message: Message) -> list[bytes]:
    with opened(NETFILTER) as channel:
        channel.send(message.encoded(1))
        return list(_answered(channel))


def dumped(channel: socket.socket) -> Iterator[bytes]:
    """The content of each message of a dump, which *channel* has been asked for; OSError."""
    while True:
        for kind, _, content in _messages(channel.recv(_MOST_BYTES)):
            if kind == _DONE:
                return
            _raise_error(kind, content)
            yield content


def _answered(channel: socket.socket) -> Iterator[bytes]:
    for kind, _, content in _received(channel):
        _raise_error(kind, content)
        if kind != _ERROR:
            yield content


def _raise_error(kind: int, content: bytes) -> None:
    if kind == _ERROR and (error := -struct.unpack_from("=i", content)[0]):
        raise OSError(error, f"Linux refuses to tell what there is: {os.strerror(error)}")


def _received(channel: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """Type, number and content of each message that is there."""
    while True:
        try:
            text = channel.recv(_MOST_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        yield from _messages(text)


def _messages(text: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(text) >= _HEADER.size:
        length, kind, flags, number, _ = _HEADER.unpack_from(text)
        if flags & _INTERRUPTED:
            raise InterruptedError
        yield kind, number, text[_HEADER.size : length]
        text = text[length + -length % 4 :]


_NEW_RULE, _DELETE_RULE, _GET_RULE = 32, 33, 34  # RTM_*


def rules_where(holds: Callable[[bytes], bool]) -> list[bytes]:
    """The rules of routing, of IPv4 and IPv6, of which that *holds*; OSError."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        with opened(ROUTE) as channel:
            channel.send(numbered(_GET_RULE, REQUEST | _DUMP, bytes([family]) + bytes(11), 1))
            found += [rule for rule in dumped(channel) if rule[:1] == bytes([family])]
    return [rule for rule in found if holds(rule)]


def deletion_of(rule: bytes) -> Messages:
    """To delete *rule*, as `rules_where` has found it."""
    data = numbered(_DELETE_RULE, REQUEST | ACK, rule, 1)
    return Messages(ROUTE, data, ("delete a rule of routing",))


def addition_of(rule: bytes) -> Messages:
    """To add it again."""
    data = numbered(_NEW_RULE, REQUEST | ACK | CREATE | EXCLUSIVE, rule, 1)
    return Messages(ROUTE, data, ("add a rule of routing",))


def listed(text: bytes) -> list[bytes]:
    """The contents of the attributes in *text*, which are all of one kind."""
    found = []
    while len(text) >= 4:
        (length,) = struct.unpack_from("=H", text)
        if length < 4:
            break
        found.append(text[4:length])
        text = text[length + -length % 4 :]
    return found
