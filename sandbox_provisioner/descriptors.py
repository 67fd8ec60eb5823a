"""descriptors.py - any process outside: descriptors, in a server of which we know nothing.

A server may have closed its standard streams, and forks children that end later than it. What is
opened then lies at 0, 1 or 2, where everybody takes it for a stream, or stays open in a child.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

_STANDARD = (0, 1, 2)
# What a start has open at once, more or less; and what it takes to clean up.
_OF_A_START = 24
_OF_CLEAN_UP = 8


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


class _PrivateSocket(socket.socket):
    def forget(self) -> None:
        self.close()


def private_pair() -> tuple[socket.socket, socket.socket]:
    """The ends of a channel of whole messages, on which an end is a word: neither stays open in a
    child that this process forks."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours, theirs = (_PrivateSocket(fileno=end.detach()) for end in ends)
    keep_from_children(ours)
    keep_from_children(theirs)
    return ours, theirs


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


def is_readable(fd: int, seconds: float = 0.0) -> bool:
    """Whether *fd* can be read, or has ended, within so long. By poll(2): a server may have so many
    descriptors that select(2) cannot name them."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def at_its_end() -> int:
    """A descriptor that has ended, as `is_readable` has it, and any event loop."""
    ours, other = os.pipe2(os.O_CLOEXEC)
    os.close(other)
    return ours


@contextlib.contextmanager
def closing(fds: Sequence[int]) -> Iterator[Sequence[int]]:
    """*fds*, all of which are closed in the end."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


_lock = threading.Lock()
_kept: list[int] = []


def afford_a_start() -> None:
    """OSError (EMFILE) now, where nothing is made yet, if a start would run out of descriptors.
    Some are kept from now on, so that whatever happens can be cleaned up after."""
    with contextlib.ExitStack() as stack:
        _keep()
        for _ in range(_OF_A_START):
            stack.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


@contextlib.contextmanager
def for_clean_up() -> Iterator[None]:
    """Let those that are kept be used."""
    with _lock:
        while _kept:
            os.close(_kept.pop())
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            _keep()


def _keep() -> None:
    with _lock:
        while len(_kept) < _OF_CLEAN_UP:
            _kept.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
