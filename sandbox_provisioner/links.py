"""links.py - whoever launches; reads only: where a path leads that a kernel may have made."""

from __future__ import annotations

import os

# path_resolution(7).
_MOST_LINKS = 40


def real_path(path: str) -> str:
    """os.path.realpath, but where a link leads on to more links than Linux follows, it is the end,
    as one is that leads to itself: nobody gets anywhere by those.

    A kernel may have made a million of them. Python up to 3.12 calls itself for each, and fails;
    since 3.13 it follows all of them, and others wait meanwhile.

    Linux is asked first, which knows by one call what is found out here by one for each name; of
    what does not exist, or goes meanwhile, it knows nothing.
    """
    return _known_to_linux(path) or _found_out(path)


def _known_to_linux(path: str) -> str:
    """proc_pid_fd(5): the path of what is open; "" for what was removed, or cannot be opened."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        found = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
    finally:
        os.close(fd)
    return "" if found.endswith(" (deleted)") or not found.startswith("/") else found


def _found_out(path: str) -> str:
    """Name by name; those still to come are a stack."""
    real = "/" if path.startswith("/") else os.getcwd()
    names = path.split("/")[::-1]
    links, first, behind = 0, "", 0  # in a row, from the *first* one, with so many names behind it
    while names:
        if len(names) <= behind:
            links = 0  # it led somewhere
        name = names.pop()
        here = os.path.normpath(os.path.join(real, name))  # no link is left before a ".."
        target = "" if name in ("", ".", "..") else _target(here)
        if not target:
            real = here
            continue
        if not links:
            first, behind = here, len(names)
        links += 1
        if links > _MOST_LINKS:
            real = first
            del names[behind:]
            continue
        real = "/" if target.startswith("/") else real
        names += target.split("/")[::-1]
    return real


def _target(path: str) -> str:
    """Where a link leads; "" of what is none, or cannot be looked at."""
    try:
        return os.readlink(path)
    except OSError:
        return ""
