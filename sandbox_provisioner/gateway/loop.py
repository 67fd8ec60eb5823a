"""gateway/loop.py - runs in the gateway: one thread that waits for everything, by epoll(7).

Each box has an epoll instance of its own within ours. One turn takes a few events of each box that
has some: a box that floods waits for its next turn, as each other one does, and within a box Linux
gives those events first that were not given last. asyncio has one queue for all.

May import: inside.printable.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Protocol

from sandbox_provisioner.inside.printable import printable

# What another box waits for at the most, and what is done until then: each moves a chunk of bytes,
# or judges some.
_TURN_SECONDS = 0.002
_EVENTS_OF_A_TURN = 8
_LOGGED_EACH_MINUTE = 20
# Most timers are for what does not happen: those of who has gone are thrown out at times.
_SWEEP_AT = 1000
_MINUTE_SECONDS = 60.0
_MOST_OF_A_TEXT = 1000  # with each letter in up to four bytes below PIPE_BUF

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
ENDED = select.EPOLLHUP | select.EPOLLERR


class Handler(Protocol):
    """Who does something with a descriptor of a group."""

    def on_event(self, fd: int, events: int) -> None:
        """*fd* is ready for *events*."""

    def on_mistake(self) -> None:
        """It raised what nobody expects, and is to go."""


class Timer:
    """Something to be done later, once."""

    __slots__ = ("then",)

    def __init__(self, then: Callable[[], None]) -> None:
        self.then: Callable[[], None] | None = then

    def cancel(self) -> None:
        """More than once is fine."""
        self.then = None


class Group:
    """The descriptors of one box."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._wanted: dict[int, int] = {}
        loop.add(self._epoll.fileno(), self.turn)

    def watch(self, fd: int, handler: Handler, events: int) -> None:
        """Tell *handler* when *fd* is ready for *events*, and of its end."""
        wanted = self._wanted.get(fd)
        if wanted is None:
            self._epoll.register(fd, events)
        elif wanted != events:
            self._epoll.modify(fd, events)
        self._handlers[fd], self._wanted[fd] = handler, events

    def forget(self, fd: int) -> None:
        """No more of *fd*; before it is closed."""
        if self._wanted.pop(fd, None) is not None:
            self._epoll.unregister(fd)
            del self._handlers[fd]

    def turn(self) -> None:
        """A few of what is ready, one by one: what is not asked for stays first in Linux's list."""
        until = self._loop.now + _TURN_SECONDS
        for _ in range(_EVENTS_OF_A_TURN):
            ready = self._epoll.poll(0, 1)
            for fd, events in ready:
                handler = self._handlers[fd]
                self._loop.guarded(partial(handler.on_event, fd, events), handler)
            if not ready or self._epoll.closed or time.monotonic() > until:
                return

    def close(self) -> None:
        """All of its descriptors are forgotten."""
        self._loop.remove(self._epoll.fileno())
        self._epoll.close()
        self._handlers.clear()
        self._wanted.clear()


class Loop:
    """All groups, and what is to be done later. *now* is the time of this turn."""

    def __init__(self) -> None:
        self.now = time.monotonic()
        self._epoll = select.epoll()
        self._turns: dict[int, Callable[[], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sweep_at = _SWEEP_AT
        self._order = itertools.count()
        self._log_from = self.now
        self._logged = 0

    def add(self, fd: int, turn: Callable[[], None]) -> None:
        """Call *turn* whenever *fd* can be read."""
        self._epoll.register(fd, READ)
        self._turns[fd] = turn

    def remove(self, fd: int) -> None:
        """No more of *fd*; before it is closed."""
        self._epoll.unregister(fd)
        del self._turns[fd]

    def later(self, seconds: float, then: Callable[[], None]) -> Timer:
        """Call *then* in so many seconds."""
        timer = Timer(then)
        if len(self._timers) >= self._sweep_at:
            self._timers = [one for one in self._timers if one[2].then is not None]
            heapq.heapify(self._timers)
            self._sweep_at = max(_SWEEP_AT, 2 * len(self._timers))
        heapq.heappush(self._timers, (self.now + seconds, next(self._order), timer))
        return timer

    def run(self, is_over: Callable[[], bool]) -> None:
        """Until *is_over*."""
        while not is_over():
            for fd, _ in self._epoll.poll(self._patience()):
                self.now = time.monotonic()
                if turn := self._turns.get(fd):
                    self.guarded(turn)
            self.now = time.monotonic()
            self._run_timers()

    def _patience(self) -> float:
        while self._timers and self._timers[0][2].then is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else -1

    def _run_timers(self) -> None:
        while self._timers and self._timers[0][0] <= self.now:
            then = heapq.heappop(self._timers)[2].then
            if then is not None:
                self.guarded(then)

    def guarded(self, call: Callable[[], None], handler: Handler | None = None) -> None:
        """A mistake of ours while one connection is served ends that one alone."""
        try:
            call()
        except Exception:
            self.log(traceback.format_exc())
            if handler is not None:
                self.guarded(handler.on_mistake)

    def close(self) -> None:
        """No more turns."""
        self._epoll.close()

    def log(self, text: str) -> None:
        """To standard error, so much a minute and no more; whoever reads that may be gone."""
        if self.now - self._log_from > _MINUTE_SECONDS:
            self._log_from, self._logged = self.now, 0
        self._logged += 1
        if self._logged <= _LOGGED_EACH_MINUTE:
            _write(2, text)


def _write(fd: int, text: str) -> None:
    """If whoever reads it does: pipe(7) takes so much at once when poll(2) finds it writable."""
    look = select.poll()
    look.register(fd, select.POLLOUT)
    if look.poll(0):
        with contextlib.suppress(OSError):
            os.write(fd, f"{printable(text)[-_MOST_OF_A_TEXT:]}\n".encode())
