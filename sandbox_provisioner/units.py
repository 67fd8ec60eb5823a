"""units.py - pure: sizes, rates and shares, as a person writes them and reads them."""

from __future__ import annotations

import os
import re

from sandbox_provisioner.errors import SpecError

# JupyterHub's ByteSpecification: a number with one of these suffixes, powers of 1024.
_BYTE_SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_BYTES = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<suffix>[KMGT]?)", re.ASCII)
# Rates of networks are told in powers of 1000 (tc(8)).
_BIT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BITS = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<suffix>[KMG]?)", re.ASCII)
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SHARE = re.compile(r"(?P<number>\d+(\.\d+)?)%", re.ASCII)


def parse_bytes(name: str, value: int | float | str) -> int:
    """A size in bytes from an int or from JupyterHub's notation ("512M", "1G", "1.5G").

    Raises SpecError, which names the option *name* and the notation.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return int(value)
    match = _BYTES.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise SpecError(
            attempt=f"read {name}",
            answer=f"{value!r} is not a size",
            remedy='Write a number of bytes, or a number with K, M, G or T, such as "512M".',
        )
    return int(float(match["number"]) * _BYTE_SUFFIXES[match["suffix"]])


def parse_bits(name: str, value: int | str) -> int:
    """A rate in bits a second from an int or from "10M", which is ten million.

    Raises SpecError, which names the option *name* and the notation.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63:
        return value
    match = _BITS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise SpecError(
            attempt=f"read {name}",
            answer=f"{value!r} is not a rate",
            remedy='Write bits a second: a number, or one with K, M or G, such as "10M".',
        )
    return int(float(match["number"]) * _BIT_SUFFIXES[match["suffix"]])


def parse_share(value: int | float | str) -> float | None:
    """A share of the machine, "50%", as a number; None for what `parse_bytes` reads."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    return float(match["number"]) / 100 if match else None


def format_bytes(count: int) -> str:
    """A size for people: 536870912 -> '512 MiB'."""
    for suffix, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.4g} {suffix}"
    return f"{count} bytes"


def whole_pages(size_bytes: int) -> int:
    """A cap on memory as Linux will tell it: it counts pages and rounds down."""
    return size_bytes - size_bytes % PAGE_BYTES


def at_least(name: str, value: float | None, smallest: float, remedy: str) -> None:
    """Refuse a *value* of the option *name* that is below *smallest*; None is no wish."""
    if value is not None and not value >= smallest:
        raise SpecError(attempt=f"set {name}", answer=f"{value} is too small", remedy=remedy)
