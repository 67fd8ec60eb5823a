"""pool.py - any process outside; pure: the addresses that network cards may have."""

from __future__ import annotations

from ipaddress import IPv4Network

from sandbox_provisioner.errors import SpecError

# What providers have between them and their customers (RFC 6598): hardly anybody else has it.
POOL = "100.64.0.0/10"
# What no public network has: a pool elsewhere would hide others from this host (RFC 6890).
_POOLS = tuple(map(IPv4Network, ("100.64.0.0/10", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))


def parse_pool(text: str) -> IPv4Network:
    """The pool that the option `network_pool` names; SpecError."""
    remedy = 'Write a range of private addresses that this host does not use: "100.64.0.0/16".'
    attempt = f"read network_pool, {text!r}"
    try:
        pool = IPv4Network(text)
    except ValueError as error:
        raise SpecError(attempt=attempt, answer=str(error), remedy=remedy) from None
    if not any(pool.subnet_of(private) for private in _POOLS):
        answer = "its addresses may be somebody else's"
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    return pool
