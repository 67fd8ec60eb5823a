"""resolver.py - whoever launches; reads only: where the C library of this machine asks for names.

A box that has the machine's own network has these files of it, and the sockets of who answers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from sandbox_provisioner.inside import wire

# nsswitch.conf(5) may name systemd-resolved (nss-resolve(8)), nscd(8) and avahi; who answers there
# listens on a socket in one of these folders.
_RESOLVED = "/run/systemd/resolve"
_FOLDERS = ((_RESOLVED, _RESOLVED), ("/var/run/nscd", "/run/nscd"))


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
    for path in wire.RESOLVER_FILES:
        if os.path.isfile(root + path):
            real = os.path.realpath(root + path)
            shown = real.startswith(f"{os.path.realpath(root + _RESOLVED)}/")
            yield ResolverPlace(path, path, real.removeprefix(root) if shown else "")


def by_descriptor(places: tuple[ResolverPlace, ...]) -> tuple[ResolverPlace, ...]:
    """The same, for who is told of such a file by a descriptor: a file that is attached stays the
    one that it was, also where the machine has replaced it."""
    fds = wire.RESOLVER_FILES
    return tuple(
        place
        if place.link or place.target not in fds
        else replace(place, link=f"/proc/self/fd/{fds[place.target]}")
        for place in places
    )


class ResolverFiles:
    """Those files, for who wants to know when one is another one."""

    def __init__(self, root: str = "") -> None:
        """*root* stands for "/" in tests."""
        self._root = root
        self._seen: dict[str, tuple[int, ...]] = {}

    def changed(self) -> Iterator[tuple[str, int]]:
        """Those that are not as they were the last time: the path, and a descriptor by which it can
        be opened, which is closed afterwards. What is not there now stays as it was."""
        for path in wire.RESOLVER_FILES:
            with contextlib.suppress(OSError):
                stamp = _stamp(os.stat(self._root + path))
                if self._seen.get(path) != stamp:
                    fd = os.open(self._root + path, os.O_PATH | os.O_CLOEXEC)
                    try:
                        yield path, fd
                    finally:
                        os.close(fd)
                    self._seen[path] = stamp


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
