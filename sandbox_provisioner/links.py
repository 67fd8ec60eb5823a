"""links.py - whoever launches; reads only: where a path leads that a kernel may have made."""

from __future__ import annotations

import os


def real_path(path: str) -> str:
    """os.path.realpath, also where there are more symbolic links in a row than Python can follow.

    Linux follows 40 (path_resolution(7)), so nobody gets anywhere by those: *path* is the end then,
    as it is for a link that leads to itself.
    """
    try:
        return os.path.realpath(path)
    except RecursionError:
        return os.path.abspath(path)
