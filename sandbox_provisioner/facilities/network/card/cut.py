"""cut.py - in a process of root's, outside: takes a running box's network away, for good.

What leads out of a box is an interface (a card), or routes that bring everything to whoever
listens for the gateway. Nobody inside may make either again. What was connected is ended: a
program that only reads would never know.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from sandbox_provisioner.facilities.network.card import netlink
from sandbox_provisioner.facilities.network.card.connections import end_connections_that
from sandbox_provisioner.facilities.network.card.maker import in_namespace, refuse_own
from sandbox_provisioner.facilities.network.plan.local import no_address_is_ours
from sandbox_provisioner.facilities.network.plan.netlink import (
    ACK,
    REQUEST,
    ROUTE,
    Messages,
    numbered,
)

_DELLINK = 17  # linux/rtnetlink.h
_LOOPBACK = "lo"
_NOT_THERE = {errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL, errno.ENETUNREACH}


def cut_off(pid: int) -> None:
    """Leave the network namespace of process *pid* nothing but its loopback; OSError."""
    box = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        refuse_own(box)
        in_namespace(box, _cut)
    finally:
        os.close(box)


def _cut() -> None:
    for index, name in socket.if_nameindex():
        if name != _LOOPBACK:
            body = struct.pack("=BxHiII", 0, 0, index, 0, 0)  # struct ifinfomsg
            message = numbered(_DELLINK, REQUEST | ACK, body, 1)
            _told(Messages(ROUTE, message, (f"delete {name}",)))
    for messages in no_address_is_ours():
        _told(messages)
    end_connections_that(_leads_out)


def _told(messages: Messages) -> None:
    try:
        netlink.tell(messages)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise


def _leads_out(source: bytes, destination: bytes) -> bool:
    """Of a connection by its two addresses; nobody has yet connected to one that only listens."""
    return not (_is_local(source) and _is_local(destination))


def _is_local(packed: bytes) -> bool:
    """Those of IPv4 have four bytes, and nothing behind."""
    if not any(packed[4:]):
        return not any(packed) or ipaddress.IPv4Address(packed[:4]).is_loopback
    address = ipaddress.IPv6Address(packed)
    mapped = address.ipv4_mapped
    return mapped.is_loopback if mapped else address.is_loopback
