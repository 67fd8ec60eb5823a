"""ipv6.py - whoever launches; reads only: whether this machine has IPv6."""

from __future__ import annotations

import contextlib
from pathlib import Path

_DISABLED = "/proc/sys/net/ipv6/conf/all/disable_ipv6"


def has_ipv6(path: str = _DISABLED) -> bool:
    """ip-sysctl.rst: there is no such file without it. Where an administrator has switched it off
    for all interfaces, boxes have none either."""
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() == "0"
    return False
