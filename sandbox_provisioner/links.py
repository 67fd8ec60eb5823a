"""links.py - whoever launches; reads only: where a path leads that a kernel may have made."""

from __future__ import annotations

import os


def real_path(path: str) -> str:
    """os.path.realpath, also where there are more symbolic links in a row than Python can follow.

    Linux follows 40 (path_resolution(7)), so nobody gets anywhere by those: *path* is the end then,
    as it is for a link that leads to itself.

    Linux is asked first, which knows by one call what Python finds out by one for each name; of
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
    try:
        return os.path.realpath(path)
    except RecursionError:
        return os.path.abspath(path)
