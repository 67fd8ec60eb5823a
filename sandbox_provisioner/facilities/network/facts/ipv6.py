"""ipv6.py - whoever launches; reads only: whether this machine has IPv6."""

from __future__ import annotations

import contextlib
from pathlib import Path

_FOLDER = "/proc/sys/net/ipv6/conf"


def has_ipv6(folder: str = _FOLDER) -> bool:
    """ip-sysctl.rst: there is no such folder without it. Where an administrator has switched it off
    for all interfaces, or for new ones, which a new namespace may take over, boxes have none."""
    with contextlib.suppress(OSError):
        found = (Path(folder, which, "disable_ipv6").read_text() for which in ("all", "default"))
        return all(text.strip() == "0" for text in found)
    return False
