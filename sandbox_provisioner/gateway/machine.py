"""gateway/machine.py - runs in the gateway: whether an address is one of this machine's own, now.

The server tells those of a box's start; since then a network may have come up, and of IPv6 a
machine makes itself a new address every day (RFC 8981).

May import: facilities.network.wish.addresses.
"""

from __future__ import annotations

import socket

from sandbox_provisioner.facilities.network.wish.addresses import meant_by, read_address

_ANY_PORT = 9


def own_address(address: str) -> str:
    """Whom one reaches at *address*, if that is this machine; "" where it is another.

    A datagram socket that is connected sends nothing, and gets the address from which it would: to
    an address of this machine that is this very address (RFC 6724, 5, rule 1). OSError where there
    is no socket to be had: nobody is dialled then.
    """
    read = read_address(address)
    if read is None:
        return ""
    meant = str(meant_by(read))
    family = socket.AF_INET6 if ":" in meant else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as looking:
        try:
            looking.connect((meant, _ANY_PORT))
        except OSError:  # no way leads there
            return ""
        return meant if looking.getsockname()[0] == meant else ""
