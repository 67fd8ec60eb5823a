"""warm/pages.py - runs in a nursery, before it forks: arranges memory so that children share it.

A page is shared until somebody writes to it, and in Python looking at an object is writing to its
count of references. What every kernel looks at or makes is brought together here, as far as that
can be done from outside of the interpreter.
"""

from __future__ import annotations

import os
import sys

_kept: list[object] = []
# Objects/bytesobject.c: what a bytes object takes besides its content, and the smallest that is not
# a shared one.
_BYTES_OVERHEAD = sys.getsizeof(b"")
_SMALLEST = 48


def compact() -> None:
    """Called once all is imported."""
    _plug()
    # Each kernel makes a list of these: of all modules that are loaded when it begins.
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        path = names.get("__file__")
        if type(path) is str:
            names["__file__"] = "".join(list(path))


def _plug() -> None:
    """Fill the holes that freed objects have left, so that what a kernel allocates lies together on
    new pages, and does not make shared ones its own one by one."""
    for size, free in _holes():
        if size >= _SMALLEST:
            _kept.append([bytes(size - _BYTES_OVERHEAD) for _ in range(free)])


def _holes() -> list[tuple[int, int]]:
    """Of each size of blocks how many are free in pools that are in use, by what
    sys._debugmallocstats writes: "class size pools blocks-in-use available", one a line. None where
    another allocator is used."""
    reader, writer = os.pipe()
    stderr = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        os.set_blocking(2, False)  # it is some 4 KB: what a pipe does not hold is not needed
        sys._debugmallocstats()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    with os.fdopen(reader, "rb") as told:
        lines = [line.split() for line in told.read().splitlines()]
    rows = [
        [int(word) for word in words]
        for words in lines
        if len(words) == 5 and all(map(bytes.isdigit, words))
    ]
    return [(size, free) for _, size, _, _, free in rows]
