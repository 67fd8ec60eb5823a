"""descriptors.py - any process outside: descriptors of a server that is not ours to know.

A server may have closed its standard streams, and forks children that end later than it. What is
opened then lies at 0, 1 or 2, where everybody takes it for a stream, or stays open in a child.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

_STANDARD = (0, 1, 2)


class Private(Protocol):
    """Who has descriptors that no other process may keep open: a lock, or a socket whose end
    tells."""

    def forget(self) -> None:
        """Close them, in a child that was forked meanwhile."""
        ...


_private: weakref.WeakSet[Private] = weakref.WeakSet()


def keep_from_children(owner: Private) -> None:
    """Let what *owner* has end in each child that this process forks, as long as *owner* lives.
    A program that is executed gets none of it anyway."""
    _private.add(owner)


def _forget_all() -> None:
    for owner in list(_private):
        owner.forget()


os.register_at_fork(after_in_child=_forget_all)


def occupy_standard_streams() -> None:
    """Open /dev/null at those of 0, 1 and 2 that are closed: what is opened from here on lies
    above."""
    while (fd := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) in _STANDARD:
        pass
    os.close(fd)
