"""pool.py - any process outside; pure: the addresses that network cards may have."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

from sandbox_provisioner.errors import SpecError

# What providers have between them and their customers (RFC 6598): hardly anybody else has it.
POOL = "100.64.0.0/10"
# Everybody's own, by a number that hardly anybody else has (RFC 4193).
POOL_IPV6 = "fd53:616e:6462:6f79::/64"
_UNIQUE_LOCAL = IPv6Network("fd00::/8")
_LONGEST_PREFIX = 96  # an address has that of IPv4 at its end
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


def parse_pool_ipv6(text: str) -> IPv6Network:
    """The pool that the option `network_pool_ipv6` names; SpecError."""
    remedy = f'Write a range of unique local addresses that this host does not use: "{POOL_IPV6}".'
    attempt = f"read network_pool_ipv6, {text!r}"
    try:
        pool = IPv6Network(text)
    except ValueError as error:
        raise SpecError(attempt=attempt, answer=str(error), remedy=remedy) from None
    if not pool.subnet_of(_UNIQUE_LOCAL):
        answer = f"its addresses are not in {_UNIQUE_LOCAL}, and may be somebody else's"
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    if pool.prefixlen > _LONGEST_PREFIX:
        answer = "a card's address of IPv4 is the end of its address of IPv6, which takes 32 bits"
        raise SpecError(attempt=attempt, answer=answer, remedy=remedy)
    return pool
