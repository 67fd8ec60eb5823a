"""resolver.py - whoever launches; reads only: where the C library of this machine asks for names.

A box that has the machine's own network has these files of it, and the sockets of who answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

# nsswitch.conf(5) may name systemd-resolved (nss-resolve(8)), nscd(8) and avahi; who answers there
# listens on a socket in one of these folders.
_RESOLVED = "/run/systemd/resolve"
_FOLDERS = ((_RESOLVED, _RESOLVED), ("/var/run/nscd", "/run/nscd"))
_FILES = ("/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/resolv.conf")


@dataclass(frozen=True, slots=True)
class ResolverPlace:
    """What shows at *target*: the host's *source*, or, where that is in a folder that shows too, a
    link with the text *link*: whoever writes such a file replaces it."""

    target: str
    source: str
    link: str = ""


def find_resolver(root: str = "") -> tuple[ResolverPlace, ...]:
    """What there is of it; *root* stands for "/" in tests."""
    return tuple(_found(root))


def _found(root: str) -> Iterator[ResolverPlace]:
    for target, source in _FOLDERS:
        if os.path.isdir(root + source):
            yield ResolverPlace(target, source)
    for path in _FILES:
        if os.path.isfile(root + path):
            real = os.path.realpath(root + path)
            shown = real.startswith(f"{os.path.realpath(root + _RESOLVED)}/")
            yield ResolverPlace(path, path, real.removeprefix(root) if shown else "")
