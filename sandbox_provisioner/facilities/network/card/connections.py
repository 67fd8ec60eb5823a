"""connections.py - in the launching process: ends the connections of a box, whose quota is used up.

What comes for a box is refused to whoever sends it. A program that only reads would never know:
nothing tells it but a reset, and nobody sends one. So Linux is asked to end its sockets, each of
which then fails with ECONNABORTED (sock_diag(7), SOCK_DESTROY; CONFIG_INET_DIAG_DESTROY).
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

from sandbox_provisioner.facilities.network.card import netlink
from sandbox_provisioner.facilities.network.plan.netlink import REQUEST, numbered

_DIAGNOSES = 4  # NETLINK_SOCK_DIAG
_BY_FAMILY, _DESTROY = 20, 21
_DUMP = 0x300
_ALL_STATES = 0xFFFFFFFF
# struct inet_diag_req_v2 is four bytes and the states, then struct inet_diag_sockid: two ports, two
# addresses of 16 bytes, an interface and a cookie.
_REQUEST = struct.Struct("=BBBBI")
_IDENTITY = slice(4, 52)  # of struct inet_diag_msg
_SOURCE = slice(8, 12)


def end_connections(address: IPv4Address) -> None:
    """End those of TCP that *address* has in the namespace of the calling thread, where Linux can;
    what programs inside say to one another goes on."""
    with contextlib.suppress(OSError), netlink.opened(_DIAGNOSES) as channel:
        for identity in list(_identities(channel, address)):
            body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + identity
            channel.send(numbered(_DESTROY, REQUEST, body, 2))


def _identities(channel: socket.socket, address: IPv4Address) -> Iterator[bytes]:
    body = _REQUEST.pack(socket.AF_INET, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + bytes(48)
    channel.send(numbered(_BY_FAMILY, REQUEST | _DUMP, body, 1))
    for content in netlink.dumped(channel):
        if content[_SOURCE] == address.packed:
            yield content[_IDENTITY]
