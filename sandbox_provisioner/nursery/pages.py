"""nursery/pages.py - runs in a nursery, before it forks: arranges memory so that children share it.

A page is shared until somebody writes to it, and in Python looking at an object is writing to its
count of references. What every kernel looks at or makes is brought together here, as far as that
can be done from outside of the interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection

_kept: list[object] = []
# Objects/bytesobject.c: what a bytes object takes besides its content, and the smallest that is not
# a shared one.
_BYTES_OVERHEAD = sys.getsizeof(b"")
_SMALLEST = 48


def _copied(text: str) -> str:
    """The same text beside what was made last, wherever *text* lies."""
    return "".join(list(text))


def bring_names_together() -> None:
    """Called once all is imported: each kernel makes a set of the names of all modules."""
    modules = {
        _copied(name) if type(name) is str else name: module for name, module in sys.modules.items()
    }
    sys.modules.clear()
    sys.modules.update(modules)


class _Module:
    """What `ListedModules` tells of one."""

    __slots__ = ("__file__",)

    def __init__(self, path: str) -> None:
        self.__file__ = _copied(path)


class ListedModules:
    """Stands in for `sys` where each kernel makes a list of the files of all modules: to look at
    a thousand modules is to write to two pages of each."""

    def __init__(self, ours: Collection[str]) -> None:
        """*ours* are names of modules that no kernel has."""
        found = (module for name, module in list(sys.modules.items()) if name not in ours)
        paths = (getattr(module, "__file__", None) for module in found)
        self.modules = dict(enumerate(_Module(path) for path in paths if type(path) is str))

    def __getattr__(self, name: str) -> object:
        return getattr(sys, name)


def plug() -> None:
    """Called once all is imported: fill the holes that freed objects have left, so that what a
    kernel allocates lies together on new pages, and does not make shared ones its own one by one.
    """
    for size, free in _holes():
        if size >= _SMALLEST:
            _kept.append([bytes(size - _BYTES_OVERHEAD) for _ in range(free)])


def forget_lookups() -> None:
    """Called last of all, where references are counted: empty the cache of attributes of types by
    their names. Each lookup of a kernel's would push one of the nursery's out of it, and count a
    reference to a name less, wherever that lies."""
    if hasattr(sys, "_clear_type_cache"):  # a name of CPython's own, which may go
        sys._clear_type_cache()


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
