"""connections.py - in the launching process: ends the connections of a box, whose quota is used up.

What comes for a box is refused to whoever sends it. A program that only reads would never know:
nothing tells it but a reset, and nobody sends one. So Linux is asked to end its sockets, each of
which then fails with ECONNABORTED (sock_diag(7), SOCK_DESTROY; CONFIG_INET_DIAG_DESTROY).
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable, Collection

from sandbox_provisioner.facilities.network.card import netlink
from sandbox_provisioner.facilities.network.plan.netlink import REQUEST, numbered
from sandbox_provisioner.facilities.network.wish.addresses import Address

_DIAGNOSES = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY, _DESTROY = 20, 21
_DUMP = 0x300
_ALL_STATES = 0xFFFFFFFF
# struct inet_diag_req_v2 is four bytes and the states, then struct inet_diag_sockid: two ports, two
# addresses of 16 bytes, an interface and a cookie.
_REQUEST = struct.Struct("=BBBBI")
_IDENTITY = slice(4, 52)  # of struct inet_diag_msg
_SOURCE, _OTHER = slice(8, 24), slice(24, 40)
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96


def end_connections(own: Collection[Address]) -> None:
    """End those of TCP that the addresses *own* have in the namespace of the calling thread, where
    Linux can; what programs inside say to one another goes on."""
    sources = {address.packed.ljust(16, b"\0") for address in own}
    sources |= {_MAPPED + address.packed for address in own if address.version == 4}
    end_connections_that(lambda source, _: source in sources)


def end_connections_that(is_meant: Callable[[bytes, bytes], bool]) -> None:
    """The same for all of which *is_meant* says so by their packed addresses, the source first, as
    `struct inet_diag_sockid` has them."""
    for family in (socket.AF_INET, socket.AF_INET6):  # one of IPv6 may speak IPv4, too
        asked = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES)
        with contextlib.suppress(OSError), netlink.opened(_DIAGNOSES) as channel:
            channel.send(numbered(_BY_FAMILY, REQUEST | _DUMP, asked + bytes(48), 1))
            told = [*netlink.dumped(channel)]
            found = [content for content in told if is_meant(content[_SOURCE], content[_OTHER])]
            for content in found:
                channel.send(numbered(_DESTROY, REQUEST, asked + content[_IDENTITY], 2))
