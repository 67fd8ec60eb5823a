"""nursery/immortal.py - runs in a nursery, before it forks: ends the counting of references.

In Python looking at an object is writing to its count of references, and a page that a kernel
writes to is its own from then on. Since Python 3.12 (PEP 683) there are objects whose count stays
as it is: None, small numbers, interned strings. There is no call that makes others immortal; in
3.12 and 3.13 it is the count itself that does (Include/object.h), so it is written here.

What is immortal is never freed. A nursery has it for as long as it lives anyway, and a kernel that
freed it would free no memory, since its page is the nursery's.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from types import CodeType

# The lower half of the count. From 3.14 on the interpreter goes by a flag as well, when it decides
# whether to count what it holds itself: there is no way from outside.
_IMMORTAL = 0xFFFFFFFF
_VERSIONS = ((3, 12), (3, 13))
# What the garbage collector knows nothing of, and each call looks at.
_PARTS_OF_CODE = (
    "co_consts", "co_names", "co_filename", "co_name", "co_qualname", "co_linetable",
    "co_exceptiontable",
)  # fmt: skip
_kept: list[object] = []


def immortalize() -> bool:
    """Called once all is imported: make all that is there immortal; whether this Python can."""
    if not _can():
        return False
    waiting: list[object] = gc.get_objects()
    while waiting:
        found = waiting.pop()
        count = _count_of(found)
        if count.value != _IMMORTAL:  # else it has been here, or is Python's own
            count.value = _IMMORTAL
            waiting += _parts_of(found)
    return True


def _parts_of(found: object) -> list[object]:
    if type(found) is CodeType:
        return [getattr(found, name) for name in _PARTS_OF_CODE]
    if type(found) is dict:  # of one whose keys are all text the collector tells the values alone
        return [*found, *found.values()]
    return gc.get_referents(found)


def _count_of(found: object) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(id(found))


def _can() -> bool:
    """Tried with one object: where this Python counts elsewhere or otherwise nothing is written."""
    known = sys.implementation.name == "cpython" and sys.version_info[:2] in _VERSIONS
    if not known or "t" in sys.abiflags or sys.maxsize < 1 << 32 or sys.byteorder != "little":
        return False
    tried = object()
    _kept.append(tried)
    count = _count_of(tried)
    if _moves(count, tried) != 10:
        return False
    count.value = _IMMORTAL
    return _moves(count, tried) == 0 and count.value == _IMMORTAL


def _moves(count: ctypes.c_uint32, found: object) -> int:
    """What ten more references to *found* add to its count."""
    before = count.value
    holders = [found] * 10
    return count.value - before if holders else 0
